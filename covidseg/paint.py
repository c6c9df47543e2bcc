"""Painted lesions: exact pixel labels that nobody drew.

A lesion-free slice with a soft, textured blob painted into its lung looks much like one with ground glass or
consolidation, and the painter knows every pixel of it. Mixed into the segmenter's batches such slices show it what
a whole lesion and its edge are, which fine labels only hint at (the idea of learning lesions from normal scans:
Yao et al., IEEE TMI 2021, NormNet). No mask and no further label is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage as ndi
from torch import Tensor


@dataclass(frozen=True)
class PaintSettings:
    """How lesions are painted; sizes in pixels of the crop, levels on the normalised scale (0 air, 1 tissue).

    Attributes:
        share: share of the lesion-free slices of a batch that are painted; 0 switches painting off.
        count: fewest and most blobs a slice.
        radius: smallest and largest radius.
        haze: lowest and highest level of ground glass.
        solid: lowest and highest level of consolidation.
        solid_share: share of the blobs that are consolidation.
        pleura: how much likelier a blob starts at the lung's edge than deep inside.
    """

    share: float = 0.8
    count: tuple[int, int] = (1, 5)
    radius: tuple[float, float] = (3.0, 26.0)
    haze: tuple[float, float] = (0.12, 0.5)
    solid: tuple[float, float] = (0.5, 1.0)
    solid_share: float = 0.25
    pleura: float = 4.0


def paint_lesions(image: np.ndarray, lung: np.ndarray, settings: PaintSettings,
                  random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Paints lesions into the lung of a lesion-free slice.

    Air takes on the blob's brightness, vessels keep theirs: ``x + soft * level * (1 - x)``.

    Args:
        image: ``(S, S)`` normalised.
        lung: ``(S, S)`` bool, not empty.
        settings: what to paint.
        random: source of randomness.

    Returns:
        The painted picture, ``(S, S)`` float32, and its exact lesion mask, ``(S, S)`` bool.
    """
    depth = ndi.distance_transform_edt(lung)
    liking = np.where(lung, 1 + settings.pleura * np.exp(-depth / 6), 0).ravel().cumsum()
    texture = ndi.gaussian_filter(random.standard_normal(image.shape), 2.0)
    texture /= texture.std()
    warp = ndi.gaussian_filter(random.standard_normal(image.shape), 5.0)
    warp /= warp.std()
    rows, columns = np.indices(image.shape)
    painted, mask = image.astype(np.float32), np.zeros_like(lung)
    for _ in range(random.integers(settings.count[0], settings.count[1] + 1)):
        centre = int(np.searchsorted(liking, random.random() * liking[-1], side="right"))
        row, column = divmod(centre, image.shape[1])
        # Small lesions are commoner than large ones: the logarithm of the radius is uniform.
        radius = float(np.exp(random.uniform(*np.log(settings.radius))))
        angle, stretch = random.uniform(0, np.pi), random.uniform(1.0, 2.0)
        along = (rows - row) * np.sin(angle) + (columns - column) * np.cos(angle)
        across = (rows - row) * np.cos(angle) - (columns - column) * np.sin(angle)
        distance = np.hypot(along / np.sqrt(stretch), across * np.sqrt(stretch)) - radius + 0.25 * radius * warp
        solid = random.random() < settings.solid_share
        edge = random.uniform(0.5, 1.5) if solid else random.uniform(0.8, 3.0)
        soft = lung / (1 + np.exp(np.clip(distance / edge, -30, 30)))
        level = random.uniform(*(settings.solid if solid else settings.haze)) * (1 + 0.15 * texture)
        painted = painted + soft * np.clip(level, 0, 1) * np.clip(1 - painted, 0, None)
        mask |= soft > 0.5
    return painted.astype(np.float32), mask & lung


def paint_batch(maps: Tensor, free: Tensor, settings: PaintSettings, generator: torch.Generator) -> Tensor:
    """Paints a share of the lesion-free slices of a batch.

    Args:
        maps: ``(B, 4, S, S)`` picture, lung, target, weight; not changed.
        free: ``(B,)`` bool, slices without a lesion.
        settings: what to paint.
        generator: source of randomness.

    Returns:
        ``(B, 4, S, S)``, with new pictures and targets where a slice was painted.
    """
    maps = maps.clone()
    random = np.random.default_rng(int(torch.randint(2**31, (1,), generator=generator)))
    for k in torch.nonzero(free).flatten().tolist():
        lung = maps[k, 1].numpy() > 0
        if random.random() < settings.share and lung.any():
            picture, mask = paint_lesions(maps[k, 0].numpy(), lung, settings, random)
            maps[k, 0], maps[k, 2] = torch.from_numpy(picture), torch.from_numpy(mask).float()
    return maps
