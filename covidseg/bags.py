"""Bags of patches: how one label for many patches teaches each of them.

A slice is a bag; each component of its coarse label is a smaller one. A bag's probability comes from the scores of its
patches, pooled by attention (Ilse et al., ICML 2018, eq. 8) so that the patches that matter count most.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy import ndimage as ndi
from torch import Tensor

from covidseg.patches import patch_values

COMPONENTS = 4  # bags of a slice besides the slice itself


def bag_probability(scores: Tensor, attention: Tensor, members: Tensor, pooling: str = "attention") -> Tensor:
    """Probability of a bag from its patches: half pooled scores, half a power mean that follows the worst patch.

    Args:
        scores: ``(B, P)`` patch logits.
        attention: ``(B, P)`` attention logits.
        members: ``(B, P)`` bool, the patches of the bag.
        pooling: ``attention`` weighs the scores, ``mean`` does not.

    Returns:
        ``(B,)`` in (0, 1).
    """
    weights = (attention if pooling == "attention" else torch.zeros_like(attention))
    weights = weights.masked_fill(~members, -1e4).softmax(dim=1)
    pooled = (weights * scores).sum(dim=1).sigmoid()
    powers = (scores.sigmoid() ** 4 * members).sum(dim=1) / members.sum(dim=1).clamp(min=1)
    return 0.5 * pooled + 0.5 * (powers + 1e-8) ** 0.25


def component_bags(cam: np.ndarray, ids: np.ndarray, labels: np.ndarray, threshold: float) -> np.ndarray:
    """Which patches belong to which coarse component: ``(N, P + 1)`` int, 0 none, 1.. the largest components.

    Components are dilated a little first: a bag should hold the lesion's rim as well.

    Args:
        cam: ``(N, S, S)`` activation maps.
        ids: ``(N, S, S)`` patch numbers.
        labels: ``(N,)`` slice labels; a slice without a lesion has no components.
        threshold: activation from which on a pixel belongs to a component.
    """
    number = np.zeros((len(ids), int(ids.max()) + 1), np.int64)
    for k in np.flatnonzero(labels == 1):
        parts, _ = ndi.label(ndi.binary_dilation(cam[k] >= threshold, iterations=2))
        sizes = np.bincount(parts.ravel())
        sizes[0] = 0
        for rank, part in enumerate(np.argsort(sizes)[::-1][:COMPONENTS], start=1):
            if sizes[part] > 0:
                share = patch_values((parts == part)[None], ids[k:k + 1], number.shape[1] - 1)[0]
                number[k][(share > 0.5) & (np.arange(len(share)) > 0)] = rank
    return number


def component_loss(scores: Tensor, attention: Tensor, bags: Tensor, pooling: str) -> Tensor:
    """Cross entropy of all coarse components against "holds a lesion", mean over the components of the batch.

    Args:
        scores, attention: ``(B, P + 1)`` logits.
        bags: ``(B, P + 1)`` int from :func:`component_bags`.
        pooling: as of :func:`bag_probability`.
    """
    losses = []
    for rank in range(1, COMPONENTS + 1):
        members = bags == rank
        there = members.any(dim=1)
        if bool(there.any()):
            p = bag_probability(scores[there], attention[there], members[there], pooling)
            losses.append(-p.clamp(min=1e-6).log())
    return torch.cat(losses).mean() if losses else scores.sum() * 0
