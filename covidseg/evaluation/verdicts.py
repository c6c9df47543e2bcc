"""Slices of which only the label is known: are the diseased ones found, and what is marked in the healthy ones?

Outlines are measured in slices with a lesion, nearly all of them; what a system does in healthy slices hardly shows
there. Lesion-free training slices come from the ends of the lungs, so a classifier can learn the place in the chest in
place of the lesion. Slices of both classes from the same place, or from patients that were left out, bring that to
light, and need no mask.

A slice counts as *marked* by the rule that labels follow: at least 40 pixels of a 512 x 512 slice
(:mod:`covidseg.data.layout`), outlined at the system's fixed level. A slice in which no lung was found is not marked,
and has the lowest verdict of all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from covidseg.data.folder import Case, Dataset
from covidseg.data.layout import LESION_PIXELS, REFERENCE_AREA
from covidseg.data.scan import Scan, read_scan
from covidseg.errors import DatasetError
from covidseg.evaluation.evaluate import Method, cut_level
from covidseg.evaluation.methods import SYSTEMS
from covidseg.evaluation.statistics import bootstrap, drawn_auc, drawn_share
from covidseg.evaluation.tables import Record, Table, digits, figure, rounds_used, spread
from covidseg.lungs import with_bar
from covidseg.pipeline import find_lungs
from covidseg.predict import Predictor
from covidseg.preprocess import Crops, uncrop
from covidseg.segmenter import lesion_probabilities

FIGURES = ("verdict_auc", "area_auc", "healthy_marked", "diseased_marked")
# Numbers of the slices with lung (N,), their crops, and whether the slices are one body in order.
Find = Callable[[Case, Scan], tuple[np.ndarray, Crops, bool]]
NO_LUNG = -1.0  # verdict of a slice without lung, below all probabilities


@dataclass(frozen=True)
class Verdicts:
    """What a system says of ``N`` labelled slices.

    Attributes:
        names: ``volume:slice`` of each.
        patients: ``(N,)`` str.
        labels: ``(N,)`` int, 1 = the slice shows a lesion.
        probability: ``(N,)`` that it does, by the system's classifier, :data:`NO_LUNG` where no lung was found; None
            where nothing judges slices.
        marked: ``(N,)`` outlined area, in pixels of a slice of 512 x 512.
        lung: ``(N,)`` bool, whether lung was found.
    """

    names: tuple[str, ...]
    patients: np.ndarray
    labels: np.ndarray
    probability: np.ndarray | None
    marked: np.ndarray
    lung: np.ndarray

    def figures(self, weights: np.ndarray | None = None) -> np.ndarray:
        """The four :data:`FIGURES`, ``(4, draws)``, if slices are there ``weights`` times, ``(draws, N)``, or once.

        AUC of the slice verdict and of the marked area, share of the healthy and of the diseased slices that are
        marked; all in [0, 1], NaN where undefined.
        """
        # As numbers: of bools, which may say which slices are there, sums and products are no counts.
        weights = np.ones((1, len(self.labels))) if weights is None else np.asarray(weights, float)
        marked = self.marked >= LESION_PIXELS
        verdict = np.full(len(weights), np.nan) if self.probability is None else \
            drawn_auc(self.probability, self.labels, weights)
        return np.stack([verdict, drawn_auc(self.marked, self.labels, weights),
                         *(drawn_share(marked, self.labels == label, weights) for label in (0, 1))])

    def areas(self) -> tuple[float, float]:
        """Median of the marked area in healthy and in diseased slices; NaN for a class that is missing."""
        healthy, diseased = (float(np.median(own)) if len(own := self.marked[self.labels == label]) else float("nan")
                             for label in (0, 1))
        return healthy, diseased


def demand_labels(test: Dataset) -> None:
    """Checks that there is something to judge.

    Raises:
        DatasetError: no slice of the set has a label.
    """
    if not test.labels():
        raise DatasetError("labels no slice, so that there is nothing to judge", path=test.root,
                           remedy="Write a line for each slice that is known into its label table, or name another set")


def judge(find: Find, test: Dataset, methods: Sequence[Method], *, progress: bool = False) -> list[Verdicts]:
    """What each method says of the labelled slices of a set; masks are not opened.

    Args:
        find: finds the lungs of a scan.
        test: a folder with slice labels.
        methods: the last row of each is its answer.
        progress: show a bar over the test volumes.

    Raises:
        DatasetError: no slice has a label, or a label names a slice that the volume does not have.
    """
    demand_labels(test)
    names, patients, labels, lung = list[str](), list[str](), list[int](), list[bool]()
    said: list[list[tuple[float, float]]] = [[] for _ in methods]  # verdict and marked area of each slice
    for case in with_bar(test.cases, "judging", progress, "volume"):
        if not case.labels:
            continue
        scan = read_scan(case.image)
        slices = test.labelled(case, len(scan.pixels))
        found, crops, volume = find(case, scan)
        names += [f"{case.id}:{k}" for k in slices]
        patients += [case.patient] * len(slices)
        labels += [case.labels[k] for k in slices]
        lung += np.isin(slices, found).tolist()
        for method, own in zip(methods, said, strict=True):
            of_slice = dict(zip(found.tolist(), _said(method, crops, volume, scan.pixels.shape[1:]), strict=True))
            own += [of_slice.get(k, (NO_LUNG, 0.0)) for k in slices]
    columns = [np.array(own, float).reshape(-1, 2).T for own in said]
    return [Verdicts(tuple(names), np.array(patients), np.array(labels),
                     None if np.isnan(verdict).any() else verdict, marked, np.array(lung))
            for verdict, marked in columns]


def judge_nets(nets: Predictor, test: Dataset, *, progress: bool = False) -> Verdicts:
    """What trained nets say of the labelled slices of a set, at their own level; no classifier is among them."""
    def find(case: Case, scan: Scan) -> tuple[np.ndarray, Crops, bool]:
        return *find_lungs(scan.pixels, nets.lung_net, nets.profile, aspect=scan.aspect()), False
    method = Method([("Segmenter", "slice labels", nets.profile.segmenter.threshold)],
                    lambda crops, volume: (None, [lesion_probabilities(nets.segmenter, crops)]))
    return judge(find, test, [method], progress=progress)[0]


def _said(method: Method, crops: Crops, volume: bool, shape: tuple[int, int]) -> list[tuple[float, float]]:
    """Verdict, NaN where nothing judges slices, and marked area of each crop."""
    if not len(crops):
        return []
    probability, maps = method.maps(crops, volume)
    verdicts = np.full(len(crops), np.nan) if probability is None else probability
    level = cut_level(method.rows[-1][2])
    areas = [(uncrop(small, box, shape) >= level).mean() * REFERENCE_AREA
             for small, box in zip(maps[-1], crops.boxes, strict=True)]
    return list(zip(map(float, verdicts), map(float, areas), strict=True))


# --- records --------------------------------------------------------------------------------------------------------

def verdict_json(verdicts: Verdicts) -> Record:
    """Verdicts as plain JSON values, each slice as *label lung probability area*, and the figures drawn from them."""
    probability = ["-"] * len(verdicts.names) if verdicts.probability is None else \
        [f"{value:.9g}" for value in verdicts.probability]  # enough to tell any two float32 apart
    rows = zip(verdicts.labels.tolist(), verdicts.lung.astype(int).tolist(), probability,
               (f"{area:.9g}" for area in verdicts.marked), strict=True)
    volumes = dict(zip((_volume(name) for name in verdicts.names), verdicts.patients.tolist(), strict=True))
    return {"slices": len(verdicts.names),
            **{name: digits(value) for name, value in zip(FIGURES, verdicts.figures()[:, 0].tolist(), strict=True)},
            "patients": {volume: patient for volume, patient in volumes.items() if patient != volume},
            "verdicts": {name: " ".join(map(str, row)) for name, row in zip(verdicts.names, rows, strict=True)}}


def verdicts_from(record: Record) -> Verdicts:
    """What :func:`verdict_json` made JSON of."""
    names, patients = tuple(record["verdicts"]), record["patients"]
    label, lung, probability, marked = zip(*(row.split() for row in record["verdicts"].values()), strict=True)
    return Verdicts(names, np.array([patients.get(_volume(name), _volume(name)) for name in names]),
                    np.array(label, int), None if "-" in probability else np.array(probability, float),
                    np.array(marked, float), np.array(lung, int) == 1)


def _volume(name: str) -> str:
    return name.rsplit(":", 1)[0]


def joined(parts: Sequence[Verdicts]) -> Verdicts:
    """Verdicts of several parts of a set as one."""
    probability = [part.probability for part in parts if part.probability is not None]
    patients, labels, marked, lung = (np.concatenate([getattr(part, column) for part in parts])
                                      for column in ("patients", "labels", "marked", "lung"))
    return Verdicts(tuple(name for part in parts for name in part.names), patients, labels,
                    np.concatenate(probability) if len(probability) == len(parts) else None, marked, lung)


# --- the table ------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class VerdictLine:
    """One system, or one variant of the method, in the table.

    Attributes:
        title: For the table.
        figures: ``(seeds, 4)``, the :data:`FIGURES`.
        intervals: 95 % bootstrap interval of each of them over patients, mean over seeds; NaN with one patient only.
        areas: ``(seeds, 2)`` median of the marked area in healthy and in diseased slices, in pixels of 512 x 512.
        rounds: Which round of the exchange was used with each seed; empty where there are no rounds.
    """

    title: str
    figures: np.ndarray
    intervals: list[tuple[float, float]]
    areas: np.ndarray
    rounds: str


def verdict_lines(records: Sequence[Record]) -> list[VerdictLine]:
    """The table, line by line, from the records of all seeds: of systems, or of variants, which have a title.

    Raises:
        ValueError: the seeds of a system were not measured on the same slices.
    """
    lines: dict[str, list[Record]] = {}
    for record in records:
        lines.setdefault(record.get("title") or SYSTEMS[record["system"]].title, []).append(record)
    return [_line(title, sorted(own, key=lambda record: record["seed"])) for title, own in lines.items()]


def _line(title: str, records: Sequence[Record]) -> VerdictLine:
    seeds = [verdicts_from(record) for record in records]
    first = seeds[0]
    if any(each.names != first.names or (each.labels != first.labels).any() for each in seeds):
        raise ValueError(f"{title}: the seeds differ in their slices or labels")
    intervals = bootstrap(lambda weights: np.mean([each.figures(weights) for each in seeds], axis=0),
                          len(first.names), first.patients)
    return VerdictLine(title, np.array([each.figures()[:, 0] for each in seeds]), intervals,
                       np.array([each.areas() for each in seeds]), rounds_used(records))


def verdict_table(records: Sequence[Record], *, narrow: bool = False) -> Table:
    """Verdicts of all systems: means over seeds with their deviation, and intervals over patients.

    The last figures are medians of the marked area, in pixels of a slice of 512 x 512. ``narrow`` is for a terminal of
    80 columns: no deviations, and intervals on lines of their own.
    """
    heads = ["", "AUC of\nverdict", "AUC of\narea", "healthy\nmarked", "diseased\nmarked", "px in\nhealthy",
             "px in\ndiseased", "round\nused"]
    rows = []
    for line in verdict_lines(records):
        means, rounds = [spread(column) for column in line.figures.T], line.rounds
        if narrow:
            ends = ["" if np.isnan(low) else f"\n{low:.2f}-{high:.2f}".replace("0.", ".")
                    for low, high in line.intervals]
            means, rounds = [mean.split(" ± ")[0] for mean in means], rounds.replace(" ", "")
        else:
            ends = ["" if np.isnan(low) else f" ({low:.3f} to {high:.3f})" for low, high in line.intervals]
        rows.append([line.title, *map(str.__add__, means, ends),
                     *(figure(area, ".0f") for area in line.areas.mean(axis=0)), rounds])
    width = len(heads) - (not any(row[-1] for row in rows))  # systems other than ours have no rounds
    return Table(heads[:width], "l" + "r" * (width - 1), [row[:width] for row in rows])


def verdict_count(records: Sequence[Record]) -> str:
    """How many slices were judged, in words."""
    first = verdicts_from(records[0])
    diseased, without = int(first.labels.sum()), int((~first.lung).sum())
    return (f"{len(first.names)} slices of {len(np.unique(first.patients))} patients, {len(first.names) - diseased} "
            f"healthy and {diseased} diseased; no lung was found in {without} of them")
