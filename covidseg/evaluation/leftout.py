"""Patients left out in turn: for each of them all is trained on the others, and judges the slices of this one.

One set so serves for training and for testing, and no patient is judged by nets that saw another slice of theirs. The
slices that are judged are those that training would take: labelled, and with enough lung. Each patient has a run of
its own in a folder of the run, ``without-PATIENT``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from covidseg.data.folder import Dataset
from covidseg.errors import DatasetError
from covidseg.evaluation.experiments import compare
from covidseg.evaluation.methods import BaselineProfile
from covidseg.evaluation.tables import Record
from covidseg.evaluation.verdicts import joined, verdict_json, verdicts_from
from covidseg.pipeline import Run
from covidseg.preprocess import WeakSet


def folds(data: Dataset, weak: WeakSet) -> Iterator[tuple[str, Dataset, Dataset]]:
    """Each patient, the volumes of the others to train on, and the patient's own, without masks, to judge.

    Args:
        data: the training set.
        weak: its slices that training takes.

    Raises:
        DatasetError: without one of the patients a class would be missing.
    """
    taken = set(weak.names.tolist())
    for patient in np.unique(weak.patients).tolist():
        if len(kept := set(weak.labels[weak.patients != patient].tolist())) < 2:
            missing = {(): "to train on", (0,): "with a lesion", (1,): "without a lesion"}[tuple(kept)]
            raise DatasetError(f"without patient {patient} no slice {missing} is left", path=data.root,
                               remedy="Add volumes of other patients, or measure on another set")
        own = tuple(replace(case, mask=None, labels={k: label for k, label in case.labels.items()
                                                     if f"{case.id}:{k}" in taken})
                    for case in data.cases if case.patient == patient)
        yield patient, replace(data, cases=tuple(case for case in data.cases if case.patient != patient)), \
            replace(data, cases=own)


def compare_left_out(run: Run, names: list[str] | None = None, baselines: BaselineProfile = BaselineProfile(), *,
                     progress: bool = False) -> list[Record]:
    """Verdicts of the systems on all patients of a run's data, each left out in turn, with the seed of the run.

    Arguments and records are those of :func:`covidseg.evaluation.experiments.compare`, with the slices of all patients
    together; seconds are those of all trainings.

    Raises:
        DatasetError: without one of the patients a class would be missing.
    """
    found = []
    for patient, others, own in list(folds(run.data, run.threshold())):  # all are checked before one is trained on
        run.log(f"patient {patient} left out")
        folder = "without-" + re.sub(r"[^\w.-]", "_", patient)
        fold = Run(others, run.profile, run.seed, run.folder / folder, run.device.type, run.log)
        found.append(compare(fold, own, names, baselines, progress=progress))
    return [_pooled(records) for records in zip(*found, strict=True)]


def _pooled(records: Sequence[Record]) -> Record:
    """The record of one system from those of all patients."""
    seconds = [record["seconds"] for record in records]
    return {**records[0], "seconds": None if None in seconds else round(sum(seconds), 2),
            **verdict_json(joined([verdicts_from(record) for record in records]))}
