"""Lung masks by thresholding: stage 1 of the method, with no learning and no hand-drawn mask.

The abstract begins with "threshold segmentation" of the lungs, so that what surrounds them does not interfere
with the classifier. A plain threshold fails on exactly the patients that matter: consolidated lung is as bright
as the chest wall and drops out. The steps here keep most diseased lung in; what stays out is solid consolidation
that lies broadly against the chest wall without a hazy rim, which no threshold can tell from the wall:

1. Otsu's threshold finds the *body* (largest bright component, holes filled), which leaves out air around the
   patient, the table and burnt-in text.
2. Two brightness levels are measured inside it: ``air`` (10th percentile of the dark pixels) and ``tissue``
   (median of the bright ones). Everything below is relative to them, so Hounsfield units and 8-bit display
   windows are treated alike.
3. *Aerated lung* lies less than ``air_level`` of the way from air to tissue. Small components (trachea, bowel
   gas) are dropped; in a volume the two lungs are the largest components in three dimensions.
4. *Diseased lung* lies less than ``lesion_level`` of the way, is thicker than the blurred rim of every lung
   (an opening removes thin rings), and touches aerated lung.
5. Each side is closed and its holes (vessels, nodules) are filled. Where much of a side is diseased, the radius
   grows and the part of its convex hull near the chest wall is added: pleural lesions have the wall's brightness.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from covidseg.errors import InputFileError, NoLungError
from covidseg.lungslice import (
    LungSettings,
    Regions,
    complete,
    enlarge,
    grid_shape,
    looks_like_ct,
    regions,
    to_grid,
    without_trachea,
)
from covidseg.morphology import sizes


def lung_masks(pixels: np.ndarray, settings: LungSettings = LungSettings(),
               volume: bool | None = None, *, check: Path | None = None) -> np.ndarray:
    """Threshold lung masks of all slices.

    Args:
        pixels: ``(S, H, W)`` upright slices, HU or display values of any window.
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured by :func:`is_volume`.
        check: of this file, see :meth:`LungPasses.check`; by default the slices are taken for CT.

    Returns:
        ``(S, H, W)`` bool. A slice without lung is all False.
    """
    passes = LungPasses(settings, volume).look_at(pixels)
    if check is not None:
        passes.check(check)
    masks = np.zeros(pixels.shape, dtype=bool)
    for k, mask in enumerate(masks):
        mask[:] = passes.mask(k)
    return masks


class LungPasses:
    """Lung masks of slices that come one after another, twice at most, and are never all held at once.

    What is lung in a volume depends on all of its slices. The first pass looks at each of them and keeps little of it:
    packed outlines, a few kilobytes a slice, and which components touch those of the slice before. After it, masks can
    be had in any order, without the slices.

    Args:
        settings: see :class:`LungSettings`.
        volume: whether the slices are one body in order. Default: measured as by :func:`is_volume`.
    """

    def __init__(self, settings: LungSettings = LungSettings(), volume: bool | None = None) -> None:
        self.settings = settings
        self._volume, self._neighbours = volume, _Neighbours()
        self._shape: tuple[int, ...] = (0, 0)
        self._packed: list[bytes] = []
        # Of each slice: pixels of the components of its aerated lung and of its body; (2, T) numbers of the components
        # in the slice before and in this one that touch.
        self._areas: list[np.ndarray] = []
        self._bodies: list[int] = []
        self._plausible: list[bool | None] = []
        self._touching: list[np.ndarray] = []
        self._last: np.ndarray | None = None
        self._kept: list[np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._packed)

    def look(self, image: np.ndarray) -> None:
        """First pass: the next slice, ``(H, W)``, in order and all of one shape."""
        if self._volume is None:
            self._neighbours.look(image)
        small = to_grid(image, self.settings.grid)
        region = regions(small, self.settings)
        labels, count = ndi.label(region.aerated)
        before = np.zeros_like(labels) if self._last is None else self._last
        touch = np.zeros((before.max() + 1, count + 1), dtype=bool)
        touch[before, labels] = True
        self._shape, self._last, self._kept = image.shape, labels, None
        self._areas.append(sizes(labels))
        self._bodies.append(int(region.body.sum()))
        self._touching.append(np.argwhere(touch[1:, 1:]).T + 1)
        self._packed.append(region.packed())
        self._plausible.append(looks_like_ct(small, region))

    def look_at(self, slices: Iterable[np.ndarray]) -> LungPasses:
        """The whole first pass; returns itself."""
        for image in slices:
            self.look(image)
        return self

    def check(self, path: Path) -> None:
        """Between the passes: whether the slices look like chest CT at all.

        Raises:
            InputFileError: they do not; or ...
            NoLungError: no slice shows a dark region inside a body that could be lung, or only tiny ones.
        """
        if not any(len(areas) > 1 for areas in self._areas):
            raise no_lung(path)
        known = [plausible for plausible in self._plausible if plausible is not None]
        if not known:
            raise NoLungError("shows too little air in any slice to be chest CT", path=path,
                              remedy="Give slices that show the lungs; --unchecked lets it pass")
        if 2 * sum(known) < len(known):
            raise InputFileError(
                f"does not look like chest CT: in {len(known) - sum(known)} of {len(known)} slices the brightness "
                "inside the body is another", path=path,
                remedy="Give CT, not MR or photographs, in HU or a window that shows lungs; --unchecked lets it pass")

    def mask(self, k: int) -> np.ndarray:
        """Second pass: the lung in slice ``k``, ``(H, W)`` bool; all False where there is none."""
        if self._kept is None:
            self._kept = self._in_3d() if self.is_volume() else self._in_each()
        if not self._kept[k].any():
            return np.zeros(self._shape, dtype=bool)
        region = Regions.unpacked(self._packed[k], grid_shape(self._shape, self.settings.grid))
        lung = without_trachea(self._kept[k][ndi.label(region.aerated)[0]], region.body)
        return enlarge(complete(lung, region, self.settings), self._shape)

    def is_volume(self) -> bool:
        """Whether the slices seen so far are taken for one body in order."""
        return self._neighbours.alike() if self._volume is None else self._volume

    def _in_each(self) -> list[np.ndarray]:
        """Which components of each slice are large enough to be lung by themselves."""
        return [areas > self.settings.smallest * body for areas, body in zip(self._areas, self._bodies, strict=True)]

    def _in_3d(self) -> list[np.ndarray]:
        """Which components of each slice belong to the largest ones in three dimensions."""
        first = np.cumsum([0, *map(len, self._areas)])  # number of each slice's background among those of all slices
        pairs = np.concatenate([touch + first[[k - 1, k], None] for k, touch in enumerate(self._touching)], axis=1)
        areas = np.concatenate(self._areas)
        links = coo_array((np.ones(pairs.shape[1], bool), tuple(pairs)), shape=(len(areas), len(areas)))
        body = connected_components(links, directed=False)[1]
        volumes = np.bincount(body, areas)
        kept = (volumes > self.settings.smallest_3d * volumes.max())[body] & (areas > 0)
        return np.split(kept, first[1:-1])


def no_lung(path: Path) -> NoLungError:
    """The error for a scan that shows no lung."""
    return NoLungError("no lung was found in any slice", path=path,
                       remedy="Give chest CT, in which the air in the lungs is darker than tissue")


def is_volume(pixels: np.ndarray) -> bool:
    """Whether neighbouring slices of ``(S, H, W)`` look alike, as in a volume, or are unrelated pictures."""
    neighbours = _Neighbours()
    for image in pixels:
        neighbours.look(image)
    return neighbours.alike()


class _Neighbours:
    """How much each slice looks like the one before; constant slices, which look like nothing, are left out."""

    def __init__(self) -> None:
        self._last: np.ndarray | None = None
        self._likeness: list[float] = []

    def look(self, image: np.ndarray) -> None:
        small = to_grid(image, 32).ravel()  # about 1024 numbers
        if small.std() > 0:
            if self._last is not None:
                self._likeness.append(np.corrcoef(self._last, small)[0, 1])
            self._last = small

    def alike(self) -> bool:
        return bool(self._likeness) and bool(np.median(self._likeness) > 0.9)
