"""Predictions in parts: the table of one run, nothing done twice, nothing missed, no word of the machine."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import finished_run

from covidseg.batch import MADE, Part, PartRun, merge, parse_part, tables, write_table
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, InputFileError, OutputError, SettingsError
from covidseg.predict import Predictor, load_predictor
from covidseg.store import file_hash

LEVEL = 0.3


@pytest.fixture(scope="module")
def predictor(tiny_phantom: Path) -> Predictor:
    return load_predictor(finished_run(tiny_phantom).folder)


@pytest.fixture
def scans(tiny_phantom: Path, tmp_path: Path) -> list[Path]:
    """Five scans, one of which is damaged, in a folder with a telling name."""
    folder = tmp_path / "secret-folder"
    shutil.copytree(tiny_phantom / "im", folder)
    (folder / "broken.nii.gz").write_bytes((folder / "phantom_00.nii.gz").read_bytes()[:3000])
    return sorted(folder.iterdir(), reverse=True)


def run(predictor: Predictor, scans: list[Path], out: Path, part: str = "1/1", level: float = LEVEL,
        probability: bool = False) -> list[str]:
    """One part; the names of the scans that were predicted, and not done before."""
    work = PartRun(predictor, parse_part(part), {scan: out / scan.name for scan in scans}, out, level,
                   probability=probability)
    fresh = []
    for scan in work.files:
        with suppress(InputFileError):
            row, before = work.predict(scan)
            fresh += [] if before else [row["name"]]
    if part == "1/1":
        write_table(out, list(work.rows.values()))
    return fresh


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
    text = (tmp_path / "out" / "parts" / "part-1-of-1.csv").read_text(encoding="utf-8")
    assert "failed" in text
    assert "secret-folder" not in text


def test_the_table_is_the_same_however_many_parts(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    run(predictor, scans, tmp_path / "whole")
    expected = content(tmp_path / "whole")
    for count in (1, 3, 8):
        out = tmp_path / str(count)
        for k in reversed(range(count)):
            run(predictor, scans, out, f"{k + 1}/{count}")
        assert len(merge(out)) == 5
        found = content(out)
        assert {name: raw for name, raw in found.items() if "parts" not in name} \
            == {name: raw for name, raw in expected.items() if "parts" not in name}
    rows = list(csv.DictReader(expected["predictions.csv"].decode().splitlines()))
    assert [row["name"] for row in rows] == ["broken", *GOOD]
    assert (rows[0]["status"], rows[0]["error"], rows[0]["lesion_ml"]) == ("failed", "InputFileError", "")
    assert any(float(row["lesion_ml"]) > 0 for row in rows[1:])


def test_without_a_folder_there_is_no_table(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    work = PartRun(predictor, Part(), {scans[0]: tmp_path / "out" / "one.nii"}, None, LEVEL)
    assert work.predict(scans[0])[1] is False
    assert list(content(tmp_path / "out")) == ["one.nii"]


def test_a_table_that_cannot_be_written(predictor: Predictor, scans: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "parts").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        run(predictor, scans, tmp_path / "out")


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


@pytest.mark.parametrize(("change", "expected"), [
    ("mask gone", GOOD[1:2]), ("mask changed", GOOD[1:2]), ("scan changed", GOOD[1:2]), ("threshold", GOOD),
    ("nets", GOOD), ("table gone", GOOD), ("table damaged", GOOD), ("another version", GOOD[:1])])
def test_what_is_not_as_it_was_is_done_again(predictor: Predictor, scans: list[Path], done: Path, tmp_path: Path,
                                             change: str, expected: list[str]) -> None:
    out = Path(shutil.copytree(done, tmp_path / "out"))
    before, mask, table = content(out), out / "phantom_01.nii.gz", out / "parts" / "part-1-of-1.csv"
    if change == "mask gone":
        mask.unlink()
    elif change == "mask changed":
        mask.write_bytes(mask.read_bytes()[:-1])
    elif change == "scan changed":
        scan = read_scan(scans[0].parent / "phantom_01.nii.gz")
        write_like(scan.pixels + np.int16(1), scan.grid, scan.path)
    elif change == "table gone":
        table.unlink()
    elif change == "table damaged":
        table.write_bytes(table.read_bytes()[:-20])
    elif change == "another version":
        edit(table, covidseg="0.0.1")
    nets = replace(predictor, lung_net=None) if change == "nets" else predictor
    assert run(nets, scans, out, level=0.4 if change == "threshold" else LEVEL) == expected
    if change in ("mask gone", "mask changed", "table gone", "table damaged"):
        assert content(out)["phantom_01.nii.gz"] == before["phantom_01.nii.gz"]


def test_a_part_that_was_stopped_goes_on_and_forgets_nothing(predictor: Predictor, scans: list[Path],
                                                             tmp_path: Path) -> None:
    out = tmp_path / "out"

    def start() -> PartRun:
        return PartRun(predictor, Part(), {scan: out / scan.name for scan in scans}, out, LEVEL)
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


# --- merging ----------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("cells", "message"), [
    ({"name": "another"}, "parts were made from different lists of scans"),
    *[({key: "other"}, r"phantom_01 \(in part 2/3\) was made with other nets or settings than phantom_00")
      for key in MADE],
    ({"mask_sha256": "0" * 64}, r"phantom_01\.nii\.gz.*not what was predicted")])
def test_parts_that_do_not_belong_together(three: Path, cells: dict[str, str], message: str) -> None:
    assert len(merge(three)) == 4
    (three / "predictions.csv").unlink()
    edit(three / "parts" / "part-2-of-3.csv", **cells)
    with pytest.raises(DatasetError, match=message):
        merge(three)
    assert not (three / "predictions.csv").exists()


@pytest.mark.parametrize("harm", [
    lambda raw: b"", lambda raw: b"name,status\nphantom_00,done\n", lambda raw: raw + b"\xff", lambda raw: raw[:-20],
    lambda raw: raw.replace(b"done", b"gone"), lambda raw: raw + b'"', lambda raw: raw.replace(b"phantom_00", b"")],
    ids=["empty", "other columns", "no text", "cut", "status", "quote", "no name"])
def test_a_damaged_table_counts_as_missing(three: Path, harm: Callable[[bytes], bytes]) -> None:
    table = three / "parts" / "part-1-of-3.csv"
    table.write_bytes(harm(table.read_bytes()))
    with pytest.raises(DatasetError, match="part 1/3 is missing"):
        merge(three)


def test_tables_of_another_division_and_none(predictor: Predictor, three: Path, tmp_path: Path) -> None:
    PartRun(predictor, Part(2, 2), {}, three, LEVEL)
    with pytest.raises(DatasetError, match="reports of 2 and of 3 parts"):
        merge(three)
    for name in ("part-5-of-4.csv", "part-x-of-4.csv"):
        (tmp_path / "parts").mkdir(exist_ok=True)
        (tmp_path / "parts" / name).write_text("")
    with pytest.raises(DatasetError, match="no reports"):
        merge(tmp_path)


@pytest.mark.parametrize("harm", ["gone", "changed"])
def test_a_mask_that_is_not_what_was_predicted(three: Path, harm: str) -> None:
    mask = three / "phantom_02.nii.gz"
    if harm == "gone":
        mask.unlink()
    else:
        mask.write_bytes(mask.read_bytes() + b"\0")
    with pytest.raises(DatasetError, match=r"phantom_02\.nii\.gz.*not what was predicted"):
        merge(three)
