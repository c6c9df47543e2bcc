"""Bags: the probability of a bag of patches, and the components of the coarse label as bags of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from covidseg.patches import (
    COMPONENTS,
    bag_probability,
    component_bags,
    flat_attention_pool,
    flat_bag_probability,
    gated_attention,
    segment_softmax,
    square_ids,
)

pytestmark = pytest.mark.nets

Bag = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def by_hand(scores: np.ndarray, attention: np.ndarray, inside: np.ndarray, pooling: str) -> float:
    """Half pooled scores (Ilse et al., eq. 8), half the fourth-power mean, over the members of one bag."""
    s, a = scores[inside].astype(float), attention[inside].astype(float)
    share = np.exp(a) / np.exp(a).sum() if pooling == "attention" else np.full(len(s), 1 / len(s))
    pooled = 1 / (1 + np.exp(-(share * s).sum()))
    powers = np.mean((1 / (1 + np.exp(-s))) ** 4) ** 0.25
    return 0.5 * pooled + 0.5 * powers


@pytest.fixture
def bag() -> Bag:
    source = torch.Generator().manual_seed(0)
    scores = 2 * torch.randn(3, 36, generator=source)
    return scores, torch.randn(3, 36, generator=source), torch.rand(3, 36, generator=source) < 0.5


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_bag_probability_equals_its_formula(bag: Bag, pooling: str) -> None:
    found = bag_probability(*bag, pooling)
    expected = [by_hand(*(part[k].numpy() for part in bag), pooling) for k in range(3)]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_only_attention_pooling_looks_at_the_attention(bag: Bag) -> None:
    scores, attention, members = bag
    assert torch.equal(bag_probability(scores, attention, members, "mean"),
                       bag_probability(scores, -attention, members, "mean"))
    assert not torch.allclose(bag_probability(scores, attention, members), bag_probability(scores, -attention, members))


@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_only_members_count(bag: Bag, pooling: str) -> None:
    scores, attention, members = bag
    loud_scores = torch.where(members, scores, torch.full_like(scores, 30.0))
    loud_attention = torch.where(members, attention, torch.full_like(scores, 30.0))
    torch.testing.assert_close(bag_probability(loud_scores, loud_attention, members, pooling),
                               bag_probability(*bag, pooling))
    scores.requires_grad_(True)
    bag_probability(scores, attention, members, pooling).sum().backward()
    assert (scores.grad[~members] == 0).all()
    assert (scores.grad[members] > 0).all()


def test_one_ill_patch_raises_the_bag_more_than_the_mean() -> None:
    scores = torch.full((1, 64), -5.0)
    before = bag_probability(scores, torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)).item()
    scores[0, 18] = 5.0
    after = bag_probability(scores, torch.zeros_like(scores), torch.ones_like(scores, dtype=torch.bool)).item()
    assert after - before > 5 * (scores.sigmoid().mean().item() - before)


def test_a_bag_without_members_stays_finite() -> None:
    scores = torch.zeros(1, 16)
    assert torch.isfinite(bag_probability(scores, scores, torch.zeros_like(scores, dtype=torch.bool))).all()


def ragged(order: bool) -> tuple[torch.Tensor, ...]:
    """Seven bags of 1 to 300 patches, padded and flat, in order or shuffled: scores, attention, members; flat, bag."""
    source = torch.Generator().manual_seed(3)
    sizes = torch.tensor([300, 1, 25, 7, 120, 2, 60])
    members = torch.zeros(7, 300, dtype=torch.bool)
    for row, size in zip(members, sizes.tolist(), strict=True):
        row[torch.randperm(300, generator=source)[:size]] = True
    scores, attention = 3 * torch.randn(2, 7, 300, generator=source)
    flat = members.flatten().nonzero()[:, 0]
    if not order:
        flat = flat[torch.randperm(len(flat), generator=source)]
    return scores, attention, members, flat, flat // 300


@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("pooling", ["attention", "mean"])
def test_flat_bags_equal_padded_ones_forward_and_backward(pooling: str, order: bool) -> None:
    scores, attention, members, flat, bag = ragged(order)
    leaves = [scores.requires_grad_(True), *([attention.requires_grad_(True)] if pooling == "attention" else [])]
    padded = bag_probability(scores, attention, members, pooling)
    found = flat_bag_probability(scores.flatten()[flat], attention.flatten()[flat], bag, 7, pooling)
    torch.testing.assert_close(found, padded, atol=1e-6, rtol=0)
    weigh = torch.linspace(-1, 2, 7)
    for one, other in zip(*(torch.autograd.grad((weigh * p).sum(), leaves) for p in (found, padded)), strict=True):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def plain_pool(h: torch.Tensor, logits: torch.Tensor, bag: torch.Tensor, bags: int) -> torch.Tensor:
    """A loop over bags."""
    return torch.stack([logits[bag == k].softmax(0) @ h[bag == k] for k in range(bags)])


def test_flat_attention_pools_each_bag_alone() -> None:
    source = torch.Generator().manual_seed(4)
    *_, bag = ragged(False)
    h = torch.randn(len(bag), 5, generator=source, requires_grad=True)
    torch.manual_seed(5)
    layers = nn.Linear(5, 3), nn.Linear(5, 3), nn.Linear(3, 1)
    logits = gated_attention(h, *layers)
    by_formula = torch.stack([layers[2](torch.tanh(layers[0](one)) * torch.sigmoid(layers[1](one)))[0] for one in h])
    torch.testing.assert_close(logits, by_formula)
    weights = [h, *(p for layer in layers for p in layer.parameters())]
    found, expected = flat_attention_pool(h, logits, bag, 7), plain_pool(h, logits, bag, 7)
    assert found.shape == (7, 5)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weigh = torch.randn(7, 5, generator=source)
    for one, other in zip(*(torch.autograd.grad((weigh * z).sum(), weights, retain_graph=True)
                            for z in (found, expected)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_segments_sum_to_one_however_large_their_logits() -> None:
    *_, bag = ragged(False)
    logits = torch.linspace(-1e4, 1e4, len(bag))
    weights = segment_softmax(logits, bag, 8)  # the last bag is empty
    assert torch.isfinite(weights).all()
    torch.testing.assert_close(torch.zeros(8).index_add(0, bag, weights), torch.tensor([1.0] * 7 + [0.0]))
    torch.testing.assert_close(segment_softmax(logits / 1e4 + 77, bag, 7), segment_softmax(logits / 1e4, bag, 7))
    assert torch.isfinite(flat_bag_probability(logits, logits, bag, 8)).all()
    assert (flat_attention_pool(logits[:, None], logits, bag, 8)[7] == 0).all()


def spots() -> tuple[np.ndarray, list[tuple[slice, slice]]]:
    """Activation of five separate boxes, listed from the largest to the smallest, in two equal slices."""
    boxes = [(slice(5, 20), slice(5, 25)), (slice(25, 40), slice(5, 20)), (slice(25, 40), slice(30, 40)),
             (slice(5, 15), slice(40, 50)), (slice(45, 50), slice(45, 50))]
    cam = np.zeros((2, 60, 60), np.float32)
    for box in boxes:
        cam[(slice(None), *box)] = 0.3
    return cam, boxes


def test_the_largest_components_are_bags_and_the_rest_is_none() -> None:
    cam, boxes = spots()
    ids = square_ids(np.ones(cam.shape, bool))
    bags = component_bags(cam, ids, np.array([1, 0]), 0.3)
    assert bags.shape == (2, ids.max() + 1)
    assert (bags[1] == 0).all(), "a slice without a lesion has no coarse lesions"
    for rank, box in enumerate(boxes[:COMPONENTS], start=1):
        inside = np.zeros((60, 60), bool)
        inside[box] = True
        # Two pixels of rim take in no further square of five.
        assert set(np.flatnonzero(bags[0] == rank)) == set(np.unique(ids[0][inside]))
    assert bags[0].max() == COMPONENTS, "the fifth has no bag"
    assert bags[0][0] == 0
    assert (bags[0] == 0).sum() > 10


def test_components_take_in_a_rim_and_start_at_the_threshold() -> None:
    cam, (box, *_) = spots()
    cam[:, 5:20, 21:25] = 0.0   # the last squares are now covered in one of five columns, the rim adds two
    ids = square_ids(np.ones(cam.shape, bool))
    covered = set(np.unique(ids[0][box]))
    assert set(np.flatnonzero(component_bags(cam, ids, np.array([1, 1]), 0.3)[0] == 1)) == covered
    assert not component_bags(cam, ids, np.array([1, 1]), 0.31).any()
