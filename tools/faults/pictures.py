"""Files without any damage that hold the wrong thing: another unit, another machine, another part of the body."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from skimage import data as pictures

from covidseg.data.scan import read_scan
from covidseg.errors import DatasetError, InputFileError, NoLungError, SettingsError
from faults.files import LOCK, PREDICT, REPORTS
from faults.headers import SHAPE, stored_as
from faults.supplies import AFFINE, Supplies, stored, upright
from faults.trial import Fault, Make

GROUP = "the wrong picture"


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """A lung window of 8 bits, as many converters write it: -1150 HU is 0, 350 HU is 255."""
    return np.clip((pixels + 1150.0) / 1500 * 255, 0, 255).astype(np.uint8)


def as_mr(pixels: np.ndarray) -> np.ndarray:
    """Grey levels as T1-weighted MR gives them: fat bright, muscle dark grey, lung and bone nearly black."""
    levels = np.interp(pixels, [-1000, -500, -200, -120, -60, -20, 30, 80, 200, 400, 1500],
                       [0.02, 0.1, 0.6, 1, 1, 0.5, 0.35, 0.35, 0.5, 0.3, 0.1])
    return (1000 * levels).astype(np.int16)


def in_folder(pixels: np.ndarray, folder: Path, supplies: Supplies) -> None:
    """A data folder with another scan in the place of one of its own."""
    upright(pixels, supplies.data(folder / "data") / "im" / "phantom_02.nii.gz")
    for kind in ("lung", "mask"):  # outlines of other affines would be another fault
        shutil.rmtree(folder / "data" / kind)


def picture(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    """A scan with other voxels."""
    return lambda folder, supplies: upright(change(supplies.scan().pixels), folder / "scan.nii.gz")


def among_others(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    """A data folder in which one scan has other voxels."""
    return lambda folder, supplies: in_folder(change(supplies.scan(2).pixels), folder, supplies)


def water(folder: Path, supplies: Supplies) -> None:
    """A body without air, such as slices of the abdomen."""
    rows, columns = np.mgrid[:96, :96]
    body = (rows - 48) ** 2 + (columns - 48) ** 2 < 40 ** 2
    upright(np.where(body, 40, -1000).astype(np.int16)[None].repeat(4, axis=0), folder / "scan.nii.gz")


def truth(folder: Path, supplies: Supplies) -> Path:
    return Path(shutil.copy(supplies.phantom / "mask" / "phantom_01.nii.gz", folder / "truth.nii.gz"))


def shorter_mask(folder: Path, supplies: Supplies) -> None:
    truth(folder, supplies)
    stored(np.ones((96, 96, 7), np.uint8), folder / "mask.nii.gz", AFFINE)


def mirrored_mask(folder: Path, supplies: Supplies) -> None:
    """The header says that the columns run the other way: left lung and right lung would be exchanged."""
    scan = read_scan(truth(folder, supplies))
    mirrored = scan.grid.affine @ np.diag((-1, 1, 1, 1))
    stored(np.ones(scan.grid.shape, np.uint8), folder / "mask.nii.gz", mirrored)


def scan_for_mask(folder: Path, supplies: Supplies) -> None:
    truth(folder, supplies)
    shutil.copy(supplies.volume(), folder / "scan.nii.gz")


def probabilities_for_mask(folder: Path, supplies: Supplies) -> None:
    scan = read_scan(truth(folder, supplies))
    stored(np.full(scan.grid.shape, 0.25, np.float32), folder / "probability.nii.gz", scan.grid.affine)


def folder_with_a_shorter_mask(folder: Path, supplies: Supplies) -> None:
    data = supplies.data(folder / "data")
    scan = supplies.scan()
    stored(np.ones((96, 96, 7), np.uint8), data / "mask" / "phantom_01.nii.gz", scan.grid.affine)


def good(folder: Path, supplies: Supplies) -> None:
    shutil.copy(supplies.volume(), folder / "scan.nii.gz")


FAULTS = [
    Fault("8-bit grey levels where Hounsfield units are said", "covidseg data check data --unit HU", DatasetError,
          ("phantom_02.nii.gz", "Hounsfield units"), among_others(grey_levels)),
    Fault("8-bit grey levels where Hounsfield units are said, in a program", 'read_scan("scan.nii.gz", unit="HU")',
          InputFileError, ("scan.nii.gz",), picture(grey_levels), call=lambda: read_scan("scan.nii.gz", unit="HU")),
    Fault("a unit that does not exist", 'read_scan("scan.nii.gz", unit="hu")', SettingsError, ("'hu'",), good,
          call=lambda: read_scan("scan.nii.gz", unit="hu")),
    Fault("MR instead of CT", PREDICT, InputFileError, ("scan.nii.gz", "--unchecked"), picture(as_mr), leaves=REPORTS),
    Fault("MR instead of CT, for its lungs", "covidseg lungs scan.nii.gz -o out", InputFileError,
          ("scan.nii.gz", "--unchecked"), picture(as_mr)),
    Fault("MR among the scans to train on", "covidseg train --data data --out run", InputFileError,
          ("phantom_02.nii.gz",), among_others(as_mr), leaves=LOCK),
    Fault("MR among the scans of a folder", "covidseg data check data", DatasetError, ("phantom_02",),
          among_others(as_mr)),
    Fault("a photograph", PREDICT, InputFileError, ("scan.nii.gz",),
          picture(lambda _: pictures.camera()[None, ::2, ::2]), leaves=REPORTS),
    Fault("a photograph with hardly anything dark in it", PREDICT, NoLungError, ("scan.nii.gz", "--unchecked"),
          picture(lambda _: pictures.moon()[None, ::2, ::2]), leaves=REPORTS),
    Fault("no lung in any slice", PREDICT, NoLungError, ("scan.nii.gz",), water, leaves=REPORTS),
    Fault("every voxel the same", PREDICT, NoLungError, ("scan.nii.gz",), stored_as(np.full(SHAPE, -1000, np.int16)),
          leaves=REPORTS),
    Fault("a mask with fewer slices than its truth", "covidseg evaluate mask.nii.gz truth.nii.gz", InputFileError,
          ("mask.nii.gz", "truth.nii.gz"), shorter_mask),
    Fault("a mask whose header exchanges left and right", "covidseg evaluate mask.nii.gz truth.nii.gz",
          InputFileError, ("mask.nii.gz", "truth.nii.gz"), mirrored_mask),
    Fault("a scan where a mask belongs", "covidseg evaluate scan.nii.gz truth.nii.gz", InputFileError,
          ("scan.nii.gz",), scan_for_mask),
    Fault("probabilities where a mask belongs", "covidseg evaluate probability.nii.gz truth.nii.gz", InputFileError,
          ("probability.nii.gz",), probabilities_for_mask),
    Fault("a mask of another shape than its scan, in a folder", "covidseg data check data", DatasetError,
          ("phantom_01",), folder_with_a_shorter_mask),
]
