"""Stage 5: fine labels, one decision a pixel, from the two tasks together.

The activation map finds whole lesions but blurs them; the patches are precise but blocky. Their log odds are
averaged, and a random walker (Grady, TPAMI 2006) moves the result to the edges of the picture: pixels that both
are sure of are seeds, all others join the seed that is reached most easily through similar brightness.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from scipy import ndimage as ndi
from skimage.segmentation import random_walker

from covidseg.prepare import WeakSet


@dataclass(frozen=True)
class FineSettings:
    """Settings of the fine labels.

    Attributes:
        cam_share: share of the activation map in the averaged log odds; the patches have the rest.
        cam_middle: value of the activation map that counts as one half.
        seed_lesion: pixels above are seeds of the lesion.
        seed_lung: pixels below are seeds of the lung.
        beta: how much a step in brightness hinders the walker.
        smallest: components of fewer pixels are dropped.
    """

    cam_share: float = 0.15
    cam_middle: float = 0.25
    seed_lesion: float = 0.7
    seed_lung: float = 0.3
    beta: float = 130.0
    smallest: int = 12


@dataclass(frozen=True)
class FineLabels:
    """Pseudo-labels for the segmenter.

    Attributes:
        labels: ``(N, S, S)`` bool, lesion.
        probabilities: ``(N, S, S)`` float32, the fused map before the walker.
    """

    labels: np.ndarray
    probabilities: np.ndarray

    @property
    def targets(self) -> np.ndarray:
        """What the segmenter is taught, ``(N, S, S)`` float32: half the walker's decision, half the probability.

        Decisions alone shrink from step to step: a doubtful rim is called lung, and the net learns to call it so.
        """
        return (0.5 * self.labels + 0.5 * self.probabilities).astype(np.float32)

    @property
    def weights(self) -> np.ndarray:
        """How sure the targets are, see :func:`certainty`."""
        return certainty(self.targets)


def certainty(targets: np.ndarray) -> np.ndarray:
    """Weight of a pixel from its target in [0, 1]: 1 where it is sure, half where it is not, same shape.

    Not less than half: lesions are less sure than lung nearly everywhere, and a loss that hardly counts them would
    teach the net to leave them out.
    """
    return (0.5 + 0.5 * np.abs(2 * targets - 1)).astype(np.float32)


def fuse(cam: np.ndarray, patches: np.ndarray, settings: FineSettings) -> np.ndarray:
    """Weighted mean of log odds of the two maps, ``(..., S, S)`` in [0, 1] each."""
    def odds(p: np.ndarray) -> np.ndarray:
        p = np.clip(p, 0.02, 0.98)
        return np.log(p / (1 - p))
    middle = np.log(settings.cam_middle / (1 - settings.cam_middle))
    mixed = settings.cam_share * (odds(cam) - middle) + (1 - settings.cam_share) * odds(patches)
    return (1 / (1 + np.exp(-mixed))).astype(np.float32)


def walk(image: np.ndarray, probability: np.ndarray, lung: np.ndarray, settings: FineSettings) -> np.ndarray:
    """Edge-aware decision for one slice.

    Args:
        image: ``(S, S)`` normalised.
        probability: ``(S, S)`` fused map.
        lung: ``(S, S)`` bool.

    Returns:
        ``(S, S)`` bool inside the lung.
    """
    seeds = np.zeros(image.shape, int)
    seeds[probability > settings.seed_lesion] = 1
    seeds[probability < settings.seed_lung] = 2
    seeds[~lung] = -1  # the walker never enters these
    # Seeds that are cut off by the lung's border help nobody; without both kinds there is nothing to decide.
    if not (seeds == 1).any():
        return np.zeros_like(lung)
    if not (seeds == 2).any():
        return lung & (probability > 0.5)
    regions, _ = ndi.label(lung)
    seeded = np.unique(regions[seeds > 0])
    isolated = lung & ~np.isin(regions, seeded)
    seeds[isolated] = -1
    with warnings.catch_warnings():  # the solver recommends an optional package that is not needed at this size
        warnings.simplefilter("ignore")
        decided = random_walker(image, seeds, beta=settings.beta, mode="cg_j", tol=1e-2) == 1
    parts, _ = ndi.label(decided & lung)
    return (np.bincount(parts.ravel()) >= settings.smallest)[parts] & (parts > 0)


def fine_labels(data: WeakSet, cam: np.ndarray, patches: np.ndarray,
                settings: FineSettings = FineSettings()) -> FineLabels:
    """Fine labels for all training slices; empty where the slice label says that there is no lesion.

    Args:
        data: slices and their labels.
        cam: ``(N, S, S)`` from :func:`covidseg.cam.activation_maps`.
        patches: ``(N, S, S)`` from :func:`covidseg.mil.patch_probabilities`.
    """
    probabilities = fuse(cam, patches, settings) * data.crops.lungs
    probabilities[data.labels == 0] = 0
    labels = np.zeros(cam.shape, bool)
    for k in np.flatnonzero(data.labels == 1):
        labels[k] = walk(data.crops.images[k], probabilities[k], data.crops.lungs[k], settings)
    return FineLabels(labels, probabilities)
