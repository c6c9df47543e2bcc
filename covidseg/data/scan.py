"""Reading and writing scans: NIfTI or DICOM in, upright ``(slices, rows, columns)`` arrays out, and NIfTI back.

A NIfTI file says in an affine matrix which way each of its axes points. Here every file is turned the same way up:

* axis 0, *slices*, from feet to head;
* axis 1, *rows*, from the front of the patient to the back (the spine is at the bottom);
* axis 2, *columns*, from the patient's right to the left, as a radiologist looks at a slice.

Intensities stay in the type that is stored, whether Hounsfield units (HU) or 8-bit display values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation, ornt_transform

from covidseg.atomic import write_whole
from covidseg.data.nifti import SUFFIXES, Grid, entries, fitting_memory, kind_of, opening, read_header, read_voxels
from covidseg.errors import InputFileError, OutputError, SettingsError, one_of

# Types of whole numbers that all programs read, smallest first; those of 64 bits many refuse, as nibabel does.
WHOLE = (np.uint8, np.int8, np.uint16, np.int16, np.uint32, np.int32)
LONGEST = 32767  # voxels along an axis, which NIfTI-1 counts in 16 bits
SQUARE = 0.05    # pixels whose height and width differ by a smaller share of it are taken for square


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
    warnings: tuple[str, ...] = ()  # what a person should know of the file, one sentence each

    def aspect(self) -> float:
        """Height of a pixel over its width; 1 if they are about the same.

        Axial slices have square pixels, but those that coronal or sagittal slices are turned into seldom do.
        """
        _, down, across = self.spacing
        return down / across if abs(down - across) > SQUARE * across else 1.0


def shown(name: str) -> str:
    """A file name as text that can be written anywhere: bytes that are no UTF-8 are escaped."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def scan_id(path: str | Path) -> str:
    """Name without ``.nii``, ``.nii.gz`` or ``.dcm``: ``case_01.nii.gz`` -> ``case_01``; of a folder, its name."""
    name = Path(path).name
    for suffix in (*reversed(SUFFIXES), ".dcm"):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def read_scan(path: str | Path, *, unit: str | None = None, series: str | int | None = None) -> Scan:
    """Reads a CT volume or a stack of slices from NIfTI, or a series of DICOM slices, upright and in its stored type.

    Args:
        path: a ``.nii`` or ``.nii.gz`` file of two or three axes, a folder with DICOM slices in it or below it, or one
            DICOM file.
        unit: ``"HU"`` or ``"display"`` where only that will do; by default either.
        series: of several DICOM series in the folder, the one to take: number in the list of ``covidseg data series``,
            UID, or at least the last six digits of it. By default the first in the list: axial before others, original
            before derived, then most slices.

    Raises:
        InputFileError: the file is missing, damaged, not NIfTI or DICOM, not one grey-value volume, holds NaN, has
            another unit, or does not fit into memory; the folder cannot be read, or holds no series of CT slices that
            makes a volume, or several that might be meant.
        SettingsError: there is no such unit, or ``series`` is given for a NIfTI file.
    """
    names = {"HU": "Hounsfield units", "display": "grey levels of a display window"}
    if unit is not None:
        one_of(unit, names, "unit")
    path = Path(path)
    warnings: tuple[str, ...] = ()
    if _holds_dicom(path):
        from covidseg.data.dicom import read_series  # which needs this module

        voxels, grid, warnings = read_series(path, None if series is None else str(series))
    elif series is not None:
        raise SettingsError("is not DICOM and has no series", path=path, remedy="Leave --series out")
    else:
        header = read_header(path)
        voxels, grid, warnings = read_voxels(header), header.grid, header.warnings
    low, high = float(voxels.min()), float(voxels.max())
    found = "HU" if low < -200 else "display"
    if unit is not None and unit != found:
        raise InputFileError(f"holds values from {low:g} to {high:g}, which are not {names[unit]}", path=path,
                             remedy=f"Take it for {names[found]}, or export the scan again")
    return Scan(apply_orientation(voxels, grid.to_upright()), grid.spacing(), (low, high), found, path, grid, warnings)


def _holds_dicom(path: Path) -> bool:
    """Whether a path is that of a DICOM file, or of a folder with DICOM and no NIfTI files in it."""
    if path.name.lower().endswith(SUFFIXES) or not (kind := kind_of(path)):
        return False
    if kind != "folder":
        return is_dicom(path)
    from covidseg.data.dicom import inputs_in  # which needs this module

    return inputs_in(path) == [path]


def is_dicom(path: Path) -> bool:
    """Whether a file is DICOM by its content; names do not tell.

    Raises:
        InputFileError: it cannot be opened, so that nobody knows.
    """
    if kind_of(path) != "file":  # a pipe would be waited for
        return False
    with opening(path), path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def files_below(folder: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """All files below a folder in order, also behind links, without hidden ones and indexes of a CD.

    ``seen`` are the folders that were there before, to which links may lead back.

    Raises:
        InputFileError: a folder cannot be read, so that nobody knows what lies there.
    """
    seen = set() if seen is None else seen
    if (place := folder.resolve()) in seen:
        return
    seen.add(place)
    for path in entries(folder):
        if path.name.startswith("."):
            continue
        if kind_of(path) == "folder":
            yield from files_below(path, seen)
        elif not path.name.upper().startswith("DICOMDIR"):
            yield path


def read_mask(path: str | Path, *, like: Scan | Path | str | None = None) -> np.ndarray:
    """Reads a mask as ``(slices, rows, columns)`` bool, upright; every value above 0 counts as inside.

    Args:
        path: a NIfTI file.
        like: the scan that the mask belongs to, or the path of its file; the voxels have to be the same, at most half
            of one away by the affines, but in any order.

    Raises:
        InputFileError: the file cannot be read, does not fit ``like``, or is no mask: it holds numbers below 0, or such
            as 0.25. A scan or probabilities would give figures that look like others.
    """
    path = Path(path)
    with fitting_memory(path):
        return _mask_values(path, like) > 0


def read_classes(path: str | Path, *, like: Scan | Path | str | None = None) -> np.ndarray:
    """Reads a mask whose numbers are classes, as ``(slices, rows, columns)`` uint8, upright; 255 is 255 or more.

    Arguments and errors are those of :func:`read_mask`.
    """
    path = Path(path)
    with fitting_memory(path):
        values = _mask_values(path, like)
        if values.dtype.kind == "f":
            values = np.maximum(np.rint(values), values > 0)  # inside for read_mask, inside here
        return np.minimum(values, 255).astype(np.uint8)


def _mask_values(path: Path, like: Scan | Path | str | None) -> np.ndarray:
    """The whole numbers of a mask, upright and in their stored type."""
    header = read_header(path)
    grid = header.grid
    if like is not None:
        like = like if isinstance(like, Scan) else read_scan(like)
        # The mask's axes in the image's order; as they are, if that is the same.
        turn = ornt_transform(io_orientation(grid.affine), io_orientation(like.grid.affine))
        shape = tuple(grid.shape[axis] for axis in np.argsort(turn[:, 0]))
        if shape != like.grid.shape:
            raise InputFileError(f"has shape {grid.shape}, its image {like.path.name} has {like.grid.shape}",
                                 path=path, remedy="Give the mask that was drawn on this very file")
        turned_affine = grid.affine @ inv_ornt_aff(turn, grid.shape)
        if not like.grid.is_like(turned_affine):
            raise InputFileError(f"has another affine than its image {like.path.name}, with voxels up to "
                                 f"{like.grid.apart(turned_affine):.1f} mm away", path=path,
                                 remedy="Resample the mask onto the image, or correct its header")
    voxels = read_voxels(header)
    whole = voxels.dtype.kind != "f" or bool((np.abs(voxels - np.rint(voxels)) < 1e-3).all())
    if not whole or voxels.min() < 0:
        raise InputFileError(f"is no mask: it holds {'numbers below 0' if whole else 'fractions'}", path=path,
                             remedy="Give whole numbers, 0 for what is outside; cut probabilities at a threshold")
    turned: np.ndarray = apply_orientation(voxels, grid.to_upright())
    return turned


def write_like(array: np.ndarray, grid: Grid | Scan, path: str | Path) -> Path:
    """Writes an upright array as NIfTI in the voxel order, shape and affine of ``grid``.

    Nothing but shape and place goes into the header: names, dates and remarks of the input stay out. Equal arrays
    are equal bytes, compressed or not.

    Args:
        array: ``(slices, rows, columns)``; stored as it is where all programs read its type, else bool as ``uint8``,
            whole numbers in the smallest type that holds them, and others as ``float32``.
        grid: the layout of the input, ``scan.grid``, or the scan itself.
        path: target, ``.nii`` or ``.nii.gz``; a crash leaves no half file.

    Raises:
        OutputError: the name is not that of a NIfTI file, the array does not fit the grid or holds what NIfTI cannot
            store, or the file cannot be written.
    """
    array, path, grid = np.asarray(array), Path(path), grid.grid if isinstance(grid, Scan) else grid
    if not path.name.lower().endswith(SUFFIXES):
        raise OutputError("is not named as a NIfTI file", path=path, remedy="End its name in .nii or .nii.gz")
    stored = apply_orientation(array, grid.from_upright()) if array.ndim == 3 else array
    if stored.shape != grid.shape:
        raise OutputError(f"result of shape {stored.shape} does not fit the input's {grid.shape}", path=path,
                          remedy="Give an array (slices, rows, columns) of the shape of scan.pixels")
    if max(stored.shape) > LONGEST:
        raise OutputError(f"result of shape {stored.shape} has more than {LONGEST} voxels along an axis", path=path,
                          remedy="Cut the scan into parts")
    with fitting_memory(path, OutputError):
        stored = _storable(stored, path)
    if grid.two_dimensional:
        stored = stored[..., 0]
    suffix = ".nii" if path.name.lower().endswith(".nii") else ".nii.gz"
    image = nib.Nifti1Image(stored, grid.affine)
    for name, value in grid.place.items():
        image.header[name] = value
    if not grid.place and not np.allclose(straight := _without_tilt(grid.affine), grid.affine, atol=1e-3):
        # ITK, and so 3D Slicer, opens no file whose only affine is sheared; it takes the other one, which places the
        # result as ITK places the tilted series itself.
        image.set_qform(straight, code="aligned")
    with fitting_memory(path, OutputError):
        write_whole(path, lambda temporary: nib.save(image, temporary), suffix=suffix)
    return path


def _storable(array: np.ndarray, path: Path) -> np.ndarray:
    """The same values in a type of :data:`WHOLE` or float32; an OutputError where there is none."""
    kind = array.dtype.kind
    if kind not in "biuf":
        raise OutputError(f"voxels of type {array.dtype} cannot be stored", path=path,
                          remedy="Give bool, whole numbers or numbers with a point")
    if kind == "b":
        return array.view(np.uint8)
    if kind == "f":
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and is refused
            values = array.astype(np.float32, copy=False)
        if not (np.isfinite(values.min()) and np.isfinite(values.max())):
            raise OutputError("has voxels that are not numbers (NaN, infinite or beyond float32)", path=path,
                              remedy="Put numbers in their place, such as 0")
        return values
    if array.dtype.newbyteorder("=") in WHOLE:
        return array
    low, high = int(array.min()), int(array.max())
    for dtype in WHOLE:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return array.astype(dtype)
    raise OutputError(f"has whole numbers from {low} to {high}, beyond 32 bits", path=path,
                      remedy="Scale them, or give numbers with a point")


def _without_tilt(affine: np.ndarray) -> np.ndarray:
    """The affine with its third axis at right angles to the others, and as long as before."""
    straight = affine.copy()
    normal = np.cross(affine[:3, 0], affine[:3, 1])
    step = affine[:3, 2]
    straight[:3, 2] = normal * np.sign(normal @ step) * np.linalg.norm(step) / np.linalg.norm(normal)
    return straight
