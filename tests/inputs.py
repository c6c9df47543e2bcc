"""Inputs that people give: chests as scanners and converters leave them, and what is no chest CT.

The limits of :mod:`covidseg.data.chest` and :mod:`covidseg.data.grey` stand between these.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import ndimage as ndi
from skimage import data
from skimage.color import rgb2gray

from covidseg.data.phantom import PhantomPatient

Change = Callable[[PhantomPatient], np.ndarray]
CHANCE = 7


def disk(shape: tuple[int, ...], centre: tuple[float, float], rows: float, columns: float | None = None) -> np.ndarray:
    """A disk, or an ellipse, ``(H, W)`` bool."""
    y, x = np.ogrid[:shape[-2], :shape[-1]]
    return ((y - centre[0]) / rows) ** 2 + ((x - centre[1]) / (columns or rows)) ** 2 <= 1


def middle(patient: PhantomPatient) -> tuple[tuple[float, float], float]:
    """Centre of the lungs, and the radius of the circle around them, in pixels."""
    points = np.argwhere(patient.lung.any(axis=0))
    centre = (points.min(axis=0) + points.max(axis=0)) / 2
    return (float(centre[0]), float(centre[1])), float(np.hypot(*(points - centre).T).max())


def field(patient: PhantomPatient, beyond: float, values: np.ndarray, margin: float | None = None) -> np.ndarray:
    """``beyond`` outside a round field of view: of the slice, or so many pixels around the lungs."""
    side = patient.hu.shape[-1]
    centre, radius = middle(patient)
    inside = disk(patient.hu.shape, ((side - 1) / 2,) * 2, side / 2 - 1) if margin is None else \
        disk(patient.hu.shape, centre, radius + margin)
    return np.where(inside, values, beyond)


def heart(patient: PhantomPatient, rise: float) -> np.ndarray:
    """Contrast medium in heart and great vessels."""
    (row, column), _ = middle(patient)
    soft = (patient.hu > -100) & (patient.hu < 200)
    return np.where(disk(patient.hu.shape, (row, column + 8), 38) & soft, patient.hu + rise, patient.hu)


def metal(patient: PhantomPatient, side: int, value: float) -> np.ndarray:
    """Two rods along the volume, in soft tissue."""
    pixels = patient.hu.astype(float)
    for row, column in ((108, 118), (148, 130)):
        pixels[:, row:row + side, column:column + side] = value
    return pixels


def hot_voxel(patient: PhantomPatient, value: float) -> np.ndarray:
    pixels = patient.hu.astype(np.float32)
    pixels[5, 128, 128] = value
    return pixels


def rectangle(patient: PhantomPatient, value: float) -> np.ndarray:
    rows, columns = (np.flatnonzero(patient.lung.any(axis=(0, axis))) for axis in (2, 1))
    pixels = np.full(patient.hu.shape, value)
    box = np.s_[:, rows[0] - 6:rows[-1] + 6, columns[0] - 6:columns[-1] + 6]
    pixels[box] = patient.hu[box]
    return pixels


def display(hu: np.ndarray, low: float, high: float) -> np.ndarray:
    """8-bit grey levels of a window."""
    return np.rint(np.clip((hu - low) / (high - low), 0, 1) * 255).astype(np.uint8)


def squeezed(volume: np.ndarray, factor: int, axis: int) -> np.ndarray:
    """A volume ``(S, H, W)`` with each ``factor`` pixels along an axis made one, as in slices cut across others."""
    parts = np.moveaxis(volume, axis, -1)
    parts = parts[..., :parts.shape[-1] // factor * factor].reshape(*parts.shape[:-1], -1, factor)
    means = parts.mean(axis=-1)
    return np.moveaxis(means > 0.5 if volume.dtype == bool else means.astype(volume.dtype), -1, axis)


def stout(patient: PhantomPatient) -> np.ndarray:
    """Three centimetres of fat all around."""
    body = ndi.binary_fill_holes(patient.hu > -400, structure=np.ones((1, 3, 3)))
    ring = ndi.binary_dilation(body, np.ones((1, 3, 3)), iterations=20) & ~body
    return np.where(ring, -100 + np.random.default_rng(CHANCE).normal(0, 25, body.shape), patient.hu)


def white_lung(patient: PhantomPatient) -> np.ndarray:
    """The lung at the right of the picture without air, as bright as tissue."""
    left = patient.lung & (np.arange(patient.hu.shape[-1]) > middle(patient)[0][1])
    return np.where(left, 30 + np.random.default_rng(CHANCE).normal(0, 20, left.shape), patient.hu)


def chest_mr(patient: PhantomPatient) -> np.ndarray:
    """A T1-weighted MR scan of the chest: fat bright, muscle dark grey, lung and bone nearly black."""
    levels = np.interp(patient.hu, [-1000, -500, -200, -120, -60, -20, 30, 80, 200, 400, 1500],
                       [0.02, 0.1, 0.6, 1, 1, 0.5, 0.35, 0.35, 0.5, 0.3, 0.1])
    return 1000 * levels + np.random.default_rng(0).normal(0, 20, levels.shape)


def brain_mr() -> np.ndarray:
    """A T1-weighted MR scan of a head: bright scalp, black skull, grey brain, dark ventricles."""
    shape, centre = (256, 256), (128.0, 128.0)
    slices = []
    for k in range(12):
        image = np.zeros(shape)
        for rows, columns, level in ((100, 80, 1.0), (92, 72, 0.05), (86, 66, 0.25), (82, 62, 0.55), (66, 46, 0.75)):
            image[disk(shape, centre, rows, columns)] = level
        for side in (-1, 1):
            image[disk(shape, (120.0, 128.0 + 14 * side), 16 + 2 * k, 5 + k)] = 0.2
        slices.append(image)
    return 400 * np.array(slices) + np.random.default_rng(CHANCE).normal(0, 8, (12, *shape))


def photograph(name: str) -> np.ndarray:
    picture = getattr(data, name)()
    return picture[None] if picture.ndim == 2 else (255 * rgb2gray(picture[..., :3])).astype(np.uint8)[None]


# What a chest may come as: the same lungs are found.
CHESTS: dict[str, Change] = {
    "contrast medium in the heart, +300 HU": lambda p: heart(p, 300),
    "contrast medium in the heart, +500 HU": lambda p: heart(p, 500),
    "stored without intercept, padding far below": lambda p: field(p, -2000, p.hu + 1024),
    "padding -2000 around the field of view": lambda p: field(p, -2000, p.hu),
    "padding -32768 close to the lungs": lambda p: field(p, -32768, p.hu, 8),
    "unsigned, padding at the upper end": lambda p: field(p, 65535, p.hu.clip(-1024) + 1024).astype(np.uint16),
    "padding 0 HU around the field of view": lambda p: field(p, 0, p.hu),
    "padding 0 HU close to the lungs": lambda p: field(p, 0, p.hu, 8),
    "padding 3000 HU close to the lungs": lambda p: field(p, 3000, p.hu, 8),
    "field of view that ends at the ribs, air beyond": lambda p: field(p, -1000, p.hu, 4),
    "field of view that touches the lungs": lambda p: field(p, -1000, p.hu, 2),
    "cut to a rectangle, 0 HU beyond": lambda p: rectangle(p, 0),
    "cut to a rectangle, -2000 beyond": lambda p: rectangle(p, -2000),
    "two rods of metal": lambda p: metal(p, 5, 15000),
    "two thick rods of metal": lambda p: metal(p, 10, 15000),
    "a hot voxel": lambda p: hot_voxel(p, 1e6),
    "a dead voxel": lambda p: hot_voxel(p, -1e6),
    "low dose: noise of 120 HU": lambda p: p.hu + np.random.default_rng(CHANCE).normal(0, 120, p.hu.shape),
    "soft reconstruction kernel": lambda p: ndi.uniform_filter(p.hu.astype(np.float32), (1, 3, 3)),
    "much fat": stout,
    "prone": lambda p: p.hu[:, ::-1],
    "lung window": lambda p: display(p.hu, -1350, 150),
    "wide window": lambda p: display(p.hu, -1000, 1000),
    "grey levels in float": lambda p: p.hu.astype(np.float32) / 4000 + 7,
}
# What is refused: the error, and what it says.
OTHERS: dict[str, tuple[Change, str]] = {
    "inverted grey levels": (lambda p: 255 - display(p.hu, -1000, 400), "inverted"),
    "inverted lung window": (lambda p: 255 - display(p.hu, -1350, 150), "inverted"),
    "inverted, black around a round field": (lambda p: field(p, 0, 255 - display(p.hu, -1000, 400)), "inverted"),
    "negative values read as unsigned": (lambda p: p.hu.astype(np.int16).view(np.uint16), "wrapped"),
    "negative values cut to 12 bits": (lambda p: np.mod(p.hu, 4096), "wrapped"),
    "soft-tissue window": (lambda p: display(p.hu, -160, 240), "one value throughout"),
    "MR of a chest": (chest_mr, "MR"),
    "MR of a head": (lambda p: brain_mr(), "no lung|too little air|MR|shape of lungs"),
    **{name: (lambda p, name=name: photograph(name), "too little air|photograph|shape of|inverted|no lung|one side")
       for name in ("camera", "coffee", "astronaut", "cat", "moon", "rocket", "coins", "brick")},
    **{name: (lambda p, name=name: photograph(name), "inverted") for name in ("page", "text")},
}
