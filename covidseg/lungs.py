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

Each slice takes these steps on a working grid.

Binary morphology of slices: exact disks, holes and components, without the cost of general filters.

All masks are ``(h, w)`` bool. A disk of radius ``r`` holds the pixels at a distance of up to ``r`` from its centre, as
:func:`skimage.morphology.disk` has it. What lies beyond the slice never matters to an opening or a closing: an erosion
takes it for mask, a dilation for none.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from math import isqrt
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from skimage.filters import threshold_otsu
from skimage.measure import regionprops
from skimage.morphology import convex_hull_image
from skimage.segmentation import watershed
from skimage.transform import resize

from covidseg.errors import InputFileError, NoLungError

# --- morphology -----------------------------------------------------------------------------------------------------

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


# --- one slice ------------------------------------------------------------------------------------------------------

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


# --- all slices -----------------------------------------------------------------------------------------------------

def lung_masks(pixels: np.ndarray, settings: LungSettings = LungSettings(),
               volume: bool | None = None, *, check: Path | None = None) -> np.ndarray:
    """Threshold lung masks of all slices.

    Args:
        pixels: ``(S, H, W)`` upright slices, HU or display values of any window.
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured by :func:`is_volume`.
        check: of this file, see :meth:`LungPasses.check`; by default the slices are taken for CT.

    Returns:
        ``(S, H, W)`` bool. A slice without lung is all False.
    """
    passes = LungPasses(settings, volume).look_at(pixels)
    if check is not None:
        passes.check(check)
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
        # Of each slice: pixels of the components of its aerated lung and of its body; (2, T) numbers of the components
        # in the slice before and in this one that touch.
        self._areas: list[np.ndarray] = []
        self._bodies: list[int] = []
        self._plausible: list[bool | None] = []
        self._touching: list[np.ndarray] = []
        self._last: np.ndarray | None = None
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._packed)

    def look(self, image: np.ndarray) -> None:
        """First pass: the next slice, ``(H, W)``, in order and all of one shape."""
        if self._volume is None:
            self._neighbours.look(image)
        small = to_grid(image, self.settings.grid)
        region = regions(small, self.settings)
        labels, count = ndi.label(region.aerated)
        before = np.zeros_like(labels) if self._last is None else self._last
        touch = np.zeros((before.max() + 1, count + 1), dtype=bool)
        touch[before, labels] = True
        self._shape, self._last, self._kept = image.shape, labels, None
        self._areas.append(sizes(labels))
        self._bodies.append(int(region.body.sum()))
        self._touching.append(np.argwhere(touch[1:, 1:]).T + 1)
        self._packed.append(region.packed())
        self._plausible.append(looks_like_ct(small, region))

    def look_at(self, slices: Iterable[np.ndarray]) -> LungPasses:
        """The whole first pass; returns itself."""
        for image in slices:
            self.look(image)
        return self

    def check(self, path: Path) -> None:
        """Between the passes: whether the slices look like chest CT at all.

        Raises:
            InputFileError: they do not; or ...
            NoLungError: no slice shows a dark region inside a body that could be lung, or only tiny ones.
        """
        if not any(len(areas) > 1 for areas in self._areas):
            raise no_lung(path)
        known = [plausible for plausible in self._plausible if plausible is not None]
        if not known:
            raise NoLungError("shows too little air in any slice to be chest CT", path=path,
                              remedy="Give slices that show the lungs; --unchecked lets it pass")
        if 2 * sum(known) < len(known):
            raise InputFileError(
                f"does not look like chest CT: in {len(known) - sum(known)} of {len(known)} slices the brightness "
                "inside the body is another", path=path,
                remedy="Give CT, not MR or photographs, in HU or a window that shows lungs; --unchecked lets it pass")

    def mask(self, k: int) -> np.ndarray:
        """Second pass: the lung in slice ``k``, ``(H, W)`` bool; all False where there is none."""
        if self._kept is None:
            self._kept = self._in_3d() if self.is_volume() else self._in_each()
        if not self._kept[k].any():
            return np.zeros(self._shape, dtype=bool)
        region = Regions.unpacked(self._packed[k], grid_shape(self._shape, self.settings.grid))
        lung = without_trachea(self._kept[k][ndi.label(region.aerated)[0]], region.body)
        return enlarge(complete(lung, region, self.settings), self._shape)

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


def no_lung(path: Path) -> NoLungError:
    """The error for a scan that shows no lung."""
    return NoLungError("no lung was found in any slice", path=path,
                       remedy="Give chest CT, in which the air in the lungs is darker than tissue")


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
        small = to_grid(image, 32).ravel()  # about 1024 numbers
        if small.std() > 0:
            if self._last is not None:
                self._likeness.append(np.corrcoef(self._last, small)[0, 1])
            self._last = small

    def alike(self) -> bool:
        return bool(self._likeness) and bool(np.median(self._likeness) > 0.9)
