"""The slice classifier: pooling inside the lung, learning from slice labels, figures."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import generator, quiet, same_weights, toy
from torch import nn
from torch.nn import functional as F

from covidseg import augment, classifier
from covidseg.augment import NO_PAINT, PaintSettings
from covidseg.classifier import (
    Classifier,
    ClassifierSettings,
    Guidance,
    slice_probabilities,
    train_classifier,
    train_ensemble,
)
from covidseg.errors import SettingsError
from covidseg.evaluation.metrics import auc
from covidseg.preprocess import net_input

pytestmark = pytest.mark.nets

SMALL = ClassifierSettings(width=4, steps=6, batch=4, temperature=4.0)
ENOUGH = ClassifierSettings(width=6, steps=30, batch=8, rate=3e-3, temperature=4.0, flip_weight=0.5, outside_weight=0.1)


@pytest.fixture
def net() -> Classifier:
    torch.manual_seed(0)
    return Classifier(SMALL)


@pytest.mark.parametrize(("parts", "field"), [
    (("fine",), 7), (("fine", "middle"), 19), (("fine", "middle", "coarse", "evidence"), 43)])
def test_a_cell_sees_a_window_of_the_slice_and_no_more(net: Classifier, parts: tuple[str, ...], field: int) -> None:
    """What lies beyond the window may change as it likes; its outermost pixels still count."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            module.weight.data.abs_()  # so that no ReLU hides an effect
    net.eval().double()
    see = nn.Sequential(*(getattr(net, part) for part in parts))
    inputs = torch.rand(1, 2, 160, 160, dtype=torch.float64)  # in double, since the corners have little weight
    (row, column), reach = (80, 72), field // 2

    @torch.no_grad()
    def change(where: Any) -> float:
        other = inputs.clone()
        other[(..., *where)] += 1
        before, after = (see(given) for given in (inputs, other))
        cell = 0, slice(None), row * before.shape[-1] // 160, column * before.shape[-1] // 160
        return ((after - before)[cell].abs() / before[cell].abs()).max().item()

    rows, columns = np.mgrid[:160, :160]
    assert change((torch.from_numpy(np.maximum(abs(rows - row), abs(columns - column)) > reach),)) == 0
    for down, right in itertools.product((-reach, reach), repeat=2):
        assert change((row + down, column + right)) > 1e-9
    assert change((row, column)) > 1e-3


@pytest.mark.parametrize("columns", [8, 40, 80])
def test_pooling_equals_its_formula_over_the_lung(net: Classifier, columns: int) -> None:
    evidence, lungs = torch.randn(1, 1, 10, 10, generator=generator()), torch.zeros(1, 1, 80, 80)
    evidence[..., columns // 8:] = 50  # speaks up outside the lung
    evidence.requires_grad_(True)
    lungs[..., :columns] = 1
    pooled = net.pool(evidence, lungs)
    inside, temperature = evidence.detach().numpy()[..., :columns // 8], SMALL.temperature
    # Half mean, half log-sum-exp, over the evidence of cells with lung.
    expected = 0.5 * inside.mean() + 0.5 * np.log(np.exp(temperature * inside).mean()) / temperature
    assert pooled.item() == pytest.approx(expected, abs=1e-4)
    slopes, = torch.autograd.grad(pooled, evidence)
    assert (slopes[..., columns // 8:] == 0).all()
    assert (slopes[..., :columns // 8] > 0).all()
    assert net(torch.rand(3, 2, 80, 80)).shape == (3, 1)
    assert torch.isfinite(net(torch.zeros(1, 2, 80, 80))).all(), "a slice without lung"


def test_a_small_lesion_counts(net: Classifier) -> None:
    evidence = torch.full((1, 1, 10, 10), -2.0)
    evidence[0, 0, 3, 3] = 6
    evidence.requires_grad_(True)
    pooled = net.pool(evidence, torch.ones(1, 1, 80, 80))
    assert pooled.item() > 0 > evidence.mean(), "one patch among a hundred decides, where the mean alone would not"
    pooled.backward()
    assert evidence.grad[0, 0, 3, 3] > 10 / 100


@pytest.fixture(scope="module")
def plain() -> Classifier:
    """Six steps, without guidance."""
    return train_classifier(toy(12)[0], SMALL, seed=3, log=quiet)


def test_learns_bright_disks_from_slice_labels_and_nothing_from_shuffled_ones() -> None:
    data, _ = toy(32)
    fresh, _ = toy(40, seed=9)
    lines: list[str] = []
    net = train_classifier(data, ENOUGH, seed=1, log=lines.append)
    untrained = auc(slice_probabilities(Classifier(SMALL).eval(), fresh.crops), fresh.labels)
    assert auc(slice_probabilities(net, fresh.crops), fresh.labels) > max(0.9, untrained)
    assert not net.training
    assert lines
    assert all(line.startswith("classifier step") for line in lines)
    # The labels of every other pair are swapped: half of the disks are called free of a lesion.
    shuffled = replace(data, labels=np.where(np.arange(32) // 2 % 2 == 0, data.labels, 1 - data.labels))
    chance = slice_probabilities(train_classifier(shuffled, ENOUGH, seed=1, log=quiet), fresh.crops)
    assert np.ptp(chance) < 0.5, "no confident verdict can be learned from chance"


def test_vessels_are_painted_on_lesion_free_slices(plain: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    data, painted, paint = toy(12)[0], list[np.ndarray](), augment.paint_vessels

    def spy(image: np.ndarray, *rest: Any) -> np.ndarray:
        painted.append(image)
        return paint(image, *rest)
    monkeypatch.setattr(augment, "paint_vessels", spy)
    assert not same_weights(plain, train_classifier(data, replace(SMALL, paint=NO_PAINT), seed=3, log=quiet))
    assert not painted
    assert same_weights(plain, train_classifier(data, SMALL, seed=3, log=quiet))
    assert painted
    free = data.crops.images[data.labels == 0]
    assert all((free == image).all((1, 2)).any() for image in painted)


def test_a_slice_with_a_painted_lesion_counts_as_one_with_a_lesion() -> None:
    """Painted in every lesion-free slice, lesions leave no slice to be taught as free of them."""
    data, _ = toy(12)
    always = replace(SMALL, steps=30, rate=1e-2, paint=replace(PaintSettings(), share=1.0, radius=(0.15, 0.19)))
    free = data.crops.take(np.flatnonzero(data.labels == 0))
    painted, never = (slice_probabilities(train_classifier(data, settings, seed=3, log=quiet), free).mean()
                      for settings in (always, replace(always, paint=NO_PAINT)))
    assert painted > never + 0.2


def test_pictures_of_other_scanners_come_with_guidance(plain: Classifier, monkeypatch: pytest.MonkeyPatch) -> None:
    data, seen = toy(12)[0], list[int]()
    monkeypatch.setattr(classifier, "rescan", lambda maps, generator: (seen.append(len(maps)), maps)[1])
    assert same_weights(plain, train_classifier(data, SMALL, seed=3, log=quiet))
    assert not seen
    train_classifier(data, SMALL, guidance=Guidance(np.zeros_like(data.crops.images), 1.0), seed=3, log=quiet)
    assert seen


def evidence_of(guidance: Guidance) -> tuple[float, float, float]:
    """What a training with guidance leads to: mean evidence of fresh slices in the disks, in the lung around them and
    in the lung without."""
    lines: list[str] = []
    net = train_classifier(toy(32, 80, seed=1)[0], ENOUGH, guidance=guidance, seed=1, log=lines.append)
    assert all("guidance" in line for line in lines)
    fresh, disks = toy(24, 80, seed=9)
    lungs = torch.from_numpy(fresh.crops.lungs)[:, None].float()
    with torch.no_grad():
        maps = net.maps(net_input(torch.from_numpy(fresh.crops.images)[:, None], lungs)).sigmoid()
    large = F.interpolate(maps, size=(80, 80), mode="nearest")[:, 0].numpy()
    ill = (fresh.labels == 1)[:, None, None]
    return (float(large[disks].mean()), float(large[fresh.crops.lungs & ill & ~disks].mean()),
            float(large[fresh.crops.lungs & ~ill].mean()))


def test_a_lesson_raises_evidence_where_it_says_lesion_and_lowers_it_where_it_says_lung() -> None:
    data, disks = toy(32, 80, seed=1)
    lungs = data.crops.lungs
    ill = lungs & (data.labels == 1)[:, None, None]
    taught = evidence_of(Guidance(disks.astype(np.float32), 2.0))
    lung, lesion = (evidence_of(Guidance(np.full(lungs.shape, value, np.float32), 2.0)) for value in (0.0, 1.0))
    wrong = evidence_of(Guidance((ill & ~disks).astype(np.float32), 2.0))
    # Disks stand out without a lesson as well; what it adds shows beside a lesson that calls all of the lung healthy.
    assert taught[0] > lung[0] + 0.3
    assert taught[1] < lung[1] + 0.1
    assert taught[0] - taught[1] > 0.3, "the lesson moves along when the picture is flipped"
    assert wrong[0] - wrong[1] < taught[0] - taught[1] - 0.2
    assert lung[2] < lesion[2] - 0.1


def test_only_the_lung_and_a_weight_above_0_make_a_difference() -> None:
    data, disks = toy(12)
    teacher = disks.astype(np.float32)
    beyond = ~data.crops.lungs & (data.labels == 1)[:, None, None]

    def trained(target: np.ndarray, weight: float) -> Classifier:
        return train_classifier(data, SMALL, guidance=Guidance(target.astype(np.float32), weight), seed=3, log=quiet)

    taught, nothing = trained(teacher, 1.0), trained(teacher, 0.0)
    assert not same_weights(nothing, taught)
    assert same_weights(taught, trained(np.where(beyond, 0.7, teacher), 1.0))
    assert same_weights(nothing, trained(0.5 * teacher, 0.0))


def test_probabilities_do_not_depend_on_the_batch(net: Classifier) -> None:
    data, _ = toy(7)
    net.eval()
    whole = slice_probabilities(net, data.crops)
    assert whole.shape == (7,)
    assert ((whole > 0) & (whole < 1)).all()
    np.testing.assert_allclose(slice_probabilities(net, data.crops, batch=2), whole, atol=1e-6)
    assert slice_probabilities(net, data.crops.take(np.arange(0))).shape == (0,)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least one"):
        ClassifierSettings(members=0)


def test_an_ensemble_is_its_members_with_seeds_of_their_own_and_answers_with_their_mean() -> None:
    data, disks = toy(8)
    lines: list[str] = []
    ensemble = train_ensemble(data, replace(SMALL, members=2), seed=3, log=lines.append)
    first, second = ensemble.members
    assert same_weights(first, train_classifier(data, SMALL, seed=3, log=quiet))
    assert not same_weights(first, second)
    assert not ensemble.training
    assert {line.split(" step")[0] for line in lines} == {"classifier (1 of 2)", "classifier (2 of 2)"}
    images, lungs = (torch.from_numpy(part)[:, None].float() for part in (data.crops.images, data.crops.lungs))
    inputs = net_input(images, lungs)
    with torch.no_grad():
        torch.testing.assert_close(ensemble(inputs), (first(inputs) + second(inputs)) / 2)
    # In a later round each gets the same lesson.
    guidance = Guidance(disks.astype(np.float32), 1.0)
    later = train_ensemble(data, replace(SMALL, members=2), guidance=guidance, seed=4, log=quiet)
    for new, seed in zip(later.members, (4, 1004), strict=True):
        assert same_weights(new, train_classifier(data, SMALL, guidance=guidance, seed=seed, log=quiet))
    one, said = train_ensemble(data, SMALL, seed=3, log=lines.append), lines[-1]
    assert same_weights(one.members[0], first)
    np.testing.assert_allclose(*(slice_probabilities(net, data.crops) for net in (one, first)), atol=1e-6)
    assert said.startswith("classifier step"), "one member needs no number"
