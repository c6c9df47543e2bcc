"""Pictures of slices become a data folder: what a picture shows is what is read, and halves share nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pictures
import pytest
from skimage.io import imsave

from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan

SHADES = np.random.default_rng(0).integers(0, 255, (24, 32), np.uint8)
TABLE = "file,study,grade,has_lesion\nCT0_img3.png,a,CT-0,0\nCT2_img4.png,b,CT-2,1\nCT2_img6.png,b,CT-2,1\n"


@pytest.fixture
def published(tmp_path: Path) -> Path:
    (tmp_path / "table.csv").write_text(TABLE)
    for line in TABLE.splitlines()[1:]:
        imsave(tmp_path / line.split(",")[0], SHADES, check_contrast=False)
    imsave(tmp_path / "CT2_img6.png", np.stack([SHADES] * 3, axis=2), check_contrast=False)
    return tmp_path


def arranged(folder: Path, *options: str) -> dict[str, tuple]:
    assert pictures.main([str(folder), str(folder / "table.csv"), str(folder / "out"), *options]) == 0
    return {case.id: (case.patient, case.labels) for case in load_dataset(folder / "out").cases}


def test_a_folder_of_pictures(published: Path) -> None:
    assert arranged(published) == {"CT0_img3": ("a", {0: 0}), "CT2_img4": ("b", {0: 1}), "CT2_img6": ("b", {0: 1})}
    for name in ("CT0_img3", "CT2_img6"):  # grey, and the same in colour
        scan = read_scan(published / "out" / "im" / f"{name}.nii.gz")
        assert (scan.unit, scan.pixels.dtype) == ("display", np.uint8)
        np.testing.assert_array_equal(scan.pixels, SHADES[None])


@pytest.mark.parametrize(("half", "names"), [("odd", ["CT0_img3"]), ("even", ["CT2_img4", "CT2_img6"])])
def test_halves(half: str, names: list[str], published: Path) -> None:
    assert list(arranged(published, f"--{half}")) == names


@pytest.mark.parametrize(("old", "new", "complaint"), [
    ("has_lesion", "lesion", "lacks the column has_lesion"), ("CT-0,0", "CT-0,2", "has_lesion 0 or 1"),
    ("CT0_img3", "CT0_img9", "no picture that can be read"), ("CT0_img3", "three", "no number after 'img'"),
    ("CT2_img4", "CT2_img6", "a second time")])
def test_what_is_wrong_is_said(old: str, new: str, complaint: str, published: Path,
                               capsys: pytest.CaptureFixture[str]) -> None:
    (published / "table.csv").write_text(TABLE.replace(old, new))
    half = ["--odd"] if new == "three" else []
    assert pictures.main([str(published), str(published / "table.csv"), str(published / "out"), *half]) == 4
    assert complaint in capsys.readouterr().err
