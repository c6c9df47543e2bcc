"""The curriculum of the patch task: a target and a difficulty for every patch, and who is admitted when.

Self-paced learning (Kumar et al., NeurIPS 2010) admits the easiest examples first and lets in harder ones as the net
improves; Bengio et al. (ICML 2009) called such an order a curriculum. A patch is difficult here where its target is
undecided, or where the two tasks disagree about it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from covidseg.errors import SettingsError, one_of

ORDERS = ("easy", "random", "reversed", "none")


@dataclass(frozen=True)
class CurriculumSettings:
    """Settings of the curriculum; one entry a phase where there are several.

    Attributes:
        order: ``easy`` first; ``random``, ``reversed`` (the hardest first) and ``none`` (all at once) to compare with.
        paces: share of the patches of positive slices that each phase admits, per class.
        weights: weight of the admitted patches' loss.
        trust: how much the target follows the activation map rather than the patch net.
        prior: patches above this value of the activation map are lesion candidates in the target.
        sharpness: exponent that moves targets away from one half.
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
        pace: share of the patches of positive slices admitted, per class.
        target: probability of a lesion that the phase teaches.
        difficulty: what the order is made by; small is easy.
        admitted: bool, the patches that are taught.
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
    prior_odds = torch.from_numpy(prior).clamp(0.02, 0.98).logit() - middle
    own_odds = torch.from_numpy(opinion).clamp(0.02, 0.98).logit()
    target = (settings.sharpness * (trust * prior_odds + (1 - trust) * own_odds)).sigmoid()
    disagreement = (prior_odds.sigmoid() - own_odds.sigmoid()).abs()
    difficulty = 0.6 * (1 - (2 * target - 1).abs()) + 0.4 * disagreement * (phase > 0)
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
