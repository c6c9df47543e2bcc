"""Recorded comparisons under results/: complete, honest about where they come from, ranked as the book says."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest

from covidseg.book.results import gain_in_words, gains
from covidseg.evaluation.experiments import (
    EARLIER,
    OURS,
    by_system,
    counts_of,
    split_table,
    table1,
    table_lines,
)
from covidseg.evaluation.methods import PUBLISHED, SYSTEMS
from covidseg.evaluation.metrics import NAMES, macro, micro
from covidseg.evaluation.tables import scores_json
from covidseg.evaluation.verdicts import verdict_json, verdict_lines, verdicts_from

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "results").glob("table1-*.json"))
PHANTOM, REAL = "table1-phantom-quick", "table1-medseg9-on-100-full"
TUNED_ON = "table1-medseg9-full"  # 52 of the same slices, with full supervision
TODAY = "table1-medseg9-today-full"  # the same 52: the recipe as it is; seed 0 comes with the package
PARTS = {"52 tuned on": slice(0, 52), "48 not tuned on": slice(52, 100), "all 100": slice(None)}


def read(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def subset(results: list[dict], slices: slice) -> list[dict]:
    """Results restricted to a run of their slices, of which a record keeps the counts for the answer alone."""
    kept = []
    for result in results:
        part = {**result, "counts": dict(list(result["counts"].items())[slices]), "levels": None, "reliability": None,
                "classifier_auc": None}
        counts, answer = counts_of([part])[0], result["rows"][-1]
        kept.append({**part, "slices": len(counts), "rows": [
            {**answer, "micro": scores_json(micro(counts)), "macro": scores_json(macro(counts))}]})
    return kept


def shared_faults(content: dict, *keys: str) -> list[str]:
    """What is missing from any record."""
    files = {**content.get("test_data", {}), **content.get("data", {})}
    trained = "nets" if "nets" in content else "data"  # nets that were there already, or what new ones learned from
    return [f"no {key}" for key in ("command", "environment", "test_data", trained, "settings", *keys)
            if not content.get(key)] + [f"{name} has no sha256" for name, digest in files.items() if len(digest) != 64]


def row_faults(where: str, rows: list[dict]) -> list[str]:
    """Rows whose two faces of one count differ: over pooled pixels IoU = Dice / (2 - Dice)."""
    pairs = [(row["name"], row["micro"]["dice"], row["micro"]["iou"]) for row in rows]
    return [f"{where}, {name}: IoU {iou} does not fit Dice {dice}" for name, dice, iou in pairs
            if dice is not None and abs(iou - dice / (2 - dice)) > 2e-4]


def faults(content: dict) -> list[str]:
    """What is missing from, or impossible in, a recorded comparison."""
    found = shared_faults(content, "rivals", "results")
    found += [f"environment lacks {key}" for key in ("python", "packages", "device", "covidseg")
              if key not in content.get("environment", {})]
    for result in content.get("results", []):
        where, counts = f"{result['system']} seed {result['seed']}", counts_of([result])[0]
        if len(counts) != result["slices"]:
            found.append(f"{where}: {len(counts)} counts of {result['slices']} slices")
        answer = result["rows"][-1]
        for kind, scores in (("micro", micro(counts)), ("macro", macro(counts))):
            for name in NAMES:
                if answer[kind][name] is not None and abs(answer[kind][name] - getattr(scores, name)) > 6e-5:
                    found.append(f"{where}: {kind} {name} does not fit the counts")
        found += row_faults(where, result["rows"])
    return found


def test_there_are_recorded_comparisons() -> None:
    assert {path.stem for path in RECORDED} >= {PHANTOM, REAL, TUNED_ON}


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_they_are_complete(path: Path) -> None:
    content = read(path.stem)
    assert faults(content) == []
    assert "/" not in content["command"].replace("covidseg reproduce", ""), "no folder of the machine it ran on"


def test_the_check_fires() -> None:
    content = copy.deepcopy(read(PHANTOM))
    content["results"][1]["rows"][-1]["micro"]["iou"] += 0.01
    content["environment"].pop("device")
    content["test_data"] = {"a.nii.gz": "abc"}
    assert len(faults(content)) == 4
    assert "no command" in faults({**content, "command": ""})
    first = next(iter(content["results"][0]["counts"]))
    content["results"][0]["counts"].pop(first)
    assert any("counts of" in fault for fault in faults(content))


def test_the_real_one_has_all_systems_and_three_seeds() -> None:
    systems = by_system(read(REAL)["results"])
    assert set(systems) == set(SYSTEMS) - {"masks"}, "full supervision is taught with masks of the 52"
    assert all([r["seed"] for r in own] == [0, 1, 2] for own in systems.values())
    assert {r["slices"] for own in systems.values() for r in own} == {100}


def test_its_first_52_slices_are_those_that_were_tuned_on() -> None:
    """Measured twice, by two versions of the package: the same slices, and the same figures to three digits."""
    before, whole = by_system(read(TUNED_ON)["results"]), by_system(read(REAL)["results"])
    for name, own in whole.items():
        old, new = counts_of(before[name]), counts_of(subset(own, PARTS["52 tuned on"]))
        for pixels in (lambda counts: counts.sum(axis=-1), lambda counts: counts[..., 0] + counts[..., 2]):
            np.testing.assert_array_equal(pixels(old), pixels(new))
        dice = [[micro(seed).dice for seed in counts] for counts in (old, new)]
        np.testing.assert_allclose(*dice, atol=1e-3, err_msg=name)


@pytest.mark.parametrize(("name", "added"), [(PHANTOM, -0.02), (REAL, 0.0)])
def test_stages_rank_on_the_phantom_as_on_real_ct(name: str, added: float) -> None:
    """But for the last step: in the short training on the phantom the segmenter adds little to the patches."""
    own = by_system(read(name)["results"])
    mean = {row: np.mean([next(r["micro"]["dice"] for r in result["rows"] if r["name"] == row)
                          for result in own["extended"]]) for row in ("Grad-CAM", "Patch MIL", "Segmenter")}
    floor, bound = (np.mean([result["rows"][-1]["micro"]["dice"] for result in own[system]]) if system in own else 0.95
                    for system in ("otsu", "masks"))
    assert floor < mean["Grad-CAM"] < mean["Patch MIL"] < mean["Segmenter"] - added < bound - added


def means(table: list[str]) -> list[str]:
    """Cells of a row of Table 1 without deviations: title and the five pooled figures."""
    return [cell.split(" ± ")[0] for cell in table[:6]]


def test_the_readme_quotes_the_record() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [means(row) for row in table1(table_lines(read(REAL)["results"])).rows]
    assert len(rows) == len(SYSTEMS) - 1 + len(PUBLISHED) + 2, "and two outlines by DeCoVNet's own rule"
    assert "\n".join(f"| {' | '.join(row)} |" for row in rows) in text
    assert split_table(read(REAL)["results"], PARTS).markdown() in text
    masks = [result for result in read(TUNED_ON)["results"] if result["system"] == "masks"]
    figures = split_table(masks, {"": slice(None)}).rows[0][1]
    assert f"| *for comparison:* the same U-Net taught with masks | {figures} | – | – |" in text
    for name in OURS:
        today = [result for result in read(TODAY)["results"] if result["system"] == name]
        figures = split_table(today, {"": slice(None)}).rows[0][1]
        assert f"| *ours, {name}, as it is today* | {figures} | – | – |" in text


@pytest.mark.parametrize("part", PARTS.values(), ids=list(PARTS))
def test_ours_is_ahead_of_both_earlier_systems_on_real_ct(part: slice) -> None:
    """The claim of the book: intervals of the differences lie above zero, also on slices that nobody tuned on."""
    lines = {line.key: line for line in table_lines(subset(read(REAL)["results"], part))}
    assert set(EARLIER) < set(lines)
    for name in OURS:
        line = lines[name]
        assert line.dice is not None
        assert line.iou is not None
        assert min(line.dice.low, line.iou.low) > 0
        assert not line.patients
        assert np.isnan(line.p), "no test of slices whose patients nobody knows"


ABLATION = "ablate-medseg9-quick"
# What the book discusses; others may be there as well.
DISCUSSED = {"whole", "threshold-lungs", "no-curriculum", "random-order", "reversed-order", "patch-10", "patch-grid",
             "no-zeros", "true-lungs", "no-exchange", "one-way", "faithful", "pixel-masks"}


def ablation_faults(content: dict) -> list[str]:
    """What is missing from, or impossible in, a recorded ablation."""
    found = shared_faults(content, "variants")
    names = [variant["name"] for variant in content.get("variants", [])]
    found += [f"{name} is missing" for name in sorted(DISCUSSED - set(names))]
    found += [f"{name} twice" for name in sorted({name for name in names if names.count(name) > 1})]
    for variant in content.get("variants", []):
        found += [f"{variant['name']} has no Dice"] * any(row["micro"]["dice"] is None for row in variant["rows"])
        found += row_faults(variant["name"], variant["rows"])
    return found


def test_the_recorded_ablation_is_complete() -> None:
    content = read(ABLATION)
    assert ablation_faults(content) == []
    assert content["command"].startswith("covidseg ablate --data medseg9 --test medseg100")


def test_more_labels_were_measured_like_the_ablation() -> None:
    """The row stands in the same table, so only the training data may differ."""
    more, whole = read("ablate-medseg9-more-labels-quick"), read(ABLATION)
    assert [variant["name"] for variant in more["variants"]] == ["more-labels"]
    assert {key: more[key] for key in ("test_data", "settings", "seeds")} == {
        key: whole[key] for key in ("test_data", "settings", "seeds")}
    assert set(whole["data"].values()) < set(more["data"].values())
    assert "not CC0" in more["about"].replace("Not", "not")


def test_the_check_of_ablations_fires() -> None:
    content = copy.deepcopy(read(ABLATION))
    content["variants"] = [one for one in content["variants"] if one["name"] != "no-zeros"]
    content["variants"].append(content["variants"][1])
    content["variants"][0]["rows"][0]["micro"]["iou"] += 0.01
    content["environment"] = {}
    content["data"]["1"] = "abc"
    assert len(ablation_faults(content)) == 5


VERDICTS = sorted((ROOT / "results").glob("verdicts-*.json"))


def verdict_faults(content: dict) -> list[str]:
    """What does not fit in recorded verdicts: figures are computed again from what was said of each slice."""
    return [f"{result.get('system')} seed {result.get('seed')}: {name} does not fit the slices"
            for result in content["results"]
            for name, value in verdict_json(verdicts_from(result)).items() if result[name] != value]


@pytest.mark.parametrize("path", VERDICTS, ids=lambda p: p.stem)
def test_recorded_verdicts_are_complete(path: Path) -> None:
    content = read(path.stem)
    systems = [] if "nets" in content else ["rivals"]
    assert shared_faults(content, *systems, "results") + verdict_faults(content) == []


def test_the_readme_quotes_what_the_nets_that_come_along_said_of_healthy_slices() -> None:
    line, = verdict_lines(read("verdicts-mosmed-shipped")["results"])
    (_, area, healthy, diseased), ends = line.figures.mean(axis=0), line.intervals
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for value, (low, high) in ((healthy, ends[2]), (diseased, ends[3])):
        assert f"**{value:.0%}**".replace("%", " %") in text
        assert f"{low:.0%} to {high:.0%}".replace("%", "", 1).replace("%", " %") in text
    assert f"AUC of {area:.3f}" in text
    first, used = (next(line.figures[:, 0].mean() for line in verdict_lines(read("verdicts-mosmed-full")["results"])
                        if line.title == SYSTEMS[name].title) for name in ("grad-cam", "extended"))
    assert f"AUC is {first:.2f} after the first round and {used:.2f} in the round that is used" in text


def test_the_readme_quotes_what_was_marked_in_patients_left_out_in_turn() -> None:
    own = by_system(read("verdicts-medseg9-left-out-quick")["results"])["extended"]
    (line,), judged = verdict_lines(own), verdicts_from(own[0])
    labels = judged.labels
    low, high = line.intervals[2]
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert (f"in {100 * line.figures[0, 2]:.0f} % of {(labels == 0).sum()} ({100 * low:.0f} to {100 * high:.0f} %), "
            f"and {100 * line.figures[0, 3]:.0f} % of {(labels == 1).sum()} slices with a lesion") in text
    assert set(judged.patients) == set("12456789"), "volumes 2 and 3 are one patient's"
    assert "each of the eight patients of the nine training volumes" in text


CLAIM = "claim-medseg9-full"


def test_the_test_of_the_titles_claim_is_complete_and_quoted_in_the_readme() -> None:
    content = read(CLAIM)
    assert shared_faults(content, "variants") == []
    assert content["settings"]["method"] == "faithful"
    assert content["settings"]["mutual"]["painted"] == 0, "no paint covers for the two ideas"
    assert content["seeds"] == [0, 1, 2]
    for variant in content["variants"]:
        assert row_faults(variant["name"], variant["rows"]) == []
        assert variant["round"] == (1 if variant["name"] in ("one-way", "no-exchange") else 2)
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for variant in ("one-way", "no-curriculum", "random-order"):
        gained = gains(content, variant)
        assert len(gained) == 3
        assert f"{gained.mean():+.3f} in Dice ({gained.min():+.3f} to {gained.max():+.3f})" in text, variant
        assert gain_in_words(gained) in text, variant
