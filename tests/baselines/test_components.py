"""3DCC: windows in which a mask is in pieces, the largest component, and the choice of an activated part by it."""

from __future__ import annotations

import numpy as np
import pytest

from covidseg.baselines.components import ComponentSettings, best_component, broken_windows, component_activation
from covidseg.preprocess import Crops

# A window of 6 x 6 with three islands: three columns, 18 of 36.
ISLANDS = np.zeros((6, 6), bool)
ISLANDS[:, [0, 2, 4]] = True


def tile(pattern: np.ndarray) -> np.ndarray:
    return broken_windows(pattern[None])[0]


def test_a_window_in_three_pieces_and_half_full_counts() -> None:
    assert tile(ISLANDS).all()


def test_solid_empty_and_halved_windows_do_not_count() -> None:
    half = np.zeros((6, 6), bool)
    half[:3] = True
    for pattern in (np.ones((6, 6), bool), np.zeros((6, 6), bool), half):
        assert not tile(pattern).any()


def test_two_islands_are_too_few_and_diagonal_ones_are_one() -> None:
    two = np.zeros((6, 6), bool)
    two[:, [0, 1, 4]] = True
    assert not tile(two).any()
    chess = np.indices((6, 6)).sum(axis=0) % 2 == 0
    assert not tile(chess).any(), "half full, but its fields hang together by their corners"


@pytest.mark.parametrize(("full", "counts"), [(9, False), (10, False), (11, True), (18, True)])
def test_fullness_is_bounded_by_the_deviation(full: int, counts: bool) -> None:
    # Deviation sqrt(p (1 - p)) within .05 of one half: p from .282 to .718, that is 11 to 25 of 36.
    pattern = ISLANDS.copy()
    rows, columns = np.nonzero(pattern)
    drop = np.argsort(-rows, kind="stable")[:18 - full]
    pattern[rows[drop], columns[drop]] = False
    assert pattern.sum() == full
    assert tile(pattern).any() == counts


def test_windows_tile_from_the_corner_and_the_rest_is_left() -> None:
    mask = np.zeros((1, 20, 20), bool)
    mask[0, 6:12, 12:18] = ISLANDS
    mask[0, 13:19, 1:7] = ISLANDS  # across tiles
    found = broken_windows(mask)[0]
    assert found[6:12, 12:18].all()
    assert found[:6].sum() == found[18:].sum() == found[:, 18:].sum() == 0


def volume(slices: int = 20) -> Crops:
    """Dark lung with a broken field in slices 5 to 9, and larger ones below 10 % and above 80 % of the height."""
    images = np.full((slices, 48, 48), 0.1, np.float32)
    bright = np.tile(~ISLANDS, (3, 3)) * 0.8
    images[5:10, 6:24, 6:24] = np.maximum(images[5:10, 6:24, 6:24], bright)
    images[7, 30:36, 30:36] = np.maximum(0.1, ~ISLANDS * 0.8)
    images[1, :36, :36] = np.tile(np.maximum(0.1, ~ISLANDS * 0.8), (6, 6))
    images[17:, :36, :36] = np.tile(np.maximum(0.1, ~ISLANDS * 0.8), (6, 6))
    lungs = np.ones(images.shape, bool)
    lungs[:, :, 20:22] = False
    return Crops(images, lungs, np.tile([0, 0, 48, 48], (slices, 1)))


def test_the_largest_component_of_a_volume_within_its_height() -> None:
    crops = volume()
    found = component_activation(crops)
    assert found.dtype == np.float32
    assert set(np.unique(found)) == {0.0, 1.0}
    assert (found[~crops.lungs] == 0).all()
    assert np.flatnonzero(found.any(axis=(1, 2))).tolist() == [5, 6, 7, 8, 9]
    assert found[7, 30:36, 30:36].sum() == 0, "the smaller component"
    assert found[5:10, 6:24, 6:18].all()
    whole = component_activation(crops, ComponentSettings(low=0, high=1))
    assert np.flatnonzero(whole.any(axis=(1, 2))).tolist() == [17, 18, 19]


def test_unrelated_slices_each_have_a_component_of_their_own() -> None:
    found = component_activation(volume(), joint=False)
    assert np.flatnonzero(found.any(axis=(1, 2))).tolist() == [1, 5, 6, 7, 8, 9, 17, 18, 19]


def test_what_is_not_aerated_is_no_mask() -> None:
    crops = volume()
    assert component_activation(crops, ComponentSettings(aerated=0.05)).sum() == 0
    assert component_activation(crops, ComponentSettings(aerated=0.9)).sum() == 0
    empty = Crops(crops.images[:0], crops.lungs[:0], crops.boxes[:0])
    assert component_activation(empty).shape == (0, 48, 48)


def parts() -> tuple[np.ndarray, np.ndarray]:
    activated = np.zeros((3, 20, 20), bool)
    activated[0, :10, :10] = True                      # 100 voxels
    activated[1:, 12:18, 12:18] = True                 # 72 voxels over two slices
    guide = np.zeros_like(activated)
    guide[0, 9, 9] = guide[1, 12:15, 12:15] = True
    return activated, guide


def test_the_component_that_shares_most_with_3dcc_is_kept_whole() -> None:
    activated, guide = parts()
    kept = best_component(activated, guide)
    assert kept[1:, 12:18, 12:18].all()
    assert kept.sum() == 72
    assert best_component(activated, guide, joint=False).sum() == 100 + 72, "one of each slice"


def test_only_the_largest_compete_and_without_overlap_the_largest_wins() -> None:
    activated, guide = parts()
    assert best_component(activated, guide, ComponentSettings(largest=1)).sum() == 100
    kept = best_component(activated, np.zeros_like(guide))
    assert kept.sum() == 100
    assert kept[0, :10, :10].all()
    assert not best_component(np.zeros_like(activated), guide).any()
