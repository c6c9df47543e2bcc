"""Files that are damaged, or are something else than their name says."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from covidseg.errors import InputFileError
from faults.supplies import Supplies, with_header
from faults.trial import Fault, Make

GROUP = "damaged files"
FLIPS = 40
REPORTS = ("out/parts/part-1-of-1.csv", "out/predictions.csv")  # of `covidseg predict`, which say what failed
LOCK = ("run/stages/.*.lock",)  # an empty file by which programs that share a run wait for each other
PREDICT = "covidseg predict scan.nii.gz -o out"


def bytes_of(change: Callable[[bytes], bytes], name: str = "scan.nii.gz") -> Make:
    """A scan whose file has other bytes."""
    return lambda folder, supplies: (folder / name).write_bytes(change(supplies.volume().read_bytes()))


def flipped(folder: Path, supplies: Supplies) -> None:
    """Forty copies with another random byte each, behind the date and name in the head of the compressed file.

    The first is another in its checksum, so that the message to be recorded is always of the same kind.
    """
    raw, rng = supplies.volume().read_bytes(), np.random.default_rng(0)
    (folder / "scans").mkdir()
    others = rng.choice(np.arange(20, len(raw) - 8), FLIPS - 1, replace=False)
    for number, place in enumerate([len(raw) - 6, *others]):
        changed = bytearray(raw)
        changed[place] ^= int(rng.integers(1, 256))
        (folder / "scans" / f"copy_{number:02d}.nii.gz").write_bytes(changed)


def nothing(folder: Path, supplies: Supplies) -> None:
    """An empty folder."""


def renamed_picture(folder: Path, supplies: Supplies) -> None:
    picture = io.BytesIO()
    Image.fromarray(np.arange(4096, dtype=np.uint8).reshape(64, 64)).save(picture, "png")
    (folder / "scan.nii.gz").write_bytes(picture.getvalue())


def damaged_for_training(folder: Path, supplies: Supplies) -> None:
    data = supplies.data(folder / "data")
    path = data / "im" / "phantom_02.nii.gz"
    path.write_bytes(path.read_bytes()[:-4000])


def damaged_mask(folder: Path, supplies: Supplies) -> None:
    shutil.copy(supplies.phantom / "mask" / "phantom_01.nii.gz", folder / "truth.nii.gz")
    (folder / "mask.nii.gz").write_bytes((folder / "truth.nii.gz").read_bytes()[:-10])


FAULTS = [
    Fault("cut off after two thirds", PREDICT, InputFileError, ("scan.nii.gz",),
          bytes_of(lambda raw: raw[:len(raw) * 2 // 3]), leaves=REPORTS),
    Fault("the last byte is missing", PREDICT, InputFileError, ("scan.nii.gz",), bytes_of(lambda raw: raw[:-1]),
          leaves=REPORTS),
    Fault(f"one byte is another, in each of {FLIPS} copies", "covidseg lungs scans -o out", InputFileError,
          tuple(f"copy_{k:02d}.nii.gz" for k in range(FLIPS)), flipped, lines=FLIPS),
    Fault("empty", PREDICT, InputFileError, ("scan.nii.gz",), bytes_of(lambda raw: b""), leaves=REPORTS),
    Fault("not there", PREDICT, InputFileError, ("scan.nii.gz",), nothing, leaves=REPORTS),
    Fault("a folder, not a file", PREDICT, InputFileError, ("scan.nii.gz",),
          lambda folder, supplies: (folder / "scan.nii.gz").mkdir()),
    Fault("DICOM, with its own suffix", "covidseg predict scan.dcm -o out", InputFileError, ("scan.dcm",),
          bytes_of(lambda raw: bytes(128) + b"DICM", "scan.dcm"), leaves=REPORTS),
    Fault("a PNG picture with the suffix of a scan", PREDICT, InputFileError, ("scan.nii.gz",), renamed_picture,
          leaves=REPORTS),
    Fault("a header that promises a terabyte", "covidseg predict scan.nii -o out", InputFileError, ("scan.nii",),
          lambda folder, supplies: with_header(supplies.volume(), folder / "scan.nii",
                                               dim=[3, 30000, 30000, 600, 1, 1, 1, 1]), leaves=REPORTS),
    Fault("one damaged scan among those to train on", "covidseg train --data data --out run", InputFileError,
          ("phantom_02.nii.gz",), damaged_for_training, leaves=LOCK),
    Fault("a damaged mask to measure", "covidseg evaluate mask.nii.gz truth.nii.gz", InputFileError,
          ("mask.nii.gz",), damaged_mask),
]
