"""The U-Net of the lung net and of the segmenter: MONAI's, with a head of its own."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


def make_unet(inputs: int, channels: tuple[int, ...]) -> nn.Module:
    """``(B, inputs, S, S)`` to ``(B, 1, S, S)`` logits.

    ``S`` has to be a multiple of ``2 ** (len(channels) - 1)``; the net fails or gives another size otherwise.

    MONAI's U-Net narrows to ``out_channels`` *before* its last convolutions. Asked for one channel it would squeeze
    everything it knows about a pixel through a single number and a rectifier, and it learns slowly. It keeps its
    channels here, and a 1 x 1 convolution makes the logit.
    """
    from monai.networks.nets import UNet  # takes seconds to import, and not every program makes a net

    trunk = UNet(spatial_dims=2, in_channels=inputs, out_channels=channels[0], channels=channels,
                 strides=(2,) * (len(channels) - 1), num_res_units=1, norm="batch", act="relu")
    return nn.Sequential(trunk, nn.BatchNorm2d(channels[0]), nn.ReLU(), nn.Conv2d(channels[0], 1, 1))


def for_prediction(net: nn.Module) -> nn.Module:
    """A copy of a trained net of :func:`make_unet` that is faster and says the same, but for rounding.

    In evaluation mode a batch norm multiplies and adds constants, which fit into the convolution before it; and
    convolutions are faster where the channels of a pixel lie together in memory. Logits differ in the last digits.
    """
    net = copy.deepcopy(net).eval()
    for layer in cast("list[Any]", list(net.modules())):
        adn = getattr(layer, "adn", None)  # MONAI's name for what follows a convolution
        if adn is not None and hasattr(adn, "N"):
            layer.conv = fuse_conv_bn_eval(layer.conv, adn.N, isinstance(layer.conv, nn.ConvTranspose2d))
            adn.N = nn.Identity()
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
