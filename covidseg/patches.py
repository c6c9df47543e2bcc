"""Patches: the instances of the multiple-instance task, in both readings of the abstract's "5*5".

A map of patch numbers says which patch each pixel belongs to: squares of 5 x 5 pixels (:func:`square_ids`), or a grid
of 5 x 5 cells over every component of the coarse label (:func:`grid_ids`). Everything after it is the same for both:
quantities are averaged over patches (:func:`pool`) and spread back onto pixels (:func:`spread`), for all patches of all
slices at once.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage as ndi
from torch import Tensor

PATCH = 5


def square_ids(lungs: np.ndarray, patch: int = PATCH, share: float = 0.3,
               offset: tuple[int, int] = (0, 0)) -> np.ndarray:
    """Numbers of the squares of ``patch`` pixels that cover the lung.

    Args:
        lungs: ``(N, S, S)`` bool.
        share: a square with less lung is no instance.
        offset: rows and columns by which the grid is shifted.

    Returns:
        ``(N, S, S)`` int32: 0 outside, patches of each slice from 1 on.
    """
    rows, columns = ((np.arange(n) + shift) // patch for n, shift in zip(lungs.shape[1:], offset, strict=True))
    cells = rows[:, None] * (columns[-1] + 1) + columns
    return np.stack([_number(cells, lung, share) for lung in lungs]) if len(lungs) else lungs.astype(np.int32)


def grid_ids(lungs: np.ndarray, coarse: np.ndarray, grid: int = 5, patch: int = PATCH,
             share: float = 0.3) -> np.ndarray:
    """Numbers of ``grid * grid`` cells over the box of each coarse component, and of squares in the rest of the lung.

    Args:
        lungs: ``(N, S, S)`` bool.
        coarse: ``(N, S, S)`` bool, the coarse label "lesion".
        grid: cells a side; components too small for cells of 2 pixels keep their squares.
        patch, share: as of :func:`square_ids`.

    Returns:
        ``(N, S, S)`` int32: 0 outside, patches of each slice from 1 on.
    """
    result = square_ids(lungs, patch, share)
    for ids, lung, label in zip(result, lungs, coarse, strict=True):
        cells = ids.astype(np.int64)
        following = cells.max() + 1
        for box in ndi.find_objects(ndi.label(label)[0]):
            height, width = (part.stop - part.start for part in box)
            if min(height, width) >= 2 * grid:
                rows, columns = np.arange(height) * grid // height, np.arange(width) * grid // width
                cells[box] = following + rows[:, None] * grid + columns
                following += grid * grid
        ids[:] = _number(cells, lung, share)
    return result


def _number(cells: np.ndarray, lung: np.ndarray, share: float) -> np.ndarray:
    """Keeps cells with enough lung and numbers them from 1 on."""
    pixels = np.bincount(cells.ravel())
    inside = np.bincount(cells.ravel(), weights=lung.ravel())
    keep = (inside > 0) & (inside >= share * pixels)
    return np.where(keep, np.cumsum(keep), 0)[cells].astype(np.int32)


def pool(maps: Tensor, ids: Tensor, count: int) -> Tensor:
    """Mean of maps over each patch.

    Args:
        maps: ``(B, C, H, W)``.
        ids: ``(B, S, S)`` int64 patch numbers; if ``H < S``, every ``S / H``-th pixel is read.
        count: largest patch number.

    Returns:
        ``(B, count + 1, C)``, at least float32; entry 0 is what belongs to no patch, patches without a pixel are 0.
    """
    batch, channels, height = maps.shape[:3]
    step = ids.shape[-1] // height
    flat = ids[:, ::step, ::step] + (count + 1) * torch.arange(batch, device=ids.device)[:, None, None]
    flat = flat.reshape(-1)
    # Half precision would lose the small values of a long sum.
    values = maps.permute(0, 2, 3, 1).reshape(-1, channels).to(torch.promote_types(maps.dtype, torch.float32))
    sums = torch.zeros(batch * (count + 1), channels, device=maps.device, dtype=values.dtype).index_add(0, flat, values)
    sizes = torch.bincount(flat, minlength=len(sums)).clamp(min=1).to(values.dtype)
    return (sums / sizes[:, None]).reshape(batch, count + 1, channels)


def spread(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Patch values ``(N, P + 1)`` on the pixels of ``(N, S, S)`` patch numbers."""
    return np.take_along_axis(values, ids.reshape(len(ids), ids.shape[1] * ids.shape[2]), axis=1).reshape(ids.shape)


def patch_values(maps: np.ndarray, ids: np.ndarray, count: int | None = None, batch: int = 64) -> np.ndarray:
    """Mean of ``(N, S, S)`` maps over each patch, ``(N, P + 1)`` float32. See :func:`pool`."""
    count = int(ids.max(initial=0)) if count is None else count
    parts = [pool(torch.from_numpy(maps[k:k + batch].astype(np.float32))[:, None],
                  torch.from_numpy(ids[k:k + batch].astype(np.int64)), count)[..., 0]
             for k in range(0, len(ids), batch)]
    return torch.cat(parts).numpy() if parts else np.zeros((0, count + 1), np.float32)


def instances(ids: np.ndarray) -> np.ndarray:
    """Which of the numbers 0..P are patches of each slice, ``(N, P + 1)`` bool; 0 never is."""
    numbers = np.arange(int(ids.max(initial=0)) + 1)
    return (numbers > 0) & (numbers <= ids.max(axis=(1, 2))[:, None])
