"""Chapter 2: threshold lungs made robust: a small net learns what disease hides from the threshold.

A threshold finds healthy lungs well and loses consolidated ones, which are as bright as the chest wall. Slices
without a lesion have good threshold masks; consolidation painted into them (:mod:`covidseg.augment`) hides parts of a
lung whose true outline is known: it is the mask before painting. A net that sees the painted picture and is asked for
the unpainted mask learns to complete diseased lungs. Painted organs are the counter-example: bright as well, but even
and smooth, and no part of the lung.

Lesion-free slices tend to come from the ends of the lungs. A second generation therefore learns from all slices, those
with a lesion as the first generation completed them: there it meets the hilum and the heart. No mask drawn by hand
takes part. (DeCoVNet, too, trains its lung net on masks that no one drew: Wang et al., IEEE TMI 2020. Painting and the
second generation are added here.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import ndimage as ndi
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import PaintSettings, Places, jitter, paint_lesions, paint_organ, places
from covidseg.lungs import fill_holes
from covidseg.preprocess import Crops, WeakSet
from covidseg.training import Batch, Log, Training, from_first
from covidseg.unet import make_unet


@dataclass(frozen=True)
class LungNetSettings:
    """Settings of the lung net; lengths are fractions of the crop's side.

    Attributes:
        steps: Optimiser steps; 0 does without the net and keeps the threshold mask.
        again: Steps of the second generation, which starts afresh; 0 does without.
        size: Side of the crops that it works on, in pixels; a multiple of 16.
        channels: Channels of the U-Net's levels.
        batch: Slices a step.
        rate: Peak learning rate of AdamW.
        zoom: Crops are zoomed by up to this factor and its inverse: disease can hide the end of a lung.
        shift: Crops are shifted by up to this much.
        paint: What is painted.
        thick: Largest radius that is painted, as a multiple of the lung's largest depth. Thin rims of lung at the
            diaphragm get small blobs, or the net takes in the liver.
        organs: Probability that an organ is painted into a lung; it is cut out of the wanted mask.
        organ: Smallest and largest radius of an organ.
        keep: Threshold lung stays lung down to this probability of the net.
        add: What the threshold left out becomes lung from this probability on.
        add_thin: The same in slices with little lung, where liver and spleen look like consolidation.
        little: Slices with a smaller share of threshold lung have little.
        smallest: Components below this share of the largest are dropped.
        largest_hole: Larger holes are not filled: the dome of the liver.
    """

    steps: int = 600
    again: int = 0
    size: int = 160
    channels: tuple[int, ...] = (16, 32, 64, 128, 128)
    batch: int = 12
    rate: float = 3e-3
    zoom: float = 1.25
    shift: float = 0.1
    paint: PaintSettings = field(default_factory=lambda: PaintSettings(
        share=0.75, vessels=0.0, scattered=1.0, count=(1, 3), radius=(0.025, 0.31), faint=0.0, haze=(0.3, 0.3, 0.8),
        solid=(0.85, 1.08), solid_share=0.65, outer=50.0, depth=0.03))
    thick: float = 2.0
    organs: float = 0.4
    organ: tuple[float, float] = (0.04, 0.17)
    keep: float = 0.35
    add: float = 0.6
    add_thin: float = 0.7
    little: float = 0.18
    smallest: float = 0.04
    largest_hole: float = 0.01


def make_lung_net(settings: LungNetSettings) -> nn.Module:
    """A U-Net: ``(B, 1, s, s)`` normalised crops to ``(B, 1, s, s)`` logits."""
    return make_unet(1, settings.channels)


def _shrink(maps: np.ndarray, size: int) -> Tensor:
    """``(N, S, S)`` of any type to ``(N, 1, size, size)`` float32 by averaging."""
    return F.interpolate(torch.from_numpy(maps.astype(np.float32))[:, None], size=(size, size), mode="area")


def _move(maps: Tensor, settings: LungNetSettings, generator: torch.Generator) -> Tensor:
    """Zooms, stretches and shifts each slice of ``(B, C, S, S)`` at random, and mirrors half of the batches."""
    def uniform(limit: float, *shape: int) -> Tensor:
        return limit * (2 * torch.rand(len(maps), *shape, generator=generator) - 1)
    zoom = uniform(float(np.log(settings.zoom))).exp()
    grid = torch.zeros(len(maps), 2, 3)
    grid[:, 0, 0], grid[:, 1, 1] = zoom * (1 + uniform(0.15)), zoom
    grid[:, :, 2] = uniform(2 * settings.shift, 2)
    if bool(torch.randint(2, (1,), generator=generator)):
        grid[:, 0] *= -1
    return F.grid_sample(maps, F.affine_grid(grid.to(maps), list(maps.shape), align_corners=False),
                         padding_mode="border", align_corners=False)


def _window(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Another display window: gamma, and air or bone cut off at random, as in published pictures."""
    def uniform() -> Tensor:
        return torch.rand(len(pictures), 1, 1, 1, generator=generator)
    gamma = torch.exp(0.3 * torch.randn(len(pictures), 1, 1, 1, generator=generator))
    bent = pictures.clamp(min=0) ** gamma + pictures.clamp(max=0)
    low = 0.12 * uniform() * (uniform() < 0.5)
    return torch.minimum((bent - low).clamp(min=-0.3) / (1 - low), 1.5 - 0.6 * uniform())


@dataclass(frozen=True)
class _Lung:
    """One slice to learn from: picture and wanted mask ``(s, s)``, where its pixels lie, largest blob to be painted."""

    picture: np.ndarray
    mask: np.ndarray
    place: Places | None
    reach: float

    def painted(self, settings: LungNetSettings, random: np.random.Generator) -> np.ndarray:
        """Picture and wanted mask, ``(2, s, s)`` float32, with an organ and lesions painted in now and then."""
        picture, mask, smallest = self.picture, self.mask, settings.paint.radius[0]
        if self.place is not None and random.random() < settings.organs:
            picture, mask = paint_organ(picture, mask, settings.organ, random, self.place)
        # Slices from the ends of the lung are painted less often: there the liver is the common bright neighbour.
        if self.place is not None and mask.any() \
                and random.random() < settings.paint.share * min(1.0, 4 * self.mask.mean()):
            radii = replace(settings.paint, radius=(smallest, self.reach))
            picture, _ = paint_lesions(picture, mask, radii, random, self.place)
        return np.stack([picture, mask]).astype(np.float32)


def _lungs_of(crops: Crops, settings: LungNetSettings) -> list[_Lung]:
    """Slices in the size that the net works on."""
    pictures = _shrink(crops.images, settings.size)[:, 0].numpy()
    masks = _shrink(crops.lungs, settings.size)[:, 0].numpy() > 0.5
    smallest, largest = settings.paint.radius
    lungs = []
    for picture, mask in zip(pictures, masks, strict=True):
        depth = settings.thick * ndi.distance_transform_edt(mask).max() / settings.size
        lungs.append(_Lung(picture, mask, places(mask) if mask.any() else None,
                           max(1.2 * smallest, min(largest, depth))))
    return lungs


def train_lung_net(data: WeakSet, settings: LungNetSettings = LungNetSettings(), *, seed: int = 0,
                   device: torch.device = torch.device("cpu"), log: Log = print) -> nn.Module:
    """Trains the lung net: first on the lesion-free slices and their threshold masks, then on all slices.

    In the second generation the wanted masks of slices with a lesion are what the first one made of them. Half of each
    batch has a lesion then.

    Returns:
        The averaged net in evaluation mode: ``(B, 1, s, s)`` normalised crops to logits.
    """
    lesion_free, positive = (data.crops.take(np.flatnonzero(data.labels == label)) for label in (0, 1))
    pools = [_lungs_of(lesion_free, settings)]
    net = _train_generation("lungs", pools, settings, settings.steps, seed, device, log)
    if settings.again and len(positive):
        completed = from_first(lambda: robust_lungs(net, positive, settings).lungs)
        pools.append(_lungs_of(replace(positive, lungs=completed), settings))
        net = _train_generation("lungs-2", pools, settings, settings.again, seed + 1, device, log)
    return net


def _train_generation(name: str, pools: list[list[_Lung]], settings: LungNetSettings, steps: int, seed: int,
                      device: torch.device, log: Log) -> nn.Module:
    """Trains a net from scratch on slices that are drawn from each of the pools in turn."""
    training = Training(name, replace(settings, steps=steps), seed, device, log)
    net = training.begin(make_lung_net(settings))
    random = np.random.default_rng(training.seed)

    def make_batch() -> Batch:
        in_turn = itertools.islice(itertools.cycle(pools), training.own_batch())
        drawn = [pool[random.integers(len(pool))] for pool in in_turn]
        pairs = np.stack([lung.painted(settings, random) for lung in drawn])          # (B, 2, s, s)
        maps = _move(torch.from_numpy(pairs), settings, training.generator)
        maps = torch.cat([_window(maps[:, :1], training.generator), maps[:, 1:]], dim=1)
        return (jitter(maps, training.generator),)

    for (maps,) in training.prefetched(make_batch() for _ in range(steps)):           # (B, 2, s, s)
        picture, target = maps.split(1, dim=1)
        logits = training.run(net, picture)
        p = logits.sigmoid()
        overlap = 1 - (2 * (p * target).sum() + 1) / ((p + target).sum() + 1)         # soft Dice
        loss = F.binary_cross_entropy_with_logits(logits, target) + overlap
        training.step(loss, loss=loss)
    return training.averaged()


@torch.no_grad()
def lung_probabilities(net: nn.Module, crops: Crops, settings: LungNetSettings = LungNetSettings(), *,
                       batch: int = 16) -> np.ndarray:
    """Probability of lung of every pixel, averaged over the slice and its mirror image, ``(N, S, S)`` float32."""
    weight = next(net.parameters())
    result = np.zeros(crops.images.shape, np.float32)
    for start in range(0, len(crops), batch):
        part = slice(start, start + batch)
        inputs = _shrink(crops.images[part], settings.size).to(weight)
        p = 0.5 * (net(inputs).sigmoid() + net(inputs.flip(3)).sigmoid().flip(3))
        result[part] = F.interpolate(p, size=crops.images.shape[1:], mode="bilinear",
                                     align_corners=False)[:, 0].cpu().numpy()
    return result


def robust_lungs(net: nn.Module | None, crops: Crops, settings: LungNetSettings = LungNetSettings()) -> Crops:
    """The same crops with completed lungs.

    The net decides, with the threshold mask as its prior: see ``keep`` and ``add`` of :class:`LungNetSettings`.
    A slice of which nothing would be left keeps its threshold mask, and so do all of them without a net.
    """
    if net is None:
        return crops
    little = crops.lungs.mean(axis=(1, 2), keepdims=True) < settings.little
    limit = np.where(crops.lungs, settings.keep, np.where(little, settings.add_thin, settings.add))
    found = lung_probabilities(net, crops, settings) > limit
    lungs = crops.lungs.copy()
    for lung, mask in zip(lungs, found, strict=True):
        parts, _ = ndi.label(mask)
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        if not sizes.any():
            continue
        whole = mask & (sizes >= settings.smallest * sizes.max())[parts]
        lung[:] = fill_holes(whole, settings.largest_hole * mask.size)
    return Crops(crops.images, lungs, crops.boxes)
