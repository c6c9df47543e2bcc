"""How time and memory grow: twice, four and eight times the slices, and from 128 to 512 pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.measure import Limit, Setup, exponent, in_fresh_process, say
from bench.training import silent, soft_targets
from bench.volumes import crops, volume, write_volume
from covidseg.classifier import Classifier
from covidseg.data.scan import read_scan
from covidseg.gradcam import activation_maps
from covidseg.lungs import lung_masks
from covidseg.patches import PatchNet, patch_probabilities
from covidseg.preprocess import WeakSet
from covidseg.profiles import profile_named
from covidseg.segmenter import certainty, lesion_probabilities, make_segmenter, train_segmenter

SLICES, SIDE, TIMES, SIDES = 12, 256, (1, 2, 4, 8), (128, 192, 256, 384, 512)
SPEND = 5.0      # seconds on each size: the largest calls take half of it, and the fastest of several counts
LITTLE = 16.0    # MB, below which memory says more about the allocator than about the work
TOLERANCE = 0.1  # of an exponent: caches, and what is paid once


# What is made before the clock starts, and what is measured; results are small, for the way back.

def file_of(folder: Path, slices: int, side: int) -> Path:
    return write_volume(folder / f"growth-{slices}-{side}.nii.gz", slices, side)


def read(path: Path) -> int:
    return len(read_scan(path).pixels)


def mask_lungs(pixels: Any) -> int:
    return int(lung_masks(pixels, volume=True).sum())


def _with(net: torch.nn.Module, slices: int, side: int) -> tuple[torch.nn.Module, Any]:
    return net.eval().requires_grad_(False), crops(slices, side)


def classifier_of(slices: int, side: int) -> Any:
    return _with(Classifier(), slices, side)


def activate(given: Any) -> float:
    return float(activation_maps(*given).mean())


def patches_of(slices: int, side: int) -> Any:
    return _with(PatchNet(), slices, side)


def judge(given: Any) -> float:
    return float(patch_probabilities(*given).mean())


def segmenter_of(slices: int, side: int) -> Any:
    return _with(make_segmenter(profile_named("quick").segmenter), slices, side)


def segment(given: Any) -> float:
    return float(lesion_probabilities(*given).mean())


def lesson_of(slices: int, side: int) -> Any:
    """A training that sees so many slices: half a batch a step, so that the smallest is two steps."""
    some, labels = crops(24, side), np.arange(24) % 2
    return WeakSet(some, labels, np.array(["patient"] * 24), labels.astype(str)), max(1, slices // 6)


def learn(given: Any) -> int:
    data, steps = given
    targets = soft_targets(data)
    settings = replace(profile_named("quick").segmenter, steps=steps, batch=6, refresh=())
    train_segmenter(data, targets, certainty(targets), settings, log=silent)
    return steps


def stages(folder: Path) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """Each stage: what is made before the clock starts, and what is measured."""
    return {"read a scan": (partial(file_of, folder), read), "lung masks": (volume, mask_lungs),
            "activation maps": (classifier_of, activate), "patch maps": (patches_of, judge),
            "segmenter": (segmenter_of, segment), "train the segmenter": (lesson_of, learn)}


def run(setup: Setup) -> dict[str, Any]:
    times, sides = ((1, 2), (64, 128)) if setup.small else (TIMES, SIDES)
    slices, side = setup.size(SLICES, 2), setup.size(SIDE, 64)
    spend = 0 if setup.small else SPEND
    points: dict[str, Any] = {}
    limits = []
    for name, (prepare, work) in stages(setup.folder).items():
        say(f"  {name}")
        points[name] = {}
        for kind, sizes in (("slices", [(slices * k, side) for k in times]), ("pixels", [(slices, s) for s in sides])):
            rows = []
            for count, s in sizes:
                _, seconds, memory = in_fresh_process(work, count, s, prepare=prepare, spend=spend)
                rows.append({"slices": count, "side": s, "seconds": round(seconds, 5), "memory_mb": round(memory, 1)})
            large = rows[-3:]  # small sizes show what is paid once, not how it grows
            pixels = [row["slices"] * row["side"] ** 2 for row in large]
            grown = {"time": exponent(pixels, [row["seconds"] for row in large]),
                     "memory": exponent(pixels, [max(row["memory_mb"], LITTLE) for row in large])}
            points[name][kind] = rows
            limits += [Limit(f"{name}: exponent of {what} in {kind}", "", round(value, 3), 1 + TOLERANCE).as_json()
                       for what, value in grown.items()]
    return {"limits": limits, "points": points}
