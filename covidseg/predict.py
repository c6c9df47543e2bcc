"""Masks for new scans from a finished run."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg.artifacts import load_arrays, load_net
from covidseg.cam import CamSettings
from covidseg.classify import ClassifierSettings
from covidseg.curriculum import CurriculumSettings
from covidseg.errors import ArtifactError, InputFileError, NoLungError, SettingsError
from covidseg.fine import FineSettings
from covidseg.io import Scan
from covidseg.lungnet import LungNetSettings, make_lung_net
from covidseg.lungs import LungSettings
from covidseg.mil import MilSettings
from covidseg.mutual import MutualSettings
from covidseg.paint import PaintSettings
from covidseg.pipeline import Profile, find_lungs
from covidseg.prepare import PrepareSettings, uncrop
from covidseg.refine import SegmenterSettings, lesion_probabilities, make_segmenter

REPORT = "run.json"


@dataclass(frozen=True)
class Predictor:
    """Trained nets with the settings they were trained with; ``lung_net`` is None where the run has none."""

    segmenter: nn.Module
    lung_net: nn.Module | None
    profile: Profile

    def probabilities(self, scan: Scan) -> np.ndarray:
        """Lesion probability of every voxel, ``(slices, rows, columns)`` float32, 0 outside the lung but for
        the pixels at its edge.

        Raises:
            NoLungError: there is no lung in any slice.
        """
        found, crops = find_lungs(scan.pixels, self.lung_net, self.profile)
        if not len(found):
            raise NoLungError("no lung was found in any slice", path=scan.path,
                              remedy="covidseg expects chest CT with air in the lungs darker than tissue")
        result = np.zeros(scan.pixels.shape, np.float32)
        for k, small, box in zip(found, lesion_probabilities(self.segmenter, crops), crops.boxes, strict=True):
            result[k] = uncrop(small, box, scan.pixels.shape[1:])
        return result


def profile_from(plain: dict) -> Profile:
    """The settings of a run from the JSON of its report.

    Raises:
        ArtifactError: the report names settings that this version does not know.
    """
    kinds = {"lungs": LungSettings, "prepare": PrepareSettings, "lung_net": LungNetSettings,
             "classifier": ClassifierSettings, "cam": CamSettings,
             "mil": MilSettings, "mutual": MutualSettings,
             "fine": FineSettings, "segmenter": SegmenterSettings}
    def read(kind: Any, values: dict) -> Any:
        """One settings class from its JSON: lists become tuples, inner objects settings of their own."""
        inner = {"paint": PaintSettings, "curriculum": CurriculumSettings}
        return kind(**{key: read(inner[key], value) if key in inner
                       else tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    try:
        return Profile(plain["name"], plain["method"],
                       **{name: read(kind, plain[name]) for name, kind in kinds.items()})
    except (KeyError, TypeError, AttributeError, SettingsError) as error:
        raise ArtifactError(f"the run's settings cannot be read ({error})",
                            remedy="Train again with this version of covidseg") from error


def profile_json(profile: Profile) -> dict:
    """Settings as plain JSON values."""
    return json.loads(json.dumps(asdict(profile)))


def load_predictor(run: Path, device: torch.device = torch.device("cpu")) -> Predictor:
    """Reads the segmenter of a run folder written by ``covidseg train``.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report or weights are damaged.
    """
    report = run / REPORT
    if not report.is_file():
        raise InputFileError("is no finished run (it has no run.json)", path=run,
                             remedy="Name a folder written by `covidseg train --out`")
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        stages = content["stages"]
        profile = profile_from(content["settings"])
        segmenter, lung_net = stages["segmenter"], stages["lung_net"] if profile.lung_net.steps else None
    except (ValueError, KeyError, TypeError) as error:  # also bytes that are no UTF-8
        raise ArtifactError(f"is damaged ({error})", path=report, remedy="Train again") from error
    def read(stage: str, empty: nn.Module) -> nn.Module:
        return load_net(empty, load_arrays(run / "stages" / stage)[0]).to(device)
    return Predictor(read(segmenter, make_segmenter(profile.segmenter)),
                     read(lung_net, make_lung_net(profile.lung_net)) if lung_net else None, profile)
