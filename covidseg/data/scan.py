"""Reading and writing scans: NIfTI or DICOM in, upright ``(slices, rows, columns)`` arrays out, and NIfTI back.

A NIfTI file says in an affine matrix which way each of its axes points. Here every file is turned the same way up:

* axis 0, *slices*, from feet to head;
* axis 1, *rows*, from the front of the patient to the back (the spine is at the bottom);
* axis 2, *columns*, from the patient's right to the left, as a radiologist looks at a slice.

Intensities stay in the type that is stored, whether Hounsfield units (HU) or 8-bit display values.

nibabel reads headers and writes files. Voxels are read here, to the end of the file and straight into place: nibabel
stops before the checksum of a compressed file, and so misses damage, and needs memory for a second copy.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from covidseg.atomic import write_whole
from covidseg.errors import InputFileError, OutputError, SettingsError, one_of

SUFFIXES = (".nii", ".nii.gz")
# Upright order: slices towards the head (S), rows towards the back (P), columns towards the left (L).
UPRIGHT = ("S", "P", "L")
SPACING = (0.01, 200.0)  # mm; no CT has less or more, though stacks of single slices come with odd distances
BLOCK = 1 << 18          # bytes decompressed at a time, since a gzip stream makes a copy of each piece
DEFLATE = 1032           # times smaller than its content is the most that a compressed file can be


@dataclass(frozen=True)
class Grid:
    """How a file lays out its voxels: all that is needed to write a result that fits the input."""

    shape: tuple[int, int, int]    # of the stored array; a two-dimensional file counts as one slice
    affine: np.ndarray             # (4, 4) matrix from voxel indices to millimetres
    two_dimensional: bool = False  # whether the file itself has only two axes

    def to_upright(self) -> np.ndarray:
        """nibabel orientation transform from the stored axes to the upright ones, ``(3, 2)``."""
        return ornt_transform(io_orientation(self.affine), axcodes2ornt(UPRIGHT))

    def from_upright(self) -> np.ndarray:
        """The transform back, from the upright axes to the stored ones."""
        return ornt_transform(axcodes2ornt(UPRIGHT), io_orientation(self.affine))

    def spacing(self) -> tuple[float, float, float]:
        """Millimetres between slices, rows and columns."""
        upright = self.affine @ inv_ornt_aff(self.to_upright(), self.shape)
        slices, rows, columns = np.sqrt((upright[:3, :3] ** 2).sum(axis=0)).tolist()
        return slices, rows, columns

    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres; of a sheared grid, as a tilted gantry makes it, less than its sides say."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


@dataclass(frozen=True)
class Scan:
    """One CT scan, upright.

    ``unit`` is ``"HU"`` where values go clearly below water (0 HU), otherwise ``"display"`` (0..255 grey levels).
    """

    pixels: np.ndarray  # (slices, rows, columns) in the stored type, usually int16 HU or uint8 display values
    spacing: tuple[float, float, float]  # mm between slices, rows and columns
    value_range: tuple[float, float]     # lowest and highest stored value
    unit: str
    path: Path  # where it was read from
    grid: Grid  # layout of the file, for writing results with write_like
    warnings: tuple[str, ...] = ()  # what is odd about it, one sentence each


def scan_id(path: str | Path) -> str:
    """Name without ``.nii``, ``.nii.gz`` or ``.dcm``: ``case_01.nii.gz`` -> ``case_01``; of a folder, its name."""
    name = Path(path).name
    for suffix in (*reversed(SUFFIXES), ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_scan(path: str | Path, *, unit: str | None = None, series: str | None = None) -> Scan:
    """Reads a CT volume or a stack of slices from NIfTI, or a series of DICOM slices, upright and in its stored type.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file of two or three axes, a folder with DICOM slices in it or below it, or one
            DICOM file.
        unit: ``"HU"`` or ``"display"`` where only that will do; by default either.
        series: of several DICOM series in the folder, the one to take: number in the list of ``covidseg data series``,
            UID, or at least the last six digits of it. By default the one with most slices.

    Raises:
        InputFileError: the file is missing, damaged, not NIfTI or DICOM, not one grey-value volume, holds NaN, or has
            another unit; the folder holds no series of CT slices that makes a volume, or several that might be meant.
        SettingsError: there is no such unit, or ``series`` is given for a NIfTI file.
    """
    names = {"HU": "Hounsfield units", "display": "grey levels of a display window"}
    if unit is not None:
        one_of(unit, names, "unit")
    path = Path(path)
    warnings: tuple[str, ...] = ()
    if _holds_dicom(path):
        from covidseg.data.dicom import read_series  # which needs this module

        voxels, grid, warnings = read_series(path, series)
    elif series is not None:
        raise SettingsError("is not DICOM and has no series", path=path, remedy="Leave --series out")
    else:
        header = read_header(path)
        voxels, grid = read_voxels(header), header.grid
    low, high = float(voxels.min()), float(voxels.max())
    found = "HU" if low < -200 else "display"
    if unit is not None and unit != found:
        raise InputFileError(f"holds values from {low:g} to {high:g}, which are not {names[unit]}", path=path,
                             remedy=f"Take it for {names[found]}, or export the scan again")
    return Scan(apply_orientation(voxels, grid.to_upright()), grid.spacing(), (low, high), found, path, grid, warnings)


def _holds_dicom(path: Path) -> bool:
    """Whether a path is that of a DICOM file, or of a folder with DICOM and no NIfTI files in it."""
    if path.name.lower().endswith(SUFFIXES) or not path.exists():
        return False
    from covidseg.data.dicom import is_dicom, scans_in

    return scans_in(path) == [path] if path.is_dir() else is_dicom(path)


def read_mask(path: str | Path, *, like: Scan | None = None) -> np.ndarray:
    """Reads a mask as ``(slices, rows, columns)`` bool, upright; every value above 0 counts as inside.

    Args:
        path: a NIfTI file.
        like: the scan the mask belongs to; shape and affine have to agree with it.

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

    Nothing but shape and affine goes into the header: names, dates and remarks of the input stay out. Equal arrays
    are equal bytes, compressed or not.

    Args:
        array: ``(slices, rows, columns)``; bool is stored as ``uint8``.
        grid: the layout of the input, ``scan.grid``.
        path: target; a crash leaves no half file.

    Raises:
        OutputError: the file cannot be written.
    """
    path = Path(path)
    stored = apply_orientation(array.view(np.uint8) if array.dtype == bool else array, grid.from_upright())
    if stored.shape != grid.shape:
        raise OutputError(f"result of shape {stored.shape} does not fit the input's {grid.shape}", path=path)
    if grid.two_dimensional:
        stored = stored[..., 0]
    suffix = ".nii" if path.name.lower().endswith(".nii") else ".nii.gz"
    image = nib.Nifti1Image(stored, grid.affine)
    if not np.allclose(straight := _without_tilt(grid.affine), grid.affine, atol=1e-3):
        # ITK, and so 3D Slicer, opens no file whose only affine is sheared; it takes the other one, which places the
        # result as ITK places the tilted series itself.
        image.set_qform(straight, code="aligned")
    write_whole(path, lambda temporary: nib.save(image, temporary), suffix=suffix)
    return path


def _without_tilt(affine: np.ndarray) -> np.ndarray:
    """The affine with its third axis at right angles to the others, and as long as before."""
    straight = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    step = affine[:3, 2]
    straight[:3, 2] = normal * np.sign(normal @ step) * np.linalg.norm(step) / np.linalg.norm(normal)
    return straight


# --- what a NIfTI file holds ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Header:
    """What a file says about its voxels: their grid and stored type, the bytes before them, and their scaling."""

    path: Path
    grid: Grid
    stored: np.dtype
    offset: int
    slope: float
    inter: float


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Every way in which a damaged file fails becomes an InputFileError."""
    try:
        yield
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, IsalError,  # type: ignore[misc]
            nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
            nib.wrapstruct.WrapStructError) as error:
        reason = str(error).replace(str(path), path.name)  # the error itself says where, reports must not
        raise InputFileError(f"cannot be read as NIfTI ({reason})", path=path,
                             remedy="The file is damaged or incomplete: copy or download it again") from error


def read_header(path: Path, affine: np.ndarray | None = None) -> Header:
    """Reads the header of a file of one grey-value volume; ``affine`` is taken in place of the file's own.

    Raises:
        InputFileError: the file is missing, not NIfTI, not one grey-value volume, has no usable affine, or is far too
            small for the voxels that it announces.
    """
    def refusal(fault: str, remedy: str) -> InputFileError:
        return InputFileError(fault, path=path, remedy=remedy)

    if not path.exists():
        raise refusal("no such file", "Check the spelling of the path")
    if path.is_dir():
        raise refusal("is a folder, not a scan", "Name the NIfTI files inside it")
    if not path.name.lower().endswith(SUFFIXES):
        raise refusal("is not a NIfTI file (.nii or .nii.gz)",
                      "Convert it to NIfTI first; only scans may be DICOM as well")
    with _faults(path):
        # Not nib.load, which takes some NIfTI files for surfaces of a brain and then reads XML.
        kind = nib.Nifti2Image if nib.Nifti2Image.path_maybe_image(path)[0] else nib.Nifti1Image
        image: Any = kind.from_filename(path)
        proxy, shape = image.dataobj, tuple(int(n) for n in image.shape)
    if proxy.dtype.kind not in "iuf":
        raise refusal("holds colour or complex voxels", "Give a grey-value CT")
    whole, two_dimensional = shape, len(shape) == 2
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if two_dimensional:
        shape = (*shape, 1)
    if min(shape, default=0) < 1:
        raise refusal(f"has shape {whole}, which is no voxel at all", "Export or convert it again")
    if len(shape) != 3:
        raise refusal(f"has shape {whole}, not one volume", "Split series over time into one file each")
    # Without either code nibabel makes an affine up.
    invented = affine is None and not image.header["sform_code"] and not image.header["qform_code"]
    affine = np.asarray(image.affine if affine is None else affine, dtype=np.float64)
    if invented or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9 \
            or np.isnan(io_orientation(affine)).any():
        raise refusal("has no usable affine, so its orientation and spacing are unknown",
                      "Export it again with orientation, or set the affine with nibabel")
    respace = "Correct the spacing in its header (in mm), or export it again"
    # The affine may be whole all the same; but then one of the two is damaged, and nobody knows which.
    if not np.isfinite(image.header["pixdim"][1:1 + len(whole)]).all():
        raise refusal("has a spacing that is not a number", respace)
    grid = Grid((shape[0], shape[1], shape[2]), affine, two_dimensional)
    if not all(SPACING[0] <= step <= SPACING[1] for step in grid.spacing()):
        steps = " x ".join(f"{step:.3g}" for step in grid.spacing())
        raise refusal(f"has voxels of {steps} mm, which no CT has", respace)
    header = Header(path, grid, proxy.dtype, int(proxy.offset), float(proxy.slope), float(proxy.inter))
    with _faults(path):
        size, wanted = path.stat().st_size, header.offset + header.stored.itemsize * math.prod(grid.shape)
        if wanted > (DEFLATE if path.suffix.lower() == ".gz" else 1) * size:  # nobody reserves memory for that
            raise EOFError(f"{wanted} bytes are said to be in a file of {size}")
    return header


def read_voxels(header: Header) -> np.ndarray:
    """All values of a file, ``(i, j, k)`` in Fortran's order as the file is; the only copy of them that is made.

    They have the stored type, but float32 where that is floating point or has to be scaled.

    Raises:
        InputFileError: the file is damaged or incomplete, or holds NaN.
    """
    path, scaled = header.path, (header.slope, header.inter) != (1, 0)
    packed = path.suffix.lower() == ".gz"
    with _faults(path), cast(Any, igzip.open(path)) if packed else path.open("rb") as stream:
        stream.seek(header.offset)
        dtype = np.float32 if scaled or header.stored.kind == "f" else header.stored
        array = np.empty(header.grid.shape, dtype, order="F")
        values = array.reshape(-1, order="F")
        if header.stored == dtype and not scaled:
            _fill(values, stream)
        else:
            for start in range(0, len(values), 1 << 20):  # a block at a time, so that no second copy is needed
                raw = np.empty(min(1 << 20, len(values) - start), header.stored)
                _fill(raw, stream)
                with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused
                    values[start:start + len(raw)] = apply_read_scaling(raw, header.slope, header.inter)
        while stream.read(1 << 20):  # to the end, where the checksum is tested
            pass
    if array.dtype.kind == "f" and not (np.isfinite(array.min()) and np.isfinite(array.max())):
        raise InputFileError("holds voxels that are not numbers (NaN or infinite)", path=path,
                             remedy="Export the scan again, or set those voxels to air (-1024 HU)")
    return array


def _fill(target: np.ndarray, stream: Any) -> None:
    """Fills all bytes of a contiguous array with what comes next."""
    left = target.view(np.uint8).data
    while left:
        count = stream.readinto(left[:BLOCK])
        if not count:
            raise EOFError(f"{len(left)} bytes are missing")
        left = left[count:]
