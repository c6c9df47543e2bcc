"""Dual-task mutual learning: the classifier and the patch net teach each other in rounds.

In each round the classifier's activation map is the prior of the patch task (A to B), and the patches' map becomes a
lesson for the classifier's evidence where the patches are sure and the two do not flatly contradict each other (B to
A). The weight of that lesson is ramped up from round to round, as between two peers on two tasks in Zhang and Zhang
(PRCV 2021). The rounds end when the two maps agree no better than before, and the round in which they agreed best is
the one that the later stages use. No mask has a say in either.

This module decides what is taught; :mod:`covidseg.pipeline` runs the rounds and stores each of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from covidseg.errors import SettingsError, one_of
from covidseg.prepare import WeakSet

EXCHANGES = ("both", "to_patches", "none")


@dataclass(frozen=True)
class MutualSettings:
    """Settings of the exchange.

    Attributes:
        exchange: ``both`` ways; ``to_patches`` only: one round, the map guides the patches; ``none``: the patches
            learn from slice labels alone.
        rounds: most rounds.
        again: share of a task's steps that it trains in every later round, going on from the one before.
        weights: weight of the lesson for the classifier in rounds 2, 3, ...; the last one stays.
        gentle: learning rate of the classifier in later rounds, as a share of the first; it should not lose its way.
        sure: the patches teach "lung" below the first probability and "lesion" above the second.
        gap: no lesson where the two maps are further apart than this.
        stop: rounds end when the agreement grows by less.
    """

    exchange: str = "both"
    rounds: int = 2
    again: float = 0.5
    weights: tuple[float, ...] = (2.0, 3.0)
    gentle: float = 0.3
    sure: tuple[float, float] = (0.1, 0.8)
    gap: float = 0.5
    stop: float = 0.01

    def __post_init__(self) -> None:
        one_of(self.exchange, EXCHANGES, "exchange")
        if self.rounds < 1:
            raise SettingsError("mutual learning needs at least one round", remedy="Set rounds to 1 or more")


@dataclass(frozen=True)
class Lesson:
    """What the patches teach the classifier.

    Attributes:
        teacher: ``(N, S, S)`` float32, probability of a lesion.
        taught: ``(N, S, S)`` bool, the pixels of the lesson.
        weight: of the lesson's loss.
    """

    teacher: np.ndarray
    taught: np.ndarray
    weight: float


@dataclass(frozen=True)
class Round:
    """What one round achieved.

    Attributes:
        agreement: see :func:`agreement`.
        gain: change of the agreement since the round before; NaN in the first.
        taught: share of the lung of positive slices on which the classifier got a lesson in this round.
    """

    agreement: float
    gain: float
    taught: float


def make_lesson(data: WeakSet, cam: np.ndarray, patches: np.ndarray, settings: MutualSettings, number: int) -> Lesson:
    """The lesson for the classifier in round ``number`` (2 or later), from the maps ``(N, S, S)`` of the one before."""
    low, high = settings.sure
    decided = (patches < low) | (patches > high)
    taught = data.crops.lungs & decided & (np.abs(patches - cam) < settings.gap)
    taught[data.labels == 0] = data.crops.lungs[data.labels == 0]  # known without any net
    teacher = np.where((data.labels == 1)[:, None, None], patches, 0).astype(np.float32)
    return Lesson(teacher, taught, settings.weights[min(number - 2, len(settings.weights) - 1)])


def agreement(data: WeakSet, cam: np.ndarray, patches: np.ndarray) -> float:
    """How far the two maps ``(N, S, S)`` agree: soft Dice over the positive slices, in [0, 1].

    The map has no natural unit, so it is scaled to the mean of the patches' map first.
    """
    ill = data.labels == 1
    a, b = cam[ill].astype(float), patches[ill].astype(float)
    a = np.clip(a * (b.sum() / max(a.sum(), 1e-9)), 0, 1)
    return float(2 * np.minimum(a, b).sum() / max(a.sum() + b.sum(), 1e-9))


def settled(rounds: list[Round], settings: MutualSettings) -> bool:
    """Whether the rounds are over."""
    if len(rounds) >= settings.rounds or settings.exchange != "both":
        return True
    return len(rounds) > 1 and rounds[-1].gain < settings.stop


def best_round(rounds: list[Round]) -> int:
    """Number, from 1, of the round in which the two maps agreed best; the earlier one if two agreed alike."""
    return 1 + max(range(len(rounds)), key=lambda k: rounds[k].agreement)
