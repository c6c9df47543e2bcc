"""Files without any damage that hold the wrong thing: another unit, another machine, another part of the body."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import numpy as np
from skimage import data as pictures

from covidseg.data.scan import read_scan
from covidseg.errors import DatasetError, InputFileError, NoLungError, SettingsError
from faults.files import PREDICT, SHAPE
from faults.supplies import Supplies, good, stored, upright
from faults.trial import Fault, Make

SCAN = ("scan.nii.gz",)
CHECK = "covidseg data check data"
HU, WRONG_UNIT = 'read_scan("scan.nii.gz", unit="HU")', 'read_scan("scan.nii.gz", unit="hu")'


def grey_levels(pixels: np.ndarray) -> np.ndarray:
    """A lung window of 8 bits, as many converters write it: -1150 HU is 0, 350 HU is 255."""
    return np.clip((pixels + 1150.0) / 1500 * 255, 0, 255).astype(np.uint8)


def as_mr(pixels: np.ndarray) -> np.ndarray:
    """Grey levels as T1-weighted MR gives them: fat bright, muscle dark grey, lung and bone nearly black."""
    levels = np.interp(pixels, [-1000, -500, -200, -120, -60, -20, 30, 80, 200, 400, 1500],
                       [0.02, 0.1, 0.6, 1, 1, 0.5, 0.35, 0.35, 0.5, 0.3, 0.1])
    return (1000 * levels).astype(np.int16)


def picture(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    """A scan with other voxels."""
    return lambda supplies: upright(change(supplies.scan().pixels))


def among_others(change: Callable[[np.ndarray], np.ndarray]) -> Make:
    """A data folder in which one scan has other voxels."""
    def make(supplies: Supplies) -> None:
        data = supplies.data()
        upright(change(supplies.scan(2).pixels), data / "im" / "phantom_02.nii.gz")
        for kind in ("lung", "mask"):  # outlines of other affines would be another fault
            shutil.rmtree(data / kind)
    return make


def small(supplies: Supplies) -> None:
    """Lungs of a few square centimetres."""
    grid = read_scan(supplies.volume()).grid
    stored(supplies.scan().pixels.transpose(2, 1, 0), "scan.nii.gz", grid.affine @ np.diag((0.1, 0.1, 1, 1)))


def water(supplies: Supplies) -> None:
    """A body without air, such as slices of the abdomen."""
    rows, columns = np.mgrid[:96, :96]
    body = (rows - 48) ** 2 + (columns - 48) ** 2 < 40 ** 2
    upright(np.where(body, 40, -1000).astype(np.int16)[None].repeat(4, axis=0))


def shorter_mask(supplies: Supplies) -> None:
    supplies.truth()
    stored(np.ones((96, 96, 7), np.uint8), "mask.nii.gz")


def mirrored_mask(supplies: Supplies) -> None:
    """The header says that the columns run the other way: left lung and right lung would be exchanged."""
    grid = read_scan(supplies.truth()).grid
    stored(np.ones(grid.shape, np.uint8), "mask.nii.gz", grid.affine @ np.diag((-1, 1, 1, 1)))


def scan_for_mask(supplies: Supplies) -> None:
    supplies.truth()
    good(supplies)


def probabilities_for_mask(supplies: Supplies) -> None:
    grid = read_scan(supplies.truth()).grid
    stored(np.full(grid.shape, 0.25, np.float32), "probability.nii.gz", grid.affine)


def folder_with_a_shorter_mask(supplies: Supplies) -> None:
    path = supplies.data() / "mask" / "phantom_01.nii.gz"
    stored(np.ones((96, 96, 7), np.uint8), path, supplies.scan().grid.affine)


FAULTS = [
    Fault("8-bit grey levels where Hounsfield units are said", f"{CHECK} --unit HU", DatasetError,
          ("phantom_02.nii.gz", "Hounsfield units"), among_others(grey_levels)),
    Fault("8-bit grey levels where Hounsfield units are said, in a program", HU, InputFileError, SCAN,
          picture(grey_levels), call=lambda: read_scan("scan.nii.gz", unit="HU")),
    Fault("a unit that does not exist", WRONG_UNIT, SettingsError, ("'hu'",), good,
          call=lambda: read_scan("scan.nii.gz", unit="hu")),
    Fault("MR instead of CT", PREDICT, InputFileError, (*SCAN, "--unchecked"), picture(as_mr)),
    Fault("MR instead of CT, for its lungs", "covidseg lungs scan.nii.gz -o out", InputFileError,
          (*SCAN, "--unchecked"), picture(as_mr)),
    Fault("MR among the scans to train on", "covidseg train --data data --out run", InputFileError,
          ("phantom_02.nii.gz",), among_others(as_mr)),
    Fault("MR among the scans of a folder", CHECK, DatasetError, ("phantom_02",), among_others(as_mr)),
    Fault("a photograph", PREDICT, InputFileError, SCAN, picture(lambda _: pictures.camera()[None, ::2, ::2])),
    Fault("a photograph with hardly anything dark in it", PREDICT, NoLungError, (*SCAN, "--unchecked"),
          picture(lambda _: pictures.moon()[None, ::2, ::2])),
    Fault("a page of text", PREDICT, InputFileError, SCAN, picture(lambda _: pictures.page()[None])),
    Fault("inverted grey levels", PREDICT, InputFileError, (*SCAN, "inverted"),
          picture(lambda pixels: 255 - grey_levels(pixels))),
    Fault("negative values that were stored as unsigned ones", PREDICT, InputFileError, (*SCAN, "wrapped"),
          picture(lambda pixels: pixels.astype(np.int16).view(np.uint16))),
    Fault("a soft-tissue window, in which lungs are black", PREDICT, InputFileError, (*SCAN, "one value"),
          picture(lambda pixels: (np.clip(pixels / 400.0 + 0.4, 0, 1) * 255).astype(np.uint8))),
    Fault("an animal, or a voxel size that is a tenth", PREDICT, InputFileError, (*SCAN, "cm2"), small),
    Fault("no lung in any slice", PREDICT, NoLungError, SCAN, water),
    Fault("every voxel the same", PREDICT, NoLungError, SCAN,
          lambda supplies: stored(np.full(SHAPE, -1000, np.int16))),
    Fault("a mask with fewer slices than its truth", "covidseg evaluate mask.nii.gz truth.nii.gz", InputFileError,
          ("mask.nii.gz", "truth.nii.gz"), shorter_mask),
    Fault("a mask whose header exchanges left and right", "covidseg evaluate mask.nii.gz truth.nii.gz",
          InputFileError, ("mask.nii.gz", "truth.nii.gz"), mirrored_mask),
    Fault("a scan where a mask belongs", "covidseg evaluate scan.nii.gz truth.nii.gz", InputFileError, SCAN,
          scan_for_mask),
    Fault("probabilities where a mask belongs", "covidseg evaluate probability.nii.gz truth.nii.gz", InputFileError,
          ("probability.nii.gz",), probabilities_for_mask),
    Fault("a mask of another shape than its scan, in a folder", CHECK, DatasetError, ("phantom_01",),
          folder_with_a_shorter_mask),
]
GROUPS = {"the wrong picture": FAULTS}
