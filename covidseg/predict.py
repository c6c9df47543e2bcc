"""Masks for new scans, from a finished run or from the nets that come with the package."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from covidseg.data.chest import no_lung
from covidseg.data.scan import Scan, read_scan, scan_id, write_like
from covidseg.errors import OutputError, ScanWarning
from covidseg.lungnet import make_lung_net, robust_lungs
from covidseg.lungs import Lungs, LungSettings, survey_lungs, with_bar
from covidseg.preprocess import Crops, make_crops, uncrop
from covidseg.profiles import REPORT, Profile, read_report, same_run
from covidseg.segmenter import lesion_probabilities, make_segmenter
from covidseg.store import fingerprint, load_arrays, load_net, net_arrays, save_arrays, write_text, write_with_hash
from covidseg.unet import for_prediction

SHIPPED = Path(__file__).parent / "weights"  # a run cut down by export_run; its model card lies beside it
BATCH = 4  # slices that go through the nets together; more are no faster on a CPU and need more memory


@dataclass(frozen=True)
class Prediction:
    """What was found in one scan.

    Attributes:
        slices: Of the scan.
        lung_slices: How many of them show lung.
        lesion_slices: How many of them show a lesion.
        lesion_ml: Volume of all lesions in millilitres, by the affine of the file.
        warnings: What a person should know of the file and its lungs, one sentence each.
    """

    slices: int
    lung_slices: int
    lesion_slices: int
    lesion_ml: float
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictor:
    """Trained nets with the settings they were trained with; ``lung_net`` is None where the run has none.

    ``shipped`` says whether they are those that come with the package.
    """

    segmenter: nn.Module
    lung_net: nn.Module | None
    profile: Profile
    shipped: bool = False

    @functools.cached_property
    def _nets(self) -> tuple[nn.Module | None, nn.Module]:
        """Lung net and segmenter in the form that is fastest: probabilities differ in the last digits."""
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

    def probabilities(self, scan: Scan, volume: bool | None = None, *, check: bool = False) -> np.ndarray:
        """Lesion probability of every voxel.

        Args:
            scan: the scan.
            volume: whether its slices are one body in order; by default that is measured.
            check: whether the scan has to look like chest CT.

        Returns:
            ``(slices, rows, columns)`` float32, 0 outside the lung but for the pixels at its edge.

        Raises:
            InputFileError: the scan does not look like chest CT.
            NoLungError: there is no lung in any slice.
        """
        maps = np.zeros(scan.pixels.shape, np.float32)
        for k, p in self._lesions(scan, lungs_of_scan(scan, self.profile.lungs, volume, check)):
            maps[k] = p
        return maps

    def lungs(self, scan: Scan, volume: bool | None = None, *, check: bool = True, progress: bool = False) -> Lungs:
        """The best lungs there are: threshold lungs, completed by the lung net; arguments, errors as elsewhere.

        Without a lung net they stay as the threshold found them.
        """
        found = lungs_of_scan(scan, self.profile.lungs, volume, check, progress)
        if self.lung_net is None:
            return found
        masks = np.zeros_like(found.masks)
        for part, crops in self._completed(scan, found, "lung net", progress):
            for k, lung, box in zip(part, crops.lungs, crops.boxes, strict=True):
                masks[k] = uncrop(lung, box, masks[k].shape) > 0.5
        return Lungs(masks, found.warnings, found.volume)

    def predict_file(self, path: Path, target: Path, threshold: float | None = None,
                     probability_target: Path | None = None, volume: bool | None = None, *,
                     series: str | None = None, preview_target: Path | None = None, progress: bool = False,
                     check: bool = True) -> Prediction:
        """Writes the lesion mask of a scan.

        Args:
            path: the scan, a NIfTI file or a folder of DICOM slices.
            target: of the mask, which lies on the scan voxel by voxel.
            threshold: lesion from this probability on. Default: as the run was made.
            probability_target: of the probabilities, float32, if they are wanted.
            volume: whether the slices of the scan are one body in order; by default that is measured.
            series: of a folder of DICOM slices, see :func:`covidseg.data.scan.read_scan`.
            preview_target: of an HTML page that shows scan, lungs and lesions, if it is wanted.
            progress: whether a bar is shown, if it takes long and there is a terminal.
            check: whether the scan has to look like chest CT.

        Raises:
            InputFileError: the scan cannot be read, or does not look like chest CT.
            NoLungError: there is no lung in any slice.
            OutputError: a result cannot be written.
        """
        level = self.profile.segmenter.threshold if threshold is None else threshold
        scan = read_scan(path, series=series)
        found = lungs_of_scan(scan, self.profile.lungs, volume, check, progress)
        mask = np.zeros(scan.pixels.shape, bool)
        # The largest array of all, four bytes a voxel, is only made where it is wanted.
        maps = None if probability_target is None else np.zeros(scan.pixels.shape, np.float32)
        lungs = None if preview_target is None or self.lung_net is None else np.zeros_like(mask)
        for k, p in self._lesions(scan, found, progress, lungs):
            mask[k] = p >= level
            if maps is not None:
                maps[k] = p
        if maps is not None and probability_target is not None:
            write_like(maps, scan.grid, probability_target)
        if preview_target is not None:
            best = found if lungs is None else replace(found, masks=lungs)
            self._write_preview(preview_target, scan, best, mask, scan_id(target), level)
        write_like(mask, scan.grid, target)
        return Prediction(len(mask), found.slices(), int(mask.any(axis=(1, 2)).sum()),
                          int(mask.sum()) * scan.grid.voxel_ml(), scan.warnings + found.warnings)

    def _write_preview(self, target: Path, scan: Scan, lungs: Lungs, mask: np.ndarray, name: str, level: float) -> None:
        from covidseg.book.preview import preview_page  # draws pictures, which nothing else here needs

        write_text(target, preview_page(scan, lungs, mask, name=name, made={
            "nets": "those that come with covidseg" if self.shipped else "of a training run, named by --run",
            "their fingerprint": self.fingerprint(), "threshold": f"lesion from a probability of {level:g} on"}))

    def _lesions(self, scan: Scan, found: Lungs, progress: bool = False,
                 lungs: np.ndarray | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Number and lesion probability ``(rows, columns)`` of each slice with a lung.

        Its completed lungs go into ``lungs``, ``(slices, rows, columns)`` bool, if they are wanted.
        """
        for part, crops in self._completed(scan, found, "lesions", progress):
            with torch.inference_mode():
                small = lesion_probabilities(self._nets[1], crops)                                # (B, size, size)
            for k, p, lung, box in zip(part, small, crops.lungs, crops.boxes, strict=True):
                if lungs is not None:
                    lungs[k] = uncrop(lung, box, lungs[k].shape) > 0.5
                yield k, uncrop(p, box, scan.pixels.shape[1:])

    def _completed(self, scan: Scan, found: Lungs, what: str,
                   progress: bool) -> Iterator[tuple[np.ndarray, Crops]]:
        """Numbers of some slices with a lung at a time, and their crops with completed lungs."""
        numbers = np.flatnonzero(found.masks.any(axis=(1, 2)))
        for part in with_bar(np.split(numbers, range(BATCH, len(numbers), BATCH)), what, progress, "batch"):
            with torch.inference_mode():
                crops = make_crops(scan.pixels[part], found.masks[part], self.profile.prepare, scan.aspect())
                yield part, robust_lungs(self._nets[0], crops, self.profile.lung_net)


def lungs_of_scan(scan: Scan, settings: LungSettings = LungSettings(), volume: bool | None = None, check: bool = True,
                  progress: bool = False) -> Lungs:
    """Threshold lungs of a scan; at least one slice has some.

    Raises:
        InputFileError: the scan does not look like chest CT.
        NoLungError: there is no lung in any slice.
    """
    found = survey_lungs(scan.pixels, settings, volume, aspect=scan.aspect(), check=scan if check else None,
                         progress=progress)
    if not found.slices():
        raise no_lung(scan.path)
    return found


def lung_masks(scan: Scan | Path | str, predictor: Predictor | Path | str | None = None, *,
               threshold_only: bool = False, volume: bool | None = None, check: bool = True) -> np.ndarray:
    """Lung masks of a scan: by threshold, completed by the lung net where disease hides the lung.

    Args:
        scan: a scan, or the path of its file.
        predictor: the nets, or the folder of their run; by default those that come with the package, read once.
        threshold_only: whether the net is left out.
        volume: whether the slices are one body in order; by default that is measured.
        check: whether the scan has to look like chest CT.

    Returns:
        ``(slices, rows, columns)`` bool, upright. What is odd about them is said by a :class:`ScanWarning`.

    Raises:
        InputFileError: the scan cannot be read, or does not look like chest CT.
        NoLungError: there is no lung in any slice.
    """
    scan = scan if isinstance(scan, Scan) else read_scan(scan)
    nets = None if threshold_only else _nets_of(predictor)
    found = lungs_of_scan(scan, volume=volume, check=check) if nets is None else nets.lungs(scan, volume, check=check)
    _warn(scan, found)
    return found.masks


def _warn(scan: Scan, found: Lungs) -> None:
    for text in scan.warnings + found.warnings:
        warnings.warn(f"{scan.path.name}: {text}", ScanWarning, stacklevel=3)


def segment(scan: Scan | Path | str, predictor: Predictor | Path | str | None = None, *, volume: bool | None = None,
            check: bool = True) -> np.ndarray:
    """Lesion mask of a scan: the whole method in one call.

    Args:
        scan: a scan, or the path of its NIfTI file or of a folder of DICOM slices.
        predictor: the nets, or the folder of their run; by default those that come with the package, read once.
        volume: whether the slices are one body in order; by default that is measured.
        check: whether the scan has to look like chest CT.

    Returns:
        ``(slices, rows, columns)`` bool, upright as :attr:`covidseg.data.scan.Scan.pixels`; a lesion is where the
        probability reaches the threshold of the nets' own run.

    Raises:
        InputFileError: the scan cannot be read, or does not look like chest CT.
        NoLungError: there is no lung in any slice.
    """
    scan = scan if isinstance(scan, Scan) else read_scan(scan)
    nets = _nets_of(predictor)
    found = lungs_of_scan(scan, nets.profile.lungs, volume, check)
    _warn(scan, found)
    mask = np.zeros(scan.pixels.shape, bool)
    for k, p in nets._lesions(scan, found):
        mask[k] = p >= nets.profile.segmenter.threshold
    return mask


def _nets_of(predictor: Predictor | Path | str | None) -> Predictor:
    if predictor is None:
        return shipped_predictor()
    return predictor if isinstance(predictor, Predictor) else load_predictor(predictor)


@functools.cache
def shipped_predictor() -> Predictor:
    """The nets that come with the package, on the CPU, read once."""
    return load_predictor()


def load_predictor(run: Path | str = SHIPPED, device: torch.device | str = "cpu") -> Predictor:
    """Reads the nets of a run folder written by ``covidseg train`` or ``covidseg export``.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report or weights are damaged.
    """
    run = Path(run)
    _, profile, files = read_report(run)

    def read(name: str, empty: nn.Module) -> nn.Module:
        path = run / "stages" / files[name]
        return load_net(empty, load_arrays(path)[0], path).to(device)
    return Predictor(read("segmenter", make_segmenter(profile.segmenter)),
                     read("lung_net", make_lung_net(profile.lung_net)) if "lung_net" in files else None, profile,
                     shipped=run == SHIPPED)


def export_run(run: Path, out: Path) -> list[Path]:
    """Copies a run's nets, and nothing of the scans, into a folder that :func:`load_predictor` reads.

    Besides the nets that a prediction needs this is the patch net of the last round. The report goes along: settings,
    versions, and hashes of the scans that the nets were trained on. An older export of the same run is replaced.

    Returns:
        The files written.

    Raises:
        InputFileError: the folder is no run.
        ArtifactError: its report or weights are damaged.
        OutputError: the folder is the run itself, holds another run or its export, or cannot be written.
    """
    if out.resolve() == run.resolve():
        raise OutputError("the export would overwrite the run", path=out, remedy="Name another folder")
    content, profile, files = read_report(run)
    content["stages"] = {f"mil{profile.mutual.last}" if name == "patches" else name: f"{name}.safetensors"
                         for name in files}
    report = out / REPORT
    if report.exists() and not same_run(report, content):
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
