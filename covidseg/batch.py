"""Predictions of many scans, done in parts that can run at the same time or again, and put together in the end.

Part ``i`` of ``n`` takes every ``n``-th scan of the sorted list. It keeps a report, ``parts/part-i-of-n.json`` beside
its masks, up to date after each scan. What a report calls done, and is there unchanged, is not done again, so that a
part that was stopped is simply started once more. :func:`merge` puts the reports together in one table.
"""

from __future__ import annotations

import csv
import io
import json
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from covidseg import DISCLAIMER, __version__
from covidseg.data.scan import scan_id
from covidseg.errors import CovidsegError, DatasetError, SettingsError
from covidseg.predict import Predictor
from covidseg.store import environment, file_hash, fingerprint, noted_warnings, peak_memory, write_text

Entry = dict[str, Any]    # what a report says about one scan
Report = dict[str, Any]
COLUMNS = ("name", "status", "error", "slices", "lesion_slices", "lesion_ml", "threshold", "nets", "scan_sha256",
           "mask_sha256")


@dataclass(frozen=True)
class Part:
    """Part ``number`` of ``count``, counted from 1."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise SettingsError(f"there is no part {self.number} of {self.count}",
                                remedy="Parts count from 1: --part 1/4, 2/4, 3/4 and 4/4")

    def of(self, files: list[Path]) -> list[Path]:
        """The files of this part, in order of their names."""
        return sorted(files, key=lambda path: (path.name, path))[self.number - 1::self.count]

    def report(self, out: Path) -> Path:
        """Where the report of this part lies."""
        return out / "parts" / f"part-{self.number}-of-{self.count}.json"


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
        out: folder of the reports, which is that of the masks; None keeps no report.
        threshold: lesion from this probability on.
        volume: as of :func:`covidseg.lungs.lung_masks`.
        probability: whether probabilities are written as well, beside the masks.
        check: whether scans have to look like chest CT.

    Attributes:
        files: the scans of this part, in order.
    """

    def __init__(self, predictor: Predictor, part: Part, targets: dict[Path, Path], out: Path | None,
                 threshold: float, volume: bool | None = None, probability: bool = False, check: bool = True) -> None:
        self.predictor, self.part, self.targets, self.out = predictor, part, targets, out
        self.threshold, self.volume, self.probability, self.check = threshold, volume, probability, check
        self.files = part.of(list(targets))
        # What has to be the same for results to belong together.
        self.made = {"covidseg": __version__, "nets": predictor.fingerprint(), "threshold": threshold,
                     "volume": volume, "probability": probability}
        known = reports(out) if out is not None else []
        self._known = {entry["name"]: entry for report in known if report["made"] == self.made
                       for entry in report["scans"] if entry["status"] == "done"}
        self._entries: dict[str, Entry] = {}
        self._warned: list[str] = []

    def predict(self, scan: Path, *, progress: bool = False) -> tuple[Entry, bool]:
        """Predicts a scan, unless that is done, and brings the report up to date.

        Returns:
            Its entry in the report, and whether it was done before.

        Raises:
            CovidsegError: see :meth:`covidseg.predict.Predictor.predict_file`; the report says so as well.
        """
        name, start = scan_id(scan), time.monotonic()
        try:
            before = self._known.get(name)
            if before is not None and all(path.is_file() and file_hash(path) == before.get(key)
                                          for key, path in self._paths(scan).items()):
                self._note(name, before)
                return before, True
            written = self._paths(scan)
            with noted_warnings() as warned:
                found = self.predictor.predict_file(scan, written["mask_sha256"], self.threshold,
                                                    written.get("probability_sha256"), self.volume, progress=progress,
                                                    check=self.check)
            self._warned = list(dict.fromkeys(self._warned + warned))
            entry = {"name": name, "status": "done", **asdict(found),
                     **{key: file_hash(path) for key, path in written.items()},
                     "seconds": round(time.monotonic() - start, 2)}
        except CovidsegError as error:  # without its path, which would name folders of the machine
            self._note(name, {"name": name, "status": "failed", "error": type(error).__name__, "fault": error.fault})
            raise
        self._note(name, entry)
        return entry, False

    def _paths(self, scan: Path) -> dict[str, Path]:
        """The files of one prediction, by the name of their checksum in the report."""
        target = self.targets[scan]
        paths = {"scan_sha256": scan, "mask_sha256": target}
        if self.probability:
            paths["probability_sha256"] = target.with_name(f"{scan_id(target)}_probability.nii.gz")
        return paths

    def _note(self, name: str, entry: Entry) -> None:
        self._entries[name] = entry
        self.write_report()

    def report(self) -> Report:
        """What was done so far, in this run or, if that is not looked at yet, before."""
        own = {scan_id(scan) for scan in self.files}
        scans = {name: entry for name, entry in self._known.items() if name in own} | self._entries
        return {"note": DISCLAIMER, "part": self.part.number, "parts": self.part.count, "made": self.made,
                "inputs": fingerprint(sorted(map(scan_id, self.targets))),
                "environment": environment(self.predictor.device()), "peak_memory_mb": peak_memory(),
                "warnings": self._warned,
                "complete": len(self._entries) == len(self.files), "scans": [scans[name] for name in sorted(scans)]}

    def write_report(self) -> None:
        """Writes what was done so far beside the masks; a part without scans has a report as well."""
        if self.out is not None:
            write_text(self.part.report(self.out), json.dumps(self.report(), indent=2) + "\n")


def reports(out: Path) -> list[Report]:
    """Reports of all parts in an output folder; a damaged one counts as missing."""
    found = []
    for path in sorted((out / "parts").glob("part-*-of-*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            json.dumps(content, ensure_ascii=False).encode()  # fails if a table could not hold it
        except (OSError, ValueError, RecursionError):
            continue
        if _is_report(content):
            found.append(content)
    return found


def _is_report(content: Any) -> bool:
    """Whether JSON that was read is the report of a part, as far as others rely on it."""
    types = {"part": int, "parts": int, "made": dict, "inputs": str, "complete": bool, "scans": list}
    return isinstance(content, dict) and all(type(content.get(name)) is kind for name, kind in types.items()) \
        and all(map(_is_entry, content["scans"]))


def _is_entry(entry: Any) -> bool:
    """Whether this says of one scan that it is done or failed."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not 0 < len(entry["name"]) < 250:
        return False
    done = isinstance(entry.get("mask_sha256"), str) and isinstance(entry.get("lesion_ml"), (int, float))
    return entry.get("status") == "failed" or (entry.get("status") == "done" and done)


def merge(out: Path) -> list[Entry]:
    """Puts the reports of all parts together: one row a scan in ``predictions.csv``, in order of their names.

    The table is the same however many parts there were.

    Returns:
        The entries of all scans.

    Raises:
        DatasetError: parts or masks are missing or changed, or parts do not belong together.
        OutputError: the table cannot be written.
    """
    found = reports(out)
    counts = sorted({report["parts"] for report in found})
    if not counts:
        raise DatasetError("holds no reports of predictions", path=out,
                           remedy="Name the folder that `covidseg predict -o` wrote")
    if len(counts) > 1:
        raise DatasetError(f"holds reports of {' and of '.join(map(str, counts))} parts", path=out / "parts",
                           remedy="Delete those that are out of date")
    complete = {report["part"] for report in found if report["complete"]}
    missing = [f"{k}/{counts[0]}" for k in range(1, counts[0] + 1) if k not in complete]
    if missing:
        again = ", then ".join(f"`covidseg predict --part {name}`" for name in missing)
        raise DatasetError(f"part {', '.join(missing)} is missing or not complete", path=out,
                           remedy=f"Run {again} with the scans and options of the other parts")
    for key, what in (("inputs", "from another list of scans"), ("made", "with other nets or settings")):
        odd = [f"{report['part']}/{counts[0]}" for report in found if report[key] != found[0][key]]
        if odd:
            raise DatasetError(f"part {', '.join(odd)} was made {what} than part {found[0]['part']}/{counts[0]}",
                               path=out, remedy="Run all parts again with the same scans and options")
    entries = [entry for report in found for entry in report["scans"]]
    for entry in entries:
        mask = out / f"{entry['name']}.nii.gz"
        if entry["status"] == "done" and (not mask.is_file() or file_hash(mask) != entry["mask_sha256"]):
            raise DatasetError("is missing, or is not what was predicted", path=mask,
                               remedy="Run `covidseg predict` again with the same scans and options")
    write_table(out, found)
    return entries


def write_table(out: Path, parts: list[Report]) -> None:
    """Writes ``predictions.csv``. Nothing in it tells when, where and in how many parts it was made.

    Raises:
        OutputError: it cannot be written.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for made, entry in sorted(((part["made"], entry) for part in parts for entry in part["scans"]),
                              key=lambda row: row[1]["name"]):
        volume = {"lesion_ml": f"{entry['lesion_ml']:.3f}"} if "lesion_ml" in entry else {}
        table.writerow({**made, **entry, **volume})
    write_text(out / "predictions.csv", text.getvalue())
