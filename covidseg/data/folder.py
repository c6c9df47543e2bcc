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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from covidseg.atomic import whole_file
from covidseg.data.scan import SUFFIXES, scan_id
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
    """
    root = Path(root)
    if not root.is_dir():
        raise DatasetError("no such data folder", path=root, remedy="Run `covidseg data list` to see what there is")
    images = sorted(p for p in (root / "im").glob("*") if p.name.endswith(SUFFIXES) and not p.name.startswith("."))
    ids = [scan_id(p) for p in images]
    if twice := sorted({i for i in ids if ids.count(i) > 1}):
        raise DatasetError(f"holds {twice[0]} both as .nii and as .nii.gz", path=root / "im", remedy="Keep one of them")
    if images:
        return Dataset(root, _volume_cases(root, images, labels))
    if stacks := sorted(root.glob("*_im.nii.gz")):
        return Dataset(root, tuple(_stack_case(image, labels) for image in stacks))
    raise DatasetError("holds no scans", path=root,
                       remedy="Expected im/*.nii.gz and slice_labels.csv, or NAME_im.nii.gz and NAME_slices.csv")


def _volume_cases(root: Path, images: list[Path], labelled: bool) -> tuple[Case, ...]:
    table = root / "slice_labels.csv"
    labels, patients = _read_labels(table) if labelled else ({}, {})
    if unknown := sorted(set(labels) - {scan_id(p) for p in images}):
        raise DatasetError(f"names volumes that im/ does not hold: {', '.join(unknown)}", path=table,
                           remedy="Add the scans or remove their lines")
    return tuple(
        Case(i := scan_id(image), image, labels.get(i, {}), patients.get(i, i),
             *(path if (path := root / kind / image.name).exists() else None for kind in ("lung", "mask")))
        for image in images)


def _stack_case(image: Path, labelled: bool) -> Case:
    name = image.name.removesuffix("_im.nii.gz")
    labels, _ = _read_labels(image.with_name(f"{name}_slices.csv"), name) if labelled else ({}, {})
    mask = image.with_name(f"{name}_mask.nii.gz")
    return Case(name, image, labels.get(name, {}), name, mask=mask if mask.exists() else None)


def _read_labels(table: Path, stack: str | None = None) -> tuple[dict[str, dict[int, int]], dict[str, str]]:
    """Labels of the slices of each volume of a table, and its patient; a table of one stack names no volume."""
    columns = VOLUME_COLUMNS if stack is None else STACK_COLUMNS
    if not table.exists():
        raise DatasetError("no such label table", path=table,
                           remedy=f"Write a CSV with the columns {', '.join(columns)}")
    found, rows = read_table(table)
    if missing := [column for column in columns if column not in found]:
        raise DatasetError(f"lacks the column {', '.join(missing)}", path=table,
                           remedy=f"The first line must name {', '.join(columns)}")
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
    """Names of the columns of a CSV table, and its lines with their numbers; cells that a line lacks are None."""
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            return set(reader.fieldnames or []), list(enumerate(reader, start=2))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"is not a CSV table ({error})", path=table, remedy="Save it as UTF-8 CSV") from error


def write_table(table: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Writes a CSV table that appears only when complete."""
    with whole_file(table) as temporary, temporary.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator="\n").writerows([columns, *rows])


def slice_number(text: str | None) -> int | None:
    """The slice number in a cell of a table; None if it holds none."""
    try:
        number = int(text or "")
    except ValueError:  # also of more digits than Python converts
        return None
    return number if number >= 0 else None
