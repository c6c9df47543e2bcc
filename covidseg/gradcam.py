"""Chapter 4: class activation maps turn the classifier into coarse labels.

Grad-CAM (Selvaraju et al., ICCV 2017, eqs. 1-2) weighs each channel ``k`` of a layer by the mean gradient of the class
score, ``alpha_k = mean_ij d y / d A_k(i, j)``, and keeps what speaks for the class: ``M = ReLU(sum_k alpha_k A_k)``.
LayerCAM (Jiang et al., IEEE TIP 2021, eqs. 4-5) gives every position a weight of its own, its positive gradient, and so
can read earlier, finer layers.

The library pytorch-grad-cam draws the same maps, and tests and benchmark compare the two. It runs a net whole, forward
with a graph and backward to the picture, once for each method. The maps need no more than the activations of the last
layers and the gradients of the score there: here everything before these layers runs without a graph, and one backward
serves all methods. Scaling and enlarging are those of the library, operation by operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2  # comes with grad-cam: one build of OpenCV on Colab, another in the lock, and naming one would add it
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covidseg.classifier import Classifier, Ensemble
from covidseg.errors import one_of
from covidseg.preprocess import Crops, net_input, net_maps, slices_at_once, slices_in_cache


@dataclass(frozen=True)
class CamSettings:
    """Settings of the class activation maps.

    Attributes:
        batch: Slices a pass.
        scales: The map is averaged over the slice enlarged by these factors, each with its mirror image.
        layer_share: Share of LayerCAM of the last two blocks in the map; Grad-CAM of the last block has the rest.
        top: The map is divided by this percentile of itself inside the lung: no single pixel sets the scale.
        lesion: Coarse label "lesion" from this value on.
        lung: Coarse label "lung" below this value; in between nobody knows.
        outline: Where a single outline is wanted, for the table, it is drawn at this value.
    """

    batch: int = 32
    scales: tuple[float, ...] = (1.0,)
    layer_share: float = 0.2
    top: float = 99.0
    lesion: float = 0.3
    lung: float = 0.1
    outline: float = 0.1


Layer = tuple[np.ndarray, np.ndarray]  # activations and gradients, (B, K, h, w) each
METHODS = ("grad", "layer")


def read_layers(net: Classifier, inputs: Tensor, blocks: int = 2) -> list[Layer]:
    """Activations of the last blocks, and the gradients of each slice's score there.

    Args:
        net: in evaluation mode.
        inputs: ``(B, 2, S, S)``.
        blocks: 1 reads the last block, 2 the one before as well.

    Returns:
        A pair for each block, the last one last.
    """
    def stem(part: Tensor) -> Tensor:
        before = net.middle(net.fine(part))
        return before if blocks == 2 else net.coarse(before)
    parts = inputs.split(max(1, slices_in_cache(len(inputs), inputs.shape[-1], inputs.device)))
    with torch.no_grad():
        layers = [torch.cat([stem(part) for part in parts])]
    with torch.enable_grad():
        layers[0].requires_grad_(True)  # the graph starts here
        if blocks == 2:
            layers.append(net.coarse(layers[0]))
        score = net.pool(net.evidence(layers[-1]), inputs[:, 1:2])[:, 0]                   # (B,), the one logit
        slopes = torch.autograd.grad(score.sum(), layers)
    return [(layer.detach().cpu().numpy(), slope.cpu().numpy()) for layer, slope in zip(layers, slopes, strict=True)]


def class_activation_maps(net: Classifier, inputs: Tensor, methods: Sequence[str] = ("grad",)) -> list[np.ndarray]:
    """Class activation maps of a batch, all methods from one pass.

    Args:
        net: in evaluation mode.
        inputs: ``(B, 2, S, S)``.
        methods: ``grad`` is Grad-CAM of the last block; ``layer`` is the mean over LayerCAM of the last two.

    Returns:
        For each method ``(B, S, S)`` float32, each map scaled to [0, 1].

    Raises:
        SettingsError: there is no such method.
    """
    for method in methods:
        one_of(method, METHODS, "method")
    layers = read_layers(net, inputs, 2 if "layer" in methods else 1)
    result = []
    for method in methods:
        small = [_grad_cam(*layers[-1])] if method == "grad" else [_layer_cam(*layer) for layer in layers]
        result.append(_unit(np.mean([_enlarged(maps, inputs.shape[-1]) for maps in small], axis=0)))
    return result


def _grad_cam(activation: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Equations 1 and 2 of Selvaraju et al. (ICCV 2017), ``(B, h, w)``."""
    alpha = gradient.mean(axis=(2, 3))                                                     # (B, K)
    return np.maximum((alpha[:, :, None, None] * activation).sum(axis=1), 0)


def _layer_cam(activation: np.ndarray, gradient: np.ndarray) -> np.ndarray:
    """Equations 4 and 5 of Jiang et al. (IEEE TIP 2021), ``(B, h, w)``."""
    return np.maximum((np.maximum(gradient, 0) * activation).sum(axis=1), 0)


def _unit(maps: np.ndarray) -> np.ndarray:
    """Each map from 0 to 1; a constant one is 0."""
    maps = maps - maps.min(axis=(1, 2), keepdims=True)
    return maps / (1e-7 + maps.max(axis=(1, 2), keepdims=True))


def _enlarged(maps: np.ndarray, size: int) -> np.ndarray:
    """Maps from 0 to 1, ``(B, size, size)``, as OpenCV interpolates them."""
    return np.stack([cv2.resize(one, (size, size)) for one in _unit(maps)])


def _averaged(net: Classifier, crops: Crops, settings: CamSettings, methods: Sequence[str]) -> list[np.ndarray]:
    """Each method over all scales and both mirror images, ``(N, S, S)`` in [0, 1], 0 outside the lung."""
    net.eval()
    result = [np.zeros(crops.images.shape, np.float32) for _ in methods]
    side = crops.images.shape[-1]
    batch = slices_at_once(settings.batch, side)
    for start in range(0, len(crops), batch):
        part = slice(start, start + batch)
        whole = net_input(*net_maps(net, crops, part))                                     # (B, 2, S, S)
        for scale in settings.scales:
            size = round(side * scale / 8) * 8  # the trunk's stride
            scaled = _resized(whole, size)
            straight, mirrored = (class_activation_maps(net, way, methods) for way in (scaled, scaled.flip(3)))
            for maps, one, other in zip(result, straight, mirrored, strict=True):
                both = torch.from_numpy(one + other[..., ::-1])[:, None]                   # (B, 1, size, size)
                maps[part] += _resized(both, side)[:, 0].numpy() / (2 * len(settings.scales))
    return [scale_by_top(maps * crops.lungs, crops.lungs, settings.top) for maps in result]


def _resized(maps: Tensor, size: int) -> Tensor:
    if maps.shape[-1] == size:
        return maps
    return F.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def grad_cam(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """Grad-CAM of the last block for every slice.

    Args:
        net: trained classifier.
        crops: ``N`` slices.

    Returns:
        ``(N, S, S)`` float32 in [0, 1], 0 outside the lung.
    """
    return _averaged(net, crops, settings, ["grad"])[0]


def layer_cam(net: Classifier, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """LayerCAM of the last two blocks, ``(N, S, S)`` float32 in [0, 1]."""
    return _averaged(net, crops, settings, ["layer"])[0]


def activation_maps(net: Classifier | Ensemble, crops: Crops, settings: CamSettings = CamSettings()) -> np.ndarray:
    """The map that the later stages use: Grad-CAM and LayerCAM mixed, ``(N, S, S)`` float32 in [0, 1].

    That of an ensemble is the mean over its members.
    """
    if isinstance(net, Ensemble):
        members = [activation_maps(member, crops, settings) for member in net.members]  # type: ignore[arg-type]
        return members[0] if len(members) == 1 else scale_by_top(np.mean(members, axis=0), crops.lungs, settings.top)
    shares = {"grad": 1 - settings.layer_share, "layer": settings.layer_share}
    methods = [method for method, share in shares.items() if share > 0]
    found = _averaged(net, crops, settings, methods)
    if len(found) == 1:
        return found[0]
    mixed = np.zeros(crops.images.shape, np.float32)
    for method, maps in zip(methods, found, strict=True):
        mixed += shares[method] * maps
    return scale_by_top(mixed, crops.lungs, settings.top)


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
