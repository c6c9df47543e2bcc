"""What a NIfTI file holds: which files are some, how their voxels are laid out and stored, and their values.

Scans of every kind are asked for here what lies at a path, and whether they fit into memory.

nibabel reads headers. Voxels are read here, to the end of the file and straight into place: nibabel stops before the
checksum of a compressed file, and so misses damage, and needs memory for a second copy.
"""

from __future__ import annotations

import math
import stat
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from logging import CRITICAL, Logger
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from isal import igzip
from isal.igzip_lib import IsalError
from nibabel.affines import apply_affine
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform
from nibabel.volumeutils import apply_read_scaling

from covidseg.errors import CovidsegError, InputFileError

SUFFIXES = (".nii", ".nii.gz")
# Upright order: slices towards the head (S), rows towards the back (P), columns towards the left (L).
UPRIGHT = ("S", "P", "L")
SPACING = (0.01, 200.0)  # mm; no CT has less or more, though stacks of single slices come with odd distances
# A header may promise more voxels than any CT has, to exhaust the memory; this is 4096 slices of 1024 x 1024.
MAX_VOXELS = 1 << 32
BLOCK = 1 << 18          # bytes decompressed at a time, since a gzip stream makes a copy of each piece
DEFLATE = 1032           # times smaller than its content is the most that a compressed file can be
GZIP = b"\x1f\x8b"        # first bytes of a compressed file
OTHERS = {b"<": "a web page", b"PK": "a zip archive", b"\x89PNG": "a picture", b"NRRD": "an NRRD file",
          b"vers": "a pointer of Git LFS (`git lfs pull` fetches the file)"}
# What a header says about place, by two ways: which program follows which differs, so results say both, as their scan.
PLACE = ("sform_code", "srow_x", "srow_y", "srow_z", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x",
         "qoffset_y", "qoffset_z", "pixdim", "xyzt_units")
ROUNDED, APART = 0.01, 1.0  # part of a spacing, and mm, up to which the two ways agree


@dataclass(frozen=True)
class Grid:
    """How a file lays out its voxels: all that is needed to write a result that fits the input."""

    shape: tuple[int, int, int]    # of the stored array; a two-dimensional file counts as one slice
    affine: np.ndarray             # (4, 4) matrix from voxel indices to millimetres
    two_dimensional: bool = False  # whether the file itself has only two axes
    place: dict[str, Any] = field(default_factory=dict)  # fields of the header, PLACE; without, they follow the affine

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

    def pixel_mm(self) -> tuple[float, float] | None:
        """Height and width of a pixel in mm; None for voxels of 1 x 1 x 1, which is written where nobody knows."""
        spacing = self.spacing()
        return None if np.allclose(spacing, 1, atol=1e-6) else spacing[1:]

    def corners(self) -> np.ndarray:
        """Indices of the eight voxels in the corners, ``(8, 3)`` int."""
        return np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)]) * (np.array(self.shape) - 1)

    def apart(self, affine: np.ndarray) -> float:
        """Millimetres by which another affine moves a voxel, at most; affine maps err most in a corner."""
        corners = self.corners()
        return float(np.linalg.norm(apply_affine(affine, corners) - apply_affine(self.affine, corners), axis=1).max())

    def is_like(self, affine: np.ndarray) -> bool:
        """Whether another affine means the same voxels: none is moved by more than half of its shortest side."""
        return self.apart(affine) <= 0.5 * min(self.spacing())

    def voxel_ml(self) -> float:
        """Volume of a voxel in millilitres; of a sheared grid, as a tilted gantry makes it, less than its sides say."""
        return float(abs(np.linalg.det(self.affine[:3, :3]))) / 1000


def is_scan(path: Path) -> bool:
    """Whether a name is that of a NIfTI file. Hidden files are none: macOS puts ``._NAME`` beside each file."""
    return path.name.lower().endswith(SUFFIXES) and not path.name.startswith(".")


def scans_in(folder: Path) -> list[Path]:
    """The NIfTI files in a folder; arguments and errors are those of :func:`entries`."""
    return [path for path in entries(folder) if is_scan(path)]


# --- what the file system and the memory refuse ---------------------------------------------------------------------

def entries(folder: Path) -> list[Path]:
    """Files and folders in a folder, in order of their names; none if there is no such folder.

    Not ``Path.glob``, for which a folder that it may not read is an empty one.

    Raises:
        InputFileError: the folder cannot be read.
    """
    with opening(folder):
        return sorted(folder.iterdir()) if kind_of(folder) == "folder" else []


@contextmanager
def opening(path: Path, error_type: type[CovidsegError] = InputFileError) -> Iterator[None]:
    """What the file system says against opening a file or folder becomes a typed error that names it."""
    try:
        yield
    except OSError as error:
        raise unopened(error, Path(error.filename) if isinstance(error.filename, str) else path, error_type) from error


def unopened(error: OSError, path: str | Path | None,
             error_type: type[CovidsegError] = InputFileError) -> CovidsegError:
    """What the file system says, as a typed error."""
    return error_type(f"cannot be opened ({error.strerror or error})", path=path,
                      remedy="Check its name, its permissions and the disk")


def kind_of(path: Path) -> str:
    """What lies at a path: ``file``, ``folder``, ``other`` such as a pipe, or an empty text for nothing.

    ``Path.is_dir`` and its like end in a trace, or say no, where the file system refuses to answer.

    Raises:
        InputFileError: that cannot be told, as behind a folder without permission, or of a name that is too long.
    """
    with opening(path):
        try:
            mode = path.stat().st_mode
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a zero byte, which no name has
            return ""
    return "file" if stat.S_ISREG(mode) else "folder" if stat.S_ISDIR(mode) else "other"


@contextmanager
def fitting_memory(path: Path, error_type: type[CovidsegError] = InputFileError) -> Iterator[None]:
    """Memory that is not there becomes a typed error."""
    try:
        yield
    except MemoryError as error:
        raise error_type("needs more memory than this machine has free", path=path,
                         remedy="End other programs, use a larger machine, or cut the scan into parts") from error


def refuse_huge(shape: tuple[int, ...], path: Path) -> None:
    """An InputFileError for more voxels than any CT has."""
    if (voxels := math.prod(shape)) > MAX_VOXELS:
        raise InputFileError(f"claims to hold {voxels} voxels, more than any CT has", path=path,
                             remedy="Export the scan again, or cut out the part that is needed")


# --- header and voxels ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Header:
    """What a file says about its voxels: their grid and stored type, the bytes before them, and their scaling."""

    path: Path
    grid: Grid
    stored: np.dtype
    offset: int
    slope: float
    inter: float
    warnings: tuple[str, ...]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file to read, decompressed if it is compressed: browsers and mail programs change that without the name."""
    with path.open("rb") as raw:
        packed = raw.read(2) == GZIP
        raw.seek(0)
        if not packed:
            yield raw
            return
        with cast(Any, igzip.open(raw)) as stream:
            yield stream


@contextmanager
def _faults(path: Path) -> Iterator[None]:
    """Every way in which a damaged file fails becomes an InputFileError."""
    try:
        yield
    except (OSError, EOFError, ValueError, OverflowError, zlib.error, IsalError,  # type: ignore[misc]
            nib.filebasedimages.ImageFileError, nib.spatialimages.HeaderDataError,
            nib.wrapstruct.WrapStructError) as error:
        if isinstance(error, OSError) and error.errno:  # not of the content; those of gzip have no number
            with opening(path):
                raise
        reason = str(error).replace(str(path), path.name)  # the error itself says where, reports must not
        raise InputFileError(f"cannot be read as NIfTI ({reason})", path=path,
                             remedy="The file is damaged or incomplete: copy or download it again") from error


def _check_file(path: Path) -> None:
    """Refuses what cannot be a NIfTI file by its name and kind."""
    def refusal(fault: str, remedy: str) -> InputFileError:
        return InputFileError(fault, path=path, remedy=remedy)

    kind = kind_of(path)
    if not kind and path.is_symlink():
        raise refusal("is a link to a file that is not there",
                      "Fetch that file, for instance with `git annex get`, or correct the link")
    if not kind:
        raise refusal("no such file", "Check the spelling of the path")
    if kind == "folder":
        raise refusal("is a folder, not a scan", "Name the NIfTI files inside it")
    if kind == "other":
        raise refusal("is no ordinary file", "Write what it gives into one first")
    if path.name.lower().endswith((".hdr", ".img", ".hdr.gz", ".img.gz")):
        raise refusal("is one half of a pair of files (.hdr and .img)",
                      "Make one file of both with nibabel's `nib-convert NAME.hdr NAME.nii.gz`")
    if not path.name.lower().endswith(SUFFIXES):
        raise refusal("is not a NIfTI file (.nii or .nii.gz)",
                      "Convert it to NIfTI first; only scans may be DICOM as well")


def read_header(path: Path, affine: np.ndarray | None = None) -> Header:
    """Reads the header of a file of one grey-value volume; ``affine`` is taken in place of the file's own.

    Raises:
        InputFileError: the file is missing, not NIfTI, not one grey-value volume, has no usable affine or spacing, or
            is far too small for the voxels that it announces, or these are more than any CT has.
    """
    def refusal(fault: str, remedy: str) -> InputFileError:
        return InputFileError(fault, path=path, remedy=remedy)

    _check_file(path)
    with _faults(path):
        fields, offset = _fields(path)
        stored, shape = fields.get_data_dtype(), tuple(int(n) for n in fields.get_data_shape())
        slope, inter = fields.get_slope_inter()  # None where the stored values are meant as they are
    if stored.kind not in "iuf":
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
    respace = "Correct the spacing in its header (in mm), or export it again"
    steps, odd = fields["pixdim"][1:1 + len(whole)], []
    by_qform = affine is None and not fields["sform_code"]  # which takes its spacing from pixdim
    invented = by_qform and not fields["qform_code"]  # without either code nibabel makes an affine up
    if by_qform and two_dimensional and fields["pixdim"][3] == 0:  # of an axis that the file does not have
        fields["pixdim"][3] = 1
        odd.append("the thickness of the slice is unknown and taken for 1 mm")
    if by_qform and not invented and (steps[:3] <= 0).any():
        raise refusal(f"has voxels of {_mm(steps[:3])} mm, which no CT has", respace)
    with _faults(path):
        place = {} if affine is not None else {name: fields[name] for name in PLACE}
        affine = np.asarray(fields.get_best_affine() if affine is None else affine, dtype=np.float64)
    if invented or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9 \
            or np.isnan(io_orientation(affine)).any():
        raise refusal("has no usable affine, so its orientation and spacing are unknown",
                      "Export it again with orientation, or set the affine with nibabel")
    # The affine may be whole all the same; but then one of the two is damaged, and nobody knows which.
    if not np.isfinite(steps).all():
        raise refusal("has a spacing that is not a number", respace)
    grid = Grid((shape[0], shape[1], shape[2]), affine, two_dimensional, place)
    if not all(SPACING[0] <= step <= SPACING[1] for step in grid.spacing()):
        raise refusal(f"has voxels of {_mm(grid.spacing())} mm, which no CT has", respace)
    with _faults(path):
        size, wanted = path.stat().st_size, offset + stored.itemsize * math.prod(grid.shape)
        with path.open("rb") as stream:
            most = size * (DEFLATE if stream.read(2) == GZIP else 1)
        if wanted > most:  # nobody reserves memory for that
            raise EOFError(f"{wanted} bytes are said to be in a file of {size}, voxels from byte {offset} on")
    refuse_huge(grid.shape, path)
    odd += _contradictions(fields, grid) if place else ()
    return Header(path, grid, stored, offset, 1.0 if slope is None else float(slope),
                  0.0 if inter is None else float(inter), tuple(odd))


def _mm(steps: Iterable[float]) -> str:
    """Spacings as text."""
    return " x ".join(f"{step:.3g}" for step in steps)


def _fields(path: Path) -> tuple[Any, int]:
    """A file's header as nibabel reads it, checked, and the byte at which the voxels begin.

    Not nib.load, which takes some NIfTI files for surfaces of a brain and then reads XML, and believes any offset.
    """
    with _opened(path) as stream:
        start = stream.read(4)
        kind = nib.Nifti2Header if int.from_bytes(start, "little") == 540 or int.from_bytes(start, "big") == 540 \
            else nib.Nifti1Header
        if found := next((what for begin, what in OTHERS.items() if start.startswith(begin)), ""):
            raise ValueError(f"it is {found}, whatever its name says")
        fields: Any = kind(start + stream.read(kind.sizeof_hdr - 4), check=False)
        extended = stream.read(4)[:1] not in (b"", b"\0")  # what follows then are remarks
    offset, least, bits = float(fields["vox_offset"]), kind.single_vox_offset, int(fields["bitpix"])
    fields["vox_offset"] = least
    said = {name: fields[name].copy() for name in ("pixdim", "sform_code", "qform_code")}
    fields.check_fix(Logger("", CRITICAL + 1))  # it raises what is wrong; a log line besides would only confuse
    # It corrects as well: 1 mm for a spacing of 0, no place for one of an unknown code. Nobody would hear of that.
    fields["pixdim"] = said["pixdim"]
    if said["pixdim"][0] == 0:
        fields["pixdim"][0] = 1  # as the standard has it
    for name in ("sform_code", "qform_code"):
        if fields[name] != said[name]:
            raise ValueError(f"its {name} is said to be {said[name]}, which no standard has")
    if not 0 <= offset < math.inf or offset % 1 or (extended and offset < least):
        raise ValueError(f"its voxels are said to begin at byte {offset:g}, the field vox_offset")
    if bits not in (0, 8 * (stored := fields.get_data_dtype()).itemsize):
        raise ValueError(f"its voxels are said to have {bits} bits and to be {stored}")
    return fields, max(int(offset), least)  # some programs write 0 and mean the least that the standard allows


def _contradictions(fields: Any, grid: Grid) -> tuple[str, ...]:
    """Where the two ways in which a header says spacing and place disagree, with the unit or with each other."""
    if unit := {1: "metres", 3: "micrometres"}.get(int(fields["xyzt_units"]) & 7):
        return (f"its header says that lengths are in {unit}, which makes no chest: millimetres are taken, and other "
                "programs may follow the header",)
    if not fields["sform_code"]:
        return ()
    axes = 2 if grid.two_dimensional else 3
    steps, other = np.sqrt((grid.affine[:3, :axes] ** 2).sum(axis=0)), fields["pixdim"][1:1 + axes]
    if (np.abs(steps - other) > ROUNDED * steps).any():
        first, second = (" x ".join(f"{step:.4g}" for step in found) for found in (steps, other))
        return (f"its sform says voxels of {first} mm, its pixdim {second} mm: the sform is followed, in millilitres "
                "too, and other programs may follow pixdim",)
    if not fields["qform_code"]:
        return ()
    corners = grid.corners()
    with np.errstate(all="ignore"):
        try:
            places = [apply_affine(affine, corners) for affine in (grid.affine, fields.get_qform())]
        except (ValueError, nib.spatialimages.HeaderDataError):
            return ("its qform cannot be computed: the sform is followed",)
        apart = np.linalg.norm(places[1] - places[0], axis=1)
    if (apart <= APART).all():
        return ()
    worst = int(np.argmax(apart))
    first, second = ("(" + ", ".join(f"{x:.1f}" for x in found[worst]) + ")" for found in places)
    return (f"its sform puts voxel {tuple(corners[worst].tolist())} at {first} mm, its qform at {second} mm: the sform "
            "is followed, and programs that follow the qform show scan and mask there",)


def read_voxels(header: Header) -> np.ndarray:
    """All values of a file, ``(i, j, k)`` in Fortran's order as the file is; the only copy of them that is made.

    They have the stored type, but float32 where that is floating point or has to be scaled.

    Raises:
        InputFileError: the file is damaged or incomplete, holds NaN, or does not fit into memory.
    """
    path, scaled = header.path, (header.slope, header.inter) != (1, 0)
    with fitting_memory(path), _faults(path), _opened(path) as stream:
        if stream.seek(header.offset) < header.offset:
            raise EOFError(f"its voxels are said to begin at byte {header.offset}, behind its end")
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
