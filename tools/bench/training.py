"""Training: slices a second of each stage, against the loop first written and against the roofline."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from bench.measure import Comparison, Setup, wait
from bench.plain_training import plain_classifier, plain_segmenter
from bench.roofline import counted, measure_machine
from bench.volumes import weak_set
from covidseg.classifier import train_classifier
from covidseg.lungnet import train_lung_net
from covidseg.patches import train_mil
from covidseg.preprocess import WeakSet
from covidseg.profiles import profile_named
from covidseg.segmenter import certainty, train_segmenter

Training = Callable[[int], Any]  # trains this many steps


def silent(line: str) -> None:
    """A log that nobody reads."""


def soft_targets(data: WeakSet) -> np.ndarray:
    """Something like fine labels, ``(N, S, S)`` float32 in [0, 1]: bright pixels of slices with a lesion."""
    bright = np.clip(1.5 * data.crops.images - 0.3, 0, 1) * data.crops.lungs
    return (bright * (data.labels == 1)[:, None, None]).astype(np.float32)


def trainings(data: WeakSet, device: torch.device) -> dict[str, tuple[Training, Training | None, int]]:
    """Each stage: our loop, the plain loop where there is one, and slices a step; sizes of the quick profile."""
    profile, targets = profile_named("quick"), soft_targets(data)
    weights = certainty(targets)
    segmenter = replace(profile.segmenter, refresh=())
    common: dict[str, Any] = {"device": device, "log": silent}
    return {
        "lung net": (lambda n: train_lung_net(data, replace(profile.lung_net, steps=n), **common), None,
                     profile.lung_net.batch),
        "classifier": (lambda n: train_classifier(data, replace(profile.classifier, steps=n), **common),
                       lambda n: plain_classifier(data, replace(profile.classifier, steps=n), device),
                       profile.classifier.batch),
        "patches": (lambda n: train_mil(data, targets, replace(profile.mil, steps=n), **common), None,
                    profile.mil.batch),
        "segmenter": (lambda n: train_segmenter(data, targets, weights, replace(segmenter, steps=n), **common),
                      lambda n: plain_segmenter(data, targets, weights, replace(segmenter, steps=n), device),
                      profile.segmenter.batch),
    }


def step_seconds(training: Training, device: torch.device, few: int, many: int) -> float:
    """Seconds a step without what a training does once: the difference between a long and a short one."""
    times = []
    for steps in (few, many):
        wait(device)
        start = time.perf_counter()
        training(steps)
        wait(device)
        times.append(time.perf_counter() - start)
    return max(times[1] - times[0], 1e-9) / (many - few)


@torch.no_grad()
def difference(one: nn.Module, other: nn.Module, device: torch.device) -> float:
    """Largest difference between the answers of two nets, in probability."""
    inputs = torch.rand(2, 2, 80, 80, generator=torch.Generator().manual_seed(0)).to(device)
    return float((one.to(device)(inputs).sigmoid() - other.to(device)(inputs).sigmoid()).abs().max())


def run(setup: Setup) -> dict[str, Any]:
    data, device = weak_set(setup.size(160, 80)), setup.device
    machine = measure_machine(device, setup.size(2048, 128), setup.size(1 << 26, 1 << 16))
    few, many = setup.size(8, 1), setup.size(40, 2)
    comparisons, stages = [], []
    for name, (ours, plain, batch) in trainings(data, device).items():
        ours(few)  # places to paint, kernels to choose
        rounds = [(step_seconds(ours, device, few, many), plain and step_seconds(plain, device, few, many))
                  for _ in range(max(1, setup.rounds - 2))]
        mine = float(np.median([a for a, _ in rounds]))
        if plain is not None:
            comparisons.append(Comparison(
                f"training the {name}", "the loop first written", "ms a slice", 1e3 * mine / batch,
                1e3 * float(np.median([b for _, b in rounds])) / batch,
                difference=difference(ours(2), plain(2), device),
                tolerance=0.02 if device.type == "cuda" else 1e-4,
                note="difference: answers of the two nets after two steps").as_json())
        steps = 2
        bound, arithmetic = counted(lambda: ours(steps)).seconds(machine)  # noqa: B023  called at once
        stages.append({"stage": name, "slices_per_second": round(batch / mine, 2), "step_ms": round(1e3 * mine, 2),
                       "bound_ms": round(1e3 * bound / steps, 2), "arithmetic_ms": round(1e3 * arithmetic / steps, 2),
                       "share": round(bound / steps / mine, 3)})
    return {"comparisons": comparisons, "roofline": stages,
            "machine": {"gigaflops": round(machine.operations / 1e9, 1),
                        "gigabytes_per_second": round(machine.bandwidth / 1e9, 1)}}
