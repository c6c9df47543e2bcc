"""The maps of :mod:`covidseg.gradcam` by the library pytorch-grad-cam: the plain path.

Tests hold the fast path of the package to it, and the benchmark measures what the fast path gains.
"""

from __future__ import annotations

import numpy as np
import torch
from pytorch_grad_cam import GradCAM, LayerCAM
from torch import Tensor
from torch.nn import functional as F

from covidseg.classifier import Classifier
from covidseg.gradcam import CamSettings, scale_by_top
from covidseg.preprocess import Crops, net_input


def grad_cam_library(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """:func:`covidseg.gradcam.grad_cam` by the library."""
    return _averaged(GradCAM, [net.coarse], net, crops, settings)


def layer_cam_library(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """:func:`covidseg.gradcam.layer_cam` by the library."""
    return _averaged(LayerCAM, [net.middle, net.coarse], net, crops, settings)


def activation_maps_library(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """:func:`covidseg.gradcam.activation_maps` of one classifier by the library."""
    share = settings.layer_share
    if share in (0, 1):
        return layer_cam_library(net, crops, settings) if share else grad_cam_library(net, crops, settings)
    maps = (1 - share) * grad_cam_library(net, crops, settings) + share * layer_cam_library(net, crops, settings)
    return scale_by_top(maps, crops.lungs, settings.top)


def _score(output: Tensor) -> Tensor:
    return output[0]  # the one logit of a slice


def _averaged(method: type, layers: list[torch.nn.Module], net: Classifier, crops: Crops,
              settings: CamSettings) -> np.ndarray:
    """One method over all scales and both mirror images, ``(N, S, S)`` in [0, 1], 0 outside the lung."""
    device = next(net.parameters()).device
    maps = np.zeros(crops.images.shape, np.float32)
    side = crops.images.shape[-1]
    net.eval()
    with method(model=net, target_layers=layers) as cam:
        for start in range(0, len(crops), settings.batch):
            part = slice(start, start + settings.batch)
            lungs = torch.from_numpy(crops.lungs[part])[:, None].float()
            whole = net_input(torch.from_numpy(crops.images[part])[:, None], lungs)
            for scale in settings.scales:
                size = round(side * scale / 8) * 8  # the trunk's stride
                scaled = F.interpolate(whole, size=(size, size), mode="bilinear", align_corners=False).to(device)
                # The averaged net's weights are frozen, so the graph has to start at the picture.
                scaled.requires_grad_(True)
                targets = [_score] * len(scaled)
                both = (cam(input_tensor=scaled, targets=targets)
                        + cam(input_tensor=scaled.flip(3), targets=targets)[..., ::-1])      # (B, size, size)
                back = F.interpolate(torch.from_numpy(both.copy())[:, None], size=(side, side), mode="bilinear",
                                     align_corners=False)[:, 0].numpy()
                maps[part] += back / (2 * len(settings.scales))
    maps *= crops.lungs
    return scale_by_top(maps, crops.lungs, settings.top)
