"""Prediction: masks lie on their scans whatever the voxel order, and damage is named, not guessed around."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from inputs import squeezed
from nibabel.orientations import axcodes2ornt, ornt_transform
from tiny import TINY, content, dice, same_weights, stage_name, weights

from covidseg import predict
from covidseg.data.scan import Grid, read_mask, read_scan, write_like
from covidseg.errors import ArtifactError, InputFileError, NoLungError, OutputError
from covidseg.lungs import threshold_lungs
from covidseg.patches import PatchNet
from covidseg.pipeline import Run, find_lungs
from covidseg.predict import Predictor, export_run, load_predictor, segment, shipped_predictor
from covidseg.preprocess import Crops, make_crops, uncrop, uncrop_all
from covidseg.profiles import read_report
from covidseg.segmenter import lesion_probabilities
from covidseg.store import load_arrays, load_net, write_hash

ORDERS = ["RAS", "LPS", "LAS", "SPL", "ARI"]


def reordered(path: Path, order: str, target: Path) -> Path:
    """The same voxels at the same places, stored along other axes."""
    image = nib.load(path)
    turn = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(order))
    nib.save(image.as_reoriented(turn), target)
    return target


@pytest.fixture(scope="module")
def predictor(tiny_run: Run) -> Predictor:
    return load_predictor(tiny_run.folder)


@pytest.fixture
def scan_file(tiny_phantom: Path) -> Path:
    return tiny_phantom / "im" / "phantom_01.nii.gz"


def in_lungs(maps: np.ndarray, lungs: np.ndarray, crops: Crops, found: np.ndarray) -> bool:
    """Whether maps are above zero in the lungs of slices, and zero beyond the soft edges, one pixel of the crop wide,
    of those of the crops."""
    edges = np.zeros(maps.shape, bool)
    for k, lung, box in zip(found, crops.lungs, crops.boxes, strict=True):
        edges[k] = uncrop(lung, box, maps.shape[1:]) > 0
    return not maps[~edges].any() and (maps[lungs] > 0).mean() > 0.95 and edges.sum() < 1.5 * lungs.sum()


def test_probabilities_stay_in_the_lung(tiny_run: Run, predictor: Predictor, scan_file: Path, copied: Path,
                                        tmp_path: Path) -> None:
    scan = read_scan(scan_file)
    maps, completed = predictor.probabilities(scan), tiny_run.lungs(scan.pixels)
    threshold = threshold_lungs(scan.pixels)
    assert maps.shape == scan.pixels.shape
    assert maps.dtype == np.float32
    assert maps.max() <= 1
    assert (completed != threshold).any(), "the threshold alone finds other lungs"
    found, crops = tiny_run.crops(scan.pixels)
    assert in_lungs(maps, completed, crops, found)

    # Without a lung net the threshold has the last word.
    def without(report: dict) -> None:
        report["settings"]["lung_net"]["steps"] = 0
        del report["stages"]["lung_net"]
    edit(copied, without)
    plain = load_predictor(copied)
    assert plain.lung_net is None
    assert [path.name for path in sorted(export_run(copied, tmp_path / "exported"))] == [
        "run.json", "patches.safetensors", "segmenter.safetensors"]
    assert load_predictor(tmp_path / "exported").lung_net is None
    found = np.flatnonzero(threshold.any(axis=(1, 2)))
    crops = make_crops(scan.pixels[found], threshold[found], TINY.prepare)
    assert in_lungs(plain.probabilities(scan), threshold, crops, found)


def plainly(predictor: Predictor, pixels: np.ndarray, volume: bool | None = None) -> np.ndarray:
    """Probabilities by the stages one after another, each for all slices, with the nets as they were trained."""
    found, crops = find_lungs(pixels, predictor.lung_net, predictor.profile, volume)
    return uncrop_all(lesion_probabilities(predictor.segmenter, crops), crops.boxes, found, pixels.shape)


def test_probabilities_are_those_of_the_stages(predictor: Predictor, tiny_phantom: Path) -> None:
    scan = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz")
    scan.pixels[1] = 40  # shows no lung: taken as one body, what lies below it is no part of the lungs
    longer = replace(scan, pixels=np.concatenate([scan.pixels] * 4))  # more than two batches
    assert len(longer.pixels) > 2 * predict.BATCH
    for volume in (True, False):
        maps, expected = predictor.probabilities(longer, volume), plainly(predictor, longer.pixels, volume)
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-6)
        assert np.array_equal(maps > 0, expected > 0)
        assert maps.any()
    body, stack, measured = (predictor.probabilities(scan, volume) for volume in (True, False, None))
    assert not body[0].any()
    assert stack[0].any()
    assert not stack[1].any()
    assert np.array_equal(measured, body), "its neighbours look alike"


def test_pixels_that_are_not_square_change_little(predictor: Predictor, scan_file: Path, tmp_path: Path) -> None:
    plain = read_scan(scan_file)
    grid = Grid((plain.grid.shape[0], plain.grid.shape[1] // 2, plain.grid.shape[2]),
                plain.grid.affine @ np.diag([1, 2, 1, 1]))
    flat = read_scan(write_like(squeezed(plain.pixels, 2, 1), grid, tmp_path / "flat.nii.gz"))
    assert (plain.aspect(), flat.aspect()) == (1, pytest.approx(2))
    lungs = squeezed(predictor.lungs(plain).masks, 2, 1)
    assert dice(predictor.lungs(flat).masks, lungs) > 0.95  # measured .98, and .61 if pixels are taken for square
    expected, found = squeezed(predictor.probabilities(plain), 2, 1), predictor.probabilities(flat)
    assert np.abs(found - expected)[lungs].mean() < 0.1     # measured .01 and .28


@pytest.mark.slow
@pytest.mark.realct
def test_probabilities_of_the_package_s_nets_on_real_scans(realct: Path) -> None:
    predictor = load_predictor()
    level = predictor.profile.segmenter.threshold
    for name in ("2", "7"):
        scan = read_scan(realct / "medseg9" / "im" / f"{name}.nii.gz")
        some = replace(scan, pixels=scan.pixels[1::3])  # all of them take a quarter of a minute
        maps, expected = predictor.probabilities(some), plainly(predictor, some.pixels)
        np.testing.assert_allclose(maps, expected, rtol=0, atol=1e-5)
        assert np.array_equal(maps >= level, expected >= level)
        assert (maps >= level).any()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("volume", [None, False])
def test_a_file_is_predicted_as_its_array_is_and_the_result_lies_on_it_in_any_voxel_order(
        predictor: Predictor, scan_file: Path, tmp_path: Path, order: str, volume: bool | None) -> None:
    path = reordered(scan_file, order, tmp_path / f"{order}.nii.gz")
    scan, straight = read_scan(path), read_scan(scan_file)
    maps, expected = predictor.probabilities(scan, volume), predictor.probabilities(straight, volume)
    level = float(np.median(maps[maps > 0]))
    made = predictor.predict_file(path, tmp_path / "mask.nii.gz", level, tmp_path / "maps.nii.gz", volume)
    written, mask = read_scan(tmp_path / "maps.nii.gz").pixels, read_mask(tmp_path / "mask.nii.gz", like=scan)
    assert np.array_equal(written, maps)
    assert np.array_equal(mask, written >= np.float32(level))
    assert 0 < mask.mean() < 0.5
    assert (made.slices, made.lesion_slices) == (10, mask.any(axis=(1, 2)).sum())
    assert made.lesion_ml == pytest.approx(mask.sum() * np.prod(scan.spacing) / 1000)
    for name, reference in (("maps", expected), ("mask", expected >= np.float32(level))):
        given, result = nib.load(path), nib.load(tmp_path / f"{name}.nii.gz")
        assert result.shape == given.shape
        np.testing.assert_allclose(result.affine, given.affine)
        assert nib.aff2axcodes(result.affine) == tuple(order)
        like = nib.load(write_like(reference, straight.grid, tmp_path / "reference.nii.gz"))
        np.testing.assert_array_equal(*(np.asarray(nib.as_closest_canonical(i).dataobj) for i in (result, like)))
    predictor.predict_file(path, tmp_path / "again.nii.gz", level, volume=volume)
    assert (tmp_path / "again.nii.gz").read_bytes() == (tmp_path / "mask.nii.gz").read_bytes()


def test_nothing_is_written_of_a_scan_without_lungs_or_with_damage(predictor: Predictor, scan_file: Path,
                                                                   tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((64, 64, 3), np.int16), np.eye(4)), tmp_path / "empty.nii.gz")
    raw = scan_file.read_bytes()
    (tmp_path / "harmed.nii.gz").write_bytes(raw[:-5] + bytes([raw[-5] ^ 1]) + raw[-4:])
    for name, error in (("empty", NoLungError), ("harmed", InputFileError)):
        with pytest.raises(error, match=name):
            predictor.predict_file(tmp_path / f"{name}.nii.gz", tmp_path / "out" / "m.nii.gz", None,
                                   tmp_path / "out" / "p.nii.gz")
    assert not list(tmp_path.glob("out/*"))
    empty = read_scan(tmp_path / "empty.nii.gz")
    for refused in (predictor.probabilities, lambda scan: segment(scan, predictor, check=False)):
        with pytest.raises(NoLungError, match=r"empty\.nii\.gz.*no lung"):
            refused(empty)


def test_one_call_from_a_scan_to_its_mask(tiny_run: Run, predictor: Predictor, scan_file: Path, tmp_path: Path) -> None:
    predictor.predict_file(scan_file, tmp_path / "mask.nii.gz")
    scan, mask = read_scan(scan_file), read_mask(tmp_path / "mask.nii.gz")
    assert mask.any()
    assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", like=scan_file), mask)
    written = write_like(mask, scan, tmp_path / "again.nii.gz")
    assert written.read_bytes() == (tmp_path / "mask.nii.gz").read_bytes()
    folder = tiny_run.folder
    for given, nets in ((scan_file, predictor), (str(scan_file), folder), (scan, str(folder))):
        found = segment(given, nets)
        assert found.dtype == bool
        assert np.array_equal(found, mask)
    assert np.array_equal(mask, predictor.probabilities(scan) >= TINY.segmenter.threshold)
    # Unless others are named, the nets are those of the package, which are read once.
    few, shipped = replace(scan, pixels=scan.pixels[4:6]), load_predictor()
    assert np.array_equal(segment(few), shipped.probabilities(few) >= shipped.profile.segmenter.threshold)
    assert shipped_predictor() is shipped_predictor()


def test_the_fingerprint_tells_nets_and_settings_apart(tiny_run: Run, predictor: Predictor, exported: Path) -> None:
    assert load_predictor(exported).fingerprint() == predictor.fingerprint()
    profile, changed = predictor.profile, load_predictor(tiny_run.folder)
    others = [replace(predictor, profile=replace(profile, lungs=replace(profile.lungs, rim=3))),
              replace(predictor, profile=replace(profile, lung_net=replace(profile.lung_net, keep=0.3))),
              replace(predictor, lung_net=None), replace(predictor, lung_net=predictor.segmenter)]
    with torch.no_grad():
        next(changed.segmenter.parameters()).view(-1)[0] += 1e-3
    assert len({other.fingerprint() for other in (predictor, changed, *others)}) == 6
    # What was learned from and how is another matter: it shows in the weights.
    assert replace(predictor, profile=replace(profile, cam=replace(profile.cam, layer_share=0.9))).fingerprint() \
        == predictor.fingerprint()


def test_the_patch_net_of_the_last_round_is_exported(copied: Path, tiny_run: Run, tmp_path: Path) -> None:
    assert not same_weights(tiny_run.mil(1)[0], tiny_run.mil(2)[0])
    assert read_report(copied)[2]["patches"] == stage_name(tiny_run, "mil2")
    export_run(copied, tmp_path / "nets")
    stored, _ = load_arrays(tmp_path / "nets" / "stages" / "patches.safetensors")
    found = load_net(PatchNet(TINY.mil), {name.removeprefix("net."): value for name, value in stored.items()})
    assert same_weights(found, tiny_run.mil(2)[0])


def weights_file(copied: Path, stage: str) -> Path:
    return copied / "stages" / json.loads((copied / "run.json").read_text())["stages"][stage]


@pytest.mark.parametrize("stage", ["segmenter", "lung_net", "patches"])
def test_damaged_weights_are_refused(copied: Path, tiny_run: Run, tmp_path: Path, stage: str) -> None:
    path = weights_file(copied, "mil2" if stage == "patches" else stage)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with nullcontext() if stage == "patches" else pytest.raises(ArtifactError, match=path.name):
        load_predictor(copied)  # needs the two other nets only
    with pytest.raises(ArtifactError, match=path.name):
        export_run(copied, tmp_path / "exported")
    assert not (tmp_path / "exported" / "run.json").exists(), "half an export is no run"


def edit(copied: Path, change: object) -> None:
    report = copied / "run.json"
    changed = json.loads(report.read_text(encoding="utf-8"))
    change(changed)  # type: ignore[operator]
    report.write_text(json.dumps(changed), encoding="utf-8")
    write_hash(report)


@pytest.mark.parametrize("change", [
    lambda c: c.pop("stages"), lambda c: c.pop("settings"), lambda c: c["stages"].pop("segmenter"),
    lambda c: c["stages"].pop("lung_net"), lambda c: c["settings"]["lung_net"]["paint"].update(unheard_of=1),
    lambda c: c["settings"].pop("true_lungs"), lambda c: c.update(settings="text"),
    lambda c: c["stages"].pop("mil2"),
    lambda c: c["settings"]["segmenter"].update(channels=[4, 8, 16]),
    lambda c: c["settings"]["lung_net"].update(channels=[4, 8, 16])],
    ids=["no stages", "no settings", "no segmenter", "no lung net", "unknown paint", "no choice of lungs", "text",
         "a later round without its patch net", "another net", "another lung net"])
def test_a_report_that_does_not_fit_is_refused(copied: Path, change: object) -> None:
    edit(copied, change)
    with pytest.raises(ArtifactError) as caught:
        load_predictor(copied)
    assert caught.value.path is not None, "which of the files?"
    assert caught.value.remedy


@pytest.mark.parametrize("written", [b"", b"{", b"[]", b"\xff\xfe\x00broken"], ids=["empty", "cut", "list", "bytes"])
def test_a_report_that_is_no_report_is_refused(copied: Path, written: bytes) -> None:
    report = copied / "run.json"
    report.write_bytes(written)
    with pytest.raises(ArtifactError, match="checksum"):
        load_predictor(copied)
    write_hash(report)
    with pytest.raises(ArtifactError, match=r"run\.json: is damaged"):
        load_predictor(copied)
    report.unlink()
    for folder in (copied, copied / "nowhere"):
        with pytest.raises(InputFileError, match=r"run\.json"):
            load_predictor(folder)


# --- a run to share ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tiny_run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "deep" / "nets"
    export_run(tiny_run.folder, folder)
    return folder


def test_an_exported_run_predicts_bit_for_bit_as_the_run(exported: Path, tiny_run: Run, predictor: Predictor,
                                                         tiny_phantom: Path) -> None:
    other = load_predictor(exported)
    for each in (predictor, other):
        assert each.profile == TINY
        for net, stored in ((each.segmenter, tiny_run.segmenter()), (each.lung_net, tiny_run.lung_net())):
            assert same_weights(net, stored)
            assert not net.training
    for number in (0, 3):
        scan = read_scan(tiny_phantom / "im" / f"phantom_0{number}.nii.gz")
        maps = other.probabilities(scan)
        assert np.array_equal(maps, predictor.probabilities(scan))
        assert maps.any()


def test_an_exported_run_holds_nets_and_report_and_nothing_of_the_scans(exported: Path, tiny_run: Run, tmp_path: Path
                                                                        ) -> None:
    nets = {"segmenter": tiny_run.segmenter(), "mil2": tiny_run.mil(2)[0],
            "lung_net": tiny_run.lung_net()}
    names = {stage: f"{'patches' if 'mil' in stage else stage}.safetensors" for stage in nets}
    written = {"run.json", *(f"stages/{name}" for name in names.values())}
    assert content(exported).keys() == {name + end for name in written for end in ("", ".sha256")}
    for stage, net in nets.items():
        arrays, notes = load_arrays(exported / "stages" / names[stage])
        assert notes == {}
        stored, expected = {key.removeprefix("net."): value for key, value in arrays.items()}, weights(net)
        assert stored.keys() == expected.keys(), "weights and no array more"
        assert all(np.array_equal(stored[key], expected[key]) for key in expected)
    # The patches of a run lie beside the targets of their curriculum, which are as many as the training slices.
    whole, _ = load_arrays(tiny_run.folder / "stages" / stage_name(tiny_run, "mil2"))
    assert any(key.startswith("phase") for key in whole)
    size, before = (sum(map(len, content(folder).values())) for folder in (exported, tiny_run.folder))
    assert size < 0.5 * before
    report, first = (json.loads((folder / "run.json").read_text("utf-8")) for folder in (exported, tiny_run.folder))
    assert report == {**first, "stages": names}
    assert set(report["data"]) == {case.id for case in tiny_run.data.cases}
    # An export can be exported again; the files written are named.
    again = tmp_path / "again"
    assert {str(path.relative_to(again)) for path in export_run(exported, again)} == written
    assert content(again) == content(exported)


def test_a_run_is_never_exported_onto_itself(copied: Path, tmp_path: Path) -> None:
    before = content(copied)
    (tmp_path / "link").symlink_to(copied)
    for out in (copied, copied / "stages" / "..", tmp_path / "link"):
        with pytest.raises(OutputError, match="overwrite the run"):
            export_run(copied, out)
    assert content(copied) == before


def test_the_same_run_is_exported_anew(copied: Path, tmp_path: Path) -> None:
    out = tmp_path / "nets"
    export_run(copied, out)
    before = content(out)
    (out / "stages" / "segmenter.safetensors").write_bytes(b"damaged")
    edit(copied, lambda report: report.update(finished="later"))
    export_run(copied, out)
    assert read_report(out)[0]["finished"] == "later"
    report = {"run.json": b"", "run.json.sha256": b""}
    assert {**content(out), **report} == {**before, **report}


@pytest.mark.parametrize("change", [
    lambda c: c.update(seed=1), lambda c: c["data"].update(phantom_00="another scan"),
    lambda c: c.update(labelled_slices=39), lambda c: c["settings"]["segmenter"].update(rate=0.123),
    None, b"", b"[]", b"\xff"],
    ids=["seed", "data", "labels", "settings", "training folder", "empty", "list", "bytes"])
def test_an_export_of_another_run_or_anything_else_is_never_replaced(exported: Path, copied: Path, tmp_path: Path,
                                                                     change: Any) -> None:
    """A training folder of the very same run would lose its stages from the report."""
    run, out = exported, copied if change is None else tmp_path / "nets"
    if callable(change):
        run = copied
        export_run(run, out)
        edit(run, change)
    elif change is not None:
        out.mkdir()
        (out / "run.json").write_bytes(change)
    before = content(out)
    with pytest.raises(OutputError, match=f"{out.name}: holds another run. Name another folder"):
        export_run(run, out)
    assert content(out) == before


def test_an_export_needs_a_run_and_room(tiny_run: Run, tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match=r"run\.json"):
        export_run(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError):
        export_run(tiny_run.folder, tmp_path / "file" / "out")


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
