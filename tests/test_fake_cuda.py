"""Every stage trains and answers on a GPU that is not there, so that a tensor left on the CPU is noticed without one.

Torch's fake tensors have shape, type and device, and no values; an operation on two devices raises as on a real GPU.
The loops and predictions run as they are, but for what needs values or a GPU: batches are of zeros, no step is taken
backward, gradients and whatever is read back as an array are zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, TINY_BASELINES, quiet, toy
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from covidseg import patches, segmenter
from covidseg.baselines.ad3d_mil import Ad3dMil
from covidseg.baselines.decovnet import DeCoVNet
from covidseg.baselines.maps import lesion_maps
from covidseg.baselines.training import BaselineSettings, train_baseline
from covidseg.classifier import Guidance, slice_probabilities, train_ensemble
from covidseg.gradcam import CamSettings, activation_maps
from covidseg.lungnet import lung_probabilities, train_lung_net
from covidseg.patches import patch_probabilities, train_mil
from covidseg.segmenter import lesion_probabilities, train_segmenter
from covidseg.training import Training
from covidseg.unet import for_prediction

DATA, DISKS = toy(8, 80)
MAPS = DISKS.astype(np.float32)
HOW: dict[str, Any] = {"device": torch.device("cuda"), "log": quiet}
Losses = list[Tensor]


def maps(channels: int, *sides: int) -> Tensor:
    return torch.zeros(4, channels, *(sides or (80, 80)))


def moved(net: nn.Module, move: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """``Module._apply`` with new weights in place of changed ones: fake ones cannot change their device."""
    for layer in net.modules():
        for held in (layer._parameters, layer._buffers):
            for name, value in held.items():
                if value is not None:
                    new = move(value.detach())
                    held[name] = nn.Parameter(new) if isinstance(value, nn.Parameter) else new
    return net


@contextmanager
def fake_gpu(*batch: Tensor) -> Iterator[Losses]:
    """Inside the ``with`` block CUDA tensors are fake, and each training step gets this batch; gives the losses."""
    losses: Losses = []
    copied, as_array, plan = copy.deepcopy, Tensor.numpy, patches.plan_phase

    def deepcopy(net: Any, memo: Any = None) -> Any:  # whose weights stay the same ones: fake ones cannot be copied
        if memo is None and isinstance(net, nn.Module):
            # Unused ones of MONAI.
            heads = [value for part in net.modules() for value in getattr(part, "heads", None) or []]
            memo = {id(value): value for value in (*net.parameters(), *net.buffers(), *heads)}
        return copied(net, memo)

    def numpy(self: Tensor, **rest: Any) -> np.ndarray:
        if not isinstance(self, FakeTensor):
            return as_array(self, **rest)
        if self.device.type != "cpu":
            raise TypeError("can't convert a CUDA tensor to numpy")
        return np.zeros(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def planned(*arguments: Any, **rest: Any) -> Any:  # on the CPU, from arrays to arrays
        with unset_fake_temporarily():
            return plan(*arguments, **rest)

    def batches(self: Training, *_: Any, **rest: Any) -> Iterator[tuple[Tensor, ...]]:
        for _step in range(self.settings.steps):
            yield tuple(part.to(self.device) for part in batch)

    def bags_loss(scores: Tensor, attention: Tensor, bags: Tensor, pooling: str) -> Tensor:
        """How many bags there are hangs on values; it computes with what it is given and nothing else."""
        return (scores + attention + bags).sum()
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
    with pytest.MonkeyPatch.context() as patch, mode:
        patch.setattr(copy, "deepcopy", deepcopy)
        patch.setattr(Tensor, "numpy", numpy)
        patch.setattr(nn.Module, "_apply", moved)
        patch.setattr(torch.autograd, "grad", lambda score, inputs: [
            torch.zeros_like(each) for each in ([inputs] if isinstance(inputs, Tensor) else inputs)])
        patch.setattr(patches, "plan_phase", planned)
        patch.setattr(patches, "component_loss", bags_loss)
        for name in ("batches", "prefetched"):
            patch.setattr(Training, name, batches)
        patch.setattr(Training, "step", lambda self, loss, /, **shown: losses.extend([loss, *shown.values()]))
        yield losses


def check(losses: Losses, steps: int, of_step: int) -> None:
    assert [(loss.device.type, loss.dim()) for loss in losses] == [("cuda", 0)] * (steps * of_step)


def test_lung_net() -> None:
    settings = replace(TINY.lung_net, steps=1, again=1)
    with fake_gpu(maps(2, 64, 64)) as losses:
        net = train_lung_net(DATA, settings, **HOW)
        assert lung_probabilities(net, DATA.crops, settings).shape == MAPS.shape
        assert lung_probabilities(for_prediction(net), DATA.crops, settings).shape == MAPS.shape
    check(losses, 2, 2)


def test_classifiers_their_guidance_and_their_maps() -> None:
    settings, cam = replace(TINY.classifier, steps=1, members=2), CamSettings(scales=(1.0, 1.2))
    with fake_gpu(maps(3), torch.zeros(4)) as losses:
        net = train_ensemble(DATA, settings, **HOW)
    check(losses, 2, 3)
    with fake_gpu(maps(3), torch.zeros(4)) as losses:
        net = train_ensemble(DATA, settings, guidance=Guidance(MAPS, 2.0), **HOW)
        assert slice_probabilities(net, DATA.crops).shape == (8,)
        assert activation_maps(net, DATA.crops, cam).shape == MAPS.shape
    check(losses, 2, 4)


def test_patches() -> None:
    with fake_gpu(maps(4), torch.zeros(4, dtype=torch.int64)) as losses:
        net, phases = train_mil(DATA, MAPS, replace(TINY.mil, steps=4), **HOW)
        assert patch_probabilities(net, DATA.crops).shape == MAPS.shape
    check(losses, 4, 4)
    assert len(phases) == 4


def segmenter_trained() -> Losses:
    settings = replace(TINY.segmenter, steps=3)
    with fake_gpu(maps(4), torch.zeros(4, dtype=torch.bool)) as losses:
        net = train_segmenter(DATA, DISKS, np.ones_like(MAPS), settings, **HOW)
        for each in (net, for_prediction(net)):
            assert lesion_probabilities(each, DATA.crops).shape == MAPS.shape
    return losses


def test_segmenter() -> None:
    check(segmenter_trained(), 3, 3)


@pytest.mark.parametrize(("make", "settings"), [
    (DeCoVNet, TINY_BASELINES.decovnet), (DeCoVNet, TINY_BASELINES.decovnet_3d),
    (DeCoVNet, replace(TINY_BASELINES.decovnet, weights="chain")),
    (Ad3dMil, TINY_BASELINES.ad3d_mil), (Ad3dMil, TINY_BASELINES.ad3d_mil_3d),
    (Ad3dMil, replace(TINY_BASELINES.ad3d_mil, pooling="mean"))])
def test_earlier_systems(make: Callable[..., Any], settings: BaselineSettings) -> None:
    data = replace(DATA, labels=np.arange(8) // 4)  # so that there are slabs of both classes
    with fake_gpu(maps(2) if settings.dims == 2 else maps(2, 2, 40, 40), torch.zeros(4)) as losses:
        net = train_baseline(lambda: make(settings), data, settings, seed=0, name="a test", **HOW)
        probability, found = lesion_maps(net, DATA.crops)
    assert (probability.shape, found[-1].shape) == ((8,), MAPS.shape)
    check(losses, settings.steps, 2)


def test_what_is_left_on_the_cpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = segmenter.exact_loss
    monkeypatch.setattr(segmenter, "exact_loss", lambda logits, *rest: exact(logits + torch.zeros(80, 80), *rest))
    with pytest.raises(RuntimeError, match=r"on the expected device cuda:0|two different devices"):
        segmenter_trained()


def test_what_is_not_fetched_from_the_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tensor, "cpu", lambda self: self)
    with pytest.raises(TypeError, match="CUDA tensor to numpy"):
        segmenter_trained()
