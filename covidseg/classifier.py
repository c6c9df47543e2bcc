"""Stage 2: a classifier that says whether a slice shows a lesion. Its labels are the only supervision there is.

A plain convolutional trunk of stride 8, so that the map that Grad-CAM reads is fine enough to show where. It is short
on purpose: each cell of the evidence map sees 43 pixels of the slice and no more. A net that sees the whole lung can
tell the class by the shape of lung and heart, since lesion-free slices tend to come from the ends of the lungs; its
labels come out right and its maps point nowhere. (Evidence from small windows: Brendel and Bethge, ICLR 2019, BagNet.)
The evidence is pooled inside the lung only; half mean, half log-sum-exp, so that a small lesion counts as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import Painter, PaintSettings, augment
from covidseg.errors import SettingsError
from covidseg.parallel import average_gradients
from covidseg.preprocess import Crops, WeakSet, net_input, net_maps
from covidseg.training import (
    Average,
    Batch,
    Log,
    Progress,
    balanced_batches,
    learning_rate,
    on_device,
    overlapped,
    run_net,
    seed_everything,
)


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of the classifier.

    Attributes:
        width: channels after the stem; doubles with each stride.
        steps: optimiser steps.
        batch: slices a step, half of them with a lesion.
        rate: peak learning rate of AdamW.
        temperature: of the log-sum-exp pooling; larger looks at fewer pixels.
        flip_weight: weight of the loss that asks the evidence map to move along when the picture is flipped.
        outside_weight: weight of the loss that keeps evidence inside the lung.
        members: classifiers in the committee, see :class:`Committee`.
        paint: vessels painted on lesion-free slices, which mostly come from the ends of the lungs: without them the
            net learns that thick vessels mean a lesion. No lesion is painted for the classifier.
    """

    width: int = 16
    steps: int = 240
    batch: int = 12
    rate: float = 3e-3
    temperature: float = 1.0
    flip_weight: float = 0.5
    outside_weight: float = 0.1
    members: int = 1
    paint: PaintSettings = field(default_factory=lambda: PaintSettings(share=0.0))

    def __post_init__(self) -> None:
        if self.members < 1:
            raise SettingsError("a committee needs at least one classifier", remedy="Set members to 1 or more")
        if self.paint.share:
            raise SettingsError("lesions painted for the classifier would contradict its slice labels",
                                remedy="Set the share of its paint to 0; vessels may stay")


@dataclass(frozen=True)
class Lesson:
    """What the patches teach the classifier.

    Attributes:
        teacher: ``(N, S, S)`` float32, probability of a lesion.
        taught: ``(N, S, S)`` bool, the pixels of the lesson.
        weight: of the lesson's loss.
    """

    teacher: np.ndarray
    taught: np.ndarray
    weight: float


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Classifier(nn.Module):
    """Slice classifier with an evidence map.

    ``forward`` takes ``(B, 2, S, S)`` (see :func:`covidseg.preprocess.net_input`) and returns logits ``(B, 1)``.
    """

    def __init__(self, settings: ClassifierSettings = ClassifierSettings()) -> None:
        super().__init__()
        w = settings.width
        self.temperature = settings.temperature
        self.fine = _block(2, w)                          # (B, w, S/2, S/2), a cell sees 7 px
        self.middle = _block(w, 2 * w)                    # (B, 2w, S/4, S/4), 19 px
        self.coarse = _block(2 * w, 4 * w)                # (B, 4w, S/8, S/8), 43 px
        self.evidence = nn.Conv2d(4 * w, 1, 1)

    def maps(self, inputs: Tensor) -> Tensor:
        """Evidence ``(B, 1, S/8, S/8)`` in logits: positive where the slice looks ill."""
        return self.evidence(self.coarse(self.middle(self.fine(inputs))))

    def pool(self, evidence: Tensor, lungs: Tensor) -> Tensor:
        """Slice logit ``(B, 1)`` from the evidence inside the lung: half mean, half log-sum-exp."""
        inside = F.adaptive_max_pool2d(lungs, evidence.shape[-2:])
        count = inside.sum((2, 3)).clamp(min=1)
        mean = (evidence * inside).sum((2, 3)) / count
        t = self.temperature
        high = torch.where(inside > 0, t * evidence, torch.full_like(evidence, -1e4))
        smooth_max = (torch.logsumexp(high.flatten(2), dim=2) - count.log()) / t
        return 0.5 * mean + 0.5 * smooth_max

    def forward(self, inputs: Tensor) -> Tensor:
        return self.pool(self.maps(inputs), inputs[:, 1:2])


def _batches(data: WeakSet, settings: ClassifierSettings, lesson: Lesson | None,
             generator: torch.Generator) -> Iterator[Batch]:
    """Batches of all steps: picture, lung and, with a lesson, teacher and taught, ``(B, 2 or 4, S, S)``; labels."""
    parts = [data.crops.images, data.crops.lungs] + ([] if lesson is None else [lesson.teacher, lesson.taught])
    stacked = [torch.from_numpy(np.asarray(part, np.float32)) for part in parts]
    labels = torch.from_numpy(data.labels).float()
    painter = Painter(data.crops, settings.paint)
    for index in balanced_batches(data.labels, data.patients, settings.batch, settings.steps, generator):
        maps = torch.stack([part[index] for part in stacked], dim=1)
        maps = painter(maps, index, labels[index] == 0, generator)
        yield augment(maps, generator), labels[index]


def train_classifier(data: WeakSet, settings: ClassifierSettings = ClassifierSettings(), *,
                     start: Classifier | None = None, lesson: Lesson | None = None, seed: int = 0,
                     device: torch.device = torch.device("cpu"), log: Log = print,
                     name: str = "classifier") -> Classifier:
    """Trains the classifier on slice labels and returns its averaged weights, in evaluation mode.

    Args:
        start: a classifier of an earlier round to go on from.
        lesson: what the patch net teaches about places, see :mod:`covidseg.curriculum`.
        name: of this training in the log.
    """
    generator = seed_everything(seed)
    net = Classifier(settings)
    if start is not None:
        net.load_state_dict(start.state_dict())
    net = on_device(net, device)
    average = Average(net).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=1e-2)
    schedule = learning_rate(optimizer, settings.steps)
    progress = Progress(name, settings.steps, 6, log)
    batches = overlapped(_batches(data, settings, lesson, generator), device)
    for step, (maps, target) in enumerate(batches, start=1):                      # (B, 2 or 4, S, S), (B,)
        inputs = net_input(maps[:, :1], maps[:, 1:2])
        evidence = run_net(net.maps, inputs)                                      # (B, 1, S/8, S/8)
        loss_class = F.binary_cross_entropy_with_logits(net.pool(evidence, inputs[:, 1:])[:, 0], target)
        # Flipped, a part of the batch has to give the flipped map (equivariance: Wang et al., CVPR 2020, SEAM).
        part = max(1, len(inputs) // 3)
        flipped = run_net(net.maps, inputs[:part].flip(3)).flip(3)
        loss_flip = (evidence[:part].sigmoid() - flipped.sigmoid()).abs().mean()
        outside = 1 - F.adaptive_max_pool2d(inputs[:, 1:], evidence.shape[-2:])
        loss_outside = (evidence.sigmoid() * outside).mean()
        loss = loss_class + settings.flip_weight * loss_flip + settings.outside_weight * loss_outside
        losses = {"loss": loss_class.item(), "flip": loss_flip.item()}
        if lesson is not None:
            # The lesson in the grid of the evidence: means over the taught pixels of each cell.
            grid = (evidence.shape[2], evidence.shape[3])
            share = F.adaptive_avg_pool2d(maps[:, 3:4], grid)
            wanted = F.adaptive_avg_pool2d(maps[:, 2:3] * maps[:, 3:4], grid) / share.clamp(min=1e-6)
            loss_lesson = (share * (evidence.sigmoid() - wanted).abs()).sum() / share.sum().clamp(min=1e-6)
            loss, losses["lesson"] = loss + lesson.weight * loss_lesson, loss_lesson.item()
        optimizer.zero_grad()
        loss.backward()
        average_gradients(net)
        optimizer.step()
        schedule.step()
        average.update(net)
        progress.step(step, **losses)
    return average.net.eval()  # type: ignore[return-value]


class Committee(nn.Module):
    """Classifiers that differ in nothing but their seed; logits and maps are averaged.

    Slice labels fix the verdict and leave open what it is read from, so that now and then a training ends in a net with
    right labels and a useless map. The mean over a few nets seldom does (deep ensembles: Lakshminarayanan et al.,
    NeurIPS 2017). ``forward`` is that of :class:`Classifier`.
    """

    def __init__(self, settings: ClassifierSettings = ClassifierSettings()) -> None:
        super().__init__()
        self.members = nn.ModuleList(Classifier(settings) for _ in range(settings.members))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(dim=0)


def train_committee(data: WeakSet, settings: ClassifierSettings = ClassifierSettings(), *,
                    start: Committee | None = None, lesson: Lesson | None = None, seed: int = 0,
                    device: torch.device = torch.device("cpu"), log: Log = print,
                    name: str = "classifier") -> Committee:
    """Trains each member with a seed of its own; arguments as of :func:`train_classifier`."""
    committee = Committee(settings)
    for k, member in enumerate(committee.members):
        trained = train_classifier(
            data, settings, start=None if start is None else start.members[k],  # type: ignore[arg-type]
            lesson=lesson, seed=seed + 1000 * k, device=device, log=log,
            name=name if settings.members == 1 else f"{name} ({k + 1} of {settings.members})")
        member.load_state_dict(trained.state_dict())
    return committee.to(device).eval()


@torch.no_grad()
def slice_probabilities(net: nn.Module, crops: Crops, *, batch: int = 32) -> np.ndarray:
    """Probability of a lesion for each slice, ``(N,)`` float32, by a classifier or a committee."""
    result = []
    for start in range(0, len(crops), batch):
        inputs = net_input(*net_maps(net, crops, slice(start, start + batch)))
        result.append(net(inputs)[:, 0].sigmoid().float().cpu())
    return torch.cat(result).numpy() if result else np.zeros(0, np.float32)
