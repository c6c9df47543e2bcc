"""From published archives to a data folder: scans, masks and the table of slice labels in their places.

The labels are computed from the published outlines: a slice *has a lesion* when at least 40 pixels of a 512 x 512
slice lie in one (scaled by area for other sizes), so that a stray pixel does not decide. From then on the outlines
serve for measuring only; training reads ``im/`` and ``slice_labels.csv``.

The table is written last. A folder without it is incomplete, and the next call starts over.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
from nibabel.orientations import apply_orientation

from covidseg.atomic import alone, work_folder, write_whole
from covidseg.data.fetch import Fetched, fetch, unpack, writing_to
from covidseg.data.folder import STACK_COLUMNS, VOLUME_COLUMNS, write_table
from covidseg.data.nifti import entries, is_scan, read_header, read_voxels, scans_in
from covidseg.data.registry import Entry, is_present
from covidseg.data.scan import Grid, read_mask, scan_id, write_like
from covidseg.errors import DatasetError, DownloadError, InputFileError

LESION_PIXELS = 40
REFERENCE_AREA = 512 * 512
Note = Callable[[str], None]


def has_lesion(mask: np.ndarray) -> np.ndarray:
    """Slice labels ``(S,)`` bool from outlines ``(S, H, W)`` bool: at least 40 lesion pixels per 512 x 512."""
    least = LESION_PIXELS * mask.shape[1] * mask.shape[2] / REFERENCE_AREA
    counts = mask.sum(axis=(1, 2))  # (S,)
    return (counts >= least) & (counts > 0)


def get_dataset(item: Entry, folder: str | Path, *, everything: bool = False, note: Note = print) -> None:
    """Downloads, checks, unpacks and lays out a data set whose licence has been accepted.

    The published files go to ``downloads/`` in the folder, with ``everything`` the optional ones too. ``note`` is told
    of every file, and of everything that was not as expected but could be settled. Another program that fetches into
    the same folder is waited for.

    Raises:
        CovidsegError: whatever :func:`covidseg.data.fetch.fetch` or :func:`lay_out` refuses.
    """
    folder = Path(folder)
    with alone(folder):
        if is_present(folder) and not everything:  # while this program waited
            return
        fetched: dict[str, Fetched] = {}
        for remote in item.files:
            if remote.optional and not everything:
                continue
            fetched[remote.name] = done = fetch(remote, folder / "downloads")
            note(f"{remote.name}: {'downloaded' if done.new else 'already there'}, checked against {done.checked}")
            if not remote.checksum:
                note(f"  Note: no checksum is published for {remote.name}. Its sha256 is kept in {remote.name}.sha256; "
                     "later downloads must match it, but nothing vouches for the first.")
        files = {r.role: fetched[r.name].path for r in item.files if r.name in fetched and r.role != "extra"}
        lay_out(item, files, folder, lambda line: note(f"  Note: {line}"))
        source = json.dumps({"name": item.name, "doi": item.doi, "licence": item.licence, "citation": item.citation,
                             "files": {name: done.checked for name, done in fetched.items()}}, indent=1) + "\n"
        write_whole(folder / "source.json", lambda temporary: temporary.write_text(source, encoding="utf-8"))


def lay_out(item: Entry, files: dict[str, Path], folder: str | Path, note: Note = lambda line: None) -> None:
    """Lays the fetched file of each role (``image``, ``lung``, ``mask``) out in a data folder.

    Raises:
        DownloadError: an archive is damaged or a trap.
        DatasetError: images and outlines do not belong together, or the folder holds other scans.
        InputFileError: a scan cannot be read.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if item.layout == "stacks":
            _lay_out_stack(files["image"], files["mask"], folder, note)
            return
        # Inside the target, so that the files need not be copied from one disk to another.
        with work_folder(folder) as work:
            found = {role: _scans(unpack(path, work / role)) for role, path in files.items()}
            _check_archives(found, folder)
            names = sorted(found["image"], key=lambda name: (int(name), "") if name.isdigit() else (math.inf, name))
            _lay_out_volumes({name: {role: found[role][name] for role in found} for name in names}, folder, note,
                             item.patient_of)


def _scans(paths: Iterable[Path]) -> dict[str, Path]:
    """NIfTI files by volume name, wherever in the archive they lay; side files of some packers are left out."""
    found: dict[str, Path] = {}
    for path in paths:
        if not is_scan(path):
            continue
        if scan_id(path) in found:
            raise DownloadError(f"the archive holds two volumes {scan_id(path)}", path=path.name,
                                remedy="Do not use this archive")
        found[scan_id(path)] = path
    return found


def _check_archives(found: dict[str, dict[str, Path]], folder: Path) -> None:
    """Refuses archives that do not belong together, or not to what the folder holds already."""
    images = found.get("image", {})
    if not images:
        raise DatasetError("the archive of images holds no NIfTI file", path=folder, remedy="Download it again")
    for role in ("lung", "mask"):
        if odd := sorted(set(found.get(role, {})) ^ set(images)):
            raise DatasetError(f"volumes {', '.join(odd)} have an image or a {role} but not both", path=folder,
                               remedy="Download the archives again")
    if foreign := {scan_id(p) for p in scans_in(folder / "im")} - set(images):
        raise DatasetError(f"holds other scans already: {', '.join(sorted(foreign))}", path=folder / "im",
                           remedy="Choose an empty folder with --to")


def _lay_out_volumes(volumes: dict[str, dict[str, Path]], folder: Path, note: Note,
                     patient_of: Callable[[str], str] = str) -> None:
    """Puts image and outlines of each volume in their places; a volume without a lesion mask has no lesion."""
    rows: list[tuple[str, int, int, str]] = []
    for volume, files in volumes.items():
        image = folder / "im" / files["image"].name
        _put(files["image"], image)
        for role in sorted(files.keys() & {"lung", "mask"}):
            _put(files[role], folder / role / image.name, like=image, note=note)
        labels = has_lesion(read_mask(folder / "mask" / image.name)) if "mask" in files else \
            np.zeros(len(_stored_slices(image)), dtype=bool)
        rows += [(volume, index, int(label), patient_of(volume)) for index, label in enumerate(labels)]
    write_table(folder / "slice_labels.csv", (*VOLUME_COLUMNS, "patient"), rows)


def _lay_out_stack(image: Path, mask: Path, folder: Path, note: Note) -> None:
    name = image.name.removesuffix("_im.nii.gz")
    placed, outlines = folder / image.name, folder / f"{name}_mask.nii.gz"
    _put(image, placed)
    _put(mask, outlines, like=placed, note=note)
    position, label = STACK_COLUMNS
    write_table(folder / f"{name}_slices.csv", (position, "medseg100_slice", label),
                [(upright, stored, int(lesion)) for upright, (stored, lesion)
                 in enumerate(zip(_stored_slices(placed), has_lesion(read_mask(outlines)), strict=True))])


def lay_out_mosmed(folder: str | Path) -> None:
    """Lays out the part of MosMedData that slice labels follow for, beside the publisher's own folders.

    These are the normal studies (CT-0), in which no slice has a lesion, and the 50 with outlines. The other 806
    have a grade for the whole study, which says little about a single slice. ``middle/`` in the folder is a data folder
    of its own, to test on: of each normal and each CT-2 study only the middle slice is labelled, by the study's grade.
    Both classes come from the same place in the chest, but some middle slices of CT-2 studies may be free.

    Args:
        folder: holds ``studies/CT-*/study_NNNN.nii.gz`` and ``masks/study_NNNN_mask.nii.gz``.

    Raises:
        DatasetError: neither normal studies nor outlines are there, or an outline has no study.
        InputFileError: a scan or a folder cannot be read.
        OutputError: the folder cannot be written.
    """
    folder = Path(folder)
    grades = [path for path in entries(folder / "studies") if path.name.startswith("CT-")]
    studies = {scan_id(p): p for grade in grades for p in scans_in(grade) if p.name.startswith("study_")}
    masks = {name.removesuffix("_mask"): p for p in scans_in(folder / "masks")
             if (name := scan_id(p)).startswith("study_") and name.endswith("_mask")}
    if lonely := sorted(set(masks) - set(studies)):
        raise DatasetError(f"outlines without a study: {', '.join(lonely)}", path=folder / "masks",
                           remedy="Add the studies or remove the outlines")
    labelled = {study: {"image": path, **({"mask": masks[study]} if study in masks else {})}
                for study, path in studies.items() if path.parent.name == "CT-0" or study in masks}
    if not labelled:
        raise DatasetError("holds neither studies/CT-0 nor masks", path=folder,
                           remedy="Unpack the publisher's archives there")
    with writing_to(folder):
        _lay_out_volumes(labelled, folder, lambda line: None)
        _lay_out_middle({study: (path, grade) for study, path in studies.items()
                         if (grade := path.parent.name) in ("CT-0", "CT-2")}, folder / "middle")


def _lay_out_middle(studies: dict[str, tuple[Path, str]], folder: Path) -> None:
    """Puts studies and their grades in a data folder that labels the middle slice of each; nothing without both."""
    if len({grade for _, grade in studies.values()}) < 2:
        return
    rows = []
    for study, (path, grade) in studies.items():
        _put(path, folder / "im" / path.name)
        rows.append((study, len(_stored_slices(path)) // 2, int(grade != "CT-0")))
    write_table(folder / "slice_labels.csv", VOLUME_COLUMNS, rows)


def _stored_slices(image: Path) -> list[int]:
    """For each slice of the upright array, its number in the file, which published splits count by."""
    grid = read_header(image).grid
    to_upright = grid.to_upright()  # (3, 2): for each stored axis, the upright one and its direction
    axis = to_upright[:, 0].tolist().index(0)
    slices = range(grid.shape[axis])
    return list(slices if to_upright[axis, 1] > 0 else reversed(slices))


def _put(source: Path, target: Path, *, like: Path | None = None, note: Note = lambda line: None) -> None:
    """Puts a scan in its place, linked where the file system can; outlines are made to carry the header of ``like``.

    The publishers' outlines belong to the images voxel by voxel, yet some tools wrote another origin or sense of
    the axes into their headers, which :func:`covidseg.data.scan.read_mask` rightly refuses. Shapes must agree.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if like is None:
        read_header(source)  # which refuses what is no scan
    else:
        grid = read_header(like).grid
        header = read_header(source, grid.affine)
        if header.grid.shape != grid.shape:
            raise DatasetError(f"the outline has shape {header.grid.shape}, its image {like.name} {grid.shape}",
                               path=source.name, remedy="Download the archives again")
        if not _lies_on(source, grid) or source.suffix != target.suffix:
            voxels = read_voxels(header)
            if voxels.min() < 0 or voxels.max() > 255:
                raise InputFileError("is no mask: it holds values outside 0..255", path=source.name)
            write_like(apply_orientation(voxels.astype(np.uint8), grid.to_upright()), grid, target)
            note(f"{target.parent.name}/{target.name}: header differed from its image's and was replaced")
            return
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)  # costs no disk space; not every file system can
    except OSError:
        write_whole(target, lambda temporary: shutil.copyfile(source, temporary))


def _lies_on(path: Path, grid: Grid) -> bool:
    """Whether an outline says of itself that it lies on an image; some say nothing."""
    try:
        return grid.is_like(read_header(path).grid.affine)
    except InputFileError:
        return False
