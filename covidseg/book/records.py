"""Recorded runs: the JSON files under ``results/``, read and summed up for the pages of the book.

Whatever a page says about real scans comes from these files, and each of them names the command, versions, device,
seeds and checksums of the data that it was made with. ``table1-*`` are comparisons of all systems, drawn up as tables
by :mod:`covidseg.evaluation.experiments`; ``ablate-*`` are variants of the method; ``bench-*`` and ``faults`` are what
`make bench` measured and what `make faults` tried.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from covidseg.data.registry import data_root
from covidseg.errors import ArtifactError
from covidseg.evaluation.experiments import ablation_rows
from covidseg.evaluation.metrics import NAMES
from covidseg.evaluation.tables import spread

Record = dict[str, Any]


def results_root() -> Path:
    """Folder of the recorded runs: inside the installed package, or ``results/`` of a checkout."""
    inside = data_root() / "results"
    return inside if inside.is_dir() else data_root().parent / "results"


def read_records(pattern: str = "table1-*", folder: Path | None = None) -> dict[str, Record]:
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


def origin(record: Record) -> str:
    """How a comparison was made, in one line of Markdown: command, slices, version and kind of machine."""
    slices = sorted({result["slices"] for result in record["results"]})
    made = record["environment"]
    return (f"`{record['command']}`, measured on {' or '.join(map(str, slices))} full slices; covidseg "
            f"{made['covidseg']}, Python {made['python']}, {made['device']}")


def over_seeds(results: Iterable[Record], average: str = "micro") -> dict[str, np.ndarray]:
    """Figures of each stage of one system.

    Args:
        results: one for each seed, see :func:`covidseg.evaluation.experiments.by_system`.
        average: ``micro`` or ``macro``.

    Returns:
        Name of the row -> ``(seeds, 5)``, figures in the order of :data:`covidseg.evaluation.metrics.NAMES`; NaN where
        one is undefined.
    """
    rows: dict[str, list[list[float]]] = {}
    for result in results:
        for row in result["rows"]:
            rows.setdefault(row["name"], []).append(
                [float("nan") if row[average][f] is None else row[average][f] for f in NAMES])
    return {name: np.array(values) for name, values in rows.items()}


def seeds_markdown(results: Sequence[Record]) -> str:
    """Table of all stages of one system: mean and deviation over the seeds, micro figures and macro Dice."""
    pooled, each = over_seeds(results), over_seeds(results, "macro")
    lines = ["| | Dice | IoU | PPV | sensitivity | specificity | macro Dice |", "|---|" + "--:|" * 6]
    lines += [f"| {name} | " + " | ".join(spread(column) for column in values.T) + f" | {spread(each[name][:, 0])} |"
              for name, values in pooled.items()]
    return "\n".join(lines)


def ablation_markdown(records: Iterable[Record]) -> str:
    """Table of an ablation: the stages of the whole method, then patches and segmenter of each variant.

    Args:
        records: the ablation, and more variants measured on the same slices with the same profile.
    """
    variants = [variant for record in records for variant in record["variants"]]
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"
    lines = ["| variant: stage | Dice | PPV | sensitivity | macro Dice |", "|---|" + "--:|" * 4]
    lines += [f"| {title} | " + " | ".join(cell(row["micro"][f]) for f in ("dice", "ppv", "sensitivity"))
              + f" | {cell(row['macro']['dice'])} |" for title, row in ablation_rows(variants)]
    return "\n".join(lines)


def bench_markdown(record: Record, kind: str = "comparisons") -> str:
    """Table of a recorded benchmark, see ``tools/bench``.

    Args:
        kind: ``comparisons``, ratio first; ``limits``, figures that have to stay below a limit, without the exponents
            of growth, which are drawn; or ``roofline``, training stages.
    """
    rows = [row for section in record["sections"].values() for row in section.get(kind, [])]
    def figure(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    reached = {True: "yes", False: "**no**", None: ""}
    if kind == "comparisons":
        head = "| times as good | goal | reached | what | covidseg | other | unit | other way |"
        lines = [f"| **{row['ratio']:.1f}** | {'' if row['goal'] is None else format(row['goal'], 'g')} | "
                 f"{reached[row['met']]} | {row['task']} | {figure(row['ours'])} | {figure(row['other'])} | "
                 f"{row['unit']} | {row['other_name']} |" for row in rows]
        return "\n".join([head, "|--:|--:|---|---|--:|--:|---|---|", *lines])
    if kind == "roofline":
        head = "| training | slices a second | ms a step | the layers need, ms | share |"
        lines = [f"| {row['stage']} | {row['slices_per_second']:.1f} | {row['step_ms']:.0f} | {row['bound_ms']:.0f} | "
                 f"{row['share']:.0%} |" for row in record["sections"]["training"]["roofline"]]
        return "\n".join([head, "|---|--:|--:|--:|--:|", *lines])
    head = "| value | limit | kept | unit | what |"
    lines = [f"| **{figure(row['value'])}** | {'' if row['limit'] is None else format(row['limit'], 'g')} | "
             f"{reached[row['met']]} | {row['unit']} | {row['task']} |"
             for row in rows if "exponent" not in row["task"]]
    return "\n".join([head, "|--:|--:|---|---|---|", *lines])


def faults_markdown(record: Record, group: str) -> str:
    """Table of one group of tried faults, see ``tools/faults``: what is wrong and what was typed, how it ended.

    Args:
        group: such as ``damaged files``.
    """
    def cell(text: str) -> str:
        text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1…", text)  # of checksums the beginning will do
        text = re.sub(r"https?://[\w./-]*\w", r"`\g<0>`", text)        # made-up addresses, not to be links
        return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    lines = ["| what is wrong | exit code | what was said |", "|---|--:|---|"]
    # The command below the fault: a column of its own would be too narrow to read on a phone.
    lines += [f"| {cell(row['fault'])}{'' if row['met'] else ' (**not caught**)'}<br>`{row['command']}` | "
              f"{row['exit_code']} | {cell(' '.join(row['said']).removeprefix('error: '))} |"
              for row in record["faults"] if row["group"] == group]
    return "\n".join(lines)
