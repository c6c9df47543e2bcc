"""Label tables and splits that are incomplete, contradict themselves, or let a patient stand on both sides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from covidseg.data.splits import read_split
from covidseg.errors import DatasetError
from faults.files import LOCK
from faults.supplies import Supplies, rows_of, write_rows
from faults.trial import Fault, Make

GROUP = "labels and splits"
TRAIN = "covidseg train --data data --out run"
Rows = list[dict[str, str]]


def table(change: Callable[[Rows], Rows]) -> Make:
    """A data folder with another label table."""
    def make(folder: Path, supplies: Supplies) -> None:
        path = supplies.data(folder / "data") / "slice_labels.csv"
        write_rows(path, change(rows_of(path)))
    return make


def raw_table(change: Callable[[bytes], bytes]) -> Make:
    """A data folder whose label table has other bytes."""
    def make(folder: Path, supplies: Supplies) -> None:
        path = supplies.data(folder / "data") / "slice_labels.csv"
        path.write_bytes(change(path.read_bytes()))
    return make


def no_table(folder: Path, supplies: Supplies) -> None:
    (supplies.data(folder / "data") / "slice_labels.csv").unlink()


def folder_for_table(folder: Path, supplies: Supplies) -> None:
    no_table(folder, supplies)
    (folder / "data" / "slice_labels.csv").mkdir()


def both_suffixes(folder: Path, supplies: Supplies) -> None:
    shutil.copy(supplies.volume(), supplies.data(folder / "data") / "im" / "phantom_01.nii")


def bare(folder: Path, supplies: Supplies) -> None:
    (folder / "data").mkdir()


def two_sides(folder: Path, supplies: Supplies) -> None:
    (folder / "mine.csv").write_text("volume,patient,split\na,p1,train\nb,p2,train\nc,p1,test\n")


def two_sides_by_the_folder(folder: Path, supplies: Supplies) -> None:
    """The split knows nothing of it, but the folder's own table says that volumes 1 and 9 are of one patient."""
    data = folder / "cache" / "medseg2"
    (data / "im").mkdir(parents=True)
    rows = []
    for volume in map(str, range(1, 10)):
        (data / "im" / f"{volume}.nii.gz").touch()  # never opened
        rows.append({"volume": volume, "slice": "0", "has_lesion": "0",
                     "patient": "p1" if volume in read_ends() else volume})
    write_rows(data / "slice_labels.csv", rows)


def read_ends() -> tuple[str, str]:
    """A volume of the training side of the split that comes with covidseg, and one of its test side."""
    split = read_split("medseg2")
    return str(split.part("train")[0]), str(split.part("test")[0])


def relabelled(rows: Rows, **changes: str) -> Rows:
    return [{**row, **changes} for row in rows]


FAULTS = [
    Fault("volumes that the folder does not hold", TRAIN, DatasetError, ("slice_labels.csv", "phantom_77"),
          table(lambda rows: [*rows, {**rows[0], "volume": "phantom_77"}])),
    Fault("a slice with two lines", TRAIN, DatasetError, ("slice_labels.csv", "line 34"),
          table(lambda rows: [*rows, rows[5]])),
    Fault("a volume without any line", "covidseg data check data", DatasetError, ("phantom_02",),
          table(lambda rows: [row for row in rows if row["volume"] != "phantom_02"])),
    Fault("a slice that its volume does not have", TRAIN, DatasetError, ("phantom_03", "slice 8"),
          table(lambda rows: [*rows, {**rows[-1], "slice": "8"}]), leaves=LOCK),
    Fault("one class only: no slice has a lesion", TRAIN, DatasetError, ("data", "has_lesion"),
          table(lambda rows: relabelled(rows, has_lesion="0")), leaves=LOCK),
    Fault("a label that is neither 0 nor 1", TRAIN, DatasetError, ("slice_labels.csv", "line 2"),
          table(lambda rows: relabelled(rows, has_lesion="maybe"))),
    Fault("a volume of two patients", TRAIN, DatasetError, ("slice_labels.csv", "phantom_00"),
          table(lambda rows: [{**row, "patient": str(k)} for k, row in enumerate(rows)])),
    Fault("a column is missing", TRAIN, DatasetError, ("slice_labels.csv", "has_lesion"),
          raw_table(lambda raw: raw.replace(b"has_lesion", b"lesion"))),
    Fault("not text", TRAIN, DatasetError, ("slice_labels.csv",), raw_table(lambda raw: b"\xff\xfe" + raw)),
    Fault("no label table", TRAIN, DatasetError, ("slice_labels.csv",), no_table),
    Fault("a folder in place of the label table", TRAIN, DatasetError, ("slice_labels.csv",), folder_for_table),
    Fault("a scan as .nii and as .nii.gz", TRAIN, DatasetError, ("phantom_01",), both_suffixes),
    Fault("an empty data folder", TRAIN, DatasetError, ("data",), bare),
    Fault("one patient on both sides of a split", 'read_split("mine.csv")', DatasetError, ("mine.csv", "p1"),
          two_sides, call=lambda: read_split("mine.csv")),
    Fault("one patient on both sides, which only the folder knows",
          "COVIDSEG_DATA=cache covidseg train --data medseg2 --part train --out run", DatasetError,
          ("cache/medseg2", "p1"), two_sides_by_the_folder),
    Fault("a side of a set without a split", f"{TRAIN} --part train", DatasetError, ("data",),
          lambda folder, supplies: supplies.data(folder / "data")),
]
