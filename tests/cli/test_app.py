"""The command line end to end, every documented exit code that needs no network, and what it prints."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from tiny import STAGES, TINY, TINY_BASELINES, all_stages, finished_run, quiet, stage_name
from typer.testing import CliRunner, Result

from covidseg import DISCLAIMER, __version__
from covidseg.cli import app, main
from covidseg.cli.measure import PAIRS, measured_on, sides
from covidseg.data.folder import load_dataset
from covidseg.data.registry import load_registry
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, InputFileError
from covidseg.evaluation.evaluate import read_truth
from covidseg.evaluation.experiments import differences, strongest_earlier, table_lines
from covidseg.evaluation.methods import BASELINE_PROFILES, SYSTEMS
from covidseg.lungs import lung_masks
from covidseg.pipeline import Run, find_lungs, write_run
from covidseg.predict import export_run, load_predictor
from covidseg.preprocess import uncrop
from covidseg.profiles import PROFILES

SCAN = "phantom_01.nii.gz"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path) -> Run:
    return finished_run(tiny_phantom)


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


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of the installed command."""
    monkeypatch.setattr(sys, "argv", ["covidseg", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def strict(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are faults."""
    def refuse(name: str) -> None:
        raise ValueError(name)
    return json.loads(text, parse_constant=refuse)


def save(array: np.ndarray, path: Path) -> Path:
    nib.save(nib.Nifti1Image(array, np.eye(4)), path)
    return path


def stored(path: Path) -> np.ndarray:
    return np.asarray(nib.load(path).dataobj)


# One way to each exit code; a code is (arguments, what the message has to name).

def nothing_to_export(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["export", root, "-o", root / "out"], "run.json"


def damaged_run_to_export(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    copy = Path(shutil.copytree(run.folder, root / "copy"))
    path = copy / "stages" / stage_name(run, "segmenter")
    path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)
    return ["export", copy, "-o", root / "out"], path.name


def damaged_report_to_export(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    copy = Path(shutil.copytree(run.folder, root / "copy"))
    (copy / "run.json").write_text("{")
    return ["export", copy, "-o", root / "out"], "run.json"


def export_onto_itself(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    copy = Path(shutil.copytree(run.folder, root / "copy"))
    return ["export", copy, "-o", root / "copy"], "overwrite the run"


def missing_scan(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["lungs", root / "nothing.nii.gz", "-o", root / "out"], "nothing.nii.gz"


def broken_scan(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    (root / "broken.nii.gz").write_bytes((phantom / "im" / SCAN).read_bytes()[:5000])
    return ["predict", "--run", run.folder, root / "broken.nii.gz", "-o", root / "out"], "broken.nii.gz"


def no_run(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["predict", "--run", root, phantom / "im" / SCAN, "-o", root / "out"], "run.json"


def other_shape(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    mask = save(np.ones((4, 4, 4), np.uint8), root / "mask.nii.gz")
    return ["evaluate", mask, phantom / "mask" / SCAN], "mask.nii.gz"


def empty_folder(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    (root / "empty").mkdir()
    return ["train", "--data", root / "empty", "--out", root / "run"], "holds no scans"


def no_split(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["train", "--data", phantom, "--out", root / "run", "--part", "train"], "no split"


def damaged_weights(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    copy = Path(shutil.copytree(run.folder, root / "copy"))
    path = copy / "stages" / stage_name(run, "segmenter")
    path.write_bytes(path.read_bytes()[:-8] + b"\xff" * 8)
    return ["predict", "--run", copy, phantom / "im" / SCAN, "-o", root / "out"], path.name


def no_lung(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    rng = np.random.default_rng(0)
    empty = save(rng.normal(40, 5, (64, 64, 2)).astype(np.int16), root / "water.nii.gz")
    return ["lungs", empty, "-o", root / "out"], "water.nii.gz"


def no_lung_to_predict(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    _, name = no_lung(root, phantom, run)
    return ["predict", "--run", run.folder, root / name, "-o", root / "out"], name


def cannot_write(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    (root / "file").write_text("in the way")
    return ["lungs", phantom / "im" / SCAN, "-o", root / "file" / "out"], "cannot be written"


def cannot_store(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    (root / "file").write_text("in the way")
    return ["train", "--data", phantom, "--out", root / "file"], "cannot be written"


def no_such_profile(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["train", "--data", phantom, "--out", root / "run", "--profile", "slow"], "'slow'"


def no_such_method(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["train", "--data", phantom, "--out", root / "run", "--method", "newest"], "'newest'"


def reproduce(root: Path, phantom: Path, *options: str) -> list[object]:
    return ["reproduce", "--data", phantom, "--test", phantom, "--out", root / "out", *options]


def no_such_profile_to_reproduce(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return reproduce(root, phantom, "--profile", "slow"), "'slow'"


def no_such_system(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return reproduce(root, phantom, "--systems", "otsu,decov-net"), "'decov-net'"


def no_such_seed(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return reproduce(root, phantom, "--seeds", "0,one"), "'0,one'"


def no_split_to_reproduce(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["reproduce", "--data", phantom, "--out", root / "out"], "no split"


def predict_part(root: Path, phantom: Path, run: Run, part: str) -> tuple[list[object], str]:
    return ["predict", "--run", run.folder, phantom / "im", "-o", root / "out", f"--part={part}"], "part"


def part_0(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return predict_part(root, phantom, run, "0/4")


def part_5_of_4(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return predict_part(root, phantom, run, "5/4")


def part_x(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return predict_part(root, phantom, run, "x")


def part_in_one_file(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["predict", "--run", run.folder, phantom / "im" / SCAN, "-o", root / "out.nii", "--part=1/2"], "one file"


def nothing_to_merge(root: Path, phantom: Path, run: Run) -> tuple[list[object], str]:
    return ["merge", root / "out"], "no reports"


@pytest.mark.parametrize(("code", "case"), [
    (9, part_0), (9, part_5_of_4), (9, part_x), (9, part_in_one_file), (4, nothing_to_merge),
    (3, missing_scan), (3, broken_scan), (3, no_run), (3, other_shape), (4, empty_folder), (4, no_split),
    (6, damaged_weights), (7, no_lung), (7, no_lung_to_predict), (8, cannot_write), (8, cannot_store),
    (9, no_such_profile), (9, no_such_method), (9, no_such_profile_to_reproduce),
    (9, no_such_system), (9, no_such_seed), (4, no_split_to_reproduce),
    (3, nothing_to_export), (6, damaged_run_to_export), (6, damaged_report_to_export), (8, export_onto_itself)])
def test_every_fault_ends_with_one_line_and_its_code(
        code: int, case: object, tmp_path: Path, tiny_phantom: Path, tiny_run: Run,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, named = case(tmp_path, tiny_phantom, tiny_run)  # type: ignore[operator]
    assert run_main(monkeypatch, *arguments) == code
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert len(message.strip().splitlines()) == 1
    assert named in message
    assert "Traceback" not in message
    assert {path.name for path in tmp_path.glob("out/*")} <= {"parts", "predictions.csv"}, "no result"


def test_several_scans_do_not_fit_into_one_file(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    scans = [tiny_phantom / "im" / f"phantom_0{k}.nii.gz" for k in (0, 1)]
    assert run_main(monkeypatch, "lungs", *scans, "-o", tmp_path / "one.nii.gz") == 9
    assert "one.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "one.nii.gz").exists()


def test_wrong_usage_has_code_2_and_success_0(monkeypatch: pytest.MonkeyPatch,
                                              capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(monkeypatch, "lungs") == 2
    assert run_main(monkeypatch, "predict", "--threshold", "1.5") == 2
    assert run_main(monkeypatch, "--version") == 0
    assert __version__ in capsys.readouterr().out


def test_debug_shows_the_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["covidseg", "--debug", "lungs", f"{tmp_path}/x.nii.gz", "-o", f"{tmp_path}/o"])
    with pytest.raises(InputFileError):
        main()


def test_debug_is_off_again_in_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["covidseg", "--debug", "lungs", f"{tmp_path}/x.nii.gz", "-o", f"{tmp_path}/o"])
    with pytest.raises(InputFileError):
        main()
    assert run_main(monkeypatch, "lungs", tmp_path / "x.nii.gz", "-o", tmp_path / "o") == 3


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


@pytest.mark.parametrize("command", [[], ["lungs"], ["train"], ["predict"], ["merge"], ["export"], ["evaluate"],
                                     ["reproduce"], ["ablate"], ["data"]])
def test_help_works_everywhere(command: list[str]) -> None:
    result = invoke(*command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.output
    if not command:
        assert flat(DISCLAIMER[:40]) in flat(result.output)


def test_lungs_writes_a_mask_that_lies_on_the_scan(tiny_phantom: Path, tmp_path: Path) -> None:
    result = invoke("lungs", tiny_phantom / "im" / SCAN, "-o", tmp_path / "out")
    assert result.exit_code == 0
    given, mask = nib.load(tiny_phantom / "im" / SCAN), nib.load(tmp_path / "out" / SCAN)
    assert mask.shape == given.shape
    np.testing.assert_allclose(mask.affine, given.affine)
    assert set(np.unique(stored(tmp_path / "out" / SCAN))) == {0, 1}
    scan = read_scan(tiny_phantom / "im" / SCAN)
    expected = write_like(lung_masks(scan.pixels), scan.grid, tmp_path / "expected.nii.gz")
    assert np.array_equal(stored(tmp_path / "out" / SCAN), stored(expected))
    assert flat("lung in") in flat(result.output)


def test_lungs_of_a_folder_and_as_a_named_file(tiny_phantom: Path, tmp_path: Path) -> None:
    assert invoke("lungs", tiny_phantom / "im", "-o", tmp_path / "all").exit_code == 0
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == [f"phantom_0{k}.nii.gz" for k in range(4)]
    assert invoke("lungs", tiny_phantom / "im" / SCAN, "-o", tmp_path / "named.nii").exit_code == 0
    assert np.array_equal(stored(tmp_path / "named.nii"), stored(tmp_path / "all" / SCAN))


@pytest.mark.parametrize("command", ["lungs", "predict"])
def test_a_bad_file_is_reported_and_the_others_go_on(command: str, tiny_phantom: Path, tmp_path: Path, tiny_run: Run,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a.nii.gz", "c.nii.gz"):
        shutil.copy(tiny_phantom / "im" / SCAN, scans / name)
    (scans / "b.nii.gz").write_bytes(b"not a scan")
    extra = ["--run", tiny_run.folder] if command == "predict" else []
    assert run_main(monkeypatch, command, scans, *extra, "-o", tmp_path / "out") == 3
    output = capsys.readouterr()
    assert output.err.startswith("error: ")
    assert "b.nii.gz" in output.err
    assert "[1/3]" in output.out
    assert "[3/3]" in output.out
    assert sorted(p.name for p in (tmp_path / "out").glob("*.nii.gz")) == ["a.nii.gz", "c.nii.gz"]


def test_names_with_brackets_are_printed_as_they_are(tiny_phantom: Path, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    """Square brackets are markup to the console; in file names they are just letters."""
    shutil.copy(tiny_phantom / "im" / SCAN, tmp_path / "x[bold].nii.gz")
    assert run_main(monkeypatch, "lungs", tmp_path / "x[bold].nii.gz", "-o", tmp_path / "out") == 0
    assert "x[bold].nii.gz" in capsys.readouterr().out
    assert run_main(monkeypatch, "lungs", tmp_path / "y[red].nii.gz", "-o", tmp_path / "out") == 3
    assert "y[red].nii.gz" in capsys.readouterr().err


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
    assert report["best_round"] == tiny_run.best()

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


def test_without_a_run_the_nets_of_the_package_predict(tiny_phantom: Path, tiny_run: Run, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Nets with a segmenter of their own stand in for those of the package, so that it shows which ones were used."""
    run = Run(tiny_run.data, replace(TINY, segmenter=replace(TINY.segmenter, steps=1)), 0,
              Path(shutil.copytree(tiny_run.folder, tmp_path / "run")), "cpu", quiet)
    all_stages(run)
    write_run(run, "a test")
    export_run(run.folder, tmp_path / "shipped")
    monkeypatch.setattr("covidseg.predict.SHIPPED", tmp_path / "shipped")
    scan = tiny_phantom / "im" / SCAN
    assert invoke("predict", scan, "-o", tmp_path / "default", "--probability").exit_code == 0
    assert invoke("predict", scan, "--run", run.folder, "-o", tmp_path / "same", "--probability").exit_code == 0
    assert invoke("predict", scan, "--run", tiny_run.folder, "-o", tmp_path / "other", "--probability").exit_code == 0
    default, same, other = (stored(tmp_path / name / "phantom_01_probability.nii.gz")
                            for name in ("default", "same", "other"))
    assert np.array_equal(default, same)
    assert not np.array_equal(default, other), "a run that is named goes before"


def test_nets_of_the_package_that_are_not_there(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("covidseg.predict.SHIPPED", tmp_path / "weights")
    assert run_main(monkeypatch, "predict", tiny_phantom / "im" / SCAN, "-o", tmp_path / "out") == 3
    assert "weights" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["lungs", "predict"])
def test_volume_or_stack_reaches_the_lungs(command: str, tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    """One slice without lung parts the volume: as one body it has no lung below it, as a stack it has."""
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    pixels = scan.pixels.copy()
    pixels[1] = 40
    path = write_like(pixels, scan.grid, tmp_path / "parted.nii.gz")
    extra = ["--run", tiny_run.folder, "--probability"] if command == "predict" else []
    slices = {}
    for choice in ("--volume", "--stack", None):
        out = tmp_path / f"out{choice}"
        assert invoke(command, path, *extra, *([choice] if choice else []), "-o", out).exit_code == 0
        result = read_scan(out / ("parted_probability.nii.gz" if extra else "parted.nii.gz")).pixels
        slices[choice] = np.flatnonzero((result > 0).any(axis=(1, 2))).tolist()
    assert slices["--volume"] == slices[None] == list(range(2, 10))
    assert slices["--stack"] == [0, *range(2, 10)]


def test_a_second_training_in_the_same_folder_trains_nothing(tiny_phantom: Path, tiny_run: Run,
                                                             tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    before = strict((run / "run.json").read_text(encoding="utf-8"))
    result = invoke("train", "--data", tiny_phantom, "--out", run, "--device", "cpu")
    assert result.exit_code == 0
    assert "step" not in result.output
    after = strict((run / "run.json").read_text(encoding="utf-8"))
    for part in ("stages", "seconds", "best_round"):
        assert after[part] == before[part], "as it was when it was trained"
    assert after["command"] != before["command"]


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


def test_reproduce_on_a_folder_of_its_own(tiny_phantom: Path, tiny_run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(tiny_run.folder, folder / "seed0")
    (folder / "seed0" / "run.json").unlink()
    test = tmp_path / "measured"
    for part in ("im", "mask"):
        (test / part).mkdir(parents=True)
        shutil.copy(tiny_phantom / part / SCAN, test / part)
    lines = (tiny_phantom / "slice_labels.csv").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if line.startswith(("volume", "phantom_01"))]
    (test / "slice_labels.csv").write_text("\n".join(kept))
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
    assert set(content["test_data"]) == {SCAN}
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
        read_truth(measured_on("unused", str(test))[0])


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
    cache = tmp_path / "cache" / "phantom"
    lines = (tiny_phantom / "slice_labels.csv").read_text(encoding="utf-8").splitlines()
    table = lines[:1]
    for k in range(12):
        old, new = f"phantom_{k % 4:02d}", f"phantom_{k:02d}"
        for part in ("im", "mask"):
            (cache / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(tiny_phantom / part / f"{old}.nii.gz", cache / part / f"{new}.nii.gz")
        table += [line.replace(old, new) for line in lines if line.startswith(old)]
    (cache / "slice_labels.csv").write_text("\n".join(table) + "\n", encoding="utf-8")
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
    assert sorted(path.name for path in folder.iterdir()) == ["seed1", "seed3", "table1.json"]
    assert not list(folder.glob("seed*/run.json")), "without the extended method there is no run to predict with"
    assert not list(folder.glob("seed*/stages/segmenter-*"))
    trained = set(content["data"])
    with (Path(__file__).parents[2] / "data" / "splits" / "phantom.csv").open(encoding="utf-8") as stream:
        sides = {row["volume"]: row["split"] for row in csv.DictReader(stream)}
    assert {sides[name] for name in trained} == {"train"}
    assert len(trained) == list(sides.values()).count("train")
    measured = {name.split(":")[0] for result in content["results"] for name in result["counts"]}
    assert {sides[name] for name in measured} == {"test"}
    assert {name for name in content["test_data"]} == {f"{name}.nii.gz" for name in measured}


@pytest.mark.parametrize("seeds", ["", "one", "0,", "0,,1", "-1", "0,0", "1.5", "0;1"])
def test_seeds_are_numbers_with_commas(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       capsys: pytest.CaptureFixture[str], seeds: str) -> None:
    code = run_main(monkeypatch, "reproduce", "--data", tiny_phantom, "--test", tiny_phantom, "--out",
                    tmp_path / "out", f"--seeds={seeds}")
    assert code == 9
    message = capsys.readouterr().err
    assert f"'{seeds}' is no list of different seeds" in message
    assert "--seeds 0,1,2" in message
    assert not (tmp_path / "out").exists(), "before anything is trained"


@pytest.fixture
def drawn(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Prediction, truth and lung of three slices of 10 x 10, made so that every figure is a simple fraction.

    Stored as (columns, rows, slices) with unit affine. Slice 0: 20 predicted, 20 true, 10 shared. Slice 1: nothing
    predicted, nothing true. Slice 2: 10 true, all missed. The lung holds the left half of slices 0 and 2.
    """
    prediction, truth, lung = (np.zeros((10, 10, 3), np.uint8) for _ in range(3))
    prediction[0:2, :, 0] = 1
    truth[1:3, :, 0] = 1
    truth[9, :, 2] = 1
    truth[0:5, 0, 2] = 1
    truth[9, 5:, 2] = 0            # 5 + 5 pixels
    lung[:5, :, [0, 2]] = 1
    return (save(prediction, tmp_path / "p.nii.gz"), save(truth, tmp_path / "t.nii.gz"),
            save(lung, tmp_path / "l.nii.gz"))


def test_evaluate_against_figures_by_hand(drawn: tuple[Path, Path, Path]) -> None:
    table = invoke("evaluate", drawn[0], drawn[1])
    assert table.exit_code == 0
    assert "0.400" in table.output
    assert "not a medical device" in " ".join(table.output.split())
    result = invoke("evaluate", drawn[0], drawn[1], "--json", "-")
    content = strict(result.output)
    # 10 hits, 10 false alarms, 10 + 10 missed, 70 + 100 + 90 rest.
    assert content == {
        "slices": 3,
        "micro": {"dice": 0.4, "iou": 0.25, "ppv": 0.5, "sensitivity": 0.3333, "specificity": round(260 / 270, 4)},
        "macro": {"dice": 0.25, "iou": 0.1667, "ppv": 0.25, "sensitivity": 0.25,
                  "specificity": round((70 / 80 + 1 + 1) / 3, 4)}}


def test_evaluate_inside_a_lung_mask_by_hand(drawn: tuple[Path, Path, Path], tmp_path: Path) -> None:
    result = invoke("evaluate", drawn[0], drawn[1], "--lungs", drawn[2], "--json", tmp_path / "deep" / "s.json")
    assert result.exit_code == 0
    content = strict((tmp_path / "deep" / "s.json").read_text())
    # Slices 0 and 2, 50 pixels each: 10 hits, 10 false alarms, 10 + 5 missed, 20 + 45 rest.
    assert content == {
        "slices": 2,
        "micro": {"dice": round(20 / 45, 4), "iou": round(10 / 35, 4), "ppv": 0.5, "sensitivity": 0.4,
                  "specificity": round(65 / 75, 4)},
        "macro": {"dice": 0.25, "iou": 0.1667, "ppv": 0.25, "sensitivity": 0.25,
                  "specificity": round((2 / 3 + 1) / 2, 4)}}


def test_undefined_figures_are_null_not_nan(tmp_path: Path) -> None:
    nothing = save(np.zeros((6, 6, 2), np.uint8), tmp_path / "nothing.nii.gz")
    content = strict(invoke("evaluate", nothing, nothing, "--json", "-").output)
    assert content["micro"]["dice"] is None
    assert content["macro"]["ppv"] is None
    assert content["micro"]["specificity"] == 1
    inside = strict(invoke("evaluate", nothing, nothing, "--lungs", nothing, "--json", "-").output)
    assert set(inside["micro"].values()) == {None}


def test_a_mask_of_another_affine_is_refused(drawn: tuple[Path, Path, Path], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch) -> None:
    nib.save(nib.Nifti1Image(stored(drawn[0]), np.diag([-1.0, 1.0, 1.0, 1.0])), tmp_path / "turned.nii.gz")
    assert run_main(monkeypatch, "evaluate", tmp_path / "turned.nii.gz", drawn[1]) == 3


@pytest.fixture
def real_slices(realct: Path, tmp_path: Path) -> Path:
    """A data folder with a few slices of two real volumes that carry both labels."""
    folder = tmp_path / "real"
    with (realct / "medseg9" / "slice_labels.csv").open(newline="", encoding="utf-8") as stream:
        table = list(csv.DictReader(stream))
    rows = [["volume", "slice", "has_lesion"]]
    for volume in sorted({row["volume"] for row in table}):
        labels = {int(r["slice"]): int(r["has_lesion"]) for r in table if r["volume"] == volume}
        scan = read_scan(realct / "medseg9" / "im" / f"{volume}.nii.gz")
        middle = sorted(labels, key=lambda k: abs(k - len(scan.pixels) / 2))
        chosen = [[k for k in middle if labels[k] == label][:4] for label in (0, 1)]
        if len(rows) > 1 + 8 or min(map(len, chosen)) < 4:
            continue
        kept = sorted(chosen[0] + chosen[1])
        (folder / "im").mkdir(parents=True, exist_ok=True)
        upright = np.transpose(scan.pixels[kept], (2, 1, 0))
        nib.save(nib.Nifti1Image(upright, np.diag([-1.0, -1.0, 5.0, 1.0])), folder / "im" / f"{volume}.nii.gz")
        rows += [[volume, str(k), str(labels[old])] for k, old in enumerate(kept)]
    with (folder / "slice_labels.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows(rows)
    return folder


@pytest.mark.slow
@pytest.mark.realct
def test_real_scans_run_through(real_slices: Path, tmp_path: Path) -> None:
    scans = sorted((real_slices / "im").iterdir())
    assert len(scans) == 2
    assert invoke("lungs", *scans, "-o", tmp_path / "lungs").exit_code == 0
    for scan in scans:
        share = (stored(tmp_path / "lungs" / scan.name) > 0).mean(axis=(0, 1))
        assert (share > 0.02).mean() >= 0.5  # at the ends of a volume there is hardly any lung
        assert share.max() < 0.6
    assert invoke("train", "--data", real_slices, "--out", tmp_path / "run", "--device", "cpu").exit_code == 0
    result = invoke("predict", "--run", tmp_path / "run", *scans, "-o", tmp_path / "out", "--probability")
    assert result.exit_code == 0
    predictor = load_predictor(tmp_path / "run")
    for scan in scans:
        pixels = read_scan(scan).pixels
        found, crops = find_lungs(pixels, predictor.lung_net, predictor.profile)
        masks = np.zeros(pixels.shape, bool)  # the lung net's, which complete those of the threshold
        for k, mask, box in zip(found, crops.lungs, crops.boxes, strict=True):
            masks[k] = uncrop(mask, box, pixels.shape[1:]) > 0
        lung = np.transpose(masks, (2, 1, 0))
        maps = stored(tmp_path / "out" / f"{scan.name.removesuffix('.nii.gz')}_probability.nii.gz")
        assert stored(tmp_path / "out" / scan.name).shape == maps.shape == lung.shape
        assert (maps[~lung] == 0).all()
        assert (maps[lung] > 0).mean() > 0.9


def test_a_result_never_replaces_a_scan(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = Path(shutil.copy(tiny_phantom / "im" / SCAN, tmp_path / SCAN))
    before = scan.read_bytes()
    for out in (tmp_path, scan):
        assert run_main(monkeypatch, "lungs", scan, "-o", out) == 9
    assert scan.read_bytes() == before


def test_results_of_the_same_name_are_refused(tiny_phantom: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    again = shutil.copy(tiny_phantom / "im" / SCAN, tmp_path / "other" / SCAN)
    assert run_main(monkeypatch, "lungs", tiny_phantom / "im" / SCAN, again, "-o", tmp_path / "out") == 9
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_not_there_is_one_line(tiny_phantom: Path, tmp_path: Path,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device in ("cuda", "banana"):
        code = run_main(monkeypatch, "train", "--data", tiny_phantom, "--out", tmp_path / "r", "--device", device)
        assert code == 9
