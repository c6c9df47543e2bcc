"""Files that are damaged, or are something else than their name says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from covidseg.errors import InputFileError
from faults.supplies import Supplies, nothing, upright, with_header
from faults.trial import Fault, Make

GROUP = "damaged files"
FLIPS = 40
PREDICT = "covidseg predict scan.nii.gz -o out"


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


def uncompressed(supplies: Supplies) -> None:
    upright(supplies.scan().pixels, "plain.nii")
    Path("plain.nii").rename("scan.nii.gz")


def damaged_for_training(supplies: Supplies) -> None:
    path = supplies.data() / "im" / "phantom_02.nii.gz"
    path.write_bytes(path.read_bytes()[:-4000])


def damaged_mask(supplies: Supplies) -> None:
    Path("mask.nii.gz").write_bytes(supplies.truth().read_bytes()[:-10])


def _fault(title: str, make: Make, command: str = PREDICT) -> Fault:
    return Fault(title, command, InputFileError, (command.split()[2],), make)


FAULTS = [
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
    _fault("not compressed, although its suffix says so", uncompressed),
    _fault("a header that promises a terabyte",
           lambda supplies: with_header(supplies, dim=[3, 30000, 30000, 600, 1, 1, 1, 1]),
           "covidseg predict scan.nii -o out"),
    Fault("one damaged scan among those to train on", "covidseg train --data data --out run", InputFileError,
          ("phantom_02.nii.gz",), damaged_for_training),
    _fault("a damaged mask to measure", damaged_mask, "covidseg evaluate mask.nii.gz truth.nii.gz"),
]
