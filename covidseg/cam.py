"""Stage 3: class activation maps turn the classifier into coarse labels.

Grad-CAM (Selvaraju et al., ICCV 2017, eqs. 1-2) weighs each channel ``k`` of a layer by the mean gradient of the
class score, ``alpha_k = mean_ij d y / d A_k(i, j)``, and keeps what speaks for the class:
``M = ReLU(sum_k alpha_k A_k)``. LayerCAM (Jiang et al., IEEE TIP 2021, eqs. 4-5) gives every position a weight of its
own, its positive gradient, and so can read earlier, finer layers. The library pytorch-grad-cam does the arithmetic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covidseg.classify import Classifier, Committee
from covidseg.prepare import Crops
from covidseg.train import net_input


@dataclass(frozen=True)
class CamSettings:
    """Settings of the class activation maps.

    Attributes:
        batch: slices a pass.
        scales: the map is averaged over the slice enlarged by these factors, each with its mirror image.
        layer_share: share of LayerCAM of the last two blocks in the map; Grad-CAM of the last block has the rest.
        top: the map is divided by this percentile of itself inside the lung: no single pixel sets the scale.
        lesion: coarse label "lesion" from this value on.
        lung: coarse label "lung" below this value; in between nobody knows.
        outline: where a single outline is wanted, for the table, it is drawn at this value.
    """

    batch: int = 32
    scales: tuple[float, ...] = (1.0,)
    layer_share: float = 0.2
    top: float = 99.0
    lesion: float = 0.3
    lung: float = 0.1
    outline: float = 0.1


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


def grad_cam(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """Grad-CAM of the last block for every slice.

    Args:
        net: trained classifier.
        crops: ``N`` slices.

    Returns:
        ``(N, S, S)`` float32 in [0, 1], 0 outside the lung.
    """
    from pytorch_grad_cam import GradCAM  # takes seconds to import, and most programs read their maps from store

    return _averaged(GradCAM, [net.coarse], net, crops, settings)


def layer_cam(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """LayerCAM of the last two blocks, ``(N, S, S)`` float32 in [0, 1]."""
    from pytorch_grad_cam import LayerCAM

    return _averaged(LayerCAM, [net.middle, net.coarse], net, crops, settings)


def activation_maps(net: Classifier | Committee, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """The map that the later stages use: Grad-CAM and LayerCAM mixed, ``(N, S, S)`` float32 in [0, 1].

    That of a committee is the mean over its members.
    """
    if isinstance(net, Committee):
        members = [activation_maps(member, crops, settings) for member in net.members]  # type: ignore[arg-type]
        return members[0] if len(members) == 1 else scale_by_top(np.mean(members, axis=0), crops.lungs, settings.top)
    share = settings.layer_share
    maps = np.zeros(crops.images.shape, np.float32)
    if share < 1:
        maps += (1 - share) * grad_cam(net, crops, settings)
    if share > 0:
        maps += share * layer_cam(net, crops, settings)
    return scale_by_top(maps, crops.lungs, settings.top) if 0 < share < 1 else maps


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
