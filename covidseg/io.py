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

import gzip
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from covidseg.errors import InputFileError, OutputError
from covidseg.files import write_whole

SUFFIXES = (".nii", ".nii.gz")
# Upright order: slices towards the head (S), rows towards the back (P), columns towards the left (L).
UPRIGHT = ("S", "P", "L")


@dataclass(frozen=True)
class Grid:
    """How a file lays out its voxels: all that is needed to write a result that fits the input.

    Attributes:
        shape: stored array shape, three axes (a two-dimensional file counts as one slice).
        affine: ``(4, 4)`` matrix from voxel indices to millimetres.
        two_dimensional: whether the file itself has only two axes.
    """

    shape: tuple[int, int, int]
    affine: np.ndarray
    two_dimensional: bool = False

    def to_upright(self) -> np.ndarray:
        """nibabel orientation transform from the stored axes to the upright ones, ``(3, 2)``."""
        return ornt_transform(io_orientation(self.affine), axcodes2ornt(UPRIGHT))


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


def _load(path: Path) -> tuple[np.ndarray, Grid]:
    """Stored array ``(i, j, k)`` in its own type, and the grid. Every fault becomes an InputFileError."""
    if not path.exists():
        raise InputFileError("no such file", path=path, remedy="Check the spelling of the path")
    if path.is_dir():
        raise InputFileError("is a folder, not a scan", path=path, remedy="Name the NIfTI files inside it")
    if not path.name.lower().endswith(SUFFIXES):
        raise InputFileError("is not a NIfTI file (.nii or .nii.gz)", path=path,
                             remedy="Convert DICOM series or pictures to NIfTI first, for instance with dcm2niix")
    try:
        if path.name.lower().endswith(".gz"):
            with gzip.open(path) as stream:  # nibabel stops before the checksum and misses a flipped byte
                while stream.read(1 << 20):
                    pass
        image: Any = nib.load(path)
        # `dataobj` keeps the stored type where no scaling is asked for; get_fdata() would make a float64 copy.
        array = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, nib.filebasedimages.ImageFileError,
            nib.spatialimages.HeaderDataError) as error:
        raise InputFileError(f"cannot be read as NIfTI ({error})", path=path,
                             remedy="The file is damaged or incomplete: copy or download it again") from error
    if array.dtype.kind not in "iuf":
        raise InputFileError("holds colour or complex voxels", path=path, remedy="Give a grey-value CT")
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    two_dimensional = array.ndim == 2
    if two_dimensional:
        array = array[..., None]
    if array.ndim != 3 or 0 in array.shape:
        raise InputFileError(f"has shape {array.shape}, not one volume", path=path,
                             remedy="Split series over time into one file each")
    if array.dtype.kind == "f":
        if not np.isfinite(array).all():
            raise InputFileError("holds voxels that are not numbers (NaN or infinite)", path=path,
                                 remedy="Export the scan again, or set those voxels to air (-1024 HU)")
        array = array.astype(np.float32, copy=False)
    affine = image.affine
    invented = not image.header["sform_code"] and not image.header["qform_code"]  # nibabel then makes one up
    if invented or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9 \
            or np.isnan(io_orientation(affine)).any():
        raise InputFileError("has no usable affine, so its orientation and spacing are unknown", path=path,
                             remedy="Export it again with orientation, or set the affine with nibabel")
    return array, Grid(array.shape, np.asarray(affine, dtype=np.float64), two_dimensional)


def read_scan(path: str | Path) -> Scan:
    """Reads a CT volume or a stack of slices from NIfTI.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file of two or three axes.

    Returns:
        The scan, upright, in its stored type.

    Raises:
        InputFileError: the file is missing, damaged, not NIfTI, not one grey-value volume, or holds NaN.
    """
    path = Path(path)
    array, grid = _load(path)
    pixels = apply_orientation(array, grid.to_upright())
    upright_affine = grid.affine @ inv_ornt_aff(grid.to_upright(), grid.shape)
    along_slices, along_rows, along_columns = np.sqrt((upright_affine[:3, :3] ** 2).sum(axis=0)).tolist()
    spacing = (along_slices, along_rows, along_columns)
    low, high = float(pixels.min()), float(pixels.max())
    return Scan(pixels, spacing, (low, high), "HU" if low < -200 else "display", path, grid)


def read_mask(path: str | Path, *, like: Scan | None = None) -> np.ndarray:
    """Reads a mask as ``(slices, rows, columns)`` bool, upright; every value above 0 counts as inside.

    Args:
        path: a NIfTI file.
        like: the scan the mask belongs to; shape and orientation have to agree with it.

    Raises:
        InputFileError: the file cannot be read, or does not fit ``like``.
    """
    path = Path(path)
    array, grid = _load(path)
    if like is not None:
        if grid.shape != like.grid.shape:
            raise InputFileError(f"has shape {grid.shape}, its image {like.path.name} has {like.grid.shape}",
                                 path=path, remedy="Give the mask that was drawn on this very file")
        if not np.allclose(grid.affine, like.grid.affine, atol=1e-2):
            raise InputFileError(f"has another affine than its image {like.path.name}", path=path,
                                 remedy="Resample the mask onto the image, or correct its header")
    return apply_orientation(array, grid.to_upright()) > 0


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
    back = ornt_transform(axcodes2ornt(UPRIGHT), io_orientation(grid.affine))
    stored = np.ascontiguousarray(apply_orientation(array, back))
    if stored.shape != grid.shape:
        raise OutputError(f"result of shape {stored.shape} does not fit the input's {grid.shape}", path=path)
    if grid.two_dimensional:
        stored = stored[..., 0]
    suffix = ".nii" if path.name.lower().endswith(".nii") else ".nii.gz"
    write_whole(path, lambda temporary: nib.save(nib.Nifti1Image(stored, grid.affine), temporary), suffix=suffix)
    return path
