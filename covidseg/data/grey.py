"""What the grey values of a slice mean: which of them are picture, and which are padding, metal or faults.

Scanners, converters and programs that resample fill what lies outside the field of view with a value of their own:
-2000, -32768, 0, or the lowest grey level. Metal and dead voxels reach values that no tissue has. A threshold, a
histogram or a correlation that takes them for picture is decided by them. :func:`clean` therefore comes before all of
these. It knows no unit: a slice is judged by its own values alone, so that any gain and any offset give the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.measure import approximate_polygon, find_contours

LOOK = 128               # side of the thinned picture that levels and padding are looked for in
SAME = 0.015             # values this close, as a share of the range of tissue, are the same: JPEG rings a little
BELOW, ABOVE = 0.2, 1.0  # of the way from air to tissue: darker or brighter than all else by more is no tissue
LIKE_AIR = 0.1           # likewise: padding that is so close to air does no harm and stays
FAR = 1000               # times as far from 0 as from each other: values that need another origin
SPLIT = 0.002            # of the picture lies between dark and bright at least
LEAST_PADDING = 0.01     # share of a slice
ROUND = 1.5              # pixels of the thinned picture by which most of the edge of a round field may stray
CORNERS = 8              # a straight-edged field of view has no more


@dataclass(frozen=True)
class Picture:
    """A slice whose values can be compared with each other.

    Attributes:
        values: ``(H, W)``, the slice; padding has the level of air, and what no tissue can have is cut off. The same
            array as the slice where there is nothing to do.
        beyond: ``(H, W)`` bool, what lies outside the field of view; None where the field fills the slice or cannot be
            told from air.
        split: Whether nothing lies halfway between dark and bright. In CT something always does, such as the skin;
            where negative values were stored as large positive ones, nothing does.
    """

    values: np.ndarray
    beyond: np.ndarray | None = None
    split: bool = False


def clean(image: np.ndarray, lossy: bool | None = None) -> Picture:
    """Recognises padding and cuts off values that no tissue has.

    Padding is a region of one value that holds corners of the slice. It lies beyond the field of view if what it
    leaves is round or has straight edges; otherwise it may be air, of which a display window leaves one value too.

    Args:
        image: ``(H, W)`` values of any unit, gain and offset.
        lossy: whether padding may have been smeared by lossy compression; by default where values have 8 bits, as in
            pictures.
    """
    lossy = image.dtype.itemsize == 1 if lossy is None else lossy
    step = max(1, max(image.shape) // LOOK)
    small = image[::step, ::step].astype(np.float64)
    lowest, spread = small.min(), np.ptp(small)
    if spread == 0:
        return Picture(image)
    if abs(lowest) > FAR * spread:  # single precision could not tell them apart
        image, small = (image.astype(np.float64) - lowest).astype(np.float32), small - lowest
    value, tolerance = _corner_value(small)
    beyond, padding = None, np.zeros(small.shape, bool)
    # Of one value exactly; else, as after the lossy compression of pictures, nearly so.
    for near in (0.0, tolerance) if lossy else (0.0,):
        padding = _at_the_edge(np.abs(small - value) <= near)
        if padding.mean() >= LEAST_PADDING and _is_field(padding):
            reach = _grown(_grown(padding)).repeat(step, axis=0).repeat(step, axis=1)
            beyond = reach[:image.shape[0], :image.shape[1]] & (np.abs(image.astype(np.float32) - value) <= near)
            beyond = _grown(beyond)  # where the picture was resampled, padding runs into its edge
            break
    inner = np.sort(small[~padding][::2])  # in order, so that every quantile is an entry
    count = len(inner)
    if not count or (low := inner[count // 200]) == (high := inner[count * 49 // 50]):
        return Picture(image)
    dark = np.searchsorted(inner, threshold_otsu(np.clip(inner, low, high)), "right")
    air, tissue = inner[dark // 10], inner[(dark + count) // 2]
    between = np.searchsorted(inner, (air + 0.25 * (tissue - air), air + 0.75 * (tissue - air)))
    low, high = low - BELOW * (tissue - air), high + ABOVE * (tissue - air)
    values = image
    if beyond is not None and abs(value - air) > LIKE_AIR * (tissue - air):
        values = np.where(beyond, np.float32(air), image)
    if values.min() < low or values.max() > high:
        values = np.clip(values, np.float32(low), np.float32(high))
    return Picture(values, beyond, bool(between[1] - between[0] < SPLIT * count))


def _corner_value(small: np.ndarray) -> tuple[float, float]:
    """The value that most corners of ``(h, w)`` have, and how far from it the same value may lie."""
    corners = small[[0, 0, -1, -1], [0, -1, 0, -1]]
    some = small[::2, ::2]
    others = np.sort(some[some != np.median(corners)])
    near = SAME * float(others[len(others) * 49 // 50] - others[len(others) // 200]) if len(others) else 0.0
    alike = (np.abs(corners[:, None] - corners) <= near).sum(axis=1)
    return float(corners[np.argmax(alike)]), near


def _at_the_edge(mask: np.ndarray) -> np.ndarray:
    """The components of ``(h, w)`` bool that reach the edge of the slice."""
    labels, _ = ndi.label(mask)
    edge = np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]])
    return np.isin(labels, np.unique(edge[edge > 0]))


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask ``(h, w)`` bool and the pixels beside it."""
    grown = mask.copy()
    grown[1:] |= mask[:-1]
    grown[:-1] |= mask[1:]
    grown[:, 1:] |= mask[:, :-1]
    grown[:, :-1] |= mask[:, 1:]
    return grown


def _is_field(padding: np.ndarray) -> bool:
    """Whether what padding ``(h, w)`` bool leaves can be a field of view: a disk, or few straight edges."""
    y, x = np.nonzero(_grown(padding) & ~padding)
    if len(y) < 20:
        return False
    # A circle through the points, by least squares: y^2 + x^2 = 2 a y + 2 b x + c.
    terms = np.stack([2 * y, 2 * x, np.ones(len(y))], axis=1)
    a, b, c = np.linalg.lstsq(terms, y ** 2 + x ** 2, rcond=None)[0]
    radius = np.sqrt(max(c + a ** 2 + b ** 2, 0))
    if np.quantile(np.abs(np.hypot(y - a, x - b) - radius), 0.8) < ROUND and radius < 2 * max(padding.shape):
        return True
    outline = max(find_contours(np.pad(~padding, 1).astype(float), 0.5), key=len)
    return len(approximate_polygon(outline, 1.5)) - 1 <= CORNERS
