"""Stage 3: Grad-CAM turns the classifier into coarse labels.

Grad-CAM (Selvaraju et al., ICCV 2017, eqs. 1-2) weighs each channel ``k`` of a layer by the mean gradient of the
class score, ``alpha_k = mean_ij d y / d A_k(i, j)``, and keeps what speaks for the class:
``M = ReLU(sum_k alpha_k A_k)``. The library pytorch-grad-cam does the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from pytorch_grad_cam import GradCAM
from torch import Tensor

from covidseg.classify import Classifier
from covidseg.prepare import Crops
from covidseg.train import net_input


@dataclass(frozen=True)
class CamSettings:
    """Settings of the class activation maps.

    Attributes:
        batch: slices a pass.
        top: the map is divided by this percentile of itself inside the lung: no single pixel sets the scale.
        lesion: coarse label "lesion" from this value on.
        lung: coarse label "lung" below this value; in between nobody knows.
        outline: where a single outline is wanted, for the table, it is drawn at this value.
    """

    batch: int = 32
    top: float = 99.0
    lesion: float = 0.3
    lung: float = 0.1
    outline: float = 0.05


def _score(output: Tensor) -> Tensor:
    return output[0]  # the one logit of a slice


def grad_cam(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """Grad-CAM of the last block for every slice, averaged over the slice and its mirror image.

    Args:
        net: trained classifier.
        crops: ``N`` slices.

    Returns:
        ``(N, S, S)`` float32 in [0, 1], 0 outside the lung.
    """
    device = next(net.parameters()).device
    maps = np.zeros(crops.images.shape, np.float32)
    net.eval()
    with GradCAM(model=net, target_layers=[net.coarse]) as cam:
        for start in range(0, len(crops), settings.batch):
            part = slice(start, start + settings.batch)
            lungs = torch.from_numpy(crops.lungs[part])[:, None].float()
            inputs = net_input(torch.from_numpy(crops.images[part])[:, None], lungs).to(device)
            # The averaged net's weights are frozen, so the graph has to start at the picture.
            inputs.requires_grad_(True)
            targets = [_score] * len(inputs)
            straight = cam(input_tensor=inputs, targets=targets)                    # (B, S, S)
            mirrored = cam(input_tensor=inputs.flip(3), targets=targets)[..., ::-1]
            maps[part] = 0.5 * (straight + mirrored)
    maps *= crops.lungs
    return scale_by_top(maps, crops.lungs, settings.top)


def scale_by_top(maps: np.ndarray, lungs: np.ndarray, top: float) -> np.ndarray:
    """Divides each ``(S, S)`` map by its ``top`` percentile inside the lung and clips to [0, 1]."""
    result = np.zeros_like(maps)
    for out, one, lung in zip(result, maps, lungs, strict=True):
        high = np.percentile(one[lung], top) if lung.any() else 0.0
        if high > 0:
            out[:] = np.clip(one / high, 0, 1)
    return result


def coarse_labels(maps: np.ndarray, labels: np.ndarray, settings: CamSettings = CamSettings()) -> np.ndarray:
    """Coarse labels: 1 lesion, 0 lung, 255 unknown.

    Args:
        maps: ``(N, S, S)`` in [0, 1].
        labels: ``(N,)`` slice labels; a slice without a lesion is lung throughout.

    Returns:
        ``(N, S, S)`` uint8.
    """
    coarse = np.full(maps.shape, 255, np.uint8)
    coarse[maps < settings.lung] = 0
    coarse[maps >= settings.lesion] = 1
    coarse[labels == 0] = 0
    return coarse
