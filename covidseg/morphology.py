"""Binary morphology of slices: exact disks, holes and components, without the cost of general filters.

All masks are ``(h, w)`` bool. A disk of radius ``r`` holds the pixels at a distance of up to ``r`` from its centre, as
:func:`skimage.morphology.disk` has it. What lies beyond the slice never matters to an opening or a closing: an erosion
takes it for mask, a dilation for none.
"""

from __future__ import annotations

from math import isqrt

import numpy as np
from scipy import ndimage as ndi


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
