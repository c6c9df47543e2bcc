"""Stages are computed once, found again by what made them, repeat with the seed, and never see a mask."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STAGES, TINY, all_stages, content, dice, quiet, same_weights, stage_name

from covidseg import pipeline
from covidseg.augment import PaintSettings
from covidseg.classifier import Ensemble
from covidseg.curriculum import MutualSettings, agreement, make_guidance
from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation.evaluate import training_truth
from covidseg.lungs import threshold_lungs
from covidseg.patches import PatchNet
from covidseg.pipeline import Run, open_data, open_run, write_run
from covidseg.preprocess import crop, make_crops, with_true_lungs
from covidseg.profiles import PROFILES
from covidseg.segmenter import fine_labels, make_segmenter
from covidseg.store import check_hash, load_arrays

# How the log calls the nets that are trained.
LOGGED = {"lung_net": "lungs", "classifier1": "classifier", "mil1": "patches", "classifier2": "classifier-2",
          "mil2": "patches-2", "segmenter": "segmenter"}


def again(run: Run, folder: Path, **changes: object) -> tuple[Run, list[str]]:
    """A new Run object on a folder, and the list its log goes to."""
    lines: list[str] = []
    given = {"data": run.data, "profile": run.profile, "seed": run.seed, **changes}
    return Run(**given, folder=folder, device="cpu", log=lines.append), lines  # type: ignore[arg-type]


def copied_data(run: Run, target: Path) -> Path:
    """A copy of the run's data that a test may change."""
    return Path(shutil.copytree(run.data.root, target / "data"))


def trained_stages(lines: list[str]) -> set[str]:
    """How the log calls what was trained."""
    return {found[1] for line in lines if (found := re.match(r"([\w-]+) step ", line))}


@pytest.fixture
def taught(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, ...]]:
    """What a run hands to the training of nets, none of which is trained."""
    given: dict[str, tuple[Any, ...]] = {}

    def instead(name: str, make: Callable[[Any], Any]) -> None:
        def train(*handed: Any, **rest: Any) -> Any:
            given[name] = *handed, rest
            return make(handed[-1])
        monkeypatch.setattr(pipeline, f"train_{name}", train)
    instead("ensemble", Ensemble)
    instead("mil", lambda settings: (PatchNet(settings), []))
    instead("segmenter", make_segmenter)
    return given


def kind(stage: str) -> str:
    """``classifier`` of ``classifier2``."""
    return stage.rstrip("0123456789")


def read_every_stage(run: Run) -> None:
    """Asks for each stage on its own: the last one, if it is there, needs none of the others."""
    for stage in STAGES:
        number = stage.removeprefix(kind(stage))
        getattr(run, kind(stage))(*([int(number)] if number else []))


def stage_file(run: Run, folder: Path, stage: str) -> Path:
    return folder / "stages" / stage_name(run, stage)


def same_results(run: Run, folder: Path) -> bool:
    """All stages of a run and those in a folder, bit for bit; their files hold times as well."""
    def arrays(where: Path, stage: str) -> dict[str, np.ndarray]:
        return load_arrays(stage_file(run, where, stage))[0]
    pairs = [(arrays(run.folder, stage), arrays(folder, stage)) for stage in STAGES]
    return all(a.keys() == b.keys() and all(np.array_equal(a[name], b[name], equal_nan=True) for name in a)
               for a, b in pairs)


def test_a_second_run_reads_what_is_stored(tiny_run: Run, copied: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (copied / "stages").iterdir()}
    run, lines = again(tiny_run, copied)
    read_every_stage(run)
    assert lines == [], "nothing is trained a second time"
    assert {p.name: p.stat().st_mtime_ns for p in (copied / "stages").iterdir()} == before
    for one, other in ((run.segmenter(), tiny_run.segmenter()), (run.lung_net(), tiny_run.lung_net()),
                       (run.ensemble(2), tiny_run.ensemble(2)), (run.mil(2)[0], tiny_run.mil(2)[0])):
        assert same_weights(one, other)
    for one, other in zip(run.mil()[1], tiny_run.mil()[1], strict=True):
        assert one.pace == other.pace
        assert np.array_equal(one.target, other.target)
    for stage in STAGES[:-1]:
        stage_file(tiny_run, copied, stage).unlink()
    run, lines = again(tiny_run, copied)
    assert same_weights(run.segmenter(), tiny_run.segmenter()), "the last stage does not read the others"
    assert lines == []


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_stage_file_is_computed_again(tiny_run: Run, copied: Path, stage: str) -> None:
    path = stage_file(tiny_run, copied, stage)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    run, lines = again(tiny_run, copied)
    read_every_stage(run)
    assert trained_stages(lines) == ({LOGGED[stage]} if stage in LOGGED else set())
    assert same_results(tiny_run, copied)


def changed(run: Run, other: Run) -> tuple[str, ...]:
    """The stages that the one cannot take from the other."""
    return tuple(stage for stage in STAGES if run.key(stage) != other.key(stage))


@pytest.mark.parametrize(("setting", "value", "first"), [
    ("lungs.smooth", 1.3, "threshold"), ("prepare.margin", 0.11, "threshold"), ("true_lungs", True, "weak"),
    ("lung_net.steps", 9, "lung_net"), ("lung_net.keep", 0.3, "lung_net"),
    ("lung_net.paint", PaintSettings(share=0.5), "lung_net"), ("classifier.steps", 9, "classifier1"),
    ("cam.top", 91.0, "cam1"), ("mil.rate", 0.123, "mil1"), ("mutual.painted", 0.4, "classifier2"),
    ("mutual.weights", (0.4, 1.0), "classifier2"), ("fine.beta", 77.0, "fine"), ("segmenter.rate", 0.123, "segmenter")])
def test_a_changed_setting_concerns_its_stage_and_those_after_it(
        tiny_run: Run, tmp_path: Path, setting: str, value: Any, first: str) -> None:
    field, _, name = setting.partition(".")
    part = replace(getattr(TINY, field), **{name: value}) if name else value
    other, _ = again(tiny_run, tmp_path, profile=replace(TINY, **{field: part}))
    assert changed(tiny_run, other) == STAGES[STAGES.index(first):]


def test_true_lung_files_concern_only_who_looks_at_them(tiny_run: Run, tmp_path: Path) -> None:
    folder = copied_data(tiny_run, tmp_path)
    looking = {"profile": replace(TINY, true_lungs=True, name="x")}
    before, moved = (again(tiny_run, tmp_path, data=data, **looking)[0]
                     for data in (tiny_run.data, load_dataset(folder)))
    assert changed(before, moved) == (), "neither the folder nor the name of the profile matters"
    scan = read_scan(folder / "lung" / "phantom_01.nii.gz")
    write_like(scan.pixels == 0, scan.grid, scan.path)
    data = load_dataset(folder)
    assert changed(tiny_run, again(tiny_run, tmp_path, data=data)[0]) == ()
    assert changed(before, again(tiny_run, tmp_path, data=data, **looking)[0]) == STAGES[STAGES.index("weak"):]


def test_a_changed_scan_name_label_patient_or_check_concerns_everything_and_the_seed_what_is_trained(
        tiny_run: Run, tmp_path: Path) -> None:
    folder = copied_data(tiny_run, tmp_path)
    scan = read_scan(folder / "im" / "phantom_01.nii.gz")
    pixels = scan.pixels.copy()
    pixels[0, 0, 0] += 1
    write_like(pixels, scan.grid, scan.path)
    first, case, *rest = tiny_run.data.cases
    for data in (load_dataset(folder), *(replace(tiny_run.data, cases=(first, other, *rest)) for other in (
            replace(case, labels={**case.labels, 0: 1 - case.labels[0]}), replace(case, patient="other"),
            replace(case, id="renamed"))), replace(tiny_run.data, check=not tiny_run.data.check)):
        assert changed(tiny_run, again(tiny_run, tmp_path, data=data)[0]) == STAGES
    assert changed(tiny_run, again(tiny_run, tmp_path, seed=1)[0]) == STAGES[1:]


def test_changed_code_concerns_everything(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two releases the version says nothing about it."""
    before = [tiny_run.key(stage) for stage in STAGES]
    monkeypatch.setattr(pipeline, "code_hash", lambda: "another")
    after = again(tiny_run, tmp_path)[0]
    assert all(key != after.key(stage) for key, stage in zip(before, STAGES, strict=True))


def test_weak_training_never_opens_a_mask_and_repeats_bit_for_bit(tiny_run: Run, tmp_path: Path) -> None:
    """The honesty of every figure hangs on this: with masks deleted, broken or inverted the same weights come out."""
    folder = copied_data(tiny_run, tmp_path)
    shutil.rmtree(folder / "kind")
    for part in ("mask", "lung"):
        deleted, broken, *inverted = sorted((folder / part).iterdir())
        deleted.unlink()
        broken.write_bytes(b"no mask at all")
        for path in inverted:
            scan = read_scan(path)
            write_like(scan.pixels == 0, scan.grid, path)
    run, lines = again(tiny_run, tmp_path / "run", data=load_dataset(folder))
    all_stages(run)
    assert trained_stages(lines) == set(LOGGED.values()), "nothing was taken from the other run"
    assert same_results(tiny_run, run.folder)
    # The counterpart: what training may see does have an effect.
    cases = [replace(case, labels={k: label ^ (k % 3 == 0) for k, label in case.labels.items()})
             for case in tiny_run.data.cases]
    other, _ = again(tiny_run, tmp_path / "other", data=replace(tiny_run.data, cases=tuple(cases)))
    assert not same_weights(other.classifier(), tiny_run.classifier())


def test_losses_are_stored_with_the_stage(tiny_run: Run, copied: Path) -> None:
    run, _ = again(tiny_run, copied)
    for stage, loss in (("lung_net", "loss"), ("classifier1", "flip"), ("classifier2", "guidance"), ("mil1", "bag"),
                        ("segmenter", "fine")):
        history = run.history(stage)
        assert [entry["step"] for entry in history][-1] in (TINY.classifier.steps, TINY.classifier.steps // 2)
        assert all(np.isfinite(entry[loss]) for entry in history)
    assert run.segmenter().history == run.history("segmenter")
    assert run.ensemble(2).history == run.history("classifier2")
    assert {entry["member"] for entry in run.history("classifier2")} == {1}


# --- lungs ------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def volume(tiny_phantom: Path) -> np.ndarray:
    return read_scan(load_dataset(tiny_phantom).cases[0].image).pixels


def test_training_and_new_slices_get_their_lungs_alike(tiny_run: Run, volume: np.ndarray) -> None:
    found, crops = tiny_run.crops(volume)
    data = tiny_run.weak()
    mine = np.flatnonzero([name in {f"phantom_00:{k}" for k in found} for name in data.names])
    assert len(mine) == len(found) > 5
    assert np.array_equal(crops.boxes, data.crops.boxes[mine])
    np.testing.assert_allclose(crops.images, data.crops.images[mine], atol=2e-3)  # stored in half precision
    assert (crops.lungs == data.crops.lungs[mine]).mean() > 0.999
    assert not np.array_equal(data.crops.lungs, tiny_run.threshold().crops.lungs), "the net has its say"
    assert np.array_equal(data.crops.images, tiny_run.threshold().crops.images)


def test_lungs_of_whole_slices(tiny_run: Run, volume: np.ndarray) -> None:
    blank = np.concatenate([volume, np.full((1, *volume.shape[1:]), -1000, volume.dtype)])
    lungs = tiny_run.lungs(blank)
    assert lungs.shape == blank.shape
    assert lungs.dtype == bool
    assert not lungs[-1].any()
    found, crops = tiny_run.crops(blank)
    assert len(volume) not in found
    for k, lung, box in zip(found, crops.lungs, crops.boxes, strict=True):
        assert dice(crop(lungs[k], box, TINY.prepare.size, 0.0) > 0.5, lung) > 0.95
    nothing = np.zeros((3, 64, 64), np.int16)
    assert [len(part) for part in tiny_run.crops(nothing)] == [0, 0]
    assert not tiny_run.lungs(nothing).any()


def test_true_lungs_take_the_place_of_found_ones_in_training_only(tiny_run: Run, copied: Path,
                                                                  volume: np.ndarray) -> None:
    profile = replace(TINY, true_lungs=True)
    run, lines = again(tiny_run, copied, profile=profile)
    found, expected = run.weak(), with_true_lungs(run.data, tiny_run.threshold())
    np.testing.assert_array_equal(found.crops.lungs, expected.crops.lungs)
    for other in (tiny_run.weak(), tiny_run.threshold()):
        assert not np.array_equal(found.crops.lungs, other.crops.lungs)
        for one, same in ((found.crops.images, other.crops.images), (found.crops.boxes, other.crops.boxes),
                          (found.labels, other.labels)):
            assert np.array_equal(one, same)
    np.testing.assert_array_equal(run.threshold().crops.lungs, tiny_run.threshold().crops.lungs)
    assert lines == [], "no net is asked"
    np.testing.assert_array_equal(run.crops(volume)[1].lungs, tiny_run.crops(volume)[1].lungs)
    stored, _ = again(tiny_run, copied, profile=profile)
    np.testing.assert_array_equal(stored.weak().crops.lungs, expected.crops.lungs)
    bare = replace(tiny_run.data, cases=tuple(replace(case, lung=None) for case in tiny_run.data.cases))
    with pytest.raises(DatasetError, match="no lung mask"):
        again(tiny_run, copied / "bare", data=bare, profile=profile)[0].weak()


def test_without_a_lung_net_the_threshold_has_the_last_word(tiny_run: Run, tmp_path: Path,
                                                            volume: np.ndarray) -> None:
    run, lines = again(tiny_run, tmp_path, profile=replace(TINY, lung_net=replace(TINY.lung_net, steps=0)))
    assert run.lung_net() is None
    assert np.array_equal(run.weak().crops.lungs, run.threshold().crops.lungs)
    assert lines == []
    assert not list((tmp_path / "stages").glob("lung_net-*"))
    found, crops = run.crops(volume)
    masks = threshold_lungs(volume)
    assert found.tolist() == np.flatnonzero(masks.any(axis=(1, 2))).tolist()
    assert np.array_equal(crops.lungs, make_crops(volume[found], masks[found], TINY.prepare).lungs)
    assert dice(run.lungs(volume), masks) > 0.95
    run.profile = replace(run.profile, mutual=MutualSettings(exchange="to_patches"))
    assert run.stages() == ["threshold", "weak", "classifier1", "cam1", "mil1", "patches1", "fine", "segmenter"]


def test_results_have_the_shapes_and_ranges_they_claim(tiny_run: Run) -> None:
    assert tuple(tiny_run.stages()) == STAGES
    count, side, fine = len(tiny_run.weak()), TINY.prepare.size, tiny_run.fine()
    assert tiny_run.cam().shape == tiny_run.coarse().shape == tiny_run.patches().shape == (count, side, side)
    assert set(np.unique(tiny_run.coarse())) <= {0, 1, 255}
    free = tiny_run.weak().labels == 0
    for maps in (tiny_run.coarse(), fine.labels, fine.probabilities):
        assert (maps[free] == 0).all()
    assert (fine.probabilities[~free] > 0).any()
    assert fine.labels.dtype == bool
    assert len(tiny_run.mil()[1]) == len(TINY.mil.curriculum.paces)
    figures = tiny_run.agreements()
    assert len(figures) == TINY.mutual.rounds
    assert figures[0] != figures[1]
    assert figures == [agreement(tiny_run.weak(), tiny_run.cam(k), tiny_run.patches(k)) for k in (1, 2)]


def test_later_rounds_teach_a_new_classifier_places_and_the_patch_net_goes_on(
        tiny_run: Run, copied: Path, taught: dict[str, tuple[Any, ...]]) -> None:
    mutual = replace(TINY.mutual, painted=0.25, again=0.5)
    run, _ = again(tiny_run, copied, profile=replace(TINY, mutual=mutual), seed=0)
    run.mil(2)
    *_, settings, rest = taught["ensemble"]
    assert settings == replace(TINY.classifier, paint=replace(TINY.classifier.paint, share=0.25))
    guidance = make_guidance(tiny_run.weak(), tiny_run.patches(1), mutual, 2)
    assert rest["guidance"].weight == guidance.weight == mutual.weights[0]
    assert np.array_equal(rest["guidance"].target, guidance.target)
    *_, settings, rest = taught["mil"]
    assert settings == replace(TINY.mil, steps=4)
    assert same_weights(rest["start"], tiny_run.mil(1)[0])
    first, _ = again(tiny_run, copied / "fresh", profile=run.profile)
    first.weak = tiny_run.weak  # type: ignore[method-assign]
    first.classifier(1)
    *_, settings, rest = taught["ensemble"]
    assert settings == TINY.classifier, "the first round is as it was"
    assert "guidance" not in rest


def test_the_segmenter_is_taught_the_targets_of_the_fine_labels(tiny_run: Run, copied: Path,
                                                                taught: dict[str, tuple[Any, ...]]) -> None:
    stored, _ = load_arrays(stage_file(tiny_run, copied, "fine"))
    assert stored.keys() == {"labels", "probabilities"}
    fine = tiny_run.fine()
    np.testing.assert_array_equal(stored["labels"], fine.labels)
    np.testing.assert_array_equal(stored["probabilities"], fine.probabilities)
    stage_file(tiny_run, copied, "segmenter").unlink()
    again(tiny_run, copied)[0].segmenter()
    _, targets, weights, *_ = taught["segmenter"]
    np.testing.assert_array_equal(targets, fine.targets)
    np.testing.assert_array_equal(weights, fine.weights)
    assert not np.array_equal(fine.targets, fine.labels), "not the walker's decisions alone"


@pytest.mark.parametrize(("exchange", "last"), [("both", 2), ("to_patches", 1)])
def test_fine_labels_come_from_the_last_round(tiny_run: Run, copied: Path, exchange: str, last: int) -> None:
    stage_file(tiny_run, copied, "fine").unlink()
    run, lines = again(tiny_run, copied, profile=replace(TINY, mutual=replace(TINY.mutual, exchange=exchange)), seed=0)
    mine, other = (fine_labels(tiny_run.weak(), tiny_run.cam(k), tiny_run.patches(k), TINY.fine)
                   for k in (last, 3 - last))
    found = run.fine()
    for part in ("labels", "probabilities", "targets", "weights"):
        np.testing.assert_array_equal(getattr(found, part), getattr(mine, part))
    assert not np.array_equal(mine.probabilities, other.probabilities), "the rounds differ"
    assert [line.split(":")[0] for line in lines] == [f"round {k}" for k in range(1, last + 1)], "nothing was trained"


def test_the_upper_bound_learns_from_the_masks_it_is_given(tiny_run: Run, copied: Path) -> None:
    for path in (copied / "stages").glob("supervised-*"):  # another test may have asked for it
        path.unlink()
    run, lines = again(tiny_run, copied)
    masks = training_truth(run)
    net = run.supervised(masks)
    assert trained_stages(lines) == {"supervised"}
    assert not same_weights(net, run.supervised(~masks & run.weak().crops.lungs)), "other masks, another net"
    second, quiet_lines = again(tiny_run, copied)
    for again_asked in (run, second):
        assert same_weights(net, again_asked.supervised(masks))
    assert quiet_lines == []
    assert not same_weights(net, tiny_run.segmenter())


def test_a_run_lies_where_the_environment_says(tiny_phantom: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "quick", TINY)
    monkeypatch.setenv("COVIDSEG_RUNS", str(tmp_path / "runs"))
    run = open_run(str(tiny_phantom), "quick", 7, part=None, device="cpu", log=quiet)
    assert run.folder == tmp_path / "runs" / f"{tiny_phantom.name}-quick-extended-seed7"
    assert run.profile is TINY
    own = open_run(str(tiny_phantom), seed=7, folder=tmp_path / "own")
    assert own.folder == tmp_path / "own"
    assert len(own.data.cases) == 4, "a folder has no split, so all of it"
    monkeypatch.chdir(tiny_phantom)
    assert open_run(".", seed=7).folder.name == f"{tiny_phantom.name}-quick-extended-seed7"


def test_the_report_of_another_run_is_kept_under_a_number(tiny_run: Run, tmp_path: Path) -> None:
    said: list[str] = []
    folder = Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))
    before = (folder / "run.json").read_bytes()
    for seed, reports in ((tiny_run.seed, ["run.json"]), (tiny_run.seed + 1, ["run-1.json", "run.json"])):
        write_run(Run(tiny_run.data, tiny_run.profile, seed, folder, "cpu", said.append), "a test")
        assert sorted(path.name for path in folder.glob("run*.json")) == reports
    assert json.loads((folder / "run-1.json").read_text())["seed"] == json.loads(before)["seed"]
    check_hash(folder / "run-1.json")
    assert said[-1:] == ["the run that was there is another, and its report is kept as run-1.json"]


@pytest.mark.parametrize("inside", [".", "im", "mask/new", "../link", "../link/im"])
def test_a_run_does_not_lie_among_its_data(inside: str, tiny_phantom: Path, tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    (tmp_path / "link").symlink_to(data)
    with pytest.raises(SettingsError, match="among its data"):
        open_run(str(data), folder=data / inside)
    assert content(data) == content(tiny_phantom)
    for folder in (tmp_path / "data-run", data / "runs" / "new"):
        assert open_run(str(data), folder=folder).folder == folder


@pytest.mark.parametrize("seed", ["0", 1.5, -1, None, 2 ** 32])
def test_a_seed_is_a_whole_number(seed: object, tiny_phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="is no seed"):
        open_run(str(tiny_phantom), seed=seed, folder=tmp_path / "run")  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_a_volume_without_labels_is_left_out_aloud(tiny_run: Run, tmp_path: Path) -> None:
    data = copied_data(tiny_run, tmp_path)
    table = data / "slice_labels.csv"
    table.write_text("".join(line for line in table.read_text().splitlines(True) if "phantom_02" not in line))
    said: list[str] = []
    run = open_run(str(data), part=None, device="cpu", folder=tmp_path / "run", log=said.append)
    assert said == ["without a label, and so without a part in training: phantom_02"]
    assert not any(name.startswith("phantom_02") for name in run.threshold().names)
    open_run(str(tiny_run.data.root), part=None, device="cpu", folder=tmp_path / "run", log=said.append)
    assert len(said) == 1


def test_a_folder_without_a_split_cannot_be_split(tiny_phantom: Path) -> None:
    assert len(open_data(str(tiny_phantom)).cases) == 4
    with pytest.raises(DatasetError, match="no split"):
        open_data(str(tiny_phantom), "train")
    with pytest.raises(DatasetError, match="neither a data folder"):
        open_data(str(tiny_phantom / "nowhere"))


def test_crops_of_new_slices_are_stored_and_the_same_again(tiny_run: Run, copied: Path, tiny_phantom: Path,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = again(tiny_run, copied)
    pixels = read_scan(tiny_phantom / "im" / "phantom_00.nii.gz").pixels
    found, crops = run.crops(pixels)
    assert len(found) == len(crops) > 0
    monkeypatch.setattr("covidseg.pipeline.find_lungs", lambda *_: pytest.fail("was to be read from store"))
    twice, stored = run.crops(pixels)
    assert (twice == found).all()
    for name in ("images", "lungs", "boxes"):
        assert np.array_equal(getattr(stored, name), getattr(crops, name))
        assert getattr(stored, name).dtype == getattr(crops, name).dtype
    with pytest.raises(pytest.fail.Exception):
        run.crops(pixels + 1)  # other values are another scan
    with pytest.raises(pytest.fail.Exception):
        run.crops(pixels, volume=False)
