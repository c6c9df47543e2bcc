"""Training: slices a second of each stage, against the loop first written and against the roofline.

The loop first written is the same loop without what makes it fast (:func:`plainly`): same draws, same losses, same
optimiser, so that the nets come out the same up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor, nn

from bench.measure import Setup, comparison, timed
from bench.roofline import counted, measure_machine, seconds_of
from covidseg.classifier import train_classifier
from covidseg.data.folder import load_dataset
from covidseg.data.phantom import PhantomSettings, write_phantom
from covidseg.lungnet import train_lung_net
from covidseg.patches import train_mil
from covidseg.preprocess import PrepareSettings, WeakSet, weak_set
from covidseg.profiles import profile_named
from covidseg.segmenter import certainty, train_segmenter
from covidseg.training import Batch

Training = Callable[[int], Any]  # trains this many steps
COMPARED = ("classifier", "segmenter")
SHORT = 2  # steps of the trainings that are looked at, not timed


def silent(line: str) -> None:
    """A log that nobody reads."""


def soft_targets(data: WeakSet) -> np.ndarray:
    """Something like fine labels, ``(N, S, S)`` float32 in [0, 1]: bright pixels of slices with a lesion."""
    bright = np.clip(1.5 * data.crops.images - 0.3, 0, 1) * data.crops.lungs
    return (bright * (data.labels == 1)[:, None, None]).astype(np.float32)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside the block trainings run as one writes them first: a batch is prepared, then the net computes.

    There is no thread that makes the next batches, no layout of memory for convolutions, and no bfloat16 on a GPU.
    """
    def in_turn(batches: Iterator[Batch], device: torch.device, **rest: Any) -> Iterator[Batch]:
        return (tuple(part.to(device) for part in batch) for batch in batches)

    def on_device(net: nn.Module, device: torch.device) -> nn.Module:
        return net.to(device)

    def run_net(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        return function(*inputs)
    with patch.multiple("covidseg.training", overlapped=in_turn, on_device=on_device), \
            patch("covidseg.training.Training.run", staticmethod(run_net)):
        yield


def trainings(data: WeakSet, device: torch.device) -> dict[str, tuple[Training, int]]:
    """Each stage and its slices a step; sizes of the quick profile."""
    profile, targets = profile_named("quick"), soft_targets(data)
    weights = certainty(targets)
    segmenter = replace(profile.segmenter, refresh=())
    common: dict[str, Any] = {"device": device, "log": silent}
    return {
        "lung net": (lambda n: train_lung_net(data, replace(profile.lung_net, steps=n), **common),
                     profile.lung_net.batch),
        "classifier": (lambda n: train_classifier(data, replace(profile.classifier, steps=n), **common),
                       profile.classifier.batch),
        "patches": (lambda n: train_mil(data, targets, replace(profile.mil, steps=n), **common), profile.mil.batch),
        "segmenter": (lambda n: train_segmenter(data, targets, weights, replace(segmenter, steps=n), **common),
                      profile.segmenter.batch)}


def step_seconds(training: Training, device: torch.device, few: int, many: int) -> float:
    """Seconds a step without what a training does once: the difference between a long and a short one."""
    short, long = (timed(partial(training, steps), device) for steps in (few, many))
    return max(long - short, 1e-9) / (many - few)


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, device: torch.device) -> float:
    """Largest difference between the answers of two nets, in probability."""
    inputs = torch.rand(2, 2, 80, 80, generator=torch.Generator().manual_seed(0)).to(device)
    return float((one.to(device)(inputs).sigmoid() - other.to(device)(inputs).sigmoid()).abs().max())


def run(setup: Setup) -> dict[str, Any]:
    device, phantom = setup.device, write_phantom(setup.folder / "phantom", PhantomSettings(patients=3))
    data = weak_set(load_dataset(phantom), PrepareSettings(size=setup.size(160, 80)))
    machine = measure_machine(device, setup.size(2048, 128), setup.size(1 << 26, 1 << 16))
    few, many = setup.size(8, 1), setup.size(40, 2)
    comparisons, stages = [], []
    for name, (train, batch) in trainings(data, device).items():
        def plain(steps: int, train: Training = train) -> Any:
            with plainly():
                return train(steps)
        train(few)  # places to paint, kernels to choose
        ways = [train, plain] if name in COMPARED else [train]
        rounds = [[step_seconds(way, device, few, many) for way in ways] for _ in range(max(1, setup.rounds - 2))]
        mine, *other = np.median(rounds, axis=0).tolist()
        if other:
            comparisons.append(comparison(
                f"training the {name}", "the loop first written", "ms a slice", 1e3 * mine / batch,
                1e3 * other[0] / batch, difference=difference(train(SHORT), plain(SHORT), device),
                tolerance=0.02 if device.type == "cuda" else 1e-4,
                note="difference: answers of the two nets after two steps"))
        bound, arithmetic = seconds_of(counted(lambda train=train: train(SHORT)), machine)
        stages.append({"stage": name, "slices_per_second": round(batch / mine, 2), "step_ms": round(1e3 * mine, 2),
                       "bound_ms": round(1e3 * bound / SHORT, 2), "arithmetic_ms": round(1e3 * arithmetic / SHORT, 2),
                       "share": round(bound / SHORT / mine, 3)})
    return {"comparisons": comparisons, "roofline": stages,
            "machine": {"gigaflops": round(machine.operations / 1e9, 1),
                        "gigabytes_per_second": round(machine.bandwidth / 1e9, 1)}}
