"""What a chapter stands on: its scans, its run, nets to start from, and sentences that its outputs bear out.

Every chapter begins with::

    lesson = open_lesson(data, profile, seed, trains="classifier1")
    run, look = lesson.run, lesson.look

``data`` is ``"phantom"``, a registered pair such as ``"medseg"``, or two folders of one's own, so that the same chapter
runs on made-up and on real scans. ``run`` knows slice labels only. ``look`` holds the test slices with their true
outlines: whatever the book compares with the truth it compares there, since nobody outlines lesions in the training
slices of a weakly supervised method.

For the phantom's default run the nets of all stages come with the package. A chapter takes those before its own from
there and trains its own, so that it is at its subject at once and says the same on every computer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from IPython.display import Markdown

from covidseg import DISCLAIMER, __version__
from covidseg.book.figures import use_style
from covidseg.data.folder import Dataset
from covidseg.data.grey import clean
from covidseg.data.registry import entry, home, is_present, load_registry
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation.evaluate import Unseen, training_truth, unseen_slices
from covidseg.pipeline import Run, open_data, open_run
from covidseg.preprocess import crop, lung_box, normalise
from covidseg.profiles import REPORT, profile_json
from covidseg.store import load_arrays, save_arrays, write_with_hash

# Registered sets that belong together: the one whose slice labels train, and the one whose outlines test.
PAIRS = {"phantom": ("phantom", "phantom"), "medseg": ("medseg2", "medseg1")}
# The stages that train a net, in order; `trains` of a chapter is the first that is its own.
NETS = ("lung_net", "classifier1", "mil1", "classifier2", "mil2", "segmenter")
SHIPPED = Path(__file__).parent / "nets"


@dataclass(frozen=True, repr=False)
class Lesson:
    """What a chapter stands on.

    Attributes:
        run: Training scans, settings and stages; weak training sees slice labels only.
        test: Scans of other patients, with outlines.
        title: Which scans these are, for readers.
        real: Whether they are of people.
        shipped: The stages whose nets came with the package.
    """

    run: Run
    test: Dataset
    title: str
    real: bool
    shipped: tuple[str, ...] = ()

    @cached_property
    def look(self) -> Unseen:
        """The test slices with their true outlines, in lungs and crops as in training. For looking and measuring."""
        return unseen_slices(self.run, self.test)

    @cached_property
    def training_masks(self) -> np.ndarray | None:
        """True outlines of the training slices, ``(N, S, S)`` bool; None where a scan has none beside it."""
        known = all(case.mask is not None for case in self.run.data.cases)
        return training_truth(self.run) if known else None

    def __repr__(self) -> str:  # names no folder, since a page shows it
        return self._repr_markdown_()

    def _repr_markdown_(self) -> str:
        profile, device = self.run.profile, self.run.device.type
        device = {"cpu": "CPU", "cuda": "GPU"}.get(device, device)
        lines = [f"**This page shows** {self.title}; profile `{profile.name}`, seed {self.run.seed}, {device}; "
                 f"covidseg {__version__}."]
        if self.shipped:
            lines.append(f"Stages of earlier chapters came with the package: {', '.join(self.shipped)}.")
        if self.real:
            lines.append(DISCLAIMER)
        return " ".join(lines)


def open_lesson(data: str | Sequence[str] = "phantom", profile: str = "quick", seed: int = 0, *,
                trains: str = "") -> Lesson:
    """The scans and the run of a chapter.

    Args:
        data: ``"phantom"``; a registered pair, ``"medseg"``: trained on MedSeg 2, tested on MedSeg 1; or two folders,
            one with slice labels for training and one with outlines for testing.
        profile: ``quick`` or ``full``.
        seed: of all stages.
        trains: the first stage that this chapter trains itself, one of ``NETS``; by default none.

    Raises:
        DatasetError: the scans are not there, and were not fetched.
        SettingsError: no such stage.
    """
    if trains and trains not in NETS:
        raise SettingsError(f"no stage {trains!r} trains a net", remedy=f"Choose one of {', '.join(NETS)}")
    training, test, title = find_scans(data)
    sides = ("train", "test") if data == "phantom" else (None, None)  # the phantom is one set with a split of its own
    run = open_run(training, profile=profile, seed=seed, part=sides[0], log=lambda line: None)
    before = NETS[:NETS.index(trains)] if trains else NETS
    shipped = bring(run, before) if data == "phantom" else ()
    return Lesson(run, open_data(test, sides[1]), title, training != "phantom", shipped)


def find_scans(data: str | Sequence[str]) -> tuple[str, str, str]:
    """Names or folders of the training and the test scans, and what to call them; offers to fetch what is missing.

    Raises:
        DatasetError: they are not there, and were not fetched; or a folder of one's own lacks labels or outlines that
            chapters need. The scans themselves are not opened.
    """
    if isinstance(data, str) and data in PAIRS:
        training, test = PAIRS[data]
        for name in dict.fromkeys((training, test)):
            _offer(name)
        if data == "phantom":
            return training, test, "a phantom, made on this machine, whose lesions are known exactly"
        return training, test, (f"patients: training scans {entry(training).title} ({entry(training).licence}), test "
                                f"scans {entry(test).title} ({entry(test).licence})")
    if isinstance(data, str) or len(data) != 2:
        raise DatasetError(f"{data!r} names no scans for the book",
                           remedy=f"Choose one of {', '.join(PAIRS)}, or give two folders: training and test")
    training, test = (str(folder) for folder in data)
    _demand_labels_and_outlines(open_data(training), open_data(test))
    return training, test, f"patients: training scans {Path(training).name}, test scans {Path(test).name}"


def _demand_labels_and_outlines(training: Dataset, test: Dataset) -> None:
    """Refuses at once what would stop the chapters later, each with an error of its own."""
    if {label for case in training.cases for label in case.labels.values()} != {0, 1}:
        raise DatasetError("training needs slices with and without a lesion, and the label table does not name both",
                           path=training.root, remedy="Complete the label table, or give another training folder")
    if bare := [case.id for case in test.cases if case.mask is None]:
        raise DatasetError(f"the book measures on test scans, and there is no lesion mask for {', '.join(bare)}",
                           path=test.root, remedy="Add the masks (mask/ID.nii.gz beside im/ID.nii.gz), take the scans "
                                                  "out, or give another test folder")


def _offer(name: str) -> None:
    """Offers to fetch a registered set that is not there yet, if there is somebody to ask."""
    if name not in load_registry() or entry(name).kind != "download" or is_present(home(name)):
        return
    item = entry(name)
    print(f"{item.title} is not there yet: about {item.megabytes} MB, licence {item.licence}.\n{item.licence_text()}")
    try:
        agreed = input("Fetch it now and accept this licence? [y/N] ").strip().lower() in ("y", "yes")
    except Exception:  # no keyboard: a notebook that a program runs has an error of its own for that
        agreed = False
    if agreed:
        from covidseg.data.layout import get_dataset  # here, so that a chapter on the phantom need not load it

        get_dataset(item, home(name))
    else:
        raise DatasetError(f"the data set '{name}' has not been fetched", path=home(name).name,
                           remedy=f"Run `covidseg data get {name}`, or take data = \"phantom\"")


def close_up(image: np.ndarray, lung: np.ndarray, *masks: np.ndarray,
             margin: float = 0.05) -> tuple[np.ndarray, list[np.ndarray]]:
    """One slice cut to its lungs, as fine as it was stored; the crops that nets see are coarser.

    Args:
        image: ``(H, W)`` HU or display values.
        lung: ``(H, W)`` bool, not empty.
        masks: ``(H, W)`` bool each.
        margin: width added around the lungs, as a share of the longer side of their box.

    Returns:
        The normalised picture, ``(S, S)`` float32 where 0 is air in the lung and 1 soft tissue, and the masks.
    """
    box = np.array(lung_box(lung, margin))
    picture = crop(normalise(clean(image).values, lung), box, box[2], 0.0)
    return picture, [crop(mask.astype(np.float32), box, box[2], 0.0) > 0.5 for mask in masks]


# --- nets of earlier chapters ---------------------------------------------------------------------------------------

def bring(run: Run, stages: Sequence[str], shipped: Path = SHIPPED) -> tuple[str, ...]:
    """Puts nets that come with the package where a run looks for its stages.

    Args:
        run: of the phantom. With other settings or another seed than those of the shipped nets nothing is brought.
        stages: which, of ``NETS``; those that the run has trained already stay.
        shipped: folder of the nets, from :func:`ship`.

    Returns:
        The stages that were brought.
    """
    report = json.loads((shipped / REPORT).read_text(encoding="utf-8")) if (shipped / REPORT).exists() else {}
    if report.get("settings") != profile_json(run.profile) or report.get("seed") != run.seed:
        return ()
    brought = []
    for stage in stages:
        path = shipped / f"{stage}.safetensors"
        if path.exists() and not run.store.path(stage, run.key(stage)).exists():
            arrays, notes = load_arrays(path)
            save_arrays(run.store.path(stage, run.key(stage)),
                        {name: value.astype(np.float32) if value.dtype == np.float16 else value
                         for name, value in arrays.items()}, notes)
            brought.append(stage)
    return tuple(brought)


def ship(run: Run, shipped: Path = SHIPPED) -> list[Path]:
    """Writes the nets of a run to be shipped with the package, in half precision; what lies there is replaced.

    Returns:
        The files written.
    """
    shutil.rmtree(shipped, ignore_errors=True)
    stages = [stage for stage in NETS if stage in run.stages()]
    for stage in stages:
        arrays, notes = load_arrays(run.store.path(stage, run.key(stage)))
        if stage == "mil2":  # chapter 6 trains this one, and no later chapter shows the phases of its curriculum
            arrays = {name: value for name, value in arrays.items() if name.startswith("net.")}
            notes = {**notes, "paces": []}
        save_arrays(shipped / f"{stage}.safetensors", {
            name: value.astype(np.float16) if value.dtype == np.float32 else value
            for name, value in arrays.items()}, notes)
    report = {"note": DISCLAIMER, "seed": run.seed, "settings": profile_json(run.profile), "stages": stages}
    write_with_hash(shipped / REPORT, json.dumps(report, indent=2) + "\n")
    return sorted(shipped.iterdir())


# --- a page ---------------------------------------------------------------------------------------------------------

def begin(version: str) -> None:
    """The first line of a chapter: the look of its figures, and whether notebook and package belong together.

    Args:
        version: of covidseg, for which the notebook was written.

    Raises:
        SettingsError: another version is installed.
    """
    if version != __version__:
        raise SettingsError(f"this notebook was written for covidseg {version}, installed is {__version__}",
                            remedy=f"Install covidseg {version}, or open the notebook of {__version__}")
    use_style()


def claim(*sentences: tuple[str, object]) -> Markdown:
    """A sentence that the outputs of the page bear out: the first one whose condition holds.

    Where the editions of the book, or two seeds, may end differently, there is a sentence for each outcome.

    Raises:
        AssertionError: none of the conditions holds, so the text would contradict its page.
    """
    for sentence, holds in sentences:
        if holds:
            return Markdown(sentence)
    raise AssertionError("no longer true: " + " | ".join(sentence for sentence, _ in sentences))
