"""Both systems, in 2D and 3D: they learn from labels alone, repeat with the seed, and test in evaluation mode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tiny import quiet, same_weights, toy

from covidseg.augment import NO_PAINT, PaintSettings
from covidseg.baselines import maps as module
from covidseg.baselines.ad3d_mil import Ad3dMil, Ad3dMilSettings
from covidseg.baselines.decovnet import DeCoVNet, DeCoVNetSettings
from covidseg.baselines.maps import judge_crops, lesion_maps, min_max
from covidseg.baselines.slabs import SlabSettings, volumes
from covidseg.baselines.training import Baseline, BaselineSettings, augment_slabs, train_baseline
from covidseg.errors import DatasetError, SettingsError
from covidseg.evaluation.metrics import auc
from covidseg.preprocess import Crops, WeakSet
from covidseg.training import Log

pytestmark = pytest.mark.nets

SLAB = SlabSettings(depth=4, size=40, step=2)


@dataclass(frozen=True)
class System:
    net: Callable[[Any], Baseline]
    settings: Any

    def train(self, data: WeakSet, settings: Any, *, seed: int = 0, log: Log = quiet) -> Any:
        return train_baseline(partial(self.net, settings), data, settings, seed=seed, device=torch.device("cpu"),
                              log=log, name="toy")


SYSTEMS = {
    "decovnet": System(DeCoVNet, DeCoVNetSettings(slab=SLAB, batch=8)),
    "ad3d-mil": System(Ad3dMil, Ad3dMilSettings(slab=SLAB, batch=8)),
}
both = pytest.mark.parametrize("system", SYSTEMS.values(), ids=SYSTEMS.keys())
flat_and_deep = pytest.mark.parametrize("dims", [2, 3])


def toy_volumes(count: int, seed: int = 0) -> tuple[WeakSet, np.ndarray]:
    """Volumes of 12 slices, each from a patient of its own; the last six slices hold the disks."""
    data, disks = toy(12 * count, seed=seed)
    order = np.concatenate([12 * k + np.concatenate([np.arange(0, 12, 2), np.arange(1, 12, 2)]) for k in range(count)])
    names = np.array([f"v{k}:{s}" for k in range(count) for s in range(12)])
    patients = np.array([f"p{k}" for k in range(count) for s in range(12)])
    return WeakSet(data.crops.take(order), data.labels[order], patients, names), disks[order]


def over_volumes(read: Callable[[Crops], np.ndarray], data: WeakSet) -> np.ndarray:
    volume, _ = volumes(data.names)
    return np.concatenate([read(data.crops.take(np.flatnonzero(volume == v))) for v in dict.fromkeys(volume.tolist())])


def untrained(system: System, dims: int) -> Baseline:
    torch.manual_seed(0)
    return system.net(replace(system.settings, dims=dims)).eval()


@both
def test_the_2d_port_learns_disks_from_slice_labels_and_shows_them(system: System) -> None:
    data, _ = toy(48)
    lines: list[str] = []
    net = system.train(data, replace(system.settings, steps=60), seed=1, log=lines.append)
    fresh, disks = toy(40, seed=9)
    probabilities, found = lesion_maps(net, fresh.crops)
    assert auc(probabilities, fresh.labels) > 0.9
    assert not net.training
    assert lines
    assert all(line.startswith("toy step") for line in lines)
    ill = (fresh.labels == 1)[:, None, None] & fresh.crops.lungs
    assert auc(found[-1][ill], disks[ill].astype(int)) > 0.75


@both
def test_the_3d_net_learns_from_slabs(system: System) -> None:
    data, _ = toy_volumes(6)
    net = system.train(data, replace(system.settings, dims=3, steps=60), seed=1)
    fresh, _ = toy_volumes(4, seed=9)
    slices = over_volumes(lambda crops: judge_crops(net, crops)[0], fresh)
    assert auc(slices, fresh.labels) > 0.9
    alone = judge_crops(net, fresh.crops, volume=False)[0]
    assert auc(alone, fresh.labels) > 0.75, "a slice repeated to a slab is still a slice"


@both
@flat_and_deep
def test_maps_lie_in_the_unit_interval_and_in_the_lung(system: System, dims: int) -> None:
    data, _ = toy_volumes(1)
    net = untrained(system, dims)
    if isinstance(net, DeCoVNet):
        with torch.no_grad():  # an untrained map may be negative throughout: nothing would be left of it
            for weight in (net.classes.weight, net.hidden.weight, *(net.head[i].weight for i in (1, 4, 8))):
                weight.abs_()
            net.classes.weight[0] = 0  # the gradient is that of lesion minus healthy
    for volume in (True, False):
        found = lesion_maps(net, data.crops, volume=volume)[1]
        for maps in found:
            assert maps.shape == data.crops.images.shape
            assert maps.dtype == np.float32
            assert 0 <= maps.min() <= maps.max() <= 1
            assert (maps[~data.crops.lungs] == 0).all()
        tops = found[-1].max(axis=(1, 2))
        assert tops.max() == pytest.approx(1), "a volume, or each slice, reaches the top"
        assert (tops > 0.999).all() == (not volume or dims == 2)
    probabilities, found = lesion_maps(net, data.crops.take(np.zeros(0, int)))
    assert [len(one) for one in (probabilities, *found)] == [0] * (1 + len(found))


@both
@flat_and_deep
def test_training_repeats_bit_for_bit_with_the_seed(system: System, dims: int) -> None:
    data, _ = toy_volumes(2)
    short = replace(system.settings, dims=dims, steps=4, batch=4)
    first = system.train(data, short, seed=3)
    assert same_weights(first, system.train(data, short, seed=3))
    assert not same_weights(first, system.train(data, short, seed=4))


@both
@flat_and_deep
def test_tests_run_in_evaluation_mode_whatever_the_state_of_the_net(system: System, dims: int) -> None:
    data, _ = toy_volumes(1)
    net = untrained(system, dims)
    expected = judge_crops(net, data.crops)[0]
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    np.testing.assert_array_equal(judge_crops(net, data.crops)[0], expected)
    assert net.training, "the state comes back"
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items()), \
        "testing moves no running statistics"
    # The trap itself: with batch statistics a verdict depends on what else is in the batch.
    maps = torch.rand((4, 2, 40, 40) if dims == 2 else (4, 2, 4, 40, 40))
    maps[1:, 0] *= 3
    with torch.no_grad():
        assert not torch.allclose(net.judge(maps)[0][:1], net.judge(maps[:2])[0][:1])
        net.eval()
        torch.testing.assert_close(net.judge(maps)[0][:1], net.judge(maps[:2])[0][:1])


@both
@flat_and_deep
def test_results_do_not_depend_on_the_batch(system: System, dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = toy_volumes(1)
    net = untrained(system, dims)
    for volume in (True, False):
        monkeypatch.setattr(module, "BATCH", 32)
        p, maps = judge_crops(net, data.crops, volume=volume)
        monkeypatch.setattr(module, "BATCH", 2)
        again, others = judge_crops(net, data.crops, volume=volume)
        np.testing.assert_allclose(p, again, atol=1e-5)
        np.testing.assert_allclose(maps, others, atol=1e-5)


class Counting(Baseline):
    """Says the mean of the picture, and activates where the picture is bright."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.settings = BaselineSettings(dims=dims, slab=SLAB)
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def judge(self, maps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return maps[:, 0].flatten(1).mean(dim=1), maps[:, :1]


def test_overlapping_slabs_are_averaged_for_each_slice() -> None:
    levels = np.array([0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], np.float32)
    images = np.broadcast_to(levels[:, None, None], (7, 40, 40)).astype(np.float32)
    lungs = np.ones(images.shape, bool)
    lungs[:, :3] = False
    crops = Crops(images, lungs, np.tile([0, 0, 40, 40], (7, 1)))
    p, maps = judge_crops(Counting(3), crops)
    # Slabs 0-3, 2-5 and 3-6 have the means .15, .35 and .45.
    np.testing.assert_allclose(p, [0.15, 0.15, 0.25, (0.15 + 0.35 + 0.45) / 3, 0.4, 0.4, 0.45], atol=1e-5)
    np.testing.assert_allclose(maps, images * lungs, atol=1e-5)
    alone, _ = judge_crops(Counting(3), crops, volume=False)
    np.testing.assert_allclose(alone, levels, atol=1e-5)
    np.testing.assert_allclose(judge_crops(Counting(2), crops)[0], levels, atol=1e-5)


def test_maps_of_slabs_come_back_to_the_place_of_each_crop() -> None:
    boxes = np.array([[10, 20, 40, 40], [20, 30, 40, 40], [0, 10, 60, 60], [10, 20, 40, 40], [15, 25, 40, 40]])
    images = np.zeros((5, 40, 40), np.float32)
    for image, (top, left, height, width) in zip(images, boxes, strict=True):
        image[(30 - top) * 40 // height:(38 - top) * 40 // height,
              (40 - left) * 40 // width:(48 - left) * 40 // width] = 1
    crops = Crops(images, np.ones(images.shape, bool), boxes)
    maps = judge_crops(Counting(3), crops)[1]
    for one, image in zip(maps, images, strict=True):
        assert one[image > 0].mean() > 0.6
        assert one[image == 0].mean() < 0.05


def test_slabs_are_augmented_as_wholes() -> None:
    code = torch.arange(3 * 6 * 6.0).reshape(1, 1, 3, 6, 6).expand(2, 1, 3, 6, 6)
    maps = torch.cat([code, code, 1000 + code], dim=1)
    source = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(150):
        out = augment_slabs(maps, source)
        assert out.shape == maps.shape
        assert torch.equal(out[:, 2], out[:, 1] + 1000)
        assert sorted(out[0, 1].flatten().tolist()) == list(range(108))
        for k in range(2):
            assert np.corrcoef(out[k, 0].ravel(), out[k, 1].ravel())[0, 1] > 0.999
        seen.add(tuple(out[0, 1].flatten().int().tolist()))
        slices = {frozenset(s.flatten().int().tolist()) for s in out[0, 1]}
        assert slices == {frozenset(s.flatten().int().tolist()) for s in code[0, 0]}, "slices stay whole"
    assert len(seen) == 16, "two orders of slices, eight positions in the plane"


@both
def test_vessels_are_painted_in_2d_and_the_schedule_is_that_of_the_settings(system: System) -> None:
    data, _ = toy_volumes(2)
    short = replace(system.settings, steps=3, batch=4)
    first = system.train(data, short)
    for other in (replace(short, paint=NO_PAINT), replace(short, schedule="constant")):
        assert not same_weights(first, system.train(data, other))


@both
def test_without_healthy_slabs_there_is_nothing_to_learn(system: System) -> None:
    data, _ = toy(24)
    with pytest.raises(DatasetError, match="free of lesions"):
        system.train(data, replace(system.settings, dims=3))


def test_min_max_of_a_volume_and_of_each_slice() -> None:
    maps = np.array([[[1.0, 3.0], [9.0, 2.0]], [[5.0, 5.0], [9.0, 5.0]]])
    lungs = np.array([[[True, True], [False, True]]] * 2)
    assert min_max(maps, lungs, True).tolist() == [[[0.0, 0.5], [0.0, 0.25]], [[1.0, 1.0], [0.0, 1.0]]]
    assert min_max(maps, lungs, False).tolist() == [[[0.0, 1.0], [0.0, 0.5]], [[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize(("settings", "wrong"), [
    (SlabSettings, {"depth": 0}), (SlabSettings, {"depth": 4, "step": 5}), (SlabSettings, {"step": 0}),
    (SlabSettings, {"size": 4}), (DeCoVNetSettings, {"dims": 4}), (DeCoVNetSettings, {"schedule": "steps"}),
    (DeCoVNetSettings, {"paint": PaintSettings()}), (DeCoVNetSettings, {"top": 0.0}),
    (DeCoVNetSettings, {"weights": "kernel"}), (Ad3dMilSettings, {"dims": 1}), (Ad3dMilSettings, {"pooling": "sum"}),
    (Ad3dMilSettings, {"sides": (8, 8)}), (Ad3dMilSettings, {"sides": (8, 0, 4)})])
def test_impossible_settings_are_refused(settings: type, wrong: dict) -> None:
    with pytest.raises(SettingsError):
        settings(**wrong)
