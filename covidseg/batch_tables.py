"""Tables of a batch: what was made of each scan, part by part in ``parts/``, and of all together, ``predictions.csv``.

They lie beside the masks and say which of them covidseg made, and from which scan, by the hashes of both. Nothing in
them tells on which machine or in which folder that was.
"""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from covidseg.data.nifti import entries, kind_of, opening, scans_in
from covidseg.data.scan import scan_id, shown
from covidseg.errors import SettingsError
from covidseg.store import write_text

Row = dict[str, str]  # one scan
FOUND = ("slices", "lung_slices", "lesion_slices", "lesion_ml", "warnings")
COLUMNS = ("name", "status", "error", *FOUND, "threshold", "nets", "scan_sha256", "mask_sha256")
# A part's table says more: what went wrong, and all that has to be the same for a result to be kept.
PART_COLUMNS = (*COLUMNS, "fault", "probability_sha256", "preview_sha256", "covidseg", "volume", "series", "checked")
HASHES = tuple(key for key in PART_COLUMNS if key.endswith("_sha256"))
MADE = ("covidseg", "nets", "threshold", "volume", "series")
TABLE = "predictions.csv"  # of all scans together
KNOWING = {"name", "status", "mask_sha256"}  # columns of every table that accounts for masks
EMPTY: Row = dict.fromkeys(PART_COLUMNS, "")


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise SettingsError(f"there is no part {self.number} of {self.count}",
                                remedy="Parts count from 1: --part 1/4, 2/4, 3/4 and 4/4")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def of(self, files: list[Path]) -> list[Path]:
        """The files of this part, in order of their names."""
        return sorted(files, key=lambda path: (name_of(path), path))[self.number - 1::self.count]

    def table(self, out: Path) -> Path:
        """Where the table of this part lies."""
        return out / "parts" / f"part-{self.number}-of-{self.count}.csv"


def parse_part(text: str) -> Part:
    """``i/n`` as a part.

    Raises:
        SettingsError: it is no such thing.
    """
    found = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text.strip())
    if found is None:
        raise SettingsError(f"{text!r} is no part", remedy="Write --part 2/4 for the second of four")
    return Part(int(found[1]), int(found[2]))


# --- reading --------------------------------------------------------------------------------------------------------

def tables(out: Path) -> dict[Part, list[Row]]:
    """The tables of all parts in an output folder; a damaged one counts as missing.

    Raises:
        InputFileError: the folder of the tables, or one of them, cannot be opened.
    """
    found = {}
    for path in _part_tables(out):
        with suppress(SettingsError):
            part = parse_part(path.stem.removeprefix("part-").replace("-of-", "/"))
            if (rows := rows_of(path)) is not None:
                found[part] = rows
    return found


def rows_of(table: Path) -> list[Row] | None:
    """The rows of the table of one part; None if it is missing or damaged.

    Raises:
        InputFileError: it cannot be opened.
    """
    columns, rows = _read(table)
    return rows if columns == PART_COLUMNS and all(map(_is_row, rows)) else None


def table_of_all(out: Path) -> dict[str, Row] | None:
    """The rows of ``predictions.csv`` by their names; None if it is damaged, or one of something else.

    Raises:
        InputFileError: it cannot be opened.
    """
    if not kind_of(out / TABLE):
        return {}
    columns, rows = _read(out / TABLE)
    full = [EMPTY | row for row in rows]
    ours = KNOWING <= set(columns) <= set(COLUMNS) and all(map(_is_row, full))  # older versions wrote less
    return {row["name"]: row for row in full} if ours else None


def told_of_scans(out: Path) -> dict[str, list[Row]]:
    """All that the tables in a folder say of each scan, also those of other versions of covidseg.

    Raises:
        InputFileError: one of them cannot be opened.
    """
    told: dict[str, list[Row]] = defaultdict(list)
    for path in (out / TABLE, *_part_tables(out)):
        columns, rows = _read(path)
        for row in rows if set(columns) >= KNOWING else ():
            if None not in row.values():  # of a line that is too short
                told[row["name"]].append(EMPTY | row)
    return dict(told)


def makers(rows: Iterable[Row], mask_sha256: str) -> list[Row]:
    """Rows that tell what a mask was made from: those with its hash, and those of scans that were being done.

    A program that is ended while it predicts leaves a row with the hash of the scan alone: the mask may be new or not.
    """
    return [row for row in rows if row["mask_sha256"] == mask_sha256 or (row["scan_sha256"] and not row["mask_sha256"])]


def name_of(scan: Path) -> str:
    """What a scan is called in tables."""
    return shown(scan_id(scan))


def mask_of(out: Path, name: str) -> Path:
    """The mask of a scan by its name in tables, in which bytes that are no UTF-8 are escaped."""
    path = out / f"{name}.nii.gz"
    return path if os.path.exists(path) else next((other for other in scans_in(out) if name_of(other) == name), path)


def _part_tables(out: Path) -> list[Path]:
    return [path for path in entries(out / "parts") if fnmatch(path.name, "part-*-of-*.csv")]


def _read(path: Path) -> tuple[tuple[str, ...], list[Row]]:
    """Columns and rows of a table; none if it is missing or damaged."""
    try:
        with opening(path):
            text = path.read_bytes().decode("utf-8") if kind_of(path) == "file" else ""
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return tuple(table.fieldnames or ()), list(table)
    except (UnicodeError, csv.Error):
        return (), []


def _is_row(row: dict) -> bool:
    """Whether this says of one scan how far it is; a line that is too short has None in it, a long one a None key."""
    return row.keys() == set(PART_COLUMNS) and None not in row.values() and bool(row["name"]) \
        and (row["status"] in ("open", "failed") or (row["status"] == "done" and bool(row["mask_sha256"])))


# --- writing --------------------------------------------------------------------------------------------------------

def added(out: Path, earlier: Iterable[Row], rows: Iterable[Row]) -> list[Row]:
    """Rows in order of their names, and those of earlier runs for other scans, but for lost masks."""
    by_name = {row["name"]: row for row in rows}
    others = {row["name"]: row for row in earlier if row["name"] not in by_name
              and (row["status"] != "done" or os.path.exists(mask_of(out, row["name"])))}
    return sorted((by_name | others).values(), key=lambda row: row["name"])


def write_part(out: Path, part: Part, rows: list[Row]) -> None:
    """Writes the table of a part.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(part.table(out), _csv(PART_COLUMNS, rows))


def write_table(out: Path, rows: list[Row]) -> None:
    """Writes ``predictions.csv``. Nothing in it tells when, where and in how many parts it was made.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(out / TABLE, _csv(COLUMNS, rows))


def _csv(columns: tuple[str, ...], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()
