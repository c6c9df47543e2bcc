"""Results for the pages of the book: the recorded runs under ``results/``, and pictures of what was measured.

Whatever a page says about real scans comes from these JSON files; each names the command, versions, device, seeds and
checksums of the data that it was made with. ``table1-*`` are comparisons of all systems, ``ablate-*`` variants of the
method, ``bench-*`` and ``faults`` what `make bench` measured and what `make faults` tried. Functions that draw return a
new figure in the look of :mod:`covidseg.book.figures`; none runs a net or opens a scan.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from covidseg.book.figures import CYCLE, new_figure
from covidseg.data.registry import data_root
from covidseg.errors import ArtifactError
from covidseg.evaluation.metrics import figures
from covidseg.evaluation.tables import Record, Table

if TYPE_CHECKING:
    from covidseg.evaluation.experiments import Line


# --- recorded runs --------------------------------------------------------------------------------------------------

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


def dice_by_seed(record: Record, variant: str, stage: str = "Segmenter") -> dict[int, float]:
    """Micro Dice of a stage of one variant in a recorded ablation: seed -> value."""
    return {one["seed"]: row["micro"]["dice"] for one in record["variants"] if one["name"] == variant
            for row in one["rows"] if row["name"] == stage}


def gains(record: Record, variant: str, stage: str = "Segmenter") -> np.ndarray:
    """How far the whole method is ahead of a variant in micro Dice, ``(seeds,)``: what the part left out is worth."""
    whole, other = (dice_by_seed(record, name, stage) for name in ("whole", variant))
    return np.array([whole[seed] - other[seed] for seed in whole if seed in other])


def gain_in_words(gained: np.ndarray) -> str:
    """What gains in Dice, one for each seed, say; less than 0.005 is no difference that anybody would see."""
    up, down, seeds = int((gained > 0.005).sum()), int((gained < -0.005).sum()), len(gained)
    if seeds in (up, down):
        return "helps with every seed" if up else "harms with every seed"
    if abs(gained.mean()) <= 0.01:
        return "makes no clear difference"
    does, clear, against = ("helps", up, down) if gained.mean() > 0 else ("harms", down, up)
    return f"{does} on average: clearly with {clear} of {seeds} seeds" + (
        f", but not with {against}" if against else ", hardly with the rest")


def bench_markdown(record: Record, kind: str = "comparisons") -> str:
    """Table of a recorded benchmark, ``bench-*``, see ``tools/bench``.

    ``kind`` is ``comparisons``, ratio first; ``limits``, figures that have to stay below a limit, without the exponents
    of growth, which are drawn; or ``roofline``, training stages.
    """
    rows = [row for section in record["sections"].values() for row in section.get(kind, [])]

    def number(value: float) -> str:
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

    def aim(value: float | None) -> str:
        return "" if value is None else f"{value:g}"
    reached = {True: "yes", False: "**no**", None: ""}
    if kind == "comparisons":
        heads = "times as good", "goal", "reached", "what", "covidseg", "other", "unit", "other way"
        table = Table(heads, "rrllrrll", [
            [f"**{row['ratio']:.1f}**", aim(row["goal"]), reached[row["met"]], row["task"], number(row["ours"]),
             number(row["other"]), row["unit"], row["other_name"]] for row in rows])
    elif kind == "roofline":
        table = Table(("training", "slices a second", "ms a step", "the layers need, ms", "share"), "lrrrr", [
            [row["stage"], f"{row['slices_per_second']:.1f}", f"{row['step_ms']:.0f}", f"{row['bound_ms']:.0f}",
             f"{row['share']:.0%}"] for row in rows])
    else:
        table = Table(("value", "limit", "kept", "unit", "what"), "rrlll", [
            [f"**{number(row['value'])}**", aim(row["limit"]), reached[row["met"]], row["unit"], row["task"]]
            for row in rows if "exponent" not in row["task"]])
    return table.markdown()


def faults_markdown(record: Record, group: str) -> str:
    """Table of one group of tried faults, see ``tools/faults``: what is wrong and what was typed, how it ended."""
    def cell(text: str) -> str:
        text = re.sub(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b", r"\1…", text)  # of checksums the beginning will do
        text = re.sub(r"https?://[\w./-]*\w", r"`\g<0>`", text)        # made-up addresses, not to be links
        return text.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    # The command below the fault: a column of its own would be too narrow to read on a phone.
    return Table(("what is wrong", "exit code", "what was said"), "lrl", [
        [f"{cell(row['fault'])}{'' if row['met'] else ' (**not caught**)'}<br>`{row['command']}`",
         str(row["exit_code"]), cell(" ".join(row["said"]).removeprefix("error: "))]
        for row in record["faults"] if row["group"] == group]).markdown()


# --- systems --------------------------------------------------------------------------------------------------------

def interval_plot(lines: Sequence[Line], published: Mapping[str, float] | None = None) -> Figure:
    """Micro Dice of every system: its interval as a bar, each seed as a dot, and what was published, by its title.

    Where nobody knows the patients, the legend says what the intervals are over.
    """
    figure, axes = new_figure(1, 1, (7.2, 0.34 * len(lines) + 1.1))
    panel = axes[0, 0]
    for row, line in enumerate(lines):
        panel.plot(line.interval, [row, row], color=CYCLE[5], linewidth=6, solid_capstyle="butt",
                   label=f"95 % interval{'' if line.patients else ' over slices (too narrow)'}, mean over seeds"
                   if row == 0 else None)
        panel.plot(line.micro[:, 0], np.full(len(line.micro), row), "o", color=CYCLE[0], markersize=5,
                   label="a seed" if row == 0 else None)
    marked = [(row, published[line.title]) for row, line in enumerate(lines) if published and line.title in published]
    if marked:
        panel.plot([dice for _, dice in marked], [row for row, _ in marked], "D", color=CYCLE[1], markersize=6,
                   markerfacecolor="none", markeredgewidth=1.5, label="published")
    panel.set(yticks=range(len(lines)), yticklabels=[line.title for line in lines], xlim=(0, 1), xlabel="micro Dice",
              ylim=(len(lines) - 0.4, -0.6))
    panel.grid(axis="x", color="#dddddd", linewidth=0.8)
    panel.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=3)
    return figure


def operating_curves(levels: Mapping[str, np.ndarray], answers: Mapping[str, np.ndarray] | None = None,
                     published: Mapping[str, tuple[float, float]] | None = None) -> Figure:
    """PPV against sensitivity as the level of the outline moves, over lines of equal Dice.

    ``levels`` are title of a system -> ``(L, 4)`` counts at ascending levels, see
    :func:`covidseg.evaluation.statistics.level_counts`; ``answers`` title -> ``(4,)`` counts at its own level, drawn as
    a dot; ``published`` name -> sensitivity and PPV in a published table, drawn as diamonds.
    """
    figure, axes = new_figure(1, 1, (6.2, 4.6))
    panel = axes[0, 0]
    sensitivity = np.linspace(0.01, 1, 200)
    for dice in (0.4, 0.5, 0.6, 0.7, 0.8):  # D = 2 PPV s / (PPV + s), solved for PPV
        with np.errstate(divide="ignore", invalid="ignore"):
            ppv = dice * sensitivity / (2 * sensitivity - dice)
        shown = (ppv > 0) & (ppv <= 1)
        panel.plot(sensitivity[shown], ppv[shown], color="#bbbbbb", linewidth=0.8, zorder=0)
        panel.annotate(f"Dice {dice:.1f}", (1.0, dice / (2 - dice)), fontsize=7, color="#666666", ha="right",
                       va="bottom")
    for k, (name, counts) in enumerate(levels.items()):
        line = figures(counts)                                                           # (L, 5)
        panel.plot(line[:, 3], line[:, 2], color=CYCLE[k % len(CYCLE)],
                   linestyle=("-", "--", "-.", ":")[k // len(CYCLE)], label=name)
        if answers is not None and name in answers:
            dot = figures(answers[name])
            panel.plot(dot[3], dot[2], "o", color=CYCLE[k % len(CYCLE)], markersize=6)
    for marker, (name, (x, y)) in zip("Dsv^", (published or {}).items(), strict=False):
        panel.plot(x, y, marker, color="black", markerfacecolor="white", markersize=7, label=f"published: {name}")
    panel.set(xlabel="sensitivity", ylabel="PPV", xlim=(0, 1.01), ylim=(0, 1.01))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return figure
