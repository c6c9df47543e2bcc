"""Stage 4: multiple-instance learning on 5 x 5 patches, from easy to difficult, gives fine labels.

A slice is a *bag* of patches, its *instances*. A bag with a lesion holds at least one ill patch, nobody says which;
in a bag without, every patch is healthy. Attention (Ilse et al., ICML 2018, eq. 8-9) pools the patch scores to a
slice score that the slice label can teach.

The bag alone leaves much open, so the coarse label joins in, a little at a time (curriculum: Bengio et al., ICML
2009). Each phase builds a target for every patch from the class activation map and from the net's own averaged
opinion, calls a patch difficult where the two disagree or the target is undecided, and admits only the easiest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.patches import PATCH, admit_easiest, patch_lung, patch_mean, patch_values, to_pixels
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
class MilSettings:
    """Settings of the patch task.

    Attributes:
        width: channels of the finest level.
        steps: optimiser steps in all phases together.
        batch: slices a step, half of them with a lesion.
        rate: peak learning rate of AdamW.
        paces: share of the patches of positive slices that each phase admits, per class.
        weights: weight of the admitted patches' loss in each phase.
        trust: how much the target of each phase follows the activation map rather than the patch net.
        prior: patches above this value of the activation map are lesion candidates in the target.
        sharpness: exponent that moves targets away from one half.
    """

    width: int = 16
    steps: int = 200
    batch: int = 12
    rate: float = 3e-3
    paces: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    weights: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0)
    trust: tuple[float, ...] = (1.0, 0.7, 0.5, 0.4)
    prior: float = 0.3
    sharpness: float = 1.5


@dataclass(frozen=True)
class Phase:
    """One phase of the curriculum, arrays of ``(N, n, n)`` patches.

    Attributes:
        pace: share of the patches of positive slices admitted, per class.
        target: probability of a lesion that the phase teaches.
        difficulty: what the order is made by; small is easy.
        admitted: bool, the patches that are taught.
    """

    pace: float
    target: np.ndarray
    difficulty: np.ndarray
    admitted: np.ndarray


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class PatchNet(nn.Module):
    """Scores all patches of a slice in one pass, no loop over patches.

    A patch is described by its 25 raw values and by features of two levels of context around it, averaged on the
    patch. ``forward`` takes ``(B, 2, S, S)`` and returns scores and attention logits, ``(B, 1, n, n)`` each.
    """

    def __init__(self, settings: MilSettings = MilSettings()) -> None:
        super().__init__()
        w = settings.width
        self.near = _level(2, w)                                                   # (B, w, S, S), sees 5 px
        self.middle = nn.Sequential(nn.MaxPool2d(2), _level(w, 2 * w))             # (B, 2w, S/2, S/2), 14 px
        self.far = nn.Sequential(nn.MaxPool2d(2), _level(2 * w, 4 * w),
                                 nn.Conv2d(4 * w, 4 * w, 3, padding=3, dilation=3), nn.ReLU())  # S/4, 60 px
        features = 2 * PATCH**2 + 7 * w
        self.embed = nn.Sequential(nn.Conv2d(features, 4 * w, 1), nn.ReLU(), nn.Dropout2d(0.1))
        self.score = nn.Conv2d(4 * w, 1, 1)
        # Gated attention: w' (tanh(V h) * sigmoid(U h)), eq. 9 of Ilse et al.
        self.attend_v, self.attend_u = nn.Conv2d(4 * w, 2 * w, 1), nn.Conv2d(4 * w, 2 * w, 1)
        self.attend_w = nn.Conv2d(2 * w, 1, 1)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        side = inputs.shape[-1] // PATCH
        near = self.near(inputs)
        middle = self.middle(near)
        far = self.far(middle)
        on_patches = [patch_values(inputs), patch_mean(near)]
        # Half- and quarter-resolution features have no whole number of pixels a patch: sample them at its centre.
        on_patches += [F.interpolate(f, size=(side, side), mode="bilinear", align_corners=False)
                       for f in (middle, far)]
        h = self.embed(torch.cat(on_patches, dim=1))                               # (B, 4w, n, n)
        attention = self.attend_w(self.attend_v(h).tanh() * self.attend_u(h).sigmoid())
        return self.score(h), attention


def bag_probability(scores: Tensor, attention: Tensor, instances: Tensor) -> Tensor:
    """Slice probability from its patches: half attention pooling, half a power mean that follows the worst patch.

    Args:
        scores: ``(B, 1, n, n)`` patch logits.
        attention: ``(B, 1, n, n)`` attention logits.
        instances: ``(B, 1, n, n)`` bool, patches that lie in the lung.

    Returns:
        ``(B,)`` in (0, 1).
    """
    inside = instances.flatten(1)
    weights = attention.flatten(1).masked_fill(~inside, -1e4).softmax(dim=1)
    pooled = (weights * scores.flatten(1)).sum(dim=1).sigmoid()
    powers = (scores.flatten(1).sigmoid() ** 4 * inside).sum(dim=1) / inside.sum(dim=1).clamp(min=1)
    return 0.5 * pooled + 0.5 * (powers + 1e-8) ** 0.25


def plan_phase(maps: np.ndarray, opinion: np.ndarray, data: WeakSet, settings: MilSettings, phase: int) -> Phase:
    """Targets, difficulty and admitted patches of one phase of the curriculum.

    Args:
        maps: ``(N, n, n)`` activation map on the patches.
        opinion: ``(N, n, n)`` probability of the averaged patch net.
        data: for the slice labels and lungs.
        settings: paces, trust and sharpness of the phases.
        phase: index of the phase.
    """
    trust = settings.trust[phase]
    # The map's own threshold becomes one half before the two opinions are averaged as log odds.
    prior = torch.from_numpy(maps).clamp(0.02, 0.98)
    prior_odds = prior.logit() - float(np.log(settings.prior / (1 - settings.prior)))
    own_odds = torch.from_numpy(opinion).clamp(0.02, 0.98).logit()
    target = (settings.sharpness * (trust * prior_odds + (1 - trust) * own_odds)).sigmoid()
    disagreement = (prior_odds.sigmoid() - own_odds.sigmoid()).abs()
    difficulty = 0.6 * (1 - (2 * target - 1).abs()) + 0.4 * disagreement * (phase > 0)
    positive = torch.from_numpy(data.labels == 1)[:, None, None]
    instances = patch_lung(torch.from_numpy(data.crops.lungs)[:, None])[:, 0] & positive
    pace = settings.paces[phase]
    admitted = (admit_easiest(difficulty, instances & (target >= 0.5), pace)
                | admit_easiest(difficulty, instances & (target < 0.5), pace))
    return Phase(pace, target.numpy(), difficulty.numpy(), admitted.numpy())


def train_mil(data: WeakSet, cam: np.ndarray, settings: MilSettings = MilSettings(), *, seed: int = 0,
              device: torch.device = torch.device("cpu"), log: Log = print) -> tuple[PatchNet, list[Phase]]:
    """Trains the patch net on slice labels and coarse labels, from easy to difficult patches.

    Args:
        data: slices and their labels.
        cam: ``(N, S, S)`` activation maps from :func:`covidseg.cam.grad_cam`.

    Returns:
        The averaged net in evaluation mode, and what each phase admitted.
    """
    generator = seed_everything(seed)
    net = PatchNet(settings).to(device)
    average = Average(net).to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=settings.rate, weight_decay=1e-2)
    schedule = learning_rate(optimizer, settings.steps)
    progress = Progress("patches", settings.steps, 8, log)
    images, lungs = torch.from_numpy(data.crops.images), torch.from_numpy(data.crops.lungs).float()
    labels = torch.from_numpy(data.labels).float()
    on_patches = patch_mean(torch.from_numpy(cam)[:, None])[:, 0].numpy()          # (N, n, n)
    ill = np.flatnonzero(data.labels == 1)  # only their patches can be admitted
    phases: list[Phase] = []
    batches = balanced_batches(data.labels, data.patients, settings.batch, settings.steps, generator)
    for step, index in enumerate(batches, start=1):
        if (step - 1) * len(settings.paces) // settings.steps == len(phases):  # phases of equal length
            opinion = on_patches.copy()
            if phases:
                opinion[ill] = patch_probabilities(average.net, data.crops.take(ill), smooth=False, mirror=False)
            phases.append(plan_phase(on_patches, opinion, data, settings, len(phases)))
            log(f"patches phase {len(phases)}: pace {phases[-1].pace:.1f}, {phases[-1].admitted.sum()} admitted")
        phase, weight = phases[-1], settings.weights[len(phases) - 1]
        # Targets travel with the picture through the same flips; on pixels, then averaged on the patches again.
        extra = torch.stack([torch.from_numpy(phase.target)[index],
                             torch.from_numpy(phase.admitted)[index].float()], dim=1)
        maps = torch.cat([images[index][:, None], lungs[index][:, None],
                          to_pixels(extra, images.shape[-1], smooth=False)], dim=1)
        maps = augment(maps, generator).to(device)                                 # (B, 4, S, S)
        target, admitted = patch_mean(maps[:, 2:3]), patch_mean(maps[:, 3:4])
        instances = patch_lung(maps[:, 1:2])
        scores, attention = net(net_input(maps[:, :1], maps[:, 1:2]))
        y = labels[index].to(device)
        bag = F.binary_cross_entropy(bag_probability(scores, attention, instances), y)
        each = F.binary_cross_entropy_with_logits(scores, torch.zeros_like(scores), reduction="none")
        zero = instances & (y == 0)[:, None, None, None]      # a slice without a lesion labels all its patches
        free = (each * zero).sum() / zero.sum().clamp(min=1)
        soft = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        # Both classes weigh the same, however few lesion patches were admitted.
        taught = torch.stack([(soft * part).sum() / part.sum().clamp(min=1)
                              for part in (admitted * (target >= 0.5), admitted * (target < 0.5))]).mean()
        loss = bag + free + weight * taught
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        average.update(net)
        progress.step(step, bag=bag.item(), free=free.item(), taught=taught.item())
    return average.net.eval(), phases  # type: ignore[return-value]


@torch.no_grad()
def patch_probabilities(net: nn.Module, crops: Crops, *, smooth: bool = True, mirror: bool = True,
                        batch: int = 32) -> np.ndarray:
    """Probability of a lesion of every patch, averaged over the slice and, if ``mirror``, its mirror image.

    Returns:
        float32 in [0, 1]: ``(N, S, S)`` on pixels, 0 outside the lung, or ``(N, n, n)`` patches if not ``smooth``.
    """
    device = next(net.parameters()).device
    was_training = net.training
    net.eval()
    result = []
    for start in range(0, len(crops), batch):
        part = slice(start, start + batch)
        lung = torch.from_numpy(crops.lungs[part])[:, None].float().to(device)
        inputs = net_input(torch.from_numpy(crops.images[part])[:, None].to(device), lung)
        patches = net(inputs)[0].sigmoid()
        if mirror:
            patches = 0.5 * (patches + net(inputs.flip(3))[0].sigmoid().flip(3))
        if smooth:
            patches = to_pixels(patches, inputs.shape[-1]) * lung
        result.append(patches[:, 0].cpu())
    net.train(was_training)
    return torch.cat(result).numpy()
