"""Every stage measured against lesion masks, as one table: the only module besides ``metrics`` that opens masks.

All stages see the same slices, the same lungs and the same metric code. Each has its threshold fixed in
advance in the settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from skimage.filters import threshold_otsu
from torch import nn
from tqdm import tqdm

from covidseg.cam import CamSettings, activation_maps
from covidseg.classify import Classifier, Committee, auc, slice_probabilities
from covidseg.dataset import Case, Dataset
from covidseg.fine import fuse
from covidseg.io import read_mask, read_scan
from covidseg.lungs import is_volume, lung_masks
from covidseg.metrics import Scores, Truth, confusion, macro, micro, read_truth
from covidseg.mil import patch_probabilities
from covidseg.pipeline import Run
from covidseg.prepare import Crops, crop_masks, uncrop_all
from covidseg.refine import lesion_probabilities, trusting
from covidseg.statistics import level_counts, reliability_sums

BINS = 10  # of the calibration
STEPS = 100  # levels at which an outline could be drawn


@dataclass(frozen=True)
class StageResult:
    """One row of the table.

    Attributes:
        name: what made the masks.
        supervision: what it was taught with.
        threshold: fixed in advance; NaN where it is found in each slice.
        counts: ``(N, 4)`` confusion counts of every measured slice.
        reliability: ``(bins, 3)`` of the map inside the lungs, see :func:`covidseg.statistics.reliability_sums`.
        levels: ``(101, 4)`` pooled counts at every level, see :func:`covidseg.statistics.level_counts`.
    """

    name: str
    supervision: str
    threshold: float
    counts: np.ndarray
    reliability: np.ndarray | None = None
    levels: np.ndarray | None = None

    def macro(self) -> Scores:
        """Mean over slices with a lesion."""
        return macro(self.counts)

    def micro(self) -> Scores:
        """Over pooled pixels of all slices."""
        return micro(self.counts)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a test set.

    Attributes:
        stages: the rows of the table.
        classifier_auc: how well the classifier tells slices apart; NaN if the test set has one class only.
        slices: how many were measured.
        lungs: ``(N, 4)`` confusion counts of the lung masks, taken as if they were lesion masks.
        names: ``volume:slice`` of every measured slice.
    """

    stages: list[StageResult]
    classifier_auc: float
    slices: int
    lungs: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def lung_shares(self) -> tuple[float, float]:
        """How much of all lesions lies inside the lungs that were found, and how much of the slices those take up.

        NaN where lungs were not measured or there is no lesion.
        """
        hit, false, missed, rest = (np.zeros(4) if self.lungs is None else self.lungs.sum(axis=0)).tolist()
        lesion, pixels = hit + missed, hit + false + missed + rest
        return hit / lesion if lesion else float("nan"), (hit + false) / pixels if pixels else float("nan")


def believed_maps(net: Classifier | Committee, crops: Crops, ill: np.ndarray, settings: CamSettings) -> np.ndarray:
    """Activation maps of the slices that the classifier calls ill, 0 in the others.

    Each map is scaled to its own maximum, so that it would be as strong in a slice without a lesion.

    Args:
        ill: ``(N,)`` bool.

    Returns:
        ``(N, S, S)`` float32 in [0, 1].
    """
    maps = np.zeros(crops.images.shape, np.float32)
    if ill.any():
        maps[ill] = activation_maps(net, crops.take(np.flatnonzero(ill)), settings)
    return maps


def otsu_in_lung(images: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """The floor that needs no learning: Otsu's threshold inside the lung of each slice.

    Args:
        images: ``(N, S, S)`` normalised crops.
        lungs: ``(N, S, S)`` bool.

    Returns:
        ``(N, S, S)`` float32, 0 or 1.
    """
    result = np.zeros(images.shape, np.float32)
    for out, image, lung in zip(result, images, lungs, strict=True):
        values = image[lung]
        if len(values) and values.min() < values.max():
            out[:] = lung & (image > threshold_otsu(values))
    return result


def training_truth(run: Run) -> np.ndarray:
    """True masks of the training crops, ``(N, S, S)`` bool, for the upper bound and for looking only.

    Raises:
        DatasetError: the training set has no masks.
    """
    truths = {case.id: truth.mask for case, truth in zip(run.data.cases, read_truth(run.data), strict=True)}
    data = run.weak()
    masks = []
    for name, box in zip(data.names, data.crops.boxes, strict=True):
        volume, number = name.rsplit(":", 1)
        masks.append(crop_masks(truths[volume][[int(number)]], box[None], run.profile.prepare.size)[0])
    return np.array(masks)


Maps = tuple[np.ndarray | None, list[np.ndarray]]  # probability of each slice (N,), a map (N, S, S) for each row


@dataclass(frozen=True)
class Outliner:
    """Something that outlines lesions, in one way or stage by stage.

    Attributes:
        rows: name, what it was taught with, and threshold of each way; the last one is the answer.
        maps: takes crops, and whether they are one volume in order. Gives the probability that a slice has a lesion
            ``(N,)``, None where nothing judges slices, and for each row lesion maps ``(N, S, S)`` in [0, 1].
    """

    rows: list[tuple[str, str, float]]
    maps: Callable[[Crops, bool], Maps]


def stage_outliner(run: Run) -> Outliner:
    """Stages 3 to 6 of a run, classifier and patches as they are after its best round. Trains what is missing."""
    p, best = run.profile, run.best()
    classifier, (patch_net, _), segmenter = run.committee(best), run.mil(best), run.segmenter()

    def maps(crops: Crops, volume: bool) -> Maps:
        probability = slice_probabilities(classifier, crops)
        cam = believed_maps(classifier, crops, probability >= 0.5, p.cam)
        patches = patch_probabilities(patch_net, crops, cam)
        return probability, [cam, patches, fuse(cam, patches, p.fine) * crops.lungs,
                             lesion_probabilities(segmenter, crops)]
    return Outliner([("Grad-CAM", "slice labels", p.cam.outline), ("Patch MIL", "slice labels", p.mil.threshold),
                     ("Fine label map", "slice labels", 0.5), ("Segmenter", "slice labels", p.segmenter.threshold)],
                    maps)


def otsu_outliner() -> Outliner:
    """The floor: :func:`otsu_in_lung`."""
    return Outliner([("Otsu in the lung", "none", float("nan"))],
                    lambda crops, volume: (None, [otsu_in_lung(crops.images, crops.lungs)]))


def supervised_outliner(run: Run, net: nn.Module) -> Outliner:
    """The segmenter taught with the true masks of the training slices, from :meth:`Run.supervised`."""
    return Outliner([("Segmenter, true masks", "pixel masks", trusting(run.profile.segmenter).threshold)],
                    lambda crops, volume: (None, [lesion_probabilities(net, crops)]))


def _opened(run: Run, test: Dataset) -> Iterator[tuple[Case, Truth, np.ndarray, Crops, bool]]:
    """Each scan of a test set: its truth, the slices with lung, their crops, and whether they are one volume."""
    for case in test.cases:
        truth = read_truth(Dataset(test.root, (case,)))[0]
        volume = is_volume(truth.scan.pixels)
        found, crops = run.crops(truth.scan.pixels, volume)
        if run.profile.true_lungs and case.lung is not None:
            true_lungs = read_mask(case.lung, like=truth.scan)[found]
            crops = replace(crops, lungs=crop_masks(true_lungs, crops.boxes, run.profile.prepare.size))
        yield case, truth, found, crops, volume


@dataclass(frozen=True)
class Unseen:
    """Crops of a test set with their truth, to look at answers slice by slice. Figures come from :func:`measure`.

    Attributes:
        scans: of each scan all crops in order, whether they are one volume, and which of them are measured.
        crops: the ``N`` measured slices of all scans.
        truth: ``(N, S, S)`` bool.
        names: ``volume:slice`` of each.
    """

    scans: list[tuple[Crops, bool, np.ndarray]]
    crops: Crops
    truth: np.ndarray
    names: list[str]

    @property
    def labels(self) -> np.ndarray:
        """``(N,)`` int, 1 = the crop shows a lesion."""
        return self.truth.any(axis=(1, 2)).astype(int)

    def maps(self, make: Callable[[Crops, bool], np.ndarray]) -> np.ndarray:
        """What ``make`` says of every slice, ``(N, ...)``; it gets a whole scan at a time, as slab nets need it."""
        return np.concatenate([make(crops, volume)[seen] for crops, volume, seen in self.scans])

    def answers(self, outliner: Outliner) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """A system's answers.

        Returns:
            Probability that a slice has a lesion ``(N,)``, None where nothing judges slices; lesion maps
            ``(N, S, S)`` in [0, 1]; and the masks, cut at the level of the settings.
        """
        judged = [(*outliner.maps(crops, volume), seen) for crops, volume, seen in self.scans]
        maps = np.concatenate([each[-1][seen] for _, each, seen in judged])
        verdicts = [probability[seen] for probability, _, seen in judged if probability is not None]
        level = outliner.rows[-1][2]
        return np.concatenate(verdicts) if verdicts else None, maps, maps >= (0.5 if np.isnan(level) else level)


def unseen_slices(run: Run, test: Dataset) -> Unseen:
    """Crops and truth of the measured slices of a test set in which lungs were found."""
    scans, truths, names = list[tuple[Crops, bool, np.ndarray]](), list[np.ndarray](), list[str]()
    for case, truth, found, crops, volume in _opened(run, test):
        seen = np.isin(found, truth.slices)
        scans.append((crops, volume, seen))
        truths.append(crop_masks(truth.mask[found[seen]], crops.boxes[seen], run.profile.prepare.size))
        names += [f"{case.id}:{k}" for k in found[seen]]
    parts = [crops.take(seen) for crops, _, seen in scans]
    crops = Crops(*(np.concatenate([getattr(part, f) for part in parts]) for f in ("images", "lungs", "boxes")))
    return Unseen(scans, crops, np.concatenate(truths), names)


def measure(run: Run, test: Dataset, outliners: Sequence[Outliner], *, progress: bool = False) -> list[Evaluation]:
    """Measures outlines on full slices of a test set: the same lungs and the same counting for all.

    Args:
        run: finds the lungs.
        test: a folder with lesion masks. Slices in which no lung was found count with an empty prediction.
        progress: show a bar over the test volumes.

    Returns:
        What was measured, for each outliner.
    """
    counts: list[list[list[np.ndarray]]] = [[[] for _ in outliner.rows] for outliner in outliners]
    sums = [[np.zeros((BINS, 3)) for _ in outliner.rows] for outliner in outliners]
    levels = [[np.zeros((STEPS + 1, 4), np.int64) for _ in outliner.rows] for outliner in outliners]
    verdicts: list[list[np.ndarray]] = [[] for _ in outliners]
    lung_counts, labels, names = list[np.ndarray](), list[np.ndarray](), list[str]()
    for case, truth, found, crops, volume in tqdm(_opened(run, test), desc="measuring", unit="volume",
                                                  total=len(test.cases), disable=not progress):
        mask = truth.mask
        names += [f"{case.id}:{k}" for k in truth.slices]
        lungs = uncrop_all(crops.lungs, crops.boxes, found, mask.shape)[truth.slices] > 0.5
        lung_counts.append(confusion(lungs, mask[truth.slices]))
        seen = np.isin(found, truth.slices)
        labels.append(mask[found[seen]].any(axis=(1, 2)).astype(int))
        for n, outliner in enumerate(outliners):
            probability, maps = outliner.maps(crops, volume)
            if probability is not None:
                verdicts[n].append(probability[seen])
            for k, ((_, _, threshold), small) in enumerate(zip(outliner.rows, maps, strict=True)):
                full = uncrop_all(small, crops.boxes, found, mask.shape)[truth.slices].clip(0, 1)
                level = 0.5 if np.isnan(threshold) else threshold
                counts[n][k].append(confusion(full >= level, mask[truth.slices]))
                sums[n][k] += reliability_sums(full[lungs], mask[truth.slices][lungs], BINS)
                levels[n][k] += level_counts(full, mask[truth.slices], STEPS)
    all_labels, inside = np.concatenate(labels), np.concatenate(lung_counts)
    results = []
    for n, outliner in enumerate(outliners):
        judged = verdicts[n] and len(set(all_labels)) == 2
        area = auc(np.concatenate(verdicts[n]), all_labels) if judged else float("nan")
        stages = [StageResult(*row, np.concatenate(each), *both)
                  for row, each, *both in zip(outliner.rows, counts[n], sums[n], levels[n], strict=True)]
        results.append(Evaluation(stages, area, len(inside), inside, tuple(names)))
    return results


def evaluate_run(run: Run, test: Dataset, *, upper_bound: bool | None = None, progress: bool = False) -> Evaluation:
    """Measures the floor, all stages of a run and the upper bound, as one table.

    Args:
        run: trained stages; missing ones are trained first.
        test: as of :func:`measure`.
        upper_bound: also train with true masks; default: if the training set has them.
        progress: show a bar over the test volumes.
    """
    if upper_bound is None:
        upper_bound = all(case.mask is not None for case in run.data.cases)
    bound = [supervised_outliner(run, run.supervised(training_truth(run)))] if upper_bound else []
    floor, stages, *rest = measure(run, test, [otsu_outliner(), stage_outliner(run), *bound], progress=progress)
    return replace(stages, stages=[row for part in (floor, stages, *rest) for row in part.stages])


Finder = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LungResult:
    """Found lungs against true lungs: Dice of each slice with lung, and the slice it belongs to."""

    dice: np.ndarray
    names: np.ndarray


def evaluate_lungs(data: Dataset, find: Finder = lung_masks, *, least: float = 0.01) -> LungResult:
    """Dice of lung masks on every slice of which at least ``least`` is lung; skips volumes without truth.

    Args:
        find: makes lung masks ``(S, H, W)`` from pixels of that shape; default the threshold, or ``run.lungs``.
    """
    dice, names = [], []
    for case in data.cases:
        if case.lung is None:
            continue
        scan = read_scan(case.image)
        truth, mask = read_mask(case.lung, like=scan), find(scan.pixels)
        for k in np.flatnonzero(truth.mean(axis=(1, 2)) >= least):
            dice.append(2 * (truth[k] & mask[k]).sum() / (truth[k].sum() + mask[k].sum()))
            names.append(f"{case.id}:{k}")
    return LungResult(np.array(dice), np.array(names))


def lesion_coverage(data: Dataset, find: Finder = lung_masks) -> tuple[float, float]:
    """How much of all lesions lies inside the lung masks, and how much of the slices they take up: two shares.

    A lesion outside the mask is lost for good, and a mask of everything loses none: the two belong together.
    """
    inside = lesion = masked = total = 0
    for truth in read_truth(data):
        mask, lesions = find(truth.scan.pixels)[truth.slices], truth.mask[truth.slices]
        inside, lesion = inside + int((mask & lesions).sum()), lesion + int(lesions.sum())
        masked, total = masked + int(mask.sum()), total + mask.size
    return inside / lesion if lesion else float("nan"), masked / total
