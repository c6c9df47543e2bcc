"""Activation maps of the classifier: the package's own Grad-CAM and LayerCAM against pytorch-grad-cam."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.cam_library import activation_maps_library
from bench.measure import Comparison, Setup, alternating
from bench.volumes import crops
from covidseg.classifier import Classifier
from covidseg.gradcam import activation_maps


def run(setup: Setup) -> dict[str, Any]:
    """Measures both on the same crops; the maps have to agree."""
    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False).to(setup.device)
    some = crops(setup.size(32, 2), setup.size(160, 80))

    def ours() -> np.ndarray:
        return activation_maps(net, some)

    def library() -> np.ndarray:
        return activation_maps_library(net, some)
    mine, theirs = alternating([ours, library], setup.rounds, setup.device)
    row = Comparison(f"Grad-CAM and LayerCAM of our classifier, {len(some)} crops of {some.images.shape[-1]} pixels",
                     "pytorch-grad-cam", "ms", 1e3 * mine, 1e3 * theirs, goal=2.5,
                     difference=float(np.abs(ours() - library()).max()), tolerance=1e-5)
    return {"comparisons": [row.as_json()]}
