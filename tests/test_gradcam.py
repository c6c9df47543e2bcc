"""Grad-CAM and LayerCAM against their own definitions, their mixture, and the coarse labels made of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from bench.cam_library import activation_maps_library, grad_cam_library, layer_cam_library
from hypothesis import given
from hypothesis import strategies as st
from tiny import toy
from torch import nn
from torch.nn import functional as F

from covidseg.classifier import Classifier, ClassifierSettings, Ensemble
from covidseg.errors import SettingsError
from covidseg.gradcam import (
    CamSettings,
    activation_maps,
    class_activation_maps,
    coarse_labels,
    grad_cam,
    layer_cam,
    read_layers,
    scale_by_top,
)
from covidseg.preprocess import Crops, net_input

pytestmark = pytest.mark.nets

SETTINGS = CamSettings()
Method = Callable[..., np.ndarray]


@pytest.fixture
def net() -> Classifier:
    torch.manual_seed(1)
    net = Classifier(ClassifierSettings(width=4))
    for module in net.modules():  # larger than at the start, so that evidence differs from place to place
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture
def crops() -> Crops:
    data, _ = toy(6, size=80, seed=2)
    lungs = data.crops.lungs.copy()
    lungs[:, :, 60:] = False  # lopsided, so that a missing flip shows
    return replace(data.crops, lungs=lungs)


def inputs_of(crops: Crops) -> torch.Tensor:
    return net_input(torch.from_numpy(crops.images)[:, None], torch.from_numpy(crops.lungs)[:, None].float())


@pytest.mark.parametrize("settings", [
    SETTINGS, CamSettings(scales=(0.75, 1.25)), CamSettings(scales=(1.5,)), CamSettings(batch=4),
    CamSettings(layer_share=0.0), CamSettings(layer_share=0.3), CamSettings(layer_share=1.0)],
    ids=["plain", "scales", "larger", "batch", "grad", "mixture", "layer"])
@pytest.mark.parametrize(("fast", "library"), [
    (grad_cam, grad_cam_library), (layer_cam, layer_cam_library), (activation_maps, activation_maps_library)])
def test_equals_the_library(fast: Method, library: Method, settings: CamSettings, net: Classifier,
                            crops: Crops) -> None:
    maps = fast(net, crops, settings)
    np.testing.assert_allclose(maps, library(net, crops, settings), atol=1e-6)
    assert maps.std() > 0.05
    assert (maps.max((1, 2)) == 1).any()
    on = net.to(memory_format=torch.channels_last)  # as trained nets come
    np.testing.assert_allclose(fast(on, crops, settings), library(on, crops, settings), atol=1e-6)


def test_grad_cam_by_its_equations(net: Classifier, crops: Crops) -> None:
    """Equations 1 and 2 of Selvaraju et al. (ICCV 2017) with autograd, on the last block."""
    inputs = inputs_of(crops)
    layer = net.coarse(net.middle(net.fine(inputs))).detach().requires_grad_(True)     # A_k
    score = net.pool(net.evidence(layer), inputs[:, 1:2])                              # y, before the sigmoid
    slopes, = torch.autograd.grad(score.sum(), layer)
    alpha = slopes.mean((2, 3), keepdim=True)                                          # eq. 1
    expected = F.relu((alpha * layer.detach()).sum(1)).numpy()                         # eq. 2
    activation, gradient = read_layers(net, inputs, blocks=1)[0]
    found = np.maximum((gradient.mean((2, 3), keepdims=True) * activation).sum(1), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
    assert expected.std() > 0


@st.composite
def nets_and_crops(draw: st.DrawFn) -> tuple[Classifier, Crops, CamSettings]:
    """A net of random weights, tiny to huge, and crops of noise, constants and specks with any lung, none included."""
    seed, size = draw(st.integers(0, 10**6)), draw(st.sampled_from([40, 80]))
    torch.manual_seed(seed)
    net = Classifier(ClassifierSettings(width=4))
    gain = draw(st.sampled_from([1e-3, 1.0, 5.0]))
    for value in net.parameters():
        nn.init.normal_(value, std=gain)
    rng, count = np.random.default_rng(seed), draw(st.integers(1, 5))
    images = np.stack([rng.uniform(-0.3, 1.5, (size, size)) if rng.random() < 0.7 else np.full((size, size), 0.5)
                       for _ in range(count)]).astype(np.float32)
    lungs = rng.random((count, size, size)) < rng.choice([0.0, 0.001, 0.5, 1.0], (count, 1, 1))
    settings = CamSettings(batch=draw(st.integers(1, 6)), layer_share=draw(st.sampled_from([0.0, 0.2, 1.0])),
                           scales=draw(st.sampled_from([(1.0,), (0.75, 1.25)])), top=draw(st.floats(1, 100)))
    return net.eval(), Crops(images, lungs, np.tile([0, 0, size, size], (count, 1))), settings


@given(nets_and_crops())
def test_maps_of_any_net_and_crop_lie_in_0_to_1_and_within_the_lung(
        drawn: tuple[Classifier, Crops, CamSettings]) -> None:
    net, crops, settings = drawn
    for method in (grad_cam, layer_cam, activation_maps):
        maps = method(net, crops, settings)
        assert (maps.shape, maps.dtype) == (crops.lungs.shape, np.float32)
        assert ((maps >= 0) & (maps <= 1)).all(), "nor is there anything but numbers"
        assert (maps[~crops.lungs] == 0).all()


def test_works_on_frozen_weights_and_leaves_the_net_as_it_was(net: Classifier, crops: Crops) -> None:
    expected = grad_cam(net, crops)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    seen: list[bool] = []
    net.fine.register_forward_pre_hook(lambda module, given: seen.append(torch.is_grad_enabled()))
    with torch.no_grad():  # the caller's state does not matter
        layer_cam(net, crops)
    assert all(p.grad is None for p in net.parameters())
    np.testing.assert_allclose(grad_cam(net.requires_grad_(False), crops), expected, atol=1e-6)
    assert set(seen) == {False}, "the early layers keep no graph"
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.coarse._forward_hooks
    assert not net.training


def test_a_map_without_any_evidence_is_zero_and_an_unknown_method_is_refused(net: Classifier, crops: Crops) -> None:
    nn.init.zeros_(net.evidence.weight)
    for maps in class_activation_maps(net, inputs_of(crops), ["grad", "layer"]):
        assert (maps == 0).all()
    with pytest.raises(SettingsError, match="'score'"):
        class_activation_maps(net, inputs_of(crops), ["score"])


def test_scaling_by_hand() -> None:
    maps = np.zeros((3, 2, 5), np.float32)
    maps[0] = np.arange(10).reshape(2, 5)
    lungs = np.ones(maps.shape, bool)
    lungs[0, 0] = False     # 5..9 are inside: the median is 7
    lungs[2] = False
    scaled = scale_by_top(maps, lungs, 50.0)
    np.testing.assert_allclose(scaled[0, 1], [5 / 7, 6 / 7, 1, 1, 1], rtol=1e-6)
    np.testing.assert_allclose(scaled[0, 0], np.arange(5) / 7, rtol=1e-6)
    assert (scaled[1:] == 0).all(), "a map of zeros, and one without lung, stay zero"


def test_coarse_label_codes() -> None:
    settings = CamSettings(lesion=0.6, lung=0.2)
    maps = np.tile(np.array([0.0, 0.19, 0.2, 0.59, 0.6, 1.0], np.float32), (2, 1, 1))
    coarse = coarse_labels(maps, np.array([1, 0]), settings)
    assert coarse.dtype == np.uint8
    assert coarse[0, 0].tolist() == [0, 0, 255, 255, 1, 1]
    assert (coarse[1] == 0).all(), "a slice without a lesion is lung throughout"


def test_the_map_of_an_ensemble_is_the_mean_over_its_members(net: Classifier, crops: Crops) -> None:
    torch.manual_seed(7)
    alone, both = (Ensemble(ClassifierSettings(width=4, members=members)).eval() for members in (1, 2))
    for ensemble in (alone, both):
        ensemble.members[0].load_state_dict(net.state_dict())
    first, second = (activation_maps(member, crops, SETTINGS) for member in both.members)  # type: ignore[arg-type]
    np.testing.assert_allclose(activation_maps(both, crops, SETTINGS),
                               scale_by_top((first + second) / 2, crops.lungs, SETTINGS.top), atol=1e-6)
    np.testing.assert_array_equal(activation_maps(alone, crops, SETTINGS), first)


# --- one pass for all maps ----------------------------------------------------------------------------------------
