"""Chapter 6: the curriculum of the patch task, and the rounds in which the two tasks teach each other.

**Curriculum.** Every patch has a target and a difficulty, and is admitted to the training when its turn comes.
Self-paced learning (Kumar et al., NeurIPS 2010) admits the easiest examples first and lets in harder ones as the net
improves; Bengio et al. (ICML 2009) called such an order a curriculum. A patch is difficult here where its target is
undecided, or where the two tasks disagree about it.

**Mutual learning.** In each round the classifier's activation map is the prior of the patch task, and the patches' map
becomes guidance for the evidence of a new classifier, place by place; in lesion-free slices every place is known, and
so is every painted lesion. The weight of that guidance is ramped up from round to round, as between two peers on two
tasks in Zhang and Zhang (PRCV 2021). The later stages use the maps of the last round. How far the two maps agree can be
measured without a mask, but it does not say which round is the better one (chapter 6).

This module decides what is taught; :mod:`covidseg.patches` trains the phases, :mod:`covidseg.pipeline` runs the rounds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covidseg.classifier import Guidance
from covidseg.errors import SettingsError, one_of
from covidseg.preprocess import WeakSet

ORDERS = ("easy", "random", "reversed", "none")
SURE = (0.02, 0.98)  # probabilities beyond have the log odds of these: no single opinion decides alone
UNDECIDED, DISPUTED = 0.6, 0.4  # shares in the difficulty: target near one half, tasks far apart


@dataclass(frozen=True)
class CurriculumSettings:
    """Settings of the curriculum; one entry a phase where there are several.

    Attributes:
        order: ``easy`` first; ``random``, ``reversed`` (the hardest first) and ``none`` (all at once) to compare with.
        paces: Share of the patches of positive slices that each phase admits, per class.
        weights: Weight of the admitted patches' loss in each phase.
        trust: How much the target follows the activation map rather than the patch net, in each phase.
        prior: Patches above this value of the activation map are lesion candidates in the target.
        sharpness: Exponent that moves targets away from one half.
    """

    order: str = "easy"
    paces: tuple[float, ...] = (0.0, 0.2, 0.4, 0.6)
    weights: tuple[float, ...] = (0.0, 0.5, 0.75, 1.0)
    trust: tuple[float, ...] = (1.0, 0.7, 0.5, 0.4)
    prior: float = 0.3
    sharpness: float = 1.5

    def __post_init__(self) -> None:
        one_of(self.order, ORDERS, "curriculum order")
        if not len(self.paces) == len(self.weights) == len(self.trust):
            raise SettingsError("paces, weights and trust of the curriculum differ in length",
                                remedy="Give one number a phase for each of them")


@dataclass(frozen=True)
class Phase:
    """One phase of the curriculum, arrays of ``(N, P + 1)`` patches.

    Attributes:
        pace: Share of the patches of positive slices admitted, per class.
        target: Probability of a lesion that the phase teaches.
        difficulty: What the order is made by; small is easy.
        admitted: The patches that are taught, bool.
    """

    pace: float
    target: np.ndarray
    difficulty: np.ndarray
    admitted: np.ndarray


def admit_easiest(difficulty: Tensor, candidates: Tensor, pace: float) -> Tensor:
    """The easiest share ``pace`` of the candidate patches.

    Args:
        difficulty: any shape, small is easy.
        candidates: bool, same shape.
        pace: share in [0, 1].

    Returns:
        bool, same shape: candidates whose difficulty lies at or below the ``pace`` quantile.
    """
    if pace <= 0 or not bool(candidates.any()):
        return torch.zeros_like(candidates)
    scores = difficulty[candidates]
    k = max(1, round(pace * len(scores)))
    limit = scores.kthvalue(k).values
    return candidates & (difficulty <= limit)


def plan_phase(prior: np.ndarray, opinion: np.ndarray, candidates: np.ndarray, settings: CurriculumSettings,
               phase: int, *, seed: int = 0) -> Phase:
    """Targets, difficulty and admitted patches of one phase.

    Args:
        prior: ``(N, P + 1)`` activation map on the patches, in [0, 1].
        opinion: ``(N, P + 1)`` probability of the averaged patch net.
        candidates: ``(N, P + 1)`` bool, the patches of positive slices.
        settings: paces, trust and order.
        phase: index of the phase.
        seed: of the random order.
    """
    trust = settings.trust[phase]
    # The map's own threshold becomes one half before the two opinions are averaged as log odds.
    middle = float(np.log(settings.prior / (1 - settings.prior)))
    prior_odds = torch.from_numpy(prior).clamp(*SURE).logit() - middle
    own_odds = torch.from_numpy(opinion).clamp(*SURE).logit()
    target = (settings.sharpness * (trust * prior_odds + (1 - trust) * own_odds)).sigmoid()
    disagreement = (prior_odds.sigmoid() - own_odds.sigmoid()).abs()
    # In the first phase the net has no opinion yet.
    difficulty = UNDECIDED * (1 - (2 * target - 1).abs()) + DISPUTED * disagreement * (phase > 0)
    pace = settings.paces[phase]
    if settings.order == "random":
        difficulty = torch.rand(difficulty.shape, generator=torch.Generator().manual_seed(seed + phase))
    elif settings.order == "reversed":
        difficulty = 1 - difficulty
    elif settings.order == "none":
        pace = 1.0
    those = torch.from_numpy(candidates)
    admitted = (admit_easiest(difficulty, those & (target >= 0.5), pace)
                | admit_easiest(difficulty, those & (target < 0.5), pace))
    return Phase(pace, target.numpy(), difficulty.numpy(), admitted.numpy())


# --- mutual teaching ------------------------------------------------------------------------------------------------

EXCHANGES = ("both", "to_patches", "none")


@dataclass(frozen=True)
class MutualSettings:
    """Settings of the exchange.

    Attributes:
        exchange: ``both`` ways; ``to_patches``: one round, the map guides the patches; ``none``: the patches learn
            from slice labels alone.
        rounds: How many, if the exchange goes both ways.
        again: Share of its steps that the patch net trains in every later round, going on from the one before. The
            classifier starts afresh: it should not stay with what it read from slice labels alone.
        weights: Weight of the guidance for the classifier in rounds 2, 3, ...; the last one stays.
        painted: Probability that lesions are painted on a lesion-free slice for the classifier in later rounds, which
            then is one with a lesion: the same place in the chest with another label. 0 does without.
    """

    exchange: str = "both"
    rounds: int = 2
    again: float = 0.5
    weights: tuple[float, ...] = (2.0, 3.0)
    painted: float = 0.5

    def __post_init__(self) -> None:
        one_of(self.exchange, EXCHANGES, "exchange")
        if self.rounds < 1:
            raise SettingsError("mutual learning needs at least one round", remedy="Set rounds to 1 or more")

    @property
    def last(self) -> int:
        """Number, from 1, of the last round, whose nets and maps the later stages use."""
        return self.rounds if self.exchange == "both" else 1


def make_guidance(data: WeakSet, patches: np.ndarray, settings: MutualSettings, number: int) -> Guidance:
    """What the patches teach the classifier in a round: their opinion of every place, and none in lesion-free slices.

    Args:
        data: slices and their labels.
        patches: ``(N, S, S)`` probabilities of the patches of the round before.
        settings: how much they count.
        number: of the round, 2 or later.
    """
    target = np.where((data.labels == 1)[:, None, None], patches, 0).astype(np.float32)
    return Guidance(target, settings.weights[min(number - 2, len(settings.weights) - 1)])


def agreement(data: WeakSet, cam: np.ndarray, patches: np.ndarray) -> float:
    """How far the two maps ``(N, S, S)`` agree: soft Dice over the positive slices, in [0, 1].

    The map has no natural unit, so it is scaled to the mean of the patches' map first.
    """
    positive = data.labels == 1
    a, b = cam[positive].astype(float), patches[positive].astype(float)
    a = np.clip(a * (b.sum() / max(a.sum(), 1e-9)), 0, 1)
    return float(2 * np.minimum(a, b).sum() / max(a.sum() + b.sum(), 1e-9))
