"""Every stage measured against lesion masks, as one table.

All stages see the same slices, the same lungs and the same metric code. Each has its threshold fixed in
advance in the settings.

Full supervision on the test slices themselves, by cross-validation: what the weak method is to be compared with.

The same U-Net and the same training loop, taught with radiologists' masks. Each fold's net is measured on slices
that it never saw. Lesion-free slices of the training set take part as well, since they cost no mask.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from skimage.filters import threshold_otsu
from torch import nn
from tqdm import tqdm

from covidseg.classifier import Classifier, Ensemble, auc, slice_probabilities
from covidseg.data.folder import Case, Dataset
from covidseg.data.scan import Scan, read_mask, read_scan
from covidseg.errors import DatasetError
from covidseg.evaluation.metrics import Scores, confusion, macro, micro
from covidseg.evaluation.statistics import level_counts, reliability_sums
from covidseg.gradcam import CamSettings, activation_maps
from covidseg.lungs import is_volume, lung_masks
from covidseg.patches import patch_probabilities
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, WeakSet, crop_masks, uncrop, uncrop_all
from covidseg.segmenter import fuse, lesion_probabilities, supervised_settings

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
        reliability: ``(bins, 3)`` of the map inside the lungs, see
            :func:`covidseg.evaluation.statistics.reliability_sums`.
        levels: ``(101, 4)`` pooled counts at every level, see :func:`covidseg.evaluation.statistics.level_counts`.
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


def believed_maps(net: Classifier | Ensemble, crops: Crops, ill: np.ndarray, settings: CamSettings) -> np.ndarray:
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
    classifier, (patch_net, _), segmenter = run.ensemble(best), run.mil(best), run.segmenter()

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
    return Outliner([("Segmenter, true masks", "pixel masks", supervised_settings(run.profile.segmenter).threshold)],
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


# --- cross-validation -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class MaskedSlices:
    """The measured slices of a set with their true masks: ``M`` in all, in ``N`` of them a lung was found.

    Attributes:
        crops: ``N`` slices, lungs completed.
        masks: ``(N, S, S)`` bool, the truth in the crops.
        patients: ``(N,)`` str.
        places: ``(N,)`` int, which of the ``M`` slices each is.
        full: ``M`` masks ``(H, W)`` bool, the truth in full slices. What lies in slices without a lung is missed.
        names: ``M`` times ``volume:slice``.
    """

    crops: Crops
    masks: np.ndarray
    patients: np.ndarray
    places: np.ndarray
    full: list[np.ndarray]
    names: tuple[str, ...]


def masked_slices(run: Run, data: Dataset) -> MaskedSlices:
    """Reads a set with masks and prepares its slices as the run does."""
    size = run.profile.prepare.size
    crops, masks, patients = list[Crops](), list[np.ndarray](), list[str]()
    places, full, names = list[int](), list[np.ndarray](), list[str]()
    for case, truth in zip(data.cases, read_truth(data), strict=True):
        found, part = run.crops(truth.scan.pixels)
        measured = np.isin(found, truth.slices)
        found, part = found[measured], part.take(measured)
        crops.append(part)
        masks.append(crop_masks(truth.mask[found], part.boxes, size))
        patients += [case.patient] * len(found)
        places += (len(full) + np.flatnonzero(np.isin(truth.slices, found))).tolist()
        full += list(truth.mask[truth.slices])
        names += [f"{case.id}:{k}" for k in truth.slices]
    merged = Crops(*(np.concatenate([getattr(c, name) for c in crops]) for name in ("images", "lungs", "boxes")))
    return MaskedSlices(merged, np.concatenate(masks), np.array(patients), np.array(places), full, tuple(names))


def split_folds(patients: np.ndarray, folds: int) -> np.ndarray:
    """Fold of each slice, ``(N,)`` int: whole patients if there are enough of them.

    A stack of unrelated slices counts as one patient; it is cut into runs of neighbours, which often show the same
    person.

    Raises:
        DatasetError: there are fewer slices than folds.
    """
    if len(patients) < folds:
        raise DatasetError(f"{len(patients)} slices with lung are too few for {folds} folds",
                           remedy="Choose fewer folds or a larger set")
    names = np.unique(patients)
    if len(names) < folds:
        return np.arange(len(patients)) * folds // len(patients)
    sizes, fold_of = np.zeros(folds), {}
    for name in sorted(names, key=lambda n: -(patients == n).sum()):  # largest first, into the emptiest fold
        fold_of[name] = int(np.argmin(sizes))
        sizes[fold_of[name]] += (patients == name).sum()
    return np.array([fold_of[name] for name in patients])


def cross_validated(run: Run, data: Dataset, *, folds: int = 5) -> Evaluation:
    """Full slices, each predicted by a net that was trained on the other folds.

    Args:
        run: gives the lungs, the lesion-free slices, the segmenter's settings and the seed.
        data: a set with lesion masks.

    Returns:
        One row; slices in the order of :func:`covidseg.evaluation.evaluate.measure`.

    Raises:
        DatasetError: the set has no masks, too few slices, or no lesion outside one of the folds.
    """
    slices = masked_slices(run, data)
    fold = split_folds(slices.patients, folds)
    threshold = supervised_settings(run.profile.segmenter).threshold
    counts = np.concatenate([confusion(np.zeros_like(mask)[None], mask[None]) for mask in slices.full])
    sums, levels = np.zeros((BINS, 3)), np.zeros((STEPS + 1, 4), np.int64)
    for place in set(range(len(slices.full))) - set(slices.places.tolist()):  # no lung, no prediction
        levels += level_counts(np.zeros(slices.full[place].shape), slices.full[place], STEPS)
    for k in range(folds):
        net = _train(run, slices, np.flatnonzero(fold != k), f"fold {k + 1} of {folds}")
        unseen = np.flatnonzero(fold == k)
        part = slices.crops.take(unseen)
        for n, small, lung, box in zip(unseen, lesion_probabilities(net, part), part.lungs, part.boxes, strict=True):
            place = slices.places[n]
            mask = slices.full[place]
            probability, inside = uncrop(small, box, mask.shape).clip(0, 1), uncrop(lung, box, mask.shape) > 0.5
            counts[place] = confusion(probability[None] >= threshold, mask[None])[0]
            sums += reliability_sums(probability[inside], mask[inside], BINS)
            levels += level_counts(probability, mask, STEPS)
    row = StageResult("Segmenter", "pixel masks", threshold, counts, sums, levels)
    return Evaluation([row], float("nan"), len(counts), names=slices.names)


def _train(run: Run, slices: MaskedSlices, seen: np.ndarray, name: str) -> nn.Module:
    """A net taught with the masks of some slices and with the lesion-free slices of the run; stored with the run."""
    weak = run.weak()
    # Of other patients only: in a set that is both trained and measured on, they may be the very slices to measure.
    free = np.flatnonzero((weak.labels == 0) & ~np.isin(weak.patients, slices.patients))
    both = [slices.crops.take(seen), weak.crops.take(free)]
    crops = Crops(*(np.concatenate([getattr(c, field) for c in both]) for field in ("images", "lungs", "boxes")))
    masks = np.concatenate([slices.masks[seen], np.zeros((len(free), *slices.masks.shape[1:]), bool)])
    patients = np.concatenate([slices.patients[seen], weak.patients[free]])
    data = WeakSet(crops, masks.any(axis=(1, 2)).astype(int), patients, np.arange(len(masks)).astype(str))
    if set(data.labels.tolist()) != {0, 1}:
        raise DatasetError("a fold leaves no slice with, or none without, a lesion to learn from",
                           remedy="Choose fewer folds or a larger set")
    key = run.masks_key(masks, hashlib.sha256(crops.images.tobytes()).hexdigest(), patients.tolist())
    return run.taught_with_masks("fold", key, data, masks, name)


# --- the truth ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Truth:
    """Lesion masks of one scan, for measuring only. Training code never imports this.

    Attributes:
        scan: the picture.
        mask: ``(S, H, W)`` bool.
        slices: ``(M,)`` int, the slices that are measured: the labelled ones, or all if none has a label.
    """

    scan: Scan
    mask: np.ndarray
    slices: np.ndarray


def read_truth(dataset: Dataset) -> list[Truth]:
    """Reads scans and lesion masks of a data folder.

    A split leaves only one side's labels in a stack of slices, and so decides what is measured.

    Raises:
        DatasetError: a volume has no mask, or a label names a slice that it does not have.
    """
    truths = []
    for case in dataset.cases:
        if case.mask is None:
            raise DatasetError(f"has no lesion mask for {case.id}", path=dataset.root,
                               remedy="Evaluation needs mask/ID.nii.gz beside im/ID.nii.gz")
        scan = read_scan(case.image)
        mask = read_mask(case.mask, like=scan)
        slices = np.array(sorted(case.labels)) if case.labels else np.arange(len(mask))
        if slices[-1] >= len(mask):
            raise DatasetError(f"volume {case.id} has {len(mask)} slices, slice {slices[-1]} is labelled",
                               path=dataset.root, remedy="Slices count from 0; correct the label table")
        truths.append(Truth(scan, mask, slices))
    return truths
