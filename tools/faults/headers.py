"""Headers that promise something else than one volume of grey values with a known place in the body."""

from __future__ import annotations

from typing import Any

import numpy as np

from covidseg.errors import InputFileError
from faults.supplies import AFFINE, Supplies, stored, with_header
from faults.trial import Fault, Make

GROUP = "headers and voxels"
SHAPE = (96, 96, 8)


def _stored(title: str, array: np.ndarray, affine: np.ndarray | None = AFFINE) -> Fault:
    """A scan of these voxels and this affine."""
    return _fault(title, lambda supplies: stored(array, affine=affine))


def _header(title: str, **fields: Any) -> Fault:
    """A scan whose header says something else in these fields."""
    return _fault(title, lambda supplies: with_header(supplies, **fields), "scan.nii")


def _voxel(title: str, value: float, dtype: type = np.float32) -> Fault:
    """A scan in which one voxel has this value."""
    def make(supplies: Supplies) -> None:
        values: np.ndarray = supplies.scan().pixels.T.astype(dtype)
        values[40, 50, 3] = value
        stored(values)
    return _fault(title, make)


def _fault(title: str, make: Make, name: str = "scan.nii.gz") -> Fault:
    return Fault(title, f"covidseg predict {name} -o out", InputFileError, (name,), make)


ZEROS = np.zeros(SHAPE, np.int16)
FAULTS = [
    _stored("four axes: a series over time", np.zeros((*SHAPE, 3), np.int16)),
    _stored("colour (RGB)", np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])),
    _stored("complex numbers", np.zeros(SHAPE, np.complex64)),
    _header("an axis of length zero", dim=[3, 96, 96, 0, 1, 1, 1, 1]),
    _stored("no affine: orientation and spacing unknown", ZEROS, None),
    _stored("spacing in metres instead of millimetres", ZEROS, np.diag((0.0007, 0.0007, 0.005, 1))),
    _stored("five metres between slices", ZEROS, np.diag((0.7, 0.7, 5000.0, 1))),
    _header("an affine that puts all slices into one plane", srow_z=[0, 0, 0, 0]),
    _header("an infinite number in the affine", srow_z=[0, 0, np.inf, 0]),
    # Where the affine is worked out from the spacing, and where one of the two must be damaged.
    _header("NaN as spacing", sform_code=0, qform_code=1, pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0]),
    _header("NaN as spacing beside a whole affine", pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0]),
    _voxel("one voxel is NaN", np.nan),
    _voxel("one voxel is infinite", np.inf),
    _voxel("one voxel is larger than 32-bit numbers go", 1e300, np.float64),
]
