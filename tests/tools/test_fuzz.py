"""The fuzzing: it tells faults from refusals, every target runs, and what was found once stays found."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest
from fuzz import __main__ as command
from fuzz import mutate, scans
from fuzz.harness import Finding, Harness, Target
from fuzz.targets import TARGETS

from covidseg.data.scan import Scan
from covidseg.errors import InputFileError

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "fuzz.json"


def target(run: Callable[[bytes, Path], None]) -> Target:
    return Target("toy", "toys", lambda: [b"seed"], run)


# --- it tells faults from refusals ------------------------------------------------------------------------------

def test_a_fault_is_reported_once_with_its_place_and_an_example(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        if data == b"refused":
            raise InputFileError("is refused", path=folder)
        if data.startswith(b"bad"):
            raise ValueError(f"{folder} is at fault")
        if data.startswith(b"wrong"):
            int("no number")
            raise AssertionError

    kept = tmp_path / "kept"
    kept.mkdir()
    harness = Harness(target(run), tmp_path, kept)
    for data in (b"good", b"refused"):
        harness(data)
    assert harness.findings == []
    for data in (b"bad", b"bad again", b"bad"):
        harness(data)
    finding, = harness.findings
    assert (finding.target, finding.error, finding.where) == ("toy", "ValueError", "tools/test_fuzz.py: run")
    assert finding.text == " is at fault", "folders of the machine stay out"
    example, = kept.glob("*.bin")
    assert example.read_bytes() == b"bad"
    assert json.loads(example.with_suffix(".json").read_text()) == vars(finding)
    assert harness.calls == 5


def test_other_faults_are_other_findings(tmp_path: Path) -> None:
    def run(data: bytes, folder: Path) -> None:
        scans.read_scan(folder / "none.txt") if data == b"place" else [][len(data)]

    harness = Harness(target(run), tmp_path)
    harness(b"a")
    harness(b"place")  # is refused, not broken
    assert [finding.error for finding in harness.findings] == ["IndexError"]


WORKER = """
import json, sys, pathlib
folder = pathlib.Path(sys.argv[sys.argv.index("--folder") + 1])
(folder / "kept").mkdir()
if "found" in sys.argv[1]:
    finding = {"target": "toy", "error": "ValueError", "where": "a.py: b", "text": "c"}
    (folder / "kept" / "1.json").write_text(json.dumps(finding))
print("#77 NEW cov: 12 ft: 5\\n#99 DONE cov: 34 ft: 9\\nDone 99 runs in 7 second(s)", file=sys.stderr)
print("stat::number_of_executed_units: 99", file=sys.stderr)
if "crash" in sys.argv[1]:
    print("==5== ERROR: libFuzzer: timeout in /some/where/file.py", file=sys.stderr)
    sys.exit(77)
"""


@pytest.mark.parametrize("how", ["fine", "found", "crash"])
def test_a_process_says_what_it_tried_and_found(how: str, tmp_path: Path) -> None:
    script = tmp_path / f"{how}.py"
    script.write_text(WORKER.replace("sys.argv[1]", repr(how)))
    result = command.search(target(lambda data, folder: None), 1, tmp_path, [str(script)])
    assert (result.executions, result.seconds, result.reached) == (99, 7, 34)
    assert [(finding.error, finding.where) for finding in result.findings] == {
        "fine": [], "found": [("ValueError", "a.py: b")], "crash": [("exit code 77", "process")]}[how]
    assert "/some" not in str(result)
    cells = [next(iter(column.cells)) for column in command.overview([result]).columns]
    assert cells == ["toy", "toys", "99", "7", "34", "0" if how == "fine" else "[red]1[/red]"]


def test_a_process_that_does_not_start_is_a_finding(tmp_path: Path) -> None:
    result = command.search(target(lambda data, folder: None), 1, tmp_path, ["-c", "raise OSError('no start')"])
    finding, = result.findings
    assert (finding.error, finding.text) == ("exit code 1", "OSError: no start")
    silent = command.search(target(lambda data, folder: None), 1, tmp_path, ["-c", ""])
    assert [finding.error for finding in silent.findings] == ["no search"]


@pytest.mark.parametrize("found", [False, True])
def test_findings_are_printed_and_end_with_an_exit_code(found: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    def search(target: Target, seconds: int, folder: Path) -> command.Result:
        findings = []
        if found and target.name == "splits":
            (folder / "kept").mkdir()
            (folder / "kept" / "1.bin").write_bytes(b"the file")
            findings.append(Finding("splits", "ValueError", "a.py: b"))
        return command.Result(target.name, target.what, 10, seconds, 5, findings)

    monkeypatch.setattr(command, "search", search)
    monkeypatch.setattr(command, "version", lambda name: "1.0")  # atheris need not be there
    folders = ["--out", str(tmp_path), "--kept", str(tmp_path / "kept")]
    assert command.main(["--seconds", "24", *folders]) == int(found)
    printed = capsys.readouterr().out
    assert ("ValueError" in printed) == found
    content = json.loads((tmp_path / "fuzz.json").read_text(encoding="utf-8"))
    assert (content["findings"], content["executions"], content["seconds"]) == (int(found), 90, 24)
    assert [p.name for p in tmp_path.glob("kept/*")] == ["splits-1.bin"] * found
    (tmp_path / "fuzz.json").unlink()
    assert command.main(["--target", "nifti", *folders]) == 0
    assert not (tmp_path / "fuzz.json").exists(), "no record of a search in some targets"


# --- every target runs ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", TARGETS)
def test_a_target_takes_its_seeds_and_changes_of_them(name: str, tmp_path: Path) -> None:
    chosen = TARGETS[name]
    seeds, rng = chosen.seeds(), Random(7)
    assert len(seeds) == len(set(seeds)) >= 2
    harness = Harness(chosen, tmp_path)
    for seed in seeds:
        harness(seed)
    for _ in range(20 if name in command.WEIGHTS else 60):
        harness(chosen.change(rng.choice(seeds), rng))
    assert harness.findings == []


def test_targets_reach_beyond_refusals(tmp_path: Path) -> None:
    """At least one seed of each is accepted: otherwise nothing behind the first check would ever be run."""
    for name, chosen in TARGETS.items():
        accepted = 0
        for seed in chosen.seeds():
            try:
                (tmp_path / name).mkdir(exist_ok=True)
                chosen.run(seed, tmp_path / name)
                accepted += 1
            except InputFileError:
                pass
        assert accepted, name


def test_checks_of_scans_fire(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    harness, seed = Harness(TARGETS["nifti"], tmp_path), scans.nifti_seeds()[0]
    plain = scans.read_scan
    for change in (lambda pixels: pixels[::-1], lambda pixels: pixels.clip(0, 5)):
        def broken(path: Path, change: Callable[[np.ndarray], np.ndarray] = change) -> Scan:
            scan = plain(path)
            return replace(scan, pixels=change(scan.pixels)) if path.name == "packed.nii.gz" else scan
        monkeypatch.setattr(scans, "read_scan", broken)
        harness(seed)
    assert [finding.text.split("\n")[0] for finding in harness.findings] == ["two ways to read it differ"]


@pytest.mark.parametrize(("change", "seeds"), [
    (mutate.change_bytes, [b"", b"abc"]), (mutate.change_json, [b"{}", b"not json", b'{"a": [1, {"b": 2}]}']),
    (mutate.change_table, [b"", b"a,b\n1,2\n"]), (mutate.change_nifti, [b"", *scans.nifti_seeds()[:2]]),
    (mutate.change_gzip, [b"", scans.gzip_seeds()[0]]), (mutate.change_arrays, [b"", TARGETS["artifact"].seeds()[0]])])
def test_changes_are_bytes_often_others_and_the_same_each_time(change: Callable[[bytes, Random], bytes],
                                                               seeds: list[bytes]) -> None:
    for seed in seeds:
        changed = [change(seed, Random(number)) for number in range(60)]
        assert changed == [change(seed, Random(number)) for number in range(60)]
        assert all(type(one) is bytes for one in changed)
        assert len(set(changed)) > 10 or seed == b""


def test_changed_headers_and_compressed_files_stay_readable_often_enough(tmp_path: Path) -> None:
    """Changes that know the format get past its first checks; otherwise they would be no better than noise."""
    seed = scans.gzip_seeds()[0]
    (tmp_path / "scan.nii.gz").write_bytes(seed)
    accepted = 0
    for number in range(60):
        (tmp_path / "scan.nii.gz").write_bytes(mutate.change_gzip(seed, Random(number)))
        accepted += scans.outcome(lambda: scans.read_scan(tmp_path / "scan.nii.gz")) is not None
    assert 5 < accepted < 55


def test_time_is_shared_out() -> None:
    shares = command.shares(600, list(TARGETS))
    assert sum(shares.values()) == pytest.approx(600, abs=len(TARGETS))
    assert shares["nifti"] == 3 * shares["labels"]
    assert command.shares(60, ["zip"]) == {"zip": 60}


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


def test_check_of_the_record_fires() -> None:
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    content["targets"][0] |= {"executions": 3, "findings": [{"error": "KeyError"}]}
    content["note"] = "in /home/somewhere"
    assert len(faults(content)) == 4
    del content["targets"][1:], content["environment"]["packages"]["atheris"]
    assert "zip was not tried" in faults(content)
    assert "no version of atheris" in faults(content)


def test_the_command_runs_from_a_checkout() -> None:
    """``make fuzz`` starts the package by name; without atheris its help still comes."""
    assert "fuzz.worker" in command.search.__defaults__[0]  # type: ignore[index]
    with pytest.raises(SystemExit) as ended:
        command.main(["--help"])
    assert ended.value.code == 0
    assert "atheris" not in sys.modules, "not needed but in the worker"
