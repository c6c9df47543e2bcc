"""Chapter 2: lung masks by thresholding, with no learning and no hand-drawn mask.

The abstract begins with "threshold segmentation" of the lungs, so that what surrounds them does not interfere
with the classifier. A plain threshold fails on exactly the patients that matter: consolidated lung is as bright
as the chest wall and drops out. The steps here keep most diseased lung in; what stays out is solid consolidation
that lies broadly against the chest wall without a hazy rim, which no threshold can tell from the wall:

0. Grey values are cleaned (:func:`covidseg.data.grey.clean`): padding outside the field of view becomes air, metal and
   faulty voxels are cut off. Where the field of view ends inside a lung, its edge counts as chest wall.
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

:func:`threshold_lungs` takes these steps on a working grid of at most 256 x 256 pixels a slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import pairwise
from math import isqrt
from typing import TypeVar

import numpy as np
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed
from skimage.transform import resize
from tqdm import tqdm

from covidseg.data.chest import Regions, check_chest, doubt, lung_warnings
from covidseg.data.grey import Picture, clean
from covidseg.data.scan import Scan
from covidseg.errors import SettingsError

CUT_LUNG, LEAST_CUT = 0.6, 0.01         # of a dark region inside the hull of flesh, and of flesh, if it is cut lung
TOUCHED = 0.25                          # share of a pixel of the grid that padding has, from which on it is padding
TELL = 16                               # slices of a scan that are asked whether they are chest CT, evenly spread
PATIENCE = 2                            # seconds without a bar that shows progress
T = TypeVar("T")


@dataclass(frozen=True)
class LungSettings:
    """Settings of the threshold lung mask; lengths are pixels of the working grid.

    Attributes:
        grid: Longer side of the working grid in pixels; slices are averaged down to it.
        smooth: Standard deviation of the Gaussian that removes noise before thresholding.
        air_level: Upper end of aerated lung, as a fraction of the way from air to tissue (about -290 HU).
        lesion_level: Upper end of diseased lung, likewise (about -60 HU).
        rim: An opening of this radius keeps the blurred rim of healthy lung from counting as disease.
        skin: Depth below the body surface within which nothing is lung.
        close: Closing radius of a healthy side.
        close_diseased: Closing radius of a diseased side.
        diseased: Share of a side of intermediate brightness from which it counts as diseased.
        hull_depth: Hull pixels are added up to this percentile of the side's depth below the surface; 0 adds none.
        smallest: Smallest component of a single slice, as a fraction of the body.
        smallest_3d: Smallest component of a volume, as a fraction of the largest.
        largest_hole: Larger holes (the dome of the liver, ringed by lung) are not filled.
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


# --- all slices -----------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Lungs:
    """Threshold lungs of a scan.

    Attributes:
        masks: ``(S, H, W)`` bool. A slice without lung is all False.
        warnings: What a person should know of them, see :func:`covidseg.data.chest.lung_warnings`.
        volume: Whether the slices are one body in order, as was said or measured.
    """

    masks: np.ndarray
    warnings: tuple[str, ...]
    volume: bool

    def slices(self) -> int:
        """How many slices show lung."""
        return int(self.masks.any(axis=(1, 2)).sum())


def threshold_lungs(pixels: np.ndarray, settings: LungSettings = LungSettings(), volume: bool | None = None, *,
                    aspect: float = 1.0, check: Scan | None = None, progress: bool = False) -> np.ndarray:
    """Threshold lung masks of all slices.

    Args:
        pixels: ``(S, H, W)`` upright slices, HU or display values of any window.
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured by :func:`is_volume`.
        aspect: height of a pixel over its width, :meth:`covidseg.data.scan.Scan.aspect`.
        check: the scan that the slices come from, if they have to look like chest CT.
        progress: whether a bar is shown, if it takes long and there is a terminal.

    Returns:
        ``(S, H, W)`` bool. A slice without lung is all False.

    Raises:
        InputFileError: the slices do not look like chest CT (:func:`covidseg.data.chest.check_chest`).
        NoLungError: nothing in them can be lung.
        SettingsError: ``pixels`` or ``volume`` is something else.
    """
    return survey_lungs(pixels, settings, volume, aspect=aspect, check=check, progress=progress).masks


def survey_lungs(pixels: np.ndarray, settings: LungSettings = LungSettings(), volume: bool | None = None, *,
                 aspect: float = 1.0, check: Scan | None = None, progress: bool = False) -> Lungs:
    """:func:`threshold_lungs`, with what is odd about them."""
    if np.ndim(pixels) != 3 or volume not in (True, False, None):
        raise SettingsError(f"slices of shape {np.shape(pixels)} with volume={volume!r} cannot be surveyed",
                            remedy="Give an array (slices, rows, columns), and True, False or None for volume")
    found, doubts, thumbnails = list[Regions](), list[str | None](), list[np.ndarray]()
    for image in with_bar(pixels, "lungs", progress):
        picture = on_grid(clean(image), settings.grid, aspect)
        found.append(regions(picture.values, settings, picture.beyond))
        if check is not None and len(thumbnails) % (1 + len(pixels) // TELL) == 0:
            doubts.append(doubt(picture.values, found[-1], picture.split))
        thumbnails.append(to_grid(picture.values, 32))
    if check is not None:
        pixel_cm2 = math.prod(check.spacing[1:]) / 100 * (pixels[0].size / found[0].body.size)
        check_chest(doubts, found, check.path, pixel_cm2)
    volume = is_volume(thumbnails) if volume is None else volume
    if volume:
        aerated = large_in_3d(np.array([region.aerated for region in found]), settings.smallest_3d)
    else:
        aerated = np.array([large_in_slice(region.aerated, settings.smallest * region.body.sum()) for region in found])
    lungs, masks = [], np.zeros(pixels.shape, bool)
    for mask, lung, region in zip(masks, aerated, with_bar(found, "outlines", progress), strict=True):
        lungs.append(complete(without_trachea(lung, region.body), region, settings) if lung.any() else lung)
        mask[:] = enlarge(lungs[-1], mask.shape)
    return Lungs(masks, lung_warnings(lungs, found, volume), volume)


def large_in_3d(aerated: np.ndarray, share: float) -> np.ndarray:
    """The components of a volume ``(S, h, w)`` that have more than ``share`` of the voxels of the largest."""
    labels, count = ndi.label(aerated)
    volumes = np.zeros(count + 1, int)
    for slice_labels in labels:  # one by one, since counting needs eight bytes a pixel
        volumes += np.bincount(slice_labels.ravel(), minlength=count + 1)
    volumes[0] = 0               # the background
    return (volumes > share * volumes.max())[labels]


def large_in_slice(aerated: np.ndarray, least: float) -> np.ndarray:
    """The components of a slice ``(h, w)`` that have more than ``least`` pixels."""
    labels, _ = ndi.label(aerated)
    return (sizes(labels) > least)[labels]


def is_volume(thumbnails: Sequence[np.ndarray]) -> bool:
    """Whether neighbouring slices look alike, as in a volume, or are unrelated pictures.

    Args:
        thumbnails: the slices, cleaned, on a grid of about 32 x 32.
    """
    varied = [image.ravel() for image in thumbnails if image.std() > 0]     # a constant slice is like no other
    likeness = [np.corrcoef(one, other)[0, 1] for one, other in pairwise(varied)]
    return bool(likeness) and bool(np.median(likeness) > 0.9)


def with_bar(items: Iterable[T], what: str, progress: bool, unit: str = "slice",
             total: int | None = None) -> Iterator[T]:
    """The items, with a bar that shows how far they are, if it takes long and there is a terminal."""
    return iter(tqdm(items, desc=what, unit=unit, total=total, delay=PATIENCE, leave=False,
                     disable=None if progress else True))


# --- one slice ------------------------------------------------------------------------------------------------------

def to_grid(image: np.ndarray, side: int, aspect: float = 1.0) -> np.ndarray:
    """Averages a slice down so that its longer side has ``side`` pixels; smaller slices stay as they are.

    Pixels become square: ``aspect`` is their height over their width, and the longer of the two is interpolated.
    """
    image = image.astype(np.float32)
    height, width = image.shape[0] * max(aspect, 1), image.shape[1] * max(1 / aspect, 1)
    scale = min(1.0, side / max(height, width))
    shape = max(1, round(height * scale)), max(1, round(width * scale))
    if shape == image.shape:
        return image
    factor = image.shape[0] // side
    if shape == (side, side) and image.shape == (factor * side, factor * side):  # 512 -> 256: a block mean is fastest
        rows = reduce(np.add, [image[:, k::factor] for k in range(factor)])
        return reduce(np.add, [rows[k::factor] for k in range(factor)]) / np.float32(factor ** 2)
    return resize(image, shape, order=1, anti_aliasing=True, preserve_range=True).astype(np.float32)


def on_grid(picture: Picture, side: int, aspect: float = 1.0) -> Picture:
    """A cleaned slice, averaged down: cleaned first, for padding averaged into tissue could not be told from it."""
    beyond = None if picture.beyond is None else to_grid(picture.beyond, side, aspect) > TOUCHED
    return replace(picture, values=to_grid(picture.values, side, aspect), beyond=beyond)


def enlarge(mask: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """From the working grid to a slice of ``shape``: bilinear, cut at one half, which keeps the outline smooth."""
    if shape == (2 * mask.shape[0], 2 * mask.shape[1]):  # here the nearest pixel has 9/16 of the weight and decides
        return mask.repeat(2, axis=0).repeat(2, axis=1)
    return resize(mask.astype(np.float32), shape, order=1) > 0.5


def regions(image: np.ndarray, settings: LungSettings, beyond: np.ndarray | None = None) -> Regions:
    """What thresholds find in one slice.

    Args:
        image: ``(h, w)`` on the working grid, cleaned (:func:`covidseg.data.grey.clean`).
        beyond: ``(h, w)`` bool, what lies outside the field of view, if anything does.
    """
    beyond = np.zeros(image.shape, bool) if beyond is None else beyond
    ends = dilate(np.pad(beyond, 1, constant_values=True), 1)[1:-1, 1:-1] & ~beyond
    smooth = ndi.gaussian_filter(image, settings.smooth)
    nothing = np.zeros(image.shape, dtype=bool)
    if smooth.min() == smooth.max():
        return Regions(nothing, nothing, nothing, ends)
    otsu = threshold_otsu(smooth)
    # The opening cuts what only touches the patient: table, tubes, text; but not a wall at the end of the view.
    bright, count = ndi.label(opening((smooth > otsu) | beyond, 3) & ~beyond)
    if count == 0:
        return Regions(nothing, nothing, nothing, ends)
    flesh = bright == np.argmax(sizes(bright))
    body = opening(_closed_body(closing(flesh, 4), beyond, ends) | beyond, 6) & ~beyond
    dark = body & (smooth < otsu)
    if dark.sum() < 30:
        return Regions(body, nothing, nothing, ends)
    air, tissue = np.percentile(smooth[dark], 10), np.median(smooth[flesh])
    level = (smooth - air) / (tissue - air)  # 0 air, 1 soft tissue
    inside = erode(body | beyond, settings.skin) & body
    aerated = opening(inside & (level < settings.air_level), 1)
    diseased = opening(inside & (level < settings.lesion_level) & ~aerated, settings.rim)
    return Regions(body, aerated, diseased, ends)


def _closed_body(flesh: np.ndarray, beyond: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The body with all that flesh surrounds, also where the picture or the field of view ends inside a lung.

    What is dark and reaches an end of the picture is air around the patient, or a lung that is cut off; the latter lies
    for the most part inside the convex hull of what flesh there is.
    """
    labels, _ = ndi.label(~flesh & ~beyond)
    pixels, hull = sizes(labels), None
    at_end = np.unique(labels[ends & ~flesh])
    inside = pixels > 0
    inside[at_end] = False
    rows, columns = (np.flatnonzero(flesh.any(axis=axis)) for axis in (1, 0))
    box = labels[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    for part in at_end[pixels[at_end] > LEAST_CUT * flesh.sum()]:
        # The hull is dear, and most of the air around a patient lies outside even of the box around it.
        if (box == part).sum() > CUT_LUNG * pixels[part]:
            hull = convex_hull_image(flesh[::4, ::4]) if hull is None else hull  # every fourth pixel will do
            inside[part] = (labels[::4, ::4][hull] == part).sum() > CUT_LUNG * (labels[::4, ::4] == part).sum()
    return flesh | inside[labels]


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


# --- binary morphology ------------------------------------------------------------------------------------------------
# Exact disks, holes and components without the cost of general filters. All masks are (h, w) bool. A disk of radius r
# holds the pixels at a distance of up to r from its centre, as skimage.morphology.disk has it. What lies beyond the
# slice never matters to an opening or a closing: an erosion takes it for mask, a dilation for none.

def _disk(mask: np.ndarray, radius: int, combine: np.ufunc, beyond: bool) -> np.ndarray:
    """Combines each pixel with all others of a disk around it.

    A disk is a pile of centred runs, one for each of its rows. Runs grow from the top row of the disk to its middle,
    so that each comes from the one before, and the pixels of a run from two shorter runs that overlap. Rows lie one
    after another in memory: a shift by any distance is a step in one flat array, whatever way it goes.
    """
    height, width = mask.shape
    stride = width + 2 * radius
    padded = np.full((height + 2 * radius, stride), beyond)
    padded[radius:radius + height, radius:radius + width] = mask
    run, half = padded.ravel(), 0                   # each pixel with its `half` neighbours on both sides
    result = np.full(height * stride, beyond)       # rows of the slice, columns padded
    for row in range(radius, -1, -1):
        while half < isqrt(radius ** 2 - row ** 2):
            step = min(isqrt(radius ** 2 - row ** 2) - half, max(half, 1))
            longer = run.copy()  # the ends of the flat array are padding and stay as they are
            combine(run[:-2 * step], run[2 * step:], out=longer[step:-step])
            run, half = (combine(longer, run) if half == 0 else longer), half + step
        for start in {radius - row, radius + row}:
            combine(result, run[start * stride:start * stride + result.size], out=result)
    return result.reshape(height, stride)[:, radius:radius + width]


def dilate(mask: np.ndarray, radius: int) -> np.ndarray:
    """All pixels at a distance of up to ``radius`` from the mask."""
    return _disk(mask, radius, np.logical_or, False)


def erode(mask: np.ndarray, radius: int) -> np.ndarray:
    """The pixels of the mask that are further than ``radius`` from all others of the slice."""
    return _disk(mask, radius, np.logical_and, True)


def opening(mask: np.ndarray, radius: int) -> np.ndarray:
    """What disks that fit into the mask cover: cuts off whatever is thinner."""
    return dilate(erode(mask, radius), radius)


def closing(mask: np.ndarray, radius: int) -> np.ndarray:
    """Fills what no disk outside the mask reaches; also where that disk reaches beyond the slice."""
    padded = np.pad(mask, radius)
    return erode(dilate(padded, radius), radius)[radius:radius + mask.shape[0], radius:radius + mask.shape[1]]


def sizes(labels: np.ndarray) -> np.ndarray:
    """Pixels of each component of a label image, at its number; 0 for the background."""
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    return counts


def fill_holes(mask: np.ndarray, largest: float = np.inf) -> np.ndarray:
    """Fills holes of up to ``largest`` pixels; a hole does not reach the edge of the slice."""
    outside, _ = ndi.label(~mask)
    small = sizes(outside) <= largest
    for edge in (outside[0], outside[-1], outside[:, 0], outside[:, -1]):
        small[edge] = False
    small[0] = False
    return mask | small[outside]
