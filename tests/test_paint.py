"""Painted lesions: inside the lung, exact, additive on air, reproducible, and only on lesion-free slices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from covidseg.paint import PaintSettings, paint_batch, paint_lesions

SIZE = 80


def lung() -> np.ndarray:
    rows, columns = np.indices((SIZE, SIZE))
    return np.hypot(rows - 40, (columns - 40) * 1.3) < 30


def painted(seed: int = 0, level: float = 0.0, **settings: object) -> tuple[np.ndarray, np.ndarray]:
    image = np.full((SIZE, SIZE), level, np.float32)
    return paint_lesions(image, lung(), PaintSettings(**settings), np.random.default_rng(seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_paint_stays_in_the_lung_and_is_where_the_mask_says(seed: int) -> None:
    picture, mask = painted(seed)
    assert mask.any()
    assert not (mask & ~lung()).any()
    assert (picture[~lung()] == 0).all()
    assert picture[mask].min() > 0.02, "every labelled pixel was brightened"
    assert picture[mask].mean() > 3 * picture[lung() & ~mask].mean()
    assert picture.max() <= 1


def test_vessels_keep_their_brightness() -> None:
    image = np.zeros((SIZE, SIZE), np.float32)
    image[38:42] = 1.0  # a vessel across the lung, as bright as tissue
    picture, mask = paint_lesions(image, lung(), PaintSettings(count=(5, 5)), np.random.default_rng(1))
    assert mask[38:42].any()
    assert np.array_equal(picture[38:42], image[38:42])


def test_consolidation_is_brighter_than_ground_glass() -> None:
    # One blob each: where blobs overlap they add up.
    haze = [np.percentile(p[m], 80) for p, m in (painted(s, solid_share=0.0, count=(1, 1)) for s in range(6))]
    solid = [np.percentile(p[m], 80) for p, m in (painted(s, solid_share=1.0, count=(1, 1)) for s in range(6))]
    assert max(haze) < 0.6
    assert np.mean(haze) + 0.2 < np.mean(solid)


def test_lesions_prefer_the_pleura() -> None:
    from scipy import ndimage

    depth = ndimage.distance_transform_edt(lung())
    small = {"count": (3, 3), "radius": (2.0, 4.0)}
    near = np.mean([depth[painted(s, pleura=50.0, **small)[1]].mean() for s in range(20)])
    anywhere = np.mean([depth[painted(s, pleura=0.0, **small)[1]].mean() for s in range(20)])
    assert near < 0.8 * anywhere


def batch() -> torch.Tensor:
    maps = torch.zeros(6, 4, SIZE, SIZE)
    maps[:, 1] = torch.from_numpy(lung()).float()
    maps[:, 3] = 1
    return maps


def test_only_lesion_free_slices_are_painted() -> None:
    maps, free = batch(), torch.tensor([True, False, True, False, True, False])
    result = paint_batch(maps, free, PaintSettings(share=1.0), torch.Generator().manual_seed(0))
    assert torch.equal(result[~free], maps[~free])
    assert (result[free][:, 2].flatten(1).sum(1) > 0).all()
    assert torch.equal(result[:, [1, 3]], maps[:, [1, 3]])
    assert maps.sum() == batch().sum(), "the batch that came in is not changed"


def test_share_zero_switches_painting_off() -> None:
    maps = batch()
    result = paint_batch(maps, torch.ones(6, dtype=torch.bool), PaintSettings(share=0), torch.Generator())
    assert torch.equal(result, maps)


def test_the_same_generator_paints_the_same() -> None:
    free = torch.ones(6, dtype=torch.bool)
    first, second, other = (paint_batch(batch(), free, PaintSettings(), torch.Generator().manual_seed(s))
                            for s in (4, 4, 5))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
