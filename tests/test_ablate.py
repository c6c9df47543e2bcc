"""Ablations: each variant changes what it says and nothing else, rows are measured, and a stopped one goes on."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
from tiny import TINY, quiet

from covidseg import ablate as module
from covidseg.ablate import VARIANTS, ablate, ablation_rows, chosen
from covidseg.dataset import load_dataset
from covidseg.errors import SettingsError
from covidseg.pipeline import Run, profile_named


def differences(a: dict, b: dict, path: str = "") -> set[str]:
    """Names of the settings in which two profiles differ."""
    found = set()
    for key in a:
        if isinstance(a[key], dict):
            found |= differences(a[key], b[key], f"{path}{key}.")
        elif a[key] != b[key]:
            found.add(path + key)
    return found


CHANGES = {
    "whole": set(),
    "threshold-lungs": {"lung_net.steps"},
    "no-curriculum": {"mil.curriculum.order", "mil.curriculum.weights"},
    "random-order": {"mil.curriculum.order"},
    "reversed-order": {"mil.curriculum.order"},
    "patch-10": {"mil.patch"},
    "patch-grid": {"mil.reading"},
    "mean-pooling": {"mil.pooling"},
    "no-zeros": {"mil.zeros"},
    "no-exchange": {"mutual.exchange", "mil.component_weight", "fine.cam_share"},
    "one-way": {"mutual.exchange"},
    "no-vessels": {"classifier.paint.vessels", "mil.paint.vessels", "segmenter.paint.vessels"},
    "no-lesions": {"mil.paint.share", "segmenter.paint.share"},
    "no-paint": {"classifier.paint.vessels", "mil.paint.vessels", "segmenter.paint.vessels", "mil.paint.share",
                 "segmenter.paint.share"},
}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_each_variant_changes_only_what_it_names(name: str) -> None:
    base = profile_named("quick")
    assert differences(asdict(base), asdict(VARIANTS[name].change(base))) == CHANGES[name]


def test_the_three_orders_differ() -> None:
    orders = [VARIANTS[f"{name}"].change(TINY).mil.curriculum.order
              for name in ("no-curriculum", "random-order", "reversed-order")]
    assert orders == ["none", "random", "reversed"]


def test_painting_no_lesions_is_the_faithful_method() -> None:
    faithful = asdict(profile_named("full", "faithful"))
    assert differences(asdict(VARIANTS["no-lesions"].change(profile_named("full"))), faithful) == {"method"}


def test_unknown_variants_are_named() -> None:
    with pytest.raises(SettingsError, match="no-sense"):
        chosen(["whole", "no-sense"])
    assert chosen(None) == list(VARIANTS)
    assert chosen(["one-way", "whole", "one-way"]) == ["one-way", "whole"]


@pytest.fixture(scope="module")
def tiny_run(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(load_dataset(tiny_phantom), TINY, 0, tmp_path_factory.mktemp("ablation"), "cpu", quiet)


@pytest.fixture(scope="module")
def measured(tiny_run: Run) -> list[dict]:
    test = tiny_run.data.subset(["phantom_01"])
    return [content for _, content in ablate(tiny_run, test, ["whole", "mean-pooling"], log=quiet, upper_bound=False)]


def test_untouched_stages_are_shared(measured: list[dict], tiny_run: Run) -> None:
    count = {stage: len(list((tiny_run.folder / "stages").glob(f"{stage}-*.safetensors")))
             for stage in ("threshold", "weak", "classifier1", "mil1", "segmenter")}
    assert (count["threshold"], count["weak"], count["classifier1"]) == (1, 1, 1)
    assert count["mil1"] >= 2
    assert count["segmenter"] >= 2


def test_rows_of_the_table(measured: list[dict]) -> None:
    titles = [title for title, _ in ablation_rows(measured)]
    assert titles[:2] == ["the whole method: Otsu in the lung", "the whole method: Grad-CAM"]
    assert titles[-2:] == ["mean pooling in place of attention: Patch MIL",
                           "mean pooling in place of attention: Segmenter"]
    for _, row in ablation_rows(measured):
        assert 0 <= row["micro"]["dice"] <= 1


def test_a_finished_variant_is_read_and_not_trained_again(measured: list[dict], tiny_run: Run,
                                                          monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("measured again")
    monkeypatch.setattr(module, "evaluate_run", never)
    again = dict(ablate(tiny_run, tiny_run.data.subset(["phantom_01"]), ["mean-pooling"], log=quiet))
    assert again["mean-pooling"] == measured[1]
    with pytest.raises(AssertionError, match="measured again"):  # other test slices are another measurement
        list(ablate(tiny_run, tiny_run.data.subset(["phantom_02"]), ["mean-pooling"], log=quiet))


def test_command_line(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer.testing import CliRunner

    from covidseg import pipeline
    from covidseg.cli import app

    monkeypatch.setitem(pipeline.PROFILES, "quick", TINY)
    result = CliRunner().invoke(app, ["ablate", "--data", str(tiny_phantom), "--test", str(tiny_phantom), "--only",
                                      "one-way", "--out", str(tmp_path / "run"), "--device", "cpu"])
    assert result.exit_code == 0, result.output
    content = json.loads((tmp_path / "run/ablation.json").read_text())
    assert [v["name"] for v in content["variants"]] == ["one-way"]
    assert content["settings"]["mil"]["steps"] == TINY.mil.steps
    assert content["seed"] == 0
    assert set(content["test_data"])
    assert set(content["data"])
    assert content["environment"]["device"] == "cpu"
    bad = CliRunner().invoke(app, ["ablate", "--data", str(tiny_phantom), "--only", "nothing"])
    assert isinstance(bad.exception, SettingsError)
