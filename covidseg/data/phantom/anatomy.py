"""Anatomy of the phantom: where body, bones, mediastinum and lungs are, how dense they are, and the scanner.

Every organ is an implicit shape: a signed distance in millimetres, negative inside. Shapes are combined with
``minimum`` (union) and ``maximum`` (intersection) and turned into soft coverage at the end, which gives the
partial-volume edges of a real scanner. All shapes are evaluated on warped coordinates (:class:`Frame`), so that
no two patients, and no two sides of one patient, are alike.

The shapes are plausible, not anatomical truth: they serve teaching and tests.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage

Array = np.ndarray


def smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], spacing: tuple[float, ...], scale: float) -> Array:
    """Gaussian random field, float32, with unit variance at every voxel and a correlation length of about ``scale`` mm.

    White noise on a coarse grid is spread by a Gaussian kernel along one axis after the other; each row of
    kernel weights has length one, so the variance stays exactly one whatever the scale.
    """
    kernels = []
    for length, step in zip(shape, spacing, strict=True):
        voxels = np.arange(length) * step
        nodes = np.arange(-3 * scale, voxels[-1] + 3 * scale, scale)  # Gaussian sampled at one sigma: no ripple seen
        weights = np.exp(-0.5 * ((voxels[:, None] - nodes) / scale) ** 2)
        kernels.append((weights / np.linalg.norm(weights, axis=1, keepdims=True)).astype(np.float32))
    field = rng.standard_normal([kernel.shape[1] for kernel in kernels], dtype=np.float32)
    for axis, kernel in enumerate(kernels):
        field = np.moveaxis(np.tensordot(kernel, field, axes=(1, axis)), 0, axis)
    return np.ascontiguousarray(field)


def coverage(distance: Array, width: float) -> Array:
    """Share of a voxel inside a shape, 0..1, from its signed distance and the voxel width (mm)."""
    return np.clip(0.5 - distance / width, 0, 1)


def ellipse(x: Array, y: Array, a: Array | float, b: Array | float, power: float = 2.0) -> Array:
    """Signed radial distance (mm) to a superellipse of half axes ``a`` and ``b`` around the origin."""
    level = (np.abs(x / a) ** power + np.abs(y / b) ** power) ** (1 / power) + 1e-6
    return np.hypot(x, y) * (1 - 1 / level) - 1e-3


def ellipsoid(x: Array, y: Array, z: Array, axes: tuple[float, float, float]) -> Array:
    """Signed radial distance (mm) to an ellipsoid of half axes ``axes`` (x, y, z) around the origin."""
    level = np.sqrt((x / axes[0]) ** 2 + (y / axes[1]) ** 2 + (z / axes[2]) ** 2) + 1e-6
    return np.sqrt(x * x + y * y + z * z) * (1 - 1 / level)


def bar(x: Array, y: Array, start: tuple[float, float], end: tuple[float, float], radius: float) -> Array:
    """Signed distance (mm) to a round bar between two points of the slice plane."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = np.clip(((x - start[0]) * dx + (y - start[1]) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - start[0] - along * dx, y - start[1] - along * dy) - radius


class Frame(NamedTuple):
    """Coordinates of the patient's body at every voxel, and the measures its organs hang on, all in mm."""

    x: Array  # (S, H, W) from the midline towards the patient's left, warped
    y: Array  # (S, H, W) from the middle of the chest towards the back, warped
    z: Array  # (S, 1, 1) from the lowest lung slice towards the head
    spacing: tuple[float, float, float]  # voxel size (slices, rows, columns)
    height: float      # extent of the scan along z
    half_width: float  # of the inner chest
    half_depth: float  # of the inner chest
    fat: float         # thickness of the fat under the skin
    breath: float      # breathing level, 0 (breathed out: high diaphragm, dense lung) to 1 (breathed in)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.x.shape

    @property
    def t(self) -> Array:
        """``(S, 1, 1)`` position along the body, 0 at the lowest slice, 1 at the highest."""
        return self.z / self.height


def make_frame(rng: np.random.Generator, slices: int, size: int, breath: float) -> Frame:
    """Draws a patient's size, position, tilt and the warp of all shapes; see :class:`Frame` for ``breath``."""
    build = rng.uniform(0.9, 1.08)
    half_width, half_depth = build * rng.uniform(118, 136), build * rng.uniform(80, 100)
    fat = rng.uniform(9, 24)
    height = build * rng.uniform(205, 235) * (0.92 + 0.12 * breath)
    # The field of view follows the patient, as a radiographer sets it.
    pixel = 2 * (half_width + fat + rng.uniform(24, 36)) / size
    spacing = (height / slices, pixel, pixel)
    z = ((np.arange(slices) + 0.5) * spacing[0]).astype(np.float32)[:, None, None]
    line = ((np.arange(size) - (size - 1) / 2) * pixel).astype(np.float32)
    lean, roll = rng.normal(0, 0.025), np.deg2rad(rng.normal(0, 2.5))
    column = line[None, None, :] - rng.normal(0, 5) - lean * (z - height / 2)
    row = line[None, :, None] - rng.normal(4, 5) - rng.normal(0, 0.03) * (z - height / 2)
    x, y = np.cos(roll) * column + np.sin(roll) * row, np.cos(roll) * row - np.sin(roll) * column
    shape = (slices, size, size)
    x = x + 3.0 * smooth_noise(rng, shape, spacing, 28) + 0.5 * smooth_noise(rng, shape, spacing, 7)
    y = y + 3.0 * smooth_noise(rng, shape, spacing, 28) + 0.5 * smooth_noise(rng, shape, spacing, 7)
    return Frame(x.astype(np.float32), y.astype(np.float32), z, spacing, height, half_width, half_depth, fat, breath)


class Chest(NamedTuple):
    """What the lesions and vessels need to know about the anatomy, arrays ``(S, H, W)``, body coordinates in mm."""

    outside: Array  # HU of everything but the lungs
    lung: Array     # signed distance to the lungs, mm; negative inside
    pleura: Array   # depth below chest wall or diaphragm, mm; positive inside
    heart: Array    # signed distance to heart and mediastinum, mm
    hila: tuple[tuple[float, float, float], tuple[float, float, float]]  # right and left lung root, (x, y, z)
    carina: tuple[float, float, float]  # where the trachea divides, (x, y, z)


def make_chest(rng: np.random.Generator, f: Frame) -> Chest:
    """Builds all organs of one patient on the frame ``f``."""
    x, y, z, t, pixel = f.x, f.y, f.z, f.t, f.spacing[1]
    wide, deep = f.half_width, f.half_depth
    # The cavity narrows towards the apex like a dome, and a little towards the waist.
    dome = np.sqrt(1 - np.clip((t - 0.3) / 0.74, 0, 1) ** 2.3) * (1 - 0.06 * np.clip(0.3 - t, 0, 1))
    cavity = ellipse(x, y + 6 * (1 - dome), wide * dome, deep * (0.25 + 0.75 * dome), 2.35)

    diaphragm = _diaphragm(rng, f)

    # Mediastinum: a core from breastbone to spine, heart, great vessels and lung roots.
    heart_at = (rng.uniform(16, 26), -0.22 * deep, f.height * (0.28 - 0.06 * f.breath))
    heart = ellipsoid(x - heart_at[0], y - heart_at[1], z - heart_at[2],
                      (rng.uniform(50, 60), rng.uniform(44, 52), f.height * rng.uniform(0.24, 0.29)))
    width = 24 + 10 * np.clip((t - 0.55) / 0.4, 0, 1) + rng.normal(0, 2)
    taper = np.clip((-y - 0.35 * deep) / (0.6 * deep), 0, 1)  # thin in front, where the lungs nearly meet
    core = np.maximum(np.abs(x - 2) - width * (1 - 0.8 * taper), np.abs(y) - 1.3 * deep)
    core += 3.5 * smooth_noise(rng, f.shape, f.spacing, 14)
    root_z = f.height * rng.uniform(0.5, 0.55)
    roots = ((-36.0, 0.06 * deep, root_z - 6), (36.0, 0.06 * deep, root_z + 6))
    hila = np.minimum(*(ellipsoid(x - rx, y - ry, z - rz, (15, 17, 24)) for rx, ry, rz in roots))
    vessels = _great_vessels(rng, f)

    spine_y = 0.74 * deep
    vertebra = ellipse(x, y - spine_y, 21, 17, 2.4)
    gutter = np.abs(x) - 17 - 0.9 * np.clip(y - spine_y, 0, None)  # behind the vertebra, between the lungs
    gutter = np.maximum(gutter, spine_y - y)
    soft = np.minimum.reduce([core, heart, hila, vessels])
    middle = np.minimum.reduce([soft, vertebra - 4, gutter])
    lung = np.maximum.reduce([cavity, diaphragm, -middle])

    outside = _chest_wall(rng, f, cavity)
    # Inside the cavity, lungs aside: fat with the organs in it.
    fill = np.full(f.shape, -95.0, dtype=np.float32)
    for distance, hu in ((core + 5, 5.0), (heart + 3, 38.0), (hila, 25.0), (vessels, rng.uniform(38, 50))):
        fill += coverage(distance, 2 * pixel) * (hu - fill)
    outside += coverage(cavity - 1, pixel) * (fill - outside)
    belly = _abdomen(rng, f)
    outside += coverage(np.maximum(cavity, -diaphragm) - 0.5, pixel) * (belly - outside)
    _spine(outside, f, vertebra, spine_y)
    carina = (2.0, 0.12 * deep, root_z + 22)
    return Chest(outside, lung.astype(np.float32), -np.maximum(cavity, diaphragm), np.minimum(soft, -diaphragm),
                 roots, carina)


def _diaphragm(rng: np.random.Generator, f: Frame) -> Array:
    """``(S, H, W)`` signed distance (mm) to the diaphragm: one dome on each side, the right one higher.

    The recesses around the domes reach the lowest slices.
    """
    slope_x, slope_y = 0.55 * f.height / f.half_width**2, 0.5 * f.height / f.half_depth**2
    tops = (f.height * (0.33 - 0.13 * f.breath + rng.normal(0, 0.01)),
            f.height * (0.27 - 0.13 * f.breath + rng.normal(0, 0.01)))
    sides = []
    for sign, top in zip((-1, 1), tops, strict=True):
        dx, dy = f.x - sign * 0.42 * f.half_width, f.y + 0.5 * f.half_depth
        steep = np.sqrt(1 + (2 * slope_x * dx) ** 2 + (2 * slope_y * dy) ** 2)
        sides.append((top - slope_x * dx**2 - slope_y * dy**2 - f.z) / steep)
    return np.where(f.x < 0, *sides)


def _great_vessels(rng: np.random.Generator, f: Frame) -> Array:
    """``(S, H, W)`` signed distance (mm) to the aorta, rising, arched and descending, and the upper vena cava."""
    x, y, z, t, deep = f.x, f.y, f.z, f.t, f.half_depth
    arch_z = f.height * rng.uniform(0.68, 0.74)
    descending = np.where(z < arch_z, ellipse(x - 24, y - 0.45 * deep, 12, 12), 99.0)
    arch = np.maximum(bar(x, y, (-6, -0.3 * deep), (26, 0.4 * deep), 12), np.abs(z - arch_z) - 11)
    rising = np.where((z < arch_z) & (t > 0.4), ellipse(x + 10, y + 0.22 * deep, 16, 15), 99.0)
    cava = np.where(t > 0.45, ellipse(x + 26, y + 0.16 * deep, 9, 9), 99.0)
    return np.minimum.reduce([descending, arch, rising, cava])


def _chest_wall(rng: np.random.Generator, f: Frame, cavity: Array) -> Array:
    """``(S, H, W)`` HU of air, skin, fat, muscle, ribs, breastbone and shoulder blades."""
    x, y, z, pixel = f.x, f.y, f.z, f.spacing[1]
    shoulder = 26 * np.clip((f.t - 0.72) / 0.3, 0, 1)
    muscle = ellipse(x, y - 5, f.half_width + 14 + shoulder, f.half_depth + 17, 2.5)
    skin = ellipse(x, y - 5, f.half_width + 15 + f.fat + shoulder, f.half_depth + 18 + 0.8 * f.fat, 2.5)
    hu = np.full(f.shape, -1000.0, dtype=np.float32)
    hu += coverage(skin, pixel) * 1030
    hu += coverage(skin + 2.5, pixel) * (-105 - 30)
    streaks = np.clip(smooth_noise(rng, f.shape, f.spacing, 5) - 0.9, 0, 0.6) / 0.6  # fat between the muscles
    flesh = 50 - 130 * streaks * np.clip(cavity / 12, 0, 1)
    hu += coverage(muscle, 2 * pixel) * (flesh - hu)
    hu += coverage(cavity - 2.5, pixel) * (45 - hu)
    # Ribs: a shell around the cavity, cut by planes that fall from back to front.
    gap = 28.0
    phase = np.mod(z - 0.8 * y + 8 * np.sign(x) * rng.normal(0, 0.3), gap) - gap / 2
    front = np.clip((-y - 0.55 * f.half_depth) / 20, 0, 1) * (np.abs(x) < 55)
    rib = np.sqrt(((cavity - 7.5) / 4.2) ** 2 + (phase / 7.2) ** 2)
    bone = coverage((rib - 1) * 4, pixel)
    hu += bone * (np.where(rib > 0.6, 620, 240) - 380 * front - hu)  # cartilage in front
    sternum = ellipse(x, y + f.half_depth + 8, 19, 6.5)
    hu += coverage(sternum, pixel) * (np.where(sternum > -2.5, 480, 160) - hu) * (f.t > 0.25)
    for sign in (-1, 1):
        start = (sign * 0.52 * f.half_width, 1.07 * f.half_depth)
        end = (sign * 0.98 * f.half_width, 0.72 * f.half_depth)
        blade = np.maximum(bar(x, y, start, end, 3.2), -cavity + 9)
        blade = np.where(f.t > 0.55, blade, 99.0)
        hu += coverage(blade, pixel) * (np.where(blade > -1.5, 550, 300) - hu)
    table = np.abs(y - (f.half_depth + 27 + 0.8 * f.fat) + (x / 60) ** 2 * 3) - 1.2
    hu += coverage(table, pixel) * 500 * (hu < -900)
    return hu


def _spine(hu: Array, f: Frame, vertebra: Array, spine_y: float) -> None:
    """Draws the vertebrae into ``hu``: body with cortex, canal, arch and processes."""
    x, y, pixel = f.x, f.y, f.spacing[1]
    disc = np.abs(np.mod(f.z, 24.0) - 12) > 10
    spongy = np.where(disc, 95.0, 210.0)
    hu += coverage(vertebra, pixel) * (np.where((vertebra > -2.5) & ~disc, 520.0, spongy) - hu)
    back = spine_y + 26
    arch = np.minimum.reduce([
        ellipse(x, y - back, 15, 13), bar(x, y, (0, back + 8), (0, back + 30), 3.5),
        bar(x, y, (-34, back - 2), (-10, back), 4.0), bar(x, y, (34, back - 2), (10, back), 4.0)])
    hu += coverage(arch, pixel) * (np.where(disc, 250.0, 430.0) - hu)
    hu += coverage(ellipse(x, y - back + 1, 9.5, 8), pixel) * (25 - hu)


def _abdomen(rng: np.random.Generator, f: Frame) -> Array:
    """``(S, H, W)`` HU below the diaphragm: liver on the right; spleen and stomach on the left."""
    x, y, pixel = f.x, f.y, f.spacing[1]
    hu = np.full(f.shape, -85.0, dtype=np.float32)
    hu += coverage(x - 12, 6.0) * (rng.uniform(50, 65) - hu)
    hu += coverage(ellipse(x - 0.68 * f.half_width, y - 0.42 * f.half_depth, 36, 30), pixel) * (52 - hu)
    stomach = ellipse(x - 0.48 * f.half_width, y + 0.3 * f.half_depth, 42, 32)
    hu += coverage(stomach, pixel) * (30 - hu)
    if rng.random() < 0.5:  # air in the stomach lies in front: it fools a plain air threshold
        hu += coverage(np.maximum(stomach + 5, y + 0.42 * f.half_depth), pixel) * (-950 - hu)
    return hu


def lung_tissue(rng: np.random.Generator, f: Frame, tissue_hu: tuple[float, float], drift_hu: float) -> Array:
    """``(S, H, W)`` HU of healthy lung without vessels: breathing level, gravity and a smooth, patchy texture."""
    full, empty = tissue_hu
    base = full + (1 - f.breath) * (empty - full)
    gravity = rng.uniform(15, 45) * f.y / f.half_depth
    patches = 14 * smooth_noise(rng, f.shape, f.spacing, 18) + 10 * smooth_noise(rng, f.shape, f.spacing, 4)
    drift = drift_hu * smooth_noise(rng, (f.shape[0],), f.spacing[:1], 16)[:, None, None]
    return (base + drift + gravity + patches).astype(np.float32)


def apply_scanner(rng: np.random.Generator, f: Frame, hu: Array, noise_hu: tuple[float, float]) -> None:
    """The scanner, in place: reconstruction kernel (soft to sharp) and noise correlated by the same kernel."""
    sharp = rng.uniform(0, 1)
    blur = 0.75 - 0.35 * sharp  # pixels
    soft = ndimage.gaussian_filter(hu, (0, blur, blur))
    # A sharp kernel overshoots at edges.
    hu[...] = soft + 0.5 * sharp * (soft - ndimage.gaussian_filter(soft, (0, 1.2, 1.2)))
    white = rng.standard_normal(hu.shape, dtype=np.float32)
    grain = ndimage.gaussian_filter(white, (0, 0.9 - 0.4 * sharp, 0.9 - 0.4 * sharp))
    grain -= 0.8 * ndimage.gaussian_filter(white, (0, 3, 3))  # CT noise has little power at low frequencies
    # Shoulders take more X-rays away than the chest.
    strength = rng.uniform(*noise_hu) * (1 + 0.35 * np.clip((f.t - 0.75) / 0.25, 0, 1))
    hu += strength * grain / grain.std()
