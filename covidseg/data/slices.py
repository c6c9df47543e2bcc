"""Scans and results slice by slice, so that memory does not grow with the number of slices.

A NIfTI file stores its last axis slowest. Where that is the axis from feet to head, as in nearly all chest CT, a file
can be read and a result written one upright slice after another; other files are held as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from isal import igzip
from nibabel.orientations import apply_orientation
from tqdm import tqdm

from covidseg.atomic import whole_file
from covidseg.data.scan import Grid, open_voxels, read_header, read_voxels, write_like
from covidseg.errors import OutputError
from covidseg.lungs import LungPasses, LungSettings, no_lung

PATIENCE = 2  # seconds without a bar that shows progress


class SliceReader:
    """The upright slices of a file, one after another in the order in which they are stored, as often as wanted.

    Each pass reads the file to its end and tests its checksum there.

    Args:
        path: as of :func:`covidseg.data.scan.read_scan`.

    Attributes:
        path: the file.
        grid: its layout, for writing results with :func:`slice_writer`.
        shape: slices, rows and columns, upright.

    Raises:
        InputFileError: as of :func:`covidseg.data.scan.read_scan`; a damaged body shows when slices are read.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._header = read_header(self.path)
        self._voxels: np.ndarray | None = None  # of a file that does not hold one upright slice after another
        self.grid = self._header.grid
        upright = self.grid.to_upright()
        order = np.argsort(upright[:, 0])
        rows, columns = (self.grid.shape[axis] for axis in order[1:])
        self.shape = (self.grid.shape[order[0]], rows, columns)
        self._falling = self.grid.in_slices() and upright[2, 1] < 0

    def __len__(self) -> int:
        return self.shape[0]

    def number(self, position: int) -> int:
        """Number of a slice counted from the feet, given its position among the slices as they come."""
        return len(self) - 1 - position if self._falling else position

    def __iter__(self) -> Iterator[np.ndarray]:
        """Slices ``(rows, columns)`` in the type that :func:`covidseg.data.scan.read_scan` gives them."""
        if self.grid.in_slices():
            with open_voxels(self._header) as fill:
                for _ in range(len(self)):
                    plane = np.empty(self.grid.shape[:2], self._header.dtype(), order="F")
                    fill(plane)
                    yield apply_orientation(plane[..., None], self.grid.to_upright())[0]
        else:
            if self._voxels is None:
                self._voxels = apply_orientation(read_voxels(self._header), self.grid.to_upright())
            yield from self._voxels


@contextmanager
def slice_writer(path: Path, grid: Grid, dtype: type = np.uint8) -> Iterator[Callable[[np.ndarray], None]]:
    """Writes a result slice by slice: the file that :func:`covidseg.data.scan.write_like` would write of all of them.

    Args:
        path: target; it appears when the last slice is written, and not at all if anything fails.
        grid: the layout of the input, ``reader.grid``.
        dtype: stored type.

    Yields:
        A function that takes the next slice ``(rows, columns)``, in the order in which a :class:`SliceReader` of the
        input gives them.

    Raises:
        OutputError: the file cannot be written, or slices are missing.
    """
    slices: list[np.ndarray] = []
    if not grid.in_slices():
        yield lambda image: slices.append(image.astype(dtype))
        _complete(len(slices), grid.shape[int(np.argmin(grid.to_upright()[:, 0]))], path)
        write_like(np.stack(slices), grid, path)
        return
    count = 0
    with whole_file(path) as temporary, ExitStack() as stack:
        stream: Any = stack.enter_context(temporary.open("wb"))
        if not path.name.lower().endswith(".nii"):
            # Neither date nor name in the compressed file, so that equal results are equal bytes.
            stream = stack.enter_context(igzip.IGzipFile("", "wb", 1, stream, 0))
        stream.write(_header_bytes(grid, dtype))

        def write(image: np.ndarray) -> None:
            nonlocal count
            count += 1
            plane = apply_orientation(image[None], grid.from_upright())[..., 0]
            stream.write(plane.astype(dtype, copy=False).tobytes(order="F"))
        yield write
        _complete(count, grid.shape[2], path)


def look(reader: SliceReader, settings: LungSettings = LungSettings(), volume: bool | None = None, *,
         progress: bool = False, check: bool = True) -> LungPasses:
    """First pass over a scan: all that the lung masks of its slices need.

    Args:
        volume: as of :func:`covidseg.lungs.lung_masks`.
        progress: show it, if it takes long and there is a terminal.
        check: whether the slices have to look like chest CT, see :meth:`covidseg.lungs.LungPasses.check`.
    """
    passes = LungPasses(settings, volume).look_at(shown(reader, "lungs", progress))
    if check:
        passes.check(reader.path)
    return passes


def write_lungs(path: Path, target: Path, settings: LungSettings = LungSettings(), volume: bool | None = None, *,
                progress: bool = False, check: bool = True) -> tuple[int, int]:
    """Writes the threshold lung mask of a scan; arguments as of :func:`look`.

    Returns:
        How many slices show lung, and how many there are.

    Raises:
        InputFileError: the scan cannot be read, or does not look like chest CT.
        NoLungError: there is no lung in any slice.
        OutputError: the mask cannot be written.
    """
    reader = SliceReader(path)
    passes = look(reader, settings, volume, progress=progress, check=check)
    found = 0
    with slice_writer(target, reader.grid) as write:
        for position in range(len(reader)):
            mask = passes.mask(position)
            found += bool(mask.any())
            write(mask)
        if not found:
            raise no_lung(path)
    return found, len(reader)


def shown(slices: SliceReader, what: str, progress: bool) -> Iterator[np.ndarray]:
    """The slices, with a bar that shows how far they are, if it takes long and there is a terminal."""
    return iter(tqdm(slices, desc=what, unit="slice", delay=PATIENCE, leave=False, disable=None if progress else True))


def _complete(count: int, wanted: int, path: Path) -> None:
    if count != wanted:
        raise OutputError(f"{count} slices were written, the input has {wanted}", path=path)


def _header_bytes(grid: Grid, dtype: type) -> bytes:
    """All that a file of one layout holds before its voxels."""
    shape = grid.shape[:2] if grid.two_dimensional else grid.shape
    header = nib.Nifti1Image(np.broadcast_to(dtype(0), shape), grid.affine).header
    header.set_slope_inter(1, 0)
    header.set_data_offset(header.single_vox_offset)
    return header.binaryblock + bytes(header.single_vox_offset - len(header.binaryblock))
