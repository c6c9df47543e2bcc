"""Maps of a net that is cut at its last layers, against the library that runs it whole, on a net of another kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from pytorch_grad_cam import GradCAM, LayerCAM
from torch import Tensor, nn
from torchvision.models import resnet18

from covidseg.errors import SettingsError
from covidseg.gradcam import Cut, class_activation_maps, read_layers

pytestmark = pytest.mark.nets

CLASS = 3


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return resnet18().eval()


def pictures(count: int) -> Tensor:
    return torch.randn(count, 3, 96, 64, generator=torch.Generator().manual_seed(1))


def cut_of(net: nn.Module, blocks: int) -> Cut:
    """A ResNet cut behind all but ``blocks`` of its blocks; its score is the logit of one class."""
    parts = [net.layer1, net.layer2, net.layer3, net.layer4]
    stem = nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool, *parts[:len(parts) - blocks])

    def score(last: Tensor, inputs: Tensor) -> Tensor:
        return net.fc(net.avgpool(last).flatten(1))[:, CLASS]

    return Cut(stem, parts[len(parts) - blocks:], score)


def by_library(method: Callable, net: nn.Module, layers: list[nn.Module], inputs: Tensor) -> np.ndarray:
    with method(model=net, target_layers=layers) as cam:
        return cam(input_tensor=inputs, targets=[lambda output: output[CLASS]] * len(inputs))


@pytest.mark.parametrize("count", [1, 8, 11])  # the last two in parts
def test_equals_the_library_on_a_residual_net(net: nn.Module, count: int) -> None:
    inputs = pictures(count)
    grad, layer = class_activation_maps(cut_of(net, 1), inputs, ["grad", "layer"])
    assert grad.shape == layer.shape == (count, 96, 64)
    assert grad.dtype == layer.dtype == np.float32
    np.testing.assert_allclose(grad, by_library(GradCAM, net, [net.layer4], inputs), atol=1e-5)
    np.testing.assert_allclose(layer, by_library(LayerCAM, net, [net.layer3, net.layer4], inputs), atol=1e-5)
    assert np.abs(grad - layer).max() > 0.1
    assert grad.max() > 0.99


def test_a_cut_behind_the_last_layer_is_enough_for_that_layer(net: nn.Module) -> None:
    inputs = pictures(2)
    grad, layer = class_activation_maps(cut_of(net, 0), inputs, ["grad", "layer"])
    np.testing.assert_array_equal(grad, class_activation_maps(cut_of(net, 1), inputs)[0])
    np.testing.assert_allclose(layer, by_library(LayerCAM, net, [net.layer4], inputs), atol=1e-5)


def test_layers_are_read_as_autograd_does_on_the_whole_net(net: nn.Module) -> None:
    inputs, kept = pictures(2), {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, given: tuple, output: Tensor) -> None:
            kept[name] = output
        return hook

    handles = [getattr(net, name).register_forward_hook(keep(name)) for name in ("layer3", "layer4")]
    score = net(inputs)[:, CLASS].sum()
    for handle in handles:
        handle.remove()
    slopes = torch.autograd.grad(score, list(kept.values()))
    for (activation, gradient), whole, slope in zip(read_layers(cut_of(net, 1), inputs), kept.values(), slopes,
                                                    strict=True):
        np.testing.assert_allclose(activation, whole.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(gradient, slope.numpy(), rtol=1e-5, atol=1e-9)


def test_nothing_but_the_layers_gets_a_gradient(net: nn.Module) -> None:
    net.zero_grad(set_to_none=True)  # the library leaves some behind
    inputs = pictures(1)
    seen: list[bool] = []
    cut = cut_of(net, 1)

    def stem(part: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return cut.stem(part)

    with torch.no_grad():  # the caller's state does not matter
        class_activation_maps(Cut(stem, cut.blocks, cut.score), inputs)
    assert seen == [False], "the stem keeps no graph"
    assert all(p.grad is None for p in net.parameters())
    assert not inputs.requires_grad


def test_a_map_without_any_evidence_is_zero(net: nn.Module) -> None:
    cut = cut_of(net, 0)
    against = Cut(cut.stem, cut.blocks, lambda last, inputs: -last.sum((1, 2, 3)))
    for maps in class_activation_maps(against, pictures(2), ["grad", "layer"]):
        assert (maps == 0).all()


def test_an_unknown_method_is_refused(net: nn.Module) -> None:
    with pytest.raises(SettingsError, match="'score'"):
        class_activation_maps(cut_of(net, 0), pictures(1), ["score"])
