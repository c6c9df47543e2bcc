"""Who is trained on and who is tested on: splits by patient, kept as CSV files.

A split file has one line for each volume, ``volume,patient,split``, or, for a stack of unrelated slices,
``slice,split``. Slices of one patient look alike; a model that has seen one knows the others, and its test result
would be too good. So a patient stands on one side only, and that is checked whenever a split is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from covidseg.data.folder import Dataset, read_table, slice_number
from covidseg.data.registry import data_root
from covidseg.errors import DatasetError

PARTS = ("train", "val", "test", "left_out")


@dataclass(frozen=True)
class Split:
    """A split that was read and found consistent: by volumes or, for a stack, by slices; the other table is empty."""

    name: str                 # file name without .csv
    volumes: dict[str, str]   # volume -> part
    patients: dict[str, str]  # volume -> patient
    slices: dict[int, str]    # slice number in the published file -> part

    def part(self, name: str) -> list[str] | list[int]:
        """Volumes, or slice numbers, of a part, in the order of the file; not for an unknown or empty part."""
        if name not in PARTS:
            raise DatasetError(f"there is no part '{name}' of a split", remedy=f"Parts are {', '.join(PARTS)}")
        found: list[str] | list[int] = [v for v, part in self.volumes.items() if part == name] or \
                                       [s for s, part in self.slices.items() if part == name]
        if not found:
            raise DatasetError(f"split '{self.name}' has nothing in its part '{name}'",
                               remedy="Choose another part or write a split of your own")
        return found


def split_names() -> list[str]:
    """Names of the splits that come with covidseg."""
    return sorted(p.stem for p in (data_root() / "splits").glob("*.csv"))


def read_split(name_or_path: str | Path) -> Split:
    """Reads a split and checks it.

    Args:
        name_or_path: the name of one that comes with covidseg, such as ``medseg2``, or a CSV file of your own. The
            folder of a data set is neither, whatever lies beside it.

    Raises:
        DatasetError: no such split, missing columns, an unknown part, a line twice, or a patient on two sides.
    """
    path, names = Path(name_or_path), split_names()
    if str(name_or_path) in names:
        path = data_root() / "splits" / f"{name_or_path}.csv"
    elif path.suffix.lower() != ".csv" or not os.path.isfile(path):
        raise DatasetError(f"there is no split '{name_or_path}'",
                           remedy=f"Those of {', '.join(names)} are known; of other data, train on all volumes, and "
                                  "name what to measure on after --test")
    columns, rows = read_table(path)
    by_volume = {"volume", "patient", "split"} <= columns
    if not by_volume and not {"slice", "split"} <= columns:
        raise DatasetError("lacks columns", path=path,
                           remedy="The first line must name volume, patient and split, or slice and split")
    volumes: dict[str, str] = {}
    patients: dict[str, str] = {}
    slices: dict[int, str] = {}
    for number, row in rows:
        if row["split"] not in PARTS:
            raise DatasetError(f"line {number} names the part '{row['split']}'", path=path,
                               remedy=f"Parts are {', '.join(PARTS)}")
        if by_volume:
            key, known = row["volume"], row["volume"] in volumes
            volumes[row["volume"]] = row["split"]
            patients[row["volume"]] = row["patient"] or row["volume"]
        elif (index := slice_number(row["slice"])) is None:
            raise DatasetError(f"line {number}: '{row['slice']}' is not a slice number", path=path,
                               remedy="Slices count from 0")
        else:
            key, known = str(index), index in slices
            slices[index] = row["split"]
        if known or not key:  # also of a line that ends before its column
            raise DatasetError(f"line {number} names '{key or ''}' {'a second time' if known else 'as a volume'}",
                               path=path, remedy="Keep one line for each")
    if not rows:
        raise DatasetError("is empty", path=path, remedy="Write one line for each volume or slice")
    _refuse_two_sides(volumes, patients, path)
    return Split(path.stem, volumes, patients, slices)


def _refuse_two_sides(volumes: dict[str, str], patients: dict[str, str], path: Path) -> None:
    """A patient's volumes must share one part; what is left out does no harm."""
    side: dict[str, tuple[str, str]] = {}
    for volume, part in volumes.items():
        if part == "left_out":
            continue
        other, first = side.setdefault(patients[volume], (part, volume))
        if other != part:
            raise DatasetError(f"patient '{patients[volume]}' is on two sides: {first} in {other}, "
                               f"{volume} in {part}", path=path, remedy="Put all volumes of a patient on one side")


def apply_split(dataset: Dataset, split: Split, part: str) -> Dataset:
    """Reduces a data set to a part of its split: ``train``, ``val``, ``test`` or ``left_out``.

    Of a stack, the slices outside the part lose their label; what has no label takes part in nothing.

    Raises:
        DatasetError: the part is unknown or empty, the data set and the split do not name the same volumes, the
            data set's own patients would stand on two sides, or slices are missing.
    """
    wanted = split.part(part)
    if split.slices:
        return _apply_slices(dataset, split, {int(s) for s in wanted})
    found = {case.id for case in dataset.cases}
    if odd := sorted(found ^ set(split.volumes)):
        raise DatasetError(f"split '{split.name}' and the folder differ in {', '.join(odd)}", path=dataset.root,
                           remedy="Complete the folder, or write a split that names exactly its volumes")
    # The folder may know more about patients than the split file does.
    _refuse_two_sides(split.volumes, {case.id: case.patient for case in dataset.cases}, dataset.root)
    return dataset.subset([str(v) for v in wanted])


def _apply_slices(dataset: Dataset, split: Split, wanted: set[int]) -> Dataset:
    if len(dataset.cases) != 1:
        raise DatasetError(f"split '{split.name}' is for one stack, the folder holds {len(dataset.cases)} scans",
                           path=dataset.root, remedy="Give the folder of the stack")
    case = dataset.cases[0]
    published = {position: position for position in case.labels}  # slice number in the published file
    table = case.image.with_name(f"{case.id}_slices.csv")
    for _, row in read_table(table)[1] if table.is_file() else []:
        upright, stored = slice_number(row.get("position")), slice_number(row.get("medseg100_slice"))
        if upright is not None and stored is not None:
            published[upright] = stored
    if missing := sorted(set(published.values()) - set(split.slices)):
        raise DatasetError(f"split '{split.name}' does not place slices {', '.join(map(str, missing))}",
                           path=dataset.root, remedy="Write a split that places every slice")
    kept = {position: label for position, label in case.labels.items() if published[position] in wanted}
    if not kept:
        raise DatasetError("none of its slices is in the part asked for", path=dataset.root,
                           remedy="Choose another part")
    return replace(dataset, cases=(replace(case, labels=kept),))
