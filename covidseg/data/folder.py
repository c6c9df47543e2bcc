"""Data folders: which scans there are, which slices carry a lesion, and which patients belong together.

One layout serves the phantom, the downloads and your own scans::

    FOLDER/
      im/ID.nii.gz          the CT volumes (or stacks of unrelated slices)
      slice_labels.csv      volume,slice,has_lesion[,patient]   the weak labels
      lung/ID.nii.gz        true lungs, optional, for measuring only
      mask/ID.nii.gz        true lesions, optional, for measuring only

``slice`` counts along axis 0 of the upright array, from the feet. ``patient`` is optional and defaults to the
volume; volumes of one patient never end up on two sides of a split. Weak training opens ``im/`` and
``slice_labels.csv`` and nothing else.
"""

from __future__ import annotations

import csv
import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from covidseg.atomic import whole_file
from covidseg.data.nifti import kind_of, opening, scans_in
from covidseg.data.scan import scan_id
from covidseg.errors import DatasetError

# What the first line of a label table must name.
VOLUME_COLUMNS = ("volume", "slice", "has_lesion")
STACK_COLUMNS = ("position", "has_lesion")


@dataclass(frozen=True)
class Case:
    """One volume or stack of a data folder."""

    id: str       # as in slice_labels.csv
    image: Path   # the CT file
    labels: dict[int, int]  # for each labelled slice, 1 if it has a lesion, otherwise 0
    patient: str  # whose scan it is
    lung: Path | None = None  # the true lung mask, if there is one
    mask: Path | None = None  # the true lesion mask, if there is one


@dataclass(frozen=True)
class Dataset:
    """A data folder: paths and labels only. With ``check`` training refuses what does not look like chest CT."""

    root: Path
    cases: tuple[Case, ...]
    check: bool = True

    def subset(self, ids: list[str]) -> Dataset:
        """The same folder reduced to some volumes, in the order given; an unknown one is a DatasetError."""
        by_id = {case.id: case for case in self.cases}
        if missing := [i for i in ids if i not in by_id]:
            raise DatasetError(f"has no volume {', '.join(missing)}", path=self.root,
                               remedy=f"It holds {', '.join(by_id)}")
        return replace(self, cases=tuple(by_id[i] for i in ids))

    def without_masks(self) -> Dataset:
        """The same folder, whose lesion masks nobody opens."""
        return replace(self, cases=tuple(replace(case, mask=None) for case in self.cases))

    def labelled(self, case: Case, count: int) -> list[int]:
        """Numbers of a volume's labelled slices, in order.

        Raises:
            DatasetError: one of them is beyond the ``count`` slices that the volume has.
        """
        numbers = sorted(case.labels)
        if numbers and numbers[-1] >= count:
            raise DatasetError(f"volume {case.id} has {count} slices, slice {numbers[-1]} is labelled", path=self.root,
                               remedy="Slices count from 0; correct the label table")
        return numbers

    def labels(self) -> int:
        """Number of labelled slices in all volumes."""
        return sum(len(case.labels) for case in self.cases)


def load_dataset(root: str | Path, *, labels: bool = True) -> Dataset:
    """Reads the layout of a data folder and checks it against its label table.

    Besides the layout above, a folder of stacks as MedSeg publishes them is understood:
    ``NAME_im.nii.gz`` with ``NAME_mask.nii.gz`` and ``NAME_slices.csv`` (``position``, ``has_lesion``).

    Args:
        root: the folder.
        labels: whether to read the label tables; if not, one that is missing or faulty does no harm.

    Raises:
        DatasetError: the folder, its images or its label table are missing or contradict each other.
        InputFileError: the folder, or one in it, cannot be read.
    """
    root = Path(root)
    if kind_of(root) != "folder":
        raise DatasetError("no such data folder", path=root, remedy="Run `covidseg data list` to see what there is")
    if images := _by_id(root / "im"):
        return Dataset(root, _volume_cases(root, images, labels))
    files = _by_id(root)
    if stacks := [image for name, image in files.items() if name.endswith("_im")]:
        return Dataset(root, tuple(_stack_case(image, files, labels) for image in stacks))
    raise DatasetError("holds no scans", path=root,
                       remedy="Expected im/*.nii.gz and slice_labels.csv, or NAME_im.nii.gz and NAME_slices.csv")


def named(path: str | Path) -> str:
    """A path that ends in a name, which results can say: that of the folder itself for one that ends in dots."""
    return str(path) if Path(path).name not in ("", "..") else os.path.realpath(path)


def composed(text: str) -> str:
    """Text with each accented letter as one character; macOS takes them apart in names of files, tables rarely do."""
    return unicodedata.normalize("NFC", text)


def _by_id(folder: Path) -> dict[str, Path]:
    """The scans of a folder, by name as :func:`composed` writes it; none may be there twice."""
    found: dict[str, Path] = {}
    for path in scans_in(folder):
        name = composed(scan_id(path))
        if (other := found.setdefault(name, path)) is not path:
            raise DatasetError(f"holds {name} both as {other.name} and as {path.name}", path=folder,
                               remedy="Keep one of them")
    return found


def _volume_cases(root: Path, images: dict[str, Path], labelled: bool) -> tuple[Case, ...]:
    table = root / "slice_labels.csv"
    labels, patients = _read_labels(table) if labelled else ({}, {})
    if unknown := sorted(set(labels) - set(images)):
        raise DatasetError(f"names volumes that im/ does not hold: {', '.join(unknown)}", path=table,
                           remedy=f"Add the scans or correct their lines; im/ holds {', '.join(sorted(images)[:3])}"
                                  f"{f' and {len(images) - 3} more' if len(images) > 3 else ''}")
    lungs, masks = _by_id(root / "lung"), _by_id(root / "mask")
    return tuple(Case(name, image, labels.get(name, {}), patients.get(name, name), lungs.get(name), masks.get(name))
                 for name, image in images.items())


def _stack_case(image: Path, files: dict[str, Path], labelled: bool) -> Case:
    name = scan_id(image).removesuffix("_im")  # as the file has it, since its table lies beside it
    labels, _ = _read_labels(image.with_name(f"{name}_slices.csv"), name) if labelled else ({}, {})
    return Case(name, image, labels.get(name, {}), name, mask=files.get(composed(f"{name}_mask")))


def _read_labels(table: Path, stack: str | None = None) -> tuple[dict[str, dict[int, int]], dict[str, str]]:
    """Labels of the slices of each volume of a table, and its patient; a table of one stack names no volume."""
    columns = VOLUME_COLUMNS if stack is None else STACK_COLUMNS
    if not kind_of(table):
        raise DatasetError("no such label table", path=table,
                           remedy=f"Write a CSV with the columns {', '.join(columns)}")
    found, rows = read_table(table)
    if missing := [column for column in columns if column not in found]:
        raise DatasetError(f"lacks the column {', '.join(missing)}", path=table,
                           remedy=f"The first line must name {', '.join(columns)}, with commas; "
                                  f"it names {', '.join(sorted(found)) or 'nothing'}")
    labels: dict[str, dict[int, int]] = {}
    patients: dict[str, str] = {}
    for number, row in rows:
        volume, fault, remedy = row["volume"] if stack is None else stack, "", "Correct the line"
        index, label = slice_number(row[columns[-2]]), slice_number(row["has_lesion"])
        patient = (row.get("patient") if stack is None else None) or volume
        if not volume:  # also of a line that ends before this column
            fault = " names no volume"
        elif index is None or label not in (0, 1):
            fault = f": {columns[-2]} must be a slice number and has_lesion 0 or 1"
        elif index in labels.setdefault(volume, {}):
            fault = f" labels slice {index}{f' of volume {volume}' if stack is None else ''} a second time"
            remedy = "Keep one line for each slice"
        elif patients.setdefault(volume, patient) != patient:
            fault = f" gives volume {volume} to another patient than the lines before"
            remedy = "One volume belongs to one patient; correct the table"
        else:
            labels[volume][index] = label
        if fault:
            raise DatasetError(f"line {number}{fault}", path=table, remedy=remedy)
    return labels, patients


# --- CSV tables -----------------------------------------------------------------------------------------------------

def read_table(table: Path) -> tuple[set[str], list[tuple[int, dict[str, str]]]]:
    """Names of the columns of a CSV table, and its rows with the lines they end in; cells that a row lacks are None.

    Columns are separated as in the first line: by commas or, as spreadsheets write in some languages, by semicolons or
    tabs. White space around a cell is left out, and so are rows without any text, which spreadsheets append.

    Raises:
        DatasetError: the table cannot be opened, is none, or names a column twice.
    """
    if kind_of(table) == "folder":
        raise DatasetError("is not a CSV table but a folder", path=table, remedy="Put the table in its place")
    rows: list[tuple[int, dict[str, Any]]] = []
    try:
        with opening(table, DatasetError), table.open(newline="", encoding="utf-8-sig") as stream:
            first = stream.readline()
            stream.seek(0)
            separator = next((mark for mark in ",;\t" if mark in first), ",")
            # Not csv.DictReader, whose line numbers leave out blank lines. A quotation mark that is never closed would
            # make one cell of all that follows, but for "strict".
            reader = csv.reader(stream, delimiter=separator, skipinitialspace=True, strict=True)
            columns = [name.strip() for name in next(reader, [])]
            if twice := sorted({name for name in columns if name and columns.count(name) > 1}):
                raise DatasetError(f"names the column {', '.join(twice)} twice", path=table, remedy="Keep one of them")
            for row in reader:
                cells = [composed(cell.strip()) for cell in row]
                if any(cells):
                    rows.append((reader.line_num, dict.fromkeys(columns) | dict(zip(columns, cells, strict=False))))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"is not a CSV table ({error})", path=table, remedy="Save it as UTF-8 CSV") from error
    return set(columns), rows


def write_table(table: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV table that appears only when complete."""
    with whole_file(table) as temporary, temporary.open("w", newline="", encoding="utf-8",
                                                        errors="backslashreplace") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def slice_number(text: str | None) -> int | None:
    """The slice number in a cell of a table; None if it holds none."""
    try:
        number = int(text or "")
    except ValueError:  # also of more digits than Python converts
        return None
    return number if number >= 0 else None
