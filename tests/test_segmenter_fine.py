"""Fine labels: two maps fused, and a random walker that finds the edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tiny import toy

from covidseg.segmenter import FineLabels, FineSettings, certainty, fine_labels, fuse, walk

EVEN = FineSettings(cam_share=0.5, cam_middle=0.5)
SETTINGS = FineSettings(seed_lesion=0.7, seed_lung=0.3, beta=130.0, smallest=12)


def random_maps(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).random((2, 9, 9))


def test_with_equal_shares_the_maps_change_places() -> None:
    a, b = random_maps(0), random_maps(1)
    np.testing.assert_allclose(fuse(a, b, EVEN), fuse(b, a, EVEN), atol=1e-6)
    np.testing.assert_allclose(fuse(1 - a, 1 - b, EVEN), 1 - fuse(a, b, EVEN), atol=1e-6)
    fused = fuse(a, b, EVEN)
    assert fused.dtype == np.float32
    assert (fused >= np.minimum(a, b).clip(0.02) - 1e-6).all()
    assert (fused <= np.maximum(a, b).clip(max=0.98) + 1e-6).all()


def test_each_map_alone_at_the_limits() -> None:
    a, b = random_maps(0).clip(0.05, 0.95), random_maps(1).clip(0.05, 0.95)
    np.testing.assert_allclose(fuse(a, b, replace(EVEN, cam_share=0.0)), b, atol=1e-6)
    np.testing.assert_allclose(fuse(a, b, replace(EVEN, cam_share=1.0)), a, atol=1e-6)


def test_the_middle_of_the_activation_map_counts_as_one_half() -> None:
    settings = FineSettings(cam_share=1.0, cam_middle=0.3)
    values = fuse(np.array([0.2, 0.3, 0.4]), np.zeros(3), settings)
    assert values[0] < 0.5 < values[2]
    assert values[1] == pytest.approx(0.5)


def test_certainties_stay_finite() -> None:
    ends = fuse(np.array([0.0, 1.0, 0.0, 1.0]), np.array([0.0, 1.0, 1.0, 0.0]), EVEN)
    assert 0 < ends[0] < 0.05
    assert 0.95 < ends[1] < 1
    assert ends[2:] == pytest.approx([0.5, 0.5])


SIDE = 60
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
DISK = (ROWS - 30) ** 2 + (COLUMNS - 30) ** 2 <= 12**2
LUNG = (ROWS - 30) ** 2 + (COLUMNS - 30) ** 2 <= 27**2


def scene(offset: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A bright disk with noise, and a blurred probability whose centre is ``offset`` pixels off."""
    image = np.where(DISK, 0.7, 0.2) + np.random.default_rng(0).normal(0, 0.03, DISK.shape)
    distance = np.hypot(ROWS - 30, COLUMNS - 30 - offset)
    return image.astype(np.float32), (1 / (1 + np.exp((distance - 12) / 4))).astype(np.float32)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return 2 * (a & b).sum() / (a.sum() + b.sum())


def test_the_walker_moves_a_shifted_map_to_the_edge() -> None:
    image, probability = scene()
    found = walk(image, probability * LUNG, LUNG, SETTINGS)
    before = dice(probability * LUNG > 0.5, DISK)
    assert before < 0.87
    assert dice(found, DISK) > 0.95


def test_without_contrast_the_map_decides() -> None:
    _, probability = scene()
    flat = np.random.default_rng(0).normal(0.2, 1e-3, DISK.shape).astype(np.float32)
    assert dice(walk(flat, probability * LUNG, LUNG, SETTINGS), probability * LUNG > 0.5) > 0.9


def test_the_walk_stays_in_the_lung() -> None:
    image, probability = scene(offset=10)
    cut = LUNG & (COLUMNS < 33)
    found = walk(image, probability, cut, SETTINGS)  # the map itself reaches far beyond the lung
    assert found.any()
    assert not (found & ~cut).any()


def test_no_seed_of_a_lesion_no_lesion() -> None:
    image, _ = scene()
    for level in (0.0, 0.5, SETTINGS.seed_lesion):
        assert not walk(image, np.full(image.shape, level, np.float32), LUNG, SETTINGS).any()
    outside = np.where(LUNG, 0.1, 0.9).astype(np.float32)
    assert not walk(image, outside, LUNG, SETTINGS).any(), "seeds outside the lung are none"


def test_no_seed_of_the_lung_takes_the_map_at_one_half() -> None:
    image, _ = scene()
    probability = np.where(COLUMNS < 30, 0.9, 0.4).astype(np.float32)
    assert np.array_equal(walk(image, probability, LUNG, SETTINGS), LUNG & (COLUMNS < 30))


def test_a_lung_that_no_seed_reaches_stays_free() -> None:
    image, _ = scene()
    two = (COLUMNS < 25) | (COLUMNS > 35)
    probability = np.where(COLUMNS < 12, 0.9, 0.1).astype(np.float32)
    probability[:, 36:] = 0.5                     # undecided throughout the other lung
    found = walk(image, probability, two, SETTINGS)
    assert found[:, :12].any()
    assert not found[:, 35:].any()


def test_specks_are_dropped() -> None:
    image = np.full((SIDE, SIDE), 0.2, np.float32)
    probability = np.full((SIDE, SIDE), 0.1, np.float32)
    for part, side in ((np.s_[10:13, 10:13], 3), (np.s_[30:36, 30:36], 6)):
        image[part], probability[part] = 0.8, 0.9
        assert walk(image, probability, LUNG | True, replace(SETTINGS, smallest=1))[part].sum() == side**2
    found = walk(image, probability, LUNG | True, replace(SETTINGS, smallest=10))
    assert not found[10:13, 10:13].any()
    assert found[30:36, 30:36].all()
    assert walk(image, probability, LUNG | True, replace(SETTINGS, smallest=9))[10:13, 10:13].all()


def test_fine_labels_of_a_set() -> None:
    data, disks = toy(6)
    maps = np.where(disks, 0.9, 0.1).astype(np.float32)
    maps[0, 15:25, 15:25] = 0.95  # slice 0 has no lesion, whatever the maps say
    fine = fine_labels(data, maps, maps, SETTINGS)
    for k in (0, 2, 4):
        assert not fine.labels[k].any()
        assert (fine.probabilities[k] == 0).all()
        assert (fine.targets[k] == 0).all()
        assert (fine.weights[k] == 1).all()
    for k in (1, 3, 5):
        assert dice(fine.labels[k], disks[k]) > 0.95
        lung = data.crops.lungs[k]
        assert (fine.weights[k][~lung] == 1).all()
        np.testing.assert_array_equal(fine.probabilities[k], fuse(maps[k], maps[k], SETTINGS) * lung)
        assert fine.targets[k][disks[k]].mean() > 0.9 > 0.2 > fine.targets[k][lung & ~disks[k]].mean()
    assert fine.labels.dtype == bool
    assert fine.probabilities.dtype == np.float32
    assert (fine.probabilities[~data.crops.lungs] == 0).all()
    assert 0.5 <= fine.weights.min() < fine.weights.max() <= 1


def test_targets_and_weights_by_hand() -> None:
    """Walker and map agree, disagree by half, or flatly contradict each other."""
    fine = FineLabels(np.array([[[True, True, True, False, False, False]]]),
                      np.array([[[1.0, 0.5, 0.0, 0.0, 0.5, 1.0]]], np.float32))
    np.testing.assert_allclose(fine.targets, [[[1, 0.75, 0.5, 0, 0.25, 0.5]]])
    np.testing.assert_allclose(fine.weights, [[[1, 0.75, 0.5, 1, 0.75, 0.5]]])
    assert fine.targets.dtype == fine.weights.dtype == np.float32


def test_certainty_falls_to_one_half_in_doubt_and_no_lower() -> None:
    targets = np.linspace(0, 1, 21).reshape(3, 7)
    found = certainty(targets)
    assert found.shape == targets.shape
    assert found.dtype == np.float32
    assert (found[0, 0], found[-1, -1], found[1, 3]) == (1, 1, 0.5)
    np.testing.assert_allclose(found, certainty(1 - targets), atol=1e-6)
    assert (np.diff(found.ravel()[:11]) < 0).all()
    assert found.min() == 0.5
