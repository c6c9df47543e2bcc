"""What is measured on: a phantom chest at any size, as an array or as a file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from covidseg.data.phantom import PhantomSettings, is_healthy, make_patient
from covidseg.data.scan import Grid, write_like
from covidseg.lungs import threshold_lungs
from covidseg.preprocess import Crops, PrepareSettings, make_crops


@cache
def _chest(size: int) -> np.ndarray:
    """24 slices of an ill phantom patient, ``(24, size, size)`` int16 HU."""
    settings = PhantomSettings(patients=3, size=size)
    return make_patient(settings, next(k for k in range(3) if not is_healthy(settings, k))).hu.astype(np.int16)


def volume(slices: int, size: int = 512) -> np.ndarray:
    """A volume of any length, ``(slices, size, size)`` int16 HU: the chest back and forth, with noise of its own.

    Neighbouring slices are alike, as in a scan, and no slice comes twice.
    """
    chest = _chest(size)
    there_and_back = np.concatenate([chest, chest[::-1]])
    random, result = np.random.default_rng(0), np.empty((slices, size, size), np.int16)
    for k in range(slices):
        result[k] = there_and_back[k % len(there_and_back)] + random.integers(-12, 13, (size, size), np.int16)
    return result


def write_volume(path: Path, slices: int, size: int = 512) -> Path:
    """The volume as a compressed NIfTI file in the voxel order that most files have; kept if it is there."""
    if not path.exists():
        write_like(volume(slices, size), Grid((size, size, slices), np.diag((-0.7, -0.7, 1.0, 1.0))), path)
    return path


@cache
def crops(count: int, size: int = 160) -> Crops:
    """``count`` crops to the lungs of ``size`` pixels, enlarged from crops of 160."""
    pixels = volume(min(count, 48), 256)
    lungs = threshold_lungs(pixels)
    found = np.flatnonzero(lungs.any(axis=(1, 2)))
    some = make_crops(pixels[found], lungs[found], PrepareSettings()).take(np.arange(count) % len(found))
    if size == some.images.shape[-1]:
        return some
    images = F.interpolate(torch.from_numpy(some.images)[:, None], (size, size), mode="bilinear")[:, 0].numpy()
    masks = F.interpolate(torch.from_numpy(some.lungs)[:, None].float(), (size, size))[:, 0].numpy() > 0.5
    return Crops(images, masks, some.boxes)
