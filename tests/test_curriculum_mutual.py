"""The exchange between the two tasks: what is taught, how agreement is measured, when it ends."""

from __future__ import annotations

import numpy as np
import pytest
from tiny import toy

from covidseg.curriculum import MutualSettings, Round, agreement, best_round, make_lesson, settled
from covidseg.errors import SettingsError
from covidseg.preprocess import Crops, WeakSet

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


def test_only_sure_and_undisputed_pixels_are_taught() -> None:
    settings = MutualSettings(sure=(0.1, 0.8), gap=0.5)
    #                sure lung, sure lesion, unsure, disputed lung, disputed lesion, unsure, outside the lung
    patches = maps([0.05, 0.9, 0.5, 0.05, 0.9, 0.15, 0.9])
    cam = maps([0.10, 0.7, 0.5, 0.60, 0.3, 0.15, 0.9])
    lesson = make_lesson(row([1], 7), cam, patches, settings, 2)
    assert lesson.taught[0, 0].tolist() == [True, True, False, False, False, False, False]
    assert np.array_equal(lesson.teacher, patches)
    assert lesson.teacher.dtype == np.float32


@pytest.mark.parametrize(("sure", "gap", "taught"), [
    ((0.1, 0.8), 0.5, [0, 2]), ((0.3, 0.8), 0.5, [0, 1, 2]), ((0.1, 0.95), 0.5, [0]), ((0.1, 0.8), 1.0, [0, 2, 3])])
def test_the_settings_decide_who_is_sure(sure: tuple[float, float], gap: float, taught: list[int]) -> None:
    patches, cam = maps([0.0, 0.2, 0.9, 0.9, 0.0]), maps([0.2, 0.2, 0.6, 0.1, 0.0])
    lesson = make_lesson(row([1], 5), cam, patches, MutualSettings(sure=sure, gap=gap), 2)
    assert np.flatnonzero(lesson.taught).tolist() == taught


def test_a_slice_without_a_lesion_is_taught_as_lung_throughout() -> None:
    data, _ = toy(6)
    noise = np.random.default_rng(0).random((2, 6, 40, 40)).astype(np.float32)
    lesson = make_lesson(data, *noise, MutualSettings(), 2)
    free = data.labels == 0
    assert np.array_equal(lesson.taught[free], data.crops.lungs[free])
    assert (lesson.teacher[free] == 0).all()
    assert (lesson.teacher[~free] > 0).any()
    assert not (lesson.taught & ~data.crops.lungs).any()
    assert lesson.taught[~free].sum() < data.crops.lungs[~free].sum()


def test_the_weight_of_the_lesson_is_ramped_up_and_then_stays() -> None:
    settings = MutualSettings(weights=(0.2, 0.5, 0.9))
    patches = maps([0.0, 1.0])
    found = [make_lesson(row([1], 2), patches, patches, settings, number).weight for number in range(2, 8)]
    assert found == [0.2, 0.5, 0.9, 0.9, 0.9, 0.9]


def test_maps_agree_fully_with_themselves_in_any_unit() -> None:
    data, disks = toy(8)
    patches = (0.8 * disks + 0.05).astype(np.float32)
    assert agreement(data, patches, patches) == pytest.approx(1)
    assert agreement(data, 0.2 * patches, patches) == pytest.approx(1)
    assert agreement(data, 0.2 * disks, 0.8 * disks) == pytest.approx(1)


def test_maps_that_never_meet_do_not_agree_at_all() -> None:
    data, disks = toy(8)
    away = data.crops.lungs & ~disks
    assert agreement(data, away.astype(np.float32), disks.astype(np.float32)) == 0
    nothing = np.zeros(disks.shape, np.float32)
    assert agreement(data, nothing, disks.astype(np.float32)) == 0
    assert agreement(data, nothing, nothing) == 0


def test_agreement_by_hand() -> None:
    # Sums 0.9 and 1.8: the first is doubled, then the smaller ones sum to 0.2 + 0.8 + 0.0 of 3.6.
    cam, patches = maps([0.1, 0.5, 0.3]), maps([1.0, 0.8, 0.0])
    assert agreement(row([1], 3), cam, patches) == pytest.approx(2 * 1.0 / 3.6)
    # Sums 1.2 and 2.4: the doubled 1.8 is clipped to 1, as the other map cannot be larger either.
    cam, patches = maps([0.9, 0.3, 0.0]), maps([1.0, 0.4, 1.0])
    assert agreement(row([1], 3), cam, patches) == pytest.approx(2 * 1.4 / (1.6 + 2.4))


def test_agreement_falls_as_maps_drift_apart_and_lies_between_0_and_1() -> None:
    data, disks = toy(8)
    found = [agreement(data, np.roll(disks, shift, axis=2).astype(np.float32), disks.astype(np.float32))
             for shift in (0, 2, 5, 9)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1)
    assert found[0] > found[1] > found[2] > found[3] >= 0


def test_only_slices_with_a_lesion_count_for_the_agreement() -> None:
    data, disks = toy(8)
    cam, patches = disks.astype(np.float32), np.roll(disks, 3, axis=1).astype(np.float32)
    expected = agreement(data, cam, patches)
    noisy = cam.copy()
    noisy[data.labels == 0] = np.random.default_rng(0).random(noisy[data.labels == 0].shape)
    assert agreement(data, noisy, patches) == expected
    noisy[data.labels == 1] *= np.random.default_rng(1).random(noisy[data.labels == 1].shape)
    assert agreement(data, noisy, patches) != expected


def rounds(*figures: float) -> list[Round]:
    return [Round(value, value - figures[k - 1] if k else NAN, 0.0) for k, value in enumerate(figures)]


@pytest.mark.parametrize(("settings", "figures", "over"), [
    (MutualSettings(rounds=3, stop=0.01), (0.5,), False),              # nothing to compare with yet
    (MutualSettings(rounds=3, stop=0.01), (0.5, 0.6), False),          # it still grows
    (MutualSettings(rounds=3, stop=0.01), (0.5, 0.505), True),         # hardly
    (MutualSettings(rounds=3, stop=0.01), (0.5, 0.495), True),
    (MutualSettings(rounds=3, stop=0.01), (0.5, 0.4), True),           # it falls: another round would make it worse
    (MutualSettings(rounds=4, stop=0.01), (0.5, 0.6, 0.4), True),
    (MutualSettings(rounds=4, stop=0.01), (0.5, 0.4, 0.6), False),     # only the last change counts
    (MutualSettings(rounds=3, stop=0.2), (0.5, 0.6), True),
    (MutualSettings(rounds=3, stop=0.0), (0.5, 0.5), False),           # with 0 it may stand still ...
    (MutualSettings(rounds=3, stop=0.0), (0.5, 0.49), True),           # ... but not fall
    (MutualSettings(rounds=3, stop=0.0), (0.5, 0.6, 0.8), True),       # the most rounds
    (MutualSettings(rounds=1), (0.5,), True),
    (MutualSettings(exchange="to_patches", rounds=3), (0.5,), True),   # nothing comes back: one round
    (MutualSettings(exchange="none", rounds=3), (0.5,), True)])
def test_when_the_rounds_are_over(settings: MutualSettings, figures: tuple[float, ...], over: bool) -> None:
    assert settled(rounds(*figures), settings) is over


@pytest.mark.parametrize(("figures", "best"), [
    ((0.5,), 1), ((0.5, 0.6), 2), ((0.6, 0.5), 1), ((0.5, 0.7, 0.6), 2), ((0.5, 0.6, 0.7), 3), ((0.1, 0.0, 0.0), 1),
    ((0.5, 0.5), 1), ((0.4, 0.6, 0.6), 2), ((0.0, 0.0, 0.0), 1)])
def test_the_best_round_is_the_earliest_of_those_that_agree_best(figures: tuple[float, ...], best: int) -> None:
    assert best_round(rounds(*figures)) == best


def test_the_best_round_is_judged_by_agreement_not_by_gain() -> None:
    assert best_round([Round(0.9, NAN, 0.0), Round(0.1, -0.8, 0.0), Round(0.6, 0.5, 0.9)]) == 1


@pytest.mark.parametrize(("change", "named"), [({"exchange": "sometimes"}, "to_patches"), ({"rounds": 0}, "1 or more"),
                                               ({"rounds": -2}, "1 or more")])
def test_bad_settings_are_refused(change: dict, named: str) -> None:
    with pytest.raises(SettingsError, match=named):
        MutualSettings(**change)
