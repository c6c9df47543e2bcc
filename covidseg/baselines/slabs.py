"""Slabs: runs of consecutive slices of one volume with one label, what the 3D nets learn from.

Both published systems learn from one label a volume, with as many healthy volumes as ill ones. Where every volume
holds a lesion there is no healthy one, but its ends hold runs of lesion-free slices. A slab is ``T`` labelled slices in
order; it has a lesion if any of its slices has one.

Crops follow the lungs from slice to slice, so neighbours do not lie on each other. A slab needs one frame: the box
around all crops of the volume, as the publications crop to the lungs' box. Nothing is resampled along z, since slice
labels come without a spacing (the publication of DeCoVNet takes 1 mm).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from covidseg.errors import DatasetError, SettingsError
from covidseg.preprocess import Crops, WeakSet


@dataclass(frozen=True)
class SlabSettings:
    """How volumes are cut into slabs.

    Attributes:
        depth: Slices of a slab. The thicker, the fewer slabs are free of lesions.
        size: Side of a slab in pixels, all slices in one frame.
        step: Slices from one slab to the next when a volume is read. In training slabs start at every slice.
        gap: A run ends where the next labelled slice is more than this many usual steps away.
    """

    depth: int = 6
    size: int = 120
    step: int = 3
    gap: float = 2.0

    def __post_init__(self) -> None:
        if self.depth < 1 or not 1 <= self.step <= self.depth:
            raise SettingsError(f"slabs of {self.depth} slices cannot start every {self.step}",
                                remedy="Take a step between 1 and the depth")
        if self.size < 8:
            raise SettingsError(f"slabs of {self.size} pixels vanish in a trunk of stride 8", remedy="Take 8 or more")


@dataclass(frozen=True)
class Slabs:
    """Which slices form a slab, and its label.

    Attributes:
        members: ``(M, T)`` int. Numbers of slices in the weak set, from the feet up.
        labels: ``(M,)`` int. 1 means that at least one of its slices has a lesion.
        patients: ``(M,)`` str.
    """

    members: np.ndarray
    labels: np.ndarray
    patients: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def windows(count: int, depth: int, step: int) -> np.ndarray:
    """Windows of ``depth`` out of ``count`` things in order, ``(M, depth)`` int, that reach all of them.

    The last window ends with the last thing. Fewer things than ``depth`` give one window that repeats the last.
    """
    if count < 1:
        return np.zeros((0, depth), int)
    last = max(count - depth, 0)
    starts = [*range(0, last, step), last]
    return np.minimum(np.array(starts)[:, None] + np.arange(depth), count - 1)


def volumes(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Names ``volume:slice`` taken apart: ``(N,)`` str and ``(N,)`` int."""
    parts = [str(name).rsplit(":", 1) for name in names]
    return np.array([volume for volume, _ in parts]), np.array([int(number) for _, number in parts], int)


def make_slabs(data: WeakSet, settings: SlabSettings = SlabSettings()) -> Slabs:
    """All slabs of all volumes; a run shorter than the depth repeats its last slice.

    Raises:
        DatasetError: no slab has a lesion, or all have one.
    """
    volume, number = volumes(data.names)
    members, labels, patients = [], [], []
    for name in dict.fromkeys(volume.tolist()):
        own = np.flatnonzero(volume == name)
        own = own[np.argsort(number[own], kind="stable")]
        steps = np.diff(number[own])
        usual = float(np.median(steps)) if len(steps) else 1.0
        for run in np.split(own, np.flatnonzero(steps > settings.gap * usual) + 1):
            slabs = run[windows(len(run), settings.depth, 1)]                            # (m, T)
            members.append(slabs)
            labels.append(data.labels[slabs].max(axis=1))
            patients.append(data.patients[slabs[:, 0]])
    result = Slabs(*(np.concatenate(part) for part in (members, labels, patients)))
    if set(result.labels.tolist()) != {0, 1}:
        which = "has a lesion" if not result.labels.any() else "is free of lesions"
        raise DatasetError(f"no slab of {settings.depth} slices {which}",
                           remedy="Take thinner slabs, or label more slices without a lesion")
    return result


def frame(boxes: np.ndarray) -> np.ndarray:
    """The box around boxes ``(N, 4)``, as wide for its height as they are: top, left, height, width, ``(4,)``."""
    low, high = boxes[:, :2].min(axis=0), (boxes[:, :2] + boxes[:, 2:]).max(axis=0)
    sides = np.rint(((high - low) / boxes[0, 2:]).max() * boxes[0, 2:]).astype(int)
    return np.concatenate([(low + high - sides) // 2, sides])


def move(maps: Tensor, source: np.ndarray, target: np.ndarray, size: int, *, beyond: str = "border") -> Tensor:
    """Resamples maps from one box of their slice to another, bilinear: ``(N, size, size)`` float32.

    Args:
        maps: ``(N, S, S)`` float32.
        source: ``(N, 4)`` the boxes that ``maps`` show: top, left, height, width in pixels of the slice.
        target: ``(N, 4)`` or ``(4,)`` the boxes wanted.
        size: side of the result in pixels.
        beyond: what lies outside the source: ``border`` goes on with its edge, ``zeros`` is 0.
    """
    here = torch.as_tensor(source, dtype=torch.float32)
    there = torch.as_tensor(target, dtype=torch.float32).expand_as(here)
    # Both boxes in the source's coordinates, in which it reaches from -1 to 1.
    scale = there[:, 2:] / here[:, 2:]                                                   # (N, 2) rows, columns
    shift = (2 * (there[:, :2] - here[:, :2]) + there[:, 2:]) / here[:, 2:] - 1
    theta = torch.zeros(len(maps), 2, 3)
    theta[:, 0, 0], theta[:, 0, 2] = scale[:, 1], shift[:, 1]                            # grid_sample wants x, y
    theta[:, 1, 1], theta[:, 1, 2] = scale[:, 0], shift[:, 0]
    grid = F.affine_grid(theta, [len(maps), 1, size, size], align_corners=False)
    return F.grid_sample(maps[:, None], grid.to(maps), padding_mode=beyond, align_corners=False)[:, 0]


def aligned(crops: Crops, frames: np.ndarray, size: int) -> Tensor:
    """Pictures and lungs in the frames wanted, ``(N, 4)`` or ``(4,)``: ``(2, N, size, size)`` float32, lungs 0 or 1."""
    picture = move(torch.from_numpy(np.asarray(crops.images, np.float32)), crops.boxes, frames, size)
    lung = move(torch.from_numpy(crops.lungs.astype(np.float32)), crops.boxes, frames, size, beyond="zeros")
    return torch.stack([picture, (lung > 0.5).float()])


def aligned_set(data: WeakSet, size: int) -> Tensor:
    """The slices of a weak set, each in the frame of its volume: ``(2, N, size, size)`` float32."""
    volume, _ = volumes(data.names)
    frames = np.zeros_like(data.crops.boxes)
    for name in np.unique(volume):
        frames[volume == name] = frame(data.crops.boxes[volume == name])
    return aligned(data.crops, frames, size)
