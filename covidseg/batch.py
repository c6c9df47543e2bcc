"""Predictions of many scans, done in parts that can run at the same time or again, and put together in the end.

Part ``i`` of ``n`` takes every ``n``-th scan of the sorted list. Its table, ``parts/part-i-of-n.csv`` beside the masks,
has a row for each of its scans and is up to date after each of them. A scan is left as it is if a table says what was
made of it, with the same nets and settings, and the files are unchanged; so a part that was stopped is simply started
once more. :func:`merge` puts the tables together.

What is out of date is replaced, but only where a table says that it was made here, and from this very scan: true masks,
predicted ones that somebody corrected (:func:`strangers`), and those of another patient's scan of the same name stay.

A run that is not divided, and :func:`merge`, add to the table of earlier ones in the same folder; parts belong to one
list of scans.
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

from covidseg import __version__
from covidseg.atomic import alone
from covidseg.data.nifti import entries, kind_of, opening, scans_in
from covidseg.data.scan import scan_id, shown
from covidseg.errors import CovidsegError, DatasetError, OutputError, SettingsError
from covidseg.predict import Predictor
from covidseg.store import code_hash, file_hash, write_text

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
ELSEWHERE = "Name another folder after -o, move what is there, or replace it with --overwrite"
# Endings of the files of probabilities and of the page to look at, beside the mask.
PROBABILITY, PREVIEW = "_probability.nii.gz", "_preview.html"


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
        return sorted(files, key=lambda path: (_name(path), path))[self.number - 1::self.count]

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


class PartRun:
    """The work of one part.

    Args:
        predictor: the nets.
        part: which one.
        targets: the mask of each scan, those of the other parts as well.
        out: folder of the masks and tables; None keeps no table.
        threshold: lesion from this probability on.
        volume: whether the slices of each scan are one body in order; by default that is measured.
        probability: whether probabilities are written as well, beside the masks.
        check: whether scans have to look like chest CT.
        series: of folders of DICOM slices, see :func:`covidseg.data.scan.read_scan`.
        preview: whether a page to look at is written as well, ``NAME_preview.html``.
        overwrite: whether files that no table accounts for are replaced.

    Attributes:
        files: The scans of this part, in order.
        rows: What is known of each of them, by name.

    Raises:
        SettingsError: parts in the folder hold other scans than those of ``targets``.
        OutputError: a result would replace one of the :func:`strangers`, or the table cannot be written.
    """

    def __init__(self, predictor: Predictor, part: Part, targets: dict[Path, Path], out: Path | None,
                 threshold: float, volume: bool | None = None, probability: bool = False, check: bool = True,
                 series: str | None = None, preview: bool = False, overwrite: bool = False) -> None:
        self.predictor, self.part, self.targets, self.out = predictor, part, targets, out
        self.threshold, self.volume, self.check, self.series = threshold, volume, check, series
        self.overwrite = overwrite
        self.probability, self.preview = probability, preview
        self.files = part.of(list(targets))
        self.made = {"covidseg": f"{__version__}+{code_hash()[:8]}", "nets": predictor.fingerprint(),
                     "threshold": str(threshold), "volume": str(volume), "series": series or ""}
        found = tables(out) if out is not None else {}
        names = set(map(_name, targets))
        others = sorted({row["name"] for other, rows in found.items() if other.count == part.count > 1 for row in rows}
                        - names)
        if others:
            raise SettingsError(f"holds parts of another list of scans, with {', '.join(others[:3])}"
                                f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}", path=out,
                                remedy="Give the same scans to all parts, or another folder after -o")
        if not overwrite:
            beside = [ending for ending, wanted in ((PROBABILITY, probability), (PREVIEW, preview)) if wanted]
            refuse_to_replace([*strangers([targets[scan] for scan in self.files], beside),
                               *([out / TABLE] if out is not None and _foreign(out / TABLE) else [])])
        known = [row for rows in found.values() for row in rows if row["mask_sha256"]]
        # What passed the check also counts where nobody asks for it, but not the other way round.
        before = {row["name"]: row for row in known if row["scan_sha256"] and row["status"] != "failed"
                  and (row["checked"] == "True" or not check) and all(row[key] == self.made[key] for key in MADE)}
        listed = _table(out) if out is not None else {}
        self.before, self.earlier = set(before), defaultdict[str, list[Row]](list)
        for row in [*known, *listed.values()]:
            self.earlier[row["name"]].append(row)
        self.ended = {row["name"] for rows in found.values() for row in rows if _was_being_done(row)}
        # What a table says of a mask that is there stays, but counts only after a look at the files.
        last = listed | {row["name"]: row for row in known} | before
        self.rows = {name: {**EMPTY, **self.made, "name": name, **last.get(name, {}), "status": "open"}
                     for name in map(_name, self.files)}
        self.write()

    def predict(self, scan: Path, *, progress: bool = False) -> tuple[Row, bool]:
        """Predicts a scan, unless that is done, and brings the table up to date.

        Returns:
            Its row in the table, and whether it was done before.

        Raises:
            OutputError: the mask that is there was made from another scan of that name; its row stays.
            CovidsegError: the scan cannot be read, shows no lung, or its mask cannot be written; the row says so, as of
                any other error.
        """
        name, target = _name(scan), self.targets[scan]
        row = self.rows[name]
        files = {"scan_sha256": scan, "mask_sha256": target}
        if self.probability:
            files["probability_sha256"] = target.with_name(scan_id(target) + PROBABILITY)
        if self.preview:
            files["preview_sha256"] = target.with_name(scan_id(target) + PREVIEW)
        there = {key: row[key] for key in ("scan_sha256", "mask_sha256")}
        try:
            now = {key: file_hash(path) if os.path.exists(path) else "" for key, path in files.items()}
            self._refuse_another(name, now, target)
            done = {key: name in self.before and now[key] == row[key] != "" for key in files}
            before = all(done.values())
            if not before:
                same = done["scan_sha256"] and done["mask_sha256"]  # else all that was made from them is out of date
                row |= self.made | dict.fromkeys(files if same else HASHES, "")
                if there["mask_sha256"]:  # should the program end now, no table knows the hash of the new mask
                    self.write()
                found = self.predictor.predict_file(scan, target, self.threshold, files.get("probability_sha256"),
                                                    self.volume, series=self.series,
                                                    preview_target=files.get("preview_sha256"),
                                                    progress=progress, check=self.check)
                row |= {"slices": str(found.slices), "lung_slices": str(found.lung_slices),
                        "lesion_slices": str(found.lesion_slices), "lesion_ml": f"{found.lesion_ml:.3f}",
                        "warnings": "; ".join(found.warnings), "checked": str(self.check),
                        **{key: file_hash(path) for key, path in files.items()}}
            row |= {"status": "done", "error": "", "fault": ""}
        except Exception as error:  # no scan ends the batch, whatever is wrong with it
            row |= {**self.made, "status": "failed", "error": type(error).__name__, "fault": _fault(error),
                    **dict.fromkeys(FOUND, ""), **there}
            raise
        finally:
            self.write()
        return row, before

    def _refuse_another(self, name: str, now: Row, target: Path) -> None:
        """Refuses to replace the mask of another scan, which hashes of now and of earlier tables tell.

        Of a part, the scan then counts as failed, so that :func:`merge` knows. Otherwise the other scan keeps its row.
        """
        makers = {row["scan_sha256"]: row for row in self.earlier[name] if row["mask_sha256"] == now["mask_sha256"]}
        if self.overwrite or name in self.ended or not now["scan_sha256"]:
            return
        if makers and not {"", now["scan_sha256"]} & makers.keys():
            if self.part.count == 1:
                self.rows[name] = next(iter(makers.values()))
            raise OutputError("was made from another scan of that name, or from this one before it changed, and would "
                              "be replaced", path=target, remedy=ELSEWHERE)

    def write(self) -> None:
        """Writes the table of this part; one without scans has a table as well."""
        if self.out is not None:
            with alone(self.out / "parts"):  # another program may add scans of its own to the same table
                write_text(self.part.table(self.out), _csv(PART_COLUMNS, self.table()))

    def table(self) -> list[Row]:
        """The rows of this part; of a run that is not divided also those of earlier ones, but for lost masks."""
        if self.out is None or self.part.count > 1:
            return list(self.rows.values())
        own = {row["name"]: row for row in _rows_of(self.part.table(self.out)) or ()}
        return _added(self.out, _table(self.out) | own, self.rows)


def _added(out: Path, earlier: dict[str, Row], rows: dict[str, Row]) -> list[Row]:
    """Rows in order of their names, and those of earlier runs for other scans, but for lost masks."""
    others = [row for name, row in earlier.items()
              if name not in rows and (row["status"] != "done" or os.path.exists(_mask(out, name)))]
    return sorted([*rows.values(), *others], key=lambda row: row["name"])


def tables(out: Path) -> dict[Part, list[Row]]:
    """The tables of all parts in an output folder; a damaged one counts as missing.

    Raises:
        InputFileError: the folder of the tables, or one of them, cannot be opened.
    """
    found = {}
    for path in _part_tables(out):
        with suppress(SettingsError):
            part = parse_part(path.stem.removeprefix("part-").replace("-of-", "/"))
            if (rows := _rows_of(path)) is not None:
                found[part] = rows
    return found


def _part_tables(out: Path) -> list[Path]:
    return [path for path in entries(out / "parts") if fnmatch(path.name, "part-*-of-*.csv")]


def _read(path: Path) -> tuple[tuple[str, ...], list[Row]] | None:
    """Columns and rows of a table; None if it is missing or damaged."""
    if kind_of(path) != "file":
        return None
    try:
        with opening(path):
            table = csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8"), newline=""), strict=True)
        return tuple(table.fieldnames or ()), list(table)
    except (UnicodeError, csv.Error):
        return None


def _rows_of(path: Path) -> list[Row] | None:
    """The rows of a part's table; None if it is missing or damaged."""
    columns, rows = _read(path) or ((), [])
    return rows if columns == PART_COLUMNS and all(map(_is_row, rows)) else None


def _table(out: Path) -> dict[str, Row]:
    """The rows of the table of all scans by their names, if there is one that was written here."""
    columns, rows = _read(out / TABLE) or ((), [])
    return {row["name"]: row for row in (EMPTY | {key: row[key] for key in COLUMNS} for row in rows)
            if _is_row(row)} if columns == COLUMNS else {}


def _name(scan: Path) -> str:
    """What a scan is called in tables."""
    return shown(scan_id(scan))


def _mask(out: Path, name: str) -> Path:
    """The mask of a scan by its name in tables, in which bytes that are no UTF-8 are escaped."""
    path = out / f"{name}.nii.gz"
    return path if os.path.exists(path) else next((other for other in scans_in(out) if _name(other) == name), path)


def _fault(error: Exception) -> str:
    """What went wrong, without paths, which would name folders of the machine."""
    if isinstance(error, CovidsegError):
        return error.fault
    return getattr(error, "strerror", None) or "an error that covidseg does not expect; --debug shows its trace"


def _is_row(row: dict) -> bool:
    """Whether this says of one scan how far it is; a line that is too short has None in it, a long one a None key."""
    return row.keys() == set(PART_COLUMNS) and None not in row.values() and bool(row["name"]) \
        and (row["status"] in ("open", "failed") or (row["status"] == "done" and bool(row["mask_sha256"])))


# --- what may be replaced -------------------------------------------------------------------------------------------

def strangers(targets: Iterable[Path], beside: Iterable[str] = ()) -> list[Path]:
    """Files that would be replaced although no table in their folder says that they were made by covidseg.

    A table accounts for a mask by its hash, or by a row of a scan that was being done when the program ended. What lies
    beside a mask goes with any row of its scan.

    Args:
        targets: the masks.
        beside: endings of what is written beside them.
    """
    found, known = [], dict[Path, dict[str, set[str]]]()
    for target in targets:
        if target.parent not in known:
            known[target.parent] = _known(target.parent)
        hashes = known[target.parent].get(_name(target))
        if os.path.exists(target) and not (hashes and ("" in hashes or file_hash(target) in hashes)):
            found.append(target)
        if hashes is None:
            found += [path for path in (target.with_name(scan_id(target) + ending) for ending in beside)
                      if os.path.exists(path)]
    return found


def _known(folder: Path) -> dict[str, set[str]]:
    """Hashes of each scan's masks by all tables in a folder, an empty one while it is being done.

    Tables of other versions of covidseg count as well.
    """
    known: dict[str, set[str]] = {}
    for path in (*_part_tables(folder), folder / TABLE):
        columns, rows = _read(path) or ((), [])
        for row in rows if KNOWING.issubset(columns) else ():
            hashes = known.setdefault(row["name"], set())
            if row["mask_sha256"] or _was_being_done(row):
                hashes.add(row["mask_sha256"])
    return known


def _was_being_done(row: Row) -> bool:
    """Whether a row is that of a scan that was being done when the program ended."""
    return (row["status"], row["mask_sha256"]) == ("open", "")


def _foreign(table: Path) -> bool:
    """Whether a table is there and is one of something else."""
    return os.path.exists(table) and not KNOWING.issubset((_read(table) or ((), []))[0])


def refuse_to_replace(files: list[Path]) -> None:
    """Nothing that was there before is lost, unless the user wants it.

    Raises:
        OutputError: there are such files.
    """
    if files:
        raise OutputError(f"is there already{f', as are {len(files) - 1} more,' * (len(files) > 1)} and would be "
                          "replaced", path=files[0], remedy=ELSEWHERE)


# --- all parts together ---------------------------------------------------------------------------------------------

def merge(out: Path, overwrite: bool = False) -> list[Row]:
    """Puts the tables of all parts together: one row a scan in ``predictions.csv``, in order of their names.

    The table is the same however many parts there were. Rows of earlier runs stay in it.

    Args:
        out: folder that all parts wrote into.
        overwrite: whether a table of something else is replaced.

    Returns:
        The rows of all scans of the parts.

    Raises:
        DatasetError: parts or masks are missing or changed, or parts do not belong together.
        InputFileError: a table cannot be opened.
        OutputError: the table cannot be written, or would replace one of something else.
    """
    if not overwrite:
        refuse_to_replace([out / TABLE] if _foreign(out / TABLE) else [])
    found = tables(out)
    counts = sorted({part.count for part in found})
    if not counts:
        raise DatasetError("holds no reports of predictions", path=out,
                           remedy="Name the folder that `covidseg predict -o` wrote")
    if len(counts) > 1:
        raise DatasetError(f"holds reports of {' and of '.join(map(str, counts))} parts", path=out / "parts",
                           remedy="Delete those that are out of date")
    parts = [Part(number, counts[0]) for number in range(1, counts[0] + 1)]
    missing = [str(part) for part in parts
               if part not in found or any(row["status"] == "open" for row in found[part])]
    if missing:
        again = ", then ".join(f"`covidseg predict --part {name}`" for name in missing)
        raise DatasetError(f"part {', '.join(missing)} is missing or not complete", path=out,
                           remedy=f"Run {again} with the scans and options of the other parts")
    rows = sorted((row for part in parts for row in found[part]), key=lambda row: row["name"])
    if any(found[part] != rows[part.number - 1::part.count] for part in parts):
        raise DatasetError("parts were made from different lists of scans", path=out,
                           remedy="Run all parts again with the same scans and options")
    if odd := [row["name"] for row in rows if any(row[key] != rows[0][key] for key in MADE)]:
        others = ", ".join(str(part) for part in parts if any(row["name"] in odd for row in found[part]))
        raise DatasetError(f"{odd[0]} (in part {others}) was made with other nets or settings than {rows[0]['name']}",
                           path=out, remedy="Run all parts again with the same scans and options")
    for row in rows:
        mask = _mask(out, row["name"])
        if row["status"] == "done" and not _unchanged(mask, row["mask_sha256"]):
            raise DatasetError("is missing, or is not what was predicted", path=mask,
                               remedy="Move it away if it was changed on purpose, then run `covidseg predict` again "
                                      "with the same scans and options")
    write_table(out, _added(out, _table(out), {row["name"]: row for row in rows}))
    return rows


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


def _unchanged(path: Path, sha256: str) -> bool:
    """Whether a file or folder is there and has this hash; no file has an empty one."""
    return bool(sha256) and os.path.exists(path) and file_hash(path) == sha256
