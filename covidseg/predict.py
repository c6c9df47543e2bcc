"""Masks for new scans, from a finished run or from the nets that come with the package."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg.data.scan import Scan
from covidseg.data.slices import SliceReader, look, shown, slice_writer
from covidseg.errors import OutputError
from covidseg.lungnet import make_lung_net, robust_lungs
from covidseg.lungs import LungPasses, no_lung
from covidseg.preprocess import Crops, join_crops, make_crops, uncrop
from covidseg.profiles import REPORT, Profile, read_report
from covidseg.segmenter import lesion_probabilities, make_segmenter
from covidseg.store import fingerprint, load_arrays, load_net, net_arrays, save_arrays, write_with_hash
from covidseg.unet import for_prediction

SHIPPED = Path(__file__).parent / "weights"  # a run cut down by export_run; its model card lies beside it
BATCH = 4  # slices that go through the nets together; more are no faster on a CPU and need more memory


@dataclass(frozen=True)
class Prediction:
    """What was found in one scan.

    Attributes:
        slices: of the scan.
        lesion_slices: how many of them show a lesion.
        lesion_ml: volume of all lesions in millilitres, by the voxel size of the file.
    """

    slices: int
    lesion_slices: int
    lesion_ml: float


@dataclass(frozen=True)
class Predictor:
    """Trained nets with the settings they were trained with; ``lung_net`` is None where the run has none."""

    segmenter: nn.Module
    lung_net: nn.Module | None
    profile: Profile

    @functools.cached_property
    def _nets(self) -> tuple[nn.Module | None, nn.Module]:
        """Lung net and segmenter in the form that is fastest: probabilities differ by less than .000 001."""
        return None if self.lung_net is None else for_prediction(self.lung_net), for_prediction(self.segmenter)

    def device(self) -> torch.device:
        """Where the nets are."""
        return next(self.segmenter.parameters()).device

    def fingerprint(self) -> str:
        """Hash of the weights and of all settings that a prediction depends on, but for the threshold."""
        digest = hashlib.sha256()
        for net in (self.segmenter, self.lung_net):
            for name, value in net_arrays(net).items() if net is not None else ():
                digest.update(f"{name} {value.shape} {value.dtype}".encode() + value.tobytes())
        profile = self.profile
        return fingerprint(profile.lungs, profile.prepare, profile.lung_net, profile.segmenter, digest.hexdigest())

    def probabilities(self, scan: Scan, volume: bool | None = None) -> np.ndarray:
        """Lesion probability of every voxel, ``(slices, rows, columns)`` float32, 0 outside the lung but for
        the pixels at its edge.

        Args:
            volume: as of :func:`covidseg.lungs.lung_masks`.

        Raises:
            NoLungError: there is no lung in any slice.
        """
        passes = LungPasses(self.profile.lungs, volume).look_at(scan.pixels)
        maps = np.zeros(scan.pixels.shape, np.float32)
        for k, found in enumerate(self._maps(scan.pixels, passes, scan.path)):
            maps[k] = found
        return maps

    def predict_file(self, path: Path, target: Path, threshold: float | None = None,
                     probability_target: Path | None = None, volume: bool | None = None, *,
                     progress: bool = False, check: bool = True) -> Prediction:
        """Writes the lesion mask of a scan; reads the scan twice, slice by slice, and holds some slices at a time.

        Args:
            path: the scan.
            target: of the mask, which lies on the scan voxel by voxel.
            threshold: lesion from this probability on. Default: as the run was made.
            probability_target: of the probabilities, float32, if they are wanted.
            volume: as of :func:`covidseg.lungs.lung_masks`.
            progress: show it, if it takes long and there is a terminal.
            check: whether the scan has to look like chest CT.

        Raises:
            InputFileError: the scan cannot be read, or does not look like chest CT.
            NoLungError: there is no lung in any slice.
            OutputError: a result cannot be written.
        """
        level = self.profile.segmenter.threshold if threshold is None else threshold
        reader = SliceReader(path)
        passes = look(reader, self.profile.lungs, volume, progress=progress, check=check)
        slices = voxels = 0
        with ExitStack() as files:
            write = files.enter_context(slice_writer(target, reader.grid))
            write_probability = files.enter_context(slice_writer(probability_target, reader.grid, np.float32)) \
                if probability_target is not None else None
            for found in self._maps(shown(reader, "lesions", progress), passes, path):
                mask = found >= level
                write(mask)
                if write_probability is not None:
                    write_probability(found)
                slices, voxels = slices + bool(mask.any()), voxels + int(mask.sum())
        return Prediction(len(reader), slices, voxels * math.prod(reader.grid.spacing()) / 1000)

    def _maps(self, slices: Iterable[np.ndarray], lungs: LungPasses, path: Path) -> Iterator[np.ndarray]:
        """Lesion probability ``(rows, columns)`` of each slice in turn, after a first pass that looked at the lungs."""
        waiting: list[Crops | None] = []  # one for each slice; a batch of those with a lung goes through the nets
        found = 0
        for position, image in enumerate(slices):
            lung, shape = lungs.mask(position), (image.shape[0], image.shape[1])
            waiting.append(make_crops(image[None], lung[None], self.profile.prepare) if lung.any() else None)
            found += waiting[-1] is not None
            if (waiting[-1] is not None and found % BATCH == 0) or position == len(lungs) - 1:
                yield from self._batch(waiting, shape)
                waiting = []
        if not found:
            raise no_lung(path)

    def _batch(self, waiting: list[Crops | None], shape: tuple[int, int]) -> Iterator[np.ndarray]:
        """Probabilities of some slices in full size: what the nets say of the crops, 0 where there is none."""
        crops = [crop for crop in waiting if crop is not None]
        lung_net, segmenter = self._nets
        if crops:
            with torch.inference_mode():
                completed = robust_lungs(lung_net, join_crops(crops), self.profile.lung_net)
                maps = iter(zip(lesion_probabilities(segmenter, completed), completed.boxes, strict=True))
        for crop in waiting:
            yield np.zeros(shape, np.float32) if crop is None else uncrop(*next(maps), shape)


def load_predictor(run: Path = SHIPPED, device: torch.device = torch.device("cpu")) -> Predictor:
    """Reads the nets of a run folder written by ``covidseg train`` or ``covidseg export``.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report or weights are damaged.
    """
    _, profile, files = read_report(run)

    def read(name: str, empty: nn.Module) -> nn.Module:
        path = run / "stages" / files[name]
        return load_net(empty, load_arrays(path)[0], path).to(device)
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
    write_with_hash(report, json.dumps(content, indent=2) + "\n")
    return [*written, report]


def _same_export(report: Path, content: dict[str, Any]) -> bool:
    """Whether a report is that of the same nets, trained in the same way; when and by which command does not matter."""
    try:
        there = json.loads(report.read_text(encoding="utf-8"))
        return all(there.get(part) == content.get(part)
                   for part in ("data", "labelled_slices", "settings", "seed", "stages"))
    except (OSError, ValueError, AttributeError):  # no report of a run
        return False
