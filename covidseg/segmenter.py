"""Chapter 7: fine labels from the two tasks together, and a U-Net that learns from them and refines them.

**Fine labels** are one decision a pixel. The activation map finds whole lesions but blurs them; the patches are precise
but blocky. Their log odds are averaged, and a random walker (Grady, TPAMI 2006) moves the result to the edges of the
picture: pixels that both are sure of are seeds, all others join the seed that is reached most easily through similar
brightness.

**The segmenter.** Fine labels are wrong in places, and wrong at random more often than in one direction; a network with
a smooth idea of a lesion averages such errors out. Doubtful pixels weigh less, and the loss forgives. Slices without a
lesion are exact, also after lesions were painted in (:mod:`covidseg.augment`), and have a plain loss. Twice in the
training the averaged net's own opinion is mixed into the fine labels (mean teacher: Tarvainen and Valpola, NeurIPS
2017). The same loop with radiologists' masks, and nothing painted, is the upper bound.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from scipy import ndimage as ndi
from skimage.segmentation import random_walker
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import NO_PAINT, Painter, PaintSettings, augment, paste_lesions, rescan
from covidseg.devices import keep_freed_memory
from covidseg.errors import SettingsError
from covidseg.preprocess import Crops, WeakSet, net_input, net_maps, slices_at_once
from covidseg.training import Batch, Log, Training
from covidseg.unet import make_fine_unet

# Brightness at which the four flips of a picture are seen. With these gains, found on dev and the even MosMed studies,
# a segmenter of fine labels outlines a little better and marks fewer healthy slices; one of true masks needs none.
GAINS = (1.0, 1.1, 1.1, 1.2)
PLAIN = (1.0, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class FineSettings:
    """Settings of the fine labels.

    Attributes:
        cam_share: Share of the activation map in the averaged log odds; the patches have the rest.
        cam_middle: Value of the activation map that counts as one half.
        seed_lesion: Pixels above are seeds of the lesion.
        seed_lung: Pixels below are seeds of the lung.
        beta: How much a step in brightness hinders the walker.
        smallest: Components of fewer pixels are dropped.
    """

    cam_share: float = 0.15
    cam_middle: float = 0.25
    seed_lesion: float = 0.7
    seed_lung: float = 0.3
    beta: float = 130.0
    smallest: int = 12


@dataclass(frozen=True)
class FineLabels:
    """Pseudo-labels for the segmenter.

    Attributes:
        labels: ``(N, S, S)`` bool, lesion.
        probabilities: ``(N, S, S)`` float32, the fused map before the walker.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """What the segmenter is taught, ``(N, S, S)`` float32: half the walker's decision, half the probability.

        Decisions alone shrink from step to step: a doubtful rim is called lung, and the net learns to call it so.
        """
        return (0.5 * self.labels + 0.5 * self.probabilities).astype(np.float32)

    @property
    def weights(self) -> np.ndarray:
        """How sure the targets are, see :func:`certainty`."""
        return certainty(self.targets)


def certainty(targets: np.ndarray) -> np.ndarray:
    """Weight of a pixel from its target in [0, 1]: 1 where it is sure, half where it is not, same shape.

    Not less than half: lesions are less sure than lung nearly everywhere, and a loss that hardly counts them would
    teach the net to leave them out.
    """
    return (0.5 + 0.5 * np.abs(2 * targets - 1)).astype(np.float32)


def fuse(cam: np.ndarray, patches: np.ndarray, settings: FineSettings) -> np.ndarray:
    """Weighted mean of log odds of the two maps, ``(..., S, S)`` in [0, 1] each."""
    def odds(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 0.02, 0.98)
        return np.log(p / (1 - p))
    middle = np.log(settings.cam_middle / (1 - settings.cam_middle))
    mixed = settings.cam_share * (odds(cam) - middle) + (1 - settings.cam_share) * odds(patches)
    return (1 / (1 + np.exp(-mixed))).astype(np.float32)


def walk(image: np.ndarray, probability: np.ndarray, lung: np.ndarray, settings: FineSettings) -> np.ndarray:
    """Edge-aware decision for one slice.

    Args:
        image: ``(S, S)`` normalised.
        probability: ``(S, S)`` fused map.
        lung: ``(S, S)`` bool.

    Returns:
        ``(S, S)`` bool inside the lung.
    """
    seeds = np.zeros(image.shape, int)
    seeds[probability > settings.seed_lesion] = 1
    seeds[probability < settings.seed_lung] = 2
    seeds[~lung] = -1  # the walker never enters these
    # Seeds that are cut off by the lung's border help nobody; without both kinds there is nothing to decide.
    if not (seeds == 1).any():
        return np.zeros_like(lung)
    if not (seeds == 2).any():
        return lung & (probability > 0.5)
    regions, _ = ndi.label(lung)
    seeded = np.unique(regions[seeds > 0])
    isolated = lung & ~np.isin(regions, seeded)
    seeds[isolated] = -1
    with warnings.catch_warnings():  # the solver recommends an optional package that is not needed at this size
        warnings.simplefilter("ignore")
        decided = random_walker(image, seeds, beta=settings.beta, mode="cg_j", tol=1e-2) == 1
    parts, _ = ndi.label(decided & lung)
    return (np.bincount(parts.ravel()) >= settings.smallest)[parts] & (parts > 0)


def fine_labels(data: WeakSet, cam: np.ndarray, patches: np.ndarray,
                settings: FineSettings = FineSettings()) -> FineLabels:
    """Fine labels for all training slices; empty where the slice label says that there is no lesion.

    Args:
        data: slices and their labels.
        cam: ``(N, S, S)`` from :func:`covidseg.gradcam.activation_maps`.
        patches: ``(N, S, S)`` from :func:`covidseg.patches.patch_probabilities`.
    """
    probabilities = fuse(cam, patches, settings) * data.crops.lungs
    probabilities[data.labels == 0] = 0
    labels = np.zeros(cam.shape, bool)
    for k in np.flatnonzero(data.labels == 1):
        labels[k] = walk(data.crops.images[k], probabilities[k], data.crops.lungs[k], settings)
    return FineLabels(labels, probabilities)


# --- the segmenter --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class SegmenterSettings:
    """Settings of the segmenter.

    Attributes:
        channels: Channels of the U-Net's levels.
        steps: Optimiser steps.
        batch: Slices a step, half of them with a lesion.
        rate: Peak learning rate of AdamW.
        prior: Probability of a lesion that the untrained net gives to a pixel on average. Lesions are rare, and a net
            that starts at one half learns that first; in a short training it may learn little else.
        robustness: Q of the generalised cross entropy (Zhang and Sabuncu, NeurIPS 2018, eq. 6): near 0 it is
            cross entropy, at 1 the mean absolute error, which forgives wrong labels.
        dice_weight: Weight of the soft Dice loss.
        fine_weight: Weight of the fine labels against the exact slices.
        refresh: After these shares of the steps the fine labels are mixed with the averaged net's opinion.
        keep: Share of the old labels in that mixture.
        paste: Probability that a lesion-free slice gets the lesions of a slice with fine labels, see
            :func:`paste_lesions`.
        rescan: Probability that a picture is shown as another scanner would show it, see
            :func:`covidseg.augment.rescan`.
        threshold: Lesion from this probability on; found on dev, where real lesions are drawn wide.
        paint: Lesions painted on lesion-free slices; a share of 0 leaves them out.
    """

    channels: tuple[int, ...] = (16, 16, 32, 64, 128)
    steps: int = 300
    batch: int = 12
    rate: float = 3e-3
    prior: float = 0.5
    robustness: float = 0.3
    dice_weight: float = 0.5
    fine_weight: float = 0.5
    refresh: tuple[float, ...] = (0.4, 0.7)
    keep: float = 0.5
    paste: float = 0.0
    rescan: float = 0.5
    threshold: float = 0.25
    paint: PaintSettings = field(default_factory=PaintSettings)

    def __post_init__(self) -> None:
        if len(self.channels) < 3:
            raise SettingsError("the segmenter needs at least three levels", remedy="Give channels more numbers")
        if not 0 < self.prior < 1:
            raise SettingsError(f"prior is {self.prior}, and a probability between 0 and 1 is needed",
                                remedy="Set it to the share of lung that is lesion, about 0.05")


def supervised_settings(settings: SegmenterSettings) -> SegmenterSettings:
    """The settings for training with true masks: nearly plain cross entropy, nothing painted, threshold .5."""
    return replace(settings, robustness=0.1, fine_weight=1.0, refresh=(), paste=0.0, rescan=0.0, paint=NO_PAINT,
                   threshold=0.5)


def make_segmenter(settings: SegmenterSettings) -> nn.Module:
    """A U-Net: ``(B, 2, S, S)`` picture in the lung and lung, to ``(B, 1, S, S)`` logits."""
    return make_fine_unet(2, settings.channels, settings.prior)


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


def exact_loss(logits: Tensor, target: Tensor, inside: Tensor, settings: SegmenterSettings) -> Tensor:
    """Cross entropy plus soft Dice over the batch, where labels are exact.

    Args:
        logits: ``(B, 1, S, S)``.
        target: ``(B, 1, S, S)`` 0 or 1.
        inside: ``(B, 1, S, S)`` 0 or 1; 0 leaves a pixel out.
        settings: Weight of the Dice loss.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, inside, reduction="sum") / inside.sum().clamp(min=1)
    p, target = logits.sigmoid() * inside, target * inside
    return entropy + settings.dice_weight * (1 - (2 * (p * target).sum() + 1) / ((p + target).sum() + 1))


def train_segmenter(data: WeakSet, targets: np.ndarray, weights: np.ndarray,
                    settings: SegmenterSettings = SegmenterSettings(), *, seed: int = 0,
                    device: torch.device = torch.device("cpu"), log: Log = print,
                    name: str = "segmenter") -> nn.Module:
    """Trains the segmenter on pixel targets.

    Args:
        data: slices; their labels balance the batches and say which slices are exact.
        targets: ``(N, S, S)`` bool or float in [0, 1].
        weights: ``(N, S, S)`` float32 in [0, 1].
        settings: of net and training.
        seed, device, log, name: see :class:`covidseg.training.Training`.

    Returns:
        The averaged net in evaluation mode.
    """
    training = Training(name, settings, seed, device, log)
    net = training.begin(make_segmenter(settings))
    slices = [torch.from_numpy(np.array(part, np.float32))                            # (N, S, S) each
              for part in (data.crops.images, data.crops.lungs, targets, weights)]
    lesion_free = torch.from_numpy(data.labels) == 0
    positive = np.flatnonzero(data.labels == 1)
    painter = Painter(data.crops, settings.paint)

    def make_batch(index: Tensor) -> Batch:
        maps, exact = torch.stack([part[index] for part in slices], dim=1), lesion_free[index]
        maps = painter(maps, index, exact, training.generator)
        maps = augment(paste_lesions(maps, exact, settings.paste, training.generator), training.generator)
        return rescan(maps, training.generator, settings.rescan), exact

    refresh = {round(share * settings.steps) for share in settings.refresh}
    batches = training.batches(make_batch, data, hold={step + 1 for step in refresh})
    for step, (maps, exact) in enumerate(batches, start=1):                           # (B, 4, S, S), (B,)
        picture, lung, target, weight = maps.split(1, dim=1)
        logits = training.run(net, net_input(picture, lung))                          # (B, 1, S, S)
        loss = exact_loss(logits[exact], target[exact], lung[exact], settings)
        loss_fine = robust_loss(logits[~exact], target[~exact], (weight * lung)[~exact], settings)
        training.step(loss + settings.fine_weight * loss_fine, exact=loss, fine=loss_fine)
        if step in refresh:                                                           # the next batch is not begun yet
            opinion = training.from_first(
                lambda: lesion_probabilities(training.average, data.crops.take(positive), gains=PLAIN))
            slices[2][positive] = settings.keep * slices[2][positive] + (1 - settings.keep) * torch.from_numpy(opinion)
            slices[3][positive] = torch.from_numpy(certainty(slices[2][positive].numpy()))
            log(f"{name}: fine labels refreshed after step {step}")
    return training.averaged()


@torch.no_grad()
def lesion_probabilities(net: nn.Module, crops: Crops, *, gains: tuple[float, ...] = GAINS,
                         batch: int = 16) -> np.ndarray:
    """Lesion probability of every pixel, averaged over the four flips, 0 outside the lung.

    Args:
        net: the segmenter.
        crops: ``N`` slices of ``S * S`` pixels.
        gains: brightness of the picture as it is, upside down, left to right, and both; scanners differ by as much.
        batch: slices at once.

    Returns:
        ``(N, S, S)`` float32.
    """
    if next(net.parameters()).device.type == "cpu":
        keep_freed_memory()
    result = []
    batch = slices_at_once(batch, crops.images.shape[-1])
    for start in range(0, len(crops), batch):
        picture, lung = net_maps(net, crops, slice(start, start + batch))
        mean = torch.zeros_like(lung)
        for axes, gain in zip(((), (2,), (3,), (2, 3)), gains, strict=True):
            mean += net(net_input(gain * picture, lung).flip(axes)).sigmoid().flip(axes) / len(gains)
        result.append((mean * lung)[:, 0].float().cpu())
    return torch.cat(result).numpy() if result else np.zeros((0, 0, 0), np.float32)
