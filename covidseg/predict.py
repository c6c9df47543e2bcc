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
from covidseg.errors import ArtifactError, InputFileError, NoLungError, SettingsError
from covidseg.fine import FineSettings
from covidseg.io import Scan
from covidseg.lungs import LungSettings, lung_masks
from covidseg.mil import MilSettings
from covidseg.paint import PaintSettings
from covidseg.pipeline import Profile
from covidseg.prepare import PrepareSettings, make_crops, uncrop
from covidseg.refine import SegmenterSettings, lesion_probabilities, make_segmenter

REPORT = "run.json"


@dataclass(frozen=True)
class Predictor:
    """A trained segmenter with the settings it was trained with."""

    segmenter: nn.Module
    profile: Profile

    def probabilities(self, scan: Scan) -> np.ndarray:
        """Lesion probability of every voxel, ``(slices, rows, columns)`` float32, 0 outside the lung.

        Raises:
            NoLungError: there is no lung in any slice.
        """
        lungs = lung_masks(scan.pixels, self.profile.lungs)
        found = np.flatnonzero(lungs.any(axis=(1, 2)))
        if not len(found):
            raise NoLungError("no lung was found in any slice", path=scan.path,
                              remedy="covidseg expects chest CT with air in the lungs darker than tissue")
        result = np.zeros(scan.pixels.shape, np.float32)
        for part in np.array_split(found, -(-len(found) // 16)):  # a few slices at a time: memory stays flat
            crops = make_crops(scan.pixels[part], lungs[part], self.profile.prepare)
            for k, small, box in zip(part, lesion_probabilities(self.segmenter, crops), crops.boxes, strict=True):
                result[k] = uncrop(small, box, scan.pixels.shape[1:]) * lungs[k]
        return result


def profile_from(plain: dict) -> Profile:
    """The settings of a run from the JSON of its report.

    Raises:
        ArtifactError: the report names settings that this version does not know.
    """
    kinds = {"lungs": LungSettings, "prepare": PrepareSettings, "classifier": ClassifierSettings, "cam": CamSettings,
             "mil": MilSettings, "fine": FineSettings, "segmenter": SegmenterSettings}
    def read(kind: Any, values: dict) -> Any:
        """One settings class from its JSON: lists become tuples, inner objects settings of their own."""
        inner = {"paint": PaintSettings}
        return kind(**{key: read(inner[key], value) if key in inner
                       else tuple(value) if isinstance(value, list) else value for key, value in values.items()})

    try:
        return Profile(plain["name"], **{name: read(kind, plain[name]) for name, kind in kinds.items()})
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
        stage = content["stages"]["segmenter"]
        profile = profile_from(content["settings"])
    except (ValueError, KeyError, TypeError) as error:  # also bytes that are no UTF-8
        raise ArtifactError(f"is damaged ({error})", path=report, remedy="Train again") from error
    arrays, _ = load_arrays(run / "stages" / stage)
    return Predictor(load_net(make_segmenter(profile.segmenter), arrays).to(device), profile)
