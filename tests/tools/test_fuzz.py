"""The fuzzing: it tells faults from refusals, every target runs, and the record is whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from fuzz import __main__ as command
from fuzz import scans
from fuzz.harness import Change, Harness, Target, inside_gzip, inside_header
from fuzz.targets import TARGETS

from covidseg.errors import CovidsegError, InputFileError

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "fuzz.json"


def target(run: Callable[[bytes, Path], None]) -> Target:
    return Target("toy", "toys", lambda: [b"seed"], run)


@pytest.mark.parametrize("name", TARGETS)
def test_whole_files_are_read_without_a_finding_and_some_are_accepted(name: str, tmp_path: Path) -> None:
    """If none were accepted, nothing behind the first check would ever be tried."""
    chosen, refused = TARGETS[name], list[bytes]()

    def run(data: bytes, folder: Path) -> None:
        try:
            chosen.run(data, folder)
        except CovidsegError:
            refused.append(data)
    harness, seeds = Harness(target(run), tmp_path, tmp_path), chosen.seeds()
    for seed in seeds:
        harness(seed)
    assert harness.findings == []
    assert len(refused) < len(seeds)


def test_a_target_is_searched_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("atheris", reason="comes with `make fuzz`")
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tools"))
    result = command.search(TARGETS["splits"], 1, tmp_path)
    assert result.findings == []
    assert result.executions > len(TARGETS["splits"].seeds())
    assert result.reached


# --- it tells faults from refusals ------------------------------------------------------------------------------

def test_a_fault_is_reported_once_with_its_place_and_an_example(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        if data == b"refused":
            raise InputFileError("is refused", path=folder)
        if data.startswith(b"bad"):
            raise ValueError(f"{folder} is at fault")

    kept = tmp_path / "kept"
    kept.mkdir()
    harness = Harness(target(run), tmp_path, kept)
    for data in (b"good", b"refused"):
        harness(data)
    assert harness.findings == []
    for data in (b"bad", b"bad again"):
        harness(data)
    finding, = harness.findings
    assert (finding.target, finding.error, finding.where) == ("toy", "ValueError", "tools/test_fuzz.py: run")
    assert finding.text == " is at fault", "folders of the machine stay out"
    example, = kept.glob("*.bin")
    assert example.read_bytes() == b"bad"
    assert json.loads(example.with_suffix(".json").read_text()) == vars(finding)


@pytest.mark.weekly
def test_checks_of_scans_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, seed, plain = Harness(TARGETS["nifti"], tmp_path, tmp_path), scans.nifti_seeds()[0], scans.read_or_refuse

    def damaged(path: Path) -> scans.Scan | None:
        """Reads compressed files otherwise than plain ones."""
        scan = plain(path)
        if scan is not None and path.suffix == ".gz":
            scan.pixels[:] = 0
        return scan
    monkeypatch.setattr(scans, "read_or_refuse", damaged)
    harness(seed)
    assert [finding.text.split("\n")[0] for finding in harness.findings] == ["two ways to read it differ"]


WORKER = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
(folder / "kept").mkdir()
if "found" in HOW:
    finding = {"target": "toy", "error": "ValueError", "where": "a.py: b", "text": "c"}
    (folder / "kept" / "1.json").write_text(json.dumps(finding))
print("#77 NEW cov: 12 ft: 5\\n#99 DONE cov: 34 ft: 9\\nDone 99 runs in 7 second(s)", file=sys.stderr)
print("stat::number_of_executed_units: 99", file=sys.stderr)
if "crash" in HOW:
    print("==5== ERROR: libFuzzer: timeout in /some/where/file.py", file=sys.stderr)
    sys.exit(77)
"""


@pytest.mark.weekly
@pytest.mark.parametrize(("how", "found"), [("fine", []), ("found", [("ValueError", "a.py: b")]),
                                            ("crash", [("exit code 77", "process")])])
def test_a_process_says_what_it_tried_and_found(how: str, found: list[tuple[str, str]], tmp_path: Path) -> None:
    result = command.search(target(lambda data, folder: None), 1, tmp_path, ["-c", WORKER.replace("HOW", repr(how))])
    assert (result.executions, result.seconds, result.reached) == (99, 7, 34)
    assert [(finding.error, finding.where) for finding in result.findings] == found
    assert "/some" not in str(result.findings)


@pytest.mark.weekly
@pytest.mark.parametrize(("code", "error", "text"), [("raise OSError('no start')", "exit code 1", "OSError: no start"),
                                                     ("", "no search", "")])
def test_a_process_that_does_not_search_is_a_finding(code: str, error: str, text: str, tmp_path: Path) -> None:
    finding, = command.search(target(lambda data, folder: None), 1, tmp_path, ["-c", code]).findings
    assert (finding.error, finding.text) == (error, text)


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
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    assert faults(content) == []
    content["targets"][0] |= {"executions": 3, "findings": [{"error": "KeyError"}]}
    content["note"] = "in /home/somewhere"
    assert len(faults(content)) == 4
    del content["targets"][1:], content["environment"]["packages"]["atheris"]
    assert {"zip was not tried", "no version of atheris"} <= set(faults(content))
