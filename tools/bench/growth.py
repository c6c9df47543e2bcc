"""How time and memory grow: twice, four and eight times the slices, and from 128 to 512 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from bench.measure import Setup, exponent, in_fresh_process, limited, say
from bench.training import silent, soft_targets
from bench.volumes import crops, volume, write_volume
from covidseg.classifier import Classifier
from covidseg.data.scan import read_scan
from covidseg.gradcam import activation_maps
from covidseg.lungs import threshold_lungs
from covidseg.patches import PatchNet, patch_probabilities
from covidseg.preprocess import Crops, WeakSet
from covidseg.profiles import profile_named
from covidseg.segmenter import certainty, lesion_probabilities, make_segmenter, train_segmenter

SLICES, SIDE, TIMES, SIDES = 12, 256, (1, 2, 4, 8), (128, 192, 256, 384, 512)
SPEND = 5.0      # seconds on each size: the largest calls take half of it, and the fastest of several counts
LITTLE = 16.0    # MB, below which memory says more about the allocator than about the work
TOLERANCE = 0.1  # of an exponent: caches, and what is paid once

Work = Callable[[], object]


def reading(folder: Path, slices: int, side: int) -> Work:
    path = write_volume(folder / f"growth-{slices}-{side}.nii.gz", slices, side)
    return lambda: len(read_scan(path).pixels)


def masking(folder: Path, slices: int, side: int) -> Work:
    pixels = volume(slices, side)
    return lambda: int(threshold_lungs(pixels, volume=True).sum())


def applying(method: Callable[[Any, Crops], np.ndarray], net: nn.Module, slices: int, side: int) -> Work:
    net, some = net.eval().requires_grad_(False), crops(slices, side)
    return lambda: float(method(net, some).mean())


def activating(folder: Path, slices: int, side: int) -> Work:
    return applying(activation_maps, Classifier(), slices, side)


def judging(folder: Path, slices: int, side: int) -> Work:
    return applying(patch_probabilities, PatchNet(), slices, side)


def segmenting(folder: Path, slices: int, side: int) -> Work:
    return applying(lesion_probabilities, make_segmenter(profile_named("quick").segmenter), slices, side)


def learning(folder: Path, slices: int, side: int) -> Work:
    """A training that sees so many slices: half a batch a step, so that the smallest is two steps."""
    labels = np.arange(24) % 2
    data = WeakSet(crops(24, side), labels, np.array(["patient"] * 24), labels.astype(str))
    settings = replace(profile_named("quick").segmenter, steps=max(1, slices // 6), batch=6, refresh=())

    def learn() -> None:
        targets = soft_targets(data)
        train_segmenter(data, targets, certainty(targets), settings, log=silent)
    return learn


STAGES = {"read a scan": reading, "lung masks": masking, "activation maps": activating, "patch maps": judging,
          "segmenter": segmenting, "train the segmenter": learning}


def run(setup: Setup) -> dict[str, Any]:
    times, sides = ((1, 2), (64, 128)) if setup.small else (TIMES, SIDES)
    slices, side = setup.size(SLICES, 2), setup.size(SIDE, 64)
    spend = 0 if setup.small else SPEND
    points: dict[str, Any] = {}
    limits = []
    for name, prepare in STAGES.items():
        say(f"  {name}")
        points[name] = {}
        for kind, sizes in (("slices", [(slices * k, side) for k in times]), ("pixels", [(slices, s) for s in sides])):
            rows = []
            for count, s in sizes:
                _, seconds, memory = in_fresh_process(prepare, setup.folder, count, s, spend=spend)
                rows.append({"slices": count, "side": s, "seconds": round(seconds, 5), "memory_mb": round(memory, 1)})
            large = rows[-3:]  # small sizes show what is paid once, not how it grows
            pixels = [row["slices"] * row["side"] ** 2 for row in large]
            grown = {"time": exponent(pixels, [row["seconds"] for row in large]),
                     "memory": exponent(pixels, [max(row["memory_mb"], LITTLE) for row in large])}
            points[name][kind] = rows
            limits += [limited(f"{name}: exponent of {what} in {kind}", "", round(value, 3), 1 + TOLERANCE)
                       for what, value in grown.items()]
    return {"limits": limits, "points": points}
