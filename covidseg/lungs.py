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

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image, disk, opening
from skimage.segmentation import watershed
from skimage.transform import resize


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
    if volume is None:
        volume = is_volume(pixels)
    regions = [_regions(_to_grid(image, settings.grid), settings) for image in pixels]
    if volume:
        aerated = _largest_in_3d(np.stack([r.aerated for r in regions]), settings)
    else:
        aerated = np.stack([_large_enough(r, settings) for r in regions])
    aerated = np.stack([_without_trachea(a, r.body) for a, r in zip(aerated, regions, strict=True)])
    masks = np.zeros(pixels.shape, dtype=bool)
    for mask, lung, region in zip(masks, aerated, regions, strict=True):
        if lung.any():
            found = _complete(lung, region, settings)
            # Bilinear enlargement cut at one half keeps the outline smooth.
            mask[:] = resize(found.astype(np.float32), mask.shape, order=1) > 0.5
    return masks


def is_volume(pixels: np.ndarray) -> bool:
    """Whether neighbouring slices of ``(S, H, W)`` look alike, as in a volume, or are unrelated pictures."""
    if len(pixels) < 2:
        return False
    small = [_to_grid(image, 32).ravel() for image in pixels]  # about 1024 numbers each
    small = [values for values in small if values.std() > 0]
    likeness = [np.corrcoef(a, b)[0, 1] for a, b in pairwise(small)]
    return bool(likeness) and bool(np.median(likeness) > 0.9)


@dataclass(frozen=True)
class _Regions:
    """What thresholds find in one slice, all ``(h, w)`` bool on the working grid."""

    body: np.ndarray
    aerated: np.ndarray
    diseased: np.ndarray


def _to_grid(image: np.ndarray, side: int) -> np.ndarray:
    """Averages a slice down so that its longer side has ``side`` pixels; smaller slices stay as they are."""
    image = image.astype(np.float32)
    scale = side / max(image.shape)
    if scale >= 1:
        return image
    factor = round(1 / scale)
    if image.shape[0] == image.shape[1] == factor * side:  # the usual 512 -> 256: a plain block mean is fastest
        return image.reshape(side, factor, side, factor).mean(axis=(1, 3))
    shape = tuple(max(1, round(n * scale)) for n in image.shape)
    return resize(image, shape, order=1, anti_aliasing=True, preserve_range=True).astype(np.float32)


def _regions(image: np.ndarray, settings: LungSettings) -> _Regions:
    smooth = ndi.gaussian_filter(np.clip(image, -1100, None), settings.smooth)
    nothing = np.zeros(image.shape, dtype=bool)
    if smooth.min() == smooth.max():
        return _Regions(nothing, nothing, nothing)
    otsu = threshold_otsu(smooth)
    # The opening cuts what only touches the patient: table, tubes, text.
    bright, count = ndi.label(opening(smooth > otsu, disk(3)))
    if count == 0:
        return _Regions(nothing, nothing, nothing)
    flesh = bright == 1 + np.argmax(np.bincount(bright.ravel())[1:])
    body = opening(ndi.binary_fill_holes(_close(flesh, 4)), disk(6))
    dark = body & (smooth < otsu)
    if dark.sum() < 30:
        return _Regions(body, nothing, nothing)
    air, tissue = np.percentile(smooth[dark], 10), np.median(smooth[flesh])
    level = (smooth - air) / (tissue - air)  # 0 air, 1 soft tissue
    inside = ndi.distance_transform_edt(body) > settings.skin
    aerated = opening(inside & (level < settings.air_level), disk(1))
    diseased = opening(inside & (level < settings.lesion_level) & ~aerated, disk(settings.rim))
    return _Regions(body, aerated, diseased)


def _largest_in_3d(aerated: np.ndarray, settings: LungSettings) -> np.ndarray:
    labels, count = ndi.label(aerated)
    if count == 0:
        return aerated
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes > settings.smallest_3d * sizes.max())[labels]


def _large_enough(region: _Regions, settings: LungSettings) -> np.ndarray:
    labels, _ = ndi.label(region.aerated)
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return (sizes > settings.smallest * region.body.sum())[labels]


def _without_trachea(aerated: np.ndarray, body: np.ndarray) -> np.ndarray:
    """Drops the windpipe: a small, compact component near the midline while there is lung beside it."""
    labels, count = ndi.label(aerated)
    if count < 2:
        return aerated
    columns = np.flatnonzero(body.any(axis=0))
    middle, width = columns.mean(), np.ptp(columns)
    keep = aerated.copy()
    for part in regionprops(labels):
        central = abs(part.centroid[1] - middle) < 0.12 * width
        if central and part.area < 0.012 * body.sum() and part.solidity > 0.88 and part.eccentricity < 0.85:
            keep[labels == part.label] = False
    return keep if keep.any() else aerated


def fill_holes(mask: np.ndarray, largest: float) -> np.ndarray:
    """Fills holes of up to ``largest`` pixels."""
    holes, _ = ndi.label(~mask & ndi.binary_fill_holes(mask))
    sizes = np.bincount(holes.ravel())
    small = sizes <= largest
    small[0] = False
    return mask | small[holes]


def _complete(lung: np.ndarray, region: _Regions, settings: LungSettings) -> np.ndarray:
    """Adds what disease, vessels and the pleura hide to the aerated lung of one slice."""
    labels, _ = ndi.label(lung | region.diseased)
    touching = np.unique(labels[lung])
    whole = np.isin(labels, touching)
    depth = ndi.distance_transform_edt(region.body)
    result = np.zeros_like(lung)
    for side in _sides(whole):
        severe = (side & ~lung).sum() > settings.diseased * side.sum()
        radius = settings.close_diseased if severe else settings.close
        filled = fill_holes(_close(side, radius), settings.largest_hole) & region.body
        if severe and settings.hull_depth and filled.sum() > 50:
            shallow = depth < np.percentile(depth[filled], settings.hull_depth)
            filled |= convex_hull_image(filled) & region.body & shallow
        result |= filled
    return result


def _sides(whole: np.ndarray) -> list[np.ndarray]:
    """Left and right lung apart, also where they touch in front of the heart; small pieces stay as they are."""
    labels, count = ndi.label(whole)
    sides = []
    for k in range(1, count + 1):
        piece = labels == k
        columns = np.flatnonzero(piece.any(axis=0))
        wide = len(columns) > max(80, 0.55 * whole.any(axis=0).sum()) and piece.sum() > 0.5 * whole.sum()
        if not wide:
            sides.append(piece)
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
        sides += [parts == 1, parts == 2]
    return sides


def _close(mask: np.ndarray, radius: int) -> np.ndarray:
    """Closing with a disk, by two distance transforms: its cost does not grow with the radius."""
    padded = np.pad(mask, radius + 1)
    grown = ndi.distance_transform_edt(~padded) <= radius
    closed = ndi.distance_transform_edt(grown) > radius
    return closed[radius + 1:-radius - 1, radius + 1:-radius - 1]
