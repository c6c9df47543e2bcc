"""The U-Net of lung net and segmenter: shapes, and that every part of it can learn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from covidseg.unet import for_prediction, make_fine_unet, make_unet

pytestmark = pytest.mark.nets

Make = Callable[[int, tuple[int, ...]], nn.Module]
CHANNELS = [(4, 8, 16), (4, 8, 16, 16)]
NETS = [(make_unet, (4, 8)), *((make, channels) for make in (make_unet, make_fine_unet) for channels in CHANNELS)]


@pytest.mark.parametrize(("make", "channels"), NETS)
@pytest.mark.parametrize("inputs", [1, 2])
def test_one_logit_for_every_pixel_of_a_picture_that_fits(make: Make, inputs: int, channels: tuple[int, ...]) -> None:
    stride = 2 ** (len(channels) - 1)
    net = make(inputs, channels).eval()
    for shape in ((3 * stride, 3 * stride), (3 * stride, 6 * stride)):
        with torch.no_grad():
            logits = net(torch.randn(5, inputs, *shape))
        assert logits.shape == (5, 1, *shape)
        assert logits.min() < 0.9 * logits.max(), "pixels differ"
    with pytest.raises(RuntimeError, match="channels"):
        net(torch.zeros(1, 3, 3 * stride, 3 * stride))
    if stride > 2:
        with pytest.raises(RuntimeError, match=r"[Ss]izes"):
            net(torch.zeros(1, inputs, 3 * stride + stride // 2, 3 * stride + stride // 2))


@pytest.mark.parametrize(("make", "channels"), NETS)
def test_every_weight_gets_a_gradient_and_the_logit_is_made_of_all_channels(make: Make,
                                                                            channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = make(1, channels)
    net(torch.randn(4, 1, 32, 32)).square().mean().backward()
    layers = [p for p in net.parameters() if p.ndim == 4]
    assert layers[0].shape[1] == 1, "the first layer sees the picture"
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    # Batch norm cancels the bias before it; all other weights move.
    assert all(p.grad.abs().max() > 0 for p in layers)  # type: ignore[union-attr]
    # A trunk with one output would squeeze everything through one number and a rectifier.
    assert [p for p in layers if p.shape[0] == 1][-1].shape == (1, channels[0], 1, 1)


@pytest.mark.parametrize(("make", "channels"), NETS[:4:3])
def test_each_half_of_the_logits_can_be_reached(make: Make, channels: tuple[int, ...]) -> None:
    """No rectifier stands after the logit: a net that should say no everywhere and one that should say yes learn."""
    for target in (-1.0, 1.0):
        torch.manual_seed(0)
        net = make(1, channels)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        picture = torch.randn(4, 1, 16, 16)
        for _ in range(40):
            optimizer.zero_grad()
            loss = (net(picture) - target).square().mean()
            loss.backward()
            optimizer.step()
        assert loss.item() < 0.1


@pytest.mark.parametrize(("make", "channels"), NETS)
@pytest.mark.parametrize("inputs", [1, 2])
def test_the_form_for_prediction_says_the_same(make: Make, inputs: int, channels: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    net = make(inputs, channels)
    with torch.no_grad():
        for layer in net.modules():  # batch norms as training leaves them behind
            if isinstance(layer, nn.BatchNorm2d):
                layer.weight.uniform_(0.5, 2)
                layer.bias.normal_()
                layer.running_mean.normal_()  # type: ignore[union-attr]
                layer.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fast = for_prediction(net.double().eval())  # rounding is then no matter of the processor
    norms = [sum(isinstance(layer, nn.BatchNorm2d) for layer in each.modules()) for each in (net, fast)]
    assert norms[1] == (make is make_unet) < norms[0], "only that of a head is left"
    picture = torch.randn(3, inputs, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected, found = net(picture).sigmoid(), fast(picture).sigmoid()
    assert expected.std() > 0.005
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    after = {name: value.to(before[name]) for name, value in net.state_dict().items()}
    assert all(torch.equal(value, before[name]) for name, value in after.items()), "the net is left alone"


def test_a_fine_net_starts_from_its_prior() -> None:
    """And one half is what a new net gives anyway: the bias of its last layer is zero."""
    pictures = torch.randn(8, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    biases = {}
    for prior in (0.5, 0.05):
        torch.manual_seed(0)
        net = make_fine_unet(2, (4, 8, 16), prior)
        biases[prior] = next(p for name, p in net.named_parameters() if name.startswith("output_block") and p.ndim == 1)
        assert biases[prior].sigmoid().item() == pytest.approx(prior)
        with torch.no_grad():
            assert net(pictures).mean().sigmoid().item() == pytest.approx(prior, rel=0.3)
    assert biases[0.5].item() == 0
