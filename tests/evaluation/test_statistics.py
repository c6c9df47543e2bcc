"""Intervals, tests and calibration against plain loops, another library and simulated truth."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from covidseg.evaluation.metrics import NAMES, confusion, macro, micro
from covidseg.evaluation.statistics import (
    FEWEST,
    FEWEST_IN_BIN,
    Difference,
    at_sensitivity,
    bootstrap_difference,
    bootstrap_interval,
    calibration,
    dice_by_size,
    level_counts,
    paired_test,
    reliability_sums,
    slice_dice,
)

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")  # NaN is an answer, never an accident
SLICE = 4000  # pixels


def simulated(rng: np.random.Generator, quality: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Counts of slices with the given lesion area in which about ``quality`` of the lesion was hit, ``(..., N, 4)``."""
    hit = rng.binomial(area, quality)
    false = rng.binomial(SLICE - area, 0.01)
    return np.stack([hit, false, area - hit, SLICE - area - false], axis=-1)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.fixture
def seeds(rng) -> np.ndarray:
    """Three seeds, 30 slices; three without a lesion, and one lesion that no seed finds."""
    area = rng.integers(20, 900, 30)
    area[:3] = 0
    counts = np.stack([simulated(rng, rng.uniform(0.4, 0.9, 30), area) for _ in range(3)])
    counts[:, 3] = [0, 0, area[3], SLICE - area[3]]
    return counts


# --- the interval -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("figure", NAMES)
@pytest.mark.parametrize("grouped", [False, True])
def test_interval_is_that_of_a_plain_loop(seeds, figure, grouped):
    patients = np.repeat(["c", "a", "b", "e", "d"], 6)
    names = np.unique(patients)
    units = [np.flatnonzero(patients == n) for n in names] if grouped else [np.array([n]) for n in range(30)]
    times = np.random.default_rng(3).multinomial(len(units), np.full(len(units), 1 / len(units)), 200)
    drawn = []
    for row in times:
        taken = np.concatenate([np.tile(unit, k) for unit, k in zip(units, row, strict=True)])
        drawn.append(np.mean([getattr(micro(counts[taken]), figure) for counts in seeds]))
    found = bootstrap_interval(seeds, figure, groups=patients if grouped else None, draws=200, seed=3)
    np.testing.assert_allclose(found, np.nanquantile(drawn, [0.025, 0.975]), rtol=1e-12)


def test_the_same_training_twice_is_no_more_slices(seeds):
    once = bootstrap_interval(seeds[0])
    assert once == bootstrap_interval(seeds[:1]) == bootstrap_interval(np.concatenate([seeds[:1], seeds[:1]]))
    assert once != bootstrap_interval(seeds[0], seed=1)


# --- the difference ---------------------------------------------------------------------------------------------

def test_a_system_does_not_differ_from_itself(seeds):
    for figure in NAMES:
        assert bootstrap_difference(seeds, seeds, figure) == Difference(0, 0, 0)


def test_difference_is_that_of_a_plain_loop_with_other_numbers_of_seeds(seeds):
    ours, other = seeds[:2], seeds[2]
    times = np.random.default_rng(0).multinomial(30, np.full(30, 1 / 30), 100)
    drawn = [np.mean([micro(c.repeat(row, axis=0)).dice for c in ours]) - micro(other.repeat(row, axis=0)).dice
             for row in times]
    found = bootstrap_difference(ours, other, draws=100)
    np.testing.assert_allclose((found.low, found.high), np.quantile(drawn, [0.025, 0.975]), rtol=1e-12)
    assert found.mean == pytest.approx(np.mean([micro(c).dice for c in ours]) - micro(other).dice, abs=1e-12)


# --- the test ---------------------------------------------------------------------------------------------------

def each(counts: np.ndarray) -> np.ndarray:
    """Every slice of a patient of its own."""
    return np.arange(counts.shape[-2])


def test_p_of_equal_systems_is_one(seeds):
    assert paired_test(seeds, seeds, each(seeds)) == 1
    assert paired_test(seeds, seeds[[2, 0, 1]], each(seeds)) == 1  # in another order: nothing but rounding


def test_p_of_a_clearly_better_system_is_tiny(rng):
    area, hard = rng.integers(100, 900, 52), rng.uniform(0.2, 0.7, 52)
    ours, other = simulated(rng, hard + 0.2, area), simulated(rng, hard, area)
    assert paired_test(ours, other, each(ours)) < 1e-6
    assert paired_test(ours, other, each(ours)) == paired_test(other, ours, each(ours))  # two-sided


def test_p_is_that_of_the_slices_with_a_lesion(seeds):
    ours, other = seeds[:2], seeds[2]
    dice = [[macro(c[n:n + 1]).dice for n in range(3, 30)] for c in seeds]
    expected = stats.wilcoxon(np.mean(dice[:2], axis=0), dice[2]).pvalue
    assert paired_test(ours, other, each(ours)) == pytest.approx(expected, rel=1e-9)


def test_p_ranks_one_difference_per_group(rng):
    # Eight patients, the first of them without a lesion: seven differences, all in our favour.
    patients = np.arange(8).repeat(10)
    area = np.where(patients > 0, 400, 0)
    ours, other = simulated(rng, np.full(80, 0.9), area), simulated(rng, np.full(80, 0.3), area)
    assert paired_test(ours, other, patients) == pytest.approx(2 / 2**7)
    assert paired_test(ours, other, each(ours)) < 1e-10
    assert math.isnan(paired_test(ours, other, patients // 2))


def test_too_few_patients_have_no_p(seeds):
    enough = seeds[:, :3 + FEWEST]  # the first three have no lesion
    assert 0 < paired_test(enough[0], enough[1], each(enough)) <= 1
    assert math.isnan(paired_test(enough[0, :-1], enough[1, :-1], each(enough)[:-1]))
    assert 2 / 2**FEWEST < 0.05 < 2 / 2**(FEWEST - 1)


# --- where a figure is undefined --------------------------------------------------------------------------------

def test_slice_dice_follows_macro(seeds):
    dice = slice_dice(seeds)
    assert np.nanmean(dice) == pytest.approx(np.mean([macro(counts).dice for counts in seeds]))
    assert np.isnan(dice[:3]).all()
    assert dice[3] == 0  # a lesion, and nothing predicted


def test_without_any_lesion_there_is_no_dice():
    healthy = np.array([[0, 0, 0, 100]] * 10)
    alarms = np.array([[0, 5, 0, 95]] * 10)
    assert np.isnan(bootstrap_interval(healthy)).all()
    found = bootstrap_difference(healthy, healthy)
    assert np.isnan([found.mean, found.low, found.high]).all()
    assert bootstrap_interval(alarms) == (0, 0)  # as metrics.micro: pooled, false alarms make Dice 0
    assert math.isnan(paired_test(healthy, alarms, each(healthy)))
    one_lesion = np.concatenate([[[10, 0, 0, 90]], healthy[:9]])
    assert bootstrap_interval(one_lesion) == (1, 1), "draws without a lesion are left out"
    count, dice = dice_by_size(alarms, [10])
    assert count.tolist() == [0, 0]
    assert np.isnan(dice).all()


def test_a_single_slice_or_group_has_no_interval(seeds):
    assert np.isnan(bootstrap_interval(seeds[:, 5:6])).all()
    assert np.isnan(bootstrap_interval(seeds[:, :0])).all()
    found = bootstrap_difference(seeds, seeds[0], groups=np.zeros(30))
    assert not math.isnan(found.mean)
    assert np.isnan([found.low, found.high]).all()


def test_what_does_not_fit_is_refused(seeds):
    one, swapped = seeds[0], seeds[0][::-1]
    comparisons = bootstrap_difference, partial(paired_test, groups=each(one))
    larger = one + np.array([0, 0, 0, 7])
    for bad in (one[0], one[:, :3], seeds[None], seeds[:0]):
        with pytest.raises(ValueError, match="neither"):
            bootstrap_interval(bad)
    for bad in (swapped, larger):
        with pytest.raises(ValueError, match="same ones in the same order"):
            bootstrap_interval(np.stack([one, bad]))
        for function in comparisons:
            with pytest.raises(ValueError, match="same ones in the same order"):
                function(one, bad)
    for function in comparisons:
        with pytest.raises(ValueError, match="30 slices, other 29"):
            function(one, one[:-1])
        with pytest.raises(ValueError, match="group for each of 30"):
            function(one, one, groups=np.zeros(29))
    with pytest.raises(ValueError, match="group for each of 30"):
        bootstrap_interval(one, groups=np.zeros((30, 1)))
    with pytest.raises(ValueError, match="none of dice, iou"):
        bootstrap_interval(one, "f1")
    with pytest.raises(ValueError, match="at least one"):
        bootstrap_interval(one, draws=0)


# --- lesion size ------------------------------------------------------------------------------------------------

def test_dice_by_size_by_hand():
    one = [[0, 0, 99, 901], [100, 0, 0, 900], [50, 0, 50, 900], [500, 0, 500, 0], [0, 9, 0, 991]]
    counts = np.repeat(one, FEWEST_IN_BIN, axis=0)
    count, dice = dice_by_size(counts, [100, 1000])
    assert count.tolist() == [10, 20, 10]  # the slices without a lesion are in none
    assert dice == pytest.approx([0, (1 + 2 / 3) / 2, 2 / 3])
    count, dice = dice_by_size(counts, [1, 2, 99])
    assert count.tolist() == [0, 0, 0, 40]
    assert dice == pytest.approx([math.nan] * 3 + [macro(counts).dice], nan_ok=True)


def test_no_conclusion_from_a_bin_of_fewer_than_ten_slices():
    counts = np.repeat([[50, 0, 50, 900], [500, 0, 500, 0]], [FEWEST_IN_BIN - 1, FEWEST_IN_BIN], axis=0)
    count, dice = dice_by_size(counts, [500])
    assert count.tolist() == [9, 10]
    assert dice == pytest.approx([math.nan, 2 / 3], nan_ok=True)


def test_dice_by_size_is_the_mean_over_seeds(seeds):
    _, dice = dice_by_size(seeds, [400])
    assert not np.isnan(dice).any()
    np.testing.assert_allclose(dice, np.mean([dice_by_size(c, [400])[1] for c in seeds], axis=0))
    for edges in ([500, 200], [200, 200]):
        with pytest.raises(ValueError, match="do not ascend"):
            dice_by_size(seeds, edges)


# --- calibration ------------------------------------------------------------------------------------------------

def test_calibration_by_hand():
    p = np.array([[0.0, 0.1, 0.6], [0.5, 1.0, 0.9]])
    truth = np.array([[False, True, True], [False, True, True]])
    sums = reliability_sums(p, truth, bins=4)
    np.testing.assert_allclose(sums, [[0.1, 1, 2], [0, 0, 0], [1.1, 1, 2], [1.9, 2, 2]])
    np.testing.assert_allclose(calibration(sums), [[0.05, math.nan, 0.55, 0.95], [0.5, math.nan, 0.5, 1]])


@given(arrays(float, st.integers(0, 60), elements=st.floats(0, 1)), st.integers(0, 60), st.integers(1, 12))
def test_slices_add_up(p, cut, bins):
    truth = p > 0.3
    whole = reliability_sums(p, truth, bins)
    np.testing.assert_allclose(reliability_sums(p[:cut], truth[:cut], bins)
                               + reliability_sums(p[cut:], truth[cut:], bins), whole, atol=1e-9)
    confidence, observed = calibration(whole)
    full = whole[:, 2] > 0
    assert whole[:, 2].sum() == len(p)
    np.testing.assert_array_equal(np.isnan(confidence), ~full)
    np.testing.assert_array_equal(np.isnan(observed), ~full)
    k = np.arange(bins)[full]
    assert ((confidence[full] > k / bins - 1e-9) & (confidence[full] < (k + 1) / bins + 1e-9)).all()


def test_calibration_refuses_what_is_no_probability():
    p, truth = np.full((2, 3), 0.5), np.zeros((2, 3), bool)
    for bad in ((p, truth.T, 10), (p, truth.astype(int), 10), (p, truth, 0)):
        with pytest.raises(ValueError, match="equal shapes"):
            reliability_sums(*bad)
    for value in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="outside"):
            reliability_sums(np.full((2, 3), value), truth)


# --- levels -----------------------------------------------------------------------------------------------------

def test_counts_at_every_level_by_hand():
    p = np.array([0.0, 0.3, 0.5, 0.99, 1.0])
    truth = np.array([False, True, False, True, True])
    assert level_counts(p, truth, steps=2).tolist() == [[3, 2, 0, 0], [2, 1, 1, 1], [1, 0, 2, 2]]


@given(arrays(np.float32, st.integers(0, 60), elements=st.floats(0, 1, width=32)), st.integers(0, 60),
       st.integers(0, 100))
def test_they_are_those_of_an_outline_at_that_level_and_add_up(p, cut, k):
    truth = np.arange(len(p)) % 3 == 0
    counts = level_counts(p, truth)
    assert counts.shape == (101, 4)
    assert counts[k].tolist() == confusion((p >= k / 100)[None], truth[None])[0].tolist()
    np.testing.assert_array_equal(level_counts(p[:cut], truth[:cut]) + level_counts(p[cut:], truth[cut:]), counts)


def test_levels_want_probabilities_and_a_mask():
    good = np.zeros(3), np.zeros(3, bool)
    for bad in ((good[0], np.zeros(4, bool)), (good[0], np.zeros(3)), (np.full(3, 1.1), good[1]),
                (np.full(3, np.nan), good[1])):
        with pytest.raises(ValueError, match=r"wanted are|outside"):
            level_counts(*bad)
    with pytest.raises(ValueError, match="at least one step"):
        level_counts(*good, steps=0)


def test_level_for_a_sensitivity():
    counts = np.array([[10, 90, 0, 0], [9, 30, 1, 60], [7, 10, 3, 80], [7, 9, 3, 81], [0, 0, 10, 90]])
    assert [at_sensitivity(counts, s) for s in (1.0, 0.95, 0.9, 0.7, 0.1)] == [0, 0, 1, 3, 3]
