"""Prediction: masks lie on their scans whatever the voxel order, and damage is named, not guessed around."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform
from tiny import TINY, finished_run, same_weights

from covidseg import predict
from covidseg.errors import ArtifactError, InputFileError, NoLungError
from covidseg.io import read_scan, write_like
from covidseg.lungs import lung_masks
from covidseg.pipeline import PROFILES, Run
from covidseg.predict import load_predictor, profile_from, profile_json
from covidseg.prepare import Crops, lung_box, make_crops, uncrop

ORDERS = ["RAS", "LPS", "LAS", "SPL", "ARI"]


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tiny_phantom, tmp_path_factory.getbasetemp() / "tiny-run")


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))


def reordered(path: Path, order: str, target: Path) -> Path:
    """The same voxels at the same places, stored along other axes."""
    image = nib.load(path)
    turn = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(order))
    nib.save(image.as_reoriented(turn), target)
    return target


def canonical(image: nib.Nifti1Image) -> np.ndarray:
    return np.asarray(nib.as_closest_canonical(image).dataobj)


@pytest.fixture(scope="module")
def reference(tiny_run: Run, tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """Probabilities of one scan as it is, in canonical order."""
    scan = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    maps = load_predictor(tiny_run.folder).probabilities(scan)
    path = write_like(maps, scan.grid, tmp_path_factory.mktemp("reference") / "p.nii.gz")
    return canonical(nib.load(path))


@pytest.mark.parametrize("order", ORDERS)
def test_result_lies_on_its_scan_in_any_voxel_order(tiny_run: Run, tiny_phantom: Path, tmp_path: Path,
                                                    reference: np.ndarray, order: str) -> None:
    path = reordered(tiny_phantom / "im" / "phantom_01.nii.gz", order, tmp_path / f"{order}.nii.gz")
    scan = read_scan(path)
    maps = load_predictor(tiny_run.folder).probabilities(scan)
    level = float(np.median(maps[maps > 0]))
    given = nib.load(path)
    for array in (maps, maps >= level):
        result = nib.load(write_like(array, scan.grid, tmp_path / "out.nii.gz"))
        assert result.shape == given.shape
        np.testing.assert_allclose(result.affine, given.affine)
        assert nib.aff2axcodes(result.affine) == tuple(order)
    assert 0 < (maps >= level).mean() < 0.5
    np.testing.assert_array_equal(canonical(result), reference >= level)


def touched(found: np.ndarray, crops: Crops, shape: tuple[int, ...]) -> np.ndarray:
    """The lungs of crops in the full slices, with their soft edges, one pixel of the crop wide."""
    result = np.zeros(shape, bool)
    for k, lung, box in zip(found, crops.lungs, crops.boxes, strict=True):
        result[k] = uncrop(lung, box, shape[1:]) > 0
    return result


def test_probabilities_stay_in_the_lung(tiny_run: Run, tiny_phantom: Path) -> None:
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    maps = load_predictor(tiny_run.folder).probabilities(scan)
    lungs = tiny_run.lungs(scan.pixels)  # the completed ones
    edges = touched(*tiny_run.crops(scan.pixels), maps.shape)
    assert maps.shape == scan.pixels.shape
    assert maps.dtype == np.float32
    assert (maps[~edges] == 0).all()
    assert (maps[lungs] > 0).mean() > 0.95
    assert edges.sum() < 1.5 * lungs.sum()
    assert maps.max() <= 1
    assert (lungs != lung_masks(scan.pixels)).any(), "the threshold alone finds other lungs"


def test_crops_go_back_to_where_they_came_from(tiny_run: Run, tiny_phantom: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A segmenter that marks one quarter of its crop has to mark that quarter of the lungs' box in the full slice."""
    def upper_left(net: object, crops: Crops) -> np.ndarray:
        marked = np.zeros(crops.images.shape, np.float32)
        marked[:, :40, :40] = 1
        return marked * crops.lungs

    monkeypatch.setattr(predict, "lesion_probabilities", upper_left)
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    found = load_predictor(tiny_run.folder).probabilities(scan) >= 0.5
    thresholds, lungs = lung_masks(scan.pixels), tiny_run.lungs(scan.pixels)
    rows, columns = np.mgrid[:128, :128]
    for k in np.flatnonzero(thresholds.any(axis=(1, 2))):
        top, left, height, width = lung_box(thresholds[k], TINY.prepare.margin)
        expected = lungs[k] & (rows < top + height / 2) & (columns < left + width / 2)
        assert expected.sum() > 50
        assert 2 * (found[k] & expected).sum() / (found[k].sum() + expected.sum()) > 0.97


def test_many_slices_are_predicted_in_parts(tiny_run: Run, tiny_phantom: Path) -> None:
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    predictor = load_predictor(tiny_run.folder)
    once = predictor.probabilities(scan)
    longer = type(scan)(np.concatenate([scan.pixels] * 3), scan.spacing, scan.value_range, scan.unit, scan.path,
                        scan.grid)
    lungs = lung_masks(longer.pixels)
    thrice = predictor.probabilities(longer)
    same = np.flatnonzero([np.array_equal(a, b) for a, b in zip(lungs[:10], lung_masks(scan.pixels), strict=True)])
    assert len(same) >= 5
    np.testing.assert_allclose(thrice[same], once[same], atol=1e-5)
    assert (thrice[20:] > 0).any()


def test_a_scan_without_lungs_is_refused(tiny_run: Run, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((64, 64, 3), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    with pytest.raises(NoLungError, match=r"empty\.nii\.gz.*no lung"):
        load_predictor(tiny_run.folder).probabilities(read_scan(tmp_path / "empty.nii.gz"))


def test_the_stored_segmenter_and_settings_come_back(tiny_run: Run) -> None:
    predictor = load_predictor(tiny_run.folder)
    assert same_weights(predictor.segmenter, tiny_run.segmenter())
    assert predictor.lung_net is not None
    assert same_weights(predictor.lung_net, tiny_run.lung_net())
    assert predictor.profile == TINY
    assert not predictor.segmenter.training
    assert not predictor.lung_net.training


def test_a_run_without_a_lung_net_predicts_in_the_threshold_lungs(copied: Path, tiny_phantom: Path) -> None:
    def without(content: dict) -> None:
        content["settings"]["lung_net"]["steps"] = 0
        del content["stages"]["lung_net"]
    edit(copied, without)
    predictor = load_predictor(copied)
    assert predictor.lung_net is None
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    maps, lungs = predictor.probabilities(scan), lung_masks(scan.pixels)
    assert (maps[lungs] > 0).mean() > 0.95
    found = np.flatnonzero(lungs.any(axis=(1, 2)))
    crops = make_crops(scan.pixels[found], lungs[found], TINY.prepare)
    assert (maps[~touched(found, crops, maps.shape)] == 0).all()


def test_a_folder_without_run_json_is_no_run(copied: Path, tmp_path: Path) -> None:
    (copied / "run.json").unlink()
    for folder in (copied, tmp_path / "nowhere"):
        with pytest.raises(InputFileError, match=r"run\.json"):
            load_predictor(folder)


def weights_file(copied: Path, stage: str) -> Path:
    return copied / "stages" / json.loads((copied / "run.json").read_text())["stages"][stage]


@pytest.mark.parametrize("stage", ["segmenter", "lung_net"])
@pytest.mark.parametrize("harm", ["one byte", "half", "gone", "no checksum"])
def test_damaged_weights_are_refused(copied: Path, harm: str, stage: str) -> None:
    path = weights_file(copied, stage)
    content = path.read_bytes()
    if harm == "one byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "half":
        path.write_bytes(content[:len(content) // 2])
    elif harm == "gone":
        path.unlink()
    else:
        path.with_name(f"{path.name}.sha256").unlink()
    with pytest.raises(ArtifactError):
        load_predictor(copied)


def edit(copied: Path, change: object) -> None:
    report = copied / "run.json"
    content = json.loads(report.read_text(encoding="utf-8"))
    change(content)  # type: ignore[operator]
    report.write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize("change", [
    lambda c: c.pop("stages"), lambda c: c.pop("settings"), lambda c: c["stages"].pop("segmenter"),
    lambda c: c["settings"].pop("fine"), lambda c: c["settings"].pop("name"),
    lambda c: c["settings"]["segmenter"].update(unheard_of=1), lambda c: c.update(settings="text"),
    lambda c: c["settings"]["segmenter"].update(channels=[4, 8, 16]), lambda c: c["settings"].pop("lung_net"),
    lambda c: c["settings"]["lung_net"].update(channels=[4, 8, 16]), lambda c: c["settings"].pop("method"),
    lambda c: c["settings"]["lung_net"]["paint"].update(unheard_of=1), lambda c: c["stages"].pop("lung_net")],
    ids=["no stages", "no settings", "no segmenter", "no part", "no name", "unknown setting", "text", "another net",
         "no settings of the lung net", "another lung net", "no method", "unknown paint",
         "no lung net"])
def test_a_report_that_does_not_fit_is_refused(copied: Path, change: object) -> None:
    edit(copied, change)
    with pytest.raises(ArtifactError):
        load_predictor(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00broken"], ids=["empty", "cut", "list", "bytes"])
def test_a_report_that_is_no_report_is_refused(copied: Path, content: bytes) -> None:
    (copied / "run.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"run\.json"):
        load_predictor(copied)


@pytest.mark.parametrize("name", ["tiny", *PROFILES])
def test_settings_survive_json(name: str) -> None:
    profile = TINY if name == "tiny" else PROFILES[name]
    assert profile_from(json.loads(json.dumps(profile_json(profile)))) == profile
