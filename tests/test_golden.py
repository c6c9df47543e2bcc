"""A golden run: the figures of every stage of a small run, kept in ``golden.json``, so that no change goes unnoticed.

On one machine a seed gives the same bits each time (``test_killed.py`` compares them). Another processor rounds
otherwise, and training carries that on; so here nets train in double precision, and means and deviations are compared.
Where a change of the figures is meant, write them anew:
``COVIDSEG_GOLDEN=write .venv/bin/python -m pytest tests/test_golden.py``, and say in the commit why they changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from tiny import STAGES, TINY, all_stages, in_double, quiet, stage_name

from covidseg.artifacts import load_arrays
from covidseg.dataset import load_dataset
from covidseg.pipeline import Run

GOLDEN = Path(__file__).with_name("golden.json")
Figures = dict[str, dict[str, list[float]]]
CLOSE = {"rtol": 0.002, "atol": 0.0002}


def double_run(data: Path, folder: Path, seed: int = 0) -> Run:
    """All stages of the tiny profile, trained in double precision."""
    with pytest.MonkeyPatch.context() as patch:
        in_double(patch)
        return all_stages(Run(load_dataset(data), TINY, seed, folder, "cpu", quiet))


@pytest.fixture(scope="module")
def golden_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return double_run(tiny_phantom, tmp_path_factory.mktemp("golden"))


def figures_of(run: Run) -> Figures:
    """Number of values, mean and standard deviation of every array of every stage."""
    found: Figures = {}
    for stage in STAGES:
        arrays, _ = load_arrays(run.folder / "stages" / stage_name(run, stage))
        found[stage] = {name: [value.size, *(round(float(f), 5) for f in (np.nanmean(value, dtype=np.float64),
                                                                          np.nanstd(value, dtype=np.float64)))]
                        for name, value in sorted(arrays.items()) if np.isfinite(value).any()}
    return found


def differences(found: Figures, golden: Figures) -> list[str]:
    """Names of the arrays that are no longer what they were."""
    pairs = {(stage, name) for side in (found, golden) for stage in side for name in side[stage]}
    return sorted(f"{stage}: {name}" for stage, name in pairs
                  if name not in found.get(stage, {}) or name not in golden.get(stage, {})
                  or not np.allclose(found[stage][name], golden[stage][name], **CLOSE))


def test_every_stage_gives_the_figures_that_it_gave_before(golden_run: Run) -> None:
    found = figures_of(golden_run)
    if os.environ.get("COVIDSEG_GOLDEN") == "write":
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        pytest.skip("figures written anew")
    assert not differences(found, json.loads(GOLDEN.read_text(encoding="utf-8")))


def test_another_seed_is_noticed(golden_run: Run, tmp_path: Path) -> None:
    other = double_run(golden_run.data.root, tmp_path, seed=1)
    changed = differences(figures_of(other), figures_of(golden_run))
    assert {name.split(":")[0] for name in changed} >= {"lung_net", "classifier1", "cam1", "mil1", "segmenter"}
    assert not any(name.startswith("threshold") for name in changed), "no chance is in there"
    assert differences({"cam1": {}}, {"cam1": {"cam": [1, 0.5, 0.5]}}) == ["cam1: cam"]
