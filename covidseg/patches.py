"""Chapter 5: multiple-instance learning on 5 x 5 patches, trained from easy to difficult.

**Patches** are the instances, in both readings of the abstract's "5*5". A map of patch numbers says which patch each
pixel belongs to: squares of 5 x 5 pixels (:func:`square_ids`), or a grid of 5 x 5 cells over every component of the
coarse label (:func:`grid_ids`). Everything after it is the same for both: quantities are averaged over patches
(:func:`pool`) and spread back onto pixels (:func:`spread`), for all patches of all slices at once.

**Bags.** A slice is a bag of patches. A bag with a lesion holds at least one lesion patch, nobody says which; in a bag
without, every patch is healthy. Attention (Ilse et al., ICML 2018, eqs. 8-9) pools the patch scores to a slice score
that the slice label can teach. Each component of the coarse label is a smaller bag of its own.

The bags alone leave much open, so the class activation map joins in, a little at a time: see
:mod:`covidseg.curriculum`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from scipy import ndimage as ndi
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import Painter, PaintSettings, augment
from covidseg.curriculum import CurriculumSettings, Phase, plan_phase
from covidseg.errors import SettingsError, one_of
from covidseg.preprocess import Crops, WeakSet, net_input, net_maps, slices_at_once, slices_in_cache
from covidseg.training import Batch, Log, Training

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
        patch: Side of the squares in pixels.
        share: A cell or square with less lung is no instance.

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
        # What belongs to no square stays outside, even if grid cells have left the part of it that is lung.
        ids[:] = _number(cells, lung & (cells > 0), share)
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
        ids: ``(B, S, T)`` int64 patch numbers; of a map ``n`` times as coarse, every ``n``-th pixel is read.
        count: largest patch number.

    Returns:
        ``(B, count + 1, C)``, at least float32; entry 0 is what belongs to no patch, patches without a pixel are 0.
    """
    batch, channels = maps.shape[:2]
    step = ids.shape[-1] // maps.shape[-1]
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


# --- bags -----------------------------------------------------------------------------------------------------------

COMPONENTS = 4  # bags of a slice besides the slice itself
POWER = 4       # of the mean over a bag: the higher, the more it follows the patch with the highest score


def gated_attention(h: Tensor, v: nn.Linear, u: nn.Linear, w: nn.Linear) -> Tensor:
    """Attention logits ``w' (tanh(V h) * sigmoid(U h))`` (eq. 9 of Ilse et al.), ``(...)``, of ``h`` ``(..., d)``."""
    return w(v(h).tanh() * u(h).sigmoid())[..., 0]


def bag_probability(scores: Tensor, attention: Tensor, members: Tensor, pooling: str = "attention") -> Tensor:
    """Probability of a bag from its patches: half pooled scores, half a power mean.

    Args:
        scores: ``(B, P)`` patch logits.
        attention: ``(B, P)`` attention logits.
        members: ``(B, P)`` bool, the patches of the bag.
        pooling: ``attention`` weighs the scores, ``mean`` does not.

    Returns:
        ``(B,)`` in (0, 1).
    """
    weights = (attention if pooling == "attention" else torch.zeros_like(attention))
    weights = weights.masked_fill(~members, -1e4).softmax(dim=1)
    pooled = (weights * scores).sum(dim=1).sigmoid()
    powers = (scores.sigmoid() ** POWER * members).sum(dim=1) / members.sum(dim=1).clamp(min=1)
    return 0.5 * pooled + 0.5 * (powers + 1e-8) ** (1 / POWER)


def component_bags(cam: np.ndarray, ids: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Which patches belong to which coarse component: ``(N, P + 1)`` int, 0 none, 1.. the largest components.

    Components are dilated a little first: a bag should hold the lesion's rim as well.

    Args:
        cam: ``(N, S, S)`` activation maps.
        ids: ``(N, S, S)`` patch numbers.
        labels: ``(N,)`` slice labels; a slice without a lesion has no components.
        threshold: activation from which on a pixel belongs to a component.
    """
    number = np.zeros((len(ids), int(ids.max()) + 1), np.int64)
    for k in np.flatnonzero(labels == 1):
        parts, _ = ndi.label(ndi.binary_dilation(cam[k] >= threshold, iterations=2))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        for rank, part in enumerate(np.argsort(sizes)[::-1][:COMPONENTS], start=1):
            if sizes[part] > 0:
                share = patch_values((parts == part)[None], ids[k:k + 1], number.shape[1] - 1)[0]
                number[k][(share > 0.5) & (np.arange(len(share)) > 0)] = rank
    return number


def component_loss(scores: Tensor, attention: Tensor, bags: Tensor, pooling: str) -> Tensor:
    """Cross entropy of all coarse components against "holds a lesion", mean over the components of the batch.

    Args:
        scores, attention: ``(B, P + 1)`` logits.
        bags: ``(B, P + 1)`` int from :func:`component_bags`.
        pooling: ``attention`` weighs the scores, ``mean`` does not.
    """
    losses = []
    for rank in range(1, COMPONENTS + 1):
        members = bags == rank
        there = members.any(dim=1)
        if bool(there.any()):
            p = bag_probability(scores[there], attention[there], members[there], pooling)
            losses.append(-p.clamp(min=1e-6).log())
    return torch.cat(losses).mean() if losses else scores.sum() * 0


# --- the patch net --------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MilSettings:
    """Settings of the patch task.

    Attributes:
        reading: ``pixels``: patches are squares of ``patch`` pixels; ``grid``: 5 x 5 cells over each coarse component.
        patch: Side of the squares in pixels.
        pooling: ``attention`` or ``mean``, how a bag's score comes from its patches.
        width: Channels of the finest level.
        steps: Optimiser steps in all phases together.
        batch: Slices a step, half of them with a lesion.
        rate: Peak learning rate of AdamW.
        component: Activation from which on coarse components are bags of their own.
        component_weight: Weight of the loss of these bags; 0 leaves them out.
        zeros: Weight of the loss that holds every patch of a lesion-free slice at 0.
        curriculum: Targets, order and pace.
        threshold: Lesion from this probability on, where a single outline is wanted.
        paint: Lesions and vessels painted on lesion-free slices.
    """

    reading: str = "pixels"
    patch: int = PATCH
    pooling: str = "attention"
    width: int = 16
    steps: int = 200
    batch: int = 12
    rate: float = 3e-3
    component: float = 0.3
    component_weight: float = 0.3
    zeros: float = 1.0
    threshold: float = 0.5
    curriculum: CurriculumSettings = field(default_factory=CurriculumSettings)
    paint: PaintSettings = field(default_factory=PaintSettings)

    def __post_init__(self) -> None:
        one_of(self.reading, ("pixels", "grid"), "reading of patches")
        one_of(self.pooling, ("attention", "mean"), "pooling")


def _level(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class PatchNet(nn.Module):
    """Scores all patches of a slice in one pass, no loop over patches.

    A patch is described by features of three levels of context, averaged over its pixels; the finest reads the
    25 values around each pixel. ``forward`` takes ``(B, 2, S, S)`` and patch numbers ``(B, S, S)``, and returns
    scores and attention logits, ``(B, P + 1)`` each; entry 0 belongs to no patch.
    """

    def __init__(self, settings: MilSettings = MilSettings()) -> None:
        super().__init__()
        self.settings = settings
        w = settings.width
        self.near = nn.Sequential(nn.Conv2d(2, w, 5, padding=2, bias=False), nn.BatchNorm2d(w), nn.ReLU())  # 5 px
        self.middle = nn.Sequential(nn.MaxPool2d(2), _level(w, 2 * w))                                    # 14 px
        self.far = nn.Sequential(nn.MaxPool2d(2), _level(2 * w, 4 * w),
                                 nn.Conv2d(4 * w, 4 * w, 3, padding=3, dilation=3), nn.ReLU())              # 56 px
        self.embed = nn.Sequential(nn.Linear(7 * w, 4 * w), nn.ReLU(), nn.Dropout(0.1))
        self.score = nn.Linear(4 * w, 1)
        self.attend_v, self.attend_u = nn.Linear(4 * w, 2 * w), nn.Linear(4 * w, 2 * w)
        self.attend_w = nn.Linear(2 * w, 1)

    def features(self, inputs: Tensor) -> list[Tensor]:
        """Feature maps of the slice, whatever the patches: ``(B, w, S, S)`` and ``(B, 6w, S/2, S/2)``."""
        near = self.near(inputs)
        middle = self.middle(near)
        far = F.interpolate(self.far(middle), size=middle.shape[2:], mode="bilinear", align_corners=False)
        return [near, torch.cat([middle, far], dim=1)]

    def describe(self, features: list[Tensor], ids: Tensor, count: int) -> Tensor:
        """The patches ``ids``, described by :meth:`features` averaged over each, ``(B, count + 1, 7w)``."""
        return torch.cat([pool(f, ids, count) for f in features], dim=2)

    def judge(self, described: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and attention logits, two of ``(...)``, of patches described by ``(..., 7w)`` of :meth:`describe`."""
        h = self.embed(described)                                                      # (B, P + 1, 4w)
        # Before the score: the gradients of h add up in this order, and recorded nets depend on its last bits.
        attention = gated_attention(h, self.attend_v, self.attend_u, self.attend_w)
        return self.score(h)[..., 0], attention

    def forward(self, inputs: Tensor, ids: Tensor, count: int | None = None) -> tuple[Tensor, Tensor]:
        return self.judge(self.describe(self.features(inputs), ids, int(ids.max()) if count is None else count))


def patch_ids(crops: Crops, cam: np.ndarray | None, settings: MilSettings) -> np.ndarray:
    """Patch numbers ``(N, S, S)`` in the reading of the settings; the grid is laid over the activation map's parts."""
    if settings.reading == "pixels":
        return square_ids(crops.lungs, settings.patch)
    if cam is None:
        raise SettingsError("a grid over coarse components needs the activation map", remedy="Pass cam")
    return grid_ids(crops.lungs, (cam >= settings.component) & crops.lungs, patch=settings.patch)


def train_mil(data: WeakSet, cam: np.ndarray, settings: MilSettings = MilSettings(), *, start: PatchNet | None = None,
              seed: int = 0, device: torch.device = torch.device("cpu"), log: Log = print,
              name: str = "patches") -> tuple[PatchNet, list[Phase]]:
    """Trains the patch net on slice labels and activation maps, from easy to difficult patches.

    Args:
        data: slices and their labels.
        cam: ``(N, S, S)`` activation maps from :func:`covidseg.gradcam.activation_maps`.
        settings: of net and training.
        start: a net of an earlier round to go on from.
        seed, device, log, name: see :class:`covidseg.training.Training`.

    Returns:
        The averaged net in evaluation mode, and what each phase admitted.
    """
    training = Training(name, settings, seed, device, log, lines=8)
    net = training.begin(PatchNet(settings), start)
    ids = patch_ids(data.crops, cam, settings)                                         # (N, S, S)
    count = int(ids.max())
    prior, members = patch_values(cam, ids), instances(ids)                            # (N, P + 1)
    bags = component_bags(cam, ids, data.labels, settings.component)                   # (N, P + 1)
    of_slices = [torch.from_numpy(part).to(device) for part in (data.labels.astype(np.float32), members, bags)]
    positive = np.flatnonzero(data.labels == 1)  # only their patches can be admitted
    candidates = members & (data.labels == 1)[:, None]
    images, lungs, numbers = (torch.from_numpy(part.astype(np.float32))
                              for part in (data.crops.images, data.crops.lungs, ids))  # (N, S, S) each
    lesion_free = torch.from_numpy(data.labels) == 0
    painter = Painter(data.crops, settings.paint)

    def make_batch(index: Tensor) -> Batch:
        maps = torch.stack([images[index], lungs[index], torch.zeros_like(images[index]), numbers[index]], dim=1)
        maps = painter(maps, index, lesion_free[index], training.generator)
        return augment(maps, training.generator), index

    curriculum, phases = settings.curriculum, list[Phase]()
    for step, (maps, index) in enumerate(training.batches(make_batch, data)):          # (B, 4, S, S), (B,)
        if step * len(curriculum.paces) // settings.steps == len(phases):              # phases of equal length
            opinion = prior.copy()
            if phases or start is not None:
                opinion[positive] = training.from_first(lambda: patch_scores(
                    training.average, data.crops.take(positive), ids[positive], count))
            phases.append(plan_phase(prior, opinion, candidates, curriculum, len(phases), seed=seed))
            log(f"{name} phase {len(phases)}: pace {phases[-1].pace:.1f}, {phases[-1].admitted.sum()} admitted")
            lesson = [torch.from_numpy(part).to(device) for part in (phases[-1].target, phases[-1].admitted)]
            weight = curriculum.weights[len(phases) - 1]
        picture, lung, painted, number = maps.split(1, dim=1)
        own = number[:, 0].long()                                                      # patch numbers move along
        described = training.run(lambda inputs, numbers: net.describe(net.features(inputs), numbers, count),
                                 net_input(picture, lung), own)                        # (B, P + 1, 7w)
        scores, attention = net.judge(described)                                       # (B, P + 1)
        label, inside, components = (part[index] for part in of_slices)
        # The bag: a slice with a lesion holds at least one lesion patch, and so does one that was painted.
        y = torch.maximum(label, painted.amax(dim=(1, 2, 3)))
        loss_bag = F.binary_cross_entropy(bag_probability(scores, attention, inside, settings.pooling), y)
        # A slice without a lesion labels all its patches, and so does one whose lesions were painted.
        exact = F.binary_cross_entropy_with_logits(scores, pool(painted, own, count)[..., 0], reduction="none")
        known = inside & (label == 0)[:, None]
        loss_free = (exact * known).sum() / known.sum().clamp(min=1)
        # The curriculum: both classes weigh the same, however few lesion patches were admitted.
        target, admitted = (part[index] for part in lesson)
        soft = F.binary_cross_entropy_with_logits(scores, target, reduction="none")
        loss_taught = torch.stack([(soft * part).sum() / part.sum().clamp(min=1)
                                   for part in (admitted & (target >= 0.5), admitted & (target < 0.5))]).mean()
        loss = loss_bag + settings.zeros * loss_free + weight * loss_taught
        if settings.component_weight:
            loss = loss + settings.component_weight * component_loss(scores, attention, components, settings.pooling)
        training.step(loss, bag=loss_bag, free=loss_free, taught=loss_taught)
    return training.averaged(), phases


def patch_scores(net: PatchNet, crops: Crops, ids: np.ndarray, count: int | None = None, *,
                 batch: int = 32) -> np.ndarray:
    """Probability of a lesion of every patch, ``(N, P + 1)`` float32; entry 0 belongs to no patch.

    Args:
        ids: ``(N, S, S)`` patch numbers; ``count`` is the largest number if these slices do not reach it.
    """
    return _scores(net, crops, [ids], [int(ids.max(initial=0)) if count is None else count], batch)[0]


@torch.inference_mode()
def _scores(net: PatchNet, crops: Crops, maps: list[np.ndarray], counts: list[int], batch: int) -> list[np.ndarray]:
    """:func:`patch_scores` for several maps of patch numbers; the features of a slice are computed once."""
    device, was_training = next(net.parameters()).device, net.training
    net.eval()
    batch = slices_at_once(batch, crops.images.shape[-1])
    few = slices_in_cache(batch, crops.images.shape[-1], device)
    parts = [[np.zeros((0, count + 1), np.float32)] for count in counts]
    for start in range(0, len(crops), batch):
        described: list[list[Tensor]] = [[] for _ in maps]
        for first in range(start, min(start + batch, len(crops)), few):
            part = slice(first, min(first + few, start + batch))
            features = net.features(net_input(*net_maps(net, crops, part)))
            for ids, count, found in zip(maps, counts, described, strict=True):
                numbers = torch.from_numpy(ids[part].astype(np.int64)).to(device)
                found.append(net.describe(features, numbers, count))
        for found, result in zip(described, parts, strict=True):
            result.append(net.judge(torch.cat(found))[0].sigmoid().float().cpu().numpy())
    net.train(was_training)
    return [np.concatenate(result) for result in parts]


def patch_probabilities(net: PatchNet, crops: Crops, cam: np.ndarray | None = None, *, shifts: int = 2) -> np.ndarray:
    """Probability of a lesion on pixels, ``(N, S, S)`` float32 in [0, 1], 0 outside the lung.

    Averaged over the slice and its mirror image and, for squares, over ``shifts * shifts`` positions of the grid,
    which refines the blocks (shifted grids have no exact mirror image, so a mirrored slice may differ in the last
    few percent). The grid over coarse components needs their activation map ``cam``.
    """
    settings = net.settings
    flipped = Crops(crops.images[..., ::-1].copy(), crops.lungs[..., ::-1].copy(), crops.boxes)
    if settings.reading == "grid":
        maps = [patch_ids(crops, cam, settings)]
    else:
        places = [k * settings.patch // shifts for k in range(shifts)]
        maps = [square_ids(crops.lungs, settings.patch, offset=(a, b)) for a in places for b in places]
    counts, batch = [int(ids.max(initial=0)) for ids in maps], 32
    mirrored = [ids[..., ::-1].copy() for ids in maps]
    result = np.zeros(crops.images.shape, np.float32)
    for ids, scores, back, again in zip(maps, _scores(net, crops, maps, counts, batch), mirrored,
                                        _scores(net, flipped, mirrored, counts, batch), strict=True):
        result += spread(scores, ids) * (ids > 0) / (2 * len(maps))
        result += (spread(again, back) * (back > 0))[..., ::-1] / (2 * len(maps))
    return result * crops.lungs
