"""A golden run: figures of every stage of a small run, kept in ``golden.json``, so that no change goes unnoticed.

Processors and numbers of threads, under which ``make processors`` runs this, round otherwise. So nets compute in
double precision (:func:`tiny.in_double`), means and deviations of whole maps and of large arrays of weights are
compared, and the tolerance lies above what a choice by rank or threshold does that falls otherwise. Measured: under
three instruction sets, with one and two threads, all figures agree to 1e-7; a patch less in each phase changes one by
.002. Where a change of the figures is meant, write them anew:
``COVIDSEG_GOLDEN=write .venv/bin/python -m pytest tests/test_golden.py``, and say in the commit why they changed.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STAGES, TINY, all_stages, in_double, quiet, stage_name

from covidseg import patches
from covidseg.curriculum import Phase
from covidseg.data.folder import load_dataset
from covidseg.pipeline import Run
from covidseg.profiles import Profile
from covidseg.store import load_arrays

pytestmark = pytest.mark.nets

GOLDEN = Path(__file__).with_name("golden.json")
Figures = dict[str, dict[str, list[float]]]
LARGE = 64      # weights of an array; the mean of a few has no scale of its own
CLOSE = 0.005  # of the deviation, and of the mean if it is larger


def double_run(data: Path, folder: Path, seed: int = 0, profile: Profile = TINY) -> Run:
    """All stages of the tiny profile in double precision."""
    with in_double():
        return all_stages(Run(load_dataset(data), profile, seed, folder, "cpu", quiet))


def changed_stages(run: Run, other: Run) -> set[str]:
    return {name.split(":")[0] for name in differences(figures_of(other), figures_of(run))}


@pytest.fixture(scope="module")
def golden_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return double_run(tiny_phantom, tmp_path_factory.mktemp("golden"))


def figures_of(run: Run) -> Figures:
    """Number of values, mean and standard deviation of every map of every stage and every large array of weights."""
    found: Figures = {}
    for stage in STAGES:
        arrays, _ = load_arrays(run.folder / "stages" / stage_name(run, stage))
        net = stage in ("lung_net", "segmenter") or stage.startswith(("classifier", "mil"))
        found[stage] = {name: [value.size, *(round(float(figure(value, dtype=np.float64)), 7)
                                             for figure in (np.nanmean, np.nanstd))]
                        for name, value in sorted(arrays.items())
                        if np.isfinite(value).any() and (value.size >= LARGE or not net)}
    return found


def differences(found: Figures, golden: Figures) -> list[str]:
    """Names of the maps and nets that are no longer what they were."""
    def close(one: list[float], other: list[float]) -> bool:
        return one[0] == other[0] and np.allclose(one, other, rtol=0, atol=CLOSE * max(map(abs, other[1:])))
    pairs = {(stage, name) for side in (found, golden) for stage in side for name in side[stage]}
    return sorted(f"{stage}: {name}" for stage, name in pairs
                  if name not in found.get(stage, {}) or name not in golden.get(stage, {})
                  or not close(found[stage][name], golden[stage][name]))


def test_every_stage_gives_the_figures_that_it_gave_before(golden_run: Run) -> None:
    found = figures_of(golden_run)
    if os.environ.get("COVIDSEG_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        pytest.skip("figures written anew")
    assert not differences(found, json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_another_seed_and_a_rate_a_tenth_higher_are_noticed(golden_run: Run, tmp_path: Path) -> None:
    changed = changed_stages(golden_run, double_run(golden_run.data.root, tmp_path / "seed", seed=1))
    assert changed >= {"lung_net", "classifier1", "cam1", "mil1", "segmenter"}
    assert "threshold" not in changed, "no chance is in there"
    faster = replace(TINY, classifier=replace(TINY.classifier, rate=1.1 * TINY.classifier.rate))
    changed = changed_stages(golden_run, double_run(golden_run.data.root, tmp_path / "rate", profile=faster))
    assert changed >= {"cam1", "mil2"}
    assert differences({"cam1": {}}, {"cam1": {"cam": [1, 0.5, 0.5]}}) == ["cam1: cam"]


def test_one_patch_more_or_less_is_not_noticed(golden_run: Run, tmp_path: Path,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice by rank that falls otherwise, in each phase: the worst that another rounding could do."""
    plan, left_out = patches.plan_phase, []

    def flipped(*given: Any, **named: Any) -> Phase:
        phase = plan(*given, **named)
        admitted = phase.admitted.copy()
        if admitted.any():
            left_out.append(np.argwhere(admitted)[admitted.sum() // 2])
            admitted[tuple(left_out[-1])] = False
        return replace(phase, admitted=admitted)
    monkeypatch.setattr(patches, "plan_phase", flipped)
    other = double_run(golden_run.data.root, tmp_path)
    assert len(left_out) == 6, "three phases admit patches, in two rounds"
    assert not differences(figures_of(other), figures_of(golden_run))
