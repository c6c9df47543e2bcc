"""The table of faults: each is caught, the record says what a fresh run gives, and the judge of it all is awake."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faults import __main__ as program
from faults import files, pictures, server
from faults.__main__ import GROUPS, record
from faults.supplies import Supplies, good, make_supplies
from faults.trial import CODES, REMEDY, Fault, attempt, tidy
from tiny import TINY
from typer.testing import CliRunner

from covidseg import __version__
from covidseg.cli import app
from covidseg.errors import ArtifactError, CovidsegError, InputFileError
from covidseg.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[2]
RECORD = (ROOT / "results" / "faults.json").read_text(encoding="utf-8")
ALL = [(group, fault) for group, found in GROUPS.items() for fault in found]
FIRST = [(group, found[0]) for group, found in GROUPS.items()]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Supplies:
    return make_supplies(tmp_path_factory.mktemp("supplies"))


@pytest.fixture(scope="module")
def rows(supplies: Supplies) -> Callable[[list[tuple[str, Fault]]], list[Row]]:
    """Fresh rows of the record for some faults; each is tried once, whichever test asks first."""
    tried = functools.cache(lambda fault: attempt(fault, supplies)[0])
    return lambda some: [{"group": group, **tried(fault)} for group, fault in some]


def test_some_faults_end_as_the_record_says(rows: Callable[[list[tuple[str, Fault]]], list[Row]]) -> None:
    """The first of each group; all of them do in `make faults`, and in the test below."""
    fresh = rows(FIRST)
    assert all(row["met"] for row in fresh)
    assert [row for row in fresh if row not in json.loads(RECORD)["faults"]] == [], "run `make faults`"


@pytest.mark.weekly
def test_the_record_is_what_a_fresh_run_gives(rows: Callable[[list[tuple[str, Fault]]], list[Row]]) -> None:
    assert record(rows(ALL)) == json.loads(RECORD), "run `make faults`"


def test_the_record_names_no_folder_of_the_machine() -> None:
    assert re.findall(r"[^\w.](/(?:tmp|home|root|usr|work|Users|var)\b[^\s\"]*|127\.0\.0\.1|faults-\w+)", RECORD) == []
    recorded = json.loads(RECORD)
    assert recorded["covidseg"] == __version__
    assert "not a medical device" in recorded["note"]
    assert all(row["met"] for row in recorded["faults"])
    assert [(row["group"], row["fault"]) for row in recorded["faults"]] == [(group, f.title) for group, f in ALL]


def test_the_faults_have_titles_of_their_own_and_every_exit_code_but_that_of_several_processes() -> None:
    """How processes of one training end together is tested in test_devices.py."""
    assert len({fault.title for _, fault in ALL}) == len(ALL)
    assert {fault.error.exit_code for _, fault in ALL if fault.error} == set(CODES) - {1, 10}


# --- the judge is awake -----------------------------------------------------------------------------------------

FINE = Fault("nothing at all", "covidseg lungs scan.nii.gz -o out", InputFileError, ("scan.nii.gz",), good)


@pytest.mark.weekly
def test_a_fault_that_is_not_caught_is_reported(supplies: Supplies) -> None:
    row, complaints = attempt(FINE, supplies)
    assert complaints == ["ends with 0, not with 3", "says 0 messages, not 1", "does not name scan.nii.gz",
                          "out/scan.nii.gz is left over"]
    assert row == {"fault": "nothing at all", "command": FINE.command, "said": [], "exit_code": 0, "error": "",
                   "met": False}


@pytest.mark.weekly
@pytest.mark.parametrize(("error", "complaints"), [
    (InputFileError("is broken", path="scan.nii.gz", remedy="Mend it"), []),
    (InputFileError("is broken", path="scan.nii.gz"), ["says no remedy"]),
    (InputFileError("is broken", remedy="Mend it"), ["does not name scan.nii.gz"]),
    (ArtifactError("is broken", path="scan.nii.gz", remedy="Mend it"), ["ends with 6, not with 3"]),
    (CovidsegError("is broken\nindeed", path="scan.nii.gz", remedy="Mend it"),
     ["ends with 1, not with 3", "prints a trace or something else: indeed. Mend it.", "says no remedy"]),
    (KeyError("slices"), ["ends with 1, not with 3", "prints a trace or something else: KeyError: 'slices'",
                          "says 0 messages, not 1", "does not name scan.nii.gz"])], ids=str)
def test_a_bad_message_is_reported(error: Exception, complaints: list[str], supplies: Supplies) -> None:
    def fail() -> None:
        raise error
    assert attempt(replace(FINE, call=fail), supplies)[1] == complaints


@pytest.mark.weekly
def test_what_is_left_changed_lost_or_missing_is_reported(supplies: Supplies) -> None:
    def make(supplies: Supplies) -> None:
        for name in ("old", "older", "kept"):
            Path(name).write_text(name)

    def spoil() -> None:
        Path("old").write_text("new")
        Path("older").unlink()
        Path(".half-written").write_text("{")
        Path("done.txt").write_text("allowed")
        raise InputFileError("is broken", path="scan.nii.gz", remedy="Mend it")

    fault = replace(FINE, make=make, call=spoil, leaves=("*.txt",), results=("out/a.nii.gz",))
    assert attempt(fault, supplies)[1] == [
        "old was changed", "older was lost", ".half-written is left over", "out/a.nii.gz is missing"]


def test_a_message_needs_two_sentences() -> None:
    assert REMEDY.fullmatch("error: a.nii.gz: is empty. Copy it again.")
    assert not REMEDY.fullmatch("error: a.nii.gz: is empty.")
    assert not REMEDY.fullmatch("error: a.nii.gz: is empty. again.")


@pytest.mark.parametrize(("said", "recorded"), [
    ("error: http://127.0.0.1:40111/a.zip: broke off", "error: https://publisher.example/a.zip: broke off"),
    ("error: a.nii.gz: CRC check failed 12 != 34.", "error: a.nii.gz: CRC check failed."),
    ("error: run/cam1-c4df9c816af7a8ea.safetensors: is", "error: run/cam1-0123456789abcdef.safetensors: is"),
    ("error: mask-c4df9c816af7a8ea.nii.gz: is", "error: mask-c4df9c816af7a8ea.nii.gz: is")])
def test_a_record_holds_nothing_that_another_processor_would_say_otherwise(said: str, recorded: str) -> None:
    assert tidy(said) == recorded


# --- the program ------------------------------------------------------------------------------------------------

@pytest.mark.weekly
def test_the_program_fails_if_a_fault_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    caught = next(fault for fault in files.FILES if fault.title == "empty")
    monkeypatch.setattr(program, "GROUPS", {"a": [caught], "b": [caught, FINE]})
    assert program.main(["--only", "a", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == [], "a part of the table is no record"
    assert program.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "missed: nothing at all: ends with 0" in shown.err
    assert "2 of 3 faults were caught" in shown.err
    assert "b: empty: InputFileError\n  error: scan.nii.gz: " in shown.out
    recorded = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    assert [(row["group"], row["met"]) for row in recorded["faults"]] == [("a", True), ("b", True), ("b", False)]


@pytest.mark.weekly
def test_nothing_of_a_fault_outlives_it(supplies: Supplies) -> None:
    """Working directory, standard streams, arguments and the played publisher are as they were."""
    before = Path.cwd(), sys.stdout, sys.argv, server.registry.data_root
    attempt(next(fault for group, fault in ALL if group == "downloads and archives"), supplies)
    assert (Path.cwd(), sys.stdout, sys.argv, server.registry.data_root) == before


REFUSED = [fault for fault in pictures.FAULTS if "MR " in fault.title]
RESULTS = {"lungs": "out/scan.nii.gz", "predict": "out/scan.nii.gz", "train": "run/run.json"}


@pytest.mark.parametrize("fault", REFUSED, ids=[fault.title for fault in REFUSED])
def test_what_does_not_look_like_ct_can_be_let_pass(fault: Fault, supplies: Supplies, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option that the error names, in each command that can end with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROFILES, "quick", TINY)
    fault.make(supplies)
    said = CliRunner().invoke(app, command := fault.command.split()[1:])
    assert said.exit_code
    assert "--unchecked" in said.output + str(said.exception)
    done = CliRunner().invoke(app, [*command, "--unchecked"], catch_exceptions=False)
    assert done.exit_code == 0
    if command[0] in RESULTS:  # `data check` only says something
        assert (tmp_path / RESULTS[command[0]]).exists()
    if command[0] == "train":
        report = json.loads((tmp_path / RESULTS["train"]).read_text(encoding="utf-8"))
        assert report["command"].endswith(" --unchecked"), "it is no secret"
