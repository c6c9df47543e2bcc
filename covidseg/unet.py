"""Two U-Nets of MONAI: one for the lung net, which is quick, and a finer one for the segmenter."""

from __future__ import annotations

import copy
import math
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


def make_fine_unet(inputs: int, channels: tuple[int, ...], prior: float = 0.5) -> nn.Module:
    """The U-Net of nnU-Net (Isensee et al., Nature Methods 2021), same arguments and shapes as :func:`make_unet`.

    It has two convolutions on every level, the finest included, where the other one halves the picture at once. That
    takes up to twice as long, outlines lesions better, and marks fewer healthy slices.

    Args:
        inputs, channels: see :func:`make_unet`.
        prior: Probability, above 0 and below 1, that the untrained net gives to a pixel on average, by the bias of the
            last layer (Lin et al., ICCV 2017, section 4.1).
    """
    from monai.networks.nets import DynUNet  # as above

    levels = len(channels)
    net: Any = DynUNet(
        spatial_dims=2, in_channels=inputs, out_channels=1, kernel_size=[3] * levels, strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1), filters=list(channels), norm_name="batch")
    nn.init.constant_(net.output_block.conv.conv.bias, math.log(prior / (1 - prior)))
    return net


def for_prediction(net: nn.Module) -> nn.Module:
    """A copy of a trained net of this module that is faster and says the same, but for rounding.

    In evaluation mode a batch norm multiplies and adds constants, which fit into the convolution before it; and
    convolutions are faster where the channels of a pixel lie together in memory. Logits differ in the last digits.
    """
    net = copy.deepcopy(net).eval()
    for layer in cast("list[Any]", list(net.modules())):
        adn = getattr(layer, "adn", None)  # MONAI's name for what follows a convolution
        if adn is not None and hasattr(adn, "N"):
            layer.conv = fuse_conv_bn_eval(layer.conv, adn.N, isinstance(layer.conv, nn.ConvTranspose2d))
            adn.N = nn.Identity()
        for number in (1, 2):  # a block of the finer one has two
            if hasattr(layer, f"norm{number}"):
                conv = getattr(layer, f"conv{number}")
                conv.conv = fuse_conv_bn_eval(conv.conv, getattr(layer, f"norm{number}"))
                setattr(layer, f"norm{number}", nn.Identity())
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
