"""``covidseg lungs``, ``predict`` and ``merge``: parts, tables, and where results go."""

from __future__ import annotations

import operator
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from dicoms import write_series
from tiny import content, finished_run
from typer.testing import CliRunner, Result

from covidseg import predict as predicting
from covidseg.atomic import MARK
from covidseg.batch import Part, tables
from covidseg.cli import app
from covidseg.cli.common import state
from covidseg.cli.predict import targets_of
from covidseg.data.scan import Grid, read_scan, write_like
from covidseg.errors import CovidsegError, InputFileError, OutputError, ScanWarning, SettingsError
from covidseg.predict import lung_masks


@pytest.fixture(scope="module")
def run(tiny_phantom: Path) -> Path:
    return finished_run(tiny_phantom).folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_parts_and_their_merged_table_are_those_of_one_run(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    options = ["--run", run, tiny_phantom / "im", "--threshold", 0.3]
    assert invoke("predict", *options, "-o", tmp_path / "whole").exit_code == 0
    out = tmp_path / "out"
    first = invoke("predict", *options, "-o", out, "--part", "2/3")
    assert first.exit_code == 0
    assert "[1/1] phantom_01.nii.gz" in first.output
    assert names(out) == ["parts", "phantom_01.nii.gz"], "no table before all is done"
    early = invoke("merge", out)
    assert early.exit_code != 0
    assert not (out / "predictions.csv").exists()
    for part in ("1/3", "3/3"):
        assert invoke("predict", *options, "-o", out, "--part", part).exit_code == 0
    merged = invoke("merge", out)
    assert merged.exit_code == 0
    assert "4 scans" in merged.output
    assert (out / "predictions.csv").read_bytes() == (tmp_path / "whole" / "predictions.csv").read_bytes()
    assert names(out / "parts") == [f"part-{k}-of-3.csv" for k in (1, 2, 3)]
    assert names(tmp_path / "whole") == ["parts", *(f"phantom_0{k}.nii.gz" for k in range(4)), "predictions.csv"]


def test_a_second_run_says_that_nothing_was_to_be_done(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    options = ["predict", "--run", run, tiny_phantom / "im", "-o", tmp_path / "out"]
    assert "as predicted before" not in invoke(*options).output
    times = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}
    again = invoke(*options)
    assert again.exit_code == 0
    assert again.output.count("as predicted before") == 4
    assert times == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.nii.gz")}


def test_previews_are_written_where_they_are_asked_for(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    options = ["predict", "--run", run, tiny_phantom / "im" / "phantom_01.nii.gz", "-o", tmp_path / "out"]
    assert invoke(*options).exit_code == 0
    assert names(tmp_path / "out") == ["parts", "phantom_01.nii.gz", "predictions.csv"]
    assert "as predicted before" not in invoke(*options, "--preview").output
    page = (tmp_path / "out" / "phantom_01_preview.html").read_text(encoding="utf-8")
    assert "<title>phantom_01: lesions in chest CT</title>" in page
    assert "of a training run, named by --run" in page
    assert str(tmp_path) not in page
    assert "as predicted before" in invoke(*options, "--preview").output


def test_a_bad_scan_has_a_row_and_an_exit_code(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    scans = Path(shutil.copytree(tiny_phantom / "im", tmp_path / "scans"))
    (scans / "bad.nii.gz").write_bytes(b"not a scan")
    for part in ("1/2", "2/2"):  # the bad one comes first in order of names
        result = invoke("predict", "--run", run, scans, "-o", tmp_path / "out", "--part", part)
        assert result.exit_code == (3 if part == "1/2" else 0)
    merged = invoke("merge", tmp_path / "out")
    assert merged.exit_code == 3, "as predict said itself"
    assert "5 scans, 1 of them failed" in merged.output
    row = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1]
    assert row.startswith("bad,failed,InputFileError,,,,")


def test_a_named_file_comes_without_a_report(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    scan, mask = tiny_phantom / "im" / "phantom_01.nii.gz", tmp_path / "out" / "mask.nii.gz"
    assert invoke("predict", "--run", run, scan, "-o", mask).exit_code == 0
    assert names(tmp_path / "out") == ["mask.nii.gz"]
    before = mask.read_bytes()
    assert isinstance(invoke("predict", "--run", run, scan, "-o", mask, "--stack").exception, OutputError)
    assert mask.read_bytes() == before
    assert invoke("predict", "--run", run, scan, "-o", mask, "--threshold", 1, "--overwrite").exit_code == 0
    assert mask.read_bytes() != before


@pytest.mark.parametrize("command", ["lungs", "predict"])
def test_true_masks_are_not_replaced(command: str, tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    nets = ["--run", run] if command == "predict" else ["--threshold-only"]
    options, before = [command, *nets, data / "im", "-o", data / "mask"], content(data)
    refused = invoke(*options)
    assert isinstance(refused.exception, OutputError)
    assert "mask/phantom_00.nii.gz: is there already, as are 3 more, and would be replaced" in str(refused.exception)
    assert content(data) == before
    assert invoke(*options, "--overwrite").exit_code == 0
    after = content(data)
    assert all(after[name] != raw for name, raw in before.items() if name.startswith("mask/"))


def test_a_lesion_mask_is_not_replaced_by_a_lung(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    assert invoke("predict", "--run", run, scan, "-o", tmp_path / "out").exit_code == 0
    assert isinstance(invoke("lungs", "--threshold-only", scan, "-o", tmp_path / "out").exception, OutputError)


@pytest.mark.parametrize(("command", "made"), [("lungs", "lungs_of_scan"), ("predict", "Predictor._lesions")])
def test_an_error_that_nobody_expects_is_that_of_one_scan(command: str, made: str, tiny_phantom: Path, run: Path,
                                                          tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = operator.attrgetter(made)(predicting)

    def fails_on_one(*given: Any, **named: Any) -> Any:
        if any(getattr(one, "path", tmp_path).name == "phantom_01.nii.gz" for one in given):
            raise ValueError("operands could not\nbe broadcast")
        return whole(*given, **named)
    monkeypatch.setattr(f"covidseg.predict.{made}", fails_on_one)
    out, nets = tmp_path / "out", ["--run", run] if command == "predict" else ["--threshold-only"]
    result = invoke(command, *nets, tiny_phantom / "im", "-o", out)
    assert result.exit_code == 1
    assert sorted(path.name for path in out.glob("*.nii.gz")) == [f"phantom_0{k}.nii.gz" for k in (0, 2, 3)]
    assert result.stderr == (
        f"error: {tiny_phantom / 'im' / 'phantom_01.nii.gz'}: stopped at an error that covidseg does not expect "
        "(ValueError: operands could not be broadcast). Please report it with the trace that `covidseg --debug` "
        "shows.\n")
    if command == "predict":
        assert "\nphantom_01,failed,ValueError,,,," in (out / "predictions.csv").read_text()
    alone = invoke(command, *nets, tiny_phantom / "im" / "phantom_01.nii.gz", "-o", out)
    assert isinstance(alone.exception, CovidsegError)
    try:
        debugged = invoke("--debug", command, *nets, tiny_phantom / "im", "-o", tmp_path / "debug")
    finally:
        state["debug"] = False
    assert isinstance(debugged.exception, ValueError), "with its trace"


def test_thousands_of_scans_have_their_targets_at_once(tmp_path: Path) -> None:
    scans = [tmp_path / f"{k}.nii.gz" for k in range(5000)]
    targets = targets_of(tmp_path / "out", scans)
    assert len(set(targets.values())) == 5000
    with pytest.raises(SettingsError, match="several inputs are called 4999"):
        targets_of(tmp_path / "out", [*scans, tmp_path / "other" / "4999.nii"])


@pytest.fixture
def series(tiny_phantom: Path, tmp_path: Path) -> Path:
    """A phantom as a folder of DICOM slices."""
    scan = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    slices, rows, columns = scan.spacing
    write_series(tmp_path / "case.7" / "deep", scan.pixels, (0, 0, slices), PixelSpacing=[rows, columns])
    return tmp_path / "case.7"


def test_a_folder_of_dicom_slices_is_one_scan(series: Path, run: Path, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    scan = read_scan(series)
    nifti = write_like(scan.pixels, scan.grid, tmp_path / "same.nii.gz")
    for number, command in enumerate((["predict", "--run", run], ["lungs"])):
        out = tmp_path / str(number)
        result = invoke(*command, series, nifti, "-o", out)
        assert result.exit_code == 0, result.output
        assert "[1/2] case.7: " in result.output
        mask, same = nib.load(out / "case.7.nii.gz"), nib.load(out / "same.nii.gz")
        assert np.asanyarray(mask.dataobj).any()
        np.testing.assert_array_equal(mask.dataobj, same.dataobj)
        np.testing.assert_array_equal(mask.affine, same.affine)
    monkeypatch.chdir(series)
    assert invoke("lungs", ".", "-o", tmp_path / "dot").exit_code == 0
    assert names(tmp_path / "dot") == ["case.7.nii.gz"]
    assert isinstance(invoke("lungs", ".", "-o", "out").exception, SettingsError)
    assert not (series / "out").exists()


def test_a_mask_is_not_written_among_the_slices(series: Path, run: Path, tmp_path: Path) -> None:
    """The folder would then hold both kinds of files, and no longer be a scan."""
    one = sorted((series / "deep").iterdir())[5]
    for out in (series / "deep", series / "deep" / "mask.nii.gz"):
        refused = invoke("predict", "--run", run, one, "-o", out)
        assert isinstance(refused.exception, SettingsError)
        assert "among the slices" in str(refused.exception)
    alone = Path(shutil.copy(one, tmp_path / "alone.dcm"))
    for source, out in ((one, tmp_path / "out"), (one, series / "deep" / "masks"), (alone, tmp_path / "mask.nii.gz")):
        assert invoke("predict", "--run", run, source, "-o", out).exit_code == 0


def test_the_series_can_be_named_and_is_remembered(series: Path, run: Path, tmp_path: Path) -> None:
    files = sorted((series / "deep").iterdir())
    write_series(series / "other", read_scan(series).pixels[:8], (0, 0, 5), SeriesInstanceUID="1.2.777777")
    options = ["predict", "--run", run, series, "-o", tmp_path / "out"]
    first = invoke(*options)
    assert first.exit_code == 0
    assert "warning: case.7: took the series with most slices of 2" in first.output
    assert "as predicted before" in (again := invoke(*options).output)
    assert "warning: case.7: took the series" in again, "it is still so"
    assert "took the series" in (tmp_path / "out" / "predictions.csv").read_text()
    second = invoke(*options, "--series", "2")
    assert "of 8 slices, wrote" in second.output
    assert "warning" not in second.output
    files[0].unlink()
    other = invoke(*options, "--series", "2")
    assert isinstance(other.exception, OutputError), "the folder is another"
    assert "wrote" in invoke(*options, "--series", "2", "--overwrite").output
    assert isinstance(invoke(*options, "--series", "5").exception, InputFileError)
    listed = invoke("data", "series", series)
    assert listed.exit_code == 0
    assert listed.output.splitlines()[1].startswith("2: CT, 8 slices of 128 x 128, ")
    assert isinstance(invoke("data", "series", tmp_path / "out").exception, InputFileError)


@pytest.mark.parametrize("command", ["lungs", "predict"])
def test_folders_that_hold_no_series_of_ct(command: str, tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for tags, words in (({}, "without files"), ({"Modality": "MR"}, "is MR, not CT"),
                        ({"Modality": "CT", "ImageType": ["LOCALIZER"]}, "is a localizer")):
        if tags:
            write_series(tmp_path / "scans", np.zeros((1, 6, 5)), **tags)
        result = invoke(command, tmp_path / "scans", "-o", tmp_path / "out")
        assert isinstance(result.exception, InputFileError)
        assert words in str(result.exception)
    scan = write_like(np.zeros((2, 6, 5), np.int16), Grid((5, 6, 2), np.eye(4)), tmp_path / "flat.nii.gz")
    several = invoke(command, tmp_path / "scans", scan, "-o", tmp_path / "out")
    assert several.exit_code == (7 if command == "lungs" else 3), "of the last bad one; predict sorts them"
    assert "is a localizer" in several.output
    assert "flat.nii.gz: no lung was found" in several.output
    (tmp_path / "scans" / "one.nii.gz").touch()
    assert "holds both" in str(invoke(command, tmp_path / "scans", "-o", tmp_path / "out").exception)
# --- names, outputs and ends ------------------------------------------------------------------------------------------

def test_no_output_of_a_call_replaces_a_scan_or_another_output(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    for name in ("c", "c_probability"):
        shutil.copy(tiny_phantom / "im" / "phantom_01.nii.gz", tmp_path / f"{name}.nii.gz")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    options = ["predict", "--run", run, "--probability", "-o"]
    one = invoke(*options, tmp_path / "c.nii.gz", tmp_path / "c_probability.nii.gz")
    two = invoke(*options, tmp_path / "out", tmp_path)
    for result, words in ((one, "would replace a scan"), (two, "inputs are called c and c_probability")):
        assert isinstance(result.exception, SettingsError)
        assert words in str(result.exception)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(targets_of(tmp_path / "out", [tmp_path / "c.nii.gz", tmp_path / "c_probability.nii.gz"])) == 2


def test_a_later_call_adds_to_the_table_of_an_earlier_one(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for number in (2, 1, 1):
        scan = tiny_phantom / "im" / f"phantom_0{number}.nii.gz"
        assert invoke("predict", "--run", run, scan, "-o", out).exit_code == 0
    for table in (out / "predictions.csv", out / "parts" / "part-1-of-1.csv"):
        lines = table.read_text().splitlines()
        assert [line.split(",")[:2] for line in lines[1:]] == [["phantom_01", "done"], ["phantom_02", "done"]]
    assert "2 scans" in invoke("merge", out).output
    scan = tiny_phantom / "im" / "phantom_03.nii.gz"
    assert invoke("predict", "--run", run, scan, "-o", out, "--threshold", 0.9).exit_code == 0
    assert "phantom_03 (in part 1/1) was made with other nets" in str(invoke("merge", out).exception)
    (out / "phantom_03.nii.gz").unlink()  # taken back
    assert invoke("predict", "--run", run, tiny_phantom / "im" / "phantom_01.nii.gz", "-o", out).exit_code == 0
    assert "2 scans" in invoke("merge", out).output


def test_parts_of_another_list_are_not_mixed(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    first, second = (tiny_phantom / "im" / f"phantom_0{k}.nii.gz" for k in (1, 2))
    assert invoke("predict", "--run", run, first, "-o", tmp_path / "out", "--part", "1/2").exit_code == 0
    before = (tmp_path / "out" / "parts" / "part-1-of-2.csv").read_bytes()
    result = invoke("predict", "--run", run, second, "-o", tmp_path / "out", "--part", "1/2")
    assert isinstance(result.exception, SettingsError)
    assert "another list of scans, with phantom_01" in str(result.exception)
    assert (tmp_path / "out" / "parts" / "part-1-of-2.csv").read_bytes() == before


TWICE = """
import contextlib
from covidseg.cli import main
for _ in range(2):
    with contextlib.suppress(SystemExit):
        main()
"""


@pytest.mark.skipif(sys.platform == "darwin", reason="file names are UTF-8 there")
def test_a_name_that_is_no_utf8_is_shown_escaped(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    name, out = os.fsdecode(b"caf\xe9.nii.gz"), tmp_path / "out"
    (tmp_path / "scans").mkdir()
    shutil.copy(tiny_phantom / "im" / "phantom_01.nii.gz", tmp_path / "scans" / name)
    command = [sys.executable, "-c", TWICE, "predict", "--run", run, tmp_path / "scans", "-o", out]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert said.count("caf\\udce9.nii.gz: ") == 2
    assert said.index(", wrote ") < said.index(", as predicted before in ")
    assert (out / name).exists()
    assert (out / "predictions.csv").read_text(encoding="utf-8").splitlines()[1].startswith("caf\\xe9,done,")
    assert "1 scans" in invoke("merge", out).output


def test_what_a_header_contradicts_itself_in_is_said(tiny_phantom: Path, run: Path, tmp_path: Path) -> None:
    image = nib.load(tiny_phantom / "im" / "phantom_01.nii.gz")
    image.header["pixdim"][3] *= 0.75
    nib.save(image, tmp_path / "scan.nii.gz")
    for command in (["predict", "--run", run], ["lungs", "--threshold-only"]):
        result = invoke(*command, tmp_path / "scan.nii.gz", "-o", tmp_path / command[0])
        assert "warning: scan.nii.gz: its sform says voxels of" in result.stderr
        assert "its pixdim" in result.stderr
    assert "its pixdim" in (tmp_path / "predict" / "predictions.csv").read_text()
    with pytest.warns(ScanWarning, match="its pixdim"):
        lung_masks(tmp_path / "scan.nii.gz", threshold_only=True)


ENDED = """
import os, signal, sys
from pathlib import Path
from covidseg import atomic, batch, cli

def write(path):
    if path.parent.name == "out" and path.name.startswith(atomic.MARK):
        os.kill(os.getpid(), signal.{signal})  # while the mask is written
flush = atomic._flush
atomic._flush = lambda path: (write(path), flush(path))
sys.argv = ["covidseg", *sys.argv[1:]]
cli.main()
"""


@pytest.mark.weekly
@pytest.mark.parametrize(("name", "code", "left"), [("SIGTERM", 143, 0), ("SIGKILL", -signal.SIGKILL, 1)])
def test_nothing_is_left_of_a_call_that_was_ended(tiny_phantom: Path, run: Path, tmp_path: Path, name: str, code: int,
                                                  left: int) -> None:
    scans, out = sorted((tiny_phantom / "im").iterdir())[:2], tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", ENDED.format(signal=name), "predict", "--run", run, *scans, "-o", out],
                          capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert len(list(out.glob(f"{MARK}*"))) == left
    assert [row["status"] for row in tables(out)[Part()]] == ["open", "open"]
    assert invoke("lungs", "--threshold-only", scans[0], "-o", out).exit_code == 0
    assert list(out.glob(f"{MARK}*")) == []
