"""What changes the pictures that nets learn from: flips and noise, pasted lesions, and paint.

Painted lesions and vessels: exact pixel labels that nobody drew.

A lesion-free slice with a soft, textured patch painted into its lung looks much like one with ground glass or
consolidation, and the painter knows every pixel of it. Mixed into training batches such slices show a net what a whole
lesion and its edge are, which slice labels only hint at (the idea of learning lesions from normal scans: Yao et al.,
IEEE TMI 2021, NormNet). No mask and no further label is used.

Vessels are painted for the opposite reason. Lesion-free slices tend to come from the ends of a lung, where vessels
are thin; the thick ones near the heart are as bright as consolidation, and a net that never saw them labelled healthy
takes them for it. Bright branches that grow from the mediastinum, labelled *no lesion*, teach it otherwise.

All lengths are fractions of the crop's side, so that a finer crop is painted alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage as ndi
from skimage.morphology import convex_hull_image
from torch import Tensor
from torch.nn import functional as F

from covidseg.preprocess import Crops


def augment(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips and transpositions of whole batches, and :func:`jitter`.

    Args:
        maps: ``(B, C, S, S)`` float; channel 0 is the picture, the others (lung, labels, weights) only move along.
    """
    flip_rows, flip_columns, turn = (bool(torch.randint(2, (1,), generator=generator)) for _ in range(3))
    if flip_rows:
        maps = maps.flip(2)
    if flip_columns:
        maps = maps.flip(3)
    if turn:
        maps = maps.transpose(2, 3)
    return jitter(maps, generator)


def jitter(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Random gain, offset and noise on the pictures, channel 0 of ``(B, C, S, S)``."""
    size = (len(maps), 1, 1, 1)
    gain = 1 + 0.1 * torch.randn(size, generator=generator)
    offset = 0.04 * torch.randn(size, generator=generator)
    noise = 0.03 * torch.rand(size, generator=generator) * torch.randn(maps[:, :1].shape, generator=generator)
    return torch.cat([maps[:, :1] * gain + offset + noise, maps[:, 1:]], dim=1)


def rescan(maps: Tensor, generator: torch.Generator, share: float = 1.0) -> Tensor:
    """Pictures as another scanner would show them: half get another kernel, half the noise of a lower dose.

    A soft reconstruction kernel blurs, a sharp one enhances edges, and fewer photons leave more noise, whose grain
    depends on the kernel. None of it says anything about lesions, and each hospital has its own.

    Args:
        maps: ``(B, C, S, S)`` float; only channel 0, the picture, changes.
        share: of the pictures that this may happen to at all.
    """
    if not share:
        return maps

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(len(maps), 1, 1, 1, generator=generator)
    picture = maps[:, :1]
    blurred = _blur(picture, uniform(0.3, 1.2))
    sharpened = picture + uniform() * (picture - blurred)
    other = torch.where(uniform() < 0.35, sharpened, blurred)
    picture = torch.where(uniform() < 0.5, other, picture)
    grain = torch.randn(picture.shape, generator=generator)
    grain = torch.lerp(grain, 2.3 * _blur(grain, torch.full((len(maps), 1, 1, 1), 0.7)), uniform())
    dose = 0.12 * uniform() ** 2 * (uniform() < 0.5)
    picture = picture + dose * grain
    if share < 1:
        picture = torch.where(uniform() < share, picture, maps[:, :1])
    return torch.cat([picture, maps[:, 1:]], dim=1)


def _blur(pictures: Tensor, sigma: Tensor) -> Tensor:
    """Each picture of ``(B, 1, S, S)`` blurred by a Gaussian of its own, ``sigma`` ``(B, 1, 1, 1)`` in pixels."""
    reach = 4
    x = torch.arange(-reach, reach + 1, dtype=pictures.dtype)
    kernel = torch.exp(-x ** 2 / (2 * sigma.to(x) ** 2))                               # (B, 1, 1, 9)
    kernel = kernel / kernel.sum(dim=3, keepdim=True)
    rows = F.pad(pictures, (reach,) * 4, mode="replicate").transpose(0, 1)             # (1, B, S + 8, S + 8)
    both = F.conv2d(F.conv2d(rows, kernel, groups=len(kernel)), kernel.transpose(2, 3), groups=len(kernel))
    return both.transpose(0, 1)


def paste_lesions(maps: Tensor, exact: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Moves fine-labelled lesions of some slices of a batch into its lesion-free slices.

    A U-Net sees the whole lung. Lesion-free slices look different as a whole, since they tend to come from the ends
    of the lungs, and a net that learns to recognise them finds no lesion in any slice that looks a little like them.
    Lesions of other slices in such lungs break that rule (copy-paste: Ghiasi et al., CVPR 2021).

    Args:
        maps: ``(B, 4, S, S)`` picture, lung, target, weight.
        exact: ``(B,)`` bool, the lesion-free slices.
        share: of them that get lesions.

    Returns:
        ``(B, 4, S, S)``; only picture and target of lesion-free slices differ.
    """
    sources = torch.nonzero(~exact)[:, 0]
    if not share or not len(sources):
        return maps
    maps = maps.clone()
    for k in torch.nonzero(exact)[:, 0]:
        if float(torch.rand((), generator=generator)) >= share:
            continue
        other = maps[sources[int(torch.randint(len(sources), (1,), generator=generator))]]     # (4, S, S)
        if bool(torch.randint(2, (1,), generator=generator)):
            other = other.flip(2)
        inside = (other[2] > 0.3) & (other[1] > 0) & (maps[k, 1] > 0)
        soft = F.avg_pool2d(inside[None].float(), 3, 1, 1, count_include_pad=False)[0]        # no seam to recognise
        maps[k, 0] = (1 - soft) * maps[k, 0] + soft * other[0]
        maps[k, 2] = torch.maximum(maps[k, 2], inside * other[2])
    return maps


# --- paint ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class PaintSettings:
    """What is painted on lesion-free slices. Levels are on the normalised scale: 0 air, 1 soft tissue.

    Attributes:
        share: Probability that a lesion-free slice of a batch gets lesions; 0 switches them off.
        vessels: Probability that it gets vessels, with or without lesions; 0 switches them off.
        scattered: Probability that lesions are separate blobs; otherwise they are one irregular field.
        count: Fewest and most blobs.
        radius: Smallest and largest radius of a blob.
        cover: Smallest and largest share of the lung that a field covers.
        faint: Share of the ground glass that is barely denser than lung.
        haze: Lowest, middle and highest level of ground glass; faint glass lies below the middle.
        solid: Lowest and highest level of consolidation.
        solid_share: Share of the blobs that are consolidation; a field has a solid core that often or more.
        outer: How much likelier a blob starts at the chest wall than deep inside.
        depth: Distance from the chest wall within which that holds.
        branches: Fewest and most vessels.
        thickness: Smallest and largest radius of a vessel at its root.
    """

    share: float = 0.85
    vessels: float = 0.75
    scattered: float = 0.5
    count: tuple[int, int] = (1, 5)
    radius: tuple[float, float] = (0.02, 0.19)
    cover: tuple[float, float] = (0.03, 0.7)
    faint: float = 0.2
    haze: tuple[float, float, float] = (0.08, 0.22, 0.58)
    solid: tuple[float, float] = (0.5, 1.0)
    solid_share: float = 0.3
    outer: float = 30.0
    depth: float = 0.04
    branches: tuple[int, int] = (2, 6)
    thickness: tuple[float, float] = (0.0075, 0.031)


NO_PAINT = PaintSettings(share=0.0, vessels=0.0)


@dataclass(frozen=True)
class Places:
    """Where in a lung a pixel lies, ``(S, S)`` float32 distances as fractions of the side.

    Attributes:
        depth: From the chest wall: the convex hull of both lungs.
        medial: From the mediastinum and heart: what the hull holds besides lung.
    """

    depth: np.ndarray
    medial: np.ndarray


def places(lung: np.ndarray) -> Places:
    """Measures the places in one lung mask, ``(S, S)`` bool, not empty."""
    side = len(lung)
    hull = convex_hull_image(lung)
    # The opening leaves out the thin gaps between a curved lung and its hull.
    between = ndi.binary_opening(hull & ~lung, iterations=max(1, side // 50))
    medial = ndi.distance_transform_edt(~between) if between.any() else np.full(lung.shape, side)
    return Places((ndi.distance_transform_edt(hull) / side).astype(np.float32), (medial / side).astype(np.float32))


def noise(random: np.random.Generator, side: int, grain: float) -> np.ndarray:
    """Smooth noise, ``(side, side)`` with mean 0 and deviation 1; its bumps are about ``grain * side`` wide."""
    cells = int(np.clip(round(1 / grain), 2, side))
    coarse = torch.from_numpy(random.standard_normal((1, 1, cells + 2, cells + 2)).astype(np.float32))
    field = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)[0, 0].numpy()
    return (field - field.mean()) / field.std()


def _step(distance: np.ndarray, edge: float) -> np.ndarray:
    """1 where ``distance`` is far below 0, 0 far above, with a soft edge of that width."""
    return 1 / (1 + np.exp(np.clip(distance / edge, -30, 30)))


def _haze(settings: PaintSettings, random: np.random.Generator) -> float:
    low, middle, high = settings.haze
    return random.uniform(low, middle) if random.random() < settings.faint else random.uniform(middle, high)


def _field(lung: np.ndarray, place: Places, settings: PaintSettings, texture: np.ndarray,
           random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """An irregular region that covers a random share of the lung: softness and level, ``(S, S)`` each."""
    side = len(lung)
    grain = random.uniform(0.04, 0.15)
    height = noise(random, side, grain) + 0.5 * noise(random, side, grain / 3)
    height += random.uniform(0, 2.5) * np.exp(-place.depth / random.uniform(0.025, 0.09))   # likes the chest wall,
    height -= random.uniform(0, 2.0) * np.exp(-place.medial / 0.05)                         # not the mediastinum,
    angle, (rows, columns) = random.uniform(0, 2 * np.pi), np.indices(lung.shape) / side - 0.5
    height += random.uniform(0, 4.0) * (rows * np.sin(angle) + columns * np.cos(angle))     # and one side
    share = np.exp(random.uniform(*np.log(settings.cover)))
    soft = lung * _step(np.quantile(height[lung], 1 - share) - height, random.uniform(0.05, 0.4))
    level = _haze(settings, random) * (1 + random.uniform(0.05, 0.3) * texture
                                       + random.uniform(0, 0.3) * noise(random, side, 0.1))
    if random.random() < max(settings.solid_share, 0.4) and settings.solid_share:
        inner = np.quantile(height[lung], 1 - share * random.uniform(0.05, 0.6))
        core = _step(inner - height, random.uniform(0.03, 0.2))
        level = level + core * np.clip(random.uniform(*settings.solid) - level, 0, 1)
    return soft, level


def _ellipse(shape: tuple[int, ...], row: int, column: int, radius: float, longest: float,
             random: np.random.Generator) -> np.ndarray:
    """Signed distance, in pixels, from a randomly turned ellipse of the area of a circle with that radius.

    Args:
        longest: largest ratio of its axes.
    """
    angle, stretch = random.uniform(0, np.pi), random.uniform(1.0, longest)
    rows, columns = np.indices(shape)
    along = (rows - row) * np.sin(angle) + (columns - column) * np.cos(angle)
    across = (rows - row) * np.cos(angle) - (columns - column) * np.sin(angle)
    return np.hypot(along / np.sqrt(stretch), across * np.sqrt(stretch)) - radius


def _blob(lung: np.ndarray, place: Places, settings: PaintSettings, texture: np.ndarray, warp: np.ndarray,
          random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A warped ellipse that likes the chest wall: softness and level, ``(S, S)`` each."""
    side = len(lung)
    liking = np.where(lung, 1 + settings.outer * np.exp(-place.depth / settings.depth), 0)
    liking = np.where(place.medial < 0.06, 0.3, 1) * liking
    total = liking.ravel().cumsum()
    row, column = divmod(int(np.searchsorted(total, random.random() * total[-1], side="right")), side)
    # Small lesions are commoner than large ones: the logarithm of the radius is uniform.
    radius = float(np.exp(random.uniform(*np.log(settings.radius)))) * side
    distance = _ellipse(lung.shape, row, column, radius, 2.0, random) + 0.3 * radius * warp
    solid = random.random() < settings.solid_share
    edge = (random.uniform(0.003, 0.009) if solid else random.uniform(0.005, 0.019)) * side
    level = (random.uniform(*settings.solid) if solid else _haze(settings, random)) * (1 + 0.15 * texture)
    return lung * _step(distance, edge), level


def paint_lesions(image: np.ndarray, lung: np.ndarray, settings: PaintSettings, random: np.random.Generator,
                  place: Places | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Paints lesions into the lung of a lesion-free slice.

    Air takes on the lesion's brightness, vessels keep theirs: ``x + soft * level * (1 - x)``.

    Args:
        image: ``(S, S)`` normalised.
        lung: ``(S, S)`` bool, not empty.
        settings: what to paint.
        random: source of randomness.
        place: from :func:`places`, if it is known already.

    Returns:
        The painted picture, ``(S, S)`` float32, and its exact lesion mask, ``(S, S)`` bool.
    """
    place = places(lung) if place is None else place
    side = len(lung)
    texture = noise(random, side, random.uniform(0.01, 0.03))
    if random.random() < settings.scattered:
        warp = noise(random, side, 0.07)
        parts = [_blob(lung, place, settings, texture, warp, random)
                 for _ in range(random.integers(settings.count[0], settings.count[1] + 1))]
    else:
        parts = [_field(lung, place, settings, texture, random)]
    painted, mask = image.astype(np.float32), np.zeros_like(lung)
    for soft, level in parts:
        painted = painted + soft * np.clip(level, 0, 1) * np.clip(1 - painted, 0, None)
        mask |= soft > 0.5
    return painted.astype(np.float32), mask & lung


def paint_vessels(image: np.ndarray, lung: np.ndarray, settings: PaintSettings, random: np.random.Generator,
                  place: Places | None = None) -> np.ndarray:
    """Paints bright branches that grow from the mediastinum into the lung; they are no lesions.

    Args:
        image: ``(S, S)`` normalised.
        lung: ``(S, S)`` bool, not empty.
        settings: what to paint.
        random: source of randomness.
        place: from :func:`places`, if it is known already.

    Returns:
        The painted picture, ``(S, S)`` float32.
    """
    place = places(lung) if place is None else place
    side = len(lung)
    roots = np.flatnonzero(lung & (place.medial < 0.05))
    if not len(roots):
        return image.astype(np.float32)
    # Away from the mediastinum is where its distance grows.
    down, right = np.gradient(ndi.gaussian_filter(np.minimum(place.medial, 0.4), side / 50))
    canvas = np.zeros(image.shape, np.float32)
    for _ in range(random.integers(settings.branches[0], settings.branches[1] + 1)):
        row, column = divmod(int(random.choice(roots)), side)
        angle = np.arctan2(down[row, column], right[row, column]) + random.normal(0, 0.6)
        radius, way = random.uniform(*settings.thickness) * side, random.uniform(0.05, 0.28) * side
        y, x = float(row), float(column)
        while way > 0 and 0 <= y < side and 0 <= x < side:
            reach = int(np.ceil(radius)) + 1
            window = (slice(max(0, round(y) - reach), round(y) + reach + 1),
                      slice(max(0, round(x) - reach), round(x) + reach + 1))
            rows, columns = np.ogrid[window[0].start:min(side, window[0].stop),
                                     window[1].start:min(side, window[1].stop)]
            disk = np.clip(radius + 0.5 - np.hypot(rows - y, columns - x), 0, 1)
            canvas[window] = np.maximum(canvas[window], disk)
            step = max(0.7, radius / 2)
            angle += random.normal(0, 0.12)
            y, x, way = y + step * np.sin(angle), x + step * np.cos(angle), way - step
            # It tapers, and now and then gives off a branch and goes on thinner.
            radius = max(0.6, radius * (1 - 3.2 * step / side) * (0.7 if random.random() < 0.04 else 1))
    canvas *= lung
    return (image * (1 - canvas) + canvas * np.maximum(image, random.uniform(0.8, 1.1))).astype(np.float32)


def paint_organ(image: np.ndarray, lung: np.ndarray, radius: tuple[float, float], random: np.random.Generator,
                place: Places | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Lets an organ bulge into a lung, as the dome of the liver and the heart do: bright, even, with a plain outline.

    Args:
        image: ``(S, S)`` normalised.
        lung: ``(S, S)`` bool, not empty.
        radius: smallest and largest, as fractions of the side.
        random: source of randomness.
        place: from :func:`places`, if it is known already.

    Returns:
        The painted picture, ``(S, S)`` float32, and what is left of the lung, ``(S, S)`` bool.
    """
    place = places(lung) if place is None else place
    side = len(lung)
    away = np.where(lung, np.clip(place.depth / 0.1, 0.1, 1), 0).ravel().cumsum()  # seldom at the chest wall
    row, column = divmod(int(np.searchsorted(away, random.random() * away[-1], side="right")), side)
    size = random.uniform(*radius) * side
    distance = _ellipse(lung.shape, row, column, size, 1.7, random)
    soft = _step(distance + 0.06 * size * noise(random, side, 0.3), random.uniform(0.004, 0.02) * side)
    level = random.uniform(0.88, 1.08) + 0.02 * noise(random, side, 0.02)
    painted = image * (1 - soft) + soft * np.maximum(image, level)
    return painted.astype(np.float32), lung & (soft < 0.5)


class Painter:
    """Paints the lesion-free slices of batches; measures each slice's :func:`places` once."""

    def __init__(self, crops: Crops, settings: PaintSettings) -> None:
        self.crops, self.settings = crops, settings
        self._places: dict[int, Places] = {}

    def __call__(self, maps: Tensor, index: Tensor, free: Tensor, generator: torch.Generator) -> Tensor:
        """Paints a batch.

        Args:
            maps: ``(B, 3 or more, S, S)`` picture, lung, lesion target, ...; not changed.
            index: ``(B,)`` numbers of the slices in the crops.
            free: ``(B,)`` bool, slices without a lesion; the others stay as they are.
            generator: source of randomness.

        Returns:
            Maps of the same shape, with new pictures and targets where a slice was painted.
        """
        settings = self.settings
        if not settings.share and not settings.vessels:
            return maps
        maps = maps.clone()
        random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
        for k in torch.nonzero(free).flatten().tolist():
            number = int(index[k])
            lung = self.crops.lungs[number]
            if not lung.any():
                continue
            if number not in self._places:
                self._places[number] = places(lung)
            picture, place = maps[k, 0].numpy(), self._places[number]
            if random.random() < settings.vessels:
                picture = paint_vessels(picture, lung, settings, random, place)
            if random.random() < settings.share:
                picture, mask = paint_lesions(picture, lung, settings, random, place)
                maps[k, 2] = torch.from_numpy(mask).float()
            maps[k, 0] = torch.from_numpy(picture)
        return maps
