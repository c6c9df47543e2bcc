"""Whether a scan shows a chest, in CT, and what a person should know of it before its masks are used.

A net answers whatever it is shown. Inverted pictures, MR, animals and pages of text have regions that a threshold takes
for lungs; what tells them apart is looked for here, slice by slice, relative to the brightness of the slice's own air
and soft tissue. The limits stand between the inputs that are tried in ``tests/data/test_chest.py``: chests with
contrast medium, noise, much fat or one lung on one side, everything else on the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage as ndi

from covidseg.errors import InputFileError, NoLungError

TELLING = 0.02             # of the body is air at least, or the slice tells nothing
MOST_AIR, LUNGS = 0.65, 0.1   # of the body is air at most in a chest, and in its fullest slices at least
SOFT, SOFT_SHARE = (0.8, 1.2), 0.5  # fat to muscle, in levels from air 0 to tissue 1, and the least of the body there
BRIGHT, BRIGHT_SHARE = 1.6, 0.12  # level of dense bone, and its share of the body at most
TWO_LUNGS = 0.7            # of the air lies in the two largest regions at least
HAZE = 1.0                 # times as much of the body lies between air and tissue as is air, at most
ENCLOSED = 0.25            # of the air, at most, is the size of bright islands in it
OUTSIDE = 0.12             # level of what surrounds the body, at most: it is air
CLIPPED = 0.5              # of the air has the lowest value of the slice, at most, or nothing can be seen in lungs
RUNS_OUT, LOPSIDED = 0.1, 0.15  # of the picture's edge is air at most, if so little of it is on the other side
ALONE = 0.05               # of the lung is on the other side at most, where it counts as one lung
SMALLEST_CM2 = 8.0         # of air in the fullest slice; a newborn's lungs have more


@dataclass(frozen=True)
class Regions:
    """What thresholds find in one slice, all ``(h, w)`` bool on the working grid.

    Attributes:
        body: The patient, without what lies around.
        aerated: Lung that holds air.
        diseased: What may be lung, between air and soft tissue.
        ends: Where the picture or the field of view ends.
    """

    body: np.ndarray
    aerated: np.ndarray
    diseased: np.ndarray
    ends: np.ndarray


def doubt(image: np.ndarray, region: Regions, split: bool = False) -> str | None:
    """What speaks against a slice of chest CT; an empty text if nothing does, None if the slice cannot tell.

    Args:
        image: ``(h, w)`` slice on the working grid, cleaned (:func:`covidseg.data.grey.clean`).
        region: what thresholds found in it.
        split: whether nothing in the slice lies halfway between dark and bright.
    """
    body, air = int(region.body.sum()), int(region.aerated.sum())
    rest = region.body & ~region.aerated & ~region.diseased
    if air < max(1, TELLING * body) or not rest.any():
        return None
    dark, tissue = np.percentile(image[region.aerated][::4], 10), np.median(image[rest][::4])
    inside, outside = ((image[part] - dark) / max(tissue - dark, 1e-6) for part in (rest, ~region.body))
    if split or _islands(region.aerated) > ENCLOSED * air or (outside.size > TELLING * image.size
                                                              and np.median(outside[::4]) > OUTSIDE):
        return "grey levels seem to be inverted, or negative values wrapped to positive ones: air is not the darkest"
    if (image[region.aerated] <= image.min()).mean() > CLIPPED:
        return "air has one value throughout, so that nothing can be seen in a lung"
    soft = (inside > SOFT[0]) & (inside < SOFT[1])
    if soft.mean() < SOFT_SHARE or (inside > BRIGHT).mean() > BRIGHT_SHARE:
        return "brightness inside the body varies more than that of soft tissue in CT, as in MR or a photograph"
    pieces = np.sort(np.bincount(ndi.label(region.aerated)[0].ravel())[1:])
    if pieces[-2:].sum() < TWO_LUNGS * air or region.diseased.sum() > HAZE * air or air > MOST_AIR * body:
        return "what is dark has not the shape of lungs in a body"
    if (region.aerated & region.ends).sum() > RUNS_OUT * region.ends.sum() \
            and _smaller_side(region.aerated, region.body) < LOPSIDED:
        return "what is dark lies on one side and runs out of the picture"
    return ""


def _islands(air: np.ndarray) -> int:
    """Pixels that a region ``(h, w)`` bool encloses."""
    labels, _ = ndi.label(~air)
    counts = np.bincount(labels.ravel())
    counts[0] = 0
    for edge in (labels[0], labels[-1], labels[:, 0], labels[:, -1]):
        counts[edge] = 0
    return int(counts.sum())


def check_chest(doubts: Sequence[str | None], regions: Sequence[Regions], path: Path, pixel_cm2: float) -> None:
    """Refuses slices that do not look like chest CT.

    Args:
        doubts: of each slice, from :func:`doubt`.
        regions: what thresholds found in each of them.
        path: the file that they come from, which the error names.
        pixel_cm2: area of a pixel of the working grid.

    Raises:
        InputFileError: most slices with enough air to tell speak against it, or the lungs would be tiny.
        NoLungError: no slice shows a dark region inside a body that could be lung, or only small ones.
    """
    if not any(region.aerated.any() for region in regions):
        raise no_lung(path)
    told = [found for found in doubts if found is not None]
    against = Counter(found for found in told if found)
    if 2 * against.total() > len(told):
        reason, _ = against.most_common(1)[0]
        raise InputFileError(
            f"does not look like chest CT: in {against.total()} of {len(told)} slices {reason}", path=path,
            remedy="Give CT of a chest, in HU or a window that shows lungs, air dark; --unchecked lets it pass")
    air = np.array([region.aerated.sum() for region in regions])
    share = air / np.maximum(1, [region.body.sum() for region in regions])
    if not told or np.quantile(share[share > TELLING], 0.9) < LUNGS:
        raise NoLungError("shows too little air in any slice to be chest CT", path=path,
                          remedy="Give slices that show the lungs; --unchecked lets it pass")
    if (area := air.max() * pixel_cm2) < SMALLEST_CM2:
        raise InputFileError(
            f"does not look like chest CT of a person: what is dark in the fullest slice has {area:.1f} cm2",
            path=path, remedy="Check the voxel size in its header (in mm); --unchecked lets it pass")


def no_lung(path: Path) -> NoLungError:
    """The error for a scan that shows no lung."""
    return NoLungError("no lung was found in any slice", path=path,
                       remedy="Give chest CT, in which the air in the lungs is darker than tissue")


def lung_warnings(lungs: Sequence[np.ndarray], regions: Sequence[Regions], volume: bool) -> tuple[str, ...]:
    """What is odd about lungs that were found, one sentence each, with the slices, counted from 0.

    Args:
        lungs: lung of each slice, ``(h, w)`` bool on the working grid.
        regions: what thresholds found in it.
        volume: whether the slices are one body in order.
    """
    there = np.array([lung.any() for lung in lungs])
    found = np.flatnonzero(there).tolist()
    warnings = []
    if volume and len(found) and (gaps := [k for k in range(found[0], found[-1]) if not there[k]]):
        warnings.append(f"no lung was found in slices {spans(gaps)}, between slices that have it")
    if cut := [k for k in found if (lungs[k] & regions[k].ends).sum() > 10]:
        warnings.append(f"the picture ends inside a lung in slices {spans(cut)}: what lies beyond is not seen")
    alone = [k for k in found if _smaller_side(lungs[k], regions[k].body) < ALONE]
    if 2 * len(alone) > len(found):
        warnings.append(f"lung was found on one side only in slices {spans(alone)}: the other may be collapsed, "
                        "removed or without air, and is not looked at")
    return tuple(warnings)


def _smaller_side(lung: np.ndarray, body: np.ndarray) -> float:
    """Share of the lung that lies on the side of the body's middle that has less of it."""
    left = lung[:, :int(np.flatnonzero(body.any(axis=0)).mean())].sum() / lung.sum()
    return float(min(left, 1 - left))


def spans(numbers: Sequence[int]) -> str:
    """Numbers in ascending order as text, runs as ``first-last``: ``0-3, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ", ".join("-".join(map(str, run)) for run in runs)
