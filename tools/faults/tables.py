"""Label tables and splits that are incomplete, contradict themselves, or let a patient stand on both sides."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from covidseg.data.splits import read_split
from covidseg.errors import DatasetError
from faults.supplies import Supplies
from faults.trial import Fault, Make

TRAIN = "covidseg train --data data --out run"
TABLE = "slice_labels.csv"
Lines = list[list[str]]  # cells: volume, slice, has_lesion, patient


def raw(change: Callable[[bytes], bytes]) -> Make:
    """A data folder whose label table has other bytes."""
    def make(supplies: Supplies) -> None:
        path = supplies.data() / TABLE
        path.write_bytes(change(path.read_bytes()))
    return make


def lines(change: Callable[[Lines], Lines]) -> Make:
    """A data folder whose label table has other lines below its head."""
    def changed(content: bytes) -> bytes:
        head, *rest = content.decode().splitlines()
        return "\n".join([head, *map(",".join, change([line.split(",") for line in rest])), ""]).encode()
    return raw(changed)


def no_table(supplies: Supplies) -> None:
    (supplies.data() / TABLE).unlink()


def folder_for_table(supplies: Supplies) -> None:
    no_table(supplies)
    Path("data", TABLE).mkdir()


def both_suffixes(supplies: Supplies) -> None:
    shutil.copy(supplies.volume(), supplies.data() / "im" / "phantom_01.nii")


def two_sides(supplies: Supplies) -> None:
    Path("mine.csv").write_text("volume,patient,split\na,p1,train\nb,p2,train\nc,p1,test\n")


def two_sides_by_the_folder(supplies: Supplies) -> None:
    """The split knows nothing of it, but the folder's own table gives a volume of each side to one patient."""
    data, split = Path("cache", "medseg2"), read_split("medseg2")
    ends = [str(split.part(side)[0]) for side in ("train", "test")]
    (data / "im").mkdir(parents=True)
    table = "volume,slice,has_lesion,patient\n"
    for volume in map(str, range(1, 10)):
        (data / "im" / f"{volume}.nii.gz").touch()  # never opened
        table += f"{volume},0,0,{'p1' if volume in ends else volume}\n"
    (data / TABLE).write_text(table)


def _fault(title: str, make: Make, *names: str) -> Fault:
    return Fault(title, TRAIN, DatasetError, names or (TABLE,), make)


FAULTS = [
    _fault("volumes that the folder does not hold", lines(lambda found: [*found, ["phantom_77", *found[0][1:]]]),
           TABLE, "phantom_77"),
    _fault("a slice with two lines", lines(lambda found: [*found, found[5]]), TABLE, "line 34"),
    Fault("a volume without any line", "covidseg data check data", DatasetError, ("phantom_02",),
          lines(lambda found: [line for line in found if line[0] != "phantom_02"])),
    _fault("a slice that its volume does not have",
           lines(lambda found: [*found, [found[-1][0], "8", *found[-1][2:]]]), "phantom_03", "slice 8"),
    _fault("one class only: no slice has a lesion",
           lines(lambda found: [[*line[:2], "0", line[3]] for line in found]), "data", "has_lesion"),
    _fault("a label that is neither 0 nor 1", lines(lambda found: [[*line[:2], "maybe", line[3]] for line in found]),
           TABLE, "line 2"),
    _fault("a volume of two patients", lines(lambda found: [[*line[:3], str(k)] for k, line in enumerate(found)]),
           TABLE, "phantom_00"),
    _fault("a column is missing", raw(lambda content: content.replace(b"has_lesion", b"lesion")), TABLE, "has_lesion"),
    _fault("not text", raw(lambda content: b"\xff\xfe" + content)),
    _fault("no label table", no_table),
    _fault("a folder in place of the label table", folder_for_table),
    _fault("a scan as .nii and as .nii.gz", both_suffixes, "phantom_01"),
    _fault("an empty data folder", lambda supplies: Path("data").mkdir(), "data"),
    Fault("one patient on both sides of a split", 'read_split("mine.csv")', DatasetError, ("mine.csv", "p1"),
          two_sides, call=lambda: read_split("mine.csv")),
    Fault("one patient on both sides, which only the folder knows",
          "COVIDSEG_DATA=cache covidseg train --data medseg2 --part train --out run", DatasetError,
          ("cache/medseg2", "p1"), two_sides_by_the_folder),
    Fault("a side of a set without a split", f"{TRAIN} --part train", DatasetError, ("data",), Supplies.data),
    Fault("patients to be left out in turn, and there is one only",
          "covidseg reproduce --data data --test left-out --out run", DatasetError, ("data", "p1"),
          lines(lambda found: [[*line[:3], "p1"] for line in found]), leaves=("run/seed0/stages/*",)),
]
GROUPS = {"labels and splits": FAULTS}
