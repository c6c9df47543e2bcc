"""Pictures: one look and one set of colours for every figure of the book.

All functions return a new :class:`matplotlib.figure.Figure` (or draw on the axes that they are given); only
:func:`use_style` changes Matplotlib's defaults. Slices are shown upright, as a radiologist looks at them: front of the
patient on top, the patient's right on the left. The colours are those of Okabe and Ito, which people with
colour-blindness can tell apart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke

COLORS = {"lung": "#56B4E9", "coarse": "#CC79A7", "fine": "#009E73", "prediction": "#D55E00", "truth": "#F0E442"}
# For lines and bars, in this order: none of those above, which mean one thing each in the whole book.
CYCLE = ("#0072B2", "#E69F00", "#882255", "#999933", "#332288", "#888888", "#000000")
HEAT = "cividis"
# Centre and width of display windows, HU.
LUNG_WINDOW, TISSUE_WINDOW, BONE_WINDOW = (-600.0, 1500.0), (40.0, 400.0), (400.0, 1800.0)
# The same lung window on the scale of normalised crops, where 0 is lung air and 1 soft tissue.
NORMAL_RANGE = (-0.3, 1.3)


def use_style() -> None:
    """Sets Matplotlib's defaults to the book's look: sans serif, no frame on top and right, colour-blind-safe."""
    mpl.rcParams.update({
        "figure.dpi": 110, "savefig.dpi": 110, "figure.facecolor": "white", "axes.facecolor": "white",
        "font.size": 10, "axes.titlesize": 10, "axes.labelsize": 10, "legend.fontsize": 9, "legend.frameon": False,
        "axes.spines.top": False, "axes.spines.right": False, "axes.prop_cycle": plt.cycler(color=CYCLE),
        "axes.grid": False, "lines.linewidth": 1.8, "image.cmap": "gray", "figure.constrained_layout.use": True,
    })


def new_figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (2.6, 2.6), *,
               sharey: bool = False) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of axes, ``(rows, columns)``; ``size`` is the width and height of one panel in inches.

    It is closed for pyplot, so that a notebook shows it once, where it is the value of a cell.
    """
    figure, axes = plt.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False,
                                sharey=sharey, layout="constrained")
    plt.close(figure)
    return figure, axes


def window(image: np.ndarray, centre: float = LUNG_WINDOW[0], width: float = LUNG_WINDOW[1]) -> np.ndarray:
    """Display window: HU to grey levels in [0, 1]; black below ``centre - width / 2``, white above the other end."""
    return np.clip((image.astype(np.float32) - (centre - width / 2)) / width, 0, 1)


def draw_slice(axes: Axes, image: np.ndarray, spacing: tuple[float, float] | None = None, *, title: str = "",
               limits: tuple[float, float] | None = None, bar_mm: float = 50.0) -> None:
    """Draws one upright slice ``(H, W)``.

    HU are shown at the lung window, normalised values at ``NORMAL_RANGE``; values below -20 occur in HU only, which is
    how the two are told apart. ``limits`` are the lowest and highest value shown, instead. With ``spacing``,
    millimetres between rows and columns, comes a scale bar.
    """
    if limits is None:
        centre, width = LUNG_WINDOW
        limits = (centre - width / 2, centre + width / 2) if image.min() < -20 else NORMAL_RANGE
    aspect = spacing[0] / spacing[1] if spacing else 1.0
    axes.imshow(image, cmap="gray", vmin=limits[0], vmax=limits[1], aspect=aspect, interpolation="nearest")
    axes.set_title(title)
    axes.set_axis_off()
    if spacing:
        rows, columns = image.shape
        length = bar_mm / spacing[1]
        x, y = 0.04 * columns, 0.95 * rows
        axes.plot([x, x + length], [y, y], color="white", linewidth=3, solid_capstyle="butt")
        axes.text(x + length / 2, y - 0.02 * rows, f"{bar_mm:.0f} mm", color="white", ha="center", va="bottom",
                  fontsize=8)


# A dark rim keeps outlines visible on light tissue and on hot places of a map.
RIM: list[AbstractPathEffect] = [withStroke(linewidth=2.6, foreground="black", alpha=0.6)]


def overlay(axes: Axes, masks: Mapping[str, np.ndarray], *, fill: float = 0.0) -> None:
    """Draws outlines of masks over a slice: name -> ``(H, W)`` bool; names outside ``COLORS`` get those of the cycle.

    ``fill`` is the opacity of the area inside, 0 for outlines alone.
    """
    for number, (name, mask) in enumerate(masks.items()):
        color = COLORS.get(name, CYCLE[number % len(CYCLE)])
        if not mask.any():
            continue
        if fill:
            area = np.zeros((*mask.shape, 4))
            area[mask] = (*to_rgb(color), fill)
            axes.imshow(area, aspect=axes.get_aspect(), interpolation="nearest")
        axes.contour(mask.astype(float), levels=[0.5], colors=[color], linewidths=1.3).set_path_effects(RIM)


def draw_heat(axes: Axes, values: np.ndarray, lung: np.ndarray) -> Any:
    """Lays a map in [0, 1] over a slice, inside the lung only; returns what a colour bar needs.

    Low values are nearly transparent, so that the slice stays visible where the map has nothing to say.
    """
    opacity = np.where(lung, 0.2 + 0.6 * values, 0)
    axes.imshow(values, cmap=HEAT, vmin=0, vmax=1, alpha=opacity, aspect=axes.get_aspect(), interpolation="nearest")
    return ScalarMappable(Normalize(0, 1), HEAT)


def legend(figure: Figure, names: Sequence[str]) -> None:
    """One legend for the whole figure, below it, with the fixed colours of the named masks on dark ground."""
    lines = [Line2D([], [], color=COLORS.get(name, CYCLE[k % len(CYCLE)]), linewidth=2.5)
             for k, name in enumerate(names)]
    box = figure.legend(lines, names, loc="outside lower center", ncols=len(names), frameon=True, labelcolor="white")
    box.get_frame().set(facecolor="#333333", edgecolor="none", alpha=1)


def draw_answer(axes: Axes, shown: np.ndarray, lung: np.ndarray) -> Any:
    """Lays a map in [0, 1] over a slice, as :func:`draw_heat` does, or a bool mask as the prediction."""
    if shown.dtype == bool:
        overlay(axes, {"prediction": shown}, fill=0.3)
        return None
    return draw_heat(axes, shown, lung)


def panels(count: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with that many panels, row by row."""
    columns = min(columns, count)
    figure, axes = new_figure(-(-count // columns), columns, size)
    for panel in axes.flat[count:]:
        panel.set_visible(False)
    return figure, list(axes.flat[:count])


def show_slices(images: Sequence[np.ndarray], titles: Sequence[str] = (),
                masks: Sequence[Mapping[str, np.ndarray]] = (), *, spacing: Any = None, columns: int = 4,
                fill: float = 0.0, size: float = 2.5) -> Figure:
    """Slices ``(H, W)`` side by side, with outlines and a scale bar.

    Args:
        images: the slices.
        titles: of the first slices.
        masks: of the first slices, see :func:`overlay`.
        spacing: ``(row, column)`` millimetres for all, or a list with one such pair for each slice.
        columns: panels a row.
        fill: opacity of masks.
        size: width and height of a panel in inches.
    """
    figure, axes = panels(len(images), columns, (size, size + 0.2))
    each = spacing if isinstance(spacing, list) else [spacing] * len(images)
    for k, (panel, image) in enumerate(zip(axes, images, strict=True)):
        draw_slice(panel, image, each[k], title=titles[k] if k < len(titles) else "")
        if k < len(masks):
            overlay(panel, masks[k], fill=fill)
    names = list(dict.fromkeys(name for one in masks for name in one))
    if names:
        legend(figure, names)
    return figure


def show_stages(image: np.ndarray, lung: np.ndarray, stages: Mapping[str, np.ndarray], truth: np.ndarray, *,
                columns: int = 4) -> Figure:
    """What each stage makes of one slice: title -> ``(S, S)`` map in [0, 1] or bool mask, with the truth on all."""
    figure, (first, *axes) = panels(len(stages) + 1, columns, (2.5, 2.7))
    draw_slice(first, image, title="slice and truth")
    overlay(first, {"lung": lung, "truth": truth})
    heat = None
    for panel, (title, stage) in zip(axes, stages.items(), strict=True):
        draw_slice(panel, image, title=title)
        heat = draw_answer(panel, stage, lung) or heat
        overlay(panel, {"truth": truth})
    if heat is not None:
        figure.colorbar(heat, ax=[first, *axes], shrink=0.6, label="probability or map value")
    masks = any(stage.dtype == bool for stage in stages.values())
    legend(figure, ["lung", "truth", *(["prediction"] if masks else [])])
    return figure


def loss_curves(history: Sequence[Mapping[str, float]], title: str = "") -> Figure:
    """Losses of a training against its steps, from ``run.history("classifier1")`` or the like.

    An entry holds ``step``, the mean of each loss since the entry before, and in an ensemble ``member``, each of which
    has a line of its own.
    """
    figure, axes = new_figure(1, 1, (6.0, 3.0))
    panel = axes[0, 0]
    members = sorted({entry.get("member", 1) for entry in history})
    names = dict.fromkeys(name for entry in history for name in entry if name not in ("step", "member"))
    for k, name in enumerate(names):
        for member in members:
            own = [entry for entry in history if name in entry and entry.get("member", 1) == member]
            panel.plot([entry["step"] for entry in own], [entry[name] for entry in own], marker="o", markersize=4,
                       color=f"C{k}", label=name if member == members[0] else None)
    panel.set(xlabel="optimiser step", ylabel="mean loss", title=title, ylim=(0, None))
    if history:
        panel.legend()
    else:
        panel.text(0.5, 0.5, "no losses kept", transform=panel.transAxes, ha="center")
    return figure
