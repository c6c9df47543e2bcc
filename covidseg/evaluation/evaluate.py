"""Lesion masks as the measure: the stages of a run, and any other method, counted on the same full slices.

Every method sees the same slices and the same lungs, draws its outline at a threshold that is fixed in advance in the
settings, and is counted by the same code. Training code never imports this module: masks are for measuring, and for
teaching the one net that stands for full supervision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from skimage.filters import threshold_otsu
from torch import nn

from covidseg.classifier import Classifier, Ensemble, slice_probabilities
from covidseg.data.folder import Case, Dataset
from covidseg.data.grey import clean
from covidseg.data.scan import Scan, read_classes, read_mask, read_scan
from covidseg.errors import DatasetError
from covidseg.evaluation.metrics import (
    CLASSES,
    Distance,
    Scores,
    auc,
    class_counts,
    class_names,
    class_sensitivity,
    confusion,
    distance,
    hd95,
    macro,
    micro,
)
from covidseg.evaluation.statistics import level_counts, reliability_sums
from covidseg.gradcam import CamSettings, activation_maps
from covidseg.lungs import is_volume, to_grid, with_bar
from covidseg.patches import patch_probabilities
from covidseg.pipeline import Run
from covidseg.preprocess import Crops, crop_masks, join_crops, uncrop_all
from covidseg.segmenter import PLAIN, fuse, lesion_probabilities, supervised_settings

# --- the truth ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Truth:
    """The lesion mask of one scan, for measuring only.

    Attributes:
        case: The scan's entry in its data folder.
        scan: The picture.
        classes: ``(S, H, W)`` uint8, 0 outside lesions, else the number of a class; 1 in a mask without classes.
        slices: ``(M,)`` int. The slices that are measured: the labelled ones, or all if none has a label. A split
            leaves only one side's labels in a stack of slices, and so decides what is measured.
    """

    case: Case
    scan: Scan
    classes: np.ndarray
    slices: np.ndarray

    @cached_property
    def mask(self) -> np.ndarray:
        """``(S, H, W)`` bool, lesions of any class."""
        return self.classes > 0

    @cached_property
    def kinds(self) -> tuple[str, str, str]:
        """What the classes are called, :func:`covidseg.evaluation.metrics.class_names`."""
        return class_names(self.case.mask or self.case.image)

    def pixel_mm(self) -> tuple[float, float] | None:
        """Height and width of a pixel in mm; None where nobody knows, as of pictures in grey levels of a display."""
        return self.scan.grid.pixel_mm() if self.scan.unit == "HU" else None


def read_truth(dataset: Dataset) -> Iterator[Truth]:
    """Reads scans and lesion masks of a data folder, one scan after the other.

    Raises:
        DatasetError: a volume has no mask, or a label names a slice that it does not have.
    """
    for case in dataset.cases:
        if case.mask is None:
            raise DatasetError(f"has no lesion mask for {case.id}", path=dataset.root,
                               remedy="Evaluation needs mask/ID.nii.gz beside im/ID.nii.gz")
        scan = read_scan(case.image)
        classes = read_classes(case.mask, like=scan)
        yield Truth(case, scan, classes, np.array(dataset.labelled(case, len(classes)) or range(len(classes))))


def training_truth(run: Run) -> np.ndarray:
    """True masks of the training crops, ``(N, S, S)`` bool, for the upper bound and for looking only.

    Raises:
        DatasetError: the training set has no masks.
    """
    masks = {truth.case.id: truth.mask for truth in read_truth(run.data)}
    data, small = run.weak(), []
    for name, box in zip(data.names, data.crops.boxes, strict=True):
        volume, number = name.rsplit(":", 1)
        small.append(crop_masks(masks[volume][[int(number)]], box[None], run.profile.prepare.size)[0])
    return np.array(small)


# --- what was measured ----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class StageResult:
    """One row of the table.

    Attributes:
        name: What made the masks.
        supervision: What it was taught with.
        threshold: Fixed in advance; NaN where it is found in each slice.
        counts: ``(N, 4)`` confusion counts of every measured slice.
        reliability: ``(bins, 3)`` sums of the map inside the lungs, for
            :func:`covidseg.evaluation.statistics.calibration`.
        levels: ``(101, 4)`` pooled counts for outlines drawn at 0, 0.01, ... 1.
        classes: ``(N, 3, 2)`` :func:`covidseg.evaluation.metrics.class_counts`.
        distances: ``(N,)`` HD95 of each slice in pixels, :func:`covidseg.evaluation.metrics.hd95`.
        pixel_mm: ``(N,)`` width of a pixel in mm; NaN where nobody knows.
        kinds: What the classes are called, :func:`covidseg.evaluation.metrics.class_names`.
    """

    name: str
    supervision: str
    threshold: float
    counts: np.ndarray
    reliability: np.ndarray
    levels: np.ndarray
    classes: np.ndarray
    distances: np.ndarray
    pixel_mm: np.ndarray
    kinds: tuple[str, str, str] = CLASSES

    def macro(self) -> Scores:
        """Mean over slices with a lesion."""
        return macro(self.counts)

    def micro(self) -> Scores:
        """Over pooled pixels of all slices."""
        return micro(self.counts)

    def class_sensitivity(self) -> dict[str, float]:
        """Sensitivity of each class of lesions by its name; empty where the masks tell no classes apart."""
        return class_sensitivity(self.classes, self.kinds)

    def distance(self) -> Distance:
        """Mean HD95, in mm where the size of all pixels is known."""
        return distance(self.distances, self.pixel_mm)


@dataclass(frozen=True)
class Evaluation:
    """What was measured on a test set.

    Attributes:
        stages: The rows of the table.
        classifier_auc: How well the classifier tells slices apart. NaN if the test set has one class only.
        slices: How many were measured.
        lungs: ``(N, 4)`` confusion counts of the lung masks, taken as if they were lesion masks.
        names: ``volume:slice`` of every measured slice.
    """

    stages: list[StageResult]
    classifier_auc: float
    slices: int
    lungs: np.ndarray | None = None
    names: tuple[str, ...] = ()

    def lung_shares(self) -> tuple[float, float]:
        """Shares of all lesions and of the slices that lie in the lungs found; NaN where not measured."""
        return shares(np.zeros((1, 4)) if self.lungs is None else self.lungs)


def shares(counts: np.ndarray) -> tuple[float, float]:
    """Share of the lesions and share of the pixels that masks take up, from their ``(N, 4)`` confusion counts."""
    hit, false, missed, rest = counts.sum(axis=0).tolist()
    lesion, pixels = hit + missed, hit + false + missed + rest
    return hit / lesion if lesion else float("nan"), (hit + false) / pixels if pixels else float("nan")


def cut_level(threshold: float) -> float:
    """The level at which a map is cut: its threshold, or one half for a map that is a mask already (NaN)."""
    return 0.5 if np.isnan(threshold) else threshold


# --- methods --------------------------------------------------------------------------------------------------------

Maps = tuple[np.ndarray | None, list[np.ndarray]]  # probability of each slice (N,), a map (N, S, S) for each row


@dataclass(frozen=True)
class Method:
    """A way to outline lesions, or several stages of one.

    Attributes:
        rows: Name, supervision and threshold of each stage. The last one is the method's answer.
        maps: Takes crops, and whether they are one volume in order. Gives the probability that a slice has a lesion
            ``(N,)``, None where nothing judges slices, and for each row lesion maps ``(N, S, S)`` in [0, 1].
    """

    rows: list[tuple[str, str, float]]
    maps: Callable[[Crops, bool], Maps]


def believed_maps(net: Classifier | Ensemble, crops: Crops, ill: np.ndarray, settings: CamSettings) -> np.ndarray:
    """Activation maps ``(N, S, S)`` float32 in [0, 1] of the slices that the classifiers call ill, 0 in the others.

    Each map is scaled to its own maximum, so that it would be as strong in a slice without a lesion.
    """
    maps = np.zeros(crops.images.shape, np.float32)
    if ill.any():
        maps[ill] = activation_maps(net, crops.take(np.flatnonzero(ill)), settings)
    return maps


def otsu_in_lung(images: np.ndarray, lungs: np.ndarray) -> np.ndarray:
    """Otsu's threshold inside the lung of each slice, ``(N, S, S)`` float32, 0 or 1."""
    result = np.zeros(images.shape, np.float32)
    for out, image, lung in zip(result, images, lungs, strict=True):
        values = image[lung]
        if len(values) and values.min() < values.max():
            out[:] = lung & (image > threshold_otsu(values))
    return result


def otsu_method() -> Method:
    """The floor that needs no learning: :func:`otsu_in_lung`."""
    return Method([("Otsu in the lung", "none", float("nan"))],
                  lambda crops, volume: (None, [otsu_in_lung(crops.images, crops.lungs)]))


def stage_method(run: Run) -> Method:
    """Grad-CAM, patches, fine labels and segmenter of a run, as after its last round. Trains what is missing."""
    p, last = run.profile, run.profile.mutual.last
    classifier, (patch_net, _), segmenter = run.ensemble(last), run.mil(last), run.segmenter()

    def maps(crops: Crops, volume: bool) -> Maps:
        probability = slice_probabilities(classifier, crops)
        cam = believed_maps(classifier, crops, probability >= 0.5, p.cam)
        patches = patch_probabilities(patch_net, crops, cam)
        return probability, [cam, patches, fuse(cam, patches, p.fine) * crops.lungs,
                             lesion_probabilities(segmenter, crops)]
    return Method([("Grad-CAM", "slice labels", p.cam.outline), ("Patch MIL", "slice labels", p.mil.threshold),
                   ("Fine label map", "slice labels", 0.5), ("Segmenter", "slice labels", p.segmenter.threshold)], maps)


def supervised_method(run: Run, net: nn.Module) -> Method:
    """The segmenter taught with the true masks of the training slices, from :meth:`Run.supervised`."""
    return Method([("Segmenter, true masks", "pixel masks", supervised_settings(run.profile.segmenter).threshold)],
                  lambda crops, volume: (None, [lesion_probabilities(net, crops, gains=PLAIN)]))


# --- measuring ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class _Opened:
    """A scan of a test set: its truth, numbers of the slices with lung ``(N,)``, their crops, and what is measured.

    ``volume`` says whether the slices are one body in order, ``seen`` which crops are measured, ``(N,)`` bool.
    """

    truth: Truth
    found: np.ndarray
    crops: Crops
    volume: bool
    seen: np.ndarray

    def full(self, maps: np.ndarray) -> np.ndarray:
        """The measured slices in full, ``(M, H, W)`` float32, from maps of the crops ``(N, S, S)``."""
        return uncrop_all(maps, self.crops.boxes, self.found, self.truth.mask.shape)[self.truth.slices]


def found_crops(run: Run, case: Case, scan: Scan) -> tuple[np.ndarray, Crops, bool]:
    """Numbers of the slices of a scan that have lung ``(N,)``, their crops, and whether it is one body in order."""
    volume = is_volume([to_grid(clean(image).values, 32) for image in scan.pixels])
    found, crops = run.crops(scan.pixels, volume, scan.aspect())
    if run.profile.true_lungs and case.lung is not None:
        true_lungs = read_mask(case.lung, like=scan)[found]
        crops = replace(crops, lungs=crop_masks(true_lungs, crops.boxes, run.profile.prepare.size))
    return found, crops, volume


def _open(run: Run, test: Dataset) -> Iterator[_Opened]:
    for truth in read_truth(test):
        found, crops, volume = found_crops(run, truth.case, truth.scan)
        yield _Opened(truth, found, crops, volume, np.isin(found, truth.slices))


def measure(run: Run, test: Dataset, methods: Sequence[Method], *, progress: bool = False) -> list[Evaluation]:
    """Measures outlines on full slices of a test set: the same lungs and the same counting for all methods.

    Args:
        run: finds the lungs.
        test: a folder with lesion masks. Slices in which no lung was found count with an empty prediction.
        methods: what is measured; each is asked once a scan, in their order.
        progress: show a bar over the test volumes.
    """
    counted: list[list[list[StageResult]]] = [[] for _ in methods]  # of each method, scan by scan, its rows
    verdicts: list[list[np.ndarray]] = [[] for _ in methods]
    lung_counts, labels, names = list[np.ndarray](), list[np.ndarray](), list[str]()
    for scan in with_bar(_open(run, test), "measuring", progress, "volume", len(test.cases)):
        truth, lungs = scan.truth, scan.full(scan.crops.lungs) > 0.5
        mask = truth.mask[truth.slices]
        labels.append(truth.mask[scan.found[scan.seen]].any(axis=(1, 2)))
        lung_counts.append(confusion(lungs, mask))
        names += [f"{truth.case.id}:{k}" for k in truth.slices]
        for method, rows, verdict in zip(methods, counted, verdicts, strict=True):
            probability, maps = method.maps(scan.crops, scan.volume)
            if probability is not None:
                verdict.append(probability[scan.seen])
            rows.append([_counted(row, scan.full(small).clip(0, 1), truth, lungs)
                         for row, small in zip(method.rows, maps, strict=True)])
    inside = np.concatenate(lung_counts)
    areas = [auc(np.concatenate(verdict), np.concatenate(labels)) if verdict else float("nan") for verdict in verdicts]
    return [Evaluation([_joined(row) for row in zip(*rows, strict=True)], area, len(inside), inside, tuple(names))
            for rows, area in zip(counted, areas, strict=True)]


def _counted(row: tuple[str, str, float], maps: np.ndarray, truth: Truth, lungs: np.ndarray) -> StageResult:
    """What one outline gets right in the measured slices ``(M, H, W)``. All that is measured is counted here."""
    outline, mask = maps >= cut_level(row[2]), truth.mask[truth.slices]
    height, width = truth.pixel_mm() or (1.0, 1.0)
    return StageResult(*row, confusion(outline, mask), reliability_sums(maps[lungs], mask[lungs]),
                       level_counts(maps, mask), class_counts(outline, truth.classes[truth.slices]),
                       hd95(outline, mask, (height / width, 1.0)),
                       np.full(len(mask), width if truth.pixel_mm() else np.nan), truth.kinds)


def _joined(scans: Sequence[StageResult]) -> StageResult:
    """One row from those of all scans."""
    def slices(name: str) -> np.ndarray:
        return np.concatenate([getattr(scan, name) for scan in scans])
    return replace(scans[0], counts=slices("counts"), classes=slices("classes"), distances=slices("distances"),
                   pixel_mm=slices("pixel_mm"), reliability=np.sum([scan.reliability for scan in scans], axis=0),
                   levels=np.sum([scan.levels for scan in scans], axis=0))


def evaluate_run(run: Run, test: Dataset, *, upper_bound: bool | None = None) -> Evaluation:
    """Measures the floor, all stages of a run (missing ones are trained) and the upper bound, as one table.

    The upper bound is trained with true masks; by default it is if the training set has them.
    """
    if upper_bound is None:
        upper_bound = all(case.mask is not None for case in run.data.cases)
    bound = [supervised_method(run, run.supervised(training_truth(run)))] if upper_bound else []
    floor, stages, *rest = measure(run, test, [otsu_method(), stage_method(run), *bound])
    return replace(stages, stages=[row for part in (floor, stages, *rest) for row in part.stages])


# --- looking, slice by slice ----------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Unseen:
    """Crops of a test set with their truth, to look at answers slice by slice. Figures come from :func:`measure`.

    Attributes:
        scans: Of each scan all crops in order, whether they are one volume, and which of them are measured.
        crops: The ``N`` measured slices of all scans in which lungs were found.
        truth: ``(N, S, S)`` bool.
        names: ``volume:slice`` of each.
        patients: ``(N,)`` str.
    """

    scans: list[tuple[Crops, bool, np.ndarray]]
    crops: Crops
    truth: np.ndarray
    names: list[str]
    patients: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """``(N,)`` int, 1 = the crop shows a lesion."""
        return self.truth.any(axis=(1, 2)).astype(int)

    def maps(self, make: Callable[[Crops, bool], np.ndarray]) -> np.ndarray:
        """What ``make`` says of every slice, ``(N, ...)``; it gets a whole scan at a time, as slab nets need it."""
        return np.concatenate([make(crops, volume)[seen] for crops, volume, seen in self.scans])

    def answers(self, method: Method) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
        """A method's answers.

        Returns:
            Probability that a slice has a lesion ``(N,)``, None where nothing judges slices; lesion maps
            ``(N, S, S)`` in [0, 1]; and the masks, cut at the level of the settings.
        """
        judged = [(*method.maps(crops, volume), seen) for crops, volume, seen in self.scans]
        maps = np.concatenate([each[-1][seen] for _, each, seen in judged])
        verdicts = [probability[seen] for probability, _, seen in judged if probability is not None]
        return np.concatenate(verdicts) if verdicts else None, maps, maps >= cut_level(method.rows[-1][2])


def unseen_slices(run: Run, test: Dataset) -> Unseen:
    """Crops and truth of the measured slices of a test set."""
    opened = list(_open(run, test))
    numbers = [(scan.truth.case, k) for scan in opened for k in scan.found[scan.seen]]
    return Unseen(
        [(scan.crops, scan.volume, scan.seen) for scan in opened],
        join_crops([scan.crops.take(scan.seen) for scan in opened]),
        np.concatenate([crop_masks(scan.truth.mask[scan.found[scan.seen]], scan.crops.boxes[scan.seen],
                                   run.profile.prepare.size) for scan in opened]),
        [f"{case.id}:{k}" for case, k in numbers], np.array([case.patient for case, _ in numbers]))
