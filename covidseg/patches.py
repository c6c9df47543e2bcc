"""Patches of 5 x 5 pixels: the instances of the multiple-instance task.

A slice is cut into a grid of squares. Every per-pixel quantity can be averaged on the squares, and every
per-patch quantity spread back onto the pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PATCH = 5


def patch_mean(maps: Tensor, patch: int = PATCH) -> Tensor:
    """Mean of ``(B, C, S, S)`` on each patch, ``(B, C, S/patch, S/patch)``.

    Raises:
        ValueError: the side is no multiple of the patch.
    """
    if maps.shape[-1] % patch or maps.shape[-2] % patch:
        raise ValueError(f"side {tuple(maps.shape[-2:])} is no multiple of the patch size {patch}")
    return F.avg_pool2d(maps, patch)


def patch_values(maps: Tensor, patch: int = PATCH) -> Tensor:
    """The raw pixels of each patch as channels: ``(B, C, S, S)`` to ``(B, C * patch**2, S/patch, S/patch)``."""
    return F.pixel_unshuffle(maps, patch)


def patch_lung(lungs: Tensor, patch: int = PATCH, share: float = 0.3) -> Tensor:
    """Which patches count as instances: those with at least ``share`` of lung. ``(B, 1, n, n)`` bool."""
    return patch_mean(lungs.float(), patch) >= share


def to_pixels(values: Tensor, size: int, *, smooth: bool = True) -> Tensor:
    """Spreads patch values ``(B, C, n, n)`` over the pixels, ``(B, C, size, size)``.

    Args:
        smooth: bilinear between patch centres; otherwise constant on each patch.
    """
    if smooth:
        return F.interpolate(values, size=(size, size), mode="bilinear", align_corners=False)
    return F.interpolate(values, size=(size, size), mode="nearest")


def admit_easiest(difficulty: Tensor, candidates: Tensor, pace: float) -> Tensor:
    """The easiest share ``pace`` of the candidate patches (self-paced learning: Kumar et al., NeurIPS 2010).

    Args:
        difficulty: any shape, small is easy.
        candidates: bool, same shape.
        pace: share in [0, 1].

    Returns:
        bool, same shape: candidates whose difficulty lies at or below the ``pace`` quantile.
    """
    if pace <= 0 or not bool(candidates.any()):
        return torch.zeros_like(candidates)
    scores = difficulty[candidates]
    k = max(1, round(pace * len(scores)))
    limit = scores.kthvalue(k).values
    return candidates & (difficulty <= limit)
