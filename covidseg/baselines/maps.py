"""From a trained net to one probability and one map a slice, for volumes and for unrelated slices.

The nets run in evaluation mode whatever state they come in: with batch normalisation left in training mode, as in
AD3D-MIL's public test script, a verdict would depend on what else is in the batch.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covidseg.baselines.slabs import aligned, frame, move, windows
from covidseg.baselines.training import Baseline
from covidseg.preprocess import Crops

BATCH = 8  # slices or slabs a pass


def lesion_maps(net: Baseline, crops: Crops, *, volume: bool = True) -> tuple[np.ndarray, list[np.ndarray]]:
    """What a net says of slices, and a lesion map for each way in which it outlines lesions, the last one its answer.

    The maps of a volume are scaled as a whole; those of other slices, and of a 2D net, each by itself. The arguments
    are those of :func:`judge_crops`.

    Returns:
        Probability of a lesion of each slice ``(N,)``; maps ``(N, S, S)`` float32 in [0, 1], 0 outside the lung.
    """
    probability, activation = judge_crops(net, crops, volume=volume)
    joint = net.settings.dims == 3 and volume
    return probability, net.outlines(min_max(activation.clip(0), crops.lungs, joint), crops.images, joint)


@torch.no_grad()
def judge_crops(net: Baseline, crops: Crops, *, volume: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Runs a net over slices. A 3D net reads slabs; what overlapping slabs say about a slice is averaged.

    Args:
        net: of either system.
        crops: ``N`` slices; for a 3D net and ``volume`` they are one volume in order.
        volume: for a 3D net: False makes a slab of every slice by repeating it, for slices that are no volume.

    Returns:
        Probability of a lesion of each slice ``(N,)`` and its activation ``(N, S, S)``, both float32; the activation
        is not scaled yet, and 0 outside the lung.
    """
    count, side = len(crops), crops.images.shape[-1]
    if not count:
        return np.zeros(0, np.float32), np.zeros(crops.images.shape, np.float32)
    was_training = net.training
    net.eval()
    if net.settings.dims == 2:
        stacked = torch.stack([torch.from_numpy(np.asarray(part, np.float32)) for part in (crops.images, crops.lungs)])
        groups = np.arange(count)[:, None]                                               # (N, 1)
        frames = crops.boxes
    else:
        slab = net.settings.slab
        alone = np.repeat(np.arange(count)[:, None], slab.depth, axis=1)
        groups = windows(count, slab.depth, slab.step) if volume else alone              # (M, T)
        frames = np.tile(frame(crops.boxes), (count, 1)) if volume else crops.boxes
        stacked = aligned(crops, frames, slab.size)                                      # (2, N, s, s)
    verdicts, sums, seen = torch.zeros(count), torch.zeros_like(stacked[0]), torch.zeros(count)
    for start in range(0, len(groups), BATCH):
        index = torch.from_numpy(groups[start:start + BATCH])                            # (B, T)
        p, activation = _judge(net, stacked[:, index].transpose(0, 1))                   # (B,), (B, T, s, s)
        flat = index.flatten()
        verdicts.index_add_(0, flat, p.repeat_interleave(index.shape[1]))
        sums.index_add_(0, flat, activation.flatten(0, 1))
        seen.index_add_(0, flat, torch.ones(len(flat)))
    net.train(was_training)
    sums /= seen[:, None, None]
    if net.settings.dims == 3:
        sums = move(sums, frames, crops.boxes, side)
    return (verdicts / seen).numpy(), sums.numpy() * crops.lungs


def _judge(net: Baseline, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Probability ``(B,)`` and activation enlarged to the input, ``(B, T, s, s)``, from ``(B, 2, T, s, s)``."""
    flat = net.settings.dims == 2
    p, activation = net.judge((maps[:, :, 0] if flat else maps).to(next(net.parameters()).device))
    size = list(maps.shape[3:] if flat else maps.shape[2:])
    large = F.interpolate(activation, size=size, mode="bilinear" if flat else "trilinear", align_corners=False)
    return p.cpu(), (large if flat else large[:, 0]).cpu()


def parts(maps: np.ndarray, joint: bool) -> list[slice]:
    """The whole of ``(N, S, S)`` as one part, or each slice as a part of its own; no slice, no part."""
    return [slice(0, len(maps))] if joint and len(maps) else [slice(k, k + 1) for k in range(len(maps))]


def min_max(maps: np.ndarray, lungs: np.ndarray, joint: bool) -> np.ndarray:
    """Scales maps ``(N, S, S)`` to [0, 1] by their least and greatest value in the lung, jointly or slice by slice.

    Returns:
        ``(N, S, S)`` float32, 0 outside the lung and wherever a map is even.
    """
    result = np.zeros(maps.shape, np.float32)
    for part in parts(maps, joint):
        inside = maps[part][lungs[part]]
        if len(inside) and inside.min() < inside.max():
            scaled = (maps[part] - inside.min()) / (inside.max() - inside.min())
            result[part] = np.clip(scaled, 0, 1) * lungs[part]
    return result
