"""Patches of 5 x 5 pixels: what runs densely equals a loop over patches."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from covidseg.patches import PATCH, admit_easiest, patch_lung, patch_mean, patch_values, to_pixels

SIDE = 8
SIZE = SIDE * PATCH


def cut(maps: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """One patch of ``(B, C, S, S)``, cut out with plain slicing."""
    return maps[:, :, row * PATCH:(row + 1) * PATCH, column * PATCH:(column + 1) * PATCH]


@pytest.fixture
def maps() -> torch.Tensor:
    return torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def test_patches_partition_the_slice() -> None:
    numbers = to_pixels(torch.arange(SIDE**2).float().reshape(1, 1, SIDE, SIDE), SIZE, smooth=False)
    values, counts = numbers.unique(return_counts=True)
    assert values.tolist() == list(range(SIDE**2))
    assert counts.tolist() == [PATCH**2] * SIDE**2
    for number in range(SIDE**2):
        assert (cut(numbers, *divmod(number, SIDE)) == number).all()


def test_mean_equals_a_loop_over_patches(maps: torch.Tensor) -> None:
    dense = patch_mean(maps)
    assert dense.shape == (2, 3, SIDE, SIDE)
    for r in range(SIDE):
        for c in range(SIDE):
            torch.testing.assert_close(dense[:, :, r, c], cut(maps, r, c).mean((2, 3)))


def test_values_equal_a_loop_over_patches(maps: torch.Tensor) -> None:
    dense = patch_values(maps)
    assert dense.shape == (2, 3 * PATCH**2, SIDE, SIDE)
    for r in range(SIDE):
        for c in range(SIDE):
            assert torch.equal(dense[:, :, r, c], cut(maps, r, c).flatten(1))


def test_a_classifier_on_all_patches_at_once_equals_one_patch_at_a_time(maps: torch.Tensor) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(3 * PATCH**2, 4, 1)
    dense = layer(patch_values(maps))
    alone = nn.Linear(3 * PATCH**2, 4)
    alone.load_state_dict({"weight": layer.weight[:, :, 0, 0], "bias": layer.bias})
    loop = torch.stack([torch.stack([alone(cut(maps, r, c).flatten(1)) for c in range(SIDE)], -1)
                        for r in range(SIDE)], -2)
    torch.testing.assert_close(dense, loop)


def test_a_side_that_is_no_multiple_of_the_patch_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiple"):
        patch_mean(torch.zeros(1, 1, SIZE, SIZE + 1))
    with pytest.raises(ValueError, match="no multiple"):
        patch_mean(torch.zeros(1, 1, SIZE + 1, SIZE))


def test_lung_patches_equal_a_loop() -> None:
    lungs = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1)) < 0.3
    found = patch_lung(lungs, share=0.3)
    assert found.dtype == torch.bool
    assert found.any()
    assert not found.all()
    for r in range(SIDE):
        for c in range(SIDE):
            assert torch.equal(found[:, 0, r, c], cut(lungs, r, c).sum((1, 2, 3)) >= 0.3 * PATCH**2)


def test_spreading_and_averaging_again_changes_nothing(maps: torch.Tensor) -> None:
    torch.testing.assert_close(patch_mean(to_pixels(patch_mean(maps), SIZE, smooth=False)), patch_mean(maps))


def test_smooth_spreading_stays_in_range_and_has_small_steps(maps: torch.Tensor) -> None:
    values = patch_mean(maps)
    smooth, hard = to_pixels(values, SIZE), to_pixels(values, SIZE, smooth=False)
    assert smooth.shape == hard.shape == maps.shape
    assert smooth.min() >= values.min()
    assert smooth.max() <= values.max()
    assert smooth.diff(dim=3).abs().max() < 0.5 * hard.diff(dim=3).abs().max()
    torch.testing.assert_close(to_pixels(torch.full((1, 1, SIDE, SIDE), 0.3), SIZE), torch.full((1, 1, SIZE, SIZE), .3))
    # The centre pixel of a patch has the patch's own value.
    torch.testing.assert_close(smooth[..., 2::PATCH, 2::PATCH], values)


DIFFICULTY = torch.tensor([[0.9, 0.1, 0.5], [0.3, 0.0, 0.7]])
CANDIDATES = torch.tensor([[True, True, True], [True, False, False]])


def test_the_easiest_half_is_admitted() -> None:
    assert admit_easiest(DIFFICULTY, CANDIDATES, 0.5).tolist() == [[False, True, False], [True, False, False]]


def test_pace_0_admits_nothing_and_pace_1_all_candidates() -> None:
    assert not admit_easiest(DIFFICULTY, CANDIDATES, 0).any()
    assert torch.equal(admit_easiest(DIFFICULTY, CANDIDATES, 1), CANDIDATES)


def test_no_candidates_no_admission() -> None:
    assert not admit_easiest(DIFFICULTY, torch.zeros_like(CANDIDATES), 1).any()


def test_a_small_pace_admits_at_least_one() -> None:
    assert admit_easiest(DIFFICULTY, CANDIDATES, 0.01).sum() == 1


def test_equally_difficult_patches_are_admitted_together() -> None:
    admitted = admit_easiest(torch.tensor([0.2, 0.2, 0.2, 0.8]), torch.tensor([True] * 4), 0.25)
    assert admitted.tolist() == [True, True, True, False]


@pytest.mark.parametrize("pace", [0.0, 0.1, 0.37, 0.5, 0.9, 1.0])
def test_admission_follows_the_order_and_never_leaves_the_candidates(pace: float) -> None:
    source = torch.Generator().manual_seed(2)
    difficulty = torch.rand(4, 9, 9, generator=source)
    candidates = torch.rand(4, 9, 9, generator=source) < 0.6
    admitted = admit_easiest(difficulty, candidates, pace)
    assert not (admitted & ~candidates).any()
    assert admitted.sum() == round(pace * int(candidates.sum()))
    if 0 < pace < 1:
        assert difficulty[admitted].max() < difficulty[candidates & ~admitted].min()
