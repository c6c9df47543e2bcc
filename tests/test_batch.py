"""Predictions in parts: the table of one run, nothing done twice, nothing missed, no word of the machine."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import finished_run

from covidseg.batch import Part, PartRun, merge, parse_part, reports, write_table
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, InputFileError, OutputError, SettingsError
from covidseg.predict import Prediction, Predictor, load_predictor
from covidseg.store import file_hash

LEVEL = 0.3


@pytest.fixture(scope="module")
def predictor(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    return load_predictor(finished_run(tiny_phantom, tmp_path_factory.getbasetemp() / "tiny-run").folder)


@pytest.fixture
def scans(tiny_phantom: Path, tmp_path: Path) -> list[Path]:
    """Five scans, one of which is damaged, in a folder with a telling name."""
    folder = tmp_path / "secret-folder"
    shutil.copytree(tiny_phantom / "im", folder)
    (folder / "broken.nii.gz").write_bytes((folder / "phantom_00.nii.gz").read_bytes()[:3000])
    return sorted(folder.iterdir(), reverse=True)


def run(predictor: Predictor, scans: list[Path], out: Path, part: str = "1/1", level: float = LEVEL,
        probability: bool = False) -> tuple[PartRun, list[str]]:
    """One part; the work, and the names of the scans that were predicted."""
    work = PartRun(predictor, parse_part(part), {scan: out / scan.name for scan in scans}, out, level,
                   probability=probability)
    fresh = []
    for scan in work.files:
        try:
            entry, before = work.predict(scan)
        except InputFileError:
            continue
        if not before:
            fresh.append(entry["name"])
    work.write_report()
    return work, fresh


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- what belongs to a part -------------------------------------------------------------------------------------

@pytest.mark.parametrize("text", ["", "x", "0/4", "5/4", "1/0", "0/0", "-1/4", "1/-4", "1", "1/2/3", "1.5/2", "a/b",
                                  "1 / 2", "/", "1/", "٣/٤", "1/99999999"])
def test_what_is_no_part(text: str) -> None:
    with pytest.raises(SettingsError) as caught:
        parse_part(text)
    assert "--part" in str(caught.value)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_every_scan_belongs_to_one_part_whatever_the_order(count: int) -> None:
    files = [Path(f"{folder}/{name}.nii.gz") for folder in "ba" for name in "hcabd"]
    parts = [parse_part(f"{k}/{count}").of(files) for k in range(1, count + 1)]
    assert sorted(path for part in parts for path in part) == sorted(files)
    assert parts == [Part(k, count).of(files[::-1]) for k in range(1, count + 1)]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# --- reports and the table --------------------------------------------------------------------------------------

def test_a_report_says_what_was_found_and_not_where(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    work, fresh = run(predictor, scans, out)
    assert fresh == [f"phantom_0{k}" for k in range(4)]
    text = (out / "parts" / "part-1-of-1.json").read_text(encoding="utf-8")
    assert "secret-folder" not in text
    assert str(tmp_path) not in text
    report = json.loads(text)
    assert report == work.report()
    assert (report["part"], report["parts"], report["complete"]) == (1, 1, True)
    assert report["made"]["nets"] == predictor.fingerprint()
    assert report["made"]["threshold"] == LEVEL
    assert [entry["name"] for entry in report["scans"]] == ["broken", *fresh]
    failed, *done = report["scans"]
    assert failed.keys() == {"name", "status", "error", "fault"}
    assert (failed["status"], failed["error"]) == ("failed", "InputFileError")
    assert "cannot be read" in failed["fault"]
    for entry in done:
        scan, mask = scans[0].parent / f"{entry['name']}.nii.gz", out / f"{entry['name']}.nii.gz"
        found = read_scan(mask).pixels > 0
        assert entry["status"] == "done"
        assert entry["scan_sha256"] == file_hash(scan)
        assert entry["mask_sha256"] == file_hash(mask)
        assert entry["slices"] == len(found)
        assert entry["lesion_slices"] == found.any(axis=(1, 2)).sum()
        assert entry["lesion_ml"] == pytest.approx(found.sum() * np.prod(read_scan(scan).spacing) / 1000)
        assert entry["seconds"] >= 0


@pytest.mark.parametrize("harm", [b"", b"not a scan", b"\x1f\x8b", None])
def test_no_fault_names_a_folder(predictor: Predictor, scans: list[Path], tmp_path: Path, harm: bytes | None) -> None:
    scan = scans[0].parent / "broken.nii.gz"
    scan.unlink()
    if harm is None:
        scan.mkdir()
    else:
        scan.write_bytes(harm)
    work = PartRun(predictor, Part(), {scan: tmp_path / "out" / scan.name}, tmp_path / "out", LEVEL)
    with pytest.raises(InputFileError, match="secret-folder"):
        work.predict(scan)
    text = (tmp_path / "out" / "parts" / "part-1-of-1.json").read_text(encoding="utf-8")
    assert '"status": "failed"' in text
    assert "secret-folder" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_the_table_is_the_same_however_many_parts(predictor: Predictor, scans: list[Path], tmp_path: Path,
                                                  count: int) -> None:
    whole, _ = run(predictor, scans, tmp_path / "whole")
    write_table(tmp_path / "whole", [whole.report()])
    expected = (tmp_path / "whole" / "predictions.csv").read_bytes()
    out = tmp_path / "out"
    for k in reversed(range(count)):
        run(predictor, scans, out, f"{k + 1}/{count}")
    entries = merge(out)
    assert (out / "predictions.csv").read_bytes() == expected
    masks = {name: raw for name, raw in content(out).items() if name.endswith(".nii.gz")}
    assert masks == {name: raw for name, raw in content(tmp_path / "whole").items() if name.endswith(".nii.gz")}
    assert len(entries) == 5
    rows = list(csv.DictReader(expected.decode().splitlines()))
    assert [row["name"] for row in rows] == ["broken", *(f"phantom_0{k}" for k in range(4))]
    assert (rows[0]["status"], rows[0]["error"], rows[0]["lesion_ml"]) == ("failed", "InputFileError", "")
    assert {row["nets"] for row in rows} == {predictor.fingerprint()}
    assert {row["threshold"] for row in rows} == {str(LEVEL)}
    assert any(float(row["lesion_ml"]) > 0 for row in rows[1:])


# --- nothing twice ----------------------------------------------------------------------------------------------

def test_what_is_done_is_not_done_again(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    work, fresh = run(predictor, scans, out)
    before = content(out)
    again, none = run(predictor, scans, out)
    assert (len(fresh), none) == (4, [])
    assert again.report()["scans"] == work.report()["scans"], "even the seconds are those of then"
    assert content(out) == before
    assert run(predictor, scans, out, "2/3")[1] == [], "another division knows them as well"


@pytest.mark.parametrize("change", ["mask gone", "mask changed", "scan changed", "threshold", "nets", "report gone",
                                    "report damaged"])
def test_what_is_not_as_it_was_is_done_again(predictor: Predictor, scans: list[Path], tmp_path: Path,
                                             change: str) -> None:
    out = tmp_path / "out"
    run(predictor, scans, out)
    before = content(out)
    mask, report, level, nets = out / "phantom_01.nii.gz", out / "parts" / "part-1-of-1.json", LEVEL, predictor
    everything = [f"phantom_0{k}" for k in range(4)]
    expected = ["phantom_01"]
    if change == "mask gone":
        mask.unlink()
    elif change == "mask changed":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif change == "scan changed":
        scan = read_scan(scans[0].parent / "phantom_01.nii.gz")
        write_like(scan.pixels + np.int16(1), scan.grid, scan.path)
    elif change == "threshold":
        level, expected = 0.4, everything
    elif change == "nets":
        nets = replace(predictor, lung_net=None)
        expected = everything
    elif change == "report gone":
        report.unlink()
        expected = everything
    else:
        report.write_bytes(report.read_bytes()[:-20])
        expected = everything
    assert run(nets, scans, out, level=level)[1] == expected
    if change in ("mask gone", "mask changed", "report gone", "report damaged"):
        masks = {name: raw for name, raw in content(out).items() if name.endswith(".nii.gz")}
        assert masks == {name: raw for name, raw in before.items() if name.endswith(".nii.gz")}


def test_probabilities_that_are_wanted_and_not_there_are_made(predictor: Predictor, scans: list[Path],
                                                              tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(predictor, scans, out)
    assert len(run(predictor, scans, out, probability=True)[1]) == 4
    assert run(predictor, scans, out, probability=True)[1] == []
    (out / "phantom_02_probability.nii.gz").unlink()
    assert run(predictor, scans, out, probability=True)[1] == ["phantom_02"]
    assert (out / "phantom_02_probability.nii.gz").is_file()


def test_a_part_that_was_stopped_goes_on(predictor: Predictor, scans: list[Path], tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    plain, seen = Predictor.predict_file, []

    def stopped(self: Predictor, path: Path, *arguments: object, **options: object) -> Prediction:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(path.name)
        return plain(self, path, *arguments, **options)  # type: ignore[arg-type]
    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "predict_file", stopped)
        with pytest.raises(KeyboardInterrupt):
            run(predictor, scans, out)
    report, = reports(out)
    assert not report["complete"]
    assert [entry["name"] for entry in report["scans"]] == ["broken", "phantom_00"]
    with pytest.raises(DatasetError, match="part 1/1"):
        merge(out)
    assert run(predictor, scans, out)[1] == ["phantom_01", "phantom_02", "phantom_03"]
    assert len(merge(out)) == 5


def test_a_part_that_is_stopped_again_forgets_nothing(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(predictor, scans, out)
    again = PartRun(predictor, Part(), {scan: out / scan.name for scan in scans}, out, LEVEL)
    with pytest.raises(InputFileError):
        again.predict(again.files[0])  # and then it is stopped
    report, = reports(out)
    assert not report["complete"]
    assert len(report["scans"]) == 5
    assert run(predictor, scans, out)[1] == []
    part = PartRun(predictor, Part(2, 3), {scan: out / scan.name for scan in scans}, out, LEVEL)
    assert [entry["name"] for entry in part.report()["scans"]] == ["phantom_00", "phantom_03"], "only its own"


def test_without_a_folder_there_is_no_report(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    work = PartRun(predictor, Part(), {scans[0]: tmp_path / "out" / "one.nii"}, None, LEVEL)
    assert work.predict(scans[0])[1] is False
    work.write_report()
    assert list(content(tmp_path / "out")) == ["one.nii"]


def test_a_report_that_cannot_be_written(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parts").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        run(predictor, scans, tmp_path / "out")


# --- merging ----------------------------------------------------------------------------------------------------

def edit(path: Path, change: Callable[[dict], object]) -> None:
    report = json.loads(path.read_text(encoding="utf-8"))
    change(report)
    path.write_text(json.dumps(report), encoding="utf-8")


@pytest.fixture
def three(predictor: Predictor, scans: list[Path], tmp_path: Path) -> Path:
    """An output folder of three parts, all done."""
    for k in (1, 2, 3):
        run(predictor, scans, tmp_path / "out", f"{k}/3")
    return tmp_path / "out"


def test_missing_parts_are_named_with_the_command_to_run(three: Path) -> None:
    (three / "parts" / "part-2-of-3.json").unlink()
    edit(three / "parts" / "part-3-of-3.json", lambda report: report.update(complete=False))
    with pytest.raises(DatasetError, match=r"part 2/3, 3/3 is missing or not complete\. Run `covidseg predict "
                                           r"--part 2/3`, then `covidseg predict --part 3/3` with"):
        merge(three)
    assert not (three / "predictions.csv").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda report: report.update(inputs="other"), "part 2/3 was made from another list of scans than part 1/3"),
    (lambda report: report["made"].update(nets="other"), "part 2/3 was made with other nets or settings"),
    (lambda report: report["made"].update(threshold=0.9), "part 2/3 was made with other nets or settings")])
def test_parts_that_do_not_belong_together(three: Path, change: Callable[[dict], object], message: str) -> None:
    edit(three / "parts" / "part-2-of-3.json", change)
    with pytest.raises(DatasetError, match=message):
        merge(three)
    assert not (three / "predictions.csv").exists()


def test_reports_of_another_division(predictor: Predictor, three: Path, scans: list[Path]) -> None:
    run(predictor, scans, three, "2/2")
    with pytest.raises(DatasetError, match="reports of 2 and of 3 parts"):
        merge(three)


def test_a_damaged_report_counts_as_missing(three: Path) -> None:
    for harm in (b"", b"{", b"[]", b"{}", b"\xff"):
        (three / "parts" / "part-1-of-3.json").write_bytes(harm)
        with pytest.raises(DatasetError, match="part 1/3 is missing"):
            merge(three)


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_mask_that_is_not_what_was_predicted(three: Path, harm: str) -> None:
    mask = three / "phantom_02.nii.gz"
    if harm == "gone":
        mask.unlink()
    else:
        mask.write_bytes(mask.read_bytes() + b"\0")
    with pytest.raises(DatasetError, match=r"phantom_02\.nii\.gz.*not what was predicted"):
        merge(three)


def test_a_folder_without_reports(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no reports"):
        merge(tmp_path)
