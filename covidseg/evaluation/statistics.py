"""How far a figure can be trusted: bootstrap intervals, paired comparison, lesion size and calibration.

Intervals and tests are computed from the confusion counts of slices (:func:`covidseg.evaluation.metrics.confusion`),
``(N, 4)``, or ``(R, N, 4)`` for ``R`` seeds of one method, measured on the same slices in the same order. All functions
raise ValueError for shapes that do not fit, slices that are not the same, and numbers out of range.

**What an interval or p-value here leaves out.** Two kinds of chance move a figure: which slices were measured, and
the seed of the training. Here only slices are drawn. The figure is averaged over the seeds that there are, and those
stay as they are; show the spread over seeds beside the interval. Nor is it known how other hospitals or readers differ.
Slices of one patient resemble each other: taken for independent, they make intervals too narrow and p-values too
small. Name their patients in ``groups``, ``(N,)``, and whole patients are drawn or ranked. Where nobody knows them, an
interval over slices is the best there is, and too narrow; a p-value would be worth nothing, and there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import wilcoxon

from covidseg.evaluation.metrics import NAMES, figures

FEWEST = 6  # with fewer, the smallest two-sided p-value of the signed rank test, 2 / 2^n, is above 0.05
FEWEST_IN_BIN = 10  # slices, for the mean of a bin to be shown
LEVEL = 0.95  # share of the draws inside an interval


def slice_dice(counts: np.ndarray) -> np.ndarray:
    """Dice of each slice, mean over seeds: ``(N,)`` in [0, 1]; 0 where nothing of a lesion was predicted.

    NaN without a lesion, as :func:`covidseg.evaluation.metrics.macro` counts it.
    """
    counts = _seeds(counts)
    dice = np.nan_to_num(figures(counts)[..., 0], nan=0.0).mean(axis=0)
    return np.where(_area(counts)[0] > 0, dice, np.nan)


def bootstrap_interval(counts: np.ndarray, figure: str = "dice", *, groups: np.ndarray | None = None,
                       draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Percentile bootstrap interval of a micro figure over slices (Efron & Tibshirani 1993, section 13.3).

    Each draw takes slices with replacement, as many as there are and the same ones in every seed. Draws in which the
    figure is undefined are left out. With few slices or groups (below about 20) the interval is too narrow.

    Args:
        counts: ``(N, 4)`` or ``(R, N, 4)``.
        figure: one of :data:`covidseg.evaluation.metrics.NAMES`.
        groups: ``(N,)`` patient or volume of each slice, drawn as a whole; None draws single slices.
        draws: how many; they take about 24 bytes x draws x N of memory.
        seed: of the draws, not of a training.

    Returns:
        Lower and upper end; NaN if the figure is undefined or there are fewer than two slices or groups.
    """
    counts = _seeds(counts)
    return bootstrap(lambda weights: _drawn_figure(counts, weights, figure)[None], counts.shape[1], groups,
                     draws=draws, seed=seed)[0]


def bootstrap(figures_of: Callable[[np.ndarray], np.ndarray], slices: int, groups: np.ndarray | None = None, *,
              draws: int = 2000, seed: int = 0) -> list[tuple[float, float]]:
    """Percentile bootstrap intervals of any figures of some slices; all else is as for :func:`bootstrap_interval`.

    Args:
        figures_of: takes how often each draw has each slice, ``(draws, slices)``, and gives ``K`` figures of each
            draw, ``(K, draws)``.
        slices: how many there are.
        groups: ``(slices,)`` patient or volume of each slice, drawn as a whole; None draws single slices.
        draws: how many.
        seed: of the draws.

    Returns:
        Lower and upper end of each figure; NaN if it is undefined or there are fewer than two slices or groups.
    """
    return [_ends(each) for each in figures_of(_multiplicities(slices, groups, draws, seed))]


def drawn_auc(scores: np.ndarray, labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """:func:`covidseg.evaluation.metrics.auc` of ``N`` slices that are there ``weights`` times.

    Scores and labels are ``(N,)``, weights ``(draws, N)``. Returns ``(draws,)``; NaN without one of the classes.
    """
    ill, healthy = labels == 1, labels == 0
    ahead = 0.5 + 0.5 * np.sign(scores[ill][:, None] - scores[healthy])         # 1 ahead, 0.5 alike, 0 behind
    pairs = weights[:, ill].sum(axis=1) * weights[:, healthy].sum(axis=1)
    return _ratio((weights[:, ill] @ ahead * weights[:, healthy]).sum(axis=1), pairs)


def drawn_share(those: np.ndarray, among: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share of some slices, ``(N,)`` bool, among others; weights and result are those of :func:`drawn_auc`."""
    return _ratio(weights @ (those & among), weights @ among)


@dataclass(frozen=True)
class Difference:
    """How far one system is ahead of another, in [-1, 1], mean over seeds: as measured, and the bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_difference(ours: np.ndarray, other: np.ndarray, figure: str = "dice", *,
                         groups: np.ndarray | None = None, draws: int = 2000, seed: int = 0) -> Difference:
    """Difference of two systems, paired: each draw takes the same slices for both, so that hard ones cancel out.

    The systems may differ in their number of seeds. All else is as for :func:`bootstrap_interval`.
    """
    ours, other = _same_slices(ours, other)
    weights = _multiplicities(ours.shape[1], groups, draws, seed)
    observed, drawn = (_drawn_figure(ours, w, figure) - _drawn_figure(other, w, figure)
                       for w in (np.ones((1, ours.shape[1])), weights))
    return Difference(float(observed[0]), *_ends(drawn))


def paired_test(ours: np.ndarray, other: np.ndarray, groups: np.ndarray) -> float:
    """Two-sided p-value of the signed rank test (Wilcoxon 1945) on the Dice of the slices with a lesion.

    One mean difference for each patient in ``groups`` ``(N,)`` is ranked: the test wants independent ones. Differences
    of 0 are left out, as in Wilcoxon's paper; p is 1 if all are. NaN with fewer than :data:`FEWEST` patients with a
    lesion, where p could not fall below 0.05 whatever the systems do.
    """
    ours, other = _same_slices(ours, other)
    difference = slice_dice(ours) - slice_dice(other)
    known, which = ~np.isnan(difference), _group_numbers(len(difference), groups)
    size = np.bincount(which[known])
    difference = np.bincount(which[known], difference[known])[size > 0] / size[size > 0]
    difference = difference.round(12)  # equal means over seeds may be 1e-17 apart, and would be ranked
    if len(difference) < FEWEST:
        return float("nan")
    return float(wilcoxon(difference).pvalue) if difference.any() else 1.0


def dice_by_size(counts: np.ndarray, edges: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Slices with a lesion and their macro Dice (mean over seeds) by the area of the lesion in the slice.

    ``edges`` are ``K - 1`` ascending areas in pixels: ``[100, 1000]`` makes three bins, below 100, 100 to 999, and from
    1000 on.

    Returns:
        Number of slices, ``(K,)`` int, and Dice, ``(K,)`` in [0, 1], NaN in a bin of fewer than
        :data:`FEWEST_IN_BIN` slices, whose mean is a matter of chance.
    """
    if not (np.diff(edges) > 0).all():
        raise ValueError(f"edges {list(edges)} do not ascend")
    dice = slice_dice(counts)
    known, which = ~np.isnan(dice), np.digitize(_area(_seeds(counts))[0], edges)
    count = np.bincount(which[known], minlength=len(edges) + 1)
    mean = _ratio(np.bincount(which[known], dice[known], minlength=len(edges) + 1), count)
    return count, np.where(count < FEWEST_IN_BIN, np.nan, mean)


def reliability_sums(probabilities: np.ndarray, truth: np.ndarray, bins: int = 10) -> np.ndarray:
    """What :func:`calibration` needs of some pixels; add up those of several slices with ``+``.

    Pass the pixels of a region, ``reliability_sums(p[lungs], mask[lungs])``: all the sure pixels around the body would
    make every net look calibrated.

    Args:
        probabilities: any shape, in [0, 1].
        truth: same shape, bool.
        bins: bin ``k`` holds ``k / bins <= p < (k + 1) / bins``; the last one includes 1.

    Returns:
        ``(bins, 3)`` float64: sum of probabilities, lesion pixels, pixels.
    """
    _check_map(probabilities, truth, bins, "bin")
    p = probabilities.ravel().astype(float)  # sums of many float32 lose digits
    which = np.minimum((p * bins).astype(int), bins - 1)
    return np.stack([np.bincount(which, w, minlength=bins) for w in (p, truth.ravel(), np.ones_like(p))], axis=1)


def calibration(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean probability and share of lesion pixels of each bin, ``(bins,)``, from :func:`reliability_sums` added up.

    NaN in an empty bin. Guo et al. (ICML 2017) ask how often the likelier class is right; here it is the lesion.
    """
    probability, lesion, count = sums.T
    return _ratio(probability, count), _ratio(lesion, count)


def level_counts(probabilities: np.ndarray, truth: np.ndarray, steps: int = 100) -> np.ndarray:
    """Confusion counts for every level at which an outline could be drawn; add up those of several slices with ``+``.

    Args:
        probabilities: any shape, in [0, 1].
        truth: same shape, bool.
        steps: levels are ``k / steps`` for ``k = 0, 1, ..., steps``; lesion from the level on.

    Returns:
        ``(steps + 1, 4)`` int64: hit, false, missed, rest.
    """
    _check_map(probabilities, truth, steps, "step")
    # The levels in the type of the map, as in ``map >= level``: 0.3 is not the same number in both.
    levels = np.linspace(0, 1, steps + 1).astype(probabilities.dtype)
    bins = np.searchsorted(levels, probabilities.ravel(), side="right") - 1
    hit, false = (np.bincount(bins[pixels], minlength=steps + 1)[::-1].cumsum()[::-1]
                  for pixels in (truth.ravel(), ~truth.ravel()))
    return np.stack([hit, false, hit[0] - hit, false[0] - false], axis=1).astype(np.int64)


def at_sensitivity(levels: np.ndarray, sensitivity: float) -> int:
    """Number of the highest level of :func:`level_counts` ``(L, 4)`` that marks at least that share of the lesions."""
    return int(np.flatnonzero(figures(levels)[:, 3] >= sensitivity)[-1])


# --- what the functions above share -----------------------------------------------------------------------------

def _check_map(probabilities: np.ndarray, truth: np.ndarray, parts: int, what: str) -> None:
    if probabilities.shape != truth.shape or truth.dtype != bool or parts < 1:
        raise ValueError(f"probabilities {probabilities.shape}, truth {truth.shape} {truth.dtype} and {parts} {what}s: "
                         f"wanted are equal shapes, a bool truth and at least one {what}")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities outside [0, 1] or NaN")


def _area(counts: np.ndarray) -> np.ndarray:
    """Lesion pixels of the truth."""
    return counts[..., 0] + counts[..., 2]


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    return np.divide(top, bottom, out=np.full(np.shape(top), np.nan), where=bottom > 0)


def _seeds(counts: np.ndarray) -> np.ndarray:
    """``(R, N, 4)``, checked to be the same slices in each seed by the sizes of their lesions and of themselves."""
    counts = counts[None] if counts.ndim == 2 else counts
    if counts.ndim != 3 or counts.shape[-1] != 4 or not len(counts):
        raise ValueError(f"counts {counts.shape} are neither (N, 4) nor (R, N, 4)")
    if any((size != size[0]).any() for size in (_area(counts), counts.sum(axis=-1))):
        raise ValueError("slices differ in size or lesion: they are not the same ones in the same order")
    return counts


def _same_slices(ours: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ours, other = _seeds(ours), _seeds(other)
    if ours.shape[1] != other.shape[1]:
        raise ValueError(f"ours has {ours.shape[1]} slices, other {other.shape[1]}")
    _seeds(np.concatenate([ours, other]))
    return ours, other


def _group_numbers(slices: int, groups: np.ndarray | None) -> np.ndarray:
    """Number of each slice's group, ``(N,)`` int; without groups each slice is its own."""
    if groups is None:
        return np.arange(slices)
    if np.shape(groups) != (slices,):
        raise ValueError(f"groups {np.shape(groups)} do not name a group for each of {slices} slices")
    return np.unique(groups, return_inverse=True)[1]


def _multiplicities(slices: int, groups: np.ndarray | None, draws: int, seed: int) -> np.ndarray:
    """How often each draw takes each slice, ``(draws, N)`` float64; NaN if there is nothing to choose from."""
    if draws < 1:
        raise ValueError(f"{draws} draws: wanted is at least one")
    which = _group_numbers(slices, groups)
    units = which.max(initial=-1) + 1
    if units < 2:  # every draw would be the same, and the interval a point
        return np.full((draws, slices), np.nan)
    return np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), draws)[:, which].astype(float)


def _drawn_figure(counts: np.ndarray, weights: np.ndarray, figure: str) -> np.ndarray:
    """Micro figure when slice n is there ``weights[d, n]`` times, mean over seeds, ``(draws,)``."""
    if figure not in NAMES:
        raise ValueError(f"figure {figure!r} is none of {', '.join(NAMES)}")
    return figures(weights @ counts)[..., NAMES.index(figure)].mean(axis=0)


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    drawn = drawn[~np.isnan(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high
