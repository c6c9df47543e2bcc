"""The training loops as one writes them first: prepare a batch, then compute, one after the other, nothing tuned.

Same draws, same losses, same optimiser as in :mod:`covidseg.classifier` and :mod:`covidseg.segmenter`, so the nets come
out the same up to rounding. They are here to be compared with.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from covidseg.augment import Painter, augment, paste_lesions
from covidseg.classifier import Classifier, ClassifierSettings
from covidseg.preprocess import WeakSet, net_input
from covidseg.segmenter import SegmenterSettings, exact_loss, make_segmenter, robust_loss
from covidseg.training import Average, balanced_batches, learning_rate, seed_everything


def plain_classifier(data: WeakSet, settings: ClassifierSettings, device: torch.device) -> nn.Module:
    """The loop of :func:`covidseg.classifier.train_classifier` without a lesson."""
    generator = seed_everything(0)
    net = Classifier(settings).to(device)
    average = Average(net).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=1e-2)
    schedule = learning_rate(optimizer, settings.steps)
    stacked = [torch.from_numpy(np.asarray(part, np.float32)) for part in (data.crops.images, data.crops.lungs)]
    labels = torch.from_numpy(data.labels).float()
    painter = Painter(data.crops, settings.paint)
    for index in balanced_batches(data.labels, data.patients, settings.batch, settings.steps, generator):
        maps = painter(torch.stack([part[index] for part in stacked], dim=1), index, labels[index] == 0, generator)
        maps = augment(maps, generator).to(device)
        inputs, target = net_input(maps[:, :1], maps[:, 1:2]), labels[index].to(device)
        evidence = net.maps(inputs)
        loss = F.binary_cross_entropy_with_logits(net.pool(evidence, inputs[:, 1:])[:, 0], target)
        part = max(1, len(inputs) // 3)
        flipped = net.maps(inputs[:part].flip(3)).flip(3)
        loss = loss + settings.flip_weight * (evidence[:part].sigmoid() - flipped.sigmoid()).abs().mean()
        outside = 1 - F.adaptive_max_pool2d(inputs[:, 1:], evidence.shape[-2:])
        loss = loss + settings.outside_weight * (evidence.sigmoid() * outside).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(net)
        loss.item()
    return average.net.eval()


def plain_segmenter(data: WeakSet, targets: np.ndarray, weights: np.ndarray, settings: SegmenterSettings,
                    device: torch.device) -> nn.Module:
    """The loop of :func:`covidseg.segmenter.train_segmenter` without refreshed labels."""
    generator = seed_everything(0)
    net = make_segmenter(settings).to(device)
    average = Average(net).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=1e-2)
    schedule = learning_rate(optimizer, settings.steps)
    painter = Painter(data.crops, settings.paint)
    stacked = [torch.from_numpy(np.array(part, np.float32))
               for part in (data.crops.images, data.crops.lungs, targets, weights)]
    for index in balanced_batches(data.labels, data.patients, settings.batch, settings.steps, generator):
        exact = torch.from_numpy(data.labels)[index] == 0
        maps = painter(torch.stack([part[index] for part in stacked], dim=1), index, exact, generator)
        maps = paste_lesions(maps, exact, settings.paste, generator)
        picture, lung, target, weight = augment(maps, generator).to(device).split(1, dim=1)
        logits = net(net_input(picture, lung))
        loss = exact_loss(logits[exact], target[exact], lung[exact], settings)
        loss_fine = robust_loss(logits[~exact], target[~exact], (weight * lung)[~exact], settings)
        optimizer.zero_grad()
        (loss + settings.fine_weight * loss_fine).backward()
        optimizer.step()
        schedule.step()
        average.update(net)
        loss.item()
    return average.net.eval()
