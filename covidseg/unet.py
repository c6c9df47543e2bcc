"""The U-Net of the lung net and of the segmenter: MONAI's, with a head of its own."""

from __future__ import annotations

from torch import nn


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
