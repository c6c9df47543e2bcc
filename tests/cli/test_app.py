"""The command line end to end, every documented exit code that needs no network, and what it prints."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from files import save, strict
from tiny import STAGES, TINY, TINY_BASELINES, stage_name
from typer.testing import CliRunner, Result

import covidseg
from covidseg import DISCLAIMER, __version__
from covidseg.cli import app, main
from covidseg.cli.measure import PAIRS, measured_on, sides
from covidseg.data.folder import VOLUME_COLUMNS, load_dataset, write_table
from covidseg.data.registry import load_registry
from covidseg.data.scan import Grid, read_scan, write_like
from covidseg.data.splits import read_split
from covidseg.errors import DatasetError, InputFileError, SettingsError
from covidseg.evaluation.evaluate import read_truth
from covidseg.evaluation.experiments import differences, strongest_earlier, table_lines
from covidseg.evaluation.methods import BASELINE_PROFILES, SYSTEMS
from covidseg.evaluation.verdicts import verdict_count
from covidseg.pipeline import Run
from covidseg.profiles import PROFILES

SCAN = "phantom_01.nii.gz"
ROOT = Path(__file__).resolve().parents[2]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def scan(tiny_phantom: Path) -> Path:
    return tiny_phantom / "im" / SCAN


@pytest.fixture(autouse=True)
def _tiny_profile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(PROFILES, "quick", TINY)
    monkeypatch.setitem(BASELINE_PROFILES, "quick", TINY_BASELINES)
    monkeypatch.chdir(tmp_path)  # nothing may land in the checkout


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def flat(text: str) -> str:
    """Without white space, since a terminal's width breaks lines anywhere."""
    return "".join(text.split())


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs the installed command; gives its exit code, its output and its errors."""
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["covidseg", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()
    return run


def stored(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# --- faults -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Place:
    """Where a fault is played: a folder of its own, which is the working directory, a data set and a trained run."""

    root: Path
    phantom: Path
    run: Run

    @property
    def scan(self) -> Path:
        return self.phantom / "im" / SCAN

    def write(self, name: str, content: bytes = b"in the way") -> str:
        (self.root / name).write_bytes(content)
        return name

    def copy(self, spoiled: str = "") -> str:
        """A copy of the run, one file of which is spoiled."""
        folder = Path(shutil.copytree(self.run.folder, self.root / "copy"))
        if spoiled:
            (folder / spoiled).write_bytes(b"{")
        return "copy"

    def mask(self) -> Path:
        return self.phantom / "mask" / SCAN

    def unlabelled(self) -> Path:
        """A data folder whose table has no line, and which has no masks."""
        folder = self.root / "unlabelled"
        shutil.copytree(self.phantom / "im", folder / "im")
        write_table(folder / "slice_labels.csv", VOLUME_COLUMNS, [])
        return folder

    def loop(self) -> str:
        (self.root / "loop.nii").symlink_to("loop.nii")
        return "loop.nii"

    def segmenter(self) -> str:
        return f"stages/{stage_name(self.run, 'segmenter')}"

    def predict(self, *arguments: object) -> list[object]:
        return ["predict", "--run", self.run.folder, "-o", "out", *arguments]

    def train(self, *arguments: object) -> list[object]:
        return ["train", "--data", self.phantom, "--out", "run", *arguments]

    def reproduce(self, *arguments: str) -> list[object]:
        return ["reproduce", "--data", self.phantom, "--test", self.phantom, "--out", "out", *arguments]

    def water(self) -> Path:
        noise = np.random.default_rng(0).normal(40, 5, (64, 64, 2))
        return save(noise.astype(np.int16), self.root / "water.nii.gz")


BLANK = np.zeros((9, 9, 3), np.uint8)
# At least one way to each exit code that needs no network: the code, what the message has to name, and the command.
FAULTS: dict[str, tuple[int, str, Callable[[Place], list[object]]]] = {
    "missing scan": (3, "nothing.nii.gz", lambda p: ["lungs", "nothing.nii.gz", "-o", "out"]),
    "broken scan": (3, "broken.nii", lambda p: p.predict(p.write("broken.nii.gz", p.scan.read_bytes()[:5000]))),
    "an argument that is empty": (9, "an argument is empty", lambda p: ["lungs", "", "-o", "out"]),
    "an option that is empty": (9, "--out=", lambda p: ["lungs", p.scan, "--out="]),
    "no run": (3, "run.json", lambda p: ["predict", "--run", ".", p.scan, "-o", "out"]),
    "no run to export": (3, "run.json", lambda p: ["export", ".", "-o", "out"]),
    "other shape": (3, "has shape", lambda p: [
        "evaluate", save(BLANK[:4], p.root / "m.nii"), save(BLANK, p.root / "t.nii")]),
    "other affine": (3, "affine", lambda p: [
        "evaluate", save(BLANK, p.root / "m.nii", -1, 1, 1), save(BLANK, p.root / "t.nii")]),
    "empty folder": (4, "holds no scans", lambda p: ["train", "--data", p.run.folder / "stages", "--out", "run"]),
    "no split": (4, "no split", lambda p: p.train("--part", "train")),
    "no split to reproduce": (4, "no split", lambda p: ["reproduce", "--data", p.phantom, "--out", "out"]),
    "nothing to merge": (4, "no reports", lambda p: ["merge", "out"]),
    "damaged weights": (6, "segmenter-", lambda p: ["predict", "--run", p.copy(p.segmenter()), p.scan, "-o", "out"]),
    "damaged run to export": (6, "segmenter-", lambda p: ["export", p.copy(p.segmenter()), "-o", "out"]),
    "damaged report": (6, "run.json", lambda p: ["export", p.copy("run.json"), "-o", "out"]),
    "no lung": (7, "water.nii.gz", lambda p: ["lungs", p.water(), "-o", "out"]),
    "no lung to predict": (7, "water.nii.gz", lambda p: p.predict(p.water())),
    "cannot write": (8, "cannot be written", lambda p: ["lungs", p.scan, "-o", f"{p.write('file')}/out"]),
    "cannot store": (8, "cannot be written", lambda p: ["train", "--data", p.phantom, "--out", p.write("file")]),
    "export onto itself": (8, "overwrite the run", lambda p: ["export", p.copy(), "-o", "copy"]),
    "part 0": (9, "part", lambda p: p.predict(p.scan, "--part=0/4")),
    "part 5 of 4": (9, "part", lambda p: p.predict(p.scan, "--part=5/4")),
    "part x": (9, "part", lambda p: p.predict(p.scan, "--part=x")),
    "part in one file": (9, "one file", lambda p: p.predict(p.scan, "-o", "out.nii", "--part=1/2")),
    "two in one file": (9, "one.nii", lambda p: ["lungs", p.scan, p.scan.with_name("phantom_00.nii.gz"), "-o",
                                                 "one.nii"]),
    "two of one name": (9, SCAN, lambda p: ["lungs", p.scan, p.write(SCAN), "-o", "out"]),
    "onto the scan": (9, SCAN, lambda p: ["lungs", p.write(SCAN, p.scan.read_bytes()), "-o", SCAN]),
    "beside the scan": (9, SCAN, lambda p: ["lungs", p.write(SCAN, p.scan.read_bytes()), "-o", "."]),
    "no such profile": (9, "'slow'", lambda p: p.train("--profile", "slow")),
    "no such method": (9, "'newest'", lambda p: p.train("--method", "newest")),
    "no such device": (9, "'banana'", lambda p: p.train("--device", "banana")),
    "no such profile to reproduce": (9, "'slow'", lambda p: p.reproduce("--profile", "slow")),
    "no such system": (9, "'decov-net'", lambda p: p.reproduce("--systems", "otsu,decov-net")),
    **{f"seeds {seeds!r}": (9, f"'{seeds}' is no list of different seeds",
                            lambda p, seeds=seeds: p.reproduce(f"--seeds={seeds}"))  # type: ignore[misc]
       for seeds in ("one", "0,", "0,,1", "-1", "0,0", "1.5", "0;1", "4294967296")},
    "measured on what was trained on": (4, "are trained on, too", lambda p: p.reproduce()),
    "ablated on what was trained on": (4, "are trained on, too", lambda p: [
        "ablate", "--data", p.phantom, "--test", p.phantom, "--out", "out"]),
    "measured where nothing is known": (4, "labels no slice", lambda p: [
        "reproduce", "--data", p.phantom, "--test", p.unlabelled(), "--out", "out"]),
    "ablated where nothing is known": (4, "labels no slice", lambda p: [
        "ablate", "--data", p.phantom, "--test", p.unlabelled(), "--out", "out"]),
    "verdicts where nothing is known": (4, "labels no slice", lambda p: ["verdicts", p.unlabelled()]),
    "no lung to measure in": (7, "l.nii: holds no lung", lambda p: [
        "evaluate", p.mask(), p.mask(), "--lungs", write_like(
            np.zeros(read_scan(p.mask()).pixels.shape, bool), read_scan(p.mask()).grid, p.root / "l.nii")]),
    "verdicts over labels": (9, "slice_labels.csv", lambda p: [
        "verdicts", p.phantom, "--json", p.write("slice_labels.csv", b"volume,slice,has_lesion\n")]),
    "figures over notes": (9, "source.json", lambda p: [
        "evaluate", p.mask(), p.mask(), "--json", p.write("source.json", b'{"name": "medseg1"}')]),
    "name too long": (3, "nnnnn", lambda p: ["predict", "n" * 300, "-o", "out"]),
    "name too long for lungs": (3, "nnnnn", lambda p: ["lungs", "n" * 300, "-o", "out"]),
    "folder too long": (8, "nnnnn", lambda p: ["verdicts", p.phantom, "--json", "n" * 300]),
    "link to itself": (3, "loop.nii", lambda p: p.predict(p.loop())),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_with_one_line_and_its_code(fault: str, tmp_path: Path, tiny_phantom: Path, tiny_run: Run,
                                                     command: Command) -> None:
    code, named, arguments = FAULTS[fault]
    asked = arguments(Place(tmp_path, tiny_phantom, tiny_run))
    before = {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()}
    ended, _, message = command(*asked)
    assert ended == code
    assert message.startswith("error: ")
    assert len(message.strip().splitlines()) == 1
    assert named in message
    assert "Traceback" not in message
    assert {path.name for path in tmp_path.glob("out/*")} <= {"parts", "predictions.csv"}, "no result"
    assert {path: path.read_bytes() for path in tmp_path.glob("*") if path.is_file()} == before, "nothing is replaced"


def test_wrong_usage_has_code_2_and_success_0(command: Command) -> None:
    assert command("lungs")[0] == command("predict", "--threshold", "1.5")[0] == 2
    for seed in (-1, 2 ** 32):
        for name in ("train", "ablate"):
            code, _, errors = command(name, "--data", "phantom", "--out", "run", "--seed", seed)
            assert code == 2
            assert "--seed" in errors
    assert command("--version") == (0, f"covidseg {__version__}\n", "")


def test_debug_shows_the_trace_and_is_off_again_in_the_next_call(command: Command) -> None:
    with pytest.raises(InputFileError):
        command("--debug", "lungs", "x.nii.gz", "-o", "out")
    assert command("lungs", "x.nii.gz", "-o", "out")[0] == 3


def test_a_file_that_nobody_can_open_is_one_line(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nobody thought of it: a folder that may not be searched, a disk that is gone."""
    def refused() -> None:
        raise PermissionError(13, "Permission denied", "secret/im")
    monkeypatch.setitem(main.__globals__, "app", refused)
    code, _, errors = command("train")
    assert code == 1
    assert errors == ("error: secret/im: cannot be used (Permission denied). Check its name, its permissions and the "
                      "disk.\n")


def test_train_says_how_many_slices_it_takes(tiny_phantom: Path, tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    data = copied(tiny_phantom, tmp_path / "data", {0: 0, 1: 1})
    scan = read_scan(data / "im" / SCAN)
    pixels = scan.pixels.copy()
    pixels[:2] = 40  # no lung
    write_like(pixels, scan.grid, scan.path)
    monkeypatch.setattr(Run, "segmenter", lambda run: None)
    monkeypatch.setattr("covidseg.pipeline.write_run", lambda run, command: None)
    said = invoke("train", "--data", data, "--out", "run", "--device", "cpu").output.splitlines()
    assert said[1].startswith("training on 18 labelled slices of 2 volumes, profile quick, extended, seed 0")
    assert said[2] == "2 more labelled slices are left out: they show no lung, or less than 1% of the slice is lung"


def test_threads_that_wait_sleep_unless_the_user_wants_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP reads it once, when torch is imported: nothing may import it before."""
    show = ("import os, sys; from covidseg.cli import main; main.__globals__['app'] = "
            "lambda: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules); main()")
    for before, after in (("", "passive"), ("active", "active")):
        monkeypatch.setenv("OMP_WAIT_POLICY", before)
        if not before:
            monkeypatch.delenv("OMP_WAIT_POLICY")
        done = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, cwd=ROOT)
        assert done.stdout.split() == [after, "False"], done.stderr


@pytest.mark.parametrize("name", [[], "lungs", "train", "predict", "merge", "export", "evaluate", "reproduce", "ablate",
                                  "data"])
def test_help_works_everywhere(name: str) -> None:
    result = invoke(*([name] if name else []), "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    assert name or flat(DISCLAIMER[:40]) in flat(result.output)


@pytest.mark.parametrize(("option", "find"), [
    ((), covidseg.lung_masks), (("--threshold-only",), partial(covidseg.lung_masks, threshold_only=True))])
def test_lungs_writes_masks_that_lie_on_the_scans(option, find, tiny_phantom: Path, scan: Path, tmp_path: Path) -> None:
    result = invoke("lungs", *option, tiny_phantom / "im", "-o", tmp_path / "all")
    assert result.exit_code == 0
    assert flat("lung in 10 of 10 slices") in flat(result.output)
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"phantom_0{k}.nii.gz" for k in range(4)]
    given, mask = nib.load(scan), nib.load(tmp_path / "all" / SCAN)
    assert mask.shape == given.shape
    np.testing.assert_allclose(mask.affine, given.affine)
    read = read_scan(scan)
    expected = stored(write_like(find(read), read.grid, tmp_path / "expected.nii.gz"))
    assert set(np.unique(expected)) == {0, 1}
    assert np.array_equal(stored(tmp_path / "all" / SCAN), expected)
    assert invoke("lungs", *option, scan, "-o", tmp_path / "named.nii").exit_code == 0
    assert np.array_equal(stored(tmp_path / "named.nii"), expected)


def test_a_bad_file_is_reported_and_the_others_go_on(scan: Path, tmp_path: Path, command: Command) -> None:
    (tmp_path / "scans").mkdir()
    for file in ("a.nii.gz", "c.nii.gz"):
        shutil.copy(scan, tmp_path / "scans" / file)
    (tmp_path / "scans" / "b.nii.gz").write_bytes(b"not a scan")
    code, output, errors = command("lungs", "scans", "-o", "out")
    assert code == 3
    assert errors.startswith("error: scans/b.nii.gz")
    assert "[1/3]" in output
    assert "[3/3]" in output
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_names_are_printed_as_they_are(scan: Path, tiny_run: Run, tmp_path: Path, command: Command) -> None:
    """Brackets are markup to the console, and colons pictures; in file names they are just letters."""
    shutil.copy(scan, tmp_path / "x[bold].nii.gz")
    assert "x[bold].nii.gz" in command("lungs", "x[bold].nii.gz", "-o", "out")[1]
    assert "y[/red]:x:.nii.gz" in command("lungs", "y[/red]:x:.nii.gz", "-o", "out")[2]
    long = Path("a" * 60, "nets [v2] [/final]:lungs:")
    assert f"in {long}\n" in command("export", tiny_run.folder, "-o", long)[1], "whole, however long"
    folder = Path("b" * 60, "out [1]")
    assert command("predict", "--run", tiny_run.folder, scan, "-o", folder)[0] == 0
    assert f"in {folder / 'predictions.csv'}\n" in command("merge", folder)[1]


def test_train_predict_evaluate_in_a_row(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained = invoke("train", "--data", tiny_phantom, "--out", run, "--device", "cpu", "--seed", "0")
    assert trained.exit_code == 0
    assert flat(DISCLAIMER) in flat(trained.output)
    for word in ("lungs step", "classifier step", "patches phase", "round 2: the two maps agree", "segmenter step",
                 "40 labelled slices of 4 volumes"):
        assert flat(word) in flat(trained.output)
    report = strict((run / "run.json").read_text(encoding="utf-8"))
    assert report["command"] == \
        f"covidseg train --data {tiny_phantom.name} --profile quick --method extended --seed 0"
    assert report["stages"] == {s: stage_name(tiny_run, s) for s in STAGES}, "the keys do not depend on the folder"
    again = invoke("train", "--data", tiny_phantom, "--out", run, "--device", "cpu", "--seed", "0")
    assert again.exit_code == 0
    assert "step" not in again.output, "nothing is trained a second time"
    now = strict((run / "run.json").read_text(encoding="utf-8"))
    assert now | {"finished": 0} == report | {"finished": 0}, "as it was when it was trained"

    out = tmp_path / "out"
    predicted = invoke("predict", "--run", run, tiny_phantom / "im" / SCAN, "-o", out, "--probability",
                       "--threshold", "0.3")
    assert predicted.exit_code == 0
    assert flat(DISCLAIMER) in flat(predicted.output)
    assert sorted(p.name for p in out.iterdir()) == ["parts", SCAN, "phantom_01_probability.nii.gz", "predictions.csv"]
    given, mask = nib.load(tiny_phantom / "im" / SCAN), nib.load(out / SCAN)
    maps = stored(out / "phantom_01_probability.nii.gz")
    assert mask.shape == given.shape == maps.shape
    np.testing.assert_allclose(mask.affine, given.affine)
    assert mask.get_data_dtype() == np.uint8
    assert maps.dtype == np.float32
    assert 0 <= maps.min() < maps.max() <= 1
    assert np.array_equal(stored(out / SCAN) == 1, maps >= np.float32(0.3))

    measured = invoke("evaluate", out / SCAN, tiny_phantom / "mask" / SCAN, "--json", tmp_path / "scores.json")
    assert measured.exit_code == 0
    content = strict((tmp_path / "scores.json").read_text(encoding="utf-8"))
    a, b = stored(out / SCAN) > 0, stored(tiny_phantom / "mask" / SCAN) > 0
    assert content["slices"] == 10
    assert content["micro"]["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()), abs=1e-4)


def test_an_exported_run_predicts_as_the_run(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    result = invoke("export", tiny_run.folder, "-o", tmp_path / "nets")
    assert result.exit_code == 0
    size = sum(path.stat().st_size for path in (tmp_path / "nets").rglob("*") if path.suffix != ".sha256"
               and path.is_file())
    assert flat(f"4 files, {size / 1e6:.1f} MB") in flat(result.output)
    for name, folder in (("a", tiny_run.folder), ("b", tmp_path / "nets")):
        assert invoke("predict", "--run", folder, tiny_phantom / "im" / SCAN, "-o", tmp_path / name,
                      "--probability").exit_code == 0
    for name in (SCAN, "phantom_01_probability.nii.gz"):
        assert np.array_equal(stored(tmp_path / "a" / name), stored(tmp_path / "b" / name))
    assert stored(tmp_path / "a" / "phantom_01_probability.nii.gz").any()


def test_without_a_run_the_nets_of_the_package_predict(scan: Path, tiny_run: Run, tmp_path: Path, command: Command,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("covidseg.predict.SHIPPED", tiny_run.folder)
    assert command("predict", scan, "-o", "default", "--probability")[0] == 0
    monkeypatch.setattr("covidseg.predict.SHIPPED", tmp_path / "weights")
    code, _, errors = command("predict", scan, "-o", "none")
    assert code == 3
    assert "weights" in errors
    assert not (tmp_path / "none").exists()
    assert command("predict", scan, "--run", tiny_run.folder, "-o", "named", "--probability")[0] == 0
    default, named = (stored(tmp_path / name / "phantom_01_probability.nii.gz") for name in ("default", "named"))
    assert np.array_equal(default, named)


@pytest.mark.parametrize("name", ["lungs", "predict"])
def test_volume_or_stack_reaches_the_lungs(name: str, tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    """One slice without lung parts the volume: as one body it has no lung below it, as a stack it has."""
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    pixels = scan.pixels.copy()
    pixels[1] = 40
    path = write_like(pixels, scan.grid, tmp_path / "parted.nii.gz")
    extra = ["--run", tiny_run.folder, "--probability"] if name == "predict" else []
    slices = {}
    for choice in ("--volume", "--stack", None):
        out = tmp_path / f"out{choice}"
        assert invoke(name, path, *extra, *([choice] if choice else []), "-o", out).exit_code == 0
        result = read_scan(out / ("parted_probability.nii.gz" if extra else "parted.nii.gz")).pixels
        slices[choice] = np.flatnonzero((result > 0).any(axis=(1, 2))).tolist()
    assert slices["--volume"] == slices[None] == list(range(2, 10))
    assert slices["--stack"] == [0, *range(2, 10)]


def test_a_folder_named_by_dots_has_its_own_name_in_results(tiny_phantom: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny_phantom / "im")
    found = tuple(map(str, (tiny_phantom.resolve(), (tiny_phantom / "im").resolve())))
    assert sides("..", ".") == found
    assert sides("medseg", None) == PAIRS["medseg"]
    assert sides("mine", "left-out") == ("mine", "left-out")


@pytest.mark.parametrize("command", ["train", "reproduce", "ablate"])
def test_unchecked_reaches_the_run(command: str, tiny_phantom: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """See test_faults.py for scans that are refused without it."""
    def start(*given: object, check: bool, **named: object) -> None:
        raise InputFileError(f"checked: {check}")
    monkeypatch.setattr("covidseg.pipeline.open_run", start)
    asked = (command, "--data", tiny_phantom, "--out", "run", *(("--test", tiny_phantom) * (command != "train")))
    for options, check in (((), True), (("--unchecked",), False)):
        with pytest.raises(InputFileError, match=f"checked: {check}"):
            invoke(*asked, *options)


def test_the_method_reaches_the_settings(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    extended = strict((folder / "run.json").read_text(encoding="utf-8"))
    result = invoke("train", "--data", tiny_phantom, "--out", folder, "--device", "cpu", "--method", "faithful")
    assert result.exit_code == 0
    assert flat("profile quick, faithful") in flat(result.output)
    faithful = strict((folder / "run.json").read_text(encoding="utf-8"))
    assert "--method faithful" in faithful["command"]
    assert (extended["settings"]["method"], faithful["settings"]["method"]) == ("extended", "faithful")
    for stage in ("mil", "segmenter"):
        assert extended["settings"][stage]["paint"]["share"] > 0
        assert faithful["settings"][stage]["paint"]["share"] == 0, "no lesion is painted"
        assert faithful["settings"][stage]["paint"] | {"share": 0.85} == extended["settings"][stage]["paint"]
    # What comes before the first painted slice is read from the folder, the rest is trained again.
    assert "lungs step" not in result.output
    same = {stage for stage in STAGES if extended["stages"][stage] == faithful["stages"][stage]}
    assert same == {"threshold", "lung_net", "weak", "classifier1", "cam1"}
    assert invoke("predict", "--run", folder, tiny_phantom / "im" / SCAN, "-o", tmp_path / "out").exit_code == 0


def check_table(folder: Path, systems: list[str], seeds: list[int], slices: int) -> dict:
    content = strict((folder / "table1.json").read_text(encoding="utf-8"))
    assert content["note"] == DISCLAIMER
    assert [(r["seed"], r["system"]) for r in content["results"]] == [(s, n) for s in seeds for n in systems]
    for result in content["results"]:
        assert result["slices"] == len(result["counts"]) == slices
        for row in result["rows"]:
            assert row["threshold"] is None or 0 < row["threshold"] < 1
            assert row["micro"]["dice"] is None or 0 <= row["micro"]["dice"] <= 1
    assert content["settings"]["prepare"]["size"] == TINY.prepare.size
    assert content["rivals"]["ad3d_mil"]["steps"] == TINY_BASELINES.ad3d_mil.steps
    return content


def copied(phantom: Path, folder: Path, volumes: dict[int, int], brighter: int = 0) -> Path:
    """A data folder of volumes of the phantom: for each its number here and its number there; other scans if brighter.
    """
    lines = (phantom / "slice_labels.csv").read_text(encoding="utf-8").splitlines()
    table = lines[:1]
    for new, old in ((f"phantom_{new:02d}", f"phantom_{old:02d}") for new, old in volumes.items()):
        for part in ("im", "mask"):
            (folder / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(phantom / part / f"{old}.nii.gz", folder / part / f"{new}.nii.gz")
        if brighter:
            scan = read_scan(folder / "im" / f"{new}.nii.gz")
            write_like(scan.pixels + np.int16(brighter), scan.grid, scan.path)
        table += [line.replace(old, new) for line in lines if line.startswith(old)]
    (folder / "slice_labels.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
    return folder


def test_reproduce_on_a_folder_of_its_own(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_run.folder, folder / "seed0")
    (folder / "seed0" / "run.json").unlink()
    test = copied(tiny_phantom, tmp_path / "measured", {1: 1}, brighter=1)
    command = ["reproduce", "--data", tiny_phantom, "--test", test, "--out", folder, "--device", "cpu"]
    result = invoke(*command)
    assert result.exit_code == 0
    assert flat(DISCLAIMER) in flat(result.output)
    content = check_table(folder, list(SYSTEMS), [0], 10)
    assert content["seconds"] > 0
    assert content["test"] == "measured"
    assert content["command"] == (f"covidseg reproduce --data {tiny_phantom.name} --test measured --profile quick "
                                  "--seeds 0")
    assert set(content["data"]) == {f"phantom_0{k}" for k in range(4)}
    assert set(content["test_data"]) == {f"{kind}/{SCAN}" for kind in ("im", "mask")}
    for path in (tmp_path, tiny_phantom.parent, Path.home()):
        assert str(path) not in json.dumps(content), "reports name no folder of this machine"
    table = table_lines(content["results"])
    for line in table:
        assert flat(line.title) in flat(result.output)
        assert f"{line.micro[0, 4]:.3f}" in result.output, "specificity, which is always defined"
    for sentence in differences(table, strongest_earlier(content["results"]) or ""):
        assert flat(sentence) in flat(result.output)

    run = strict((folder / "seed0" / "run.json").read_text(encoding="utf-8"))
    assert run["command"] == f"{content['command']} (seed 0)"
    assert run["stages"] == {s: stage_name(tiny_run, s) for s in STAGES}, "the run of the extended method"
    out = tmp_path / "predicted"
    assert invoke("predict", "--run", folder / "seed0", tiny_phantom / "im" / SCAN, "-o", out).exit_code == 0
    assert invoke("predict", "--run", tiny_run.folder, tiny_phantom / "im" / SCAN, "-o", tmp_path / "x").exit_code == 0
    assert np.array_equal(stored(out / SCAN), stored(tmp_path / "x" / SCAN))

    again = invoke(*command)
    assert again.exit_code == 0
    assert "step" in result.output
    assert "step" not in again.output, "nothing is trained a second time"
    assert "system:" not in again.output, "nor measured"
    assert check_table(folder, list(SYSTEMS), [0], 10)["results"] == content["results"]


def test_reproduce_where_only_labels_are_known(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_run.folder, folder / "seed0")
    test = copied(tiny_phantom, tmp_path / "labelled", {1: 1, 2: 2}, brighter=1)
    shutil.rmtree(test / "mask")
    result = invoke("reproduce", "--data", tiny_phantom, "--test", test, "--out", folder, "--device", "cpu",
                    "--systems", "otsu,extended")
    assert result.exit_code == 0
    assert "step" not in result.output, "what was trained for another test set serves again"
    content = strict((folder / "verdicts.json").read_text(encoding="utf-8"))
    assert not (folder / "table1.json").exists()
    assert [(r["system"], r["slices"]) for r in content["results"]] == [("otsu", 20), ("extended", 20)]
    assert set(content["test_data"]) == {"im/phantom_01.nii.gz", "im/phantom_02.nii.gz"}
    assert flat(verdict_count(content["results"])) in flat(result.output)
    assert f"{content['results'][1]['verdict_auc']:.3f}" in result.output


def test_reproduce_leaves_patients_out(tiny_phantom: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    command = ["--data", tiny_phantom, "--test", "left-out", "--device", "cpu"]
    result = invoke("reproduce", *command, "--systems", "otsu", "--out", folder)
    assert result.exit_code == 0
    content = strict((folder / "left-out.json").read_text(encoding="utf-8"))
    assert content["test"] == "patients left out in turn"
    assert content["command"].startswith(f"covidseg reproduce --data {tiny_phantom.name} --test left-out --profile")
    assert set(content["test_data"]) == {f"im/{name}.nii.gz" for name in content["data"]}, "masks are not opened"
    assert len(list((folder / "seed0").glob("without-*"))) == len(content["data"])
    assert not (folder / "seed0" / "run.json").exists(), "no run was trained on all of them"
    assert flat(verdict_count(content["results"])) in flat(result.output)
    with pytest.raises(SettingsError, match="leaves no patients out"):
        invoke("ablate", *command)


def test_volumes_without_a_mask_are_not_measured(tiny_phantom: Path, tmp_path: Path,
                                                 capsys: pytest.CaptureFixture[str]) -> None:
    """As in MosMedData, where fifty volumes have one and the normal ones have none."""
    test = Path(shutil.copytree(tiny_phantom, tmp_path / "measured"))
    (test / "mask" / SCAN).unlink()
    data, name = measured_on("unused", str(test))
    assert name == "measured"
    assert len(data.cases) == len(load_dataset(tiny_phantom).cases) - 1
    assert all(case.mask is not None for case in data.cases)
    assert "1 of 4 volumes of measured" in capsys.readouterr().out.replace("\n", " ")
    shutil.rmtree(test / "mask")
    with pytest.raises(DatasetError, match="no lesion mask"):
        next(read_truth(measured_on("unused", str(test))[0]))


def test_one_name_stands_for_both_sets_of_the_published_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the data there is nothing to train: the error names the set that has to be fetched first."""
    assert sides("medseg", None) == ("medseg2", "medseg1")
    assert sides("medseg", "zenodo20") == ("medseg2", "zenodo20")
    assert sides("phantom", None) == ("phantom", None)
    assert {name for pair in PAIRS.values() for name in pair} <= set(load_registry())
    monkeypatch.setenv("COVIDSEG_DATA", str(tmp_path))
    for command in ("reproduce", "ablate"):
        with pytest.raises(DatasetError, match="covidseg data get medseg1"):
            invoke(command, "--data", "medseg")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "medseg").mkdir()
    assert sides("medseg", None) == ("medseg", None), "a folder of that name is itself"


def test_reproduce_on_the_split_of_a_registered_set(tiny_phantom: Path, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """The split names twelve volumes: the four of the tiny phantom stand in for them, three times over."""
    cache = copied(tiny_phantom, tmp_path / "cache" / "phantom", {k: k % 4 for k in range(12)})
    monkeypatch.setattr("covidseg.pipeline.resolve", lambda name: cache)
    command = ["reproduce", "--data", "phantom", "--device", "cpu", "--systems", "decovnet,otsu"]
    assert invoke(*command, "--seeds", "3").exit_code == 0
    folder = tmp_path / "runs" / "phantom-quick"
    before = check_table(folder, ["otsu", "decovnet"], [3], 4 * 10)
    result = invoke(*command, "--seeds", "3,1")
    assert result.exit_code == 0
    content = check_table(folder, ["otsu", "decovnet"], [3, 1], 4 * 10)
    assert content["results"][:2] == before["results"], "the seed that was done is read"
    assert content["test"] == "phantom (test side)"
    assert content["command"] == ("covidseg reproduce --data phantom --profile quick --seeds 3,1 "
                                  "--systems decovnet,otsu")
    assert "±" in result.output
    assert sorted(path.name for path in folder.iterdir()) == ["seed1", "seed3", "table1-1.json", "table1.json"]
    assert strict((folder / "table1-1.json").read_text(encoding="utf-8")) == before, "the other question's stays"
    assert flat("kept as table1-1.json") in flat(result.output)
    assert invoke(*command, "--seeds", "3,1").exit_code == 0
    assert not (folder / "table1-2.json").exists(), "the same once more says nothing else"
    assert not list(folder.glob("seed*/run.json")), "without the extended method there is no run to predict with"
    assert not list(folder.glob("seed*/stages/segmenter-*"))
    split = read_split("phantom")
    assert set(content["data"]) == set(split.part("train"))
    measured = {name.split(":")[0] for result in content["results"] for name in result["counts"]}
    assert measured == set(split.part("test"))
    assert set(content["test_data"]) == {f"{kind}/{name}.nii.gz" for name in measured for kind in ("im", "mask")}


@pytest.mark.slow
@pytest.mark.realct
def test_a_few_slices_of_real_scans_run_through(realct: Path, tmp_path: Path) -> None:
    """What lungs and probabilities of real scans have to be like is in the tests of those modules."""
    rows: list[tuple[str, int, int]] = []
    for case in load_dataset(realct / "medseg9").cases[:2]:
        scan = read_scan(case.image)
        middle = sorted(case.labels, key=lambda k: abs(k - len(scan.pixels) / 2))
        kept = sorted(k for label in (0, 1) for k in [k for k in middle if case.labels[k] == label][:4])
        _, height, width = scan.pixels.shape
        write_like(scan.pixels[kept], Grid((width, height, len(kept)), np.diag((-1.0, -1.0, 5.0, 1.0))),
                   tmp_path / "real" / "im" / f"{case.id}.nii.gz")
        rows += [(case.id, k, case.labels[old]) for k, old in enumerate(kept)]
    write_table(tmp_path / "real" / "slice_labels.csv", VOLUME_COLUMNS, rows)
    assert len(rows) == 16
    scans = sorted((tmp_path / "real" / "im").iterdir())
    assert invoke("lungs", *scans, "-o", tmp_path / "lungs").exit_code == 0
    assert invoke("train", "--data", tmp_path / "real", "--out", tmp_path / "run", "--device", "cpu").exit_code == 0
    result = invoke("predict", "--run", tmp_path / "run", *scans, "-o", tmp_path / "out", "--probability")
    assert result.exit_code == 0
    for scan_path in scans:
        maps = stored(tmp_path / "out" / f"{scan_path.name.removesuffix('.nii.gz')}_probability.nii.gz")
        assert maps.shape == stored(tmp_path / "out" / scan_path.name).shape == stored(scan_path).shape
        assert maps.any()
