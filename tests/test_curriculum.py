"""The order of the patches, and the rounds in which the two tasks teach each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import toy

from covidseg.curriculum import (
    ORDERS,
    CurriculumSettings,
    MutualSettings,
    Phase,
    admit_easiest,
    agreement,
    make_guidance,
    plan_phase,
)
from covidseg.errors import SettingsError
from covidseg.patches import instances, patch_values, square_ids
from covidseg.preprocess import Crops, WeakSet

SETTINGS = CurriculumSettings(paces=(0.0, 0.25, 0.5, 1.0), weights=(0.0, 0.5, 1.0, 1.0), trust=(1.0, 0.7, 0.5, 0.4),
                              prior=0.4, sharpness=1.5)


def test_the_easiest_are_admitted() -> None:
    difficulty = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.0, 0.7]])
    candidates = torch.tensor([[True, True, True], [True, False, False]])
    assert admit_easiest(difficulty, candidates, 0.5).tolist() == [[False, True, False], [True, False, False]]
    assert admit_easiest(difficulty, candidates, 0.01).sum() == 1, "at least one"
    assert not admit_easiest(difficulty, torch.zeros_like(candidates), 1).any(), "unless there is none"
    equals = admit_easiest(torch.tensor([0.2, 0.2, 0.2, 0.8]), torch.tensor([True] * 4), 0.25)
    assert equals.tolist() == [True, True, True, False], "equally difficult ones are admitted together"


@pytest.mark.parametrize("pace", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_admission_follows_the_order_and_never_leaves_the_candidates(pace: float) -> None:
    source = torch.Generator().manual_seed(2)
    difficulty = torch.rand(4, 81, generator=source)
    candidates = torch.rand(4, 81, generator=source) < 0.6
    admitted = admit_easiest(difficulty, candidates, pace)
    assert not (admitted & ~candidates).any()
    assert admitted.sum() == round(pace * int(candidates.sum()))
    if 0 < pace < 1:
        assert difficulty[admitted].max() < difficulty[candidates & ~admitted].min()


Case = tuple[np.ndarray, np.ndarray, np.ndarray]
FIRST = MutualSettings(rounds=3)


@pytest.fixture(scope="module")
def case() -> Case:
    """Activation map and opinion on patches, and the patches that may be taught."""
    rng = np.random.default_rng(0)
    prior, opinion = rng.random((2, 8, 40)).astype(np.float32)
    candidates = rng.random((8, 40)) < 0.7
    candidates[::2] = False
    candidates[:, 0] = False
    return prior, opinion, candidates


def phases_of(case: Case, order: str = "easy", seed: int = 0) -> list[Phase]:
    settings = replace(SETTINGS, order=order)
    return [plan_phase(*case, settings, k, seed=seed) for k in range(len(settings.paces))]


def classes(phase: Phase, candidates: np.ndarray) -> list[np.ndarray]:
    return [candidates & (phase.target >= 0.5), candidates & (phase.target < 0.5)]


@pytest.mark.parametrize("order", ORDERS)
def test_candidates_alone_are_admitted_and_their_share_follows_the_pace_in_each_class(case: Case, order: str) -> None:
    easy = phases_of(case)
    for phase, first, pace in zip(phases_of(case, order), easy, SETTINGS.paces, strict=True):
        pace = 1 if order == "none" else pace  # without an order all are taught in every phase
        assert phase.pace == pace
        assert not (phase.admitted & ~case[2]).any()
        assert np.array_equal(phase.target, first.target), "the order leaves the targets alone"
        for of_class in classes(phase, case[2]):
            assert of_class.sum() > 10
            share = (phase.admitted & of_class).sum() / of_class.sum()
            assert share == pytest.approx(pace, abs=0.5 / of_class.sum() + 1e-9)


def test_the_easiest_come_first_in_each_class_and_reversed_the_hardest(case: Case) -> None:
    easiest, hardest = phases_of(case)[1:3], phases_of(case, "reversed")[1:3]
    for easy, hard in zip(easiest, hardest, strict=True):
        for of_class in classes(easy, case[2]):
            first, last, later, sooner = (easy.difficulty[of_class & part] for part in (
                easy.admitted, hard.admitted, ~easy.admitted, ~hard.admitted))
            assert first.max() <= later.min()
            assert last.min() >= sooner.max()
            assert first.min() < last.max()
    assert not (easiest[0].admitted & hardest[0].admitted).any(), "a quarter each"


def test_random_order_comes_from_the_seed_alone(case: Case) -> None:
    first, again, other = ([phase.admitted for phase in phases_of(case, "random", seed)] for seed in (5, 5, 6))
    easy, same = ([phase.admitted for phase in phases_of(case, seed=seed)] for seed in (5, 6))
    assert np.array_equal(first, again)
    assert np.array_equal(easy, same), "the other orders draw nothing"
    for k in (1, 2):
        assert not np.array_equal(first[k], other[k])
        assert not np.array_equal(first[k], easy[k])


@pytest.mark.parametrize(("phase", "sharpness", "target"), [
    (0, 1.0, 0.5),     # the map's own threshold becomes one half
    (1, 1.0, 0.75),    # half of the log odds of 0.9: logit(.9) = 2 logit(.75)
    (2, 1.0, 0.9), (1, 2.0, 0.9)])
def test_full_trust_takes_the_target_from_the_map_and_less_trust_mixes_in_the_opinion(
        phase: int, sharpness: float, target: float) -> None:
    settings = replace(SETTINGS, prior=0.3, sharpness=sharpness, trust=(1.0, 0.5, 0.0, 0.0))
    prior, opinion = np.full((1, 3), 0.3, np.float32), np.full((1, 3), 0.9, np.float32)
    found = plan_phase(prior, opinion, np.ones((1, 3), bool), settings, phase)
    assert found.target[0, 1] == pytest.approx(target)


def test_undecided_and_disputed_patches_are_difficult() -> None:
    settings = replace(SETTINGS, prior=0.5, sharpness=1.0, trust=(0.5,) * 4)
    prior = np.array([[0.95, 0.5, 0.95]], np.float32)   # agreed, nobody knows, contradicted
    opinion = np.array([[0.95, 0.5, 0.05]], np.float32)
    first, second = (plan_phase(prior, opinion, np.ones((1, 3), bool), settings, k).difficulty[0] for k in (0, 1))
    agreed, unknown, disputed = second
    assert disputed > unknown > agreed
    assert first[2] == pytest.approx(first[1]), "at first the net has no opinion to contradict with"


def test_easy_patches_are_called_right_more_often_than_hard_ones() -> None:
    """What the curriculum is for, on toy slices whose activation map is a noisy view of the disks."""
    data, disks = toy(40)
    ids = square_ids(data.crops.lungs)
    candidates = instances(ids) & (data.labels == 1)[:, None]
    truth = patch_values(disks, ids) > 0.5
    noise = np.random.default_rng(0).standard_normal(truth.shape)
    prior = np.clip(0.2 + 0.4 * truth + 0.2 * noise, 0, 1).astype(np.float32)
    _, quarter, half, _ = phases_of((prior, prior, candidates))
    right = (quarter.target >= 0.5) == truth
    for phase in (quarter, half):
        assert right[phase.admitted].mean() > right[candidates & ~phase.admitted].mean() + 0.05
    hard = phases_of((prior, prior, candidates), "reversed")[1]
    assert right[quarter.admitted].mean() > right[hard.admitted].mean() + 0.1


@pytest.mark.parametrize(("settings", "change", "named"), [
    *[(SETTINGS, change, r"Choose one of|one number a phase") for change in (
        {"order": "slow"}, {"order": ""}, {"paces": (0.0, 1.0)}, {"weights": (1.0,)}, {"trust": (1.0,) * 5})],
    (FIRST, {"exchange": "sometimes"}, "to_patches"), (FIRST, {"rounds": 0}, "1 or more"),
    (FIRST, {"rounds": -2}, "1 or more")])
def test_bad_settings_are_refused(settings: Any, change: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        replace(settings, **change)


# --- mutual -----------------------------------------------------------------------------------------------------------

NAN = float("nan")


def row(labels: list[int], width: int) -> WeakSet:
    """Slices of one row of pixels; the last pixel lies outside the lung."""
    lungs = np.ones((len(labels), 1, width), bool)
    lungs[..., -1] = False
    names = np.array([str(k) for k in range(len(labels))])
    crops = Crops(np.zeros(lungs.shape, np.float32), lungs, np.zeros((len(labels), 4), int))
    return WeakSet(crops, np.array(labels), names, names)


def maps(*rows: list[float]) -> np.ndarray:
    return np.array(rows, np.float32)[:, None]


def test_a_slice_without_a_lesion_is_taught_as_lung_throughout() -> None:
    data, _ = toy(6)
    noise = np.random.default_rng(0).random((6, 40, 40)).astype(np.float32)
    guidance = make_guidance(data, noise, MutualSettings(), 2)
    free = data.labels == 0
    assert (guidance.target[free] == 0).all()
    assert np.array_equal(guidance.target[~free], noise[~free]), "the opinion of the patches, doubts included"
    assert guidance.target.dtype == np.float32


def test_the_weight_of_the_lesson_is_ramped_up_and_then_stays() -> None:
    settings = MutualSettings(weights=(0.2, 0.5, 0.9))
    patches = maps([0.0, 1.0])
    found = [make_guidance(row([1], 2), patches, settings, number).weight for number in range(2, 8)]
    assert found == [0.2, 0.5, 0.9, 0.9, 0.9, 0.9]


def test_agreement_by_hand() -> None:
    # Sums 0.9 and 1.8: the first is doubled, then the smaller ones sum to 0.2 + 0.8 + 0.0 of 3.6.
    cam, patches = maps([0.1, 0.5, 0.3]), maps([1.0, 0.8, 0.0])
    assert agreement(row([1], 3), cam, patches) == pytest.approx(2 * 1.0 / 3.6)
    # Sums 1.2 and 2.4: the doubled 1.8 is clipped to 1, as the other map cannot be larger either.
    cam, patches = maps([0.9, 0.3, 0.0]), maps([1.0, 0.4, 1.0])
    assert agreement(row([1], 3), cam, patches) == pytest.approx(2 * 1.4 / (1.6 + 2.4))


def test_agreement_falls_as_maps_drift_apart_and_has_no_unit_and_counts_slices_with_a_lesion() -> None:
    data, disks = toy(8)
    patches, nothing = disks.astype(np.float32), np.zeros(disks.shape, np.float32)
    found = [agreement(data, 0.2 * np.roll(patches, shift, axis=2), 0.8 * patches) for shift in (0, 2, 5, 9)]
    assert found[0] == pytest.approx(1)
    assert found[0] > found[1] > found[2] > found[3] >= 0
    for cam, other in ((data.crops.lungs & ~disks, patches), (nothing, patches), (nothing, nothing)):
        assert agreement(data, cam.astype(np.float32), other) == 0
    shifted, noise = np.roll(patches, 3, axis=1), np.random.default_rng(0).random(disks.shape).astype(np.float32)
    expected, ill = agreement(data, patches, shifted), (data.labels == 1)[:, None, None]
    assert agreement(data, np.where(ill, patches, noise), shifted) == expected
    assert agreement(data, np.where(ill, patches * noise, patches), shifted) != expected


@pytest.mark.parametrize(("settings", "last"), [
    (MutualSettings(), 2), (MutualSettings(rounds=3), 3), (MutualSettings(rounds=1), 1),
    (MutualSettings(exchange="to_patches", rounds=3), 1), (MutualSettings(exchange="none", rounds=3), 1)])
def test_the_last_round_is_the_first_where_nothing_comes_back(settings: MutualSettings, last: int) -> None:
    assert settings.last == last
