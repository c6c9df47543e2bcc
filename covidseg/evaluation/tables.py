"""Figures as text, JSON and tables: what was measured, as a page of the book, a terminal or a file shows it.

Nothing here loads the training code, so that recorded results can be shown without it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import table as rich_table

from covidseg import DISCLAIMER
from covidseg.evaluation.metrics import NAMES, Distance, Scores

if TYPE_CHECKING:
    from covidseg.evaluation.evaluate import Evaluation

Record = dict[str, Any]  # a JSON object of results


def figure(value: float | None, form: str = ".3f") -> str:
    """A number with three digits, or in another format; a dash where it is undefined (NaN) or was not taken (None)."""
    return "–" if value is None or math.isnan(value) else format(value, form)


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over runs, ``0.712 ± 0.004``; without a deviation for a single run."""
    values = values[~np.isnan(values)]
    mean = figure(values.mean() if len(values) else None)
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class Table:
    """A table of text.

    Attributes:
        heads: One for each column. A terminal breaks them where they have a line break.
        align: A letter for each column, ``l`` for left and ``r`` for right.
        rows: Cells of each row. A row whose first cell is *emphasised*, as Markdown has it, is dim in a terminal.
    """

    heads: Sequence[str]
    align: str
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """The table for a page of the book."""
        heads = [head.replace("\n", " ") for head in self.heads]
        return "\n".join(["|" + "|".join(f" {head} " if head else " " for head in heads) + "|",
                          "|" + "|".join({"l": "---", "r": "--:"}[side] for side in self.align) + "|",
                          *("| " + " | ".join(row) + " |" for row in self.rows)])

    def rich(self, title: str) -> rich_table.Table:
        """The table for a terminal: figures stay whole, names may wrap."""
        table = rich_table.Table(title=title, caption=DISCLAIMER, pad_edge=False, padding=(0, 0, 0, 1))
        for head, side in zip(self.heads, self.align, strict=True):
            if side == "r":
                table.add_column(head, justify="right", no_wrap=True)
            else:
                table.add_column(head, overflow="fold")
        for first, *others in self.rows:
            table.add_row(first.strip("*"), *others, style="dim" if first.startswith("*") else None)
        return table


# --- JSON -----------------------------------------------------------------------------------------------------------

def digits(value: float) -> float | None:
    """Four digits; None where undefined, since JSON has no NaN."""
    return None if math.isnan(value) else round(value, 4)


def scores_json(scores: Scores) -> dict[str, float | None]:
    """Figures by their names, with :func:`digits`."""
    return {name: digits(value) for name, value in scores.as_dict().items()}


def distance_json(found: Distance) -> Record:
    """The distance of outlines, HD95, and on how many slices it stands."""
    return {**asdict(found), "mean": None if math.isnan(found.mean) else round(found.mean, 2)}


def classes_json(sensitivity: Mapping[str, float]) -> Record:
    """Sensitivity by class as an entry of a record; no entry for masks that tell no classes apart."""
    found = {name: round(value, 4) for name, value in sensitivity.items()}
    return {"sensitivity_by_class": found} if found else {}


def evaluation_json(evaluation: Evaluation) -> Record:
    """All that was measured on a test set, as plain JSON values."""
    inside, share = evaluation.lung_shares()
    return {
        "slices": evaluation.slices, "classifier_auc": digits(evaluation.classifier_auc),
        "lungs": {"lesion_inside": digits(inside), "share_of_slice": digits(share)},
        "rows": [{"name": stage.name, "supervision": stage.supervision,
                  "threshold": None if math.isnan(stage.threshold) else round(stage.threshold, 3),
                  "macro": scores_json(stage.macro()), "micro": scores_json(stage.micro()),
                  "hd95": distance_json(stage.distance()), **classes_json(stage.class_sensitivity())}
                 for stage in evaluation.stages],
    }


# --- tables of stages, seeds and variants ---------------------------------------------------------------------------

def scores_table(rows: Iterable[tuple[str, Mapping[str, float | None], Mapping[str, float | None]]]) -> Table:
    """Rows of name, micro and macro figures by their names: five pooled over pixels, Dice and IoU also over slices."""
    return Table(("", "Dice", "IoU", "PPV", "sens.", "spec.", "macro\nDice", "macro\nIoU"), "l" + "r" * 7, [
        [name, *(figure(micro[each]) for each in NAMES), figure(macro["dice"]), figure(macro["iou"])]
        for name, micro, macro in rows])


def rounds_used(records: Iterable[Record]) -> str:
    """Which round of the exchange was used with each seed, ``2, 2, 2``; empty where that is not known."""
    return ", ".join(str(record["round"]) for record in records if record.get("round"))


def ablation_rows(results: Iterable[Record]) -> list[tuple[str, Record]]:
    """Title and figures of each row: all stages of the whole method, patches and segmenter of the variants."""
    return [(f"{result['title']}: {row['name']}", row) for result in results for row in result["rows"]
            if result["name"] == "whole" or row["name"] in ("Patch MIL", "Segmenter")]


def ablation_table(variants: Iterable[Record], *, narrow: bool = False) -> Table:
    """Variants of an ablation: means over seeds with their deviation, and which round was used with each seed.

    ``narrow`` is for a terminal of 80 columns and leaves out all deviations but that of Dice.
    """
    found: dict[str, list[Record]] = {}
    for variant in variants:
        for title, row in ablation_rows([variant]):
            found.setdefault(title, []).append({**row, "round": variant.get("round")})
    rows = []
    for title, own in found.items():
        figures = [[row["micro"]["dice"], row["micro"]["ppv"], row["micro"]["sensitivity"], row["macro"]["dice"]]
                   for row in own]
        cells, rounds = [spread(column) for column in np.array(figures, float).T], rounds_used(own)  # of None NaN
        if narrow:
            cells = [cells[0].replace(" ± ", "±"), *(cell.split(" ± ")[0] for cell in cells[1:])]
            rounds = rounds.replace(" ", "")
        rows.append([title, *cells, rounds])
    heads = ["variant: stage", "Dice", "PPV", "sens." if narrow else "sensitivity", "macro\nDice", "round\nused"]
    width = len(heads) - (not any(row[-1] for row in rows))  # older records do not say which round
    return Table(heads[:width], "l" + "r" * (width - 1), [row[:width] for row in rows])
