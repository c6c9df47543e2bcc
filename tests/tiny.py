"""Small things that several test modules share: settings that train in a second, toy slices, one trained run."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bench.measure import PRELOAD
from filelock import FileLock

from covidseg.baselines.ad3d_mil import Ad3dMilSettings
from covidseg.baselines.decovnet import DeCoVNetSettings
from covidseg.baselines.slabs import SlabSettings
from covidseg.classifier import ClassifierSettings
from covidseg.curriculum import MutualSettings
from covidseg.data.folder import load_dataset
from covidseg.evaluation.methods import BaselineProfile
from covidseg.gradcam import CamSettings
from covidseg.lungnet import LungNetSettings
from covidseg.patches import MilSettings
from covidseg.pipeline import Run, write_run
from covidseg.preprocess import Crops, PrepareSettings, WeakSet
from covidseg.profiles import Profile
from covidseg.segmenter import SegmenterSettings
from covidseg.training import Batch, Training

TINY = Profile(
    "quick", prepare=PrepareSettings(size=80), lung_net=LungNetSettings(steps=8, size=64, channels=(4, 8), batch=4),
    classifier=ClassifierSettings(width=4, steps=8, batch=4),
    mil=MilSettings(width=4, steps=8, batch=4), mutual=MutualSettings(rounds=2),
    segmenter=SegmenterSettings(channels=(4, 8, 8), steps=8, batch=4))
SLAB = SlabSettings(depth=2, size=40, step=2)
TINY_BASELINES = BaselineProfile(
    CamSettings(layer_share=0.0), DeCoVNetSettings(steps=2, batch=4), Ad3dMilSettings(steps=2, batch=4),
    DeCoVNetSettings(dims=3, slab=SLAB, steps=2, batch=4), Ad3dMilSettings(dims=3, slab=SLAB, steps=2, batch=4))
STAGES = ("threshold", "lung_net", "weak", "classifier1", "cam1", "mil1", "patches1", "classifier2", "cam2",
          "mil2", "patches2", "fine", "segmenter")
# For processes of tests: a copy of this one has imported everything, which takes a fresh one ten seconds and more.
# Where there is a GPU a copy of a process that computed cannot compute, so one that only imported is copied.
WARM = multiprocessing.get_context("forkserver" if torch.cuda.is_available() else "fork")
WARM.set_forkserver_preload(PRELOAD)


def quiet(line: str) -> None:
    """A log that nobody reads."""


def all_stages(run: Run) -> Run:
    """Computes or reads every stage."""
    run.segmenter()
    return run


def stage_name(run: Run, stage: str) -> str:
    """Name of the file that holds a stage, in whatever folder."""
    return run.store.path(stage, run.key(stage)).name


def weights(net: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in [*net.named_parameters(), *net.named_buffers()]}


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """Bit for bit."""
    first, second = weights(a), weights(b)
    return first.keys() == second.keys() and all(np.array_equal(first[name], second[name]) for name in first)


def nearly_same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    """What is learned, but for the buffers."""
    return all(torch.allclose(one, other, atol=1e-6) for one, other in zip(a.parameters(), b.parameters(), strict=True))


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones as well."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_turn(self: Training, batches: Iterator[Batch], *, hold: Collection[int] = ()) -> Iterator[Batch]:
    """What :meth:`covidseg.training.Training.prefetched` has to agree with: each batch is made when it is asked for."""
    return batches


@contextmanager
def in_double() -> Iterator[None]:
    """Inside the ``with`` block nets are made, trained, stored and used in double precision.

    In single precision the order of a sum, which each processor and number of threads chooses for itself, decides
    much: Adam makes whole steps of rounding where a gradient is nothing else, and a choice by rank or threshold flips
    at the last digit. In double precision no rounding of this kind is as large as a digit that counts.
    """
    def batches(self: Training, made: Iterator[Batch], **rest: Any) -> Iterator[Batch]:
        for batch in made:
            yield tuple(part.double() if part.is_floating_point() else part for part in batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Training, "prefetched", batches)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def toy(count: int, size: int = 40, seed: int = 0) -> tuple[WeakSet, np.ndarray]:
    """Slices of noise in a square lung; every other one holds a bright disk somewhere in it.

    Returns:
        The weak set, patients 0..3 in turn, and the disks ``(N, S, S)`` bool.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size]
    images = rng.normal(0.15, 0.05, (count, size, size)).astype(np.float32)
    lungs = np.zeros(images.shape, bool)
    lungs[:, 5:-5, 5:-5] = True
    disks = np.zeros(images.shape, bool)
    labels = np.arange(count) % 2
    for k in np.flatnonzero(labels):
        y, x = rng.integers(11, size - 11, 2)
        disks[k] = (rows - y) ** 2 + (columns - x) ** 2 <= 36
    images[disks] += 0.5
    images[~lungs] = 1.0
    boxes = np.tile([0, 0, size, size], (count, 1))
    patients = np.array([f"p{k // 2 % 4}" for k in range(count)])
    return WeakSet(Crops(images, lungs, boxes), labels, patients, np.array([f"v:{k}" for k in range(count)])), disks


@functools.cache
def finished_run(data: Path) -> Run:
    """All stages of the tiny profile, with ``run.json``: trained by the process of tests that asks first, read by all.

    Args:
        data: The phantom that all tests share; the run lies beside it. Copy its folder to change anything in it.
    """
    folder = data.with_name("run")
    run = Run(load_dataset(data), TINY, 0, folder, "cpu", quiet)
    with FileLock(folder.with_name("run.lock")):
        if not (folder / "run.json").exists():
            write_run(all_stages(run), "a test")
    return run
