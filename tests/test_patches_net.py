"""Multiple-instance learning on patches: bags, both readings of a patch, and that it finds where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import in_turn, quiet, same_weights, toy, weights

from covidseg.augment import NO_PAINT, PaintSettings
from covidseg.curriculum import CurriculumSettings
from covidseg.errors import SettingsError
from covidseg.evaluation.metrics import auc
from covidseg.patches import (
    MilSettings,
    PatchNet,
    grid_ids,
    instances,
    patch_ids,
    patch_probabilities,
    patch_scores,
    patch_values,
    square_ids,
    train_mil,
)
from covidseg.preprocess import Crops

pytestmark = pytest.mark.nets

# Bags alone: no phase admits a patch.
ALONE = CurriculumSettings(paces=(0.0,), weights=(0.0,), trust=(1.0,))
SMALL = MilSettings(width=4, steps=8, batch=4, paint=NO_PAINT)
ENOUGH = MilSettings(width=8, steps=60, batch=8, rate=5e-3, component_weight=0.0, curriculum=ALONE, paint=NO_PAINT)


@pytest.fixture
def net() -> PatchNet:
    torch.manual_seed(0)
    return PatchNet(SMALL).eval()


@pytest.mark.parametrize("reading", ["pixels", "grid"])
def test_a_score_and_an_attention_for_every_patch(reading: str, net: PatchNet) -> None:
    data, disks = toy(4)
    found = patch_ids(data.crops, disks.astype(np.float32), replace(SMALL, reading=reading))
    ids = torch.from_numpy(found.astype(np.int64))
    scores, attention = net(torch.rand(4, 2, 40, 40), ids)
    assert scores.shape == attention.shape == (4, int(found.max()) + 1)
    assert net(torch.rand(4, 2, 40, 40), ids, 99)[0].shape == (4, 100)
    assert scores[0].std() > 0


def test_patches_are_judged_one_by_one_by_their_description(net: PatchNet) -> None:
    data, _ = toy(2)
    ids = torch.from_numpy(square_ids(data.crops.lungs).astype(np.int64))
    inputs, count = torch.rand(2, 2, 40, 40), int(ids.max())
    described = net.describe(net.features(inputs), ids, count)
    assert described.shape == (2, count + 1, 7 * SMALL.width)
    whole = net(inputs, ids)
    for part, expected in zip(net.judge(described), whole, strict=True):
        assert torch.equal(part, expected)
    chosen = torch.tensor([5, 3, 8])  # a few patches of one slice, in any order
    for part, expected in zip(net.judge(described[1, chosen]), whole, strict=True):
        torch.testing.assert_close(part, expected[1, chosen])


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


@pytest.mark.parametrize("reading", ["pixels", "grid"])
def test_all_slices_in_one_pass_equal_one_slice_at_a_time(reading: str, net: PatchNet) -> None:
    data, disks = toy(5)
    ids = patch_ids(data.crops, disks.astype(np.float32), replace(SMALL, reading=reading))
    count = int(ids.max())
    together = patch_scores(net, data.crops, ids)
    alone = np.concatenate([patch_scores(net, data.crops.take(np.array([k])), ids[k:k + 1], count) for k in range(5)])
    assert together.shape == (5, count + 1)
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(patch_scores(net, data.crops, ids, batch=2), together, atol=1e-5)
    there = instances(ids)
    assert ((together[there] > 0) & (together[there] < 1)).all()
    assert together[there].std() > 1e-4


def test_a_patch_has_the_same_score_whatever_its_number_and_whatever_the_other_patches(net: PatchNet) -> None:
    data, _ = toy(2)
    ids = square_ids(data.crops.lungs)
    count = int(ids.max())
    scores = patch_scores(net, data.crops, ids)
    order = np.concatenate([[0], 1 + np.random.default_rng(0).permutation(count)])
    np.testing.assert_allclose(patch_scores(net, data.crops, order[ids])[:, order], scores, atol=1e-6)
    merged = np.where(ids > 9, 10, ids)
    np.testing.assert_allclose(patch_scores(net, data.crops, merged)[:, 1:10], scores[:, 1:10], atol=1e-6)


def test_patch_numbers_in_both_readings() -> None:
    data, disks = toy(4)
    cam = disks.astype(np.float32)
    squares = patch_ids(data.crops, None, SMALL)
    assert np.array_equal(squares, square_ids(data.crops.lungs))
    assert np.array_equal(patch_ids(data.crops, None, replace(SMALL, patch=8)), square_ids(data.crops.lungs, 8))
    grid = patch_ids(data.crops, cam, replace(SMALL, reading="grid"))
    assert np.array_equal(grid, grid_ids(data.crops.lungs, disks & data.crops.lungs))
    assert not np.array_equal(grid, squares)
    below = np.where(disks, SMALL.component - 0.01, 0).astype(np.float32)
    assert np.array_equal(patch_ids(data.crops, below, replace(SMALL, reading="grid")), squares)


def test_a_grid_without_the_activation_map_is_refused(net: PatchNet) -> None:
    data, _ = toy(2)
    with pytest.raises(SettingsError, match="activation map"):
        patch_ids(data.crops, None, replace(SMALL, reading="grid"))
    with pytest.raises(SettingsError, match="activation map"):
        patch_probabilities(PatchNet(replace(SMALL, reading="grid")), data.crops)
    assert patch_probabilities(net, data.crops).shape == (2, 40, 40)


@pytest.mark.parametrize(("change", "named"), [({"reading": "voxels"}, "'voxels'"), ({"pooling": "max"}, "'max'")])
def test_bad_settings_are_refused(change: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        MilSettings(**change)


def lung_of(data_labels: np.ndarray, crops: Crops, label: int) -> np.ndarray:
    return crops.lungs & (data_labels == label)[:, None, None]


def patch_auc(net: PatchNet) -> float:
    """How well patches with a disk stand out among all lung patches of fresh positive slices."""
    fresh, disks = toy(24, seed=9)
    chosen = lung_of(fresh.labels, fresh.crops, 1)
    return auc(patch_probabilities(net, fresh.crops)[chosen], disks[chosen].astype(int))


def free_mean(net: PatchNet) -> float:
    """Mean probability in fresh slices without a disk."""
    fresh, _ = toy(24, seed=9)
    return float(patch_probabilities(net, fresh.crops)[lung_of(fresh.labels, fresh.crops, 0)].mean())


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_bags_alone_teach_where_the_disk_is(pooling: str) -> None:
    """No map, nothing painted, no patch admitted: slice labels are all there is."""
    data, _ = toy(32)
    settings = replace(ENOUGH, pooling=pooling)
    blind = np.zeros(data.crops.images.shape, np.float32)
    net, phases = train_mil(data, blind, settings, seed=3, log=quiet)
    assert len(phases) == 1
    assert not phases[0].admitted.any()
    torch.manual_seed(3)
    start = PatchNet(settings)
    assert patch_auc(start) < 0.5, "the start must not know the answer already"
    assert patch_auc(net) > 0.9
    assert free_mean(start) > 0.4
    assert free_mean(net) < 0.2
    blurred, _ = train_mil(data, blind, replace(settings, zeros=0.0), seed=3, log=quiet)
    assert patch_auc(blurred) < patch_auc(net) - 0.1
    # After few steps, before rounding has carried a training elsewhere: 4 to 10 times under three instruction sets.
    few = replace(settings, steps=20)
    without, heavy = (train_mil(data, blind, replace(few, zeros=zeros), seed=3, log=quiet)[0] for zeros in (0.0, 5.0))
    assert free_mean(without) > 2 * free_mean(heavy), "the zeros of lesion-free slices have to act"


def test_a_wrong_map_misleads_and_a_right_one_does_not() -> None:
    """The taught loss has to act: with the same bags, the map decides which patches are called ill."""
    data, disks = toy(32)
    settings = replace(ENOUGH, width=6, rate=3e-3, curriculum=CurriculumSettings(
        paces=(1.0,), weights=(3.0,), trust=(1.0,), prior=0.4))
    wrong = (lung_of(data.labels, data.crops, 1) & ~disks).astype(np.float32)
    good, _ = train_mil(data, disks.astype(np.float32), settings, seed=1, log=quiet)
    bad, _ = train_mil(data, wrong, settings, seed=1, log=quiet)
    assert patch_auc(good) > 0.95
    assert patch_auc(bad) < patch_auc(good) - 0.3


def test_a_coarse_component_is_a_bag_that_holds_a_lesion() -> None:
    data, disks = toy(32)
    corner = np.zeros(data.crops.images.shape, np.float32)
    corner[data.labels == 1, 6:16, 6:16] = 1
    there = corner.astype(bool) & ~disks
    probability = {}
    for weight in (0.0, 3.0):
        net, _ = train_mil(data, corner, replace(ENOUGH, component_weight=weight), seed=1, log=quiet)
        probability[weight] = 1 - patch_probabilities(net, data.crops)[there].mean()
    assert probability[3.0] < 0.2 * probability[0.0]


class FakePainter:
    """Paints a dark square, which is a lesion, and a bright bar, which is none, on each lesion-free slice."""

    square, bar = (slice(10, 18), slice(10, 18)), (slice(25, 29), slice(8, 32))

    def __init__(self, crops: Crops, settings: PaintSettings) -> None:
        pass

    def __call__(self, maps: torch.Tensor, index: torch.Tensor, free: torch.Tensor,
                 generator: torch.Generator) -> torch.Tensor:
        maps = maps.clone()
        for k in torch.nonzero(free).flatten().tolist():
            maps[(k, 0, *self.square)], maps[(k, 2, *self.square)] = -0.3, 1.0
            maps[(k, 0, *self.bar)] = 1.2
        return maps


def test_painted_slices_label_each_of_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    data, _ = toy(32)
    fresh, _ = toy(24, seed=9)
    free = fresh.labels == 0
    images = fresh.crops.images.copy()
    images[(free, *FakePainter.square)], images[(free, *FakePainter.bar)] = -0.3, 1.2
    marked = replace(fresh.crops, images=images)
    blind = np.zeros(data.crops.images.shape, np.float32)

    def judge() -> tuple[float, float, float]:
        """Mean probability in the square, on the bar and in the lung around them."""
        net, _ = train_mil(data, blind, ENOUGH, seed=1, log=quiet)
        maps = patch_probabilities(net, marked)[free]
        return maps[:, 11:17, 11:17].mean(), maps[:, 25:29, 9:31].mean(), maps[:, 20:24, 10:30].mean()

    square, bar, rest = judge()
    assert bar > 0.9, "the toy's lesions are bright: without painting a bright bar passes for one"
    assert square - rest < 0.1
    monkeypatch.setattr("covidseg.patches.Painter", FakePainter)
    square, bar, rest = judge()
    assert bar < 0.1
    assert square - rest > 0.5


def test_without_paint_nothing_is_ever_painted(monkeypatch: pytest.MonkeyPatch) -> None:
    from covidseg import augment as augmenting

    data, disks = toy(8)
    painted: list[str] = []
    for name in ("paint_lesions", "paint_vessels"):
        def spy(*arguments: object, real: object = getattr(augmenting, name), name: str = name) -> object:
            painted.append(name)
            return real(*arguments)  # type: ignore[operator]
        monkeypatch.setattr(augmenting, name, spy)
    train_mil(data, disks.astype(np.float32), SMALL, log=quiet)
    assert not painted
    train_mil(data, disks.astype(np.float32), replace(SMALL, paint=PaintSettings()), log=quiet)
    assert set(painted) == {"paint_lesions", "paint_vessels"}
    assert len(painted) <= 2 * SMALL.steps * SMALL.batch // 2, "slices with a lesion stay as they are"


def test_batches_made_ahead_are_those_made_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    data, disks = toy(12)
    settings = replace(SMALL, paint=PaintSettings())
    ahead, phases = train_mil(data, disks.astype(np.float32), settings, seed=2, log=quiet)
    assert len(phases) > 1
    monkeypatch.setattr("covidseg.patches.overlapped", in_turn)
    assert same_weights(ahead, train_mil(data, disks.astype(np.float32), settings, seed=2, log=quiet)[0])


@pytest.mark.parametrize("reading", ["pixels", "grid"])
def test_every_phase_takes_part_and_training_repeats_with_the_seed(reading: str) -> None:
    data, disks = toy(12)
    cam, settings = disks.astype(np.float32), replace(SMALL, reading=reading, paint=PaintSettings())
    lines: list[str] = []
    net, phases = train_mil(data, cam, settings, seed=2, log=lines.append)
    ids = patch_ids(data.crops, cam, settings)
    assert [phase.pace for phase in phases] == list(settings.curriculum.paces)
    assert sum("phase" in line for line in lines) == len(phases)
    for phase in phases:
        assert phase.admitted.shape == (12, ids.max() + 1)
        assert not (phase.admitted & ~(instances(ids) & (data.labels == 1)[:, None])).any()
    assert not net.training
    again, repeated = train_mil(data, cam, settings, seed=2, log=quiet)
    assert same_weights(net, again)
    assert all(np.array_equal(a.admitted, b.admitted) for a, b in zip(phases, repeated, strict=True))
    assert not same_weights(net, train_mil(data, cam, settings, seed=3, log=quiet)[0])


def test_the_order_of_the_settings_reaches_the_phases() -> None:
    data, disks = toy(12)
    settings = replace(SMALL, steps=4, curriculum=CurriculumSettings(order="none"))
    _, phases = train_mil(data, disks.astype(np.float32), settings, log=quiet)
    assert [phase.pace for phase in phases] == [1, 1, 1, 1]
    drawn = [train_mil(data, disks.astype(np.float32), replace(settings, curriculum=CurriculumSettings(order="random")),
                       seed=seed, log=quiet)[1][1].difficulty for seed in (1, 2)]
    assert not np.array_equal(*drawn)


def test_training_goes_on_from_given_weights() -> None:
    data, disks = toy(12)
    cam = disks.astype(np.float32)
    first, _ = train_mil(data, cam, replace(SMALL, rate=1e-2), seed=1, log=quiet)
    before = {name: value.copy() for name, value in weights(first).items()}
    # The target of this phase is the opinion of the net alone.
    still = replace(SMALL, rate=1e-12, curriculum=CurriculumSettings(paces=(0.5,), weights=(1.0,), trust=(0.0,)))
    on, (phase,) = train_mil(data, cam, still, start=first, seed=2, log=quiet)
    names = [name for name, _ in first.named_parameters()]
    assert all(np.allclose(weights(on)[name], before[name], atol=1e-6) for name in names)
    fresh, (alone,) = train_mil(data, cam, still, seed=2, log=quiet)
    assert not all(np.allclose(weights(fresh)[name], before[name], atol=1e-6) for name in names)
    moved, _ = train_mil(data, cam, SMALL, start=first, seed=2, log=quiet)
    assert not same_weights(moved, first)
    assert all(np.array_equal(weights(first)[name], before[name]) for name in before), "the start itself stays"

    ids = patch_ids(data.crops, cam, still)
    opinion = np.clip(patch_scores(first, data.crops, ids), 0.02, 0.98)
    odds = still.curriculum.sharpness * np.log(opinion / (1 - opinion))
    ill = instances(ids) & (data.labels == 1)[:, None]
    np.testing.assert_allclose(phase.target[ill], (1 / (1 + np.exp(-odds)))[ill], atol=1e-4)
    prior = np.clip(patch_values(cam, ids), 0.02, 0.98)
    odds = still.curriculum.sharpness * np.log(prior / (1 - prior))
    np.testing.assert_allclose(alone.target[ill], (1 / (1 + np.exp(-odds)))[ill], atol=1e-4)


def mirrored(crops: Crops) -> Crops:
    return Crops(crops.images[..., ::-1].copy(), crops.lungs[..., ::-1].copy(), crops.boxes)


@pytest.fixture
def lopsided() -> tuple[Crops, np.ndarray]:
    """Crops whose lung is not its own mirror image, and an activation map."""
    data, disks = toy(5)
    lungs = data.crops.lungs.copy()
    lungs[:, :, 28:] = False
    return replace(data.crops, lungs=lungs), (disks & lungs).astype(np.float32)


def test_probabilities_on_pixels(net: PatchNet, lopsided: tuple[Crops, np.ndarray]) -> None:
    crops, _ = lopsided
    net.train()
    maps = patch_probabilities(net, crops)
    assert net.training, "the state of the net comes back"
    assert maps.shape == (5, 40, 40)
    assert maps.dtype == np.float32
    assert (maps[~crops.lungs] == 0).all()
    assert (maps[crops.lungs] > 0).mean() > 0.95
    assert maps.max() <= 1


def test_a_mirrored_slice_has_the_mirrored_map(net: PatchNet, lopsided: tuple[Crops, np.ndarray]) -> None:
    crops, _ = lopsided
    # Squares that start at the edge mirror onto squares, since the side is a multiple of 5; shifted ones do not.
    np.testing.assert_allclose(patch_probabilities(net, mirrored(crops), shifts=1)[..., ::-1],
                               patch_probabilities(net, crops, shifts=1), atol=1e-5)
    ids = square_ids(crops.lungs)
    once = np.take_along_axis(patch_scores(net.eval(), crops, ids), ids.reshape(5, -1), 1).reshape(ids.shape)
    found = patch_probabilities(net, crops, shifts=1)
    assert np.abs(found - once)[crops.lungs & (ids > 0)].max() > 1e-4, "the mirror image takes part"


def test_shifted_grids_refine_the_blocks(net: PatchNet, lopsided: tuple[Crops, np.ndarray]) -> None:
    crops, _ = lopsided
    ids = square_ids(crops.lungs)
    one, four = (patch_probabilities(net, crops, shifts=shifts)[0] for shifts in (1, 2))
    full = [ids[0] == number for number in range(1, ids[0].max() + 1) if crops.lungs[0][ids[0] == number].all()]
    assert len(full) > 10
    assert all(np.ptp(one[square]) < 1e-7 for square in full)
    assert np.mean([np.ptp(four[square]) > 1e-5 for square in full]) > 0.9
    # Grids shifted by 0 and 2 pixels cut each square into 2 x 2 blocks of 3 or 2 pixels a side.
    for part in (slice(0, 3), slice(3, 5)):
        for other in (slice(0, 3), slice(3, 5)):
            assert all(np.ptp(four[square].reshape(5, 5)[part, other]) < 1e-7 for square in full)


def test_the_grid_reading_has_one_value_a_cell(net: PatchNet, lopsided: tuple[Crops, np.ndarray]) -> None:
    crops, cam = lopsided
    settings = replace(SMALL, reading="grid")
    torch.manual_seed(0)
    maps = patch_probabilities(PatchNet(settings), crops, cam)
    ids = patch_ids(crops, cam, settings)
    assert not np.array_equal(ids, square_ids(crops.lungs)), "some disk has to be large enough for a grid"
    for one, numbers, lung in zip(maps, ids, crops.lungs, strict=True):
        assert all(np.ptp(one[(numbers == k) & lung]) < 1e-6 for k in range(1, numbers.max() + 1))
        assert len(np.unique(one[(numbers > 0) & lung].round(7))) > 5
    assert (maps[~crops.lungs] == 0).all()
