"""Run reports and tables: what was run, on what, with which versions, and what came out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from rich.table import Table

from covidseg import DISCLAIMER
from covidseg.evaluation.evaluate import Evaluation
from covidseg.evaluation.metrics import Scores


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
