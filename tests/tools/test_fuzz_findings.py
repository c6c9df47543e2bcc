"""What fuzzing found: files that once ended in a trace, or were taken for what they are not."""

from __future__ import annotations

import functools
import io
import json
import operator
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from fuzz import scans, stored, tables
from safetensors.numpy import save

from covidseg.batch import tables as part_tables
from covidseg.data.fetch import check_zip, unpack
from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan
from covidseg.data.splits import apply_split, read_split
from covidseg.errors import ArtifactError, DatasetError, DownloadError, InputFileError
from covidseg.profiles import read_report
from covidseg.store import Store, load_arrays

DIGITS = "9" * 5000  # more than Python turns into a number


def test_points_on_a_brain_are_no_scan(tmp_path: Path) -> None:
    raw = scans.cifti()
    for name, content in (("whole.nii", raw), ("damaged.nii", raw.replace(b"<", b"&", 1))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputFileError, match=r"not one volume|cannot be read"):
            read_scan(tmp_path / name)


def test_a_header_that_ends_early(tmp_path: Path) -> None:
    raw = nib.Nifti2Image(np.zeros((2, 2, 2), np.int16), scans.AFFINE).to_bytes()
    for length in (4, 100, 348, 500):
        (tmp_path / "short.nii").write_bytes(raw[:length])
        with pytest.raises(InputFileError, match="cannot be read"):
            read_scan(tmp_path / "short.nii")


@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_more_slices_than_a_file_can_hold_are_not_even_counted(name: str, tmp_path: Path) -> None:
    image = nib.Nifti2Image(np.zeros((2, 2, 2), np.int16), scans.AFFINE)
    nib.save(image, tmp_path / name)
    raw = bytearray(image.to_bytes())
    raw[40:48] = (2**62).to_bytes(8, "little")  # memory for that many must not be asked for
    with (nib.openers.Opener(tmp_path / name, "wb")) as stream:
        stream.write(bytes(raw))
    with pytest.raises(InputFileError, match="bytes are said to be in a file of"):
        read_scan(tmp_path / name)


@pytest.mark.parametrize("table", [
    "slice,has_lesion,volume\n0,1\n", "volume,slice,has_lesion\n,0,1\n"])
def test_a_line_that_names_no_volume(table: str, tmp_path: Path) -> None:
    root, _ = tables.make_folders(tmp_path, table.encode(), b"")
    with pytest.raises(DatasetError, match="line 2 names no volume"):
        load_dataset(root)


@pytest.mark.parametrize("number", ["²", DIGITS, "-1", "1.5", ""])
def test_cells_that_are_no_slice_numbers(number: str, tmp_path: Path) -> None:
    roots = tables.make_folders(tmp_path, f"volume,slice,has_lesion\na,{number},1\n".encode(),
                                f"position,has_lesion\n{number},1\n".encode())
    for root in roots:
        with pytest.raises(DatasetError, match=r"line 2: .* must be a slice number"):
            load_dataset(root)
    path = tmp_path / "own.csv"
    path.write_text(f"slice,split\n{number},train\n", encoding="utf-8")
    with pytest.raises(DatasetError, match=r"line 2: .* is not a slice number"):
        read_split(path)


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_published_numbers_of_a_stack_may_be_anything(mark: bytes, tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(mark + b"slice,split\n0,train\n1,train\n5,test\n")
    _, root = tables.make_folders(
        tmp_path, b"", mark + f"position,has_lesion,medseg100_slice\n0,1,²\n1,0,{DIGITS}\n2,1,5\n".encode())
    found = apply_split(load_dataset(root), read_split(path), "test")
    assert found.cases[0].labels == {2: 1}
    assert apply_split(load_dataset(root), read_split(path), "train").cases[0].labels == {0: 1, 1: 0}


@pytest.mark.parametrize(("table", "words"), [
    ("split,volume,patient\ntrain\n", "line 2 names '' as a volume"),
    ("slice,split\n0,train\n0,test\n", "line 3 names '0' a second time")])
def test_lines_of_a_split_that_end_early_or_come_twice(table: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "own.csv").write_text(table)
    with pytest.raises(DatasetError, match=words):
        read_split(tmp_path / "own.csv")


@pytest.mark.parametrize("notes", ["[]", "3", "null", f'{{"a": {DIGITS}}}', "[" * 100_000])
def test_notes_that_are_none(notes: str, tmp_path: Path) -> None:
    path = stored.with_hash(tmp_path / "stage.safetensors", save({"a": np.zeros(2)}, {"notes": notes}))
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        load_arrays(path)


@pytest.mark.parametrize("seconds", ["a while", [1], {}, None, -1, float("nan"), float("inf")])
def test_a_time_that_is_none(seconds: object, tmp_path: Path) -> None:
    store = Store(tmp_path)
    notes = json.dumps({"seconds": seconds})
    stored.with_hash(store.path("stage", "key"), save({"a": np.zeros(2)}, {"notes": notes}))
    with pytest.raises(ArtifactError, match="what it took"):
        store.seconds("stage", "key")


@pytest.mark.parametrize(("place", "value"), [
    ("settings.true_lungs", 0), ("settings.name", 7), ("settings.segmenter.steps", "300"),
    ("settings.segmenter.steps", 300.5), ("settings.segmenter.channels", 16),
    ("settings.segmenter.channels", [16, "a"]),
    ("settings.mutual.weights", ["a"]), ("settings.segmenter.threshold", None),
    ("settings.segmenter.threshold", float("nan")), ("settings.segmenter.threshold", 10**400),
    ("settings.lungs", []), ("stages.segmenter", 5), ("stages.segmenter", "../segmenter.safetensors"),
    ("stages.segmenter", "/segmenter.safetensors"), ("stages.segmenter", ".."), ("stages.segmenter", "a" * 300),
    ("stages.segmenter", "a\0.safetensors")])
def test_reports_with_values_that_no_run_writes(place: str, value: object, tmp_path: Path) -> None:
    content = json.loads(stored.report_seeds()[0])
    *way, last = place.split(".")
    inner = functools.reduce(operator.getitem, way, content)
    assert last in inner
    inner[last] = value
    for raw in (json.dumps(content).encode(), b"[" * 100_000):  # the other goes deeper than Python
        stored.with_hash(tmp_path / "run.json", raw)
        with pytest.raises(ArtifactError, match=r"is damaged|cannot be read"):
            read_report(tmp_path)


@pytest.mark.parametrize(("old", "new"), [
    ("name,", "title,"), ("a,done", "a,odd"), ("a,done", ",done"), ("a,done", "a,done,"), (",failed,", ","),
    ("a,done", 'a,"done'), ("is broken", "\udcff"), ("is broken", "x" * 200_000)])
def test_tables_of_predictions_that_count_as_missing(old: str, new: str, tmp_path: Path) -> None:
    content = stored.part_seeds()[0].decode()
    assert old in content
    with pytest.raises(DatasetError, match="no reports of predictions"):
        stored.read_parts(content.replace(old, new, 1).encode(errors="surrogateescape"), tmp_path)
    assert part_tables(tmp_path) == {}


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "../a"])
def test_names_of_scans_that_no_file_has(name: str, tmp_path: Path) -> None:
    with pytest.raises(DatasetError):
        stored.read_parts(stored.part_seeds()[0].replace(b"a,done", f"{name},done".encode(), 1), tmp_path)


def archive_with(name: str = "a.txt", kind: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", kind) as archive:
        archive.writestr(zipfile.ZipInfo(name), bytes(range(256)) * 8, kind)
    return stream.getvalue()


def with_bytes(raw: bytes, start: int, new: bytes) -> bytes:
    return raw[:start] + new + raw[start + len(new):]


PLAIN = archive_with()
END = PLAIN.rindex(b"PK\5\6")  # of the archive's directory
LZMA, BZIP2 = archive_with(kind=zipfile.ZIP_LZMA), archive_with(kind=zipfile.ZIP_BZIP2)
ARCHIVES = {
    "lzma": with_bytes(LZMA, 60, bytes(40)), "bzip2": with_bytes(BZIP2, 60, bytes(40)),
    "name": archive_with("éé.txt").replace("éé".encode(), b"\xe7\xe7\xe7\xe7"),
    "place": with_bytes(PLAIN, END + 16, b"\xff\xff\xff\x7f"),  # of the directory, behind the end
    "size": with_bytes(PLAIN, END + 12, b"\xff\xff\xff\x7f"),   # of the directory, more than there is
    "none": archive_with("")}


@pytest.mark.parametrize("fault", ARCHIVES)
def test_damaged_archives(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    with pytest.raises(DownloadError, match="not a usable zip"):
        check_zip(path)  # it is not there yet
    path.write_bytes(ARCHIVES[fault])
    if fault != "none":  # a file without a name is whole, but has no place to go to
        with pytest.raises(DownloadError):
            check_zip(path)
    with pytest.raises(DownloadError):
        unpack(path, tmp_path / "out")
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and file != path and file.stat().st_size > 2048]
