"""Predictions of many scans, done in parts that can run at the same time or again, and put together in the end.

Part ``i`` of ``n`` takes every ``n``-th scan of the sorted list. Its table, ``parts/part-i-of-n.csv`` beside the masks,
has a row for each of its scans and is up to date after each of them (:mod:`covidseg.batch_tables`). A scan is left as
it is if a table says what was made of it, with the same nets and settings, and the files are unchanged; so a part that
was stopped is simply started once more. :func:`merge` puts the tables together.

What is out of date is replaced, but only where a table says that it was made here, and from this very scan: true masks,
predicted ones that somebody corrected (:func:`strangers`), and those of another patient's scan of the same name stay.
So do those of a scan that changed since, as one that was exported once more: nobody can tell it from another's.

A run that is not divided, and :func:`merge`, add to the table of earlier ones in the same folder; parts belong to one
list of scans.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from covidseg import __version__
from covidseg.atomic import alone
from covidseg.batch_tables import (
    EMPTY,
    FOUND,
    HASHES,
    MADE,
    PART_COLUMNS,
    TABLE,
    Part,
    Row,
    added,
    makers,
    mask_of,
    name_of,
    parse_part,
    rows_of,
    table_of_all,
    tables,
    told_of_scans,
    write_part,
    write_table,
)
from covidseg.data.scan import scan_id
from covidseg.errors import CovidsegError, DatasetError, InputFileError, OutputError, SettingsError
from covidseg.predict import Predictor
from covidseg.store import code_hash, file_hash

__all__ = ["PART_COLUMNS", "PREVIEW", "PROBABILITY", "Part", "PartRun", "exit_code_of", "merge", "parse_part",
           "refuse_to_replace", "strangers", "tables", "write_table"]

ELSEWHERE = "Name another folder after -o, move what is there, or replace it with --overwrite"
# Endings of the files of probabilities and of the page to look at, beside the mask.
PROBABILITY, PREVIEW = "_probability.nii.gz", "_preview.html"


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
        overwrite: whether files that no table accounts for, or that are another scan's, are replaced.

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
        self.probability, self.preview, self.overwrite = probability, preview, overwrite
        self.files = part.of(list(targets))
        self.made = {"covidseg": f"{__version__}+{code_hash()[:8]}", "nets": predictor.fingerprint(),
                     "threshold": str(threshold), "volume": str(volume), "series": series or ""}
        found = tables(out) if out is not None else {}
        self._refuse_another_list(found)
        if not overwrite:
            beside = [ending for ending, wanted in ((PROBABILITY, probability), (PREVIEW, preview)) if wanted]
            refuse_to_replace([*strangers([targets[scan] for scan in self.files], beside), *_foreign(out)])
        self.told = {name: rows for folder in {target.parent for target in targets.values()}
                     for name, rows in told_of_scans(folder).items()}
        before = {row["name"]: row for rows in found.values() for row in rows if self._is_up_to_date(row)}
        self.before, self.rows = set(before), {}
        own = {row["name"]: row for row in found.get(part, ())}  # comes last, since it is about to be replaced
        for name in map(name_of, self.files):
            known = [row for row in (*self.told.get(name, ()), own.get(name, EMPTY)) if _is_of_a_file(row)]
            # What a table says of a mask that is there stays, but counts only after a look at the files.
            last = before.get(name) or (known or [EMPTY])[-1]
            self.rows[name] = last | {"name": name, "status": "open"}
        self.write()

    def _refuse_another_list(self, found: dict[Part, list[Row]]) -> None:
        """Parts of one division have to be of the same scans."""
        names = set(map(name_of, self.targets))
        others = sorted({row["name"] for part, rows in found.items() if part.count == self.part.count > 1
                         for row in rows} - names)
        if others:
            raise SettingsError(f"holds parts of another list of scans, with {', '.join(others[:3])}"
                                f"{f' and {len(others) - 3} more' if len(others) > 3 else ''}", path=self.out,
                                remedy="Give the same scans to all parts, or another folder after -o")

    def _is_up_to_date(self, row: Row) -> bool:
        """Whether a row is that of a scan that was done with these nets and settings.

        What passed the check also counts where nobody asks for it, but not the other way round.
        """
        return all((row["scan_sha256"], row["mask_sha256"], row["status"] != "failed",
                    row["checked"] == "True" or not self.check, *(row[key] == self.made[key] for key in MADE)))

    def predict(self, scan: Path, *, progress: bool = False) -> tuple[Row, bool]:
        """Predicts a scan, unless that is done, and brings the table up to date.

        Returns:
            Its row in the table, and whether it was done before.

        Raises:
            OutputError: what is there was made from another scan of that name, or from this one before it changed.
            CovidsegError: the scan cannot be read, shows no lung, or its mask cannot be written; the row says so, as of
                any other error.
        """
        name, target = name_of(scan), self.targets[scan]
        row = self.rows[name]
        files = {"scan_sha256": scan, "mask_sha256": target}
        if self.probability:
            files["probability_sha256"] = target.with_name(scan_id(target) + PROBABILITY)
        if self.preview:
            files["preview_sha256"] = target.with_name(scan_id(target) + PREVIEW)
        there = {key: row[key] for key in ("scan_sha256", "mask_sha256")}
        try:
            now = {key: file_hash(path) if os.path.exists(path) else "" for key, path in files.items()}
            self._refuse_another(name, files, now)
            done = {key: name in self.before and now[key] == row[key] != "" for key in files}
            before = all(done.values())
            if not before:
                same = done["scan_sha256"] and done["mask_sha256"]  # else all that was made from them is out of date
                row |= self.made | dict.fromkeys(files if same else HASHES, "") | {"scan_sha256": now["scan_sha256"]}
                self.write()  # should the program be ended now, this says from which scan the new files are
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

    def _refuse_another(self, name: str, files: dict[str, Path], now: Row) -> None:
        """Refuses to replace what was made from another scan of that name.

        What lies beside a mask is of the scan that the mask is of; without a mask, of those that tables name.
        Of a part, the scan then counts as failed, so that :func:`merge` knows. Otherwise the other scan keeps its row.
        """
        told = list(filter(_is_of_a_file, self.told.get(name, ())))
        told = makers(told, now["mask_sha256"]) if now["mask_sha256"] else told
        scans = {row["scan_sha256"] for row in told}
        there = [path for key, path in files.items() if now[key] and key != "scan_sha256"]
        # Older tables do not name the scan; one that is missing is said when it is read.
        if self.overwrite or not now["scan_sha256"] or not there or not scans or scans & {"", now["scan_sha256"]}:
            return
        if self.part.count == 1:
            self.rows[name] = told[-1]
        raise OutputError("was made from another scan of that name, or from this one before it changed, and would be "
                          "replaced", path=there[0], remedy=ELSEWHERE)

    def write(self) -> None:
        """Writes the table of this part; one without scans has a table as well."""
        if self.out is not None:
            with alone(self.out / "parts"):  # another program may add scans of its own to the same table
                write_part(self.out, self.part, self._own())

    def _own(self) -> list[Row]:
        """The rows of this part; of a run that is not divided also those of earlier ones."""
        if self.out is None:
            return list(self.rows.values())
        earlier = rows_of(self.part.table(self.out)) if self.part.count == 1 else None
        return added(self.out, earlier or (), self.rows.values())

    def table(self) -> list[Row]:
        """The rows of this run and of earlier ones in the same folder, but for lost masks: for ``predictions.csv``."""
        return self._own() if self.out is None else added(self.out, _earlier(self.out), self._own())


def _is_of_a_file(row: Row) -> bool:
    """Whether a row tells of a mask, or of one that was being made when the program ended."""
    return bool(row["scan_sha256"] or row["mask_sha256"])


def _fault(error: Exception) -> str:
    """What went wrong, without paths, which would name folders of the machine."""
    if isinstance(error, CovidsegError):
        return error.fault
    return getattr(error, "strerror", None) or "an error that covidseg does not expect; --debug shows its trace"


def exit_code_of(row: Row) -> int:
    """The exit code of the error in a row, as the command line has it where the scan is predicted."""
    unopened: list[type[OSError]] = [OSError, *OSError.__subclasses__()]
    codes = {kind.__name__: InputFileError.exit_code for kind in unopened} \
        | {kind.__name__: kind.exit_code for kind in CovidsegError.__subclasses__()}
    return codes.get(row["error"], CovidsegError.exit_code)


# --- what may be replaced -------------------------------------------------------------------------------------------

def strangers(targets: Iterable[Path], beside: Iterable[str] = ()) -> list[Path]:
    """Files that would be replaced although no table in their folder says that they were made by covidseg.

    A table accounts for a mask by its hash, or by a row of a scan that was being done when the program ended. What lies
    beside a mask goes with any row of its scan.

    Args:
        targets: the masks.
        beside: endings of what is written beside them.

    Raises:
        InputFileError: a table cannot be opened.
    """
    found, told = [], dict[Path, dict[str, list[Row]]]()
    for target in targets:
        if target.parent not in told:
            told[target.parent] = told_of_scans(target.parent)
        rows = told[target.parent].get(name_of(target), [])
        if os.path.exists(target) and not makers(rows, file_hash(target)):
            found.append(target)
        if not rows:
            found += [path for path in (target.with_name(scan_id(target) + ending) for ending in beside)
                      if os.path.exists(path)]
    return found


def _foreign(out: Path | None) -> list[Path]:
    """``predictions.csv``, if it is there and is damaged or one of something else."""
    return [out / TABLE] if out is not None and table_of_all(out) is None else []


def _earlier(out: Path) -> list[Row]:
    """The rows of ``predictions.csv``."""
    return list((table_of_all(out) or {}).values())


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
        refuse_to_replace(_foreign(out))
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
        mask = mask_of(out, row["name"])
        if row["status"] == "done" and not _unchanged(mask, row["mask_sha256"]):
            raise DatasetError("is missing, or is not what was predicted", path=mask,
                               remedy="Move it away if it was changed on purpose, then run `covidseg predict` again "
                                      "with the same scans and options")
    write_table(out, added(out, _earlier(out), rows))
    return rows


def _unchanged(path: Path, sha256: str) -> bool:
    """Whether a file or folder is there and has this hash; no file has an empty one."""
    return bool(sha256) and os.path.exists(path) and file_hash(path) == sha256
