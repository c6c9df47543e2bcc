"""What both systems share in training: settings, the interface of their nets, one loop.

The published schedules (Adam at 1e-5, batches of one volume, tens of thousands of steps) are kept as ``PUBLISHED`` in
each system's module. The defaults train from scratch in minutes, with the recipe of this project's own classifier, so
that a comparison compares methods: AdamW with one cycle, balanced batches, flips and gain, painted vessels, averaged
weights, as many slices seen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from covidseg.augment import Painter, PaintSettings, augment, jitter
from covidseg.baselines.slabs import Slabs, SlabSettings, aligned_set, make_slabs
from covidseg.errors import SettingsError, one_of
from covidseg.preprocess import WeakSet
from covidseg.training import Batch, Log, Training


@dataclass(frozen=True)
class BaselineSettings:
    """Settings that both systems have.

    Attributes:
        dims: 3 is the published net, on slabs; 2 its port to single slices.
        slab: How volumes are cut into slabs, in 3D only.
        steps: Optimiser steps.
        batch: Slices or slabs a step, half of them with a lesion.
        rate: Learning rate of AdamW, the peak of its cycle.
        weight_decay: Weight decay of AdamW; at 0 it is Adam.
        schedule: Learning rate along the training, ``onecycle`` or ``constant``.
        paint: Vessels painted on lesion-free slices, in 2D only. No lesion is painted.
        outline: Threshold of a lesion map, chosen on the slices that this project's own thresholds were chosen on.
    """

    dims: int = 2
    slab: SlabSettings = field(default_factory=SlabSettings)
    steps: int = 240
    batch: int = 12
    rate: float = 3e-3
    weight_decay: float = 1e-2
    schedule: str = "onecycle"
    paint: PaintSettings = field(default_factory=lambda: PaintSettings(share=0.0))
    outline: float = 0.3

    def __post_init__(self) -> None:
        if self.dims not in (2, 3):
            raise SettingsError(f"there is no net in {self.dims} dimensions", remedy="Choose 2 or 3")
        one_of(self.schedule, ("onecycle", "constant"), "schedule")
        if self.paint.share:
            raise SettingsError("lesions painted for a classifier would contradict its labels",
                                remedy="Set the share of its paint to 0; vessels may stay")


class Baseline(nn.Module):
    """A net of a published system.

    Its inputs are ``(B, 2, S, S)`` in 2D and ``(B, 2, T, S, S)`` in 3D: the normalised picture and the lung, 0 or 1.
    """

    settings: BaselineSettings

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """The published loss, a scalar; ``target`` ``(B,)`` float, 1 = with a lesion."""
        raise NotImplementedError

    def judge(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Probability of a lesion ``(B,)`` and an activation ``(B, 1, ...)`` on the net's own grid, not scaled."""
        raise NotImplementedError

    def outlines(self, maps: np.ndarray, images: np.ndarray, joint: bool) -> list[np.ndarray]:
        """The maps to outline lesions by, the last one the answer, from maps ``(N, S, S)`` scaled to [0, 1].

        ``joint`` says whether they were scaled as one volume.
        """
        return [maps]


Net = TypeVar("Net", bound=Baseline)


def augment_slabs(maps: Tensor, generator: torch.Generator) -> Tensor:
    """Random flips along all axes, transpositions in the plane, and gain, offset and noise of each slab.

    Of ``(B, C, T, S, S)`` float channel 0 is the picture; the others only move along.
    """
    flips = [axis for axis in (2, 3, 4) if bool(torch.randint(2, (1,), generator=generator))]
    maps = maps.flip(flips)
    if bool(torch.randint(2, (1,), generator=generator)):
        maps = maps.transpose(3, 4)
    b, c, t, s, _ = maps.shape
    return jitter(maps.reshape(b, c, t * s, s), generator).reshape(b, c, t, s, s)


Read = Callable[[Tensor, torch.Generator], Tensor]  # numbers of examples (B,) to the batch that a net is shown


def _slices(data: WeakSet, settings: BaselineSettings) -> tuple[WeakSet, Read]:
    """Single slices with painted vessels, ``(B, 2, S, S)``."""
    stacked = [torch.from_numpy(np.asarray(part, np.float32)) for part in (data.crops.images, data.crops.lungs)]
    free, painter = torch.from_numpy(data.labels) == 0, Painter(data.crops, settings.paint)

    def read(index: Tensor, generator: torch.Generator) -> Tensor:
        maps = torch.stack([part[index] for part in stacked], dim=1)
        return augment(painter(maps, index, free[index], generator), generator)
    return data, read


def _slabs(data: WeakSet, settings: BaselineSettings) -> tuple[Slabs, Read]:
    """Slabs, ``(B, 2, T, S, S)``. Vessels painted slice by slice would not go on in the next: none here."""
    slabs, stacked = make_slabs(data, settings.slab), aligned_set(data, settings.slab.size)
    return slabs, lambda index, generator: augment_slabs(
        stacked[:, torch.from_numpy(slabs.members)[index]].transpose(0, 1), generator)


def train_baseline(make: Callable[[], Net], data: WeakSet, settings: BaselineSettings, *, seed: int,
                   device: torch.device, log: Log, name: str) -> Net:
    """Trains a net on slice labels, or on the labels of slabs: the averaged net, in evaluation mode.

    ``make`` makes the untrained net and is called after the seed is set; ``name`` stands in the log.

    Raises:
        DatasetError: one of the two classes has no slab.
    """
    training = Training(name, settings, seed, device, log, weight_decay=settings.weight_decay,
                        cycle=settings.schedule == "onecycle")
    net = training.begin(make())
    examples, read = _slices(data, settings) if settings.dims == 2 else _slabs(data, settings)
    labels = torch.from_numpy(examples.labels).float()

    def make_batch(index: Tensor) -> Batch:
        return read(index, training.generator), labels[index]

    for maps, label in training.batches(make_batch, examples):   # (B, 2, S, S) or (B, 2, T, S, S), (B,)
        loss = net.loss(maps, label)
        training.step(loss, loss=loss)
    return training.averaged()
