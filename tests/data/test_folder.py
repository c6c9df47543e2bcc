"""Data folders: both layouts, and every way in which a label table can be wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from covidseg.data.folder import load_dataset
from covidseg.data.splits import apply_split, read_split
from covidseg.errors import DatasetError, InputFileError

GOOD = "volume,slice,has_lesion,patient\na,0,0,p1\na,2,1,p1\nb,1,0,p2\n"


def volumes(root: Path, table: str | bytes | None = GOOD, names: tuple[str, ...] = ("a.nii.gz", "b.nii.gz")) -> Path:
    """A folder of volumes. Loading opens no scan, so empty files will do."""
    (root / "im").mkdir(parents=True)
    for name in names:
        (root / "im" / name).touch()
    if table is not None:
        raw = table.encode() if isinstance(table, str) else table
        (root / "slice_labels.csv").write_bytes(raw)
    return root


def stacks(root: Path, table: str | None = "position,has_lesion\n0,1\n1,0\n", name: str = "dev") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    (root / f"{name}_im.nii.gz").touch()
    if table is not None:
        (root / f"{name}_slices.csv").write_text(table)
    return root


# --- the two layouts --------------------------------------------------------------------------------------------

def test_volumes_with_labels_and_patients(tmp_path):
    data = load_dataset(volumes(tmp_path / "d"))
    assert [(c.id, c.image.name, c.labels, c.patient) for c in data.cases] == [
        ("a", "a.nii.gz", {0: 0, 2: 1}, "p1"), ("b", "b.nii.gz", {1: 0}, "p2")]
    assert data.labels() == 3
    assert all(c.lung is None and c.mask is None for c in data.cases)


def test_the_patient_defaults_to_the_volume(tmp_path):
    plain = load_dataset(volumes(tmp_path / "d", "volume,slice,has_lesion\na,0,0\nb,0,1\n"))
    blank = load_dataset(volumes(tmp_path / "e", "volume,slice,has_lesion,patient\na,0,0,\nb,0,1,p\n"))
    part = load_dataset(volumes(tmp_path / "f", "volume,slice,has_lesion\nb,0,1\n"))
    assert [c.patient for c in plain.cases] == ["a", "b"]
    assert [(c.labels, c.patient) for c in part.cases] == [({}, "a"), ({0: 1}, "b")]
    assert [c.patient for c in blank.cases] == ["a", "p"]


def test_masks_and_lungs_are_found_where_they_are(tmp_path):
    root = volumes(tmp_path / "d")
    for part, name in (("mask", "a.nii.gz"), ("lung", "b.nii.gz")):
        (root / part).mkdir()
        (root / part / name).touch()
    a, b = load_dataset(root).cases
    assert (a.mask, a.lung) == (root / "mask" / "a.nii.gz", None)
    assert (b.mask, b.lung) == (None, root / "lung" / "b.nii.gz")


def test_stacks(tmp_path):
    root = stacks(stacks(tmp_path / "d"), "position,has_lesion\n5,1\n", "val")
    (root / "dev_mask.nii.gz").touch()
    dev, val = load_dataset(root).cases
    assert (dev.id, dev.labels, dev.patient, dev.mask) == ("dev", {0: 1, 1: 0}, "dev", root / "dev_mask.nii.gz")
    assert (val.id, val.labels, val.mask) == ("val", {5: 1}, None)


def test_other_files_more_columns_and_a_byte_order_mark_do_no_harm(tmp_path):
    # Spreadsheets put a byte-order mark before the first column's name when they save "CSV UTF-8".
    table = b"\xef\xbb\xbfvolume,reader,slice,has_lesion\r\na,MD,0,0\r\nb,MD,0,1\r\n"
    data = load_dataset(volumes(tmp_path / "d", table, ("a.nii.gz", "b.nii", "README.md", "c.jpg")))
    assert [(c.id, c.labels) for c in data.cases] == [("a", {0: 0}), ("b", {0: 1})]


@pytest.mark.parametrize("separator", [";", "\t", ", ", " ; "])
def test_columns_may_be_separated_as_spreadsheets_do(tmp_path, separator):
    data = load_dataset(volumes(tmp_path / "d", GOOD.replace(",", separator)))
    assert [(c.id, c.labels, c.patient) for c in data.cases] == [("a", {0: 0, 2: 1}, "p1"), ("b", {1: 0}, "p2")]


def test_hidden_files_are_no_scans_and_capitals_make_no_difference(tmp_path):
    root = volumes(tmp_path / "d", names=("A.NII.GZ", "b.nii", "._A.NII.GZ", "._b.nii"), table=GOOD.replace("a,", "A,"))
    (root / "mask").mkdir()
    for name in ("A.nii.gz", "b.nii.gz", "._A.nii.gz"):
        (root / "mask" / name).touch()
    assert [(c.id, c.image.name, c.mask and c.mask.name) for c in load_dataset(root).cases] == [
        ("A", "A.NII.GZ", "A.nii.gz"), ("b", "b.nii", "b.nii.gz")]
    stack = stacks(tmp_path / "s")
    (stack / "._dev_im.nii.gz").touch()
    assert [c.id for c in load_dataset(stack).cases] == ["dev"]


def test_labels_may_be_missing_where_they_are_not_needed(tmp_path):
    for root in (volumes(tmp_path / "v", None), stacks(tmp_path / "s", None)):
        assert load_dataset(root, labels=False).labels() == 0
    assert load_dataset(stacks(tmp_path / "t", "a,b\n"), labels=False).labels() == 0


def test_subset_keeps_the_order_asked_for(tmp_path):
    data = load_dataset(volumes(tmp_path / "d"))
    assert [c.id for c in data.subset(["b", "a"]).cases] == ["b", "a"]
    assert data.subset([]).cases == ()
    with pytest.raises(DatasetError, match=r"has no volume x, y.*It holds a, b"):
        data.subset(["a", "x", "y"])


PLAIN, TAKEN_APART = "M\u00fcller", "Mu\u0308ller"


@pytest.mark.parametrize(("file", "line"), [(PLAIN, TAKEN_APART), (TAKEN_APART, PLAIN), (TAKEN_APART, TAKEN_APART)])
def test_an_accent_is_the_same_in_one_character_or_two(tmp_path, file, line):
    root = volumes(tmp_path / "d", f"volume,slice,has_lesion,patient\n{line},0,1,{line}\nb,1,0,{PLAIN}\n",
                   (f"{file}.nii.gz", "b.nii.gz"))
    (root / "mask").mkdir()
    (root / "mask" / f"{line}.nii.gz").touch()
    cases = {case.id: case for case in load_dataset(root).cases}
    assert set(cases) == {"b", PLAIN}
    assert cases[PLAIN].labels == {0: 1}
    assert cases[PLAIN].patient == cases["b"].patient == PLAIN
    assert (cases[PLAIN].image, cases[PLAIN].mask) == (root / "im" / f"{file}.nii.gz", root / "mask" / f"{line}.nii.gz")
    (root / "split.csv").write_text(f"volume,patient,split\n{line},,train\nb,,test\n")
    with pytest.raises(DatasetError, match="two sides"):
        apply_split(load_dataset(root), read_split(root / "split.csv"), "train")


def test_an_accent_in_the_name_of_a_stack(tmp_path):
    root = stacks(tmp_path / "d", name=TAKEN_APART)
    (root / f"{PLAIN}_mask.nii.gz").touch()
    case, = load_dataset(root).cases
    assert (case.labels, case.mask) == ({0: 1, 1: 0}, root / f"{PLAIN}_mask.nii.gz")


def test_a_name_that_is_there_with_both_kinds_of_accent_is_there_twice(tmp_path):
    check_refused(volumes(tmp_path / "d", names=(f"{PLAIN}.nii", f"{TAKEN_APART}.nii")), "both as")


@pytest.mark.parametrize("empty", ["", ",,", " , ,", ",,,,", '"",,'])
def test_lines_without_any_text_are_passed_over(tmp_path, empty):
    root = volumes(tmp_path / "d", f"volume,slice,has_lesion\n{empty}\na,0,1\n{empty}\n{empty}\n")
    assert load_dataset(root).cases[0].labels == {0: 1}


# --- faults -----------------------------------------------------------------------------------------------------

def check_refused(root: Path, *words: str) -> None:
    with pytest.raises(DatasetError) as caught:
        load_dataset(root)
    for word in words:
        assert word in str(caught.value)
    assert caught.value.remedy


def test_folders_that_are_no_data(tmp_path):
    check_refused(tmp_path / "none", "no such data folder")
    (tmp_path / "file").touch()
    check_refused(tmp_path / "file", "no such data folder")
    (tmp_path / "empty" / "im").mkdir(parents=True)
    check_refused(tmp_path / "empty", "holds no scans", "slice_labels.csv")
    (volumes(tmp_path / "d", None) / "slice_labels.csv").mkdir()
    check_refused(tmp_path / "d", "slice_labels.csv", "not a CSV table but a folder")
    check_refused(volumes(tmp_path / "twice", names=("a.nii", "a.nii.gz")), "holds a both as a.nii and as a.nii.gz")


def test_what_cannot_be_opened(tmp_path, closed):
    root = volumes(tmp_path / "d")
    (root / "mask").mkdir()
    for path, error in ((root / "mask", InputFileError), (root / "slice_labels.csv", DatasetError),
                        (root / "im", InputFileError)):  # the last is opened first
        closed(path)
        with pytest.raises(error, match=rf"{path.name}: cannot be opened \(Permission denied\)"):
            load_dataset(root)
    for long in (tmp_path / ("x" * 300), stacks(tmp_path / "s", None, "x" * 245)):  # whose table no name is left for
        with pytest.raises(InputFileError, match="File name too long"):
            load_dataset(long)


@pytest.mark.parametrize(("table", "line"), [
    ("volume,slice,has_lesion\n\n\na,0,2\n", 4), ('volume,slice,has_lesion,note\na,0,0,"b\nc"\na,1,2,\n', 4),
    ("volume,slice,has_lesion\r\n,,\r\na,0,2\r\n", 3), ("volume,slice,has_lesion\ra,0,0\r\ra,0,1\r", 4)])
def test_a_fault_is_named_by_its_line_in_the_file(tmp_path, table, line):
    check_refused(volumes(tmp_path / "d", table), f"line {line}")


@pytest.mark.parametrize(("table", "words"), [
    (None, ["slice_labels.csv", "no such label table", "volume, slice, has_lesion"]),
    ("", ["lacks the column volume, slice, has_lesion"]),
    ("volume,slice\na,0\n", ["lacks the column has_lesion"]),
    ("volume|slice|has_lesion\na|0|0\n", ["lacks the column volume", "with commas", "names volume|slice|has_lesion"]),
    ("volume,slice,has_lesion,slice\na,0,0,1\n", ["names the column slice twice", "Keep one"]),
    ("volume,slice,has_lesion\na,0,0\na,1,2\n", ["line 3", "has_lesion 0 or 1"]),
    ("volume,slice,has_lesion\na,0,\n", ["line 2", "has_lesion 0 or 1"]),
    ("volume,slice,has_lesion\na,0,yes\n", ["line 2"]),
    ("volume,slice,has_lesion\na,-1,0\n", ["line 2", "slice number"]),
    ("volume,slice,has_lesion\na,1.5,0\n", ["line 2"]),
    ("volume,slice,has_lesion\na,1\n", ["line 2"]),
    ("volume,slice,has_lesion\na,1,0\na,1,1\n", ["line 3", "slice 1 of volume a a second time"]),
    ("volume,slice,has_lesion\na,1,0\nz,1,1\ny,0,1\n", ["im/ does not hold: y, z", "im/ holds a, b"]),
    ("volume,slice,has_lesion\n,1,0\n", ["line 2 names no volume"]),
    (GOOD + "b,2,0,p3\n", ["line 5 gives volume b to another patient"]),
    (b"volume,slice,has_lesion\n\xff\xfe,0,1\n", ["not a CSV table", "UTF-8"]),
    ('volume,slice,has_lesion,patient\na,1,0,"p\nb,1,1,q\n', ["not a CSV table"]),  # the rest is no name of a patient
])
def test_label_tables_of_volumes(tmp_path, table, words):
    check_refused(volumes(tmp_path / "d", table), *words)


@pytest.mark.parametrize(("table", "words"), [
    (None, ["dev_slices.csv", "no such label table", "position, has_lesion"]),
    ("slice,has_lesion\n0,1\n", ["lacks the column position"]),
    ("position,has_lesion\n0,1\n0,1\n", ["line 3", "slice 0 a second time"]),
    ("position,has_lesion\nfirst,1\n", ["line 2", "position must be a slice number"]),
])
def test_label_tables_of_stacks(tmp_path, table, words):
    check_refused(stacks(tmp_path / "d", table), *words)
