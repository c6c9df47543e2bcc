"""The fuzzing: it tells faults from refusals, every target runs, and the record is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import __main__ as command
from fuzz import scans
from fuzz.targets import TARGETS, Change, inside_gzip, inside_header

from covidseg.errors import CovidsegError

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read_without_a_finding_and_some_are_accepted(name: str, tmp_path: Path) -> None:
    """If none were accepted, nothing behind the first check would ever be tried."""
    refused = []
    for seed in TARGETS[name].seeds():
        try:
            TARGETS[name].run(seed, tmp_path)
        except CovidsegError:
            refused.append(seed)
    assert len(refused) < len(TARGETS[name].seeds())


# --- it tells faults from refusals ------------------------------------------------------------------------------

# The worker, on a target that refuses or fails whatever it gets.
WORKER = """
from dataclasses import replace
from covidseg.errors import InputFileError
from fuzz import targets, worker
def run(data, folder):
    raise ERROR
targets.TARGETS["splits"] = replace(targets.TARGETS["splits"], run=run)
worker.main()
"""


@pytest.mark.parametrize(("error", "found"), [
    (None, None), pytest.param("InputFileError('is refused')", None, marks=pytest.mark.weekly),
    pytest.param("ValueError(f'{folder} is at fault')", "ValueError: scratch is at fault", marks=pytest.mark.weekly)])
def test_a_target_is_searched_for_a_moment(error: str | None, found: str | None, tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris", reason="comes with `make fuzz`")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tools"))
    worker = ("-m", "fuzz.worker") if error is None else ("-c", WORKER.replace("ERROR", error))
    row = command.search("splits", 1, tmp_path, worker)
    assert row["executions"]
    assert [finding["text"] for finding in row["findings"]] == [found] * (found is not None)
    assert len(list(tmp_path.iterdir())) == 2 * (found is not None), "the file, and what was said about it"
    if error is None:
        assert row["reached"]
        assert row["executions"] > len(TARGETS["splits"].seeds())


@pytest.mark.parametrize(("code", "error", "text"), [("raise OSError('no start')", "exit code 1", "OSError: no start"),
                                                     ("", "no search", "")])
def test_a_process_that_does_not_search_is_a_finding(code: str, error: str, text: str, tmp_path: Path) -> None:
    assert command.search("zip", 1, tmp_path, ["-c", code])["findings"] == [{"error": error, "text": text}]


@pytest.mark.weekly
def test_checks_of_scans_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = scans.read_or_refuse

    def damaged(path: Path) -> scans.Scan | None:
        """Reads compressed files otherwise than plain ones."""
        scan = plain(path)
        if scan is not None and path.suffix == ".gz":
            scan.pixels[:] = 0
        return scan
    monkeypatch.setattr(scans, "read_or_refuse", damaged)
    with pytest.raises(AssertionError, match="two ways to read it differ"):
        scans.read_plain(scans.nifti_seeds()[0], tmp_path)


@pytest.mark.weekly
@pytest.mark.parametrize(("inside", "change", "name"), [
    (inside_gzip, lambda part: part[:148] + b"+" + part[149:], "gzip"),  # a remark in the header
    (inside_header, lambda part: part.replace(b"{", b"{ ", 1), "artifact")])
def test_changes_inside_a_format_leave_it_whole(inside: Callable[[bytes, Change], bytes], change: Change, name: str,
                                                tmp_path: Path) -> None:
    seed = TARGETS[name].seeds()[0]
    changed = inside(seed, change)
    assert changed != seed
    TARGETS[name].run(changed, tmp_path)
    assert inside(b"none{", change) == change(b"none{"), "bytes without the format are changed as they are"


# --- the record -------------------------------------------------------------------------------------------------

def faults(content: dict) -> list[str]:
    """What is missing from, or wrong in, a record."""
    found = [f"{name} was not tried" for name in TARGETS if name not in [row["target"] for row in content["targets"]]]
    found += [f"{row['target']}: {key} is {row[key]}" for row in content["targets"]
              for key, least in (("executions", 10_000), ("reached", 20)) if row[key] < least]
    found += [f"{row['target']}: {finding['error']}" for row in content["targets"] for finding in row["findings"]]
    found += [f"{key} is not the sum" for key in ("executions", "seconds")
              if content[key] != sum(row[key] for row in content["targets"])]
    if content["seconds"] < 590:
        found.append("less than ten minutes")
    if re.search(r"/(home|root|work|tmp|dev|Users)\b", json.dumps(content)):
        found.append("a folder of a machine")
    versions = content["environment"]["packages"]
    return found + [f"no version of {name}" for name in command.PACKAGES if name not in versions]


def test_the_record_is_complete_and_without_findings() -> None:
    content = json.loads((ROOT / "results" / "fuzz.json").read_text(encoding="utf-8"))
    assert faults(content) == []
    content["targets"][0] |= {"executions": 3, "findings": [{"error": "KeyError"}]}
    content["note"] = "in /home/somewhere"
    assert len(faults(content)) == 4
    del content["targets"][1:], content["environment"]["packages"]["atheris"]
    assert {"zip was not tried", "no version of atheris"} <= set(faults(content))
