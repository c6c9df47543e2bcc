"""Recorded runs: the JSON files under ``results/``, read and summed up for the pages of the book.

Whatever a page says about real scans comes from these files, and each of them names the command, versions, device,
seed and checksums of the data that it was made with.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from covidseg.ablate import ablation_rows
from covidseg.errors import ArtifactError
from covidseg.registry import data_root

FIGURES = ("dice", "iou", "ppv", "sensitivity", "specificity")
Record = dict[str, Any]


def results_root() -> Path:
    """Folder of the recorded runs: inside the installed package, or ``results/`` of a checkout."""
    inside = data_root() / "results"
    return inside if inside.is_dir() else data_root().parent / "results"


def read_records(pattern: str = "reproduce-*", folder: Path | None = None) -> dict[str, Record]:
    """Recorded runs by name, in order; ``pattern`` is a glob without the suffix.

    Raises:
        ArtifactError: a file is not a recorded run.
    """
    records = {}
    for path in sorted((results_root() if folder is None else folder).glob(f"{pattern}.json")):
        try:
            records[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ArtifactError(f"is no recorded run ({error})", path=path,
                                remedy="Take it from the repository again") from error
    return records


def seconds(record: Record) -> float:
    """What the training of all stages took."""
    return sum(record["run"]["seconds"].values())


def over_seeds(records: Iterable[Record], average: str = "micro") -> dict[str, np.ndarray]:
    """Figures of each stage in several runs that differ in their seeds only.

    Args:
        average: ``micro`` or ``macro``.

    Returns:
        Name of the row -> ``(runs, 5)``, figures in the order of :data:`FIGURES`; NaN where one is undefined.
    """
    rows: dict[str, list[list[float]]] = {}
    for record in records:
        for row in record["rows"]:
            rows.setdefault(row["name"], []).append(
                [float("nan") if row[average][f] is None else row[average][f] for f in FIGURES])
    return {name: np.array(values) for name, values in rows.items()}


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation over runs, ``0.712 ± 0.004``; without a deviation for a single run."""
    values = values[~np.isnan(values)]
    if not len(values):
        return "–"
    return f"{values.mean():.3f}" + (f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else "")


def seeds_markdown(records: list[Record]) -> str:
    """Table of all stages: mean and deviation over the seeds, micro figures and macro Dice."""
    pooled, each = over_seeds(records), over_seeds(records, "macro")
    lines = ["| | Dice | IoU | PPV | sensitivity | specificity | macro Dice |", "|---|" + "--:|" * 6]
    lines += [f"| {name} | " + " | ".join(spread(column) for column in values.T) + f" | {spread(each[name][:, 0])} |"
              for name, values in pooled.items()]
    return "\n".join(lines)


def ablation_markdown(record: Record) -> str:
    """Table of an ablation: the stages of the whole method, then patches and segmenter of each variant."""
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"
    lines = ["| variant: stage | Dice | PPV | sensitivity | macro Dice |", "|---|" + "--:|" * 4]
    lines += [f"| {title} | " + " | ".join(cell(row["micro"][f]) for f in ("dice", "ppv", "sensitivity"))
              + f" | {cell(row['macro']['dice'])} |" for title, row in ablation_rows(record["variants"])]
    return "\n".join(lines)
