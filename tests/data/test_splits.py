"""Splits: the shipped ones, faulty ones, and what is left of a data set after one has been applied."""

from __future__ import annotations

from pathlib import Path

import pytest

from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.phantom import PhantomSettings, is_healthy
from covidseg.data.splits import PARTS, Split, apply_split, read_split, split_names
from covidseg.errors import DatasetError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Volumes a, b and c; b and c are one patient's."""
    (tmp_path / "im").mkdir()
    rows = "volume,slice,has_lesion,patient\n"
    for name, patient in (("a", "p"), ("b", "q"), ("c", "q")):
        (tmp_path / "im" / f"{name}.nii.gz").touch()  # never opened
        rows += f"{name},0,0,{patient}\n{name},1,1,{patient}\n"
    write(tmp_path / "slice_labels.csv", rows)
    return tmp_path


@pytest.fixture
def stack(tmp_path: Path) -> Dataset:
    """A stack of three slices that a published file holds in the opposite order."""
    (tmp_path / "tr_im.nii.gz").touch()
    write(tmp_path / "tr_slices.csv", "position,medseg100_slice,has_lesion\n0,2,0\n1,1,1\n2,0,1\n")
    return load_dataset(tmp_path)


def test_shipped_splits_are_sound() -> None:
    assert split_names() == ["medseg1", "medseg2", "phantom"]
    stack, volumes = read_split("medseg1"), read_split("medseg2")
    assert sorted(stack.slices) == list(range(100))
    assert [len(stack.part(part)) for part in ("train", "test", "left_out")] == [50, 48, 2]
    assert stack.part("left_out") == [22, 48]
    assert {n: stack.slices[n] for n in (0, 6, 9, 18, 67, 99)} == {
        0: "train", 6: "test", 9: "test", 18: "test", 67: "train", 99: "test"}
    assert list(volumes.volumes) == [str(v) for v in range(1, 10)]
    assert volumes.patients["2"] == volumes.patients["3"], "the pair stays together"
    assert len(set(volumes.patients.values())) == 8
    assert volumes.part("train")
    assert volumes.part("test")


def test_phantom_split_fits_the_phantom() -> None:
    settings, split = PhantomSettings(), read_split("phantom")
    assert list(split.volumes) == [f"phantom_{i:02d}" for i in range(settings.patients)]
    healthy = {f"phantom_{i:02d}" for i in range(settings.patients) if is_healthy(settings, i)}
    train, test = set(split.part("train")), set(split.part("test"))
    assert (len(train), len(test)) == (8, 4)
    assert (len(train & healthy), len(test & healthy)) == (3, 1)


@pytest.mark.parametrize(("text", "complaint"), [
    ("volume,patient,split\na,p,train\nb,p,test\n", "'p' is on two sides: a in train, b in test"),
    ("volume,patient,split\na,p,train\nb,q,exam\n", "line 3 names the part 'exam'"),
    ("volume,patient,split\na,p,train\na,p,train\n", "line 3 names 'a' a second time"),
    ("volume,patient,split\n,p,train\n", "line 2 names '' as a volume"),
    ("slice,split\n4,train\n4,test\n", "line 3 names '4' a second time"),
    ("slice,split\n-1,train\n", "'-1' is not a slice number"),
    ("slice,split\nfour,train\n", "'four' is not a slice number"),
    ("volume,split\na,train\n", "lacks columns"),
    ("volume,patient,split\n", "is empty"),
    ("", "lacks columns"),
    ("volume,patient,split\na,p\n", "names the part 'None'"),
    (b"\xff\xfe\x00volume", "not a CSV table"),
])
def test_faulty_splits_are_refused(text: str | bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DatasetError, match=complaint):
        read_split(tmp_path / "mine.csv")


def test_unknown_split_lists_the_known_ones(tmp_path: Path) -> None:
    for name in ("medseg3", tmp_path / "none.csv"):
        with pytest.raises(DatasetError, match="medseg1, medseg2, phantom"):
            read_split(name)


def test_only_a_bare_name_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data folder has no split because of a file beside it, however its path is written."""
    write(tmp_path / "vt.csv", "volume,patient,split\na,p,train\nb,q,test\n")
    (tmp_path / "vt").mkdir()
    (tmp_path / "set.csv").mkdir()
    monkeypatch.chdir(tmp_path)
    for name in ("vt", "./vt", "vt/", tmp_path / "vt", str(tmp_path / "vt"), "../splits/medseg2", "./medseg2",
                 "set.csv", "n" * 300 + ".csv"):
        with pytest.raises(DatasetError, match=r"there is no split .*name what to measure on after --test"):
            read_split(name)
    assert read_split("vt.csv").volumes == {"a": "train", "b": "test"}, "a file of one's own is named as one"


def test_unknown_and_empty_parts() -> None:
    split = Split("m", {"a": "train"}, {"a": "a"}, {})
    with pytest.raises(DatasetError, match=", ".join(PARTS)):
        split.part("exam")
    with pytest.raises(DatasetError, match="has nothing in its part 'val'"):
        split.part("val")


def test_apply_by_volume(folder: Path, tmp_path: Path) -> None:
    split = read_split(write(tmp_path / "m.csv", "volume,patient,split\na,p,test\nb,q,train\nc,q,left_out\n"))
    dataset = load_dataset(folder)
    for part, names in (("train", ["b"]), ("test", ["a"]), ("left_out", ["c"])):  # what is left out does no harm
        assert [c.id for c in apply_split(dataset, split, part).cases] == names


@pytest.mark.parametrize(("rows", "odd"), [("a,p,test\nb,q,train\nc,q,train\nd,r,test\n", "d"), ("a,p,test\n", "b, c")])
def test_folder_and_split_have_to_agree(rows: str, odd: str, folder: Path, tmp_path: Path) -> None:
    split = read_split(write(tmp_path / "m.csv", f"volume,patient,split\n{rows}"))
    with pytest.raises(DatasetError, match=f"differ in {odd}"):
        apply_split(load_dataset(folder), split, "test")


def test_a_patient_known_to_the_folder_only(folder: Path, tmp_path: Path) -> None:
    split = read_split(write(tmp_path / "m.csv", "volume,patient,split\na,a,test\nb,b,train\nc,c,test\n"))
    with pytest.raises(DatasetError, match="'q' is on two sides"):
        apply_split(load_dataset(folder), split, "test")


def test_apply_by_slice_counts_as_the_published_file(stack: Dataset, tmp_path: Path) -> None:
    split = read_split(write(tmp_path / "m.csv", "slice,split\n0,test\n1,train\n2,left_out\n"))
    for part, labels in (("test", {2: 1}), ("train", {1: 1}), ("left_out", {0: 0})):
        assert apply_split(stack, split, part).cases[0].labels == labels
    write(tmp_path / "tr_slices.csv", "position,has_lesion\n0,0\n1,1\n2,1\n")  # no published numbers
    assert apply_split(load_dataset(tmp_path), split, "test").cases[0].labels == {0: 0}


def test_slices_without_a_place_or_a_stack(stack: Dataset, folder: Path, tmp_path: Path) -> None:
    split = read_split(write(tmp_path / "m.csv", "slice,split\n0,test\n7,train\n"))
    with pytest.raises(DatasetError, match="does not place slices 1, 2"):
        apply_split(stack, split, "test")
    whole = read_split(write(tmp_path / "n.csv", "slice,split\n0,test\n1,test\n2,test\n7,train\n"))
    with pytest.raises(DatasetError, match="none of its slices"):
        apply_split(stack, whole, "train")
    with pytest.raises(DatasetError, match="for one stack"):
        apply_split(load_dataset(folder), split, "test")
