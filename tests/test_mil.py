"""Multiple-instance learning on patches: the bag, the curriculum, and that it finds where."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import quiet, same_weights, toy

from covidseg.classify import auc
from covidseg.mil import MilSettings, PatchNet, Phase, bag_probability, patch_probabilities, plan_phase, train_mil
from covidseg.patches import PATCH, patch_lung

CURRICULUM = MilSettings(width=4, steps=8, batch=4, paces=(0.0, 0.25, 0.5, 1.0), weights=(0.0, 0.5, 1.0, 1.0),
                         trust=(1.0, 0.7, 0.5, 0.4), prior=0.4, sharpness=1.5)


def by_hand(scores: np.ndarray, attention: np.ndarray, inside: np.ndarray) -> float:
    """Half attention pooling (Ilse et al., eq. 8), half the fourth-power mean, over the instances of one bag."""
    s, a = scores[inside].astype(float), attention[inside].astype(float)
    weights = np.exp(a) / np.exp(a).sum()
    pooled = 1 / (1 + np.exp(-(weights * s).sum()))
    powers = np.mean((1 / (1 + np.exp(-s))) ** 4) ** 0.25
    return 0.5 * pooled + 0.5 * powers


@pytest.fixture
def bag() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(3, 1, 6, 6, generator=source)
    return scores, torch.randn(3, 1, 6, 6, generator=source), torch.rand(3, 1, 6, 6, generator=source) < 0.5


def test_bag_probability_equals_its_formula(bag: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    found = bag_probability(*bag)
    expected = [by_hand(*(part[k, 0].numpy() for part in bag)) for k in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_bag_ignores_patches_that_are_no_instances(bag: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    scores, attention, instances = bag
    loud_scores = torch.where(instances, scores, torch.full_like(scores, 30.0))
    loud_attention = torch.where(instances, attention, torch.full_like(scores, 30.0))
    torch.testing.assert_close(bag_probability(loud_scores, loud_attention, instances), bag_probability(*bag))
    scores.requires_grad_(True)
    bag_probability(scores, attention, instances).sum().backward()
    assert (scores.grad[~instances] == 0).all()
    assert (scores.grad[instances] > 0).all()


def test_one_ill_patch_raises_the_bag_more_than_the_mean() -> None:
    scores = torch.full((1, 1, 8, 8), -5.0)
    before = bag_probability(scores, torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)).item()
    scores[0, 0, 2, 2] = 5.0
    after = bag_probability(scores, torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)).item()
    assert after - before > 5 * (scores.sigmoid().mean().item() - before)


def test_a_bag_without_instances_stays_finite() -> None:
    scores = torch.zeros(1, 1, 4, 4)
    assert torch.isfinite(bag_probability(scores, scores, torch.zeros_like(scores, dtype=torch.bool))).all()


def test_all_patches_are_scored_in_one_pass() -> None:
    scores, attention = PatchNet(CURRICULUM)(torch.rand(2, 2, 80, 80))
    assert scores.shape == attention.shape == (2, 1, 16, 16)


@pytest.fixture(scope="module")
def planned() -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Phase]]:
    """Instances of positive slices, all instances, activation map on patches, and all four phases."""
    data, _ = toy(8)
    rng = np.random.default_rng(0)
    side = data.crops.images.shape[-1] // PATCH
    maps = rng.random((8, side, side), dtype=np.float32)
    opinion = rng.random((8, side, side), dtype=np.float32)
    inside = patch_lung(torch.from_numpy(data.crops.lungs)[:, None])[:, 0].numpy()
    teachable = inside & (data.labels == 1)[:, None, None]
    assert 0 < teachable.sum() < inside.sum() < inside.size, "the toy has to leave something to get wrong"
    return teachable, inside, maps, [plan_phase(maps, opinion, data, CURRICULUM, k) for k in range(4)]


def test_only_lung_patches_of_positive_slices_are_admitted(
        planned: tuple[np.ndarray, np.ndarray, np.ndarray, list[Phase]]) -> None:
    teachable, _, _, phases = planned
    for phase in phases:
        assert not (phase.admitted & ~teachable).any()
    assert np.array_equal(phases[-1].admitted, teachable), "pace 1 admits them all"


def test_the_share_admitted_follows_the_pace_in_each_class(
        planned: tuple[np.ndarray, np.ndarray, np.ndarray, list[Phase]]) -> None:
    teachable, _, _, phases = planned
    for phase, pace in zip(phases, CURRICULUM.paces, strict=True):
        assert phase.pace == pace
        for of_class in (teachable & (phase.target >= 0.5), teachable & (phase.target < 0.5)):
            assert of_class.sum() > 10
            share = (phase.admitted & of_class).sum() / of_class.sum()
            assert share == pytest.approx(pace, abs=0.5 / of_class.sum() + 1e-9)


def test_the_easiest_come_first_in_each_class(
        planned: tuple[np.ndarray, np.ndarray, np.ndarray, list[Phase]]) -> None:
    teachable, _, _, phases = planned
    for phase in phases[1:3]:
        for of_class in (teachable & (phase.target >= 0.5), teachable & (phase.target < 0.5)):
            in_, out = phase.difficulty[of_class & phase.admitted], phase.difficulty[of_class & ~phase.admitted]
            assert in_.max() <= out.min()
            assert in_.min() < out.max()


def test_full_trust_takes_the_target_from_the_map_and_less_trust_mixes_in_the_opinion() -> None:
    data, _ = toy(2)
    settings = replace(CURRICULUM, prior=0.3, sharpness=1.0, trust=(1.0, 0.5, 0.0, 0.0))
    maps = np.full((2, 8, 8), 0.3, np.float32)
    opinion = np.full((2, 8, 8), 0.9, np.float32)
    targets = [float(plan_phase(maps, opinion, data, settings, k).target[1, 4, 4]) for k in range(3)]
    assert targets[0] == pytest.approx(0.5), "the map's own threshold becomes one half"
    assert targets[1] == pytest.approx(0.75), "half of the log odds of 0.9"  # logit(.9) = 2 logit(.75)
    assert targets[2] == pytest.approx(0.9)


def test_undecided_and_disputed_patches_are_difficult() -> None:
    data, _ = toy(2)
    settings = replace(CURRICULUM, prior=0.5, sharpness=1.0, trust=(0.5,) * 4)
    maps, opinion = np.full((2, 8, 8), 0.95, np.float32), np.full((2, 8, 8), 0.95, np.float32)
    maps[1, 4, 4] = opinion[1, 4, 4] = 0.5      # nobody knows
    maps[1, 4, 5], opinion[1, 4, 5] = 0.95, 0.05  # the two contradict each other
    difficulty = plan_phase(maps, opinion, data, settings, 1).difficulty
    assert difficulty[1, 4, 5] > difficulty[1, 4, 4] > difficulty[1, 4, 3]


def patch_auc(net: PatchNet) -> float:
    """How well patches with a disk stand out among all lung patches of fresh positive slices."""
    fresh, disks = toy(24, seed=9)
    probability = patch_probabilities(net, fresh.crops)
    chosen = fresh.crops.lungs & (fresh.labels == 1)[:, None, None]
    return auc(probability[chosen], disks[chosen].astype(int))


def test_bags_alone_teach_where_the_disk_is() -> None:
    data, _ = toy(32)
    settings = MilSettings(width=8, steps=60, batch=8, rate=5e-3, paces=(0.0,), weights=(0.0,), trust=(1.0,))
    blind = np.zeros(data.crops.images.shape, np.float32)
    net, phases = train_mil(data, blind, settings, seed=3, log=quiet)
    assert len(phases) == 1
    assert not phases[0].admitted.any()
    torch.manual_seed(3)
    assert patch_auc(PatchNet(settings)) < 0.5, "the start must not know the answer already"
    assert patch_auc(net) > 0.9


def test_a_wrong_map_misleads_and_a_right_one_does_not() -> None:
    """The taught loss has to act: with the same bags, the map decides which patches are called ill."""
    data, disks = toy(32)
    settings = MilSettings(width=6, steps=60, batch=8, rate=3e-3, paces=(1.0,), weights=(3.0,), trust=(1.0,), prior=0.4,
                           sharpness=1.5)
    right = disks.astype(np.float32)
    wrong = (data.crops.lungs & ~disks & (data.labels == 1)[:, None, None]).astype(np.float32)
    good, _ = train_mil(data, right, settings, seed=1, log=quiet)
    bad, _ = train_mil(data, wrong, settings, seed=1, log=quiet)
    assert patch_auc(good) > 0.95
    assert patch_auc(bad) < patch_auc(good) - 0.3


def test_every_phase_takes_part_and_training_repeats_with_the_seed() -> None:
    data, disks = toy(12)
    cam = disks.astype(np.float32)
    lines: list[str] = []
    net, phases = train_mil(data, cam, CURRICULUM, seed=2, log=lines.append)
    assert [phase.pace for phase in phases] == list(CURRICULUM.paces)
    assert sum("phase" in line for line in lines) == len(CURRICULUM.paces)
    assert not net.training
    again, repeated = train_mil(data, cam, CURRICULUM, seed=2, log=quiet)
    assert same_weights(net, again)
    assert all(np.array_equal(a.admitted, b.admitted) for a, b in zip(phases, repeated, strict=True))
    assert not same_weights(net, train_mil(data, cam, CURRICULUM, seed=3, log=quiet)[0])


def test_probabilities_on_pixels_and_on_patches() -> None:
    data, _ = toy(5)
    torch.manual_seed(0)
    net = PatchNet(CURRICULUM).train()
    pixels, patches = patch_probabilities(net, data.crops), patch_probabilities(net, data.crops, smooth=False)
    assert net.training, "the state of the net comes back"
    assert pixels.shape == (5, 40, 40)
    assert patches.shape == (5, 8, 8)
    assert (pixels[~data.crops.lungs] == 0).all()
    assert 0 <= pixels.min() <= pixels.max() <= 1
    np.testing.assert_allclose(patch_probabilities(net, data.crops, batch=2), pixels, atol=1e-6)
    # The mirror image of a slice has the mirror image of its map.
    mirrored = replace(data.crops, images=data.crops.images[..., ::-1].copy(), lungs=data.crops.lungs[..., ::-1].copy())
    np.testing.assert_allclose(patch_probabilities(net, mirrored)[..., ::-1], pixels, atol=1e-5)
