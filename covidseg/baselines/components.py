"""3DCC: where a lung mask falls to pieces, without learning; and the choice of an activated part by it.

DeCoVNet's authors cross its class activation map with a 3D connected component (3DCC) activation. Their code looks
at the lung *mask*: where diseased lung confuses a lung finder, the mask breaks into islands and holes. A 6 x 6
window counts if it holds three islands or more and is about half full. Windows that touch form components; the
largest in three dimensions is the lesion.

The lungs of this project have no holes; they are completed on purpose. Our choice: the mask is the part of the lung
that is as dark as aerated lung (:attr:`ComponentSettings.aerated`), which breaks up where lung is dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi

from covidseg.baselines.maps import parts
from covidseg.preprocess import Crops


@dataclass(frozen=True)
class ComponentSettings:
    """Settings of 3DCC. All but ``aerated`` are those of the public code.

    Attributes:
        window: side of the windows in pixels (of the crop here, of a 512-pixel slice there).
        islands: least number of islands in a window (more than three labels, of which one is the background).
        spread: how far the standard deviation of the mask in a window may be from one half, that of a half-full one.
        low, high: the part of a volume's height that is looked at.
        largest: how many components of a class activation map are compared with 3DCC.
        aerated: lung below this level counts as aerated; 0 air, 1 soft tissue. Between healthy lung and most ground
            glass.
    """

    window: int = 6
    islands: int = 3
    spread: float = 0.05
    low: float = 0.1
    high: float = 0.8
    largest: int = 9
    aerated: float = 0.4


def broken_windows(masks: np.ndarray, settings: ComponentSettings = ComponentSettings()) -> np.ndarray:
    """Windows in which a mask is in pieces; they tile each slice from its first corner, an incomplete rest is left.

    Args:
        masks: ``(N, H, W)`` bool.

    Returns:
        ``(N, H, W)`` bool.
    """
    w = settings.window
    rows, columns = masks.shape[1] // w, masks.shape[2] // w
    tiles = masks[:, :rows * w, :columns * w].reshape(len(masks), rows, w, columns, w).swapaxes(2, 3)
    half = np.abs(tiles.std(axis=(3, 4)) - 0.5) < settings.spread                        # (N, rows, columns)
    broken = np.zeros(half.shape, bool)
    eight = np.ones((3, 3), bool)  # diagonal neighbours belong together
    for place in zip(*np.nonzero(half), strict=True):
        broken[place] = ndi.label(tiles[place], eight)[1] >= settings.islands
    result = np.zeros(masks.shape, bool)
    result[:, :rows * w, :columns * w] = broken.repeat(w, axis=1).repeat(w, axis=2)
    return result


def _components(masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Components of ``(n, H, W)`` bool, diagonal neighbours included, and their sizes with the background at 0."""
    labels, _ = ndi.label(masks, np.ones((3, 3, 3), bool))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    return labels, sizes


def component_activation(crops: Crops, settings: ComponentSettings = ComponentSettings(), *,
                         joint: bool = True) -> np.ndarray:
    """3DCC of a volume, or its 2D port on unrelated slices.

    Args:
        crops: ``N`` slices; a volume in order if ``joint``.
        joint: False takes the largest component of each slice and leaves no slice out for its height.

    Returns:
        ``(N, S, S)`` float32, 1 in the largest component within the lung, else 0.
    """
    masks = crops.lungs & (crops.images < settings.aerated)
    broken = broken_windows(masks, settings)
    if joint:
        broken[:int(len(masks) * settings.low)] = False
        broken[int(len(masks) * settings.high):] = False
    result = np.zeros(masks.shape, np.float32)
    for part in parts(masks, joint):
        labels, sizes = _components(broken[part])
        if sizes.max(initial=0):
            result[part] = labels == sizes.argmax()
    return result * crops.lungs


def best_component(activated: np.ndarray, guide: np.ndarray, settings: ComponentSettings = ComponentSettings(), *,
                   joint: bool = True) -> np.ndarray:
    """The component of an activation that overlaps 3DCC most, among its largest.

    The paper keeps one component; so do we, all of it (the public code keeps only what it shares with 3DCC). Our
    choice where none overlaps: the largest.

    Args:
        activated: ``(N, S, S)`` bool, from the class activation map.
        guide: ``(N, S, S)`` bool, from :func:`component_activation`.
        joint: whether the slices are one volume; otherwise one component of each slice is kept.

    Returns:
        ``(N, S, S)`` bool.
    """
    result = np.zeros(activated.shape, bool)
    for part in parts(activated, joint):
        labels, sizes = _components(activated[part])
        ranked = np.argsort(-sizes, kind="stable")[:settings.largest]
        ranked = ranked[sizes[ranked] > 0]
        if len(ranked):
            shared = np.bincount(labels[guide[part]], minlength=len(sizes))[ranked]
            result[part] = labels == ranked[shared.argmax()]  # the first of equals is the larger one
    return result
