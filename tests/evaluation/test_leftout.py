"""Patients left out in turn: whom each run was trained on, what was judged, and sets that cannot spare anybody."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from test_results import verdict_faults
from tiny import TINY, TINY_BASELINES, finished_run, quiet

from covidseg.data.folder import Dataset
from covidseg.errors import DatasetError
from covidseg.evaluation import experiments, leftout
from covidseg.evaluation.evaluate import Method
from covidseg.evaluation.leftout import compare_left_out, folds
from covidseg.evaluation.verdicts import Verdicts, judge, verdicts_from
from covidseg.pipeline import Run


@pytest.fixture(scope="module")
def run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Volumes 1 and 2 are of one patient; one slice of volume 3 has no label."""
    one, two, three, four = finished_run(tiny_phantom).data.cases
    cases = (one, replace(two, patient="a/b"), replace(three, patient="a/b"),
             replace(four, labels={k: label for k, label in four.labels.items() if k != 4}))
    return Run(Dataset(tiny_phantom, cases), TINY, 0, tmp_path_factory.mktemp("leftout"), "cpu", quiet)


def test_every_patient_is_judged_by_nets_that_saw_none_of_their_slices(run: Run) -> None:
    parts = {patient: (others, own) for patient, others, own in folds(run.data, run.threshold())}
    assert list(parts) == ["a/b", "phantom_00", "phantom_03"]
    for patient, (others, own) in parts.items():
        assert {case.patient for case in others.cases} == set(parts) - {patient}
        assert {case.patient for case in own.cases} == {patient}
        assert all(case.mask is None for case in own.cases)
    assert [case.id for case in parts["a/b"][1].cases] == ["phantom_01", "phantom_02"]
    judged = [f"{case.id}:{k}" for _, own in parts.values() for case in own.cases for k in case.labels]
    assert sorted(judged) == sorted(run.threshold().names), "labelled and with lung"
    assert "phantom_03:4" not in judged


def test_all_patients_make_one_record(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[set[str], list[str]]] = []

    def watched(find: partial, own: Dataset, methods: Sequence[Method], **rest: bool) -> list[Verdicts]:
        fold, = find.args
        asked.append(({case.patient for case in fold.data.cases}, [case.id for case in own.cases]))
        return judge(find, own, methods, **rest)
    monkeypatch.setattr(experiments, "judge", watched)
    results = compare_left_out(run, ["otsu", "decovnet"], TINY_BASELINES)
    assert asked == [({"phantom_00", "phantom_03"}, ["phantom_01", "phantom_02"]),
                     ({"a/b", "phantom_03"}, ["phantom_00"]), ({"phantom_00", "a/b"}, ["phantom_03"])]
    assert [result["system"] for result in results] == ["otsu", "decovnet"]
    assert verdict_faults({"results": results}) == []
    verdicts = verdicts_from(results[1])
    assert sorted(verdicts.names) == sorted(run.threshold().names)
    assert set(verdicts.patients) == {"a/b", "phantom_00", "phantom_03"}
    assert verdicts.probability is not None
    assert sorted(path.name for path in run.folder.glob("without-*")) == [
        "without-a_b", "without-phantom_00", "without-phantom_03"]
    monkeypatch.setattr(experiments, "judge", None)
    assert compare_left_out(run, ["otsu", "decovnet"], TINY_BASELINES) == results, "read again"


@pytest.mark.parametrize(("kept", "missing"), [
    ((), "to train on"), ((0,), "with a lesion"), ((1,), "without a lesion")])
def test_a_set_that_cannot_spare_a_patient_is_refused_before_training(
        kept: tuple[int, ...], missing: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    weak = run.threshold()
    first = weak.patients == "phantom_00"
    those = np.flatnonzero(first | np.isin(weak.labels, kept))
    few = replace(weak, crops=weak.crops.take(those), labels=weak.labels[those], patients=weak.patients[those],
                  names=weak.names[those])
    monkeypatch.setattr(run, "threshold", lambda: few)
    monkeypatch.setattr(leftout, "compare", None)
    with pytest.raises(DatasetError, match=f"without patient phantom_00 no slice {missing} is left"):
        compare_left_out(run)
