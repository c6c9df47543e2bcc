"""Binary morphology against plain and slow ways to say the same, with masks that reach the edge of the slice."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import ndimage as ndi
from skimage import morphology as plain

from covidseg.lungs import closing, dilate, erode, fill_holes, opening, sizes

RADII = (0, 1, 2, 3, 4, 6, 14)


def masks() -> Iterator[np.ndarray]:
    """Blobs and specks of many sizes, in slices of all shapes."""
    rng = np.random.default_rng(0)
    for _ in range(60):
        shape = rng.integers(16, 60, 2)
        noise = ndi.gaussian_filter(rng.normal(size=shape), rng.uniform(0, 3))
        yield noise > rng.normal() * noise.std()
    for shape in ((16, 40), (40, 16)):
        yield np.zeros(shape, bool)
        yield np.ones(shape, bool)


@pytest.mark.parametrize("radius", RADII)
def test_disks_are_those_of_scikit_image(radius: int) -> None:
    disk, seen = plain.disk(radius), 0
    for mask in masks():
        assert np.array_equal(opening(mask, radius), plain.opening(mask, disk))
        assert np.array_equal(dilate(mask, radius), plain.dilation(mask, disk))
        assert np.array_equal(erode(mask, radius), plain.erosion(mask, disk))
        wide = np.pad(mask, 2 * radius)
        inner = tuple(slice(2 * radius, 2 * radius + n) for n in mask.shape)
        assert np.array_equal(closing(mask, radius), plain.closing(wide, disk)[inner])
        seen += bool(mask[0].any() and mask[:, -1].any())
    assert seen > 10, "many of the masks reach the edge"


@pytest.mark.parametrize("radius", RADII)
def test_disks_are_balls_of_the_distance_transform(radius: int) -> None:
    for mask in masks():
        if mask.any():
            assert np.array_equal(dilate(mask, radius), ndi.distance_transform_edt(~mask) <= radius)
        if not mask.all():
            assert np.array_equal(erode(mask, radius), ndi.distance_transform_edt(mask) > radius)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (3, 4)])
def test_disks_larger_than_the_slice(shape: tuple[int, int]) -> None:
    spot = np.zeros(shape, bool)
    spot[0, 0] = True
    assert dilate(spot, 14).all()
    assert erode(np.ones(shape, bool), 14).all()
    assert not erode(~spot, 14).any()
    assert np.array_equal(closing(spot, 14), spot)


def test_holes_are_filled_up_to_a_size() -> None:
    for mask in masks():
        assert np.array_equal(fill_holes(mask), ndi.binary_fill_holes(mask))
        holes, _ = ndi.label(ndi.binary_fill_holes(mask) & ~mask)
        for largest in (1, 5):
            small = [k for k, size in enumerate(sizes(holes)) if 0 < size <= largest]
            assert np.array_equal(fill_holes(mask, largest), mask | np.isin(holes, small))


def test_sizes_of_components() -> None:
    labels, _ = ndi.label(np.array([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]]))
    assert sizes(labels).tolist() == [0, 2, 3, 1]
    assert sizes(np.zeros((2, 2), int)).tolist() == [0]


def test_the_mask_that_is_given_stays_as_it_is() -> None:
    for mask in masks():
        before = mask.copy()
        for change in (dilate, erode, opening, closing):
            change(mask, 2)
        fill_holes(mask)
        assert np.array_equal(mask, before)
