"""From archives to a data folder: what belongs together, what is refused, and what a crash leaves behind."""

from __future__ import annotations

import errno
import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_server import PUBLISHED, fill_mosmed, nifti, volume, zipped

from covidseg.data import layout
from covidseg.data import nifti as nifti_files
from covidseg.data.folder import load_dataset
from covidseg.data.layout import has_lesion, lay_out, lay_out_mosmed
from covidseg.data.registry import entry, is_present
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import DatasetError, DownloadError, InputFileError, OutputError

Members = dict[str, dict[str, bytes]]


@pytest.fixture
def members() -> Members:
    """What three archives hold of one volume, `1`."""
    return {role: {"1.nii.gz": nifti(array)}
            for role, array in zip(("image", "lung", "mask"), volume(1, (1,)), strict=True)}


@pytest.fixture
def stack(tmp_path: Path) -> dict[str, Path]:
    """A published stack of three slices, stored from head to feet, of which the lowest has a lesion."""
    files = {}
    for role, name, array in zip(("image", "mask"), ("tr_im", "tr_mask"), volume(1, (0,), slices=3)[::2], strict=True):
        files[role] = tmp_path / f"{name}.nii.gz"
        files[role].write_bytes(nifti(array, PUBLISHED @ np.diag((1, 1, -1, 1))))
    return files


@pytest.fixture
def mosmed(tmp_path: Path) -> Path:
    return fill_mosmed(tmp_path / "mosmed")


def pack(folder: Path, members: Members) -> dict[str, Path]:
    for role, files in members.items():
        (folder / f"{role}.zip").write_bytes(zipped(files))
    return {role: folder / f"{role}.zip" for role in members}


def test_lesion_rule_scales_with_area() -> None:
    for size, least in ((512, 40), (256, 10)):
        mask = np.zeros((3, size, size), dtype=bool)
        mask[0, 0, :least - 1] = mask[1, 0, :least] = True
        assert has_lesion(mask).tolist() == [False, True, False]
    assert not has_lesion(np.zeros((1, 8, 8), dtype=bool)).any()


@pytest.mark.parametrize("says", ["another origin", "nothing"])
def test_outline_with_another_header_takes_the_one_of_its_image(members: Members, tmp_path: Path, says: str) -> None:
    mask = volume(1, (1,))[2]
    moved = PUBLISHED.copy()
    moved[:3, 3] = 50
    content = bytearray(gzip.decompress(nifti(mask, moved)))
    if says == "nothing":
        content[252:256] = bytes(4)  # qform_code and sform_code
    members["mask"]["1.nii.gz"] = gzip.compress(content)
    notes: list[str] = []
    lay_out(entry("medseg2"), pack(tmp_path, members), tmp_path / "out", notes.append)
    case = load_dataset(tmp_path / "out").cases[0]
    assert case.mask is not None
    assert np.array_equal(read_mask(case.mask, like=read_scan(case.image)), mask > 0)
    assert notes == ["mask/1.nii.gz: header differed from its image's and was replaced"]


@pytest.mark.parametrize(("spoil", "kind", "complaint"), [
    (lambda f: f["mask"].pop("1.nii.gz"), DatasetError, "volumes 1 have an image or a mask but not both"),
    (lambda f: f["lung"].update({"2.nii.gz": b""}), DatasetError, "volumes 2 have an image or a lung"),
    (lambda f: f["mask"].update({"1.nii.gz": nifti(volume(1, (), slices=3)[2])}), DatasetError, "has shape"),
    (lambda f: f["mask"].update({"1.nii.gz": b"no scan"}), InputFileError, "cannot be read"),
    (lambda f: f["image"].update({"b/1.nii.gz": b"x"}), DownloadError, "two volumes 1"),
    (lambda f: f["mask"].update({"1.nii.gz": nifti(volume(1, ())[0], np.eye(4))}), InputFileError, "no mask"),
    (lambda f: f["image"].clear(), DatasetError, "holds no NIfTI"),
])
def test_archives_that_do_not_belong_together(spoil: Callable[[Members], object], kind: type[Exception],
                                              complaint: str, members: Members, tmp_path: Path) -> None:
    spoil(members)
    with pytest.raises(kind, match=complaint):
        lay_out(entry("medseg2"), pack(tmp_path, members), tmp_path / "out")
    assert not is_present(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".unpack-*"))


def test_header_that_promises_too_much(members: Members, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nifti_files, "MAX_VOXELS", 1000)
    with pytest.raises(InputFileError, match="claims to hold 16384 voxels"):
        lay_out(entry("medseg2"), pack(tmp_path, members), tmp_path / "out")


def test_stack_keeps_the_published_numbers(stack: dict[str, Path], tmp_path: Path) -> None:
    lay_out(entry("medseg1"), stack, tmp_path / "out")
    table = (tmp_path / "out" / "tr_slices.csv").read_text()
    assert table == "position,medseg100_slice,has_lesion\n0,2,1\n1,1,0\n2,0,0\n"


def test_links_copies_and_a_full_disk(stack: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    lay_out(entry("medseg1"), stack, tmp_path / "linked")
    assert (tmp_path / "linked" / "tr_im.nii.gz").samefile(stack["image"])
    monkeypatch.setattr("os.link", refuse)
    lay_out(entry("medseg1"), stack, tmp_path / "copied")
    assert (tmp_path / "copied" / "tr_im.nii.gz").read_bytes() == stack["image"].read_bytes()
    assert not (tmp_path / "copied" / "tr_im.nii.gz").samefile(stack["image"])
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OutputError, match=r"tr_im\.nii\.gz.*No space left"):
        lay_out(entry("medseg1"), stack, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_mosmed_labels_what_labels_follow_for(mosmed: Path) -> None:
    lay_out_mosmed(mosmed)
    cases = {c.id: c.labels for c in load_dataset(mosmed).cases}
    normal = {0: 0, 1: 0, 2: 0, 3: 0}  # study 4 has a grade only
    assert cases == {"study_0001": normal, "study_0002": normal, "study_0003": normal | {1: 1}}


def test_mosmed_labels_middle_slices_by_the_grade_of_the_study(mosmed: Path) -> None:
    lay_out_mosmed(mosmed)
    assert not (mosmed / "middle").exists(), "one class only"
    (mosmed / "studies" / "CT-2").mkdir()
    (mosmed / "studies" / "CT-2" / "study_0005.nii.gz").write_bytes(nifti(volume(2, (), slices=7)[0]))
    lay_out_mosmed(mosmed)
    cases = {c.id: c for c in load_dataset(mosmed / "middle").cases}
    assert {name: c.labels for name, c in cases.items()} == {"study_0001": {2: 0}, "study_0002": {2: 0},
                                                             "study_0005": {3: 1}}
    assert all(c.mask is None for c in cases.values())
    assert cases["study_0001"].image.samefile(mosmed / "studies" / "CT-0" / "study_0001.nii.gz")


def test_mosmed_whose_folder_cannot_be_read(mosmed: Path, closed: Callable[..., None]) -> None:
    closed(mosmed / "studies")
    with pytest.raises(InputFileError, match=r"studies: cannot be opened \(Permission denied\)"):
        lay_out_mosmed(mosmed)


def test_mosmed_that_cannot_be_laid_out(mosmed: Path, tmp_path: Path) -> None:
    (mosmed / "im").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        lay_out_mosmed(mosmed)
    (mosmed / "studies" / "CT-1" / "study_0003.nii.gz").unlink()
    with pytest.raises(DatasetError, match="outlines without a study: study_0003"):
        lay_out_mosmed(mosmed)
    (tmp_path / "empty" / "studies").mkdir(parents=True)
    with pytest.raises(DatasetError, match="neither"):
        lay_out_mosmed(tmp_path / "empty")


def test_mosmed_may_be_links_to_where_it_lies(mosmed: Path, tmp_path: Path) -> None:
    for path in sorted(mosmed.rglob("*.nii.gz")):
        link = tmp_path / "linked" / path.relative_to(mosmed)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
        (link.parent / f"._{path.name}").write_bytes(b"side file")
    lay_out_mosmed(tmp_path / "linked")
    cases = load_dataset(tmp_path / "linked").cases
    assert [c.id for c in cases] == ["study_0001", "study_0002", "study_0003"]
    assert all(read_scan(c.image).pixels.any() for c in cases)
    assert cases[2].mask is not None
    assert read_mask(cases[2].mask).any()


def test_a_set_that_came_while_one_waited_is_not_fetched_again(mosmed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lay_out_mosmed(mosmed)
    monkeypatch.setattr(layout, "fetch", None)
    layout.get_dataset(entry("medseg2"), mosmed)
