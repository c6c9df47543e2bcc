"""Recorded runs under results/: complete, honest about where they come from, and ranked as the book says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDED = sorted((ROOT / "results").glob("reproduce-*.json"))
FIGURES = ("dice", "iou", "ppv", "sensitivity", "specificity")


def faults(content: dict) -> list[str]:
    """What is missing from, or impossible in, a recorded run."""
    found = [f"no {key}" for key in ("command", "seed", "environment", "test_data", "run", "rows", "slices")
             if not content.get(key) and content.get(key) != 0]
    for key in ("python", "packages", "device", "covidseg"):
        if key not in content.get("environment", {}):
            found.append(f"environment lacks {key}")
    for name, digest in {**content.get("test_data", {}), **content.get("run", {}).get("data", {})}.items():
        if len(digest) != 64:
            found.append(f"{name} has no sha256")
    for row in content.get("rows", []):
        for kind in ("micro", "macro"):
            scores = row[kind]
            if any(scores[f] is not None and not 0 <= scores[f] <= 1 for f in FIGURES):
                found.append(f"{row['name']} {kind} outside 0..1")
        # Over pooled pixels Dice and IoU are two faces of one count: IoU = Dice / (2 - Dice).
        dice, iou = row["micro"]["dice"], row["micro"]["iou"]
        if dice is not None and abs(iou - dice / (2 - dice)) > 2e-4:
            found.append(f"{row['name']}: IoU {iou} does not fit Dice {dice}")
    return found


def test_there_are_recorded_runs() -> None:
    assert {p.stem for p in RECORDED} >= {"reproduce-phantom-quick", "reproduce-medseg9-full-extended-seed0",
                                          "reproduce-medseg9-full-faithful-seed0"}


@pytest.mark.parametrize("path", RECORDED, ids=lambda p: p.stem)
def test_recorded_runs_are_complete(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert faults(content) == []
    assert "/" not in content["command"].replace("covidseg reproduce", ""), "no folder of the machine it ran on"


def test_the_check_fires() -> None:
    content = json.loads(RECORDED[0].read_text(encoding="utf-8"))
    content["rows"][1]["micro"]["iou"] += 0.01
    content["environment"].pop("device")
    content["test_data"] = {"a.nii.gz": "abc"}
    assert len(faults(content)) == 3
    assert "no command" in faults({**content, "command": ""})


@pytest.mark.parametrize("name", ["reproduce-phantom-quick", "reproduce-medseg9-full-extended-seed0"])
def test_stages_rank_on_the_phantom_as_on_real_ct(name: str) -> None:
    rows = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))["rows"]
    dice = {row["name"]: row["micro"]["dice"] for row in rows}
    assert dice["Otsu in the lung"] < dice["Grad-CAM"] < dice["Patch MIL"] < dice["Segmenter"]
    assert dice["Segmenter"] < dice.get("Segmenter, true masks", 0.9) < 0.95
