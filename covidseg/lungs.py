"""Lung masks by thresholding: stage 1 of the method, with no learning and no hand-drawn mask.

The abstract begins with "threshold segmentation" of the lungs, so that what surrounds them does not interfere
with the classifier. A plain threshold fails on exactly the patients that matter: consolidated lung is as bright
as the chest wall and drops out. The steps here keep most diseased lung in; what stays out is solid consolidation
that lies broadly against the chest wall without a hazy rim, which no threshold can tell from the wall:

1. Otsu's threshold finds the *body* (largest bright component, holes filled), which leaves out air around the
   patient, the table and burnt-in text.
2. Two brightness levels are measured inside it: ``air`` (10th percentile of the dark pixels) and ``tissue``
   (median of the bright ones). Everything below is relative to them, so Hounsfield units and 8-bit display
   windows are treated alike.
3. *Aerated lung* lies less than ``air_level`` of the way from air to tissue. Small components (trachea, bowel
   gas) are dropped; in a volume the two lungs are the largest components in three dimensions.
4. *Diseased lung* lies less than ``lesion_level`` of the way, is thicker than the blurred rim of every lung
   (an opening removes thin rings), and touches aerated lung.
5. Each side is closed and its holes (vessels, nodules) are filled. Where much of a side is diseased, the radius
   grows and the part of its convex hull near the chest wall is added: pleural lesions have the wall's brightness.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed
from skimage.transform import resize

from covidseg.morphology import bounding_box, closing, erode, fill_holes, opening, sizes


@dataclass(frozen=True)
class LungSettings:
    """Settings of the threshold lung mask; lengths are pixels of the working grid.

    Attributes:
        grid: longer side of the working grid in pixels; slices are averaged down to it.
        smooth: standard deviation of the Gaussian that removes noise before thresholding.
        air_level: upper end of aerated lung, as a fraction of the way from air to tissue (about -290 HU).
        lesion_level: upper end of diseased lung, likewise (about -60 HU).
        rim: an opening of this radius keeps the blurred rim of healthy lung from counting as disease.
        skin: depth below the body surface within which nothing is lung.
        close: closing radius of a healthy side.
        close_diseased: closing radius of a diseased side.
        diseased: share of a side of intermediate brightness from which it counts as diseased.
        hull_depth: hull pixels are added up to this percentile of the side's depth below the surface; 0 adds none.
        smallest: smallest component of a single slice, as a fraction of the body.
        smallest_3d: smallest component of a volume, as a fraction of the largest.
        largest_hole: larger holes (the dome of the liver, ringed by lung) are not filled.
    """

    grid: int = 256
    smooth: float = 0.8
    air_level: float = 0.62
    lesion_level: float = 0.855
    rim: int = 2
    skin: int = 4
    close: int = 6
    close_diseased: int = 14
    diseased: float = 0.06
    hull_depth: float = 50.0
    smallest: float = 0.004
    smallest_3d: float = 0.1
    largest_hole: int = 600


def lung_masks(pixels: np.ndarray, settings: LungSettings = LungSettings(),
               volume: bool | None = None) -> np.ndarray:
    """Threshold lung masks of all slices.

    Args:
        pixels: ``(S, H, W)`` upright slices, HU or display values of any window.
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured by :func:`is_volume`.

    Returns:
        ``(S, H, W)`` bool. A slice without lung is all False.
    """
    passes = LungPasses(settings, volume)
    for image in pixels:
        passes.look(image)
    masks = np.zeros(pixels.shape, dtype=bool)
    for k, mask in enumerate(masks):
        mask[:] = passes.mask(k)
    return masks


class LungPasses:
    """Lung masks of slices that come one after another, twice at most, and are never all held at once.

    What is lung in a volume depends on all of its slices. The first pass looks at each of them and keeps little of it:
    packed outlines, a few kilobytes a slice, and which components touch those of the slice before. After it, masks can
    be had in any order, without the slices.

    Args:
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured as by :func:`is_volume`.
    """

    def __init__(self, settings: LungSettings = LungSettings(), volume: bool | None = None) -> None:
        self.settings = settings
        self._volume, self._neighbours = volume, _Neighbours()
        self._shape: tuple[int, ...] = (0, 0)
        self._packed: list[bytes] = []
        self._areas: list[np.ndarray] = []   # of each slice: pixels of the components of its aerated lung, from 1 on
        self._bodies: list[int] = []         # of each slice: pixels of the body
        self._touching: list[np.ndarray] = []  # (2, T) components of the slice before and of this one that touch
        self._last: np.ndarray | None = None
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._packed)

    def look(self, image: np.ndarray) -> None:
        """First pass: the next slice, ``(H, W)``, in order and all of one shape."""
        if self._volume is None:
            self._neighbours.look(image)
        region = _regions(_to_grid(image, self.settings.grid), self.settings)
        labels, count = ndi.label(region.aerated)
        touch = np.zeros((0 if self._last is None else int(self._last.max()) + 1, count + 1), dtype=bool)
        if self._last is not None:
            touch[self._last, labels] = True
        self._shape, self._last, self._kept = image.shape, labels, None
        self._areas.append(sizes(labels))
        self._bodies.append(int(region.body.sum()))
        self._touching.append(np.argwhere(touch[1:, 1:]).T + 1)
        self._packed.append(region.packed())

    def mask(self, k: int) -> np.ndarray:
        """Second pass: the lung in slice ``k``, ``(H, W)`` bool; all False where there is none."""
        if self._kept is None:
            self._kept = self._in_3d() if self.is_volume() else self._in_each()
        if not self._kept[k].any():
            return np.zeros(self._shape, dtype=bool)
        region = _Regions.unpacked(self._packed[k], _grid_shape(self._shape, self.settings.grid))
        lung = _without_trachea(self._kept[k][ndi.label(region.aerated)[0]], region.body)
        return _enlarge(_complete(lung, region, self.settings), self._shape)

    def is_volume(self) -> bool:
        """Whether the slices seen so far are taken for one body in order."""
        return self._neighbours.alike() if self._volume is None else self._volume

    def _in_each(self) -> list[np.ndarray]:
        """Which components of each slice are large enough to be lung by themselves."""
        return [areas > self.settings.smallest * body for areas, body in zip(self._areas, self._bodies, strict=True)]

    def _in_3d(self) -> list[np.ndarray]:
        """Which components of each slice belong to the largest ones in three dimensions."""
        first = np.cumsum([0, *map(len, self._areas)])  # number of each slice's background among those of all slices
        pairs = np.concatenate([touch + first[[k - 1, k], None] for k, touch in enumerate(self._touching)], axis=1)
        areas = np.concatenate(self._areas)
        links = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(len(areas), len(areas)))
        body = connected_components(links, directed=False)[1]
        volumes = np.bincount(body, areas)
        kept = (volumes > self.settings.smallest_3d * volumes.max())[body] & (areas > 0)
        return np.split(kept, first[1:-1])


def is_volume(pixels: np.ndarray) -> bool:
    """Whether neighbouring slices of ``(S, H, W)`` look alike, as in a volume, or are unrelated pictures."""
    neighbours = _Neighbours()
    for image in pixels:
        neighbours.look(image)
    return neighbours.alike()


class _Neighbours:
    """How much each slice looks like the one before; constant slices, which look like nothing, are left out."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._likeness: list[float] = []

    def look(self, image: np.ndarray) -> None:
        small = _to_grid(image, 32).ravel()  # about 1024 numbers
        if small.std() > 0:
            if self._last is not None:
                self._likeness.append(np.corrcoef(self._last, small)[0, 1])
            self._last = small

    def alike(self) -> bool:
        return bool(self._likeness) and bool(np.median(self._likeness) > 0.9)


@dataclass(frozen=True)
class _Regions:
    """What thresholds find in one slice, all ``(h, w)`` bool on the working grid."""

    body: np.ndarray
    aerated: np.ndarray
    diseased: np.ndarray

    def packed(self) -> bytes:
        """One bit a pixel, compressed."""
        return zlib.compress(np.packbits([self.body, self.aerated, self.diseased]), 1)

    @classmethod
    def unpacked(cls, packed: bytes, shape: tuple[int, ...]) -> _Regions:
        bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=3 * shape[0] * shape[1])
        return cls(*bits.view(bool).reshape(3, *shape))


def _grid_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Shape of the working grid, whose longer side has ``side`` pixels at most."""
    scale = min(1.0, side / max(shape))
    return tuple(max(1, round(n * scale)) for n in shape)


def _to_grid(image: np.ndarray, side: int) -> np.ndarray:
    """Averages a slice down so that its longer side has ``side`` pixels; smaller slices stay as they are."""
    image = image.astype(np.float32)
    shape = _grid_shape(image.shape, side)
    if shape == image.shape:
        return image
    factor = image.shape[0] // side
    if image.shape == (factor * side, factor * side):  # the usual 512 -> 256: a plain block mean is fastest
        rows = sum(image[:, k::factor] for k in range(factor))
        return sum(rows[k::factor] for k in range(factor)) / np.float32(factor ** 2)
    return resize(image, shape, order=1, anti_aliasing=True, preserve_range=True).astype(np.float32)


def _enlarge(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From the working grid to a slice of ``shape``: bilinear, cut at one half, which keeps the outline smooth."""
    if shape == (2 * mask.shape[0], 2 * mask.shape[1]):  # here the nearest pixel has 9/16 of the weight and decides
        return mask.repeat(2, axis=0).repeat(2, axis=1)
    return resize(mask.astype(np.float32), shape, order=1) > 0.5


def _regions(image: np.ndarray, settings: LungSettings) -> _Regions:
    smooth = ndi.gaussian_filter(np.clip(image, -1100, None), settings.smooth)
    nothing = np.zeros(image.shape, dtype=bool)
    if smooth.min() == smooth.max():
        return _Regions(nothing, nothing, nothing)
    otsu = threshold_otsu(smooth)
    # The opening cuts what only touches the patient: table, tubes, text.
    bright, count = ndi.label(opening(smooth > otsu, 3))
    if count == 0:
        return _Regions(nothing, nothing, nothing)
    flesh = bright == np.argmax(sizes(bright))
    body = opening(fill_holes(closing(flesh, 4)), 6)
    dark = body & (smooth < otsu)
    if dark.sum() < 30:
        return _Regions(body, nothing, nothing)
    air, tissue = np.percentile(smooth[dark], 10), np.median(smooth[flesh])
    level = (smooth - air) / (tissue - air)  # 0 air, 1 soft tissue
    inside = erode(body, settings.skin)
    aerated = opening(inside & (level < settings.air_level), 1)
    diseased = opening(inside & (level < settings.lesion_level) & ~aerated, settings.rim)
    return _Regions(body, aerated, diseased)


def _without_trachea(aerated: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Drops the windpipe: a small, compact component near the midline while there is lung beside it."""
    labels, count = ndi.label(aerated)
    if count < 2:
        return aerated
    columns = np.flatnonzero(body.any(axis=0))
    middle, width = columns.mean(), np.ptp(columns)
    small = sizes(labels) < 0.012 * body.sum()
    windpipe = np.zeros(count + 1, dtype=bool)
    for part in regionprops(labels * small[labels]):
        central = abs(part.centroid[1] - middle) < 0.12 * width
        windpipe[part.label] = central and part.eccentricity < 0.85 and part.solidity > 0.88
    keep = aerated & ~windpipe[labels]
    return keep if keep.any() else aerated


def _complete(lung: np.ndarray, region: _Regions, settings: LungSettings) -> np.ndarray:
    """Adds what disease, vessels and the pleura hide to the aerated lung of one slice."""
    labels, count = ndi.label(lung | region.diseased)
    touching = np.zeros(count + 1, dtype=bool)
    touching[labels[lung]] = True
    depth = None
    result = np.zeros_like(lung)
    for box, side in _sides(touching[labels]):
        severe = (side & ~lung[box]).sum() > settings.diseased * side.sum()
        radius = settings.close_diseased if severe else settings.close
        filled = fill_holes(closing(side, radius), settings.largest_hole) & region.body[box]
        if severe and settings.hull_depth and filled.sum() > 50:
            if depth is None:
                depth = ndi.distance_transform_edt(region.body)
            shallow = depth[box] < np.percentile(depth[box][filled], settings.hull_depth)
            filled |= convex_hull_image(filled) & region.body[box] & shallow
        result[box] |= filled
    return result


def _sides(whole: np.ndarray) -> Iterator[tuple[tuple[slice, slice], np.ndarray]]:
    """Left and right lung apart, also where they touch in front of the heart; small pieces stay as they are.

    Yields:
        A box of rows and columns with one pixel around the side, as far as the slice goes, and the side inside it.
    """
    labels, count = ndi.label(whole)
    area, breadth = whole.sum(), whole.any(axis=0).sum()
    for k, found in enumerate(ndi.find_objects(labels), start=1):
        box = tuple(slice(max(0, part.start - 1), part.stop + 1) for part in found)
        piece = labels[box] == k
        columns = np.flatnonzero(piece.any(axis=0))
        if len(columns) <= max(80, 0.55 * breadth) or piece.sum() <= 0.5 * area:
            yield box, piece
            continue
        # One seed at the thickest place of each half; the watershed meets where the bridge is thinnest.
        distance = ndi.distance_transform_edt(piece)
        middle = (columns[0] + columns[-1]) // 2
        seeds = np.zeros(piece.shape, dtype=int)
        for seed, half in ((1, np.s_[:, :middle]), (2, np.s_[:, middle:])):
            spot = np.zeros_like(distance)
            spot[half] = distance[half]
            seeds[np.unravel_index(spot.argmax(), spot.shape)] = seed
        parts = watershed(-distance, seeds, mask=piece)
        yield from ((box, parts == 1), (box, parts == 2))
