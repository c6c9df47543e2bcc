"""Verdicts on labelled slices: what is counted, the figures computed a second way, records that tell when changed."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from test_results import verdict_faults
from tiny import TINY, TINY_BASELINES, finished_run, quiet
from typer.testing import CliRunner

from covidseg.cli import app
from covidseg.data.folder import Dataset
from covidseg.errors import DatasetError
from covidseg.evaluation import experiments
from covidseg.evaluation.evaluate import Method, found_crops, measure, otsu_method, stage_method
from covidseg.evaluation.experiments import compare
from covidseg.evaluation.methods import SYSTEMS
from covidseg.evaluation.metrics import auc
from covidseg.evaluation.statistics import bootstrap, drawn_auc, drawn_share
from covidseg.evaluation.verdicts import (
    FIGURES,
    NO_LUNG,
    Verdicts,
    judge,
    verdict_count,
    verdict_json,
    verdict_lines,
    verdict_table,
    verdicts_from,
)
from covidseg.pipeline import Run, write_run

RNG = np.random.default_rng(0)


def made(count: int = 40, probability: bool = True) -> Verdicts:
    """Two slices of each patient, every third without a lesion, some without lung; equal scores are among them."""
    labels = (np.arange(count) % 3 > 0).astype(int)
    lung = np.arange(count) % 11 > 0
    score = np.where(lung, (RNG.random(count) + 0.3 * labels).round(1), NO_LUNG)
    return Verdicts(tuple(f"v{k // 2}:{k}" for k in range(count)), np.array([f"v{k // 2}" for k in range(count)]),
                    labels, score if probability else None, np.where(lung, RNG.integers(0, 90, count), 0.0), lung)


def record(seed: int = 0, **changes: object) -> dict:
    return {"system": "extended", "seed": seed, **verdict_json(made()), **changes}


def test_figures_are_those_of_their_definitions() -> None:
    verdicts = made()
    marked, ill = verdicts.marked >= 40, verdicts.labels == 1
    assert verdicts.probability is not None
    wanted = [auc(verdicts.probability, ill), auc(verdicts.marked, ill), marked[~ill].mean(), marked[ill].mean()]
    np.testing.assert_allclose(verdicts.figures()[:, 0], wanted)
    assert verdicts.areas() == (np.median(verdicts.marked[~ill]), np.median(verdicts.marked[ill]))
    bare, one_class = replace(verdicts, probability=None), replace(verdicts, labels=np.ones(40, int))
    assert np.isnan(bare.figures()[:, 0]).tolist() == [True, False, False, False]
    assert np.isnan(one_class.figures()[:, 0]).tolist() == [True, True, True, False]
    assert np.isnan(one_class.areas()[0])


def test_slices_may_be_picked_by_a_mask() -> None:
    verdicts, some = made(), np.arange(40) % 4 > 0
    np.testing.assert_array_equal(verdicts.figures(some[None]), verdicts.figures(some[None].astype(int)))
    assert 0 < verdicts.figures(some[None])[2, 0] < 1


def test_drawing_a_slice_twice_is_having_it_twice() -> None:
    verdicts, times = made(), RNG.integers(0, 3, (5, 40))
    for row, figures in zip(times, verdicts.figures(times.astype(float)).T, strict=True):
        again = np.repeat(np.arange(40), row)
        assert verdicts.probability is not None
        several = replace(verdicts, probability=verdicts.probability[again], labels=verdicts.labels[again],
                          marked=verdicts.marked[again])
        np.testing.assert_allclose(figures, several.figures()[:, 0])
    assert np.isnan(drawn_auc(np.arange(3.0), np.array([0, 0, 1]), np.array([[1.0, 1, 0]]))).all()
    assert np.isnan(drawn_share(np.ones(1, bool), np.zeros(1, bool), np.ones((1, 1)))).all()


def test_whole_patients_are_drawn() -> None:
    """Of two patients, one all marked and one not at all, a draw has one of them twice or both."""
    def share(weights: np.ndarray) -> np.ndarray:
        return drawn_share(np.arange(20) < 10, np.ones(20, bool), weights)[None]
    assert bootstrap(share, 20, np.repeat(["a", "b"], 10)) == [(0.0, 1.0)]
    (low, high), = bootstrap(share, 20)
    assert 0.2 < low < 0.4 < 0.6 < high < 0.8
    assert np.isnan(bootstrap(share, 20, np.repeat("a", 20))[0]).all()


def test_records_hold_all_that_was_said() -> None:
    for verdicts in (made(), made(probability=False), replace(made(), patients=np.repeat(["a b", "c"], 20))):
        content = json.loads(json.dumps(verdict_json(verdicts)))
        back = verdicts_from(content)
        assert back.names == verdicts.names
        for name in ("patients", "labels", "probability", "marked", "lung"):
            np.testing.assert_array_equal(getattr(back, name), getattr(verdicts, name))
        assert verdict_json(back) == content
        assert verdict_faults({"results": [content]}) == []


@pytest.mark.parametrize("change", [
    {"slices": 41}, {"verdict_auc": 0.99}, {"area_auc": None}, {"healthy_marked": 0.0},
    {"verdicts": {name: row.replace("1", "0", 1) for name, row in record()["verdicts"].items()}}])
def test_records_that_were_changed_are_noticed(change: dict) -> None:
    assert verdict_faults({"results": [{**record(), **change}]})


def test_the_table_has_means_intervals_and_rounds() -> None:
    pair = [record(1, round=2), record(0, round=1)]
    line, = verdict_lines(pair)
    np.testing.assert_allclose(line.figures, [[r[name] for name in FIGURES] for r in pair[::-1]], atol=5e-5)
    assert line.rounds == "1, 2"
    for (low, high), mean in zip(line.intervals, line.figures.mean(axis=0), strict=True):
        assert low < mean < high
    bare = {**record(), **verdict_json(made(probability=False)), "system": "otsu"}
    text = verdict_table([bare, *pair]).markdown()
    assert "round used" in text
    assert f"| {SYSTEMS['otsu'].title} | – |" in text
    low, high = line.intervals[0]
    assert f"| {line.figures[:, 0].mean():.3f} ± " in text
    assert f" ({low:.3f} to {high:.3f})" in text
    assert "round" not in verdict_table([bare]).markdown()
    assert [row[0] for row in verdict_table([{**bare, "title": "a variant"}], narrow=True).rows] == ["a variant"]
    screen = Console(width=80, file=io.StringIO())
    screen.print(verdict_table(pair, narrow=True).rich("on a terminal"))
    assert f"{low:.2f}-{high:.2f}".replace("0.", ".") in screen.file.getvalue(), "whole"
    assert "1,2" in screen.file.getvalue()
    assert verdict_count(pair) == ("40 slices of 20 patients, 14 healthy and 26 diseased; no lung was found in 4 of "
                                   "them")
    with pytest.raises(ValueError, match="differ in their slices"):
        verdict_lines([pair[0], {**pair[1], "verdicts": dict(list(pair[1]["verdicts"].items())[1:])}])


# --- on scans -------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    finished = finished_run(tiny_phantom)
    folder = Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("verdicts") / "run"))
    return Run(finished.data, TINY, 0, folder, "cpu", quiet)


def bare(data: Dataset) -> Dataset:
    """Without masks."""
    return replace(data, cases=tuple(replace(case, mask=None) for case in data.cases))


def test_areas_are_those_that_outlines_are_measured_by(run: Run) -> None:
    test = run.data.subset(["phantom_01", "phantom_02"])
    methods = [otsu_method(), stage_method(run)]
    for verdicts, outlines in zip(judge(partial(found_crops, run), bare(test), methods), measure(run, test, methods),
                                  strict=True):
        assert verdicts.names == outlines.names
        np.testing.assert_array_equal(verdicts.marked, outlines.stages[-1].counts[:, :2].sum(axis=1) * 16)  # 128 px
        np.testing.assert_array_equal(verdicts.labels, [label for case in test.cases for label in case.labels.values()])
    assert verdicts.probability is not None
    assert ((verdicts.probability >= 0) & (verdicts.probability <= 1)).all()


def test_slices_without_lung_have_the_lowest_verdict_and_no_mark(run: Run) -> None:
    one, two = bare(run.data.subset(["phantom_00", "phantom_01"])).cases
    test = replace(run.data, cases=(replace(one, labels={3: 1, 5: 0}), replace(two, labels={})))
    everything = Method([("all", "none", 0.5)],
                        lambda crops, volume: (np.zeros(len(crops)), [np.ones_like(crops.images)]))
    found = run.crops

    def last_lost(pixels: np.ndarray, volume: bool | None = None, aspect: float = 1.0) -> tuple:
        numbers, crops = found(pixels, volume, aspect)
        return numbers[numbers != 5], crops.take(np.flatnonzero(numbers != 5))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "crops", last_lost)
        verdicts, = judge(partial(found_crops, run), test, [everything])
        patch.setattr(run, "crops", lambda *_: (np.zeros(0, int), found(_[0])[1].take(np.zeros(0, int))))
        nothing, = judge(partial(found_crops, run), test, [everything])
    assert (verdicts.names, verdicts.lung.tolist()) == (("phantom_00:3", "phantom_00:5"), [True, False])
    assert verdicts.probability is not None
    assert verdicts.probability.tolist() == [0, NO_LUNG]
    assert verdicts.marked[0] > 1000
    assert verdicts.marked[1] == 0
    assert not nothing.lung.any()
    with pytest.raises(DatasetError, match="has 10 slices, slice 10 is labelled"):
        judge(partial(found_crops, run), replace(test, cases=(replace(one, labels={10: 1}),)), [everything])


def test_without_a_label_there_is_nothing_to_judge(run: Run) -> None:
    test = replace(run.data, cases=tuple(replace(case, labels={}) for case in run.data.cases))
    with pytest.raises(DatasetError, match="labels no slice"):
        judge(partial(found_crops, run), test, [otsu_method()])


def test_trained_nets_are_asked_from_a_command(run: Run, tmp_path: Path) -> None:
    """They mark what the segmenter of their run marks; a record of it tells when it was changed."""
    write_run(run, "covidseg train")
    result = CliRunner().invoke(app, ["verdicts", str(run.data.root), "--run", str(run.folder), "--json",
                                      str(tmp_path / "said.json")])
    assert result.exit_code == 0, result.output
    assert "healthy" in result.output
    content = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert verdict_faults(content) == []
    assert content["command"] == f"covidseg verdicts {run.data.root.name} --run {run.folder.name}"
    said, = map(verdicts_from, content["results"])
    wanted = judge(partial(found_crops, run), bare(run.data), [stage_method(run)])[0]
    assert said.names == wanted.names
    np.testing.assert_allclose(said.marked, wanted.marked, rtol=0.01, atol=50)  # volumes are taken slice by slice
    assert said.probability is None


def test_systems_are_compared_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    test, names = bare(run.data.subset(["phantom_01"])), ["otsu", "extended", "masks"]
    results = compare(run, test, names, TINY_BASELINES)
    assert [(result["system"], result["verdict_auc"] is None) for result in results] == [
        ("otsu", True), ("extended", False), ("masks", True)]
    assert verdict_faults({"results": results}) == []
    monkeypatch.setattr(experiments, "judge", None)
    assert compare(run, test, names, TINY_BASELINES) == results
    assert len(list((run.folder / "verdicts").iterdir())) == 3


def test_full_supervision_needs_a_mask_somewhere(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "SYSTEMS", {name: SYSTEMS[name] for name in ("otsu", "masks")})
    lines: list[str] = []
    weak = Run(bare(run.data), TINY, 0, run.folder, "cpu", lines.append)
    test = bare(run.data.subset(["phantom_02"]))
    assert [result["system"] for result in compare(weak, test)] == ["otsu"]
    assert any("masks left out" in line for line in lines)
    with pytest.raises(DatasetError, match="no lesion mask"):
        compare(weak, test, ["masks"])
