"""The systems of Table 1: maps of all of them, nets trained once, costs, and labels as their only teacher."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import STAGES, TINY, TINY_BASELINES, finished_run, quiet, same_weights

from covidseg.baselines.decovnet import DeCoVNet, keep_top
from covidseg.data.folder import load_dataset
from covidseg.data.scan import read_scan, write_like
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation import methods
from covidseg.evaluation.evaluate import training_truth
from covidseg.evaluation.methods import BASELINE_PROFILES, PUBLISHED, SYSTEMS, Trained, system_names
from covidseg.gradcam import activation_maps
from covidseg.pipeline import Run
from covidseg.preprocess import Crops
from covidseg.profiles import PROFILES, faithful
from covidseg.segmenter import GAINS, PLAIN, lesion_probabilities
from covidseg.store import load_arrays

LUNGS = ("threshold", "lung_net", "weak")
# Stages of each system's own, and those of the nets that give its answer.
OWN = {
    "otsu": ((), ()), "grad-cam": (("classifier1",), ("classifier1",)),
    "decovnet": (("decovnet2d",), ("decovnet2d",)), "decovnet-3d": (("decovnet3d",), ("decovnet3d",)),
    "ad3d-mil": (("ad3dmil2d",), ("ad3dmil2d",)), "ad3d-mil-3d": (("ad3dmil3d",), ("ad3dmil3d",)),
    "faithful": (STAGES[3:], ("segmenter",)), "extended": (STAGES[3:], ("segmenter",)),
    "masks": (("supervised",), ("supervised",)),
}
EARLIER = ("decovnet", "decovnet-3d", "ad3d-mil", "ad3d-mil-3d")


def folder_of(run: Run, folder: Path, lines: list[str] | None = None, **changes: object) -> Run:
    """The same run in another folder."""
    given = {"data": run.data, "profile": TINY, "seed": 0, **changes}
    return Run(**given, folder=folder, device="cpu",  # type: ignore[arg-type]
               log=quiet if lines is None else lines.append)


@pytest.fixture(scope="module")
def run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A folder of its own that starts with the stages of the extended method."""
    finished = finished_run(tiny_phantom)
    folder = Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("systems") / "run"))
    for path in (folder / "stages").glob("supervised-*"):  # another test may have asked for it
        path.unlink()
    return folder_of(finished, folder)


@pytest.fixture(scope="module")
def trained(run: Run) -> dict[str, Trained]:
    return {name: system.train(run, TINY_BASELINES) for name, system in SYSTEMS.items()}


@pytest.fixture(scope="module")
def crops(run: Run) -> Crops:
    return run.crops(read_scan(run.data.cases[1].image).pixels)[1]


def stored(trained: Trained, stage: str) -> Path:
    return trained.run.store.path(stage, trained.stages[stage])


def test_every_system_is_looked_at() -> None:
    assert list(OWN) == list(SYSTEMS)
    assert BASELINE_PROFILES.keys() == PROFILES.keys()
    assert {system.published for system in SYSTEMS.values()} == {*PUBLISHED, ""}
    assert {len(row) for row in PUBLISHED.values()} == {5}
    for baselines in (*BASELINE_PROFILES.values(), TINY_BASELINES):
        plain, *nets = vars(baselines).values()
        assert (plain.layer_share, plain.scales) == (0, (1.0,)), "Grad-CAM and nothing else"
        assert [settings.dims for settings in nets] == [2, 2, 3, 3]


@pytest.mark.parametrize("volume", [True, False], ids=["volume", "stack"])
@pytest.mark.parametrize("name", list(SYSTEMS))
def test_maps_of_every_system(trained: dict[str, Trained], crops: Crops, name: str, volume: bool) -> None:
    method = trained[name].method
    nothing = method.maps(crops.take(np.zeros(0, int)), volume)[1]
    assert [len(one) for one in nothing] == [0] * len(method.rows), "no lung, no outline"
    for some in (crops, crops.take(np.array([3]))):
        probability, maps = method.maps(some, volume)
        assert len(maps) == len(method.rows)
        for one in maps:
            assert one.shape == some.images.shape
            assert np.isfinite(one).all()
            assert ((one >= 0) & (one <= 1)).all()
            assert (one[~some.lungs] == 0).all(), "nothing outside the lung"
        if name in ("otsu", "masks"):
            assert probability is None, "it judges no slice"
        else:
            assert probability is not None
            assert probability.shape == (len(some),)
            assert ((probability >= 0) & (probability <= 1)).all()
        if name in EARLIER:
            assert not maps[-1][probability < 0.5].any(), "nothing is outlined where the net finds no lesion"
    for _, supervision, level in method.rows:
        assert supervision == {"otsu": "none", "masks": "pixel masks"}.get(name, "slice labels")
        assert np.isnan(level) if name == "otsu" else 0 < level < 1


@contextmanager
def all_ill(trained: Trained) -> Iterator[None]:
    """Inside the ``with`` block the net of an earlier system calls every slice ill: an untrained one calls none."""
    net = trained.nets[-1]
    bias = net.classes.bias if isinstance(net, DeCoVNet) else net.score.bias
    with torch.no_grad():
        before = bias.clone()
        bias[-1] += 9
        yield
        bias.copy_(before)


def test_volume_or_stack_makes_a_difference_to_slabs_only(trained: dict[str, Trained], crops: Crops) -> None:
    for name in EARLIER:
        with all_ill(trained[name]):
            (p, joint), (q, alone) = (trained[name].method.maps(crops, volume) for volume in (True, False))
        assert (p > 0.5).all()
        same = np.array_equal(p, q) and all(np.array_equal(a, b) for a, b in zip(joint, alone, strict=True))
        assert same is not name.endswith("3d")


def test_our_answer_is_the_segmenters(trained: dict[str, Trained], run: Run, crops: Crops) -> None:
    segmenters = [run.segmenter(), folder_of(run, run.folder, profile=faithful(TINY)).segmenter(),
                  run.supervised(training_truth(run))]
    for name, net, gains in zip(("extended", "faithful", "masks"), segmenters, (GAINS, GAINS, PLAIN), strict=True):
        np.testing.assert_array_equal(trained[name].method.maps(crops, True)[1][-1],
                                      lesion_probabilities(net, crops, gains=gains))
        assert same_weights(trained[name].nets[-1], net)


def test_grad_cam_is_that_of_the_classifier_before_any_exchange(trained: dict[str, Trained], run: Run, crops: Crops,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    called = np.arange(len(crops)) % 2
    monkeypatch.setattr(methods, "slice_probabilities", lambda net, c: called.astype(np.float32))
    probability, (maps,) = trained["grad-cam"].method.maps(crops, True)
    assert probability is not None
    plain = activation_maps(run.classifier(1), crops, replace(TINY.cam, layer_share=0.0, scales=(1.0,)))
    np.testing.assert_allclose(maps, plain * called[:, None, None], atol=1e-5)  # parts of other sizes: rounding
    assert not np.allclose(plain, activation_maps(run.classifier(1), crops, TINY.cam), atol=0.05), "ours is not plain"
    assert maps.any()


def test_decovnet_outlines_as_published_and_at_a_level(trained: dict[str, Trained], crops: Crops) -> None:
    for name, settings in (("decovnet", TINY_BASELINES.decovnet), ("decovnet-3d", TINY_BASELINES.decovnet_3d)):
        method = trained[name].method
        assert [level for _, _, level in method.rows] == [0.5, settings.outline]
        with all_ill(trained[name]):
            mask, soft = method.maps(crops, True)[1]
        assert len(np.unique(soft)) > 100
        published = keep_top(soft, settings.top, name == "decovnet-3d") & (crops.images > settings.bright)
        np.testing.assert_array_equal(mask, published)
        assert mask.any()
    for name, settings in (("ad3d-mil", TINY_BASELINES.ad3d_mil), ("ad3d-mil-3d", TINY_BASELINES.ad3d_mil_3d)):
        assert [level for _, _, level in trained[name].method.rows] == [settings.outline]


# --- trained once -----------------------------------------------------------------------------------------------

def files(run: Run) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (run.folder / "stages").iterdir()}


def test_nets_are_trained_once(trained: dict[str, Trained], run: Run) -> None:
    before, lines = files(run), list[str]()
    again = folder_of(run, run.folder, lines)
    for name, system in SYSTEMS.items():
        second = system.train(again, TINY_BASELINES)
        assert second.stages == trained[name].stages
        assert second.parameters() == trained[name].parameters()
        assert len(second.nets) == len(trained[name].nets)
        for a, b in zip(second.nets, trained[name].nets, strict=True):
            assert same_weights(a, b)
            assert not a.training
    assert lines == [], "all of it is stored"
    assert files(run) == before


@pytest.mark.parametrize("name", EARLIER)
def test_other_settings_or_another_seed_train_that_net_again(trained: dict[str, Trained], run: Run, tmp_path: Path,
                                                             name: str) -> None:
    folder, lines = Path(shutil.copytree(run.folder, tmp_path / "run")), list[str]()
    field = name.replace("-", "_")
    longer = replace(getattr(TINY_BASELINES, field), steps=3)
    others = replace(TINY_BASELINES, **{field: longer})
    second = SYSTEMS[name].train(folder_of(run, folder, lines), others)
    assert {line.split(" step ")[0] for line in lines} == {OWN[name][0][0]}
    assert not same_weights(second.nets[-1], trained[name].nets[-1])
    lines.clear()
    for another in EARLIER:  # those of the others are as they were, and of this one both are kept
        SYSTEMS[another].train(folder_of(run, folder, lines), others if another != name else TINY_BASELINES)
    assert lines == []
    seeded = folder_of(run, folder, lines, seed=1)
    seeded.weak = run.weak  # type: ignore[method-assign]
    seeded.lung_net = run.lung_net  # type: ignore[method-assign]
    other = SYSTEMS[name].train(seeded, TINY_BASELINES)
    assert lines
    assert not same_weights(other.nets[-1], trained[name].nets[-1])


def test_faithful_and_extended_share_the_stages_before_the_patches(trained: dict[str, Trained], run: Run) -> None:
    ours, theirs = trained["extended"], trained["faithful"]
    assert tuple(ours.stages) == tuple(theirs.stages) == STAGES
    shared = STAGES[:STAGES.index("mil1")]
    for stage in STAGES:
        assert (stored(ours, stage) == stored(theirs, stage)) is (stage in shared)
        assert len(list((run.folder / "stages").glob(f"{stage}-*.safetensors"))) == (1 if stage in shared else 2)
    assert trained["grad-cam"].stages["classifier1"] == ours.stages["classifier1"]


# --- what it costs ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", list(SYSTEMS))
def test_costs_are_those_of_the_stages_and_nets_that_were_stored(trained: dict[str, Trained], name: str) -> None:
    assert tuple(trained[name].stages) == LUNGS + OWN[name][0]
    count = 0
    for stage in ("lung_net", *OWN[name][1]):
        arrays, _ = load_arrays(stored(trained[name], stage))
        kept = [value for part, value in arrays.items() if "running_" not in part and "num_batches" not in part]
        count += sum(value.size for value in kept)
    assert trained[name].parameters() == count > 0
    taken = [load_arrays(stored(trained[name], stage))[1]["seconds"] for stage in trained[name].stages]
    assert trained[name].seconds() == pytest.approx(sum(taken))
    assert sum(taken) > 0
    assert trained[name].history() == load_arrays(stored(trained[name], list(trained[name].stages)[-1]))[1].get(
        "history", [])


def test_what_is_not_there_has_no_cost(run: Run, trained: dict[str, Trained], tmp_path: Path) -> None:
    folder, lines = Path(shutil.copytree(run.folder, tmp_path / "run")), list[str]()
    (folder / "stages" / stored(trained["extended"], "cam1").name).unlink()
    again = SYSTEMS["extended"].train(folder_of(run, folder, lines), TINY_BASELINES)
    assert again.seconds() is None
    assert again.parameters() == trained["extended"].parameters()
    assert lines == [], "nothing is trained for it"
    bare = folder_of(run, tmp_path / "bare", profile=replace(TINY, lung_net=replace(TINY.lung_net, steps=0)))
    floor = SYSTEMS["otsu"].train(bare, TINY_BASELINES)
    assert list(floor.stages) == ["threshold", "weak"]
    assert (floor.nets, floor.parameters()) == ([], 0)


# --- slice labels only ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("state", ["deleted", "garbage"])
def test_systems_see_slice_labels_only(trained: dict[str, Trained], run: Run, tiny_phantom: Path, tmp_path: Path,
                                       state: str) -> None:
    """The honesty of the table hangs on this; that finding the lungs opens no mask is a test of the pipeline."""
    data = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    for part in ("mask", "lung"):
        for path in (data / part).iterdir():
            if state == "deleted":
                path.unlink()
            else:
                path.write_bytes(b"no mask at all")
    for stage in LUNGS:
        for suffix in ("", ".sha256"):
            source = stored(trained["otsu"], stage)
            target = tmp_path / "run" / "stages" / f"{source.name}{suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source.with_name(target.name), target)
    lines: list[str] = []
    blind = folder_of(run, tmp_path / "run", lines, data=load_dataset(data))
    for name in (*EARLIER, "grad-cam", "faithful"):
        lines.clear()
        again = SYSTEMS[name].train(blind, TINY_BASELINES)
        assert lines, "nothing was taken from the other run"
        for a, b in zip(again.nets, trained[name].nets, strict=True):
            assert same_weights(a, b)
    if state == "deleted":
        with pytest.raises(DatasetError, match="no lesion mask"):
            SYSTEMS["masks"].train(blind, TINY_BASELINES)


def test_only_the_upper_bound_follows_the_masks(trained: dict[str, Trained], run: Run, tiny_phantom: Path,
                                                tmp_path: Path) -> None:
    data = Path(shutil.copytree(tiny_phantom, tmp_path / "data"))
    for path in (data / "mask").iterdir():
        scan = read_scan(path)
        write_like(np.roll(scan.pixels != 0, 5, axis=1), scan.grid, path)
    folder, lines = Path(shutil.copytree(run.folder, tmp_path / "run")), list[str]()
    other = folder_of(run, folder, lines, data=load_dataset(data))
    for name, system in SYSTEMS.items():
        lines.clear()
        again = system.train(other, TINY_BASELINES)
        assert bool(lines) is (name == "masks")
        assert (again.stages == trained[name].stages) is (name != "masks")


# --- which of them ----------------------------------------------------------------------------------------------

def test_systems_are_chosen_by_name_in_the_order_of_the_table() -> None:
    assert system_names(None) == list(SYSTEMS)
    assert system_names(["masks", "otsu", "extended", "otsu"]) == ["otsu", "extended", "masks"]
    for wrong in (["otsu", "decov-net"], [""], ["Otsu"]):
        with pytest.raises(SettingsError, match=rf"no system '{wrong[-1]}'.*otsu, grad-cam"):
            system_names(wrong)
