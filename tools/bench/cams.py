"""Grad-CAM: the fast path against pytorch-grad-cam, for our classifier and for a ResNet-18."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from bench.cam_library import activation_maps_library
from bench.measure import Comparison, Setup, alternating
from bench.volumes import crops
from covidseg.classifier import Classifier
from covidseg.gradcam import Cut, activation_maps, class_activation_maps

CLASS = 3  # of the ResNet's outputs; which one does not matter


def of_resnet(setup: Setup) -> tuple[Callable[[], np.ndarray], Callable[[], np.ndarray]]:
    """Grad-CAM of the last block of a torchvision ResNet-18 with random weights: ours, and the library's."""
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    from torchvision.models import resnet18

    torch.manual_seed(0)
    net = resnet18(weights=None).eval().to(setup.device)  # weights not frozen, as in the library's own examples
    side = setup.size(224, 64)
    pictures = torch.randn(setup.size(32, 2), 3, side, side, device=setup.device)
    trunk = torch.nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool,
                                net.layer1, net.layer2, net.layer3, net.layer4)
    cut = Cut(trunk, [], lambda last, _: net.fc(net.avgpool(last).flatten(1))[:, CLASS])
    targets = [ClassifierOutputTarget(CLASS)] * len(pictures)

    def library() -> np.ndarray:
        with GradCAM(model=net, target_layers=[net.layer4]) as cam:
            return cam(input_tensor=pictures.clone().requires_grad_(True), targets=targets)
    return lambda: class_activation_maps(cut, pictures)[0], library


def run(setup: Setup) -> dict[str, Any]:
    torch.manual_seed(0)
    net = Classifier().eval().requires_grad_(False).to(setup.device)
    some = crops(setup.size(32, 2), setup.size(160, 80))
    ways = {
        f"Grad-CAM of a ResNet-18, {setup.size(32, 2)} pictures of {setup.size(224, 64)} pixels": of_resnet(setup),
        f"Grad-CAM and LayerCAM of our classifier, {len(some)} crops of {some.images.shape[-1]} pixels": (
            lambda: activation_maps(net, some), lambda: activation_maps_library(net, some))}
    rows = []
    for task, (ours, library) in ways.items():
        mine, theirs = alternating([ours, library], setup.rounds, setup.device)
        rows.append(Comparison(task, "pytorch-grad-cam", "ms", 1e3 * mine, 1e3 * theirs, goal=2.5,
                               difference=float(np.abs(ours() - library()).max()), tolerance=1e-5).as_json())
    return {"comparisons": rows}
