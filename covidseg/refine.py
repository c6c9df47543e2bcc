"""Stage 6: a U-Net learns from the fine labels and refines them.

Fine labels are wrong in places, and wrong at random more often than in one direction; a network with a smooth
idea of a lesion averages such errors out. Doubtful pixels weigh less, slices without a lesion are exact, most of
them get lesions painted in (see :mod:`covidseg.paint`), and the averaged net of the last steps makes the
predictions. The same loop with radiologists' masks, and nothing painted, is the upper bound.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn

from covidseg.paint import PaintSettings, paint_batch
from covidseg.prepare import Crops, WeakSet
from covidseg.train import (
    Average,
    Log,
    Progress,
    augment,
    balanced_batches,
    learning_rate,
    net_input,
    seed_everything,
)


@dataclass(frozen=True)
class SegmenterSettings:
    """Settings of the segmenter.

    Attributes:
        channels: channels of the U-Net's levels.
        residual_units: convolution pairs a level.
        steps: optimiser steps.
        batch: slices a step, half of them with a lesion.
        rate: peak learning rate of AdamW.
        robustness: q of the generalised cross entropy (Zhang and Sabuncu, NeurIPS 2018, eq. 6): near 0 it is
            cross entropy, at 1 the mean absolute error, which forgives wrong labels.
        dice_weight: weight of the soft Dice loss.
        threshold: lesion from this probability on; below one half, since fine labels leave out doubtful rims.
        paint: lesions painted on lesion-free slices; a share of 0 leaves them out.
    """

    channels: tuple[int, ...] = (16, 32, 64, 128)
    residual_units: int = 1
    steps: int = 300
    batch: int = 12
    rate: float = 3e-3
    robustness: float = 0.7
    dice_weight: float = 0.5
    threshold: float = 0.4
    paint: PaintSettings = field(default_factory=PaintSettings)


def make_segmenter(settings: SegmenterSettings) -> nn.Module:
    """MONAI's U-Net: ``(B, 2, S, S)`` picture in the lung and lung, to ``(B, 1, S, S)`` logits."""
    return UNet(spatial_dims=2, in_channels=2, out_channels=1, channels=settings.channels,
                strides=(2,) * (len(settings.channels) - 1), num_res_units=settings.residual_units, norm="batch")


def robust_loss(logits: Tensor, target: Tensor, weight: Tensor, settings: SegmenterSettings) -> Tensor:
    """Weighted generalised cross entropy plus soft Dice over the batch.

    Args:
        logits: ``(B, 1, S, S)``.
        target: ``(B, 1, S, S)`` in [0, 1].
        weight: ``(B, 1, S, S)``, 0 leaves a pixel out.
    """
    p = logits.sigmoid()
    of_label = (target * p + (1 - target) * (1 - p)).clamp(1e-4, 1)     # probability given to the label
    q = settings.robustness
    entropy = (weight * (1 - of_label ** q) / q).sum() / weight.sum().clamp(min=1)
    overlap = (weight * p * target).sum()
    dice = 1 - (2 * overlap + 1) / ((weight * (p + target)).sum() + 1)
    return entropy + settings.dice_weight * dice


def train_segmenter(data: WeakSet, targets: np.ndarray, weights: np.ndarray,
                    settings: SegmenterSettings = SegmenterSettings(), *, seed: int = 0,
                    device: torch.device = torch.device("cpu"), log: Log = print) -> nn.Module:
    """Trains the segmenter on pixel targets.

    Args:
        data: slices; their labels balance the batches.
        targets: ``(N, S, S)`` bool or float in [0, 1].
        weights: ``(N, S, S)`` float32 in [0, 1].

    Returns:
        The averaged net in evaluation mode.
    """
    generator = seed_everything(seed)
    net = make_segmenter(settings).to(device)
    average = Average(net).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=1e-2)
    schedule = learning_rate(optimizer, settings.steps)
    progress = Progress("segmenter", settings.steps, 6, log)
    stacked = [torch.from_numpy(np.asarray(part, np.float32))
               for part in (data.crops.images, data.crops.lungs, targets, weights)]
    for step, index in enumerate(balanced_batches(data.labels, data.patients, settings.batch, settings.steps,
                                                  generator), start=1):
        maps = torch.stack([part[index] for part in stacked], dim=1)              # (B, 4, S, S)
        maps = paint_batch(maps, torch.from_numpy(data.labels)[index] == 0, settings.paint, generator)
        picture, lung, target, weight = augment(maps, generator).to(device).split(1, dim=1)
        logits = net(net_input(picture, lung))                                    # (B, 1, S, S)
        loss = robust_loss(logits, target, weight * lung, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(net)
        progress.step(step, loss=loss.item())
    return average.net.eval()


@torch.no_grad()
def lesion_probabilities(net: nn.Module, crops: Crops, *, batch: int = 16) -> np.ndarray:
    """Lesion probability of every pixel, averaged over the four flips, 0 outside the lung.

    Returns:
        ``(N, S, S)`` float32.
    """
    device = next(net.parameters()).device
    result = []
    for start in range(0, len(crops), batch):
        part = slice(start, start + batch)
        lung = torch.from_numpy(crops.lungs[part])[:, None].float().to(device)
        inputs = net_input(torch.from_numpy(crops.images[part])[:, None].to(device), lung)
        mean = torch.zeros_like(lung)
        for axes in ((), (2,), (3,), (2, 3)):
            mean += net(inputs.flip(axes)).sigmoid().flip(axes) / 4
        result.append((mean * lung)[:, 0].cpu())
    return torch.cat(result).numpy() if result else np.zeros((0, 0, 0), np.float32)
