"""Activation maps of the classifier: the package's own Grad-CAM and LayerCAM against pytorch-grad-cam."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from bench.cam_library import activation_maps_library
from bench.measure import Setup, alternating, comparison
from bench.volumes import crops
from covidseg.classifier import Classifier
from covidseg.gradcam import activation_maps


def run(setup: Setup) -> dict[str, Any]:
    """Measures both on the same crops; the maps have to agree."""
    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False).to(setup.device)
    some = crops(setup.size(32, 2), setup.size(160, 80))

    ways = (lambda: activation_maps(net, some), lambda: activation_maps_library(net, some))
    mine, theirs = alternating(ways, setup.rounds, setup.device)
    row = comparison(f"Grad-CAM and LayerCAM of our classifier, {len(some)} crops of {some.images.shape[-1]} pixels",
                     "pytorch-grad-cam", "ms", 1e3 * mine, 1e3 * theirs, goal=2.5,
                     difference=float(np.abs(ways[0]() - ways[1]()).max()), tolerance=1e-5)
    return {"comparisons": [row]}
