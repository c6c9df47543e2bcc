"""Run reports and tables: what was run, on what, with which versions, and what came out."""

from __future__ import annotations

import json
import math
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from covidseg import DISCLAIMER, __version__
from covidseg.artifacts import file_hash, write_text
from covidseg.distributed import is_first
from covidseg.errors import ArtifactError
from covidseg.evaluate import Evaluation
from covidseg.metrics import Scores
from covidseg.pipeline import Run
from covidseg.predict import REPORT
from covidseg.profiles import profile_json

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "nibabel", "monai", "grad-cam")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and kind of machine; nothing that names it or its user."""
    return {
        "covidseg": __version__, "python": platform.python_version(), "system": platform.system(),
        "packages": {name: version(name) for name in PACKAGES}, "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def write_run(run: Run, command: str) -> Path:
    """Writes ``run.json``, which makes a folder of stages a run that ``covidseg predict`` can use.

    Of several processes all have to call it, since the first asks the others about stages that it has to read.

    ``seconds`` holds what each stage took when it was made, also if that was in an earlier run in the same folder; null
    for a stage whose file was deleted or damaged since, which the stages after it, once stored, can do without.

    Args:
        command: what was asked for, without folder names of this machine.
    """
    path, stages = run.folder / REPORT, run.stages()
    content = {
        "note": DISCLAIMER, "command": command, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: _seconds(run, stage) for stage in stages},
        "seed": run.seed, "environment": environment(run.device),
        "data": {case.id: file_hash(case.image) for case in run.data.cases},
        "labelled_slices": run.data.labels(), "settings": profile_json(run.profile),
        "stages": {stage: run.store.path(stage, run.key(stage)).name for stage in stages}, "best_round": run.best(),
    }
    if is_first():
        write_text(path, json.dumps(content, indent=2) + "\n")
    return path


def _seconds(run: Run, stage: str) -> float | None:
    """What a stage took; None if its file is gone or cannot be read."""
    try:
        return run.store.seconds(stage, run.key(stage))
    except ArtifactError:
        return None


def _digits(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def scores_json(scores: Scores) -> dict[str, float | None]:
    """Figures with four digits; None where undefined, since JSON has no NaN."""
    return {name: _digits(value) for name, value in scores.as_dict().items()}


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """The whole table as plain JSON values."""
    inside, share = evaluation.lung_shares()
    return {
        "slices": evaluation.slices, "classifier_auc": _digits(evaluation.classifier_auc),
        "lungs": {"lesion_inside": _digits(inside), "share_of_slice": _digits(share)},
        "rows": [{"name": stage.name, "supervision": stage.supervision,
                  "threshold": None if math.isnan(stage.threshold) else round(stage.threshold, 3),
                  "macro": scores_json(stage.macro()), "micro": scores_json(stage.micro())}
                 for stage in evaluation.stages],
    }


def scores_table(title: str, rows: list[tuple[str, Scores, Scores]]) -> Table:
    """A terminal table: the five figures pooled over pixels (micro), and Dice and IoU averaged over slices (macro).

    Args:
        rows: name, micro, macro.
    """
    table = Table(title=title, caption=DISCLAIMER)
    table.add_column("")  # the only one that may wrap in a narrow terminal
    for head in ("Dice", "IoU", "PPV", "sens.", "spec.", "macro\nDice", "macro\nIoU"):
        table.add_column(head, justify="right", min_width=5)
    for row, pooled, each in rows:
        table.add_row(row, *(format_figure(v) for v in pooled.as_dict().values()),
                      format_figure(each.dice), format_figure(each.iou))
    return table


def scores_from(plain: dict[str, float | None]) -> Scores:
    """Inverse of :func:`scores_json`."""
    return Scores(**{name: float("nan") if value is None else value for name, value in plain.items()})


def evaluation_markdown(evaluation: Evaluation) -> str:
    """The table of all stages for a page of the book."""
    head = "| | taught with | Dice | IoU | PPV | sensitivity | specificity | macro Dice |\n|---|---|" + "--:|" * 6
    lines = [f"| {stage.name} | {stage.supervision} | "
             + " | ".join(format_figure(v) for v in (*stage.micro().as_dict().values(), stage.macro().dice)) + " |"
             for stage in evaluation.stages]
    return "\n".join([head, *lines])


def format_figure(value: float) -> str:
    """Three digits, or a dash where the figure is undefined."""
    return "–" if math.isnan(value) else f"{value:.3f}"


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over runs, ``0.712 ± 0.004``; without a deviation for a single run."""
    values = values[~np.isnan(values)]
    if not len(values):
        return "–"
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")
