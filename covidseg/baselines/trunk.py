"""The trunk that both published systems share: a stem and two bottleneck blocks, in 3D or as a 2D port.

Sizes as in the public code of DeCoVNet (Wang X. et al., IEEE TMI 39(8), 2020, fig. 2), which AD3D-MIL (Han Z. et al.,
same issue) builds on. Every size is written once, as (z, y, x); the 2D port leaves the z part out.

=====  ===========================================================  ======================
block  operation                                                    output, T slices
=====  ===========================================================  ======================
stem   convolution (5, 7, 7) stride (1, 2, 2), BN, ReLU;            16, T, S/4, S/4
       max pooling (1, 3, 3) stride (1, 2, 2)
res1   bottleneck 16 -> 16 -> 64                                    64, T, S/4, S/4
pool   max pooling (2, 1, 1)                                        64, T/2, S/4, S/4
res2   bottleneck 64 -> 32 -> 128, stride (1, 2, 2)                 128, T/2, S/8, S/8
=====  ===========================================================  ======================
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Size = tuple[int, int, int]
ONE: Size = (1, 1, 1)
NORM = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def convolution(dims: int, inputs: int, outputs: int, kernel: Size, stride: Size = ONE, *,
                bias: bool = False) -> nn.Module:
    """A convolution that keeps the size up to its stride; ``kernel`` (odd) and ``stride`` are (z, y, x)."""
    z, y, x = kernel
    if dims == 3:
        return nn.Conv3d(inputs, outputs, kernel, stride, (z // 2, y // 2, x // 2), bias=bias)
    return nn.Conv2d(inputs, outputs, (y, x), (stride[1], stride[2]), (y // 2, x // 2), bias=bias)


class GridPool(nn.Module):
    """Adaptive max pooling down to a grid, (z, y, x).

    An axis that is shorter than the grid stays as it is (our choice): the published grids fit volumes of some hundred
    slices, and pooling up would only repeat values, at many times the cost.
    """

    def __init__(self, dims: int, grid: Size) -> None:
        super().__init__()
        self.dims, self.grid = dims, grid[-dims:]

    def forward(self, features: Tensor) -> Tensor:
        size = [min(cells, there) for cells, there in zip(self.grid, features.shape[2:], strict=True)]
        return F.adaptive_max_pool3d(features, size) if self.dims == 3 else F.adaptive_max_pool2d(features, size)


class Bottleneck(nn.Module):
    """Residual block: (3, 1, 1) to fewer channels, (1, 3, 3), (1, 1, 1) to more, and a projected shortcut.

    The stride lies in the middle convolution. ``(B, inputs, T, H, W)`` to ``(B, outputs, T, H/stride, W/stride)``.
    """

    def __init__(self, dims: int, inputs: int, inner: int, outputs: int, stride: Size = ONE) -> None:
        super().__init__()
        self.path = nn.Sequential(
            convolution(dims, inputs, inner, (3, 1, 1)), NORM[dims](inner), nn.ReLU(),
            convolution(dims, inner, inner, (1, 3, 3), stride), NORM[dims](inner), nn.ReLU(),
            convolution(dims, inner, outputs, ONE), NORM[dims](outputs))
        self.shortcut = nn.Sequential(convolution(dims, inputs, outputs, ONE, stride), NORM[dims](outputs))

    def forward(self, features: Tensor) -> Tensor:
        return (self.path(features) + self.shortcut(features)).relu()


class Trunk(nn.Module):
    """The trunk. ``(B, inputs, T, S, S)`` to ``(B, 128, T/2, S/8, S/8)``; in 2D both without their third axis.

    An odd number of slices is halved upwards, so that one slice stays one.
    """

    def __init__(self, inputs: int, dims: int = 3) -> None:
        super().__init__()
        pool = nn.MaxPool3d if dims == 3 else nn.MaxPool2d
        self.stem = nn.Sequential(
            convolution(dims, inputs, 16, (5, 7, 7), (1, 2, 2)), NORM[dims](16), nn.ReLU(),
            pool((1, 3, 3)[-dims:], (1, 2, 2)[-dims:], (0, 1, 1)[-dims:]))
        self.res1 = Bottleneck(dims, 16, 16, 64)
        self.pool = nn.MaxPool3d((2, 1, 1), ceil_mode=True) if dims == 3 else nn.Identity()
        self.res2 = Bottleneck(dims, 64, 32, 128, (1, 2, 2))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.res2(self.pool(self.res1(self.stem(inputs))))


@torch.no_grad()
def initialise(net: nn.Module) -> None:
    """Start weights as in the public code: He's for convolutions, and residual paths that begin as nothing."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, Bottleneck):
            nn.init.zeros_(module.path[-1].weight)  # type: ignore[arg-type]
