"""Prediction: masks lie on their scans whatever the voxel order, and damage is named, not guessed around."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from nibabel.orientations import axcodes2ornt, ornt_transform
from tiny import TINY, finished_run, quiet, same_weights, stage_name, weights

from covidseg import predict
from covidseg.curriculum import Round
from covidseg.data.scan import Scan, read_mask, read_scan, write_like
from covidseg.errors import ArtifactError, InputFileError, NoLungError, OutputError
from covidseg.lungs import lung_masks
from covidseg.patches import PatchNet
from covidseg.pipeline import Run, find_lungs, write_run
from covidseg.predict import Predictor, export_run, load_predictor, segment, shipped_predictor
from covidseg.preprocess import Crops, make_crops, uncrop, uncrop_all
from covidseg.profiles import read_report
from covidseg.segmenter import lesion_probabilities
from covidseg.store import load_arrays, load_net, write_hash

ORDERS = ["RAS", "LPS", "LAS", "SPL", "ARI"]


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path) -> Run:
    return finished_run(tiny_phantom)


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


def plainly(predictor: Predictor, pixels: np.ndarray, volume: bool | None = None) -> np.ndarray:
    """Probabilities by the stages one after another, each for all slices, with the nets as they were trained."""
    found, crops = find_lungs(pixels, predictor.lung_net, predictor.profile, volume)
    return uncrop_all(lesion_probabilities(predictor.segmenter, crops), crops.boxes, found, pixels.shape)


def test_probabilities_are_those_of_the_stages(tiny_run: Run, interrupted: Scan) -> None:
    predictor = load_predictor(tiny_run.folder)
    longer = replace(interrupted, pixels=np.concatenate([interrupted.pixels] * 4))  # more than two batches
    assert len(longer.pixels) > 2 * predict.BATCH
    for volume in (True, False):
        maps, expected = predictor.probabilities(longer, volume), plainly(predictor, longer.pixels, volume)
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-6)
        assert np.array_equal(maps > 0, expected > 0)
        assert maps.any()


@pytest.mark.slow
@pytest.mark.realct
def test_probabilities_of_the_package_s_nets_on_real_scans(realct: Path) -> None:
    predictor = load_predictor()
    level = predictor.profile.segmenter.threshold
    for name in ("2", "7"):
        scan = read_scan(realct / "medseg9" / "im" / f"{name}.nii.gz")
        some = replace(scan, pixels=scan.pixels[1::3])  # all of them take a quarter of a minute
        maps, expected = predictor.probabilities(some), plainly(predictor, some.pixels)
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-6)
        assert np.array_equal(maps >= level, expected >= level)
        assert (maps >= level).any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("volume", [None, False])
def test_a_file_is_predicted_as_its_array_is(
        tiny_run: Run, tiny_phantom: Path, tmp_path: Path, order: str, volume: bool | None) -> None:
    path = reordered(tiny_phantom / "im" / "phantom_01.nii.gz", order, tmp_path / f"{order}.nii.gz")
    predictor, scan = load_predictor(tiny_run.folder), read_scan(path)
    maps = predictor.probabilities(scan, volume)
    level = float(np.median(maps[maps > 0]))
    made = predictor.predict_file(path, tmp_path / "mask.nii.gz", level, tmp_path / "maps.nii.gz", volume)
    written = read_scan(tmp_path / "maps.nii.gz").pixels
    assert np.array_equal(written, maps)
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", like=scan), written >= np.float32(level))
    assert (made.slices, made.lesion_slices) == (10, (written >= np.float32(level)).any(axis=(1, 2)).sum())
    assert made.lesion_ml == pytest.approx((written >= np.float32(level)).sum() * np.prod(scan.spacing) / 1000)
    predictor.predict_file(path, tmp_path / "again.nii.gz", level, volume=volume)
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "mask.nii.gz").read_bytes()


def test_the_threshold_of_a_file_is_that_of_the_run(tiny_run: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_run.folder)
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    predictor.predict_file(scan, tmp_path / "mask.nii.gz")
    expected = predictor.probabilities(read_scan(scan)) >= TINY.segmenter.threshold
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz"), expected)


def test_nothing_is_written_of_a_scan_without_lungs_or_with_damage(tiny_run: Run, tiny_phantom: Path,
                                                                   tmp_path: Path) -> None:
    predictor = load_predictor(tiny_run.folder)
    nib.save(nib.Nifti1Image(np.zeros((64, 64, 3), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    raw = (tiny_phantom / "im" / "phantom_01.nii.gz").read_bytes()
    (tmp_path / "harmed.nii.gz").write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    for name, error in (("empty", NoLungError), ("harmed", InputFileError)):
        with pytest.raises(error, match=name):
            predictor.predict_file(tmp_path / f"{name}.nii.gz", tmp_path / "out" / "m.nii.gz", None,
                                   tmp_path / "out" / "p.nii.gz")
    assert not list(tmp_path.glob("out/*"))


def test_one_call_from_a_scan_to_its_mask(tiny_run: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    path, predictor = tiny_phantom / "im" / "phantom_01.nii.gz", load_predictor(tiny_run.folder)
    predictor.predict_file(path, tmp_path / "mask.nii.gz")
    mask = segment(path, predictor)
    assert mask.dtype == bool
    assert mask.any()
    for scan in (str(path), read_scan(path)):
        assert np.array_equal(segment(scan, predictor), mask)
    assert np.array_equal(mask, read_mask(tmp_path / "mask.nii.gz"))
    scan = read_scan(path)
    with pytest.raises(NoLungError):
        segment(replace(scan, pixels=np.zeros_like(scan.pixels)), predictor, check=False)


def test_one_call_takes_the_nets_of_the_package_and_reads_them_once(tiny_phantom: Path) -> None:
    scan = read_scan(tiny_phantom / "im" / "phantom_01.nii.gz")
    few = replace(scan, pixels=scan.pixels[4:6])
    shipped = load_predictor()
    assert np.array_equal(segment(few), shipped.probabilities(few) >= shipped.profile.segmenter.threshold)
    assert shipped_predictor() is shipped_predictor()


def test_the_fingerprint_tells_nets_and_settings_apart(tiny_run: Run, tmp_path: Path) -> None:
    predictor = load_predictor(tiny_run.folder)
    export_run(tiny_run.folder, tmp_path / "nets")
    assert load_predictor(tmp_path / "nets").fingerprint() == predictor.fingerprint()
    profile = predictor.profile
    others = [replace(predictor, profile=replace(profile, lungs=replace(profile.lungs, rim=3))),
              replace(predictor, profile=replace(profile, lung_net=replace(profile.lung_net, keep=0.3))),
              replace(predictor, lung_net=None), replace(predictor, lung_net=predictor.segmenter)]
    changed = load_predictor(tiny_run.folder)
    with torch.no_grad():
        next(changed.segmenter.parameters()).view(-1)[0] += 1e-3
    assert len({other.fingerprint() for other in (predictor, changed, *others)}) == 6
    # What was learned from and how is another matter: it shows in the weights.
    assert replace(predictor, profile=replace(profile, cam=replace(profile.cam, layer_share=0.9))).fingerprint() \
        == predictor.fingerprint()


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
    for net in (predictor.segmenter, predictor.lung_net):
        assert not net.training


@pytest.mark.parametrize("number", [1, 2])
def test_the_report_names_the_best_round(copied: Path, tiny_run: Run, number: int) -> None:
    assert read_report(copied)[0]["best_round"] == tiny_run.best()
    run = Run(tiny_run.data, TINY, 0, copied, "cpu", quiet)
    run.rounds = lambda: [Round(float(k == number), 0.0, 0.0) for k in (1, 2)]  # type: ignore[method-assign]
    write_run(run, "a test")
    assert json.loads((copied / "run.json").read_text(encoding="utf-8"))["best_round"] == number
    assert read_report(copied)[2]["patches"] == stage_name(tiny_run, f"mil{number}")


@pytest.fixture
def interrupted(tiny_phantom: Path) -> Scan:
    """A volume whose second slice shows no lung: taken as one body, what lies below it is no part of the lungs."""
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    pixels = scan.pixels.copy()
    pixels[1] = 40
    return replace(scan, pixels=pixels)


def test_slices_of_one_body_or_unrelated_ones(tiny_run: Run, interrupted: Scan) -> None:
    predictor = load_predictor(tiny_run.folder)
    body, stack, measured = (predictor.probabilities(interrupted, volume) for volume in (True, False, None))
    assert not body[0].any()
    assert stack[0].any()
    assert not stack[1].any()
    assert np.array_equal(measured, body), "its neighbours look alike"


def test_a_run_without_a_lung_net_predicts_in_the_threshold_lungs(copied: Path, tiny_phantom: Path,
                                                                  tmp_path: Path) -> None:
    def without(content: dict) -> None:
        content["settings"]["lung_net"]["steps"] = 0
        del content["stages"]["lung_net"]
    edit(copied, without)
    predictor = load_predictor(copied)
    assert predictor.lung_net is None
    assert sorted(path.name for path in export_run(copied, tmp_path / "exported")) == [
        "patches.safetensors", "run.json", "segmenter.safetensors"]
    assert load_predictor(tmp_path / "exported").lung_net is None
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


@pytest.mark.parametrize("stage", ["segmenter", "lung_net", "patches"])
@pytest.mark.parametrize("harm", ["one byte", "half", "gone", "no checksum"])
def test_damaged_weights_are_refused(copied: Path, tiny_run: Run, tmp_path: Path, harm: str, stage: str) -> None:
    path = weights_file(copied, f"mil{tiny_run.best()}" if stage == "patches" else stage)
    content = path.read_bytes()
    if harm == "one byte":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif harm == "half":
        path.write_bytes(content[:len(content) // 2])
    elif harm == "gone":
        path.unlink()
    else:
        path.with_name(f"{path.name}.sha256").unlink()
    if stage == "patches":
        load_predictor(copied)  # needs the two other nets only
    else:
        with pytest.raises(ArtifactError):
            load_predictor(copied)
    with pytest.raises(ArtifactError):
        export_run(copied, tmp_path / "exported")
    assert not (tmp_path / "exported" / "run.json").exists(), "half an export is no run"


def edit(copied: Path, change: object) -> None:
    report = copied / "run.json"
    content = json.loads(report.read_text(encoding="utf-8"))
    change(content)  # type: ignore[operator]
    report.write_text(json.dumps(content), encoding="utf-8")
    write_hash(report)


@pytest.mark.parametrize("change", [
    lambda c: c.pop("stages"), lambda c: c.pop("settings"), lambda c: c["stages"].pop("segmenter"),
    lambda c: c["settings"].pop("fine"), lambda c: c["settings"].pop("name"),
    lambda c: c["settings"]["segmenter"].update(unheard_of=1), lambda c: c.update(settings="text"),
    lambda c: c["settings"]["segmenter"].update(channels=[4, 8, 16]), lambda c: c["settings"].pop("lung_net"),
    lambda c: c["settings"]["lung_net"].update(channels=[4, 8, 16]), lambda c: c["settings"].pop("method"),
    lambda c: c["settings"]["lung_net"]["paint"].update(unheard_of=1), lambda c: c["stages"].pop("lung_net"),
    lambda c: c.pop("best_round"), lambda c: c.update(best_round=7), lambda c: c["settings"].pop("true_lungs"),
    lambda c: c["settings"]["mil"]["curriculum"].pop("order")],
    ids=["no stages", "no settings", "no segmenter", "no part", "no name", "unknown setting", "text", "another net",
         "no settings of the lung net", "another lung net", "no method", "unknown paint",
         "no lung net", "no best round", "no such round", "no choice of lungs", "no order of the curriculum"])
def test_a_report_that_does_not_fit_is_refused(copied: Path, change: object) -> None:
    edit(copied, change)
    with pytest.raises(ArtifactError) as caught:
        load_predictor(copied)
    assert caught.value.path is not None, "which of the files?"
    assert caught.value.remedy


def test_a_later_round_without_its_patch_net_is_refused(copied: Path) -> None:
    edit(copied, lambda c: c.update(best_round=2))
    load_predictor(copied)
    edit(copied, lambda c: c["stages"].pop("mil2"))
    with pytest.raises(ArtifactError, match="mil2"):
        load_predictor(copied)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00broken"], ids=["empty", "cut", "list", "bytes"])
def test_a_report_that_is_no_report_is_refused(copied: Path, content: bytes) -> None:
    (copied / "run.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="checksum"):
        load_predictor(copied)
    write_hash(copied / "run.json")
    with pytest.raises(ArtifactError, match=r"run\.json: is damaged"):
        load_predictor(copied)


# --- a run to share ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "deep" / "nets"
    export_run(tiny_run.folder, folder)
    return folder


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_exported_run_predicts_bit_for_bit_as_the_run(exported: Path, tiny_run: Run, tiny_phantom: Path) -> None:
    a, b = load_predictor(tiny_run.folder), load_predictor(exported)
    assert b.profile == a.profile == TINY
    for name in ("segmenter", "lung_net"):
        assert same_weights(getattr(a, name), getattr(b, name))
    for number in (0, 3):
        scan = read_scan(tiny_phantom / "im" / f"phantom_0{number}.nii.gz")
        maps = b.probabilities(scan)
        assert np.array_equal(maps, a.probabilities(scan))
        assert maps.any()


def test_an_exported_run_holds_nets_and_nothing_of_the_scans(exported: Path, tiny_run: Run) -> None:
    nets = {"segmenter": tiny_run.segmenter(), "patches": tiny_run.mil(tiny_run.best())[0],
            "lung_net": tiny_run.lung_net()}
    files = [f"stages/{name}.safetensors{end}" for name in nets for end in ("", ".sha256")]
    assert sorted(files_in(exported)) == sorted(["run.json", "run.json.sha256", *files])
    for name, net in nets.items():
        arrays, notes = load_arrays(exported / "stages" / f"{name}.safetensors")
        assert notes == {}
        stored = {key.removeprefix("net."): value for key, value in arrays.items()}
        expected = weights(net)  # type: ignore[arg-type]
        assert stored.keys() == expected.keys(), "weights and no array more"
        assert all(np.array_equal(stored[key], expected[key]) for key in expected)
    # The patches of a run lie beside the targets of their curriculum, which are as many as the training slices.
    whole, _ = load_arrays(tiny_run.folder / "stages" / stage_name(tiny_run, f"mil{tiny_run.best()}"))
    assert any(key.startswith("phase") for key in whole)
    size, before = (sum(map(len, files_in(folder).values())) for folder in (exported, tiny_run.folder))
    assert size < 0.5 * before


def test_the_report_of_a_run_goes_along(exported: Path, tiny_run: Run) -> None:
    content, before = (json.loads((folder / "run.json").read_text(encoding="utf-8"))
                       for folder in (exported, tiny_run.folder))
    assert content.pop("stages") == {"segmenter": "segmenter.safetensors", "lung_net": "lung_net.safetensors",
                                     f"mil{tiny_run.best()}": "patches.safetensors"}
    del before["stages"]
    assert content == before
    assert set(content["data"]) == {case.id for case in tiny_run.data.cases}


def test_the_files_written_are_named(tiny_run: Run, tmp_path: Path) -> None:
    written = export_run(tiny_run.folder, tmp_path / "nets")
    assert sorted(str(path.relative_to(tmp_path / "nets")) for path in written) == [
        "run.json", "stages/lung_net.safetensors", "stages/patches.safetensors", "stages/segmenter.safetensors"]
    assert all(path.is_file() for path in written)


def test_an_export_can_be_exported_again(exported: Path, tmp_path: Path) -> None:
    export_run(exported, tmp_path / "again")
    assert files_in(tmp_path / "again") == files_in(exported)


def test_the_patch_net_of_the_best_round_is_exported(copied: Path, tiny_run: Run, tmp_path: Path) -> None:
    assert not same_weights(tiny_run.mil(1)[0], tiny_run.mil(2)[0])
    for number in (1, 2):
        edit(copied, lambda content, best=number: content.update(best_round=best))
        export_run(copied, tmp_path / f"round{number}")
        stored, _ = load_arrays(tmp_path / f"round{number}" / "stages" / "patches.safetensors")
        found = load_net(PatchNet(TINY.mil), {name.removeprefix("net."): value for name, value in stored.items()})
        assert same_weights(found, tiny_run.mil(number)[0])


def test_a_run_is_never_exported_onto_itself(copied: Path, tmp_path: Path) -> None:
    before = files_in(copied)
    (tmp_path / "link").symlink_to(copied)
    for out in (copied, copied / "stages" / "..", tmp_path / "link"):
        with pytest.raises(OutputError, match="overwrite the run"):
            export_run(copied, out)
    assert files_in(copied) == before


def test_the_same_run_is_exported_anew(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "nets"
    export_run(copied, out)
    before = files_in(out)
    (out / "stages" / "segmenter.safetensors").write_bytes(b"damaged")
    edit(copied, lambda content: content.update(finished="later"))
    export_run(copied, out)
    assert json.loads(files_in(out).pop("run.json"))["finished"] == "later"
    report = {"run.json": b"", "run.json.sha256": b""}
    assert {**files_in(out), **report} == {**before, **report}
    read_report(out)


@pytest.mark.parametrize("change", [
    lambda c: c.update(seed=1), lambda c: c["data"].update(phantom_00="another scan"),
    lambda c: c.update(labelled_slices=39), lambda c: c["settings"]["segmenter"].update(rate=0.123),
    lambda c: c.update(best_round=3 - c["best_round"])], ids=["seed", "data", "labels", "settings", "round"])
def test_an_export_of_another_run_is_never_replaced(copied: Path, tmp_path: Path, change: object) -> None:
    out = tmp_path / "nets"
    export_run(copied, out)
    before = files_in(out)
    edit(copied, change)
    with pytest.raises(OutputError, match=r"nets: holds another run\. Name another folder"):
        export_run(copied, out)
    assert files_in(out) == before


@pytest.mark.parametrize("there", ["a run", b"", b"[]", b"\xff"], ids=["a run", "empty", "list", "bytes"])
def test_an_export_replaces_exports_only(exported: Path, copied: Path, tmp_path: Path, there: str | bytes) -> None:
    """A training folder of the very same run would lose its stages from the report."""
    out = copied if there == "a run" else tmp_path
    if isinstance(there, bytes):
        (out / "run.json").write_bytes(there)
    before = files_in(out)
    with pytest.raises(OutputError, match="holds another run"):
        export_run(exported, out)
    assert files_in(out) == before


def test_an_export_needs_a_run_and_room(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"run\.json"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        export_run(tiny_run.folder, tmp_path / "file" / "out")


@pytest.mark.parametrize("file", ["segmenter", "patches", "lung_net"])
def test_a_damaged_export_is_refused(exported: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    path = copy / "stages" / f"{file}.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ArtifactError, match=f"{file}.safetensors"):
        export_run(copy, tmp_path / "again")
    if file != "patches":  # which a prediction does not need
        with pytest.raises(ArtifactError, match=f"{file}.safetensors"):
            load_predictor(copy)


@pytest.mark.parametrize("completed", [True, False])
def test_a_preview_shows_the_lungs_and_lesions_of_the_masks(tiny_phantom: Path, tmp_path: Path, completed: bool,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    monkeypatch.setattr("covidseg.book.preview.preview_page", lambda *args, **named: given.append((args, named)) or "x")
    predictor = shipped_predictor() if completed else replace(shipped_predictor(), lung_net=None, shipped=False)
    scan = tiny_phantom / "im" / "phantom_01.nii.gz"
    plain = predictor.predict_file(scan, tmp_path / "plain.nii.gz", 0.3)
    assert predictor.predict_file(scan, tmp_path / "case.nii.gz", 0.3, preview_target=tmp_path / "p.html") == plain
    assert (tmp_path / "case.nii.gz").read_bytes() == (tmp_path / "plain.nii.gz").read_bytes()
    ((shown, lungs, mask), named), = given
    np.testing.assert_array_equal(mask, read_mask(tmp_path / "case.nii.gz", like=shown))
    found = predictor.lungs(shown)
    np.testing.assert_array_equal(lungs.masks, found.masks)
    assert (lungs.warnings, lungs.volume) == (found.warnings, found.volume) == (plain.warnings, True)
    assert named["name"] == "case"
    assert named["made"] == {
        "nets": "those that come with covidseg" if completed else "of a training run, named by --run",
        "their fingerprint": predictor.fingerprint(), "threshold": "lesion from a probability of 0.3 on"}
