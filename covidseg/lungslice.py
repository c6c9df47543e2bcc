"""The threshold lung mask of one slice: the steps that :mod:`covidseg.lungs` describes, on a working grid."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce

import numpy as np
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed
from skimage.transform import resize

from covidseg.morphology import closing, erode, fill_holes, opening, sizes

TISSUE_SPREAD, LUNG_SHARE = 0.25, 0.62  # of chest CT at most, see looks_like_ct


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


@dataclass(frozen=True)
class Regions:
    """What thresholds find in one slice, all ``(h, w)`` bool on the working grid."""

    body: np.ndarray
    aerated: np.ndarray
    diseased: np.ndarray

    def packed(self) -> bytes:
        """One bit a pixel, compressed."""
        return zlib.compress(np.packbits([self.body, self.aerated, self.diseased]).tobytes(), 1)

    @classmethod
    def unpacked(cls, packed: bytes, shape: tuple[int, ...]) -> Regions:
        bits = np.unpackbits(np.frombuffer(zlib.decompress(packed), np.uint8), count=3 * shape[0] * shape[1])
        return cls(*bits.view(bool).reshape(3, *shape))


def grid_shape(shape: tuple[int, ...], side: int) -> tuple[int, ...]:
    """Shape of the working grid, whose longer side has ``side`` pixels at most."""
    scale = min(1.0, side / max(shape))
    return tuple(max(1, round(n * scale)) for n in shape)


def to_grid(image: np.ndarray, side: int) -> np.ndarray:
    """Averages a slice down so that its longer side has ``side`` pixels; smaller slices stay as they are."""
    image = image.astype(np.float32)
    shape = grid_shape(image.shape, side)
    if shape == image.shape:
        return image
    factor = image.shape[0] // side
    if image.shape == (factor * side, factor * side):  # the usual 512 -> 256: a plain block mean is fastest
        rows = reduce(np.add, [image[:, k::factor] for k in range(factor)])
        return reduce(np.add, [rows[k::factor] for k in range(factor)]) / np.float32(factor ** 2)
    return resize(image, shape, order=1, anti_aliasing=True, preserve_range=True).astype(np.float32)


def enlarge(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From the working grid to a slice of ``shape``: bilinear, cut at one half, which keeps the outline smooth."""
    if shape == (2 * mask.shape[0], 2 * mask.shape[1]):  # here the nearest pixel has 9/16 of the weight and decides
        return mask.repeat(2, axis=0).repeat(2, axis=1)
    return resize(mask.astype(np.float32), shape, order=1) > 0.5


def regions(image: np.ndarray, settings: LungSettings) -> Regions:
    smooth = ndi.gaussian_filter(np.clip(image, -1100, None), settings.smooth)
    nothing = np.zeros(image.shape, dtype=bool)
    if smooth.min() == smooth.max():
        return Regions(nothing, nothing, nothing)
    otsu = threshold_otsu(smooth)
    # The opening cuts what only touches the patient: table, tubes, text.
    bright, count = ndi.label(opening(smooth > otsu, 3))
    if count == 0:
        return Regions(nothing, nothing, nothing)
    flesh = bright == np.argmax(sizes(bright))
    body = opening(fill_holes(closing(flesh, 4)), 6)
    dark = body & (smooth < otsu)
    if dark.sum() < 30:
        return Regions(body, nothing, nothing)
    air, tissue = np.percentile(smooth[dark], 10), np.median(smooth[flesh])
    level = (smooth - air) / (tissue - air)  # 0 air, 1 soft tissue
    inside = erode(body, settings.skin)
    aerated = opening(inside & (level < settings.air_level), 1)
    diseased = opening(inside & (level < settings.lesion_level) & ~aerated, settings.rim)
    return Regions(body, aerated, diseased)


def looks_like_ct(image: np.ndarray, region: Regions) -> bool | None:
    """Whether the brightness inside the body is that of chest CT.

    Muscle, fat and organs differ little there, compared with the way from air to tissue: half of them lie within a
    range of .06 to .20 of it in every slice of MedSeg's two sets, and lung fills at most .56 of a body. MR makes fat
    several times as bright as muscle, and photographs show all sorts of things.

    Args:
        image: ``(h, w)`` slice on the working grid.
        region: what thresholds found in it.

    Returns:
        None where there is too little aerated lung to tell.
    """
    air, body = int(region.aerated.sum()), int(region.body.sum())
    rest = image[region.body & ~region.aerated & ~region.diseased]
    if not air or air < 0.02 * body or not len(rest):
        return None
    low, tissue, high = np.percentile(rest[::4], [25, 50, 75])
    spread = (high - low) / max(tissue - np.percentile(image[region.aerated], 10), 1e-6)
    return bool(spread < TISSUE_SPREAD and air < LUNG_SHARE * body)


def without_trachea(aerated: np.ndarray, body: np.ndarray) -> np.ndarray:
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


def complete(lung: np.ndarray, region: Regions, settings: LungSettings) -> np.ndarray:
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


def _sides(whole: np.ndarray) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """Left and right lung apart, also where they touch in front of the heart; small pieces stay as they are.

    Yields:
        A box of rows and columns with one pixel around the side, as far as the slice goes, and the side inside it.
    """
    labels, _ = ndi.label(whole)
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
