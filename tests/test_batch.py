"""Predictions in parts: the table of one run, nothing done twice, nothing missed, no word of the machine."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import content
from typer.testing import CliRunner

from covidseg.batch import MADE, Part, PartRun, merge, parse_part, tables, write_table
from covidseg.cli import app
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, InputFileError, NoLungError, OutputError, SettingsError
from covidseg.pipeline import Run
from covidseg.predict import Predictor, load_predictor
from covidseg.store import file_hash

LEVEL = 0.3


@pytest.fixture(scope="module")
def predictor(tiny_run: Run) -> Predictor:
    return load_predictor(tiny_run.folder)


@pytest.fixture
def scans(tiny_phantom: Path, tmp_path: Path) -> list[Path]:
    """Five scans, one of which is damaged, in a folder with a telling name."""
    folder = tmp_path / "secret-folder"
    shutil.copytree(tiny_phantom / "im", folder)
    (folder / "broken.nii.gz").write_bytes((folder / "phantom_00.nii.gz").read_bytes()[:3000])
    return sorted(folder.iterdir(), reverse=True)


def run(predictor: Predictor, scans: list[Path], out: Path, part: str = "1/1", level: float = LEVEL,
        probability: bool = False, preview: bool = False, overwrite: bool = False) -> list[str]:
    """One part; the names of the scans that were predicted, and not done before."""
    work = PartRun(predictor, parse_part(part), {scan: out / scan.name for scan in scans}, out, level,
                   probability=probability, preview=preview, overwrite=overwrite)
    fresh = []
    for scan in work.files:
        with suppress(InputFileError):
            row, before = work.predict(scan)
            fresh += [] if before else [row["name"]]
    if part == "1/1":
        write_table(out, work.table())
    return fresh


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


# --- tables -----------------------------------------------------------------------------------------------------

GOOD = [f"phantom_0{k}" for k in range(4)]


def test_a_table_says_what_was_found_and_not_where(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(predictor, scans, out) == GOOD
    text = (out / "parts" / "part-1-of-1.csv").read_text(encoding="utf-8")
    assert "secret-folder" not in text
    assert str(tmp_path) not in text
    failed, *done = tables(out)[Part()]
    assert (failed["name"], failed["status"], failed["error"]) == ("broken", "failed", "InputFileError")
    assert "cannot be read" in failed["fault"]
    assert failed["mask_sha256"] == failed["slices"] == ""
    assert [row["name"] for row in done] == GOOD
    for row in done:
        scan, mask = scans[0].parent / f"{row['name']}.nii.gz", out / f"{row['name']}.nii.gz"
        found = read_scan(mask).pixels > 0
        assert (row["status"], row["error"], row["fault"]) == ("done", "", "")
        assert (row["nets"], row["threshold"]) == (predictor.fingerprint(), str(LEVEL))
        assert (row["scan_sha256"], row["mask_sha256"]) == (file_hash(scan), file_hash(mask))
        assert (row["slices"], row["lesion_slices"]) == (str(len(found)), str(found.any(axis=(1, 2)).sum()))
        assert row["lesion_ml"] == f"{found.sum() * np.prod(read_scan(scan).spacing) / 1000:.3f}"


@pytest.mark.parametrize("harm", [b"", b"not a scan", None])
def test_no_fault_names_a_folder_and_without_an_output_folder_there_is_no_table(
        predictor: Predictor, scans: list[Path], tmp_path: Path, harm: bytes | None) -> None:
    scan, out = scans[0].parent / "broken.nii.gz", tmp_path / "out"
    scan.unlink()
    if harm is None:
        scan.mkdir()
    else:
        scan.write_bytes(harm)
    with pytest.raises(InputFileError, match="secret-folder"):
        PartRun(predictor, Part(), {scan: out / scan.name}, out, LEVEL).predict(scan)
    text = (out / "parts" / "part-1-of-1.csv").read_text(encoding="utf-8")
    assert "failed" in text
    assert "secret-folder" not in text
    shutil.rmtree(out)
    assert PartRun(predictor, Part(), {scans[0]: out / "one.nii"}, None, LEVEL).predict(scans[0])[1] is False
    assert list(content(out)) == ["one.nii"]
    (out / "parts").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        run(predictor, scans, out)


def test_the_table_is_the_same_however_many_parts(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    def but_for_parts(out: Path) -> dict[str, bytes]:
        return {name: raw for name, raw in content(out).items() if "parts" not in name}
    run(predictor, scans, tmp_path / "whole")
    expected = but_for_parts(tmp_path / "whole")
    for count in (1, 3, 8):
        out = tmp_path / str(count)
        for k in reversed(range(count)):
            run(predictor, scans, out, f"{k + 1}/{count}")
        assert len(merge(out)) == 5
        assert but_for_parts(out) == expected
    failed, *rows = csv.DictReader(expected["predictions.csv"].decode().splitlines())
    assert [row["name"] for row in (failed, *rows)] == ["broken", *GOOD]
    assert (failed["status"], failed["error"], failed["lesion_ml"]) == ("failed", "InputFileError", "")
    assert any(float(row["lesion_ml"]) > 0 for row in rows)


# --- nothing twice ----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def done(predictor: Predictor, tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder in which the four scans of the phantom are done, probabilities included."""
    out = tmp_path_factory.mktemp("done")
    run(predictor, sorted((tiny_phantom / "im").iterdir()), out, probability=True)
    return out


def test_what_is_done_is_not_done_again(predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    good, before = [scan for scan in scans if "phantom" in scan.name], content(out)
    assert run(predictor, good, out, probability=True) == run(predictor, good, out) == []
    assert content(out) == before
    assert run(predictor, good, out, "2/3") == [], "another division knows them as well"
    (out / "phantom_02_probability.nii.gz").unlink()
    assert run(predictor, good, out) == []
    assert run(predictor, good, out, probability=True) == ["phantom_02"]
    assert content(out).items() >= before.items()


def test_what_goes_with_a_mask_is_made_where_it_is_missing_or_out_of_date(
        predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path) -> None:
    out, good = Path(shutil.copytree(done, tmp_path / "out")), [scan for scan in scans if "phantom" in scan.name]
    before, page = content(out), out / "phantom_01_preview.html"
    assert run(predictor, good, out, preview=True) == GOOD
    assert content(out).items() >= {key: raw for key, raw in before.items() if key.endswith(".nii.gz")}.items()
    assert run(predictor, good, out, probability=True, preview=True) == [], "what was there before counts still"
    first = page.read_bytes()
    page.unlink()
    assert run(predictor, good, out) == []
    assert run(predictor, good, out, preview=True) == ["phantom_01"]
    assert page.read_bytes() == first
    changed = read_scan(next(scan for scan in good if "phantom_01" in scan.name))
    write_like(changed.pixels[::-1].copy(), changed.grid, changed.path)
    assert run(predictor, good, out, overwrite=True) == ["phantom_01"]
    assert run(predictor, good, out, probability=True) == run(predictor, good, out, preview=True) == ["phantom_01"]
    assert page.read_bytes() != first


def brighter(scan: Path) -> None:
    given = read_scan(scan)
    write_like(given.pixels + np.int16(1), given.grid, scan)


@pytest.mark.parametrize(("change", "expected"), [
    (lambda mask, table, scan: mask.unlink(), GOOD[1:2]),
    (lambda mask, table, scan: (brighter(scan), mask.unlink()), GOOD[1:2]),
    ({"level": 0.4}, GOOD), ("no lung net", GOOD),
    (lambda mask, table, scan: table.unlink(), GOOD), (lambda mask, table, scan: cut(table, 20), GOOD),
    (lambda mask, table, scan: edit(table, covidseg="0.0.1"), GOOD[:1])],
    ids=["mask gone", "scan changed", "threshold", "nets", "table gone", "table damaged",
         "another version"])
def test_what_is_not_as_it_was_is_done_again(predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path,
                                             change: Any, expected: list[str]) -> None:
    out, scan = Path(shutil.copytree(done, tmp_path / "out")), scans[0].parent / "phantom_01.nii.gz"
    before, original = content(out), scan.read_bytes()
    if callable(change):
        change(out / scan.name, out / "parts" / "part-1-of-1.csv", scan)
    nets = replace(predictor, lung_net=None) if change == "no lung net" else predictor
    assert run(nets, scans, out, **(change if isinstance(change, dict) else {})) == expected
    if callable(change) and scan.read_bytes() == original:
        assert content(out)[scan.name] == before[scan.name]


def inverted(scan: Path) -> None:
    """A picture in which air is bright: it is none of CT."""
    given = read_scan(scan)
    write_like(given.pixels.max() + given.pixels.min() - given.pixels, given.grid, scan)


def test_a_result_that_was_let_pass_unchecked_is_no_checked_one(predictor: Predictor, scans: list[Path],
                                                                tmp_path: Path) -> None:
    scan, out = scans[0], tmp_path / "out"
    inverted(scan)

    def result(check: bool, overwrite: bool = False) -> str:
        """The status, and whether that was so before; or the error."""
        work = PartRun(predictor, Part(), {scan: out / scan.name}, out, LEVEL, check=check, overwrite=overwrite)
        with suppress(InputFileError):
            row, before = work.predict(scan)
            return f"{row['status']}{', as before' if before else ''}"
        return tables(out)[Part()][0]["error"]
    assert [result(True), result(False), result(False)] == ["InputFileError", "done", "done, as before"]
    assert result(True) == "InputFileError", "it counts only where nobody asks"
    assert out.joinpath(scan.name).exists(), "what was made is still there"
    assert result(False) == "done", "and may be replaced, since a table still knows it"
    shutil.copy(scans[1], scan)
    assert [result(True, True), result(False)] == ["done", "done, as before"], "what passed counts in both"


@pytest.mark.parametrize(("error", "fault"), [
    (ValueError("secret-folder is odd"), "an error that covidseg does not expect; --debug shows its trace"),
    (PermissionError(13, "Permission denied", "secret-folder"), "Permission denied")])
def test_any_error_is_in_the_row_of_its_scan(predictor: Predictor, scans: list[Path], tmp_path: Path,
                                             monkeypatch: pytest.MonkeyPatch, error: Exception, fault: str) -> None:
    def fails(*given: object, **named: object) -> None:
        raise error
    monkeypatch.setattr(Predictor, "predict_file", fails)
    out = tmp_path / "out"
    work = PartRun(predictor, Part(), {scan: out / scan.name for scan in scans[:2]}, out, LEVEL)
    with pytest.raises(type(error)):
        work.predict(work.files[0])
    rows = tables(out)[Part()]
    assert [(row["status"], row["error"], row["fault"]) for row in rows] == [
        ("failed", type(error).__name__, fault), ("open", "", "")]
    assert "secret-folder" not in (out / "parts" / "part-1-of-1.csv").read_text()


# --- what may be replaced ---------------------------------------------------------------------------------------

def start(predictor: Predictor, scans: list[Path], out: Path, **options: Any) -> PartRun:
    return PartRun(predictor, Part(), {scan: out / scan.name for scan in scans}, out, LEVEL, **options)


def good(scans: list[Path]) -> list[Path]:
    return [scan for scan in scans if "phantom" in scan.name]


@pytest.mark.parametrize("name", ["phantom_02.nii.gz", "predictions.csv", "phantom_02_preview.html"])
def test_files_that_no_table_accounts_for_stay(name: str, predictor: Predictor, scans: list[Path],
                                               tmp_path: Path) -> None:
    """True masks in the folder of a data set, somebody's own table."""
    out = tmp_path / "mask"
    out.mkdir()
    (out / name).write_bytes(b"name,score\na,1\n")
    for _ in range(2):  # a call that was refused accounts for nothing
        with pytest.raises(OutputError, match=rf"{name}: is there already and would be replaced.*--overwrite"):
            start(predictor, good(scans), out, preview=True)
    assert content(out) == {name: b"name,score\na,1\n"}
    assert start(predictor, good(scans), out, preview=True, overwrite=True).files
    if "preview" in name:
        assert start(predictor, good(scans), out).files, "which is not written here"


def test_a_mask_that_was_corrected_stays(predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    for number in (1, 2):
        (out / f"phantom_0{number}.nii.gz").write_bytes(b"by hand")
    before = content(out)
    for options in ({}, {"check": False}, {"volume": True}):
        with pytest.raises(OutputError, match=r"phantom_0\d\.nii\.gz: is there already, as are 1 more, and would"):
            start(predictor, good(scans), out, **options)
    assert content(out) == before
    work = start(predictor, good(scans), out, overwrite=True)
    assert [work.predict(scan)[1] for scan in work.files] == [True, False, False, True]
    assert run(predictor, good(scans), out) == [], "made here again"


@pytest.mark.parametrize("part", ["1/1", "1/2"])
@pytest.mark.parametrize("forgotten", [False, True])
def test_a_mask_of_another_scan_of_that_name_stays(part: str, forgotten: bool, predictor: Predictor, scans: list[Path],
                                                   done: Path, tmp_path: Path) -> None:
    """Two patients' scans, both called ct; or one that was exported once more, which nobody can tell from that."""
    out, scan = Path(shutil.copytree(done, tmp_path / "out")), scans[0].parent / "phantom_01.nii.gz"
    if forgotten:
        shutil.rmtree(out / "parts")  # but the table of all scans is there
    before = content(out)
    brighter(scan)
    for _ in range(2):
        work = PartRun(predictor, parse_part(part), {scan: out / scan.name}, out, LEVEL + 0.1)
        with pytest.raises(OutputError, match=r"phantom_01\.nii\.gz: was made from another scan.*--overwrite"):
            work.predict(scan)
        assert content(out)[scan.name] == before[scan.name]
    row, = (row for row in tables(out)[parse_part(part)] if row["name"] == "phantom_01")
    assert row["status"] == ("done" if part == "1/1" else "failed"), "merge has to know"
    assert bool(row["slices"]) == (part == "1/1")
    assert PartRun(predictor, parse_part(part), {scan: out / scan.name}, out, LEVEL, overwrite=True).predict(scan)


def test_one_mask_to_a_folder_with_tables_obeys_them(predictor: Predictor, scans: list[Path], done: Path,
                                                      tmp_path: Path) -> None:
    out, scan = Path(shutil.copytree(done, tmp_path / "out")), scans[0]
    brighter(scan)
    before = content(out)
    for overwrite in (False, True):
        work = PartRun(predictor, Part(), {scan: out / scan.name}, None, LEVEL + 0.1, overwrite=overwrite)
        if overwrite:
            assert work.predict(scan)[0]["status"] == "done"
        else:
            with pytest.raises(OutputError, match="was made from another scan"):
                work.predict(scan)
            assert content(out) == before


def test_what_lies_beside_a_mask_stays_when_that_is_moved_away(predictor: Predictor, scans: list[Path], done: Path,
                                                               tmp_path: Path) -> None:
    """As the remedy has it."""
    out, scan = Path(shutil.copytree(done, tmp_path / "out")), scans[0]
    (out / scan.name).rename(tmp_path / scan.name)
    before = content(out)
    start(predictor, [scan], out, probability=True).predict(scan)
    assert content(out)["phantom_03_probability.nii.gz"] == before["phantom_03_probability.nii.gz"], "the same again"
    (out / scan.name).unlink()
    brighter(scan)
    with pytest.raises(OutputError, match=r"phantom_03_probability\.nii\.gz: was made from another scan"):
        start(predictor, [scan], out, probability=True).predict(scan)
    assert content(out)["phantom_03_probability.nii.gz"] == before["phantom_03_probability.nii.gz"]
    assert start(predictor, [scan], out).predict(scan)[0]["status"] == "done", "which writes the mask alone"


@pytest.mark.parametrize("part", ["1/1", "1/2"])
def test_a_scan_that_was_never_begun_accounts_for_no_mask(part: str, predictor: Predictor, scans: list[Path],
                                                          tmp_path: Path) -> None:
    """Its row is open since the program ended; the mask came later, from another division or by hand."""
    out, targets = tmp_path / "out", {scan: tmp_path / "out" / scan.name for scan in good(scans)}
    PartRun(predictor, parse_part(part), targets, out, LEVEL)
    if part == "1/2":
        assert run(predictor, good(scans), out) == GOOD
    for scan in scans[:2]:
        (out / scan.name).write_bytes(b"by hand")
    with pytest.raises(OutputError, match=r"phantom_02\.nii\.gz: is there already, as are 1 more"):
        start(predictor, good(scans), out)


def test_what_was_being_done_when_the_program_ended_may_be_replaced(
        predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between a new mask and its row: of a scan that is new to the table, and of one whose mask was out of date."""
    made = Predictor.predict_file
    for out in (tmp_path / "new", Path(shutil.copytree(done, tmp_path / "old"))):
        brighter(scans[0])
        work = start(predictor, scans[:1], out, overwrite=True)
        with monkeypatch.context() as patch:
            def killed(*given: Any, work: PartRun = work, **named: Any) -> None:
                made(*given, **named)
                patch.setattr(work, "write", lambda: None)  # a killed program writes nothing more
                raise KeyboardInterrupt
            patch.setattr(Predictor, "predict_file", killed)
            with pytest.raises(KeyboardInterrupt):
                work.predict(scans[0])
        start(predictor, scans[:1], out)  # and ended again before it did anything
        row, = (row for row in tables(out)[Part()] if row["name"] == GOOD[-1])
        assert (row["status"], row["mask_sha256"]) == ("open", "")
        assert run(predictor, scans[:1], out) == GOOD[-1:]


def test_a_part_that_was_stopped_goes_on_and_forgets_nothing(predictor: Predictor, scans: list[Path],
                                                             tmp_path: Path) -> None:
    out = tmp_path / "out"
    start = partial(PartRun, predictor, Part(), {scan: out / scan.name for scan in scans}, out, LEVEL)
    work = start()
    for scan in work.files[:3]:
        with suppress(InputFileError):
            work.predict(scan)
    assert [row["status"] for row in tables(out)[Part()]] == ["failed", "done", "done", "open", "open"]
    for again in (work, start()):  # stopped again before it did anything
        again.write()
        with pytest.raises(DatasetError, match="part 1/1 is missing or not complete"):
            merge(out)
    assert run(predictor, scans, out) == GOOD[2:]
    assert len(merge(out)) == 5


@pytest.mark.parametrize("forget", [lambda out: shutil.rmtree(out / "parts"),
                                    lambda out: (out / "predictions.csv").unlink()])
def test_rows_of_earlier_runs_stay_in_the_table(forget: Callable[[Path], object], predictor: Predictor,
                                                scans: list[Path], done: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    forget(out)
    new = Path(shutil.copy(scans[0], scans[0].with_name("another.nii.gz")))
    assert run(predictor, [new], out) == ["another"]
    with (out / "predictions.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["name"] for row in rows] == ["another", *GOOD]
    assert all(row["status"] == "done" and row["lesion_ml"] for row in rows)
    (out / "another.nii.gz").unlink()
    assert run(predictor, [new], out) == ["another"]
    assert all(row["covidseg"] for row in merge(out)), "rows of which nobody knows all stay out of tables of parts"
    (out / "phantom_02.nii.gz").unlink()
    run(predictor, [new], out)
    assert "phantom_02" not in (out / "predictions.csv").read_text(), "but for lost masks"


@pytest.mark.parametrize(("change", "kept"), [
    (lambda row: {**row, "note": "mine"}, None), (lambda row: {**row, "status": "seen"}, None),
    (lambda row: {key: cell for key, cell in row.items() if key != "scan_sha256"}, GOOD)],
    ids=["a column of the user's", "a word of the user's", "an older version"])
def test_a_table_that_was_changed_by_hand_is_not_replaced(change: Callable[[dict], dict], kept: list[str] | None,
                                                          predictor: Predictor, scans: list[Path], done: Path,
                                                          tmp_path: Path) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    shutil.rmtree(out / "parts")
    rows = [change(row) for row in csv.DictReader((out / "predictions.csv").read_text().splitlines())]
    with (out / "predictions.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new = Path(shutil.copy(scans[0], scans[0].with_name("another.nii.gz")))
    if kept is None:
        with pytest.raises(OutputError, match=r"predictions\.csv: is there already"):
            start(predictor, [new], out)
        return
    assert run(predictor, [new], out) == ["another"]
    lines = (out / "predictions.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["another", *kept]


# --- merging ----------------------------------------------------------------------------------------------------

def cut(file: Path, end: int) -> None:
    file.write_bytes(file.read_bytes()[:-end])


def edit(table: Path, **cells: str) -> None:
    """Writes other things into the first row of a table."""
    first, *rows = csv.DictReader(table.read_text(encoding="utf-8").splitlines())
    with table.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(first), lineterminator="\n")
        writer.writeheader()
        writer.writerows([{**first, **cells}, *rows])


@pytest.fixture
def three(done: Path, predictor: Predictor, tiny_phantom: Path, tmp_path: Path) -> Path:
    """An output folder of three parts, all done."""
    out = Path(shutil.copytree(done, tmp_path / "out"))
    for k in (1, 2, 3):
        run(predictor, sorted((tiny_phantom / "im").iterdir()), out, f"{k}/3")
    (out / "parts" / "part-1-of-1.csv").unlink()
    (out / "predictions.csv").unlink()
    return out


def test_missing_parts_are_named_with_the_command_to_run(three: Path) -> None:
    (three / "parts" / "part-2-of-3.csv").unlink()
    edit(three / "parts" / "part-3-of-3.csv", status="open")
    with pytest.raises(DatasetError, match=r"part 2/3, 3/3 is missing or not complete\. Run `covidseg predict "
                                           r"--part 2/3`, then `covidseg predict --part 3/3` with"):
        merge(three)
    assert not (three / "predictions.csv").exists()


@pytest.mark.parametrize(("change", "message"), [
    ({"name": "another"}, "parts were made from different lists of scans"),
    *[({key: "other"}, r"phantom_01 \(in part 2/3\) was made with other nets or settings than phantom_00")
      for key in MADE],
    ({"mask_sha256": "0" * 64}, r"phantom_01\.nii\.gz.*not what was predicted"),
    (Path.unlink, r"phantom_02\.nii\.gz.*not what was predicted"),
    (lambda mask: cut(mask, 1), r"phantom_02\.nii\.gz.*not what was predicted")])
def test_parts_that_do_not_belong_together_or_to_their_masks(three: Path, change: Any, message: str) -> None:
    assert len(merge(three)) == 4
    (three / "predictions.csv").unlink()
    if callable(change):
        change(three / "phantom_02.nii.gz")
    else:
        edit(three / "parts" / "part-2-of-3.csv", **change)
    with pytest.raises(DatasetError, match=message):
        merge(three)
    assert not (three / "predictions.csv").exists()


def test_merging_keeps_earlier_rows_and_tables_of_others(three: Path, predictor: Predictor, scans: list[Path]) -> None:
    (three / "predictions.csv").write_text("name,score\na,1\n")
    with pytest.raises(OutputError, match=r"predictions\.csv: is there already and would be replaced.*--overwrite"):
        merge(three)
    assert (three / "predictions.csv").read_text() == "name,score\na,1\n"
    assert len(merge(three, overwrite=True)) == 4
    shutil.rmtree(three / "parts")
    new = Path(shutil.copy(scans[0], scans[0].with_name("another.nii.gz")))
    for part in ("1/2", "2/2"):
        run(predictor, [new], three, part)
    assert [row["name"] for row in merge(three)] == ["another"]
    lines = (three / "predictions.csv").read_text().splitlines()[1:]
    assert [line.split(",")[0] for line in lines] == ["another", *GOOD]


@pytest.mark.parametrize("harm", [
    lambda raw: b"", lambda raw: b"name,status\nphantom_00,done\n", lambda raw: raw + b"\xff", lambda raw: raw[:-20],
    lambda raw: raw.replace(b"done", b"gone"), lambda raw: raw + b'"', lambda raw: raw.replace(b"phantom_00", b"")],
    ids=["empty", "other columns", "no text", "cut", "status", "quote", "no name"])
def test_a_damaged_table_counts_as_missing(three: Path, harm: Callable[[bytes], bytes]) -> None:
    table = three / "parts" / "part-1-of-3.csv"
    table.write_bytes(harm(table.read_bytes()))
    with pytest.raises(DatasetError, match="part 1/3 is missing"):
        merge(three)


@pytest.mark.parametrize("name", ["parts", "parts/part-1-of-3.csv", "predictions.csv"])
def test_what_cannot_be_opened_is_named(name: str, three: Path, predictor: Predictor, scans: list[Path]) -> None:
    """A loop of links is what nobody may open, also who may do everything."""
    path = three / name
    if path.exists():
        path.rename(three / "kept")
    path.symlink_to(path.name)
    for work in (lambda: merge(three), lambda: start(predictor, good(scans), three)):
        with pytest.raises(InputFileError, match=f"{name}: cannot be opened"):
            work()


@pytest.mark.parametrize(("error", "code"), [
    (NoLungError("none"), 7), (PermissionError(13, "Permission denied", "x"), 3), (ValueError("x"), 1)])
def test_merging_ends_as_predicting_did(error: Exception, code: int, predictor: Predictor, scans: list[Path],
                                        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: object, **named: object) -> None:
        raise error
    monkeypatch.setattr(Predictor, "predict_file", fails)
    monkeypatch.setattr("covidseg.predict.load_predictor", lambda *given: predictor)
    for command in (["predict", *scans[:2], "-o", tmp_path, "--part", "1/1"], ["merge", tmp_path]):
        assert CliRunner().invoke(app, list(map(str, command))).exit_code == code


def test_tables_of_another_division_and_none(predictor: Predictor, three: Path, tmp_path: Path) -> None:
    PartRun(predictor, Part(2, 2), {}, three, LEVEL)
    with pytest.raises(DatasetError, match="reports of 2 and of 3 parts"):
        merge(three)
    for name in ("part-5-of-4.csv", "part-x-of-4.csv"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / name).write_text("")
    with pytest.raises(DatasetError, match="no reports"):
        merge(tmp_path)
