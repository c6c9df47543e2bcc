"""The table of faults: each is caught, the record says what a fresh run gives, and the judge of it all is awake."""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from faults import __main__ as program
from faults import files, pictures, server
from faults.__main__ import GROUPS, record
from faults.supplies import Supplies, make_supplies
from faults.trial import CODES, REMEDY, Fault, Outcome, attempt, tidy
from tiny import TINY
from typer.testing import CliRunner

from covidseg import __version__, errors
from covidseg.cli import app
from covidseg.errors import ArtifactError, CovidsegError, InputFileError
from covidseg.profiles import PROFILES

ROOT = Path(__file__).resolve().parents[2]
ALL = [(group, fault) for group, found in GROUPS.items() for fault in found]


@pytest.fixture(scope="module")
def supplies(tmp_path_factory: pytest.TempPathFactory) -> Supplies:
    return make_supplies(tmp_path_factory.mktemp("supplies"))


@pytest.fixture(scope="module")
def tried(supplies: Supplies) -> Callable[[Fault], Outcome]:
    """What happens at a fault; each is tried once, whichever test asks first."""
    return functools.cache(lambda fault: attempt(fault, supplies))


def test_some_faults_end_as_the_record_says(tried: Callable[[Fault], Outcome]) -> None:
    """The first of each group; all of them do in `make faults`, and in the test below."""
    some = {group: [tried(fault) for fault in faults[:1]] for group, faults in GROUPS.items()}
    assert [outcome.complaints for group in some.values() for outcome in group] == [()] * len(GROUPS)
    recorded = json.loads((ROOT / "results" / "faults.json").read_text(encoding="utf-8"))
    fresh = record(some)["faults"]
    known = {(row["group"], row["fault"]) for row in fresh}
    assert fresh == [row for row in recorded["faults"] if (row["group"], row["fault"]) in known], "run `make faults`"


@pytest.mark.weekly
def test_the_record_is_what_a_fresh_run_gives(tried: Callable[[Fault], Outcome]) -> None:
    outcomes = {group: [tried(fault) for fault in faults] for group, faults in GROUPS.items()}
    recorded = json.loads((ROOT / "results" / "faults.json").read_text(encoding="utf-8"))
    assert record(outcomes) == recorded, "run `make faults`"


def test_the_record_names_no_folder_of_the_machine() -> None:
    text = (ROOT / "results" / "faults.json").read_text(encoding="utf-8")
    assert re.findall(r"[^\w.](/(?:tmp|home|root|usr|work|Users|var)\b[^\s\"]*|127\.0\.0\.1|faults-\w+)", text) == []
    recorded = json.loads(text)
    assert recorded["covidseg"] == __version__
    assert "not a medical device" in recorded["note"]
    assert all(row["met"] for row in recorded["faults"])


def test_the_faults_have_titles_of_their_own_and_real_commands() -> None:
    titles = [(group, fault.title) for group, fault in ALL]
    assert len(set(titles)) == len(titles)
    known = {command.name or command.callback.__name__ for command in app.registered_commands} | {"data"}  # type: ignore[union-attr]
    for _, fault in ALL:
        if fault.call is None:
            words = fault.command.split()
            assert words[words.index("covidseg") + 1] in known
        else:
            assert fault.command.startswith("read_")


# --- the judge is awake -----------------------------------------------------------------------------------------

def good(folder: Path, supplies: Supplies) -> None:
    pictures.good(folder, supplies)


FINE = Fault("nothing at all", "covidseg lungs scan.nii.gz -o out", InputFileError, ("scan.nii.gz",), good)


@pytest.mark.weekly
def test_a_fault_that_is_not_caught_is_reported(supplies: Supplies) -> None:
    outcome = attempt(FINE, supplies)
    assert outcome.exit_code == 0
    assert outcome.complaints == ("ends with 0, not with 3", "says 0 messages, not 1", "does not name scan.nii.gz",
                                  "out/scan.nii.gz is left over")
    assert outcome.as_json() == {"fault": "nothing at all", "command": FINE.command, "said": [], "exit_code": 0,
                                 "error": "", "met": False}


def saying(error: Exception) -> Fault:
    """A fault that ends with this error."""
    def fail() -> None:
        raise error
    return replace(FINE, command='read_scan("scan.nii.gz")', call=fail)


@pytest.mark.weekly
@pytest.mark.parametrize(("error", "complaints"), [
    (InputFileError("is broken", path="scan.nii.gz", remedy="Mend it"), ()),
    (InputFileError("is broken", path="scan.nii.gz"), ("says no remedy",)),
    (InputFileError("is broken", remedy="Mend it"), ("does not name scan.nii.gz",)),
    (ArtifactError("is broken", path="scan.nii.gz", remedy="Mend it"), ("ends with 6, not with 3",)),
    (CovidsegError("is broken\nindeed", path="scan.nii.gz", remedy="Mend it"),
     ("ends with 1, not with 3", "prints a trace or something else: indeed. Mend it.", "says no remedy")),
    (KeyError("slices"), ("ends with 1, not with 3", "prints a trace or something else: KeyError: 'slices'",
                          "says 0 messages, not 1", "does not name scan.nii.gz"))], ids=str)
def test_a_bad_message_is_reported(error: Exception, complaints: tuple[str, ...], supplies: Supplies) -> None:
    assert attempt(saying(error), supplies).complaints == complaints


@pytest.mark.weekly
def test_what_is_left_changed_lost_or_missing_is_reported(supplies: Supplies) -> None:
    def make(folder: Path, supplies: Supplies) -> None:
        for name in ("old", "older", "kept"):
            (folder / name).write_text(name)

    def spoil() -> None:
        Path("old").write_text("new")
        Path("older").unlink()
        Path(".half-written").write_text("{")
        Path("done.txt").write_text("allowed")
        raise InputFileError("is broken", path="scan.nii.gz", remedy="Mend it")

    fault = replace(FINE, make=make, call=spoil, leaves=("*.txt",), results=("out/a.nii.gz",))
    assert attempt(fault, supplies).complaints == (
        "old was changed", "older was lost", ".half-written is left over", "out/a.nii.gz is missing")


@pytest.mark.weekly
def test_a_message_needs_two_sentences() -> None:
    assert REMEDY.fullmatch("error: a.nii.gz: is empty. Copy it again.")
    assert not REMEDY.fullmatch("error: a.nii.gz: is empty.")
    assert not REMEDY.fullmatch("error: a.nii.gz: is empty. again.")


@pytest.mark.weekly
@pytest.mark.parametrize(("said", "recorded"), [
    ("error: http://127.0.0.1:40111/a.zip: broke off", "error: https://publisher.example/a.zip: broke off"),
    ("error: a.nii.gz: CRC check failed 12 != 34.", "error: a.nii.gz: CRC check failed."),
    ("error: run/cam1-c4df9c816af7a8ea.safetensors: is", "error: run/cam1-0123456789abcdef.safetensors: is"),
    ("error: mask-c4df9c816af7a8ea.nii.gz: is", "error: mask-c4df9c816af7a8ea.nii.gz: is")])
def test_a_record_holds_nothing_that_another_processor_would_say_otherwise(said: str, recorded: str) -> None:
    assert tidy(said) == recorded


@pytest.mark.weekly
def test_many_messages_are_recorded_by_the_first() -> None:
    fault = next(fault for fault in files.FAULTS if fault.lines > 2)
    outcome = Outcome(fault, 3, tuple(f"error: {k}" for k in range(40)), ())
    assert outcome.as_json()["said"] == ["error: 0", "(and 39 more like it)"]


# --- the program ------------------------------------------------------------------------------------------------

@pytest.mark.weekly
def test_the_program_fails_if_a_fault_is_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    caught = next(fault for fault in files.FAULTS if fault.title == "empty")
    monkeypatch.setattr(program, "GROUPS", {"a": [caught], "b": [caught, FINE]})
    assert program.main(["--only", "a", "--out", str(tmp_path)]) == 0
    assert list(tmp_path.iterdir()) == [], "a part of the table is no record"
    assert program.main(["--out", str(tmp_path)]) == 1
    shown = capsys.readouterr()
    assert "missed: nothing at all" in shown.err
    assert "2 of 3 faults were caught" in shown.err
    assert "NO: ends with 0" in " ".join(shown.out.split())
    recorded = json.loads((tmp_path / "faults.json").read_text(encoding="utf-8"))
    assert [(row["group"], row["met"]) for row in recorded["faults"]] == [("a", True), ("b", True), ("b", False)]


@pytest.mark.weekly
def test_nothing_of_a_fault_outlives_it(supplies: Supplies) -> None:
    """Working directory, standard streams, arguments and the played publisher are as they were."""
    before = Path.cwd(), sys.stdout, sys.argv, server.registry.data_root
    attempt(next(fault for group, fault in ALL if group == "downloads and archives"), supplies)
    assert (Path.cwd(), sys.stdout, sys.argv, server.registry.data_root) == before


# --- what the table says in the README --------------------------------------------------------------------------

def code_faults(readme: str) -> list[str]:
    """Exit codes whose meaning in the README is not that of the error's own docstring, and errors that it lacks."""
    told = {int(code): meaning for code, meaning in re.findall(r"^\| (\d+) \| ([^|]+) \| `\w+Error` \|$", readme,
                                                              re.MULTILINE)}
    faults = []
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, CovidsegError) and kind is not CovidsegError:
            meaning = str(kind.__doc__).strip().rstrip(".").lower()
            if told.get(kind.exit_code, "").lower() != meaning:
                faults.append(f"{kind.exit_code}: {meaning}")
    return faults


def test_the_exit_codes_of_the_readme_mean_what_the_errors_say() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert code_faults(readme) == []
    wrong = readme.replace("| 7 | no lung", "| 7 | some lung")
    assert code_faults(wrong) == ["7: no lung was found where one is needed"]


def test_every_exit_code_but_that_of_several_processes_is_in_the_table() -> None:
    """How processes of one training end together is tested in test_devices.py."""
    assert {fault.error.exit_code for _, fault in ALL if fault.error} == set(CODES) - {1, 10}


REFUSED = [fault for fault in pictures.FAULTS if "MR " in fault.title]
RESULTS = {"lungs": "out/scan.nii.gz", "predict": "out/scan.nii.gz", "train": "run/run.json"}


@pytest.mark.parametrize("fault", REFUSED, ids=[fault.title for fault in REFUSED])
def test_what_does_not_look_like_ct_can_be_let_pass(fault: Fault, supplies: Supplies, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """By the option that the error names, in each command that can end with it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(PROFILES, "quick", TINY)
    fault.make(tmp_path, supplies)
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
