"""The check of a data folder lists every fault, where the readers stop at the first."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_server import fill_mosmed, nifti, volume
from skimage.data import camera

from covidseg.data import check
from covidseg.data.check import check_folder, check_mosmed
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, InputFileError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound data folder with one volume, `a`, that has a lesion in slices 1 and 2. It shows no anatomy."""
    for kind, array in zip(("im", "lung", "mask"), volume(1, (1, 2)), strict=True):
        (tmp_path / "d" / kind).mkdir(parents=True)
        (tmp_path / "d" / kind / "a.nii.gz").write_bytes(nifti(array))
    (tmp_path / "d" / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,0\na,1,1\na,2,1\n")
    return tmp_path / "d"


def faults(folder: Path) -> list[str]:
    return check_folder(folder, anatomy=False).all_faults()


def test_check_of_a_sound_folder(folder: Path) -> None:
    report = check_folder(folder, "HU", anatomy=False)
    assert report.all_faults() == []
    report.raise_faults()
    found = report.volumes[0]
    assert (found.shape, found.unit, found.lung, found.mask) == ((4, 64, 64), "HU", True, True)
    assert np.allclose(found.spacing, (5, 0.7, 0.7))
    assert (found.lesion, found.free, found.unlabelled) == (2, 1, 1)


@pytest.mark.parametrize(("spoil", "complaint"), [
    (lambda d: (d / "lung/a.nii.gz").write_bytes(nifti(volume(1, (), slices=3)[1])), "a: .*lung/a.nii.gz: has shape"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (1, 2))[2], np.eye(4))), "another affine"),
    (lambda d: (d / "lung/a.nii.gz").write_bytes(nifti(volume(1, ())[2])), "a: the lung mask is empty"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (0, 1, 2))[2])), "slices 0 are labelled free"),
    (lambda d: (d / "mask/a.nii.gz").write_bytes(nifti(volume(1, (1,))[2])), "slices 2 are labelled as having"),
    (lambda d: (d / "mask/b.nii.gz").write_bytes(b""), "mask/b.nii.gz belongs to no image"),
    (lambda d: (d / "im/a.nii.gz").write_bytes(nifti(volume(1, ())[0])[:500]), "a: .*cannot be read"),
    (lambda d: (d / "im/a.nii.gz").write_bytes(nifti(volume(1, ())[0] * 0)), "a: every voxel has the value 0"),
    (lambda d: (d / "slice_labels.csv").write_text("volume,slice,has_lesion\na,4,0\n"), "slices 4 are labelled, but"),
    (lambda d: (d / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,2\n"), "line 2"),
    (lambda d: (d / "slice_labels.csv").unlink(), "no such label table"),
    (lambda d: (d / "mask").rename(d / "Masks"), "Masks is not read: its name has to be mask"),
    (lambda d: (d / "lung").rename(d / "lungs"), "lungs is not read: its name has to be lung"),
    (lambda d: (d / "im/b.nrrd").touch(), r"im/b.nrrd is not read: it is no .nii or .nii.gz file"),
])
def test_check_lists_every_fault(spoil: Callable[[Path], object], complaint: str, folder: Path) -> None:
    spoil(folder)
    found = faults(folder)
    assert len(found) == 1
    assert re.search(complaint, found[0])


def test_check_goes_on_after_a_fault(folder: Path) -> None:
    for kind in ("im", "mask"):
        shutil.copy(folder / kind / "a.nii.gz", folder / kind / "b.nii.gz")
    (folder / "lung" / "a.nii.gz").write_bytes(nifti(volume(1, ())[2]))
    assert faults(folder) == ["b: no slice has a line in the label table, so training leaves the volume out",
                              "a: the lung mask is empty"]
    with pytest.raises(DatasetError, match="2 faults found") as caught:
        check_folder(folder, anatomy=False).raise_faults()
    assert caught.value.exit_code == 4


def test_what_predictions_warn_of_is_listed_and_is_no_fault(folder: Path, tiny_phantom: Path, tmp_path: Path) -> None:
    assert check_folder(folder, anatomy=False).all_warnings() == []
    path = folder / "im" / "a.nii.gz"
    raw = bytearray(gzip.decompress(path.read_bytes()))
    np.frombuffer(raw, nib.Nifti1Header.template_dtype, 1)["pixdim"][0, 3] = 1  # beside a sform of 5 mm
    path.write_bytes(gzip.compress(raw))
    report = check_folder(folder, anatomy=False)
    assert report.all_warnings() == [f"a: {read_scan(path).warnings[0]}"]
    assert "0.7 x 0.7 x 5 mm, its pixdim 0.7 x 0.7 x 1 mm" in report.all_warnings()[0]
    assert report.all_faults() == []
    report.raise_faults()

    chest = Path(shutil.copytree(tiny_phantom, tmp_path / "set"))
    path = chest / "im" / "phantom_01.nii.gz"
    scan = read_scan(path)
    pixels = scan.pixels.copy()
    pixels[4] = -1000  # air alone
    write_like(pixels, scan.grid, path)
    report = check_folder(chest)
    assert report.all_warnings() == ["phantom_01: no lung was found in slices 4, between slices that have it"]
    assert report.all_faults() == []


def test_folders_that_cannot_be_read(folder: Path, tmp_path: Path, closed: Callable[..., None]) -> None:
    with pytest.raises(InputFileError, match="File name too long"):
        check_folder(tmp_path / ("x" * 300))
    closed(folder / "mask")
    with pytest.raises(InputFileError, match=r"mask: cannot be opened \(Permission denied\)"):
        check_folder(folder)


def test_a_mask_with_an_accent_that_is_taken_apart_has_its_image(folder: Path) -> None:
    for kind, name in (("im", "u\u0308"), ("mask", "\u00fc"), ("lung", "\u00fc")):
        (folder / kind / "a.nii.gz").rename(folder / kind / f"{name}.nii.gz")
    (folder / "slice_labels.csv").write_text("volume,slice,has_lesion\n\u00fc,0,0\n")
    assert faults(folder) == []


def test_check_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no such data folder"):
        check_folder(tmp_path / "none")
    with pytest.raises(DatasetError, match="holds no scans"):
        check_folder(tmp_path)


def test_check_of_the_anatomy(tiny_phantom: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "set"))
    assert check_folder(folder).all_faults() == []
    path = folder / "im" / "phantom_01.nii.gz"
    scan = read_scan(path)
    write_like(np.broadcast_to(camera()[::4, ::4], scan.pixels.shape), scan.grid, path)  # a photograph
    assert faults(folder) == []
    found = check_folder(folder).all_faults()
    assert len(found) == 1
    assert re.search(r"phantom_01: .*(does not look like chest CT|too little air|no lung)", found[0])


@pytest.fixture
def mosmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A publication of four studies, as far as the check knows."""
    monkeypatch.setattr(check, "MOSMED_STUDIES", {"CT-0": 2, "CT-1": 2})
    monkeypatch.setattr(check, "MOSMED_OUTLINED", range(3, 4))
    return fill_mosmed(tmp_path / "mosmed")


def test_incomplete_mosmed(mosmed: Path) -> None:
    assert faults(mosmed) == []
    (mosmed / "studies" / "CT-0" / "study_0002.nii.gz").rename(mosmed / "studies" / "CT-1" / "study_0001.nii.gz")
    (mosmed / "studies" / "CT-1" / "study_0003.nii.gz").rename(mosmed / "studies" / "CT-1" / "notes.nii.gz")
    assert faults(mosmed) == [
        "studies/CT-0 holds 1 scans, the published set has 2", "studies/CT-1 holds 3 scans, the published set has 2",
        "studies/CT-1/notes.nii.gz is not called study_NNNN.nii.gz", "study 0001 is there twice",
        "masks/study_0003_mask.nii.gz has no study"]
    (mosmed / "masks" / "study_0003_mask.nii.gz").unlink()
    assert faults(mosmed)[-1] == "masks/study_0003_mask.nii.gz is missing"


def test_unit_and_anatomy_are_asked_of_mosmed_as_of_other_folders(mosmed: Path) -> None:
    assert not check_mosmed(mosmed, "HU", anatomy=False).all_faults()
    found = check_folder(mosmed, "display", anatomy=False).all_faults()
    assert any("grey levels of a display window" in fault for fault in found)
    assert any("lung" in fault or "chest CT" in fault for fault in check_folder(mosmed).all_faults()), \
        "numbers by chance"
