"""Reading and writing scans: NIfTI in, upright ``(slices, rows, columns)`` arrays out, and back.

A NIfTI file stores voxels in the order of its scanner or of its maker and says in an affine matrix
which way each axis points. :func:`read_scan` uses the affine to turn every file the same way up:

* axis 0, *slices*, from feet to head;
* axis 1, *rows*, from the front of the patient to the back (the spine is at the bottom);
* axis 2, *columns*, from the patient's right to the left, as a radiologist looks at a slice.

Intensities stay in the type that is stored, whether Hounsfield units (HU) or 8-bit display values; turning
them into numbers that a network can use is the job of :mod:`covidseg.lungs`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation

from covidseg.errors import InputFileError, OutputError, one_of
from covidseg.files import write_whole
from covidseg.nifti import SUFFIXES, UPRIGHT, Grid, read_header, read_voxels

__all__ = ["SUFFIXES", "UPRIGHT", "Grid", "Scan", "read_mask", "read_scan", "scan_id", "write_like"]

@dataclass(frozen=True)
class Scan:
    """One CT file, upright.

    Attributes:
        pixels: ``(slices, rows, columns)`` in the stored type, usually ``int16`` HU or ``uint8`` display values.
        spacing: millimetres between slices, rows and columns.
        value_range: lowest and highest stored value.
        unit: ``"HU"`` where values go clearly below water (0 HU), otherwise ``"display"`` (0..255 grey levels).
        path: where it was read from.
        grid: layout of the file, for writing results with :func:`write_like`.
    """

    pixels: np.ndarray
    spacing: tuple[float, float, float]
    value_range: tuple[float, float]
    unit: str
    path: Path
    grid: Grid


def scan_id(path: str | Path) -> str:
    """File name without ``.nii`` or ``.nii.gz``: ``case_01.nii.gz`` -> ``case_01``."""
    name = Path(path).name
    for suffix in reversed(SUFFIXES):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_scan(path: str | Path, *, unit: str | None = None) -> Scan:
    """Reads a CT volume or a stack of slices from NIfTI.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file of two or three axes.
        unit: ``"HU"`` or ``"display"`` where only that will do; by default either.

    Returns:
        The scan, upright, in its stored type.

    Raises:
        InputFileError: the file is missing, damaged, not NIfTI, not one grey-value volume, holds NaN, or has another
            unit.
        SettingsError: there is no such unit.
    """
    names = {"HU": "Hounsfield units", "display": "grey levels of a display window"}
    if unit is not None:
        one_of(unit, names, "unit")
    path = Path(path)
    header = read_header(path)
    voxels, grid = read_voxels(header), header.grid
    low, high = float(voxels.min()), float(voxels.max())
    found = "HU" if low < -200 else "display"
    if unit is not None and unit != found:
        raise InputFileError(f"holds values from {low:g} to {high:g}, which are not {names[unit]}", path=path,
                             remedy=f"Take it for {names[found]}, or export the scan again")
    return Scan(apply_orientation(voxels, grid.to_upright()), grid.spacing(), (low, high), found, path, grid)


def read_mask(path: str | Path, *, like: Scan | None = None) -> np.ndarray:
    """Reads a mask as ``(slices, rows, columns)`` bool, upright; every value above 0 counts as inside.

    Args:
        path: a NIfTI file.
        like: the scan the mask belongs to; shape and orientation have to agree with it.

    Raises:
        InputFileError: the file cannot be read, does not fit ``like``, or is no mask: it holds numbers below 0, or such
            as 0.25. A scan or probabilities would give figures that look like others.
    """
    path = Path(path)
    header = read_header(path)
    grid = header.grid
    if like is not None:
        if grid.shape != like.grid.shape:
            raise InputFileError(f"has shape {grid.shape}, its image {like.path.name} has {like.grid.shape}",
                                 path=path, remedy="Give the mask that was drawn on this very file")
        if not np.allclose(grid.affine, like.grid.affine, atol=1e-2):
            raise InputFileError(f"has another affine than its image {like.path.name}", path=path,
                                 remedy="Resample the mask onto the image, or correct its header")
    voxels = read_voxels(header)
    whole = voxels.dtype.kind != "f" or bool((np.abs(voxels - np.rint(voxels)) < 1e-3).all())
    if not whole or voxels.min() < 0:
        raise InputFileError(f"is no mask: it holds {'numbers below 0' if whole else 'fractions'}", path=path,
                             remedy="Give whole numbers, 0 for what is outside; cut probabilities at a threshold")
    return apply_orientation(voxels, grid.to_upright()) > 0


def write_like(array: np.ndarray, grid: Grid, path: str | Path) -> Path:
    """Writes an upright array as NIfTI in the voxel order, shape and affine of ``grid``.

    Nothing but shape and affine goes into the header: names, dates and remarks of the input stay out.

    Args:
        array: ``(slices, rows, columns)``; bool is stored as ``uint8``.
        grid: the layout of the input, ``scan.grid``.
        path: target; written to a temporary file in the same folder first, so that a crash leaves no half file.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    stored = np.ascontiguousarray(apply_orientation(array, grid.from_upright()))
    if stored.shape != grid.shape:
        raise OutputError(f"result of shape {stored.shape} does not fit the input's {grid.shape}", path=path)
    if grid.two_dimensional:
        stored = stored[..., 0]
    suffix = ".nii" if path.name.lower().endswith(".nii") else ".nii.gz"
    write_whole(path, lambda temporary: nib.save(nib.Nifti1Image(stored, grid.affine), temporary), suffix=suffix)
    return path
