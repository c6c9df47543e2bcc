"""What faults are made from: a small phantom without any fault, and short ways to write files."""

from __future__ import annotations

import csv
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

    def data(self, folder: Path) -> Path:
        """A data folder of one's own, to spoil."""
        return Path(shutil.copytree(self.phantom, folder))


def make_supplies(folder: Path) -> Supplies:
    """Generates the small phantom in about a second."""
    return Supplies(write_phantom(folder / "phantom", SMALL))


def upright(pixels: np.ndarray, path: Path) -> Path:
    """Writes ``(slices, rows, columns)`` as a scan without a fault in its header."""
    slices, rows, columns = pixels.shape
    return write_like(pixels, Grid((columns, rows, slices), AFFINE), path)


def stored(array: np.ndarray, path: Path, affine: np.ndarray | None = AFFINE) -> Path:
    """Writes an array as it is, by nibabel; an affine of None is left out."""
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def with_header(source: Path, target: Path, **fields: Any) -> Path:
    """An uncompressed copy of a scan with other values in fields of its header."""
    image: Any = nib.load(source)
    header = image.header.copy()
    voxels = np.asarray(image.dataobj)
    header.set_data_offset(352)
    for name, value in fields.items():
        header[name] = value
    target.write_bytes(header.binaryblock + bytes(4) + voxels.tobytes(order="F"))
    return target


def rows_of(table: Path) -> list[dict[str, str]]:
    """Lines of a label table."""
    with table.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_rows(table: Path, rows: list[dict[str, str]]) -> None:
    """Writes a label table."""
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
