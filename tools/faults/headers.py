"""Headers that promise something else than one volume of grey values with a known place in the body."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from covidseg.errors import InputFileError
from faults.files import PREDICT, REPORTS
from faults.supplies import AFFINE, Supplies, stored, with_header
from faults.trial import Fault, Make

GROUP = "headers and voxels"
PLAIN = PREDICT.replace("scan.nii.gz", "scan.nii")
SHAPE = (96, 96, 8)


def stored_as(array: np.ndarray, affine: np.ndarray | None = AFFINE) -> Make:
    """A scan of these voxels and this affine."""
    return lambda folder, supplies: stored(array, folder / "scan.nii.gz", affine)


def header(**fields: Any) -> Make:
    """A scan whose header says something else in these fields."""
    return lambda folder, supplies: with_header(supplies.volume(), folder / "scan.nii", **fields)


def one_voxel(value: float, dtype: type = np.float32) -> Make:
    """A scan in which one voxel has this value."""
    def make(folder: Path, supplies: Supplies) -> None:
        values: np.ndarray = supplies.scan().pixels.T.astype(dtype)
        values[40, 50, 3] = value
        stored(values, folder / "scan.nii.gz", AFFINE)
    return make


def _fault(title: str, make: Make, command: str = PREDICT) -> Fault:
    return Fault(title, command, InputFileError, (command.split()[2],), make, leaves=REPORTS)


ZEROS = np.zeros(SHAPE, np.int16)
FAULTS = [
    _fault("four axes: a series over time", stored_as(np.zeros((*SHAPE, 3), np.int16))),
    _fault("colour (RGB)", stored_as(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]))),
    _fault("complex numbers", stored_as(np.zeros(SHAPE, np.complex64))),
    _fault("an axis of length zero", header(dim=[3, 96, 96, 0, 1, 1, 1, 1]), PLAIN),
    _fault("no affine: orientation and spacing unknown", stored_as(ZEROS, None)),
    _fault("spacing in metres instead of millimetres", stored_as(ZEROS, np.diag((0.0007, 0.0007, 0.005, 1)))),
    _fault("five metres between slices", stored_as(ZEROS, np.diag((0.7, 0.7, 5000.0, 1)))),
    _fault("an affine that puts all slices into one plane", header(srow_z=[0, 0, 0, 0]), PLAIN),
    _fault("an infinite number in the affine", header(srow_z=[0, 0, np.inf, 0]), PLAIN),
    # Where the affine is worked out from the spacing, and where one of the two must be damaged.
    _fault("NaN as spacing", header(sform_code=0, qform_code=1, pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0]), PLAIN),
    _fault("NaN as spacing beside a whole affine", header(pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0]), PLAIN),
    _fault("one voxel is NaN", one_voxel(np.nan)),
    _fault("one voxel is infinite", one_voxel(np.inf)),
    _fault("one voxel is larger than 32-bit numbers go", one_voxel(1e300, np.float64)),
]
