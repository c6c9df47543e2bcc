"""Pictures of recorded benchmarks (``results/bench-*.json``): ratios, growth, the roofline, more processes.

Functions return a new figure and share the look of :mod:`covidseg.viz`; they draw what the record holds and measure
nothing.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from covidseg.viz import CYCLE, new_figure

Rows = Sequence[Mapping[str, Any]]


def ratio_bars(rows: Rows) -> Figure:
    """How many times as fast or as small covidseg is than each other way, with the goal where there was one.

    Args:
        rows: comparisons of a record; the axis is logarithmic, and 1 means no difference.
    """
    figure, axes = new_figure(1, 1, (7.4, 0.62 * len(rows) + 0.9))
    panel, places = axes[0, 0], np.arange(len(rows))
    panel.barh(places, [row["ratio"] for row in rows], 0.6, color=CYCLE[0])
    for place, row in zip(places, rows, strict=True):
        panel.text(row["ratio"] * 1.06, place, f"{row['ratio']:.1f}", va="center", fontsize=9)
        if row["goal"] is not None:
            panel.plot([row["goal"]] * 2, [place - 0.38, place + 0.38], color=CYCLE[1], linewidth=2.5,
                       label="goal" if "goal" not in panel.get_legend_handles_labels()[1] else None)
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set(xscale="log", xlabel="times as fast, or as small (logarithmic)", yticks=places, yticklabels=[
        textwrap.fill(f"{row['task']}, against {row['other_name']}", 46) for row in rows])
    panel.xaxis.set_major_formatter("{x:g}")
    panel.set_xlim(min(0.8, *(0.9 * row["ratio"] for row in rows)), 2 * max(row["ratio"] for row in rows))
    panel.invert_yaxis()
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="lower right")
    return figure


def growth_curves(points: Mapping[str, Mapping[str, Rows]], quantity: str = "seconds") -> Figure:
    """Time or memory of each stage against the number of slices and of pixels, on logarithmic axes.

    Every curve is divided by its first point, and the dotted line is linear growth: a curve below it grows more slowly.

    Args:
        points: stage -> ``slices`` or ``pixels`` -> measured rows.
        quantity: ``seconds`` or ``memory_mb``.
    """
    # What allocators hold in reserve hides a few megabytes; they count as this much.
    least = 1e-6 if quantity == "seconds" else 10.0
    figure, axes = new_figure(1, 2, (4.0, 3.7), sharey=True)
    for panel, kind in zip(axes[0], ("slices", "pixels"), strict=True):
        for (name, both), color, marker in zip(points.items(), CYCLE, "osD^vPX", strict=False):
            rows = both[kind]
            x = np.array([row["slices"] * (row["side"] ** 2 if kind == "pixels" else 1) for row in rows], float)
            y = np.array([max(row[quantity], least) for row in rows])
            panel.plot(x / x[0], y / y[0], marker=marker, markersize=5, color=color, label=name)
        panel.plot([1, x[-1] / x[0]], [1, x[-1] / x[0]], ":", color="black", label="linear growth")
        panel.set(xscale="log", yscale="log")
        panel.yaxis.set_major_formatter("{x:g}")
        ticks = x / x[0]
        labels = [str(row["slices"]) for row in rows] if kind == "slices" else [f"{row['side']}²" for row in rows]
        _ticks(panel, ticks, labels)
        panel.set_xlabel(f"slices, {rows[0]['side']}² pixels each" if kind == "slices" else
                         f"pixels of each of {rows[0]['slices']} slices")
    axes[0, 0].set_ylabel(("time" if quantity == "seconds" else "memory") + ", as a multiple of the smallest")
    axes[0, 1].legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _ticks(panel: Axes, places: np.ndarray, labels: Sequence[str]) -> None:
    """Ticks at the measured sizes and nowhere else."""
    panel.xaxis.set_major_locator(FixedLocator(list(places)))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.set_xticklabels(labels)


def roofline_bars(stages: Rows) -> Figure:
    """Where the time of a training step goes: arithmetic, memory traffic of the layers, and all the rest.

    Args:
        stages: the roofline of a record.
    """
    figure, axes = new_figure(1, 1, (7.0, 0.6 * len(stages) + 1.2))
    panel, places = axes[0, 0], np.arange(len(stages))
    arithmetic = np.array([row["arithmetic_ms"] for row in stages])
    bound, step = (np.array([row[name] for row in stages]) for name in ("bound_ms", "step_ms"))
    left = np.zeros(len(stages))
    for label, width, color, hatch in (("arithmetic at full speed", arithmetic, CYCLE[0], ""),
                                       ("memory at full speed", bound - arithmetic, CYCLE[5], "//"),
                                       ("everything else", np.maximum(step - bound, 0), "#BBBBBB", "")):
        panel.barh(places, width, 0.6, left, label=label, color=color, hatch=hatch, edgecolor="white")
        left = left + width
    panel.set(yticks=places, yticklabels=[row["stage"] for row in stages], xlabel="milliseconds of a training step")
    panel.invert_yaxis()
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def scaling_curves(scaling: Mapping[str, Any]) -> Figure:
    """Speed-up by more processes of one thread each, for training under torchrun and for prediction in parts."""
    figure, axes = new_figure(1, 1, (5.0, 3.4))
    panel, most = axes[0, 0], 1
    curves = (("training (torchrun)", [row for row in scaling["training"] if row["threads"] == 1], "step_ms"),
              ("prediction (parts)", scaling["prediction"], "seconds"))
    for (name, rows, quantity), color, marker in zip(curves, CYCLE, "os", strict=False):
        processes = [row["processes"] for row in rows]
        panel.plot(processes, [rows[0][quantity] / row[quantity] for row in rows], marker=marker, color=color,
                   label=name)
        most = max(most, *processes)
    panel.plot([1, most], [1, most], ":", color="black", label="perfect")
    panel.axvline(scaling["cores"], color="#888888", linewidth=1, linestyle="--", label=f"{scaling['cores']} cores")
    panel.set(xlabel="processes, one thread each", ylabel="speed-up", ylim=(0, None), xticks=range(1, most + 1))
    panel.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
