"""What measurements leave behind: reports in JSON, which tell how they were made, and what is printed of them."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from covidseg import DISCLAIMER
from covidseg.cli.common import say, show
from covidseg.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from covidseg.data.folder import Dataset
    from covidseg.evaluation.tables import Record
    from covidseg.pipeline import Run
    from covidseg.profiles import Profile


# --- how it was made ------------------------------------------------------------------------------------------------

def command_line(name: str, data: str, test: str | None, unchecked: bool, **options: str | None) -> str:
    """What was asked for, without folder names of this machine."""
    given = {"data": Path(data).name, "test": test and Path(test).name, **options}
    return " ".join([f"covidseg {name}", *(f"--{option} {value}" for option, value in given.items() if value),
                     *(["--unchecked"] if unchecked else [])])


def recorded(command: str, testing: Dataset, tested: str, run: Run, start: float) -> Record:
    """What every recorded result of a training says about how it was made."""
    from covidseg.store import file_hash

    return {**made_with(command, testing, tested, run.profile, run.device),
            "seconds": round(time.monotonic() - start, 1),
            "data": {case.id: file_hash(case.image) for case in run.data.cases}}


def made_with(command: str, testing: Dataset, tested: str, profile: Profile, device: torch.device) -> Record:
    """What every recorded result says about how it was made; nothing that names the machine or a folder on it."""
    from covidseg.data.scan import shown
    from covidseg.profiles import profile_json
    from covidseg.store import environment, file_hash

    return {"note": DISCLAIMER, "command": command, "test": tested, "environment": environment(device),
            "settings": profile_json(profile),
            "test_data": {shown(path.relative_to(testing.root).as_posix()): file_hash(path) for case in testing.cases
                          for path in (case.image, case.mask) if path is not None}}


# --- files ----------------------------------------------------------------------------------------------------------

def write_report(path: Path, content: Record, indent: int) -> None:
    """Writes the report of a folder; one that says something else is kept beside it, under a number.

    Something else is all but the time that it took: other scans, systems or seeds, or other figures.

    Raises:
        OutputError: it cannot be written.
    """
    from covidseg.atomic import alone
    from covidseg.store import set_aside, write_text

    text = json.dumps(content, indent=indent) + "\n"
    with alone(path.parent):
        if path.exists() and _but_for_time(path.read_bytes()) != _but_for_time(text.encode()):
            say(f"the report that was there says something else and is kept as {set_aside(path).name}")
        write_text(path, text)


def _but_for_time(report: bytes) -> Any:
    """A report to be compared; the bytes themselves where they are none."""
    found = _read(report)
    return report if found is None else {**found, "seconds": None}


def _read(report: bytes) -> Record | None:
    """A JSON object; None where the bytes are none."""
    try:
        found = json.loads(report)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_json_file(path: Path | None, *entries: str) -> None:
    """Refuses a file after ``--json`` that is there and holds anything but an earlier report, known by its entries.

    Raises:
        SettingsError: it is a mask, a table of labels or whatever else.
    """
    if path is not None and str(path) != "-" and os.path.exists(path) and \
            not (path.is_file() and set(entries) <= set(_read(path.read_bytes()) or ())):
        raise SettingsError("the figures would replace this file, which is no earlier report of them", path=path,
                            remedy="Name another file after --json")


def write_json(path: Path | None, content: Record, indent: int) -> None:
    """Writes what was measured to the file after ``--json``: ``-`` is standard output, None is nowhere.

    Raises:
        OutputError: the file cannot be written.
    """
    from covidseg.store import write_text

    text = json.dumps(content, indent=indent)
    if str(path) == "-":
        print(text)  # alone on standard output, for pipes
    elif path is not None:
        write_text(path, text + "\n")


# --- what is printed ------------------------------------------------------------------------------------------------

def show_verdicts(results: list[Record], title: str, report: Path | None) -> None:
    """Prints the table of :mod:`covidseg.evaluation.verdicts`, and where the report is."""
    from covidseg.evaluation.verdicts import verdict_count, verdict_table

    say(f"{title}: {verdict_count(results)}")
    show(verdict_table(results, narrow=True).rich(""))
    if report is not None:
        say(f"report in {report}")
