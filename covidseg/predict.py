"""Masks for new scans, from a finished run or from the nets that come with the package."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg.artifacts import load_arrays, load_net, save_arrays, write_text
from covidseg.errors import ArtifactError, InputFileError, NoLungError, OutputError
from covidseg.io import Scan
from covidseg.lungnet import make_lung_net
from covidseg.pipeline import find_lungs
from covidseg.prepare import uncrop_all
from covidseg.profiles import Profile, profile_from
from covidseg.refine import lesion_probabilities, make_segmenter

REPORT = "run.json"
SHIPPED = Path(__file__).parent / "weights"  # a run cut down by export_run; its model card lies beside it


@dataclass(frozen=True)
class Predictor:
    """Trained nets with the settings they were trained with; ``lung_net`` is None where the run has none."""

    segmenter: nn.Module
    lung_net: nn.Module | None
    profile: Profile

    def probabilities(self, scan: Scan, volume: bool | None = None) -> np.ndarray:
        """Lesion probability of every voxel, ``(slices, rows, columns)`` float32, 0 outside the lung but for
        the pixels at its edge.

        Args:
            volume: as of :func:`covidseg.lungs.lung_masks`.

        Raises:
            NoLungError: there is no lung in any slice.
        """
        found, crops = find_lungs(scan.pixels, self.lung_net, self.profile, volume)
        if not len(found):
            raise NoLungError("no lung was found in any slice", path=scan.path,
                              remedy="covidseg expects chest CT with air in the lungs darker than tissue")
        return uncrop_all(lesion_probabilities(self.segmenter, crops), crops.boxes, found, scan.pixels.shape)


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
    try:
        content = json.loads(report.read_text(encoding="utf-8"))
        profile = profile_from(content["settings"])
        wanted = {"segmenter": "segmenter", "patches": f"mil{content['best_round']}",
                  **({"lung_net": "lung_net"} if profile.lung_net.steps else {})}
        return content, profile, {name: content["stages"][stage] for name, stage in wanted.items()}
    except (ValueError, KeyError, TypeError) as error:  # also bytes that are no UTF-8
        raise ArtifactError(f"is damaged ({error})", path=report, remedy="Train again") from error


def load_predictor(run: Path = SHIPPED, device: torch.device = torch.device("cpu")) -> Predictor:
    """Reads the nets of a run folder written by ``covidseg train`` or ``covidseg export``.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report or weights are damaged.
    """
    _, profile, files = read_report(run)

    def read(name: str, empty: nn.Module) -> nn.Module:
        return load_net(empty, load_arrays(run / "stages" / files[name])[0]).to(device)
    return Predictor(read("segmenter", make_segmenter(profile.segmenter)),
                     read("lung_net", make_lung_net(profile.lung_net)) if "lung_net" in files else None, profile)


def export_run(run: Path, out: Path) -> list[Path]:
    """Copies a run's nets, and nothing of the scans, into a folder that :func:`load_predictor` reads.

    Besides the nets that a prediction needs this is the patch net of the best round. The report goes along: settings,
    versions, and hashes of the scans that the nets were trained on. An older export of the same run is replaced.

    Returns:
        The files written.

    Raises:
        InputFileError, ArtifactError: as of :func:`load_predictor`.
        OutputError: the folder is the run itself, holds another run or its export, or cannot be written.
    """
    if out.resolve() == run.resolve():
        raise OutputError("the export would overwrite the run", path=out, remedy="Name another folder")
    content, _, files = read_report(run)
    content["stages"] = {f"mil{content['best_round']}" if name == "patches" else name: f"{name}.safetensors"
                         for name in files}
    report = out / REPORT
    if report.exists() and not _same_export(report, content):
        raise OutputError("holds another run", path=out, remedy="Name another folder, or remove this one")
    written = []
    for name, file in files.items():
        arrays, _ = load_arrays(run / "stages" / file)
        if name == "patches":  # stored beside the targets of its curriculum, one for each patch of a training slice
            arrays = {key: value for key, value in arrays.items() if key.startswith("net.")}
        written.append(out / "stages" / f"{name}.safetensors")
        save_arrays(written[-1], arrays)
    write_text(report, json.dumps(content, indent=2) + "\n")
    return [*written, report]


def _same_export(report: Path, content: dict[str, Any]) -> bool:
    """Whether a report is that of the same nets, trained in the same way; when and by which command does not matter."""
    try:
        there = json.loads(report.read_text(encoding="utf-8"))
        return all(there.get(part) == content.get(part)
                   for part in ("data", "labelled_slices", "settings", "seed", "stages"))
    except (OSError, ValueError, AttributeError):  # no report of a run
        return False
