"""Chapter 3: a classifier that says whether a slice shows a lesion. Its labels are the only supervision there is.

A plain convolutional trunk of stride 8, so that the map that Grad-CAM reads is fine enough to show where. It is short
on purpose: each cell of the evidence map sees 43 pixels of the slice and no more. A net that sees the whole lung can
tell the class by the shape of lung and heart, since lesion-free slices tend to come from the ends of the lungs; its
labels come out right and its maps point nowhere. (Evidence from small windows: Brendel and Bethge, ICLR 2019, BagNet.)
The evidence is pooled inside the lung only; half mean, half log-sum-exp, so that a small lesion counts as well.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import Painter, PaintSettings, augment, rescan
from covidseg.errors import SettingsError
from covidseg.preprocess import Crops, WeakSet, net_input, net_maps
from covidseg.training import Batch, Log, Training


@dataclass(frozen=True)
class ClassifierSettings:
    """Settings of the classifier.

    Attributes:
        width: Channels after the stem; doubles with each stride.
        steps: Optimiser steps.
        batch: Slices a step, half of them with a lesion.
        rate: Peak learning rate of AdamW.
        temperature: Of the log-sum-exp pooling; larger looks at fewer pixels.
        flip_weight: Weight of the loss that asks the evidence map to move along when the picture is flipped.
        outside_weight: Weight of the loss that keeps evidence inside the lung.
        members: Classifiers in the ensemble, see :class:`Ensemble`.
        paint: What is painted on lesion-free slices, which mostly come from the ends of the lungs. Vessels stay *no
            lesion*: without them the net learns that thick vessels mean one. A slice with a painted lesion counts as
            one with a lesion; the first round does without, see
            :attr:`covidseg.curriculum.MutualSettings.painted`.
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
            raise SettingsError("an ensemble needs at least one classifier", remedy="Set members to 1 or more")


@dataclass(frozen=True)
class Guidance:
    """What the classifier is taught about places, besides the labels of slices.

    Attributes:
        target: ``(N, S, S)`` float32, probability of a lesion; 0 in slices without one.
        weight: Weight of this loss.
    """

    target: np.ndarray
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


def train_classifier(data: WeakSet, settings: ClassifierSettings = ClassifierSettings(), *,
                     guidance: Guidance | None = None, seed: int = 0, device: torch.device = torch.device("cpu"),
                     log: Log = print, name: str = "classifier") -> Classifier:
    """Trains the classifier on slice labels.

    Args:
        data: slices and their labels.
        settings: of net and training.
        guidance: what is taught about places in later rounds, see :mod:`covidseg.curriculum`.
        seed, device, log, name: see :class:`covidseg.training.Training`.

    Returns:
        The averaged net in evaluation mode.
    """
    training = Training(name, settings, seed, device, log)
    net = training.begin(Classifier(settings))
    target = np.zeros_like(data.crops.images) if guidance is None else guidance.target
    slices = [torch.from_numpy(np.asarray(part, np.float32))                              # (N, S, S) each
              for part in (data.crops.images, data.crops.lungs, target)]
    labels = torch.from_numpy(data.labels).float()                                        # (N,)
    painter = Painter(data.crops, settings.paint)

    def make_batch(index: Tensor) -> Batch:
        maps, free = torch.stack([part[index] for part in slices], dim=1), labels[index] == 0
        maps = painter(maps, index, free, training.generator)                             # targets with painted lesions
        label = torch.where(free, maps[:, 2].amax(dim=(1, 2)), labels[index])             # a painted lesion is one
        # Before it knows places, a net that sees fewer details reads more from the place in the chest.
        maps = maps if guidance is None else rescan(maps, training.generator)
        return augment(maps, training.generator), label

    for maps, label in training.batches(make_batch, data):                                # (B, 3, S, S), (B,)
        inputs = net_input(maps[:, :1], maps[:, 1:2])
        evidence = training.run(net.maps, inputs)                                         # (B, 1, S/8, S/8)
        # Both classes weigh the same, however many slices were painted.
        share = label.mean().clamp(0.1, 0.9)
        weight = torch.where(label > 0, 0.5 / share, 0.5 / (1 - share))
        loss_class = F.binary_cross_entropy_with_logits(net.pool(evidence, inputs[:, 1:])[:, 0], label, weight)
        # Flipped, a part of the batch has to give the flipped map (equivariance: Wang et al., CVPR 2020, SEAM).
        part = max(1, len(inputs) // 3)
        flipped = training.run(net.maps, inputs[:part].flip(3)).flip(3)
        loss_flip = (evidence[:part].sigmoid() - flipped.sigmoid()).abs().mean()
        outside = 1 - F.adaptive_max_pool2d(inputs[:, 1:], evidence.shape[-2:])
        loss_outside = (evidence.sigmoid() * outside).mean()
        loss = loss_class + settings.flip_weight * loss_flip + settings.outside_weight * loss_outside
        shown = {"loss": loss_class, "flip": loss_flip}
        if guidance is not None:
            shown["guidance"] = guidance_loss(evidence, maps[:, 2:3], maps[:, 1:2])
            loss = loss + guidance.weight * shown["guidance"]
        training.step(loss, **shown)
    return training.averaged()


def guidance_loss(evidence: Tensor, target: Tensor, lungs: Tensor) -> Tensor:
    """Cross entropy of the evidence against what is taught about places, in the grid of the evidence.

    Args:
        evidence: ``(B, 1, h, w)`` logits.
        target: ``(B, 1, S, S)`` probability of a lesion; each cell takes the mean over its lung pixels.
        lungs: ``(B, 1, S, S)`` 0 or 1.

    Returns:
        Scalar, a mean over the lung.
    """
    grid = (evidence.shape[2], evidence.shape[3])
    share = F.adaptive_avg_pool2d(lungs, grid)
    wanted = F.adaptive_avg_pool2d(target * lungs, grid) / share.clamp(min=1e-6)
    entropy = F.binary_cross_entropy_with_logits(evidence, wanted.clamp(max=1), share, reduction="sum")
    return entropy / share.sum().clamp(min=1e-6)


class Ensemble(nn.Module):
    """Classifiers that differ in nothing but their seed; logits and maps are averaged.

    Slice labels fix the verdict and leave open what it is read from, so that now and then a training ends in a net with
    right labels and a useless map. The mean over a few nets seldom does (deep ensembles: Lakshminarayanan et al.,
    NeurIPS 2017). ``forward`` takes ``(B, 2, S, S)`` and returns logits ``(B, 1)``, as that of :class:`Classifier`.
    """

    def __init__(self, settings: ClassifierSettings = ClassifierSettings()) -> None:
        super().__init__()
        self.members = nn.ModuleList(Classifier(settings) for _ in range(settings.members))

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.stack([member(inputs) for member in self.members]).mean(dim=0)


def train_ensemble(data: WeakSet, settings: ClassifierSettings = ClassifierSettings(), *,
                   guidance: Guidance | None = None, seed: int = 0, device: torch.device = torch.device("cpu"),
                   log: Log = print, name: str = "classifier") -> Ensemble:
    """Trains each member with a seed of its own; the arguments are those of :func:`train_classifier`."""
    ensemble, history = Ensemble(settings), list[dict[str, float]]()
    for k, member in enumerate(ensemble.members):
        trained: Any = train_classifier(
            data, settings, guidance=guidance, seed=seed + 1000 * k, device=device, log=log,
            name=name if settings.members == 1 else f"{name} ({k + 1} of {settings.members})")
        member.load_state_dict(trained.state_dict())
        history += [{"member": k + 1, **losses} for losses in trained.history]
    ensemble.history = history  # type: ignore[assignment]
    return ensemble.to(device).eval()


@torch.no_grad()
def slice_probabilities(net: nn.Module, crops: Crops, *, batch: int = 32) -> np.ndarray:
    """Probability of a lesion for each slice, ``(N,)`` float32, by a classifier or an ensemble."""
    result = []
    for start in range(0, len(crops), batch):
        inputs = net_input(*net_maps(net, crops, slice(start, start + batch)))
        result.append(net(inputs)[:, 0].sigmoid().float().cpu())
    return torch.cat(result).numpy() if result else np.zeros(0, np.float32)
