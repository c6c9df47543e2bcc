"""Files that are damaged, are something else than their name says, or whose header promises something else.

Asked for is one volume of grey values with a known place in the body.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from covidseg.errors import InputFileError
from faults.supplies import AFFINE, Supplies, nothing, stored, with_header
from faults.trial import Fault, Make

FLIPS = 40
PREDICT, PLAIN = "covidseg predict scan.nii.gz -o out", "covidseg predict scan.nii -o out"
SHAPE = (96, 96, 8)


def bytes_of(change: Callable[[bytes], bytes], name: str = "scan.nii.gz") -> Make:
    """A scan whose file has other bytes."""
    return lambda supplies: Path(name).write_bytes(change(supplies.volume().read_bytes()))


def flipped(supplies: Supplies) -> None:
    """Forty copies with another random byte each, behind the date and name in the head of the compressed file.

    The first is another in its checksum, so that the message to be recorded is always of the same kind.
    """
    raw, rng = supplies.volume().read_bytes(), np.random.default_rng(0)
    Path("scans").mkdir()
    others = rng.choice(np.arange(20, len(raw) - 8), FLIPS - 1, replace=False)
    for number, place in enumerate([len(raw) - 6, *others]):
        changed = bytearray(raw)
        changed[place] ^= int(rng.integers(1, 256))
        Path(f"scans/copy_{number:02d}.nii.gz").write_bytes(changed)


def renamed_picture(supplies: Supplies) -> None:
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save("scan.nii.gz", "png")


def damaged_for_training(supplies: Supplies) -> None:
    path = supplies.data() / "im" / "phantom_02.nii.gz"
    path.write_bytes(path.read_bytes()[:-4000])


def damaged_mask(supplies: Supplies) -> None:
    Path("mask.nii.gz").write_bytes(supplies.truth().read_bytes()[:-10])


def _fault(title: str, make: Make, command: str = PREDICT) -> Fault:
    return Fault(title, command, InputFileError, (command.split()[2],), make)


def _stored(title: str, array: np.ndarray, affine: np.ndarray | None = AFFINE) -> Fault:
    """A scan of these voxels and this affine."""
    return _fault(title, lambda supplies: stored(array, affine=affine))


def _header(title: str, **fields: Any) -> Fault:
    """A scan whose header says something else in these fields."""
    return _fault(title, lambda supplies: with_header(supplies, **fields), PLAIN)


def _voxel(title: str, value: float, dtype: type = np.float32) -> Fault:
    """A scan in which one voxel has this value."""
    def make(supplies: Supplies) -> None:
        values: np.ndarray = supplies.scan().pixels.T.astype(dtype)
        values[40, 50, 3] = value
        stored(values)
    return _fault(title, make)


FILES = [
    _fault("cut off after two thirds", bytes_of(lambda raw: raw[:len(raw) * 2 // 3])),
    _fault("the last byte is missing", bytes_of(lambda raw: raw[:-1])),
    Fault(f"one byte is another, in each of {FLIPS} copies", "covidseg lungs scans -o out", InputFileError,
          tuple(f"copy_{k:02d}.nii.gz" for k in range(FLIPS)), flipped, lines=FLIPS),
    _fault("empty", bytes_of(lambda raw: b"")),
    _fault("not there", nothing),
    _fault("a folder, not a file", lambda supplies: Path("scan.nii.gz").mkdir()),
    _fault("DICOM, with its own suffix", bytes_of(lambda raw: bytes(128) + b"DICM", "scan.dcm"),
           "covidseg predict scan.dcm -o out"),
    _fault("a PNG picture with the suffix of a scan", renamed_picture),
    _fault("a header that promises a terabyte",
           lambda supplies: with_header(supplies, dim=[3, 30000, 30000, 600, 1, 1, 1, 1]),
           PLAIN),
    Fault("one damaged scan among those to train on", "covidseg train --data data --out run", InputFileError,
          ("phantom_02.nii.gz",), damaged_for_training),
    _fault("a damaged mask to measure", damaged_mask, "covidseg evaluate mask.nii.gz truth.nii.gz"),
]
ZEROS = np.zeros(SHAPE, np.int16)
HEADERS = [
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
GROUPS = {"damaged files": FILES, "headers and voxels": HEADERS}
