"""The settings of all stages together: the profiles ``quick`` and ``full``, each in two methods."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from covidseg.classifier import ClassifierSettings
from covidseg.curriculum import MutualSettings
from covidseg.errors import ArtifactError, InputFileError, SettingsError, one_of
from covidseg.gradcam import CamSettings
from covidseg.lungnet import LungNetSettings
from covidseg.lungs import LungSettings
from covidseg.patches import MilSettings
from covidseg.preprocess import PrepareSettings
from covidseg.segmenter import FineSettings, SegmenterSettings
from covidseg.store import check_hash


@dataclass(frozen=True)
class Profile:
    """Settings of every stage.

    Attributes:
        name: ``quick`` or ``full``.
        method: ``extended`` or ``faithful``, see :func:`profile_named`.
        true_lungs: Use the lung masks of the data folders in place of lungs that were found, for comparison only.
    """

    name: str
    method: str = "extended"
    true_lungs: bool = False
    lungs: LungSettings = field(default_factory=LungSettings)
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    lung_net: LungNetSettings = field(default_factory=LungNetSettings)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    cam: CamSettings = field(default_factory=CamSettings)
    mil: MilSettings = field(default_factory=MilSettings)
    mutual: MutualSettings = field(default_factory=MutualSettings)
    fine: FineSettings = field(default_factory=FineSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)


METHODS = ("extended", "faithful")
LONGEST_FAITHFUL = 500  # steps of the faithful segmenter
PROFILES = {
    # A few minutes on two CPU cores, no step above one minute: for lessons and tests.
    "quick": Profile("quick", lung_net=LungNetSettings(steps=160), mil=MilSettings(steps=160),
                     mutual=MutualSettings(again=0.4),
                     segmenter=SegmenterSettings(channels=(8, 16, 32, 64), steps=150, prior=0.05)),
    # Longer training of wider nets: for real scans, on a GPU if there is one. See results/ for what it takes.
    "full": Profile(
        "full", lung_net=LungNetSettings(steps=600, again=1500, add=0.5, add_thin=0.6),
        classifier=ClassifierSettings(members=5), mil=MilSettings(steps=300),
        segmenter=SegmenterSettings(steps=1000)),
}


def profile_named(name: str, method: str = "extended") -> Profile:
    """The profile ``quick`` or ``full`` of one of the two methods.

    ``extended`` paints lesions on lesion-free slices (:mod:`covidseg.augment`), for patches, segmenter and, from the
    second round on, the classifier; ``faithful`` is without them, see :func:`faithful`. Both paint vessels there, which
    stay *no lesion*: more of the healthy lung that slice labels are exact about.

    Raises:
        SettingsError: there is no such profile or method.
    """
    one_of(name, PROFILES, "profile")
    one_of(method, METHODS, "method")
    return PROFILES[name] if method == "extended" else faithful(PROFILES[name])


def faithful(profile: Profile) -> Profile:
    """The same profile with the stages that the abstract describes, and no lesion painted for them.

    Ours in both methods: the lung net, which learns from painted consolidation, painted vessels, an ensemble of
    classifiers, and a share of LayerCAM in the map.

    The segmenter then learns from fine labels alone: they count in full, lesion-free slices get lesions of other slices
    (:func:`covidseg.augment.paste_lesions`), and training is short, before the errors of the labels are learned too.
    Those labels leave out doubtful rims and nothing painted says where a lesion ends, so the outline is drawn lower. In
    the full profile the labels are not refreshed: mixed with the net's own opinion they would shrink further. The quick
    training is so short that the refreshed labels help it; both were found on dev.
    """
    plain = repainted(profile, share=0.0)
    mutual = replace(plain.mutual, painted=0.0)
    learner = plain.segmenter
    refresh = learner.refresh if learner.steps < LONGEST_FAITHFUL else ()
    segmenter = replace(learner, fine_weight=1.0, paste=0.7, steps=min(learner.steps, LONGEST_FAITHFUL),
                        refresh=refresh, threshold=0.1)
    return replace(plain, method="faithful", mutual=mutual, segmenter=segmenter)


def repainted(profile: Profile, **changes: Any) -> Profile:
    """The profile with other :class:`~covidseg.augment.PaintSettings` for the patches and the segmenter."""
    mil, segmenter = profile.mil, profile.segmenter
    return replace(profile, mil=replace(mil, paint=replace(mil.paint, **changes)),
                   segmenter=replace(segmenter, paint=replace(segmenter.paint, **changes)))


def _settings(kind: Any, plain: dict) -> Any:
    """A settings class from its JSON: lists become tuples, inner objects settings of their own."""
    kinds = get_type_hints(kind)
    if plain.keys() != kinds.keys():
        raise KeyError(*sorted(plain.keys() ^ kinds.keys()))
    return kind(**{name: _setting(kinds[name], value) for name, value in plain.items()})


def _setting(kind: Any, plain: Any) -> Any:
    """One setting of a type from its JSON; a TypeError, or a ValueError, where it is of another one."""
    if is_dataclass(kind):
        return _settings(kind, plain)
    if get_origin(kind) is tuple and isinstance(plain, list):
        first, *rest = get_args(kind)
        kinds = [first] * len(plain) if rest == [...] else [first, *rest]
        return tuple(_setting(inner, value) for inner, value in zip(kinds, plain, strict=True))
    if type(plain) is kind or (kind is float and type(plain) is int):
        if kind is float and not math.isfinite(plain):
            raise ValueError(f"{plain} is no number")
        return plain
    raise TypeError(f"{plain!r} is of another type than {getattr(kind, '__name__', kind)}")


def profile_from(plain: dict, path: Path | None = None) -> Profile:
    """The settings of a run from the JSON of its report.

    Args:
        path: of the report, to be named in errors.

    Raises:
        ArtifactError: the report names settings that this version does not know, or lacks some that it needs.
    """
    try:
        return _settings(Profile, plain)
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, SettingsError) as error:
        raise ArtifactError(f"holds settings that cannot be read ({error})", path=path,
                            remedy="Train again with this version of covidseg") from error


def profile_json(profile: Profile) -> dict:
    """Settings as plain JSON values."""
    return json.loads(json.dumps(asdict(profile)))


# --- settings of a run ----------------------------------------------------------------------------------------------

REPORT = "run.json"


def same_run(report: Path, content: dict[str, Any]) -> bool:
    """Whether a report is that of the same nets, trained in the same way; when and by which command does not matter."""
    try:
        there = json.loads(report.read_text(encoding="utf-8"))
        return all(there.get(part) == content.get(part)
                   for part in ("data", "labelled_slices", "settings", "seed", "stages"))
    except (OSError, ValueError, AttributeError, RecursionError):  # no report of a run
        return False


def read_report(run: Path) -> tuple[dict[str, Any], Profile, dict[str, str]]:
    """The report of a run folder, its settings, and the file names of the stages that are exported.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report is damaged.
    """
    report = run / REPORT
    if not report.is_file():
        raise InputFileError("is no finished run (it has no run.json)", path=run,
                             remedy="Name a folder written by `covidseg train --out`")
    check_hash(report, "Train or export it again")
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        profile = profile_from(content["settings"], report)
        wanted = {"segmenter": "segmenter", "patches": f"mil{profile.mutual.last}",
                  **({"lung_net": "lung_net"} if profile.lung_net.steps else {})}
        files = {name: content["stages"][stage] for name, stage in wanted.items()}
        for file in files.values():  # a folder in the name could lead out of the run
            if not re.fullmatch(r"[\w-]{1,100}\.safetensors", file, re.ASCII):
                raise ValueError(f"{file!r} is not the name of a stage's file")
        return content, profile, files
    except (ValueError, KeyError, TypeError, RecursionError) as error:  # also bytes that are no UTF-8
        raise ArtifactError(f"is damaged ({error})", path=report, remedy="Train again") from error
