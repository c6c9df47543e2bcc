"""What faults are made from: a small phantom without any fault, and short ways to write files beside a command."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from covidseg.data.phantom import PhantomSettings, write_phantom
from covidseg.data.scan import Grid, Scan, read_scan, write_like

SMALL = PhantomSettings(patients=4, slices=8, size=96, seed=3, vessel_targets=150)
AFFINE = np.diag((-3.4, -3.4, 30.0, 1.0))  # about that of the small phantom


@dataclass(frozen=True)
class Supplies:
    """The small phantom, of four patients; files are copied from it, never changed in it."""

    phantom: Path

    def volume(self, number: int = 1) -> Path:
        """A scan, as a file."""
        return self.phantom / "im" / f"phantom_{number:02d}.nii.gz"

    def scan(self, number: int = 1) -> Scan:
        """A scan, read."""
        return read_scan(self.volume(number))

    def copies(self, *names: str) -> None:
        """A scan by some names of one's own."""
        for name in names:
            shutil.copy(self.volume(), name)

    def data(self) -> Path:
        """A data folder of one's own, to spoil."""
        return Path(shutil.copytree(self.phantom, "data"))

    def truth(self) -> Path:
        """A true mask of one's own."""
        return Path(shutil.copy(self.phantom / "mask" / "phantom_01.nii.gz", "truth.nii.gz"))


def make_supplies(folder: Path) -> Supplies:
    """Generates the small phantom in about a second."""
    return Supplies(write_phantom(folder / "phantom", SMALL))


def good(supplies: Supplies) -> None:
    """A scan without any fault."""
    supplies.copies("scan.nii.gz")


def nothing(supplies: Supplies) -> None:
    """An empty folder."""


def upright(pixels: np.ndarray, path: Path | str = "scan.nii.gz") -> None:
    """Writes ``(slices, rows, columns)`` as a scan without a fault in its header."""
    slices, rows, columns = pixels.shape
    write_like(pixels, Grid((columns, rows, slices), AFFINE), path)


def stored(array: np.ndarray, path: Path | str = "scan.nii.gz", affine: np.ndarray | None = AFFINE) -> None:
    """Writes an array as it is, by nibabel; an affine of None is left out."""
    nib.save(nib.Nifti1Image(array, affine), path)


def with_header(supplies: Supplies, **fields: Any) -> None:
    """An uncompressed scan with other values in fields of its header."""
    image: Any = nib.load(supplies.volume())
    header = image.header.copy()
    header.set_data_offset(352)
    for name, value in fields.items():
        header[name] = value
    Path("scan.nii").write_bytes(header.binaryblock + bytes(4) + np.asarray(image.dataobj).tobytes(order="F"))
