"""Pictures of results: systems side by side, from maps and masks or from a recorded comparison.

Functions return a new figure and change nothing else, as those of :mod:`covidseg.viz`, whose look and colours they
share. What they draw is handed to them: no function here runs a net or opens a scan.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure

from covidseg.metrics import figures
from covidseg.statistics import calibration
from covidseg.viz import CYCLE, HEAT, draw_heat, draw_slice, legend, new_figure, overlay

if TYPE_CHECKING:  # drawing a table must not load the training code
    from covidseg.compare import Line


def stage_bars(rows: Sequence[Mapping[str, Any]], *, average: str = "micro") -> Figure:
    """Dice, PPV and sensitivity of every stage as bars.

    Args:
        rows: of a result, see :func:`covidseg.report.evaluation_json`; undefined figures have no bar.
        average: ``micro`` (pooled pixels) or ``macro`` (mean over slices with a lesion).
    """
    figure, axes = new_figure(1, 1, (7.2, 0.55 * len(rows) + 1.0))
    panel, height = axes[0, 0], 0.26
    places = np.arange(len(rows))
    for k, (name, label) in enumerate((("dice", "Dice"), ("ppv", "PPV"), ("sensitivity", "sensitivity"))):
        values = [row[average][name] or 0.0 for row in rows]
        panel.barh(places + (k - 1) * height, values, height, label=label, color=CYCLE[k])
    panel.set(yticks=places, yticklabels=[row["name"] for row in rows], xlim=(0, 1), xlabel=f"{average} average")
    panel.invert_yaxis()
    panel.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)
    return figure


def system_grid(images: Sequence[np.ndarray], lungs: Sequence[np.ndarray], truths: Sequence[np.ndarray],
                titles: Sequence[str], systems: Mapping[str, Sequence[np.ndarray]],
                notes: Mapping[str, Sequence[str]] | None = None, *, size: float = 1.5) -> Figure:
    """The same slices in every system: a column for each slice, a row for each system, the truth on all of them.

    Args:
        images, lungs, truths: ``(S, S)`` each, the last two bool.
        titles: of the slices.
        systems: title -> for each slice a ``(S, S)`` map in [0, 1], drawn as heat, or a bool mask, drawn as outline.
        notes: title -> for each slice a few characters for the corner of its panel, such as a Dice.
        size: width and height of a panel in inches.
    """
    figure, axes = new_figure(len(systems) + 1, len(images), (size, size))
    rows: list[tuple[str, Sequence[np.ndarray] | None]] = [("slice and truth", None), *systems.items()]
    heat, masks = None, False
    for (name, shown), panels in zip(rows, axes, strict=True):
        for k, (panel, image) in enumerate(zip(panels, images, strict=True)):
            draw_slice(panel, image, title=titles[k] if shown is None else "")
            panel.title.set_fontsize(8)
            if shown is not None and shown[k].dtype == bool:
                overlay(panel, {"prediction": shown[k]}, fill=0.3)
                masks = True
            elif shown is not None:
                heat = draw_heat(panel, shown[k], lungs[k])
            overlay(panel, {"truth": truths[k]})
            if notes and name in notes:
                panel.text(0.03, 0.03, notes[name][k], transform=panel.transAxes, color="white", fontsize=8,
                           va="bottom", bbox={"facecolor": "black", "alpha": 0.7, "edgecolor": "none", "pad": 1.5})
        panels[0].set_axis_on()  # for its label; ticks and frame stay away
        panels[0].set(xticks=[], yticks=[])
        panels[0].spines[:].set_visible(False)
        panels[0].set_ylabel(textwrap.fill(name, 17), fontsize=9)
    if heat is not None:
        figure.colorbar(heat, ax=axes, shrink=0.4, label="map value")
    legend(figure, ["truth", *(["prediction"] if masks else [])])
    # Room for what stands around the panels, which would shrink otherwise and leave gaps.
    figure.set_size_inches(size * len(images) + 0.45 + 0.9 * (heat is not None), size * len(rows) + 0.7)
    figure.set_layout_engine("compressed", w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)  # for square panels
    return figure


def interval_plot(lines: Sequence[Line], published: Mapping[str, float] | None = None) -> Figure:
    """Micro Dice of every system: its interval as a bar, each seed as a dot, and what was published.

    Args:
        lines: from :func:`covidseg.compare.table_lines`.
        published: title of a system -> published Dice of the system that it stands for.
    """
    figure, axes = new_figure(1, 1, (7.2, 0.34 * len(lines) + 1.1))
    panel = axes[0, 0]
    for row, line in enumerate(lines):
        panel.plot(line.interval, [row, row], color=CYCLE[5], linewidth=6, solid_capstyle="butt",
                   label="95 % interval, mean over seeds" if row == 0 else None)
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

    Args:
        levels: title of a system -> ``(L, 4)`` counts at ascending levels, see
            :func:`covidseg.statistics.level_counts`; those of several seeds added up.
        answers: title -> ``(4,)`` counts at the level that the system uses, drawn as a dot.
        published: name -> sensitivity and PPV in a published table, drawn as diamonds.
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


def reliability_diagram(sums: Mapping[str, np.ndarray]) -> Figure:
    """How often a lesion probability is right, and how many pixels got it.

    Args:
        sums: title -> ``(bins, 3)`` added :func:`covidseg.statistics.reliability_sums`.
    """
    figure, axes = new_figure(1, 2, (3.9, 3.5))
    left, right = axes[0]
    left.plot([0, 1], [0, 1], linestyle=":", color="grey", label="calibrated")
    for k, (name, one) in enumerate(sums.items()):
        found, edges = calibration(one), np.linspace(0, 1, len(one) + 1)
        full = found.count > 0
        left.plot(found.confidence[full], found.observed[full], marker="os^Dv"[k % 5], markersize=4,
                  color=CYCLE[k % len(CYCLE)], label=name)
        right.stairs(np.maximum(found.count, 0.5), edges, baseline=0.5, color=CYCLE[k % len(CYCLE)], linewidth=1.8)
    left.set(xlabel="probability of a lesion, mean of the bin", ylabel="true share of lesion", xlim=(-0.02, 1.02),
             ylim=(-0.02, 1.02), title="how often it is right")
    right.set(xlabel="probability of a lesion", ylabel="lung pixels", yscale="log", xlim=(0, 1), ylim=(0.5, None),
              title="how many pixels")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=len(sums) + 1)
    return figure


def size_table(dice: Mapping[str, np.ndarray], edges: Sequence[float], count: np.ndarray) -> Figure:
    """Macro Dice by the size of the lesion as a coloured table, from :func:`covidseg.statistics.dice_by_size`.

    Args:
        dice: title of a system -> ``(K,)`` in [0, 1]; NaN, an empty bin, stays white.
        edges: the ``K - 1`` areas between the bins, in pixels.
        count: ``(K,)`` slices in each bin.
    """
    values = np.array(list(dice.values()))                                               # (systems, K)
    figure, axes = new_figure(1, 1, (7.2, 0.34 * len(values) + 1.2))
    panel = axes[0, 0]
    picture = panel.imshow(values, cmap=HEAT, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        panel.text(column, row, "–" if np.isnan(value) else f"{value:.2f}", ha="center", va="center",
                   color="black" if np.isnan(value) or value > 0.5 else "white")
    sizes = [f"below {edges[0]:,.0f}", *(f"{a:,.0f} to {b:,.0f}" for a, b in itertools.pairwise(edges)),
             f"from {edges[-1]:,.0f}"]
    panel.set(yticks=range(len(values)), yticklabels=list(dice), xticks=range(len(sizes)),
              xticklabels=[f"{size}\n{n} slice{'' if n == 1 else 's'}" for size, n in zip(sizes, count, strict=True)],
              xlabel="lesion in the slice, pixels")
    panel.tick_params(length=0)
    panel.spines[:].set_visible(False)
    figure.colorbar(picture, ax=panel, label="macro Dice")
    return figure
