"""Stages are computed once, found again by what made them, repeat with the seed, and never see a mask."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import STAGES, TINY, all_stages, finished_run, quiet, same_weights

from covidseg.dataset import load_dataset
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluate import training_truth
from covidseg.io import read_scan, write_like
from covidseg.pipeline import PROFILES, Run, open_data, open_run, profile_named

TRAINED = ("classifier", "mil", "segmenter")
STEP = {"classifier": "classifier step", "mil": "patches step", "segmenter": "segmenter step"}


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tiny_phantom, tmp_path_factory.getbasetemp() / "tiny-run")


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run's folder that a test may damage."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))


def again(run: Run, folder: Path, **changes: object) -> tuple[Run, list[str]]:
    """A new Run object on a folder, and the list its log goes to."""
    lines: list[str] = []
    given = {"data": run.data, "profile": run.profile, "seed": run.seed, **changes}
    return Run(**given, folder=folder, device="cpu", log=lines.append), lines  # type: ignore[arg-type]


def trained_stages(lines: list[str]) -> list[str]:
    return [stage for stage, start in STEP.items() if any(line.startswith(start) for line in lines)]


def stage_file(run: Run, folder: Path, stage: str) -> Path:
    return folder / "stages" / run.store.used[stage]


def same_results(a: Run, b: Run) -> bool:
    """All six stages, bit for bit."""
    return (np.array_equal(a.weak().crops.images, b.weak().crops.images)
            and np.array_equal(a.weak().crops.lungs, b.weak().crops.lungs)
            and same_weights(a.classifier(), b.classifier()) and np.array_equal(a.cam(), b.cam())
            and same_weights(a.mil()[0], b.mil()[0]) and np.array_equal(a.fine().labels, b.fine().labels)
            and np.array_equal(a.fine().weights, b.fine().weights) and same_weights(a.segmenter(), b.segmenter()))


def test_each_stage_is_stored_in_its_own_file(tiny_run: Run) -> None:
    files = [p.name.split("-")[0] for p in (tiny_run.folder / "stages").glob("*.safetensors")]
    assert sorted(f for f in files if f != "supervised") == sorted(STAGES)


def test_a_second_run_reads_what_is_stored(tiny_run: Run, copied: Path) -> None:
    before = {p.name: p.stat().st_mtime_ns for p in (copied / "stages").iterdir()}
    run, lines = again(tiny_run, copied)
    all_stages(run)
    assert lines == [], "nothing is trained a second time"
    assert {p.name: p.stat().st_mtime_ns for p in (copied / "stages").iterdir()} == before
    assert same_results(run, tiny_run)
    assert [p.pace for p in run.mil()[1]] == [p.pace for p in tiny_run.mil()[1]]
    assert all(np.array_equal(a.target, b.target) for a, b in zip(run.mil()[1], tiny_run.mil()[1], strict=True))


def test_the_last_stage_alone_does_not_read_the_others(tiny_run: Run, copied: Path) -> None:
    for stage in STAGES[:-1]:
        stage_file(tiny_run, copied, stage).unlink()
    run, lines = again(tiny_run, copied)
    assert same_weights(run.segmenter(), tiny_run.segmenter())
    assert lines == []


def test_a_stopped_run_goes_on_where_it_stopped(tiny_run: Run, copied: Path) -> None:
    stage_file(tiny_run, copied, "segmenter").unlink()
    stage_file(tiny_run, copied, "fine").unlink()
    run, lines = again(tiny_run, copied)
    assert same_weights(run.segmenter(), tiny_run.segmenter())
    assert trained_stages(lines) == ["segmenter"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_damaged_stage_file_is_computed_again(tiny_run: Run, copied: Path, stage: str) -> None:
    path = stage_file(tiny_run, copied, stage)
    content = bytearray(path.read_bytes())
    content[-1] ^= 0xFF
    path.write_bytes(content)
    run, lines = again(tiny_run, copied)
    all_stages(run)
    assert trained_stages(lines) == [s for s in TRAINED if s == stage]
    assert same_results(run, tiny_run)
    assert path.read_bytes() != bytes(content), "the damaged file has been replaced"


def test_the_same_seed_trains_the_same_weights_bit_for_bit(tiny_run: Run, tmp_path: Path) -> None:
    run, lines = again(tiny_run, tmp_path / "fresh")
    all_stages(run)
    assert trained_stages(lines) == list(TRAINED)
    assert same_results(run, tiny_run)


def test_another_seed_trains_other_weights(tiny_run: Run, copied: Path) -> None:
    run, lines = again(tiny_run, copied, seed=1)
    assert not same_weights(run.classifier(), tiny_run.classifier())
    assert trained_stages(lines) == ["classifier"]


def keys(run: Run) -> list[str]:
    return [run.key(stage) for stage in STAGES]


def changed(run: Run, other: Run) -> tuple[str, ...]:
    return tuple(stage for stage, a, b in zip(STAGES, keys(run), keys(other), strict=True) if a != b)


@pytest.mark.parametrize(("field", "setting", "value", "first"), [
    ("lungs", "smooth", 1.3, "weak"), ("prepare", "margin", 0.11, "weak"), ("classifier", "steps", 9, "classifier"),
    ("cam", "top", 91.0, "cam"), ("mil", "paces", (0.0, 0.1, 0.2, 0.3), "mil"), ("fine", "beta", 77.0, "fine"),
    ("segmenter", "rate", 0.123, "segmenter")])
def test_a_changed_setting_concerns_its_stage_and_those_after_it(
        tiny_run: Run, tmp_path: Path, field: str, setting: str, value: object, first: str) -> None:
    part = replace(getattr(TINY, field), **{setting: value})
    other, _ = again(tiny_run, tmp_path, profile=replace(TINY, **{field: part}))
    assert changed(tiny_run, other) == STAGES[STAGES.index(first):]


def test_the_seed_concerns_all_that_is_trained(tiny_run: Run, tmp_path: Path) -> None:
    assert changed(tiny_run, again(tiny_run, tmp_path, seed=1)[0]) == STAGES[1:]


def test_the_name_of_the_profile_and_of_the_folder_concern_nothing(tiny_run: Run, tiny_phantom: Path,
                                                                    tmp_path: Path) -> None:
    moved = load_dataset(shutil.copytree(tiny_phantom, tmp_path / "elsewhere"))
    assert changed(tiny_run, again(tiny_run, tmp_path, data=moved, profile=replace(TINY, name="x"))[0]) == ()


def test_a_changed_scan_label_or_patient_concerns_everything(tiny_run: Run, tiny_phantom: Path,
                                                             tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    scan = read_scan(folder / "im" / "phantom_01.nii.gz")
    pixels = scan.pixels.copy()
    pixels[0, 0, 0] += 1
    write_like(pixels, scan.grid, scan.path)
    assert changed(tiny_run, again(tiny_run, tmp_path, data=load_dataset(folder))[0]) == STAGES
    case = tiny_run.data.cases[1]
    for other in (replace(case, labels={**case.labels, 0: 1 - case.labels[0]}), replace(case, patient="other")):
        data = replace(tiny_run.data, cases=(tiny_run.data.cases[0], other, *tiny_run.data.cases[2:]))
        assert changed(tiny_run, again(tiny_run, tmp_path, data=data)[0]) == STAGES


@pytest.mark.parametrize("state", ["deleted", "garbage", "inverted"])
def test_weak_training_never_opens_a_mask(tiny_run: Run, tiny_phantom: Path, tmp_path: Path, state: str) -> None:
    """The honesty of every figure hangs on this: without masks, the very same weights come out."""
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    shutil.rmtree(folder / "kind")
    for part in ("mask", "lung"):
        for path in sorted((folder / part).iterdir()):
            if state == "deleted":
                path.unlink()
            elif state == "garbage":
                path.write_bytes(b"no mask at all")
            else:
                scan = read_scan(path)
                write_like(scan.pixels == 0, scan.grid, path)
    run, lines = again(tiny_run, tmp_path / "run", data=load_dataset(folder))
    all_stages(run)
    assert trained_stages(lines) == list(TRAINED), "nothing was taken from the other run"
    assert same_results(run, tiny_run)


def test_a_flipped_label_changes_the_weights(tiny_run: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    """The counterpart: what training may see does have an effect."""
    folder = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    table = folder / "slice_labels.csv"
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    for row in rows[::3]:
        row["has_lesion"] = str(1 - int(row["has_lesion"]))
    with table.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    run, _ = again(tiny_run, tmp_path / "run", data=load_dataset(folder))
    assert not same_weights(run.classifier(), tiny_run.classifier())


def test_results_have_the_shapes_and_ranges_they_claim(tiny_run: Run) -> None:
    count, side = len(tiny_run.weak()), TINY.prepare.size
    assert tiny_run.cam().shape == tiny_run.coarse().shape == tiny_run.patches().shape == (count, side, side)
    assert set(np.unique(tiny_run.coarse())) <= {0, 1, 255}
    free = tiny_run.weak().labels == 0
    assert (tiny_run.coarse()[free] == 0).all()
    assert not tiny_run.fine().labels[free].any()
    assert tiny_run.fine().labels.dtype == bool
    assert len(tiny_run.mil()[1]) == len(TINY.mil.paces)


def test_the_upper_bound_learns_from_the_masks_it_is_given(tiny_run: Run, copied: Path) -> None:
    for path in (copied / "stages").glob("supervised-*"):  # another test may have asked for it
        path.unlink()
    run, lines = again(tiny_run, copied)
    masks = training_truth(run)
    net = run.supervised(masks)
    assert trained_stages(lines) == ["segmenter"]
    second, quiet_lines = again(tiny_run, copied)
    assert same_weights(net, second.supervised(masks))
    assert quiet_lines == []
    third, _ = again(tiny_run, copied)
    assert not same_weights(net, third.supervised(~masks & run.weak().crops.lungs))
    assert not same_weights(net, tiny_run.segmenter())


def test_profiles_by_name() -> None:
    assert profile_named("quick").name == "quick"
    assert profile_named("full").name == "full"
    with pytest.raises(SettingsError, match=r"'slow'.*quick, full"):
        profile_named("slow")


@pytest.mark.parametrize("profile", PROFILES.values(), ids=list(PROFILES))
def test_sizes_of_the_profiles_fit_patches_and_strides(profile: object) -> None:
    assert profile.prepare.size % 40 == 0  # type: ignore[attr-defined]
    assert profile.prepare.size % 2 ** (len(profile.segmenter.channels) - 1) == 0  # type: ignore[attr-defined]
    assert len(profile.mil.paces) == len(profile.mil.weights) == len(profile.mil.trust)  # type: ignore[attr-defined]


def test_a_run_lies_where_the_environment_says(tiny_phantom: Path, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROFILES, "quick", TINY)
    monkeypatch.setenv("COVIDSEG_RUNS", str(tmp_path / "runs"))
    run = open_run(str(tiny_phantom), "quick", 7, part=None, device="cpu", log=quiet)
    assert run.folder == tmp_path / "runs" / f"{tiny_phantom.name}-quick-seed7"
    assert run.profile is TINY
    assert open_run(str(tiny_phantom), seed=7, folder=tmp_path / "own", part=None).folder == tmp_path / "own"


def test_a_folder_without_a_split_cannot_be_split(tiny_phantom: Path) -> None:
    assert len(open_data(str(tiny_phantom)).cases) == 4
    with pytest.raises(DatasetError, match="no split"):
        open_data(str(tiny_phantom), "train")
    with pytest.raises(DatasetError, match="neither a data folder"):
        open_data(str(tiny_phantom / "nowhere"))
