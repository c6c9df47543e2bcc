"""Headers that promise something else than one volume of grey values with a known place in the body."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from covidseg.errors import InputFileError
from faults.files import PREDICT, REPORTS
from faults.supplies import AFFINE, Supplies, stored, with_header
from faults.trial import Fault, Make

GROUP = "headers and voxels"
PLAIN = PREDICT.replace("scan.nii.gz", "scan.nii")
SHAPE = (96, 96, 8)


def series(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros((*SHAPE, 3), np.int16), folder / "scan.nii.gz")


def colour(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), folder / "scan.nii.gz")


def complex_numbers(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros(SHAPE, np.complex64), folder / "scan.nii.gz")


def no_voxels(folder: Path, supplies: Supplies) -> None:
    with_header(supplies.volume(), folder / "scan.nii", dim=[3, 96, 96, 0, 1, 1, 1, 1])


def no_affine(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros(SHAPE, np.int16), folder / "scan.nii.gz", None)


def in_metres(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros(SHAPE, np.int16), folder / "scan.nii.gz", np.diag((0.0007, 0.0007, 0.005, 1)))


def metres_between_slices(folder: Path, supplies: Supplies) -> None:
    stored(np.zeros(SHAPE, np.int16), folder / "scan.nii.gz", np.diag((0.7, 0.7, 5000.0, 1)))


def flat(folder: Path, supplies: Supplies) -> None:
    """All slices in one plane."""
    with_header(supplies.volume(), folder / "scan.nii", srow_z=[0, 0, 0, 0])


def infinite(folder: Path, supplies: Supplies) -> None:
    with_header(supplies.volume(), folder / "scan.nii", srow_z=[0, 0, np.inf, 0])


def nan_spacing(folder: Path, supplies: Supplies) -> None:
    """NaN where the affine is worked out from the spacing."""
    with_header(supplies.volume(), folder / "scan.nii", sform_code=0, qform_code=1,
                pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0])


def nan_beside_affine(folder: Path, supplies: Supplies) -> None:
    """NaN in the spacing while the affine beside it is whole: one of the two is damaged."""
    with_header(supplies.volume(), folder / "scan.nii", pixdim=[1, 3.4, 3.4, np.nan, 0, 0, 0, 0])


def one_voxel(value: float, dtype: type = np.float32) -> Make:
    """A scan in which one voxel has this value."""
    def make(folder: Path, supplies: Supplies) -> None:
        values: np.ndarray = supplies.scan().pixels.T.astype(dtype)
        values[40, 50, 3] = value
        stored(values, folder / "scan.nii.gz", AFFINE)
    return make


def _fault(title: str, make: Make, command: str = PREDICT) -> Fault:
    return Fault(title, command, InputFileError, (command.split()[2],), make, leaves=REPORTS)


FAULTS = [
    _fault("four axes: a series over time", series),
    _fault("colour (RGB)", colour),
    _fault("complex numbers", complex_numbers),
    _fault("an axis of length zero", no_voxels, PLAIN),
    _fault("no affine: orientation and spacing unknown", no_affine),
    _fault("spacing in metres instead of millimetres", in_metres),
    _fault("five metres between slices", metres_between_slices),
    _fault("an affine that puts all slices into one plane", flat, PLAIN),
    _fault("an infinite number in the affine", infinite, PLAIN),
    _fault("NaN as spacing", nan_spacing, PLAIN),
    _fault("NaN as spacing beside a whole affine", nan_beside_affine, PLAIN),
    _fault("one voxel is NaN", one_voxel(np.nan)),
    _fault("one voxel is infinite", one_voxel(np.inf)),
    _fault("one voxel is larger than 32-bit numbers go", one_voxel(1e300, np.float64)),
]
