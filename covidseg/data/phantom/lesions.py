"""Lesions of the phantom, and the look-alikes that are none.

A lesion is an ellipsoid with a warped boundary and a soft edge. It acts on the lung tissue only: vessels are
drawn over it and bronchi stay open inside it, which is what tells ground glass from a blurred picture, and what
makes air bronchograms in consolidation. Look-alikes raise the density of lesion-free lung in the ways that
occur in healthy people: blood sinks to the back, vessels crowd at the base, hearts beat.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import ndimage
from scipy.spatial import cKDTree

from covidseg.data.phantom.anatomy import Array, Chest, Frame, smooth_noise
from covidseg.data.phantom.settings import PhantomSettings

NONE, GROUND_GLASS, CONSOLIDATION, CRAZY_PAVING = 0, 1, 2, 3
BY_DENSITY = (NONE, GROUND_GLASS, CRAZY_PAVING, CONSOLIDATION)
# A slice counts as positive from this lesion area on: 10 pixels of 1.35 mm. Less is removed, from the image too.
MIN_LESION_AREA_MM2 = 18.0
IN_PLANE = np.array([np.zeros((3, 3)), np.ones((3, 3)), np.zeros((3, 3))])  # neighbours in the same slice


class Lesions(NamedTuple):
    """All lesions of one patient, each array ``(S, H, W)``."""

    tissue: Array  # float32, HU of the lung tissue after the lesions
    mask: Array    # bool
    kind: Array    # uint8, 0 outside the mask


def add_lesions(rng: np.random.Generator, settings: PhantomSettings, f: Frame, chest: Chest,
                tissue: Array) -> Lesions:
    """Adds lesions to the lung tissue ``(S, H, W)`` HU until they fill the patient's share of the lungs.

    Only a run of neighbouring slices is involved, so that some slices of every patient stay free.
    """
    lung = chest.lung < 0
    slices = f.shape[0]
    run = max(2, round(slices * rng.uniform(*settings.involved)))
    start = min(int((slices - run) * rng.beta(1.4, 2.0)), slices - run)  # rather low than high in the lungs
    involved = np.zeros(slices, dtype=bool)
    involved[start:start + run] = True

    # Where lesions like to start: near the chest wall, towards the back.
    depth = np.clip(chest.pleura, 0, None)
    back = np.clip((f.y / f.half_depth + 0.6) / 1.2, 0, 1)
    liking = np.exp(-depth / 9) * (0.15 + back**1.5) + 0.008
    liking = np.where(lung & involved[:, None, None], liking, 0).ravel()
    steps = np.cumsum(liking, dtype=np.float64)

    goal = rng.uniform(*settings.lesion_share) * (lung & involved[:, None, None]).sum()
    crazy_share, solid_share = settings.dense_share * rng.dirichlet((1.3, 1.3))  # patients lean to one pattern
    warp = smooth_noise(rng, f.shape, f.spacing, 6) + 0.5 * smooth_noise(rng, f.shape, f.spacing, 2.5)
    texture = smooth_noise(rng, f.shape, f.spacing, 3.5)
    net = _network(rng, f, lung)
    amount = np.zeros(f.shape, dtype=np.float32)
    change = np.zeros(f.shape, dtype=np.float32)  # HU added where the lesions fill the voxel
    rank = np.zeros(f.shape, dtype=np.uint8)  # position of the voxel's kind in BY_DENSITY
    for _ in range(80):
        centre = int(np.searchsorted(steps, rng.random() * steps[-1], side="right"))
        draw = rng.random()
        sort = CRAZY_PAVING if draw < crazy_share else CONSOLIDATION if draw < crazy_share + solid_share \
            else GROUND_GLASS
        size = float(np.clip(rng.lognormal(2.5, 0.55), 4, 30))  # half of 8 to 60 mm
        edge = rng.uniform(0.8, 1.8) if sort == CONSOLIDATION else rng.uniform(*settings.edge_mm)
        target, spread = _density(rng, settings, sort)
        box, inside = _blob(rng, f, centre, size, edge, warp)
        inside = inside * involved[box[0], None, None]
        looks = target + spread * texture[box] + (net[box] * rng.uniform(170, 260) if sort == CRAZY_PAVING else 0)
        _put(change, rank, box, inside, looks - tissue[box], sort)
        np.maximum(amount[box], inside, out=amount[box])
        if sort == GROUND_GLASS and size > 9 and rng.random() < settings.core_share:  # a consolidated core
            core_box, core = _blob(rng, f, centre, 0.45 * size, 1.5, warp)
            solid = rng.uniform(*settings.consolidation_hu) + 25 * texture[core_box]
            _put(change, rank, core_box, core * amount[core_box], solid - tissue[core_box], CONSOLIDATION)
        if ((amount > 0.5) & lung).sum() >= goal:
            break
    # The reader's outline follows the lesion with the wobble of a hand.
    wobble = 0.5 + settings.reader_wobble * smooth_noise(rng, f.shape, f.spacing, 4)
    mask = (amount > np.clip(wobble, 0.15, 0.85)) & lung
    mask &= _large(mask, mask, f.spacing, MIN_LESION_AREA_MM2 / 3)  # no reader outlines a speck
    # Every slice has either a clear lesion or none at all. Lesions are judged slice by slice together with their soft
    # surroundings: a soft edge whose middle lies in another slice would be neither a lesion nor its absence.
    keep = _large(amount > 0.02, mask, f.spacing, MIN_LESION_AREA_MM2)
    mask &= keep
    kinds = np.array(BY_DENSITY, dtype=np.uint8)[rank]
    kinds[kinds == NONE] = GROUND_GLASS  # the outermost rim, where the outline strays outwards
    return Lesions(tissue + change * keep, mask, np.where(mask, kinds, NONE).astype(np.uint8))


def _put(change: Array, rank: Array, box: tuple[slice, slice, slice], inside: Array, rise: Array, sort: int) -> None:
    """Blends one lesion into ``change`` (HU) and ``rank``. Where lesions overlap, the denser one is seen."""
    change[box] = np.maximum(change[box], change[box] + inside * (rise - change[box]))
    rank[box] = np.where(inside > 0.5, np.maximum(rank[box], BY_DENSITY.index(sort)), rank[box])


def _density(rng: np.random.Generator, settings: PhantomSettings, sort: int) -> tuple[float, float]:
    """Mean HU of one lesion and the HU spread of its texture."""
    if sort == CONSOLIDATION:
        return rng.uniform(*settings.consolidation_hu), 25.0
    if sort == CRAZY_PAVING:
        return rng.uniform(*settings.crazy_paving_hu), 30.0
    if rng.random() < settings.faint_share:
        return rng.uniform(*settings.faint_hu), 25.0
    return rng.uniform(*settings.ground_glass_hu), 40.0


def _blob(rng: np.random.Generator, f: Frame, centre: int, size: float, edge: float,
          warp: Array) -> tuple[tuple[slice, slice, slice], Array]:
    """A warped ellipsoid around a voxel: its box, and how far it fills each voxel of the box, 0..1.

    Near the chest wall it lies flat against it, as subpleural lesions do.
    """
    k, i, j = np.unravel_index(centre, f.shape)
    reach = 1.5 * size + 2 * edge
    half = [int(np.ceil(reach / step)) for step in f.spacing]
    box = tuple(slice(max(c - h, 0), c + h + 1) for c, h in zip((k, i, j), half, strict=True))
    x, y, z = f.x[box] - f.x[k, i, j], f.y[box] - f.y[k, i, j], f.z[box[0]] - f.z[k]
    # Unit normal of the chest wall (an ellipse) at the centre.
    normal = np.array([f.x[k, i, j] / f.half_width**2, f.y[k, i, j] / f.half_depth**2])
    normal /= np.linalg.norm(normal) + 1e-9
    across, along = x * normal[0] + y * normal[1], y * normal[0] - x * normal[1]
    flat, tall = rng.uniform(0.4, 0.95), rng.uniform(0.6, 1.2)
    level = np.sqrt((along / size) ** 2 + (across / (flat * size)) ** 2 + (z / (tall * size)) ** 2)
    distance = (level - 1) * size * flat + warp[box] * min(0.22 * size, 4.0)
    inside = 1 / (1 + np.exp(np.clip(distance / (0.5 * edge), -30, 30)))
    # It does not cross to the other lung. What reaches beyond its own lung is never drawn.
    same_side = f.x[box] * f.x[k, i, j] > 0
    return box, (inside * same_side).astype(np.float32)  # type: ignore[return-value]


def _network(rng: np.random.Generator, f: Frame, lung: Array) -> Array:
    """Thickened septa of crazy paving: the edges of irregular cells of some 7 mm, 0..1, as ``(S, H, W)``."""
    net = np.zeros(f.shape, dtype=np.float32)
    for k in range(f.shape[0]):
        pixels = np.argwhere(lung[k]) * f.spacing[1]
        if len(pixels) == 0:
            continue
        low, high = pixels.min(axis=0), pixels.max(axis=0)
        seeds = rng.uniform(low, high, (int(np.prod((high - low) / 7.5)) + 2, 2))
        gap = cKDTree(seeds).query(pixels, k=2)[0]
        net[k][lung[k]] = np.clip(1.3 - (gap[:, 1] - gap[:, 0]) / 1.6, 0, 1)
    return net


def _large(where: Array, mask: Array, spacing: tuple[float, float, float], least: float) -> Array:
    """``(S, H, W)`` bool: the parts of ``where``, slice by slice, that hold at least so many mm^2 of the mask."""
    parts, count = ndimage.label(where, structure=IN_PLANE)
    large = np.bincount(parts.ravel(), weights=mask.ravel(), minlength=count + 1) * spacing[1] * spacing[2] >= least
    large[0] = False
    return large[parts]


def dependent_density(rng: np.random.Generator, settings: PhantomSettings, f: Frame, lung: Array) -> Array:
    """Look-alike: HU added in a band at the back, where blood sinks in a patient lying down, ``(S, H, W)``."""
    # Depth above the back wall: lung pixels of the same column further back. It is smoothed, as columns differ.
    depth = np.cumsum(lung[:, ::-1], axis=1)[:, ::-1] * f.spacing[1]
    depth = ndimage.gaussian_filter(depth.astype(np.float32), (0, 2, 2))
    band = np.exp(-(depth / rng.uniform(10, 28)) ** 1.5) * np.clip((f.y / f.half_depth + 0.1) / 0.45, 0, 1)
    ends = rng.uniform(0.0, 0.25), rng.uniform(0.5, 0.95)
    where = np.clip((f.t - ends[0]) / 0.1 + 0.5, 0, 1) * np.clip((ends[1] - f.t) / 0.15 + 0.5, 0, 1)
    uneven = np.clip(1 + 0.35 * smooth_noise(rng, f.shape, f.spacing, 12), 0.2, 1.8)
    return (rng.uniform(*settings.dependent_hu) * band * where * uneven).astype(np.float32)


def nodules(rng: np.random.Generator, f: Frame, chest: Chest) -> tuple[Array, list[int]]:
    """Look-alike: a few crisp nodules of 4 to 8 mm; share of each voxel, ``(S, H, W)`` 0..1, and their slices."""
    share = np.zeros(f.shape, dtype=np.float32)
    places = np.argwhere((chest.lung < -5) & (chest.lung > -30))
    slices = []
    for k, i, j in places[rng.integers(0, len(places), rng.integers(2, 7))]:
        radius = rng.uniform(2.0, 4.0)
        gap = np.hypot(f.x[k] - f.x[k, i, j], f.y[k] - f.y[k, i, j]) - radius
        np.maximum(share[k], np.clip(0.5 - gap / f.spacing[1], 0, 1), out=share[k])
        slices.append(int(k))
    return share, slices


def blur_motion(rng: np.random.Generator, f: Frame, hu: Array, heart: Array, k: int) -> None:
    """Look-alike: slice ``k`` is doubled in place by a beating heart or a breath, most next to heart and diaphragm."""
    angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(4, 8) / f.spacing[1]
    shift = (length * np.sin(angle), length * np.cos(angle))
    ghost = ndimage.shift(hu[k], shift, order=1, mode="nearest")
    middle = ndimage.shift(hu[k], (shift[0] / 2, shift[1] / 2), order=1, mode="nearest")
    weight = np.exp(-np.clip(heart[k], 0, None) / 35)
    hu[k] += weight * (0.35 * ghost + 0.3 * middle + 0.35 * hu[k] - hu[k])
