"""The slice classifier: pooling inside the lung, learning from slice labels, figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import quiet, same_weights, toy

from covidseg.classify import Classifier, ClassifierSettings, auc, slice_probabilities, train_classifier
from covidseg.prepare import Crops

SMALL = ClassifierSettings(width=4, steps=6, batch=4, temperature=4.0)
ENOUGH = ClassifierSettings(width=6, steps=30, batch=8, rate=3e-3, temperature=4.0, flip_weight=0.5, outside_weight=0.1)


@pytest.fixture
def net() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL)


def test_shapes(net: Classifier) -> None:
    inputs = torch.rand(3, 2, 80, 80)
    assert net.maps(inputs).shape == (3, 1, 10, 10)
    assert net(inputs).shape == (3, 1)


def half_lung() -> torch.Tensor:
    lungs = torch.zeros(2, 1, 80, 80)
    lungs[..., :40] = 1
    return lungs


def test_pooling_ignores_evidence_outside_the_lung(net: Classifier) -> None:
    evidence = torch.randn(2, 1, 10, 10)
    loud = evidence.clone()
    loud[..., 5:] += 50
    assert torch.equal(net.pool(evidence, half_lung()), net.pool(loud, half_lung()))
    loud[..., 2, 2] += 1
    assert (net.pool(loud, half_lung()) > net.pool(evidence, half_lung())).all()


def test_pooling_sends_no_gradient_outside_the_lung(net: Classifier) -> None:
    evidence = torch.randn(2, 1, 10, 10, requires_grad=True)
    net.pool(evidence, half_lung()).sum().backward()
    assert (evidence.grad[..., 5:] == 0).all()
    assert (evidence.grad[..., :5] > 0).all()


@pytest.mark.parametrize("columns", [8, 40, 80])
def test_even_evidence_pools_to_itself_whatever_the_size_of_the_lung(net: Classifier, columns: int) -> None:
    lungs = torch.zeros(1, 1, 80, 80)
    lungs[..., :columns] = 1
    assert net.pool(torch.full((1, 1, 10, 10), 1.7), lungs).item() == pytest.approx(1.7, abs=1e-4)


def test_a_small_lesion_counts(net: Classifier) -> None:
    evidence = torch.full((1, 1, 10, 10), -2.0)
    evidence[0, 0, 3, 3] = 6
    pooled = net.pool(evidence, torch.ones(1, 1, 80, 80)).item()
    mean, lone_share = evidence.mean().item(), 1 / 100
    assert pooled > 0 > mean, "one patch among a hundred decides, where the mean alone would not"
    assert pooled < evidence.max().item()
    evidence.requires_grad_(True)
    net.pool(evidence, torch.ones(1, 1, 80, 80)).backward()
    assert evidence.grad[0, 0, 3, 3] > 10 * lone_share


def test_a_slice_without_lung_stays_finite(net: Classifier) -> None:
    assert torch.isfinite(net(torch.zeros(1, 2, 80, 80))).all()


def test_learns_bright_disks_from_slice_labels() -> None:
    data, _ = toy(32)
    lines: list[str] = []
    net = train_classifier(data, ENOUGH, seed=1, log=lines.append)
    fresh, _ = toy(40, seed=9)
    untrained = auc(slice_probabilities(Classifier(SMALL).eval(), fresh.crops), fresh.labels)
    assert auc(slice_probabilities(net, fresh.crops), fresh.labels) > max(0.9, untrained)
    assert not net.training
    assert lines
    assert all(line.startswith("classifier step") for line in lines)


def test_shuffled_labels_teach_nothing() -> None:
    data, _ = toy(32)
    # Swap the labels of every other pair: half of the disks are called free of a lesion.
    wrong = np.where(np.arange(32) // 2 % 2 == 0, data.labels, 1 - data.labels)
    shuffled = type(data)(data.crops, wrong, data.patients, data.names)
    net = train_classifier(shuffled, ENOUGH, seed=1, log=quiet)
    fresh, _ = toy(40, seed=9)
    probabilities = slice_probabilities(net, fresh.crops)
    assert np.ptp(probabilities) < 0.5, "no confident verdict can be learned from chance"


def test_training_repeats_bit_for_bit_with_the_seed() -> None:
    data, _ = toy(12)
    first = train_classifier(data, SMALL, seed=3, log=quiet)
    assert same_weights(first, train_classifier(data, SMALL, seed=3, log=quiet))
    assert not same_weights(first, train_classifier(data, SMALL, seed=4, log=quiet))


def test_probabilities_do_not_depend_on_the_batch(net: Classifier) -> None:
    data, _ = toy(7)
    net.eval()
    whole = slice_probabilities(net, data.crops)
    assert whole.shape == (7,)
    assert ((whole > 0) & (whole < 1)).all()
    np.testing.assert_allclose(slice_probabilities(net, data.crops, batch=2), whole, atol=1e-6)


def test_no_slices_no_probabilities(net: Classifier) -> None:
    empty = Crops(np.zeros((0, 40, 40), np.float32), np.zeros((0, 40, 40), bool), np.zeros((0, 4), int))
    assert slice_probabilities(net, empty).shape == (0,)


@pytest.mark.parametrize(("probabilities", "expected"), [
    ([0.1, 0.2, 0.8, 0.9], 1.0), ([0.9, 0.8, 0.2, 0.1], 0.0), ([0.5, 0.5, 0.5, 0.5], 0.5),
    ([0.1, 0.6, 0.5, 0.9], 0.75)])
def test_auc_by_hand(probabilities: list[float], expected: float) -> None:
    assert auc(np.array(probabilities, np.float32), np.array([0, 0, 1, 1])) == pytest.approx(expected)
