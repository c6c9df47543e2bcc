"""From published archives to a data folder: scans, masks and the table of slice labels in their places.

The labels are computed from the published outlines: a slice *has a lesion* when at least 40 pixels of a 512 x 512
slice lie in one (scaled by area for other sizes), so that a stray pixel does not decide. From then on the outlines
serve for measuring only; training reads ``im/`` and ``slice_labels.csv``.

The table is written last. A folder without it is incomplete, and the next call starts over.
"""

from __future__ import annotations

import csv
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from covidseg.atomic import whole_file, write_whole
from covidseg.data.fetch import unpack
from covidseg.data.registry import Entry
from covidseg.data.scan import SUFFIXES, UPRIGHT, read_mask, scan_id
from covidseg.errors import DatasetError, DownloadError, InputFileError, OutputError

LESION_PIXELS = 40
REFERENCE_AREA = 512 * 512
# A header may promise more voxels than any chest CT has, to exhaust the memory; this is 4096 slices of 512 x 512.
MAX_VOXELS = 1 << 30
Note = Callable[[str], None]


def has_lesion(mask: np.ndarray) -> np.ndarray:
    """Slice labels from outlines.

    Args:
        mask: ``(S, H, W)`` bool.

    Returns:
        ``(S,)`` bool: at least 40 lesion pixels per 512 x 512.
    """
    least = LESION_PIXELS * mask.shape[1] * mask.shape[2] / REFERENCE_AREA
    counts = mask.sum(axis=(1, 2))  # (S,)
    return (counts >= least) & (counts > 0)


def arrange(item: Entry, files: dict[str, Path], folder: str | Path, note: Note = lambda line: None) -> Path:
    """Lays the fetched files of a data set out in ``folder``.

    Args:
        item: the data set.
        files: role (``image``, ``lung``, ``mask``) -> fetched file.
        folder: the data folder.
        note: called with a line for everything that was not as expected but could be settled.

    Returns:
        The folder.

    Raises:
        DownloadError: an archive is damaged or a trap.
        DatasetError: images and outlines do not belong together, or the folder holds other scans.
        InputFileError: a scan cannot be read.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside the target, so that moving a file is a rename on one disk.
        with tempfile.TemporaryDirectory(dir=folder, prefix=".unpack-") as work:
            if item.layout == "stacks":
                _arrange_stack(files["image"], files["mask"], folder, note)
            else:
                found = {role: _scans(unpack(path, Path(work) / role)) for role, path in files.items()}
                _arrange_volumes(item, found, folder, note)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder,
                          remedy="Check free space and permissions, or choose another folder with --to") from error
    return folder


def _scans(paths: Iterable[Path]) -> dict[str, Path]:
    """NIfTI files by volume name, wherever in the archive they lay; side files of some packers are left out."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.name.endswith(SUFFIXES) or path.name.startswith("."):
            continue
        if scan_id(path) in found:
            raise DownloadError(f"the archive holds two volumes {scan_id(path)}", path=path.name,
                                remedy="Do not use this archive")
        found[scan_id(path)] = path
    return found


def _arrange_volumes(item: Entry, found: dict[str, dict[str, Path]], folder: Path, note: Note) -> None:
    images, lungs, masks = (found.get(role, {}) for role in ("image", "lung", "mask"))
    if not images:
        raise DatasetError("the archive of images holds no NIfTI file", path=folder, remedy="Download it again")
    for role, volumes in (("lung", lungs), ("mask", masks)):
        if odd := sorted(set(volumes) ^ set(images)):
            raise DatasetError(f"volumes {', '.join(odd)} have an image or a {role} but not both", path=folder,
                               remedy="Download the archives again")
    foreign = {scan_id(p) for p in (folder / "im").glob("*")} - set(images)
    if foreign:
        raise DatasetError(f"holds other scans already: {', '.join(sorted(foreign))}", path=folder / "im",
                           remedy="Choose an empty folder with --to")
    rows: list[tuple[str, int, int, str]] = []
    for volume in sorted(images, key=_natural):
        image = folder / "im" / images[volume].name
        place(images[volume], image)
        for kind, source in (("lung", lungs[volume]), ("mask", masks[volume])):
            place(source, folder / kind / image.name, like=image, note=note)
        labels = has_lesion(read_mask(folder / "mask" / image.name))
        rows += [(volume, index, int(label), item.patient_of(volume)) for index, label in enumerate(labels)]
    write_table(folder / "slice_labels.csv", ("volume", "slice", "has_lesion", "patient"), rows)


def _arrange_stack(image: Path, mask: Path, folder: Path, note: Note) -> None:
    name = image.name.removesuffix("_im.nii.gz")
    placed = folder / image.name
    place(image, placed, move=False)
    place(mask, folder / f"{name}_mask.nii.gz", like=placed, note=note, move=False)
    labels = has_lesion(read_mask(folder / f"{name}_mask.nii.gz"))
    published = stored_order(placed)
    write_table(folder / f"{name}_slices.csv", ("position", "medseg100_slice", "has_lesion"),
                [(position, published[position], int(label)) for position, label in enumerate(labels)])


def arrange_mosmed(folder: str | Path) -> Path:
    """Lays out the part of MosMedData that slice labels follow for, beside the publisher's own folders.

    These are the normal studies (CT-0), in which no slice has a lesion, and the 50 with outlines. The other 806
    have a grade for the whole study, which says nothing about a single slice. Scans are linked, not copied, where
    the file system can.

    Args:
        folder: holds ``studies/CT-*/study_NNNN.nii.gz`` and ``masks/study_NNNN_mask.nii.gz``.

    Raises:
        DatasetError: neither normal studies nor outlines are there, or an outline has no study.
        InputFileError: a scan cannot be read.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    studies = {scan_id(p): p for p in sorted(folder.glob("studies/CT-*/study_*.nii.gz"))}
    masks = {scan_id(p).removesuffix("_mask"): p for p in folder.glob("masks/study_*_mask.nii.gz")}
    if lonely := sorted(set(masks) - set(studies)):
        raise DatasetError(f"outlines without a study: {', '.join(lonely)}", path=folder / "masks",
                           remedy="Add the studies or remove the outlines")
    chosen = [study for study, path in studies.items() if path.parent.name == "CT-0" or study in masks]
    if not chosen:
        raise DatasetError("holds neither studies/CT-0 nor masks", path=folder,
                           remedy="Unpack the publisher's archives there")
    rows: list[tuple[str, int, int, str]] = []
    try:
        for study in chosen:
            image = folder / "im" / f"{study}.nii.gz"
            place(studies[study], image, move=False)
            labels = np.zeros(len(stored_order(image)), dtype=bool)
            if study in masks:
                place(masks[study], folder / "mask" / image.name, like=image, move=False)
                labels = has_lesion(read_mask(folder / "mask" / image.name))
            rows += [(study, index, int(label), study) for index, label in enumerate(labels)]
        write_table(folder / "slice_labels.csv", ("volume", "slice", "has_lesion", "patient"), rows)
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder,
                          remedy="Check free space and permissions") from error
    return folder


def stored_order(path: Path) -> list[int]:
    """Index in the file of each slice of the upright array: published splits count as the file does."""
    image = _header(path)
    turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(UPRIGHT))
    axis, sense = next((a, sense) for a, (target, sense) in enumerate(turn) if target == 0)
    slices = range(image.shape[axis])
    return list(slices if sense > 0 else reversed(slices))


def place(source: Path, target: Path, *, like: Path | None = None, note: Note = lambda line: None,
          move: bool = True) -> None:
    """Puts a scan in its place; outlines are made to carry the header of their image.

    The publishers' outlines belong to the images voxel by voxel, yet some tools wrote another origin or sense of
    the axes into their headers, which :func:`covidseg.data.scan.read_mask` rightly refuses. Shapes must agree.

    Args:
        source: a NIfTI file.
        target: where it should be.
        like: the image that an outline belongs to.
        note: told when a header had to be replaced.
        move: whether the source may be used up (unpacked) or has to stay (downloaded).

    Raises:
        InputFileError: the scan cannot be read, or promises more voxels than any chest CT has.
        DatasetError: the outline has another shape than its image.
    """
    header = _header(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if like is not None:
        image = _header(like)
        if header.shape != image.shape:
            raise DatasetError(f"the outline has shape {header.shape}, its image {like.name} {image.shape}",
                               path=source.name, remedy="Download the archives again")
        if not np.allclose(header.affine, image.affine, atol=1e-2) or source.suffix != target.suffix:
            voxels = np.asanyarray(header.dataobj)
            if voxels.min() < 0 or voxels.max() > 255:
                raise InputFileError("is no mask: it holds values outside 0..255", path=source.name)
            _save(nib.Nifti1Image(voxels.astype(np.uint8), image.affine), target)
            note(f"{target.parent.name}/{target.name}: header differed from its image's and was replaced")
            return
    if move:
        source.replace(target)
        return
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)  # costs no disk space; not every file system can
    except OSError:
        write_whole(target, lambda temporary: shutil.copyfile(source, temporary))


def _header(path: Path) -> Any:
    """The file, opened but not read; refuses what would not fit any chest CT."""
    try:
        image: Any = nib.load(path)
        voxels = int(np.prod(image.shape, dtype=object))
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise InputFileError(f"cannot be read as NIfTI ({error})", path=path, remedy="Download it again") from error
    if voxels > MAX_VOXELS:
        raise InputFileError(f"claims to hold {voxels} voxels", path=path, remedy="Do not use this file")
    return image


def _save(image: Any, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".save-") as work:
        nib.save(image, made := Path(work) / target.name)
        made.replace(target)


def write_table(path: Path, header: tuple[str, ...], rows: Iterable[tuple]) -> None:
    """Writes a CSV table that appears only when complete.

    Raises:
        OutputError: it cannot be written.
    """
    with whole_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a small JSON file that appears only when complete.

    Raises:
        OutputError: it cannot be written.
    """
    text = json.dumps(content, indent=1) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _natural(volume: str) -> tuple[int, str]:
    """Sorts 2 before 10."""
    return (int(volume), "") if volume.isdigit() else (1 << 60, volume)
