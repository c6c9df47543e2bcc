"""Patches: their numbers, their bags, and a net that finds which of them are ill."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from math import ceil

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage as ndi
from tiny import nearly_same, quiet, same_weights, toy
from torch import nn

from covidseg.augment import NO_PAINT, PaintSettings
from covidseg.curriculum import CurriculumSettings, Phase
from covidseg.errors import SettingsError
from covidseg.evaluation.metrics import auc
from covidseg.patches import (
    COMPONENTS,
    PATCH,
    MilSettings,
    PatchNet,
    bag_probability,
    component_bags,
    gated_attention,
    grid_ids,
    instances,
    patch_ids,
    patch_probabilities,
    patch_scores,
    patch_values,
    pool,
    spread,
    square_ids,
    train_mil,
)
from covidseg.preprocess import Crops, WeakSet

pytestmark = pytest.mark.nets

SIDE = 40


def random_lungs(count: int = 3, seed: int = 0, shape: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    """Blobs and single pixels, so that there are full, partly filled and empty squares."""
    rng = np.random.default_rng(seed)
    lungs = rng.random((count, *shape)) < 0.1
    for lung in lungs:
        for y, x in rng.integers(0, np.array(shape) - 8, (4, 2)):
            lung[y:y + rng.integers(4, 14), x:x + rng.integers(4, 14)] = True
    return lungs


def cells_of(ids: np.ndarray) -> list[set[int]]:
    """The patches of one slice as sets of pixels."""
    return [set(np.flatnonzero(ids == number)) for number in range(1, ids.max() + 1)]


Part = tuple[slice, slice]  # rows and columns of a square or cell


def enough(inside: np.ndarray, share: float) -> bool:
    return bool(inside.any() and inside.sum() >= share * inside.size)


def squares(lung: np.ndarray, share: float, patch: int = PATCH, offset: tuple[int, int] = (0, 0)) -> list[Part]:
    """All squares of a slice with enough lung."""
    found = [(slice(max(top, 0), top + patch), slice(max(left, 0), left + patch))
             for top in range(-offset[0], lung.shape[0], patch) for left in range(-offset[1], lung.shape[1], patch)]
    return [part for part in found if enough(lung[part], share)]


def cells(coarse: np.ndarray, grid: int) -> list[Part]:
    """Cells between the fifths (or so) of the box of each component that is large enough."""
    def fifths(part: slice) -> list[slice]:
        edges = [part.start + ceil(k * (part.stop - part.start) / grid) for k in range(grid + 1)]
        return [slice(*pair) for pair in pairwise(edges)]
    return [(rows, columns) for box in ndi.find_objects(ndi.label(coarse)[0])
            if all(part.stop - part.start >= 2 * grid for part in box)
            for rows in fifths(box[0]) for columns in fifths(box[1])]


def patches_by_hand(lung: np.ndarray, parts: list[Part], share: float) -> list[set[int]]:
    """The parts with enough lung, laid over the slice one by one; the later ones cover those before."""
    owner = np.full(lung.shape, -1)
    for number, part in enumerate(parts):
        owner[part] = number
    found = [owner == number for number in range(len(parts))]
    return [set(np.flatnonzero(part)) for part in found if enough(lung[part], share)]


SHARES = st.sampled_from([0.0, 0.2, 0.3, 0.4, 0.5, 1.0])  # some of which a square has exactly


@given(arrays(bool, st.tuples(st.just(2), st.integers(1, 17), st.integers(1, 17))),  # noise has every kind of square
       st.integers(1, 7), st.integers(0, 6), st.integers(0, 6), SHARES)
@example(random_lungs(2, shape=(20, 35)), PATCH, 2, 3, 0.4)
@example(random_lungs(2), 8, 0, 0, 0.3)
@example(np.zeros((0, SIDE, SIDE), bool), PATCH, 0, 0, 0.3)
def test_squares_are_those_with_enough_lung(lungs: np.ndarray, patch: int, down: int, right: int, share: float) -> None:
    offset = down % patch, right % patch
    ids = square_ids(lungs, patch, share, offset)
    assert ids.shape == lungs.shape
    assert ids.dtype == np.int32
    for one, lung in zip(ids, lungs, strict=True):
        assert cells_of(one) == patches_by_hand(lung, squares(lung, share, patch, offset), share)


def boxed(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """One slice with filled boxes ``(top, left, height, width)``."""
    result = np.zeros((1, SIDE, SIDE), bool)
    for top, left, height, width in boxes:
        result[0, top:top + height, left:left + width] = True
    return result


FULL, OBLIQUE = np.ones((1, SIDE, SIDE), bool), np.tril(np.ones((SIDE, SIDE), bool))[None]


@given(st.integers(0, 10**6), st.integers(1, 6), SHARES)
def test_grids_lie_over_the_components_of_any_lung(seed: int, grid: int, share: float) -> None:
    lungs, coarse = random_lungs(2, seed), random_lungs(2, seed + 1)
    for one, lung, label in zip(grid_ids(lungs, coarse, grid, share=share), lungs, coarse, strict=True):
        assert cells_of(one) == patches_by_hand(lung, squares(lung, share) + cells(label, grid), share)


@pytest.mark.parametrize(("lungs", "coarse", "grid", "patches"), [
    (FULL, boxed((10, 10, 20, 20)), 5, 64 - 16 + 25),              # the rest of the lung keeps its squares
    (FULL, boxed((0, 0, 20, 20)), 2, 64 - 16 + 4),
    (FULL, boxed((0, 0, 15, 15), (20, 20, 15, 15)), 5, 64 - 9 - 9 + 50),                    # a grid for each component
    (FULL, boxed((7, 11, 13, 17)), 5, 85), (FULL, boxed((3, 3, 10, 20)), 5, 86), (FULL, boxed(), 5, 64),
    (FULL, boxed((3, 3, 9, 20), (30, 8, 1, 1)), 5, 64), (FULL, boxed((3, 3, 20, 9)), 5, 64),      # too small for grids
    # 5 x 5 cells of 8 pixels: those above the diagonal go, those on it hold 36 of 64 pixels of lung.
    (OBLIQUE, OBLIQUE, 5, 15)])
def test_grids_by_hand(lungs: np.ndarray, coarse: np.ndarray, grid: int, patches: int) -> None:
    ids = grid_ids(lungs, coarse, grid)
    assert cells_of(ids[0]) == patches_by_hand(lungs[0], squares(lungs[0], 0.3) + cells(coarse[0], grid), 0.3)
    assert ids.max() == patches
    assert np.array_equal(ids, square_ids(lungs)) == (patches == 64)


def test_no_slices_and_no_lung_no_patches() -> None:
    lungs = random_lungs(2)
    lungs[1] = False
    assert not grid_ids(lungs, lungs)[1].any()
    ids = grid_ids(lungs[:0], lungs[:0])
    assert ids.shape == (0, SIDE, SIDE)
    assert patch_values(np.zeros((0, SIDE, SIDE)), ids, 7).shape == (0, 8)
    assert patch_values(np.zeros((0, SIDE, SIDE)), ids).shape == (0, 1)
    assert instances(ids).shape == (0, 1)
    assert pool(torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, SIDE, SIDE, dtype=torch.int64), 7).shape == (0, 8, 3)


def test_values_instances_and_spreading_by_a_plain_loop() -> None:
    ids, maps = square_ids(random_lungs(5, shape=(20, 35))), np.random.default_rng(0).random((5, 20, 35))
    ids[2] = 0
    values, there, more = patch_values(maps, ids), instances(ids), patch_values(maps, ids, int(ids.max()) + 3, batch=2)
    flat = spread(values, ids)
    assert values.dtype == np.float32
    assert values.shape == there.shape == (5, ids.max() + 1)
    for k, number in np.ndindex(values.shape):
        inside = ids[k] == number
        assert values[k, number] == pytest.approx(maps[k][inside].mean() if inside.any() else 0, rel=1e-5)
        assert there[k, number] == (number > 0 and inside.any())
        assert (flat[k][inside] == values[k, number]).all()
    np.testing.assert_allclose(more[:, :-3], values, atol=1e-6)
    assert (more[:, -3:] == 0).all()


def pooled_by_hand(maps: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    step = ids.shape[-1] // maps.shape[-1]
    small = ids[:, ::step, ::step]
    result = torch.zeros(len(maps), count + 1, maps.shape[1])
    for b, number in np.ndindex(len(maps), count + 1):
        if (inside := small[b] == number).any():
            result[b, number] = maps[b, :, inside].mean(1)
    return result


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("reading", ["squares", "grid"])
def test_pooling_equals_a_plain_loop(step: int, reading: str) -> None:
    lungs = random_lungs(2, seed=1, shape=(20, 12))
    found = square_ids(lungs) if reading == "squares" else grid_ids(lungs, lungs)
    ids, count = torch.from_numpy(found.astype(np.int64)), int(found.max()) + 2
    maps = torch.rand(2, 3, 20 // step, 12 // step, generator=torch.Generator().manual_seed(0), requires_grad=True)
    means = pool(maps, ids, count)
    expected = pooled_by_hand(maps, ids, count)
    assert means.shape == (2, count + 1, 3)
    torch.testing.assert_close(means, expected)
    assert (means[:, -2:] == 0).all(), "patches without a pixel"
    weigh = torch.rand(means.shape, generator=torch.Generator().manual_seed(1))
    slopes, = torch.autograd.grad((weigh * means).sum(), maps)
    by_hand, = torch.autograd.grad((weigh * expected).sum(), maps)
    torch.testing.assert_close(slopes, by_hand)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pooling_sums_in_full_precision(dtype: torch.dtype) -> None:
    """A patch of 400 pixels: a sum in half precision would stop growing long before the last of them."""
    maps = (1 + torch.rand(1, 2, 20, 20, generator=torch.Generator().manual_seed(0))).to(dtype).requires_grad_(True)
    means = pool(maps, torch.ones(1, 20, 20, dtype=torch.int64), 1)
    assert means.dtype == torch.float32
    expected = maps.detach().double().mean((2, 3)).float()
    torch.testing.assert_close(means[:, 1], expected, rtol=1e-6, atol=0)
    assert not torch.allclose(maps.detach().flatten(2).cumsum(2)[..., -1].float() / 400, expected, rtol=1e-4)
    slopes, = torch.autograd.grad(means.sum(), maps)
    torch.testing.assert_close(slopes.float(), torch.full_like(maps, 1 / 400).float())


def test_what_belongs_to_no_square_is_no_patch_when_a_grid_leaves_only_its_lung() -> None:
    lungs, coarse = np.zeros((1, 12, 10), bool), np.zeros((1, 12, 10), bool)
    for k in range(10):  # a staircase, whose box of 10 x 10 lies below the first two rows
        coarse[0, 2 + k, max(0, k - 1):k + 1] = True
    lungs |= coarse
    lungs[0, 0, 5:9] = lungs[0, 1, 5:8] = True  # 7 of the 25 pixels of a square: too few, and 7 of 20 that are left
    assert not square_ids(lungs)[0, :2].any()
    assert not grid_ids(lungs, coarse)[0, :2].any()


# --- bags -------------------------------------------------------------------------------------------------------------

def by_hand(scores: np.ndarray, attention: np.ndarray, inside: np.ndarray, pooling: str) -> float:
    """Half pooled scores (Ilse et al., eq. 8), half the fourth-power mean, over the members of one bag."""
    s, a = scores[inside].astype(float), attention[inside].astype(float)
    share = np.exp(a) / np.exp(a).sum() if pooling == "attention" else np.full(len(s), 1 / len(s))
    pooled = 1 / (1 + np.exp(-(share * s).sum()))
    powers = np.mean((1 / (1 + np.exp(-s))) ** 4) ** 0.25
    return 0.5 * pooled + 0.5 * powers


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_bag_probability_equals_its_formula_over_the_members(pooling: str) -> None:
    source = torch.Generator().manual_seed(0)
    scores, attention = 2 * torch.randn(3, 36, generator=source), torch.randn(3, 36, generator=source)
    members = torch.rand(3, 36, generator=source) < 0.5
    # Patches that are no members speak up, so that it shows if anybody listens.
    bag = scores.masked_fill(~members, 30.0).requires_grad_(True), attention.masked_fill(~members, 30.0), members
    found = bag_probability(*bag, pooling)
    expected = [by_hand(*(part[k].detach().numpy() for part in bag), pooling) for k in range(3)]
    np.testing.assert_allclose(found.detach().numpy(), expected, atol=1e-5)
    slopes, = torch.autograd.grad(found.sum(), bag[0])
    assert torch.equal(slopes > 0, members)
    assert (slopes >= 0).all()
    assert torch.isfinite(bag_probability(scores, scores, torch.zeros_like(members), pooling)).all(), "no members"


def test_attention_equals_its_formula() -> None:
    torch.manual_seed(5)
    h, layers = torch.randn(9, 5), (nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 1))
    by_formula = torch.stack([layers[2](torch.tanh(layers[0](one)) * torch.sigmoid(layers[1](one)))[0] for one in h])
    torch.testing.assert_close(gated_attention(h, *layers), by_formula)


def spots() -> tuple[np.ndarray, list[tuple[slice, slice]], np.ndarray]:
    """Activation of five separate boxes, from the largest to the smallest, in two equal slices; and all squares."""
    boxes = [np.s_[5:20, 5:25], np.s_[25:40, 5:20], np.s_[25:40, 30:40], np.s_[5:15, 40:50], np.s_[45:50, 45:50]]
    cam = np.zeros((2, 60, 60), np.float32)
    for box in boxes:
        cam[(slice(None), *box)] = 0.3
    return cam, boxes, square_ids(np.ones(cam.shape, bool))


def test_the_largest_components_are_bags_and_the_rest_is_none() -> None:
    cam, boxes, ids = spots()
    bags = component_bags(cam, ids, np.array([1, 0]), 0.3)
    assert bags.shape == (2, ids.max() + 1)
    assert (bags[1] == 0).all(), "a slice without a lesion has no coarse lesions"
    for rank, box in enumerate(boxes[:COMPONENTS], start=1):
        # Two pixels of rim take in no further square of five.
        assert set(np.flatnonzero(bags[0] == rank)) == set(np.unique(ids[0][box]))
    assert bags[0].max() == COMPONENTS, "the fifth has no bag"
    assert bags[0][0] == 0
    assert (bags[0] == 0).sum() > 10


def test_components_take_in_a_rim_and_start_at_the_threshold() -> None:
    cam, (box, *_), ids = spots()
    cam[:, 5:20, 21:25] = 0.0   # the last squares are now covered in one of five columns, the rim adds two
    bags = component_bags(cam, ids, np.array([1, 1]), 0.3)
    assert set(np.flatnonzero(bags[0] == 1)) == set(np.unique(ids[0][box]))
    assert not component_bags(cam, ids, np.array([1, 1]), 0.31).any()


# --- net --------------------------------------------------------------------------------------------------------------

# Bags alone: no phase admits a patch.
ALONE = CurriculumSettings(paces=(0.0,), weights=(0.0,), trust=(1.0,))
SMALL = MilSettings(width=4, steps=8, batch=4, paint=NO_PAINT)
ENOUGH = MilSettings(width=8, steps=60, batch=8, rate=5e-3, component_weight=0.0, curriculum=ALONE, paint=NO_PAINT)


@pytest.fixture
def net() -> PatchNet:
    torch.manual_seed(0)
    return PatchNet(SMALL).eval()


@pytest.fixture(scope="module")
def small() -> tuple[WeakSet, np.ndarray]:
    """Twelve slices, and an activation map that is right."""
    data, disks = toy(12)
    return data, disks.astype(np.float32)


@pytest.mark.parametrize("reading", ["pixels", "grid"])
def test_patches_are_judged_one_by_one_by_their_description(reading: str, net: PatchNet) -> None:
    data, disks = toy(5)
    found = patch_ids(data.crops, disks.astype(np.float32), replace(SMALL, reading=reading))
    ids, inputs, count = torch.from_numpy(found.astype(np.int64)), torch.rand(5, 2, 40, 40), int(found.max())
    described = net.describe(net.features(inputs), ids, count)
    assert described.shape == (5, count + 1, 7 * SMALL.width)
    whole = net(inputs, ids)
    assert whole[0].shape == whole[1].shape == (5, count + 1)
    assert net(inputs, ids, 99)[0].shape == (5, 100)
    assert whole[0][0].std() > 0
    chosen = torch.tensor([5, 3, 8])  # a few patches of one slice, in any order
    for part, few, expected in zip(net.judge(described), net.judge(described[1, chosen]), whole, strict=True):
        assert torch.equal(part, expected)
        torch.testing.assert_close(few, expected[1, chosen])
    # All slices in one pass equal one slice at a time.
    together, there = patch_scores(net, data.crops, found), instances(found)
    alone = [patch_scores(net, data.crops.take(np.array([k])), found[k:k + 1], count) for k in range(5)]
    assert together.shape == (5, count + 1)
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
    np.testing.assert_allclose(patch_scores(net, data.crops, found, batch=2), together, atol=1e-5)
    assert ((together[there] > 0) & (together[there] < 1)).all()
    assert together[there].std() > 1e-4


def test_mixed_precision_describes_patches_in_full_precision(net: PatchNet) -> None:
    data, _ = toy(2)
    ids = torch.from_numpy(square_ids(data.crops.lungs).astype(np.int64))
    inputs, count = torch.rand(2, 2, 40, 40), int(ids.max())
    with torch.autocast("cpu", torch.bfloat16):
        features = net.features(inputs)
        described = net.describe(features, ids, count)
        scores, _ = net.judge(described)
    assert features[1].dtype == torch.bfloat16
    assert described.dtype == torch.float32
    torch.testing.assert_close(described, net.describe([f.float() for f in features], ids, count))
    torch.testing.assert_close(scores.float(), net(inputs, ids)[0], atol=0.03, rtol=0.03)


def test_patch_numbers_in_both_readings(net: PatchNet) -> None:
    data, disks = toy(4)
    cam, gridded = disks.astype(np.float32), replace(SMALL, reading="grid")
    squares = patch_ids(data.crops, None, SMALL)
    assert np.array_equal(squares, square_ids(data.crops.lungs))
    assert np.array_equal(patch_ids(data.crops, None, replace(SMALL, patch=8)), square_ids(data.crops.lungs, 8))
    grid = patch_ids(data.crops, cam, gridded)
    assert np.array_equal(grid, grid_ids(data.crops.lungs, disks & data.crops.lungs))
    assert not np.array_equal(grid, squares)
    below = np.where(disks, SMALL.component - 0.01, 0).astype(np.float32)
    assert np.array_equal(patch_ids(data.crops, below, gridded), squares)
    # A grid needs the activation map.
    assert patch_probabilities(net, data.crops).shape == (4, 40, 40)
    with pytest.raises(SettingsError, match="activation map"):
        patch_ids(data.crops, None, gridded)
    with pytest.raises(SettingsError, match="activation map"):
        patch_probabilities(PatchNet(gridded), data.crops)


@pytest.mark.parametrize(("change", "named"), [({"reading": "voxels"}, "'voxels'"), ({"pooling": "max"}, "'max'")])
def test_bad_settings_are_refused(change: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        MilSettings(**change)


def lung_of(data: WeakSet, label: int) -> np.ndarray:
    return data.crops.lungs & (data.labels == label)[:, None, None]


def judged(net: PatchNet) -> tuple[float, float]:
    """Of fresh slices: how well patches with a disk stand out where there is one, and the mean where there is none."""
    fresh, disks = toy(24, seed=9)
    maps, chosen = patch_probabilities(net, fresh.crops), lung_of(fresh, 1)
    return auc(maps[chosen], disks[chosen].astype(int)), float(maps[lung_of(fresh, 0)].mean())


def taught(map_of: Callable[[WeakSet, np.ndarray], np.ndarray] | None = None, settings: MilSettings = ENOUGH,
           seed: int = 3) -> PatchNet:
    """Trained on 32 slices with an activation map made of them and their disks, by default with an empty one."""
    data, disks = toy(32)
    cam = (map_of(data, disks) if map_of else np.zeros(disks.shape)).astype(np.float32)
    return train_mil(data, cam, settings, seed=seed, log=quiet)[0]


@pytest.fixture(scope="module")
def alone() -> PatchNet:
    """Trained on bags alone: no map, nothing painted, no patch admitted, no bag of a component."""
    return taught()


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_bags_alone_teach_where_the_disk_is(pooling: str, alone: PatchNet) -> None:
    """Slice labels are all there is."""
    settings = replace(ENOUGH, pooling=pooling)
    torch.manual_seed(3)
    before, free_before = judged(PatchNet(settings))
    after, free_after = judged(alone if pooling == "attention" else taught(settings=settings))
    assert before < 0.5, "the start must not know the answer already"
    assert after > 0.9
    assert free_before > 0.4
    assert free_after < 0.2


def test_the_zeros_of_lesion_free_slices_act() -> None:
    # After few steps, before rounding has carried a training elsewhere: 4 to 10 times under three instruction sets.
    without, heavy = (judged(taught(settings=replace(ENOUGH, steps=20, zeros=zeros)))[1] for zeros in (0.0, 5.0))
    assert without > 2 * heavy


def test_a_wrong_map_misleads_and_a_right_one_does_not() -> None:
    """The taught loss has to act: with the same bags, the map decides which patches are called ill."""
    settings = replace(ENOUGH, width=6, rate=3e-3, curriculum=CurriculumSettings(
        paces=(1.0,), weights=(3.0,), trust=(1.0,), prior=0.4))
    good, bad = (judged(taught(map_of, settings, seed=1))[0] for map_of in (
        lambda data, disks: disks, lambda data, disks: lung_of(data, 1) & ~disks))
    assert good > 0.95
    assert bad < good - 0.3


def test_a_coarse_component_is_a_bag_that_holds_a_lesion(alone: PatchNet) -> None:
    data, disks = toy(32)
    corner = np.zeros(disks.shape, bool)
    corner[data.labels == 1, 6:16, 6:16] = True
    net = taught(lambda *_: corner, replace(ENOUGH, component_weight=3.0))
    healthy, without = (1 - patch_probabilities(each, data.crops)[corner & ~disks].mean() for each in (net, alone))
    assert healthy < 0.2 * without


def test_painted_slices_label_each_of_their_patches(alone: PatchNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """On lesion-free slices a dark square is painted, which is a lesion, and a bright bar, which is none."""
    fresh, _ = toy(24, seed=9)
    free, square, bar = fresh.labels == 0, np.s_[10:18, 10:18], np.s_[25:29, 8:32]
    images = fresh.crops.images.copy()
    images[(free, *square)], images[(free, *bar)] = -0.3, 1.2
    marked = replace(fresh.crops, images=images)

    def paint(maps: torch.Tensor, index: torch.Tensor, free: torch.Tensor, source: torch.Generator) -> torch.Tensor:
        maps = maps.clone()
        for channel, place, value in ((0, square, -0.3), (2, square, 1.0), (0, bar, 1.2)):
            maps[(free, channel, *place)] = value
        return maps

    def judge(net: PatchNet) -> list[float]:
        """Mean probability in the square, on the bar and in the lung around them."""
        maps = patch_probabilities(net, marked)[free]
        return [maps[:, rows, columns].mean() for rows, columns in (
            np.s_[11:17, 11:17], np.s_[25:29, 9:31], np.s_[20:24, 10:30])]

    in_square, on_bar, rest = judge(alone)
    assert on_bar > 0.9, "the toy's lesions are bright: without painting a bright bar passes for one"
    assert in_square - rest < 0.1
    monkeypatch.setattr("covidseg.patches.Painter", lambda crops, settings: paint)
    in_square, on_bar, rest = judge(taught())
    assert on_bar < 0.1
    assert in_square - rest > 0.5


@pytest.mark.parametrize("reading", ["pixels", "grid"])
def test_every_phase_takes_part(reading: str, small: tuple[WeakSet, np.ndarray]) -> None:
    (data, cam), settings, lines = small, replace(SMALL, reading=reading, paint=PaintSettings()), list[str]()
    net, phases = train_mil(data, cam, settings, seed=2, log=lines.append)
    ids = patch_ids(data.crops, cam, settings)
    assert [phase.pace for phase in phases] == list(settings.curriculum.paces)
    assert sum("phase" in line for line in lines) == len(phases)
    for phase in phases:
        assert phase.admitted.shape == (12, ids.max() + 1)
        assert not (phase.admitted & ~(instances(ids) & (data.labels == 1)[:, None])).any()
    assert not phases[0].admitted.any()
    assert not net.training


def test_the_order_of_the_settings_reaches_the_phases(small: tuple[WeakSet, np.ndarray]) -> None:
    def phases(order: str, seed: int) -> list[Phase]:
        settings = replace(SMALL, steps=4, curriculum=CurriculumSettings(order=order))
        return train_mil(*small, settings, seed=seed, log=quiet)[1]
    assert [phase.pace for phase in phases("none", 0)] == [1, 1, 1, 1]
    assert not np.array_equal(*(phases("random", seed)[1].difficulty for seed in (1, 2)))


def test_training_goes_on_from_given_weights(small: tuple[WeakSet, np.ndarray]) -> None:
    data, cam = small
    first, _ = train_mil(data, cam, replace(SMALL, rate=1e-2), seed=1, log=quiet)
    kept = copy.deepcopy(first)
    # The target of this phase is the opinion of the net alone.
    still = replace(SMALL, rate=1e-12, curriculum=CurriculumSettings(paces=(0.5,), weights=(1.0,), trust=(0.0,)))
    on, (phase,) = train_mil(data, cam, still, start=first, seed=2, log=quiet)
    fresh, (alone,) = train_mil(data, cam, still, seed=2, log=quiet)
    moved, _ = train_mil(data, cam, SMALL, start=first, seed=2, log=quiet)
    assert [nearly_same(net, kept) for net in (on, fresh, moved)] == [True, False, False]
    assert same_weights(first, kept), "the start itself stays"
    ids = patch_ids(data.crops, cam, still)
    ill = instances(ids) & (data.labels == 1)[:, None]
    for found, source in ((phase, patch_scores(first, data.crops, ids)), (alone, patch_values(cam, ids))):
        opinion = np.clip(source, 0.02, 0.98)
        odds = still.curriculum.sharpness * np.log(opinion / (1 - opinion))
        np.testing.assert_allclose(found.target[ill], (1 / (1 + np.exp(-odds)))[ill], atol=1e-4)


def mirrored(crops: Crops) -> Crops:
    return replace(crops, images=crops.images[..., ::-1].copy(), lungs=crops.lungs[..., ::-1].copy())


def probabilities_by_hand(net: PatchNet, crops: Crops, places: list[np.ndarray]) -> np.ndarray:
    """Mean over the places of the patches, and over the slice and its mirror image; one slice and patch at a time."""
    result = np.zeros(crops.images.shape)
    for ids in places:
        for side in (1, -1):  # as it is, and mirrored
            numbers, part = ids[..., ::side], crops if side == 1 else mirrored(crops)
            for maps, scores, one in zip(result, patch_scores(net, part, numbers.copy()), numbers, strict=True):
                for number in range(1, one.max() + 1):
                    maps[(one == number)[:, ::side]] += scores[number] / (2 * len(places))
    return result * crops.lungs


@pytest.mark.parametrize(("reading", "shifts"), [
    ("pixels", [0]), ("pixels", [0, 2]), ("pixels", [0, 1, 3]), ("grid", [0])])
def test_probabilities_on_pixels(reading: str, shifts: list[int]) -> None:
    data, disks = toy(5)
    lungs = data.crops.lungs.copy()
    lungs[:, :, 28:] = False  # not its own mirror image
    crops, settings = replace(data.crops, lungs=lungs), replace(SMALL, reading=reading)
    cam = (disks & lungs).astype(np.float32)
    torch.manual_seed(0)
    net = PatchNet(settings)
    places = [square_ids(lungs, offset=(down, right)) for down in shifts for right in shifts]
    if reading == "grid":
        places = [patch_ids(crops, cam, settings)]
        assert not np.array_equal(places[0], square_ids(lungs)), "some disk has to be large enough for a grid"
    maps = patch_probabilities(net, crops, cam, shifts=len(shifts))
    assert net.training, "the state of the net comes back"
    assert maps.dtype == np.float32
    np.testing.assert_allclose(maps, probabilities_by_hand(net, crops, places), atol=1e-6)
    assert (maps[~lungs] == 0).all()
    assert (maps[lungs] > 0).mean() > 0.95
    assert maps.max() <= 1
    alone = probabilities_by_hand(net, crops, [square_ids(lungs)])
    assert (np.abs(maps - alone).max() > 1e-4) == (len(shifts) > 1 or reading == "grid"), "the places take part"
