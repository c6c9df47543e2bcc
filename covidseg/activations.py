"""Class activation maps without hooks: the arithmetic of pytorch-grad-cam at a fraction of its cost.

The library runs any net whole, forward with a graph and backward to the picture. But the maps need no more than the
activations of the last layers and the gradients of the score there. So the net is cut (:class:`Cut`): all before the
first of these layers runs without a graph, one backward from the score serves all layers, and several methods read
the same pass. The scaling and enlarging that follow are those of the library, operation by operation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import cv2  # comes with grad-cam
import numpy as np
import torch
from torch import Tensor

from covidseg.errors import one_of
from covidseg.prepare import slices_in_cache

METHODS = ("grad", "layer")
Layer = tuple[np.ndarray, np.ndarray]  # activations and gradients, (B, K, h, w) each


@dataclass(frozen=True)
class Cut:
    """A net in evaluation mode, cut at the layers that the maps are read from.

    Attributes:
        stem: takes pictures ``(B, C, H, W)`` to the activations of the first of the layers.
        blocks: each takes the activations of a layer to those of the next.
        score: takes the activations of the last layer, and the pictures, to the class score of each, ``(B,)``.
    """

    stem: Callable[[Tensor], Tensor]
    blocks: Sequence[Callable[[Tensor], Tensor]]
    score: Callable[[Tensor, Tensor], Tensor]


def read_layers(cut: Cut, inputs: Tensor) -> list[Layer]:
    """Activations and gradients of every layer of the cut, the last one last."""
    parts = inputs.split(max(1, slices_in_cache(len(inputs), inputs.shape[-1], inputs.device)))
    with torch.no_grad():
        layers = [torch.cat([cut.stem(part) for part in parts])]
    with torch.enable_grad():
        layers[0].requires_grad_(True)  # the graph starts here
        for block in cut.blocks:
            layers.append(block(layers[-1]))
        slopes = torch.autograd.grad(cut.score(layers[-1], inputs).sum(), layers)
    return [(layer.detach().cpu().numpy(), slope.cpu().numpy()) for layer, slope in zip(layers, slopes, strict=True)]


def class_activation_maps(cut: Cut, inputs: Tensor, methods: Sequence[str] = ("grad",)) -> list[np.ndarray]:
    """Class activation maps of a batch of pictures, all methods from one pass.

    Args:
        inputs: ``(B, C, H, W)``.
        methods: ``grad``, Grad-CAM of the last layer; ``layer``, the mean over LayerCAM of all layers.

    Returns:
        For each method ``(B, H, W)`` float32, each map scaled to [0, 1]: the values of the library.

    Raises:
        SettingsError: there is no such method.
    """
    for method in methods:
        one_of(method, METHODS, "method")
    layers, size = read_layers(cut, inputs), (inputs.shape[-1], inputs.shape[-2])
    result = []
    for method in methods:
        small = [_grad_cam(*layers[-1])] if method == "grad" else [_layer_cam(*layer) for layer in layers]
        result.append(_unit(np.mean([_enlarged(maps, size) for maps in small], axis=0)))
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


def _enlarged(maps: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Maps from 0 to 1 in the size of the picture (columns, rows), as OpenCV interpolates them."""
    return np.stack([cv2.resize(one, size) for one in _unit(maps)])
