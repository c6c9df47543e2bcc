"""Maps of patch numbers, and that what runs on all patches at once equals a loop over patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage as ndi

from covidseg.patches import PATCH, grid_ids, instances, patch_values, pool, spread, square_ids

SIDE = 40


def random_lungs(count: int = 3, seed: int = 0, side: int = SIDE) -> np.ndarray:
    """Blobs and single pixels, so that there are full, partly filled and empty squares."""
    rng = np.random.default_rng(seed)
    lungs = rng.random((count, side, side)) < 0.1
    for lung in lungs:
        for y, x in rng.integers(0, side - 8, (4, 2)):
            lung[y:y + rng.integers(4, 14), x:x + rng.integers(4, 14)] = True
    return lungs


def cells_of(ids: np.ndarray) -> list[set[int]]:
    """The patches of one slice as sets of pixels."""
    return [set(np.flatnonzero(ids == number)) for number in range(1, ids.max() + 1)]


def squares_by_hand(lung: np.ndarray, patch: int, share: float, offset: tuple[int, int]) -> list[set[int]]:
    """All squares with enough lung, found one by one with plain slicing."""
    number = np.arange(lung.size).reshape(lung.shape)
    result = []
    for top in range(-offset[0], len(lung), patch):
        for left in range(-offset[1], lung.shape[1], patch):
            window = slice(max(top, 0), top + patch), slice(max(left, 0), left + patch)
            inside = lung[window]
            if inside.any() and inside.sum() >= share * inside.size:
                result.append(set(number[window].ravel()))
    return result


@pytest.mark.parametrize(("patch", "share", "offset"), [
    (PATCH, 0.3, (0, 0)), (PATCH, 0.3, (2, 0)), (PATCH, 0.3, (0, 3)), (PATCH, 0.9, (2, 2)), (PATCH, 0.0, (1, 4)),
    (8, 0.3, (0, 0)), (7, 0.5, (3, 5))])
def test_squares_are_those_with_enough_lung(patch: int, share: float, offset: tuple[int, int]) -> None:
    lungs = random_lungs()
    ids = square_ids(lungs, patch, share, offset)
    assert ids.shape == lungs.shape
    assert ids.dtype == np.int32
    for one, lung in zip(ids, lungs, strict=True):
        assert cells_of(one) == squares_by_hand(lung, patch, share, offset)
    assert len({one.max() for one in ids}) > 1, "each slice has a number of its own"


@pytest.mark.parametrize("shape", [(20, 35), (35, 20), (23, 4), (4, 23)])
def test_slices_need_not_be_square(shape: tuple[int, int]) -> None:
    lungs = np.random.default_rng(0).random((2, *shape)) < 0.5
    ids = square_ids(lungs)
    for one, lung in zip(ids, lungs, strict=True):
        assert cells_of(one) == squares_by_hand(lung, PATCH, 0.3, (0, 0))
    values = np.random.default_rng(1).random((2, ids.max() + 1))
    maps = spread(values, ids)
    assert maps.shape == ids.shape
    assert (maps[1][ids[1] == 2] == values[1, 2]).all()


def test_a_square_with_exactly_the_share_is_a_patch() -> None:
    lungs = np.zeros((1, 10, 10), bool)
    lungs[0, 0, :5] = True
    lungs[0, 5:7, 5:] = True  # 5 and 10 of 25 pixels
    assert len(cells_of(square_ids(lungs, share=0.4)[0])) == 1
    assert len(cells_of(square_ids(lungs, share=0.2)[0])) == 2
    assert not square_ids(lungs, share=0.41).any()


@given(st.integers(0, 10**6), st.booleans())
def test_numbers_run_from_1_without_gaps(seed: int, grid: bool) -> None:
    lungs = random_lungs(2, seed)
    coarse = random_lungs(2, seed + 1) & lungs
    ids = grid_ids(lungs, coarse) if grid else square_ids(lungs)
    for one, lung in zip(ids, lungs, strict=True):
        assert np.array_equal(np.unique(one[one > 0]), np.arange(1, one.max() + 1))
        for number in range(1, one.max() + 1):
            assert lung[one == number].mean() >= 0.3


def faults_of_patches(ids: np.ndarray, lung: np.ndarray, least: float, reach: tuple[int, int]) -> list[str]:
    """What keeps the patches of one slice from dividing up its lung.

    Args:
        ids: ``(S, S)`` patch numbers.
        least: share of lung that each patch has to have.
        reach: rows and columns that a patch may extend over.
    """
    found = ["lung in no patch"] if (lung & (ids == 0)).any() else []
    for number in range(1, int(ids.max()) + 1):
        rows, columns = np.nonzero(ids == number)
        if not len(rows):
            found.append(f"patch {number} has no pixel")
            continue
        share = lung[ids == number].mean()
        if share == 0 or share < least:
            found.append(f"patch {number} lies outside")
        if np.ptp(rows) >= reach[0] or np.ptp(columns) >= reach[1]:
            found.append(f"patch {number} is too large")
    return found


ANY_LUNG = arrays(bool, st.tuples(st.integers(1, 17), st.integers(1, 17)))  # noise has every kind of square


@given(ANY_LUNG, st.integers(1, 7), st.integers(0, 6), st.integers(0, 6))
def test_squares_divide_up_any_lung(lung: np.ndarray, patch: int, down: int, right: int) -> None:
    ids = square_ids(lung[None], patch, 0.0, (down % patch, right % patch))[0]
    assert faults_of_patches(ids, lung, 0.0, (patch, patch)) == []
    # With a share, whole patches drop out, and exactly those that have less lung.
    fewer = square_ids(lung[None], patch, 0.5, (down % patch, right % patch))[0]
    for number in range(1, int(ids.max()) + 1):
        inside = ids == number
        kept = lung[inside].mean() >= 0.5
        assert len(np.unique(fewer[inside])) == 1
        assert (fewer[inside] > 0).all() == kept
    assert not (fewer[ids == 0] > 0).any()


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 1))
def test_grids_divide_up_any_lung(seed: int, grid: int, share: float) -> None:
    lungs, coarse = random_lungs(1, seed), random_lungs(1, seed + 1)
    assert faults_of_patches(grid_ids(lungs, coarse, grid, share=0.0)[0], lungs[0], 0.0, (SIDE, SIDE)) == []
    ids = grid_ids(lungs, coarse, grid, share=share)[0]
    kept = lungs[0] & (ids > 0)  # of the rest, every patch has too little lung
    boxes = ndi.find_objects(ndi.label(coarse[0])[0])
    cells = [-(-(part.stop - part.start) // grid) for box in boxes for part in box]
    assert faults_of_patches(ids, kept, share, (max([PATCH, *cells]),) * 2) == []


def test_check_of_patches_fires() -> None:
    lung = random_lungs(1)[0]
    ids = square_ids(lung[None], PATCH, 0.0)[0]
    assert faults_of_patches(ids, lung, 0.0, (PATCH, PATCH)) == []
    gap, outside, joined = ids.copy(), ids.copy(), ids.copy()
    gap[tuple(np.argwhere(lung)[0])] = 0
    outside[:PATCH, :PATCH] = outside.max() + 1
    joined[ids == 2] = 1
    assert "lung in no patch" in faults_of_patches(gap, lung, 0.0, (PATCH, PATCH))
    nothing_there = lung.copy()
    nothing_there[:PATCH, :PATCH] = False
    assert any("outside" in fault for fault in faults_of_patches(outside, nothing_there, 0.0, (PATCH, PATCH)))
    assert set(faults_of_patches(joined, lung, 0.0, (PATCH, PATCH))) >= {"patch 1 is too large", "patch 2 has no pixel"}


@given(st.integers(0, 10**6), st.booleans())
def test_pooling_and_spreading_undo_each_other(seed: int, grid: bool) -> None:
    lungs = random_lungs(2, seed)
    ids = grid_ids(lungs, random_lungs(2, seed + 1)) if grid else square_ids(lungs)
    maps = np.random.default_rng(seed).random(ids.shape).astype(np.float32)
    means, there = patch_values(maps, ids), instances(ids)
    flat = spread(means, ids)
    np.testing.assert_allclose(patch_values(flat, ids)[there], means[there], rtol=1e-5)  # a mean of equals is the same
    np.testing.assert_allclose(spread(patch_values(flat, ids), ids)[ids > 0], flat[ids > 0], rtol=1e-5)
    for one, values, numbers in zip(maps, flat, ids, strict=True):  # no value is lost on the way
        assert values[numbers > 0].sum() == pytest.approx(one[numbers > 0].sum(), rel=1e-4)


def test_no_lung_no_patches() -> None:
    lungs = random_lungs(2)
    lungs[1] = False
    assert not square_ids(lungs)[1].any()
    assert not grid_ids(lungs, lungs)[1].any()
    for ids in (square_ids(lungs[:0]), grid_ids(lungs[:0], lungs[:0])):
        assert ids.shape == (0, SIDE, SIDE)


def boxed(*boxes: tuple[int, int, int, int]) -> np.ndarray:
    """One slice with filled boxes ``(top, left, height, width)``."""
    result = np.zeros((1, SIDE, SIDE), bool)
    for top, left, height, width in boxes:
        result[0, top:top + height, left:left + width] = True
    return result


@pytest.mark.parametrize(("height", "width"), [(10, 10), (20, 15), (13, 17)])
def test_a_grid_of_5_by_5_cells_lies_over_the_component(height: int, width: int) -> None:
    lungs, coarse = np.ones((1, SIDE, SIDE), bool), boxed((7, 11, height, width))
    ids = grid_ids(lungs, coarse)[0]
    inside = ids[7:7 + height, 11:11 + width]
    numbers, counts = np.unique(inside, return_counts=True)
    assert len(numbers) == 25
    assert counts.sum() == height * width
    assert (np.diff(np.unique(inside[:, 0], return_index=True)[1]) >= height // 5).all()
    for number in numbers:  # each cell is a full rectangle of about a fifth of the box, and lies inside it
        rows, columns = np.nonzero(ids == number)
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert len(rows) == tall * wide
        assert abs(tall - height / 5) < 1
        assert abs(wide - width / 5) < 1
        assert not (coarse[0][ids == number] == 0).any()


def test_the_rest_of_the_lung_keeps_its_squares() -> None:
    lungs, coarse = np.ones((1, SIDE, SIDE), bool), boxed((10, 10, 20, 20))
    grid, squares = grid_ids(lungs, coarse)[0], square_ids(lungs)[0]
    assert grid.max() == 64 - 16 + 25
    away = ~coarse[0]
    assert [cell for cell in cells_of(grid) if away.ravel()[list(cell)].all()] == \
        [cell for cell in cells_of(squares) if away.ravel()[list(cell)].all()]


def test_every_component_has_its_own_grid_and_tiny_ones_keep_squares() -> None:
    lungs = np.ones((1, SIDE, SIDE), bool)
    two = grid_ids(lungs, boxed((0, 0, 15, 15), (20, 20, 15, 15)))[0]
    assert len(np.unique(two[:15, :15])) == len(np.unique(two[20:35, 20:35])) == 25
    assert not set(np.unique(two[:15, :15])) & set(np.unique(two[20:35, 20:35]))
    for tiny in (boxed((3, 3, 9, 20)), boxed((3, 3, 20, 9)), boxed((8, 8, 1, 1)), boxed()):
        assert np.array_equal(grid_ids(lungs, tiny), square_ids(lungs))
    assert not np.array_equal(grid_ids(lungs, boxed((3, 3, 10, 20))), square_ids(lungs))
    coarser = grid_ids(lungs, boxed((0, 0, 20, 20)), grid=2)[0]
    assert len(np.unique(coarser[:20, :20])) == 4


def test_cells_outside_the_lung_are_no_patches() -> None:
    """The box of an oblique component holds pixels beyond the lung."""
    lungs = np.broadcast_to(np.tril(np.ones((SIDE, SIDE), bool)), (1, SIDE, SIDE))
    ids = grid_ids(lungs, lungs)[0]
    # 5 x 5 cells of 8 pixels: those above the diagonal go, those on it hold 36 of 64 pixels of lung.
    assert ids.max() == 15
    assert (ids[np.triu_indices(SIDE, 8)] == 0).all()
    assert (ids[lungs[0]] > 0).all()


def pooled_by_hand(maps: torch.Tensor, ids: torch.Tensor, count: int) -> torch.Tensor:
    batch, channels, height = maps.shape[:3]
    step = ids.shape[-1] // height
    result = torch.zeros(batch, count + 1, channels)
    for b in range(batch):
        for number in range(count + 1):
            values = [maps[b, :, y, x] for y in range(height) for x in range(height)
                      if ids[b, y * step, x * step] == number]
            if values:
                result[b, number] = torch.stack(values).mean(0)
    return result


@pytest.mark.parametrize("step", [1, 2, 4])
@pytest.mark.parametrize("reading", ["squares", "grid"])
def test_pooling_equals_a_plain_loop(step: int, reading: str) -> None:
    lungs = random_lungs(2, seed=1, side=20)
    found = square_ids(lungs) if reading == "squares" else grid_ids(lungs, lungs)
    ids, count = torch.from_numpy(found.astype(np.int64)), int(found.max()) + 2
    maps = torch.rand(2, 3, 20 // step, 20 // step, generator=torch.Generator().manual_seed(0), requires_grad=True)
    means = pool(maps, ids, count)
    expected = pooled_by_hand(maps, ids, count)
    assert means.shape == (2, count + 1, 3)
    torch.testing.assert_close(means, expected)
    assert (means[:, -2:] == 0).all(), "patches without a pixel"
    weigh = torch.rand(means.shape, generator=torch.Generator().manual_seed(1))
    slopes, = torch.autograd.grad((weigh * means).sum(), maps)
    by_hand, = torch.autograd.grad((weigh * expected).sum(), maps)
    torch.testing.assert_close(slopes, by_hand)


def test_maps_need_not_be_square() -> None:
    ids = torch.arange(8).repeat_interleave(2)[None].repeat(24, 1)[None] + 1               # (1, 24, 16): 8 stripes
    for step in (1, 2):
        maps = torch.rand(1, 3, 24 // step, 16 // step, generator=torch.Generator().manual_seed(0))
        stripes = maps.reshape(1, 3, 24 // step, 8, 2 // step).mean(dim=(2, 4))
        torch.testing.assert_close(pool(maps, ids, 8)[:, 1:], stripes.permute(0, 2, 1))


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


def test_pooling_does_not_care_how_patches_are_numbered() -> None:
    found = square_ids(random_lungs(2))
    count = int(found.max())
    maps = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    order = torch.cat([torch.zeros(1, dtype=torch.int64),
                       1 + torch.randperm(count, generator=torch.Generator().manual_seed(2))])
    ids = torch.from_numpy(found.astype(np.int64))
    torch.testing.assert_close(pool(maps, order[ids], count)[:, order], pool(maps, ids, count))
    assert not torch.equal(pool(maps, order[ids], count), pool(maps, ids, count))


def test_numpy_values_equal_the_pool_whatever_the_batch() -> None:
    ids, maps = square_ids(random_lungs(5)), np.random.default_rng(0).random((5, SIDE, SIDE))
    values = patch_values(maps, ids)
    assert values.dtype == np.float32
    assert values.shape == (5, ids.max() + 1)
    for number in range(1, int(ids[3].max()) + 1):
        assert values[3, number] == pytest.approx(maps[3][ids[3] == number].mean(), rel=1e-5)
    np.testing.assert_allclose(patch_values(maps, ids, batch=2), values, atol=1e-6)
    more = patch_values(maps, ids, int(ids.max()) + 3)
    assert np.array_equal(more[:, :-3], values)
    assert (more[:, -3:] == 0).all()


def test_spreading_undoes_the_mean_where_patches_are_constant() -> None:
    ids = grid_ids(random_lungs(3), random_lungs(3))
    values = np.random.default_rng(0).random((3, ids.max() + 1)).astype(np.float32)
    maps = spread(values, ids)
    assert maps.shape == ids.shape
    there = instances(ids)
    np.testing.assert_allclose(patch_values(maps, ids)[there], values[there], rtol=1e-5)
    for k, number in ((0, 1), (1, 3), (2, int(ids[2].max()))):
        assert (maps[k][ids[k] == number] == values[k, number]).all()


def test_instances_are_the_numbers_that_occur() -> None:
    ids = square_ids(random_lungs(4))
    ids[2] = 0
    found = instances(ids)
    assert found.shape == (4, ids.max() + 1)
    for k in range(4):
        assert np.flatnonzero(found[k]).tolist() == sorted(set(np.unique(ids[k])) - {0})


def test_no_slices() -> None:
    ids = np.zeros((0, SIDE, SIDE), np.int32)
    assert patch_values(np.zeros((0, SIDE, SIDE)), ids, 7).shape == (0, 8)
    assert patch_values(np.zeros((0, SIDE, SIDE)), ids).shape == (0, 1)
    assert instances(ids).shape == (0, 1)
    assert pool(torch.zeros(0, 3, SIDE, SIDE), torch.zeros(0, SIDE, SIDE, dtype=torch.int64), 7).shape == (0, 8, 3)
