"""Chapter 1: from scans to training slices: crop to the lungs, resize, and bring every display window to one scale.

CT sets differ in what their numbers mean: Hounsfield units here, 8-bit grey levels of some display window there.
Two points that every slice contains fix the scale (:func:`normalise`): air in the lung becomes 0 and soft tissue 1.

:class:`WeakSet` is all that weak training ever sees: pictures, lungs, one label a slice. It has no field for
lesion masks, so no stage can look at one by accident; those live in :class:`covidseg.evaluation.evaluate.Truth`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import ndimage as ndi
from skimage.filters import threshold_otsu
from skimage.transform import resize
from torch import Tensor, nn

from covidseg.data.folder import Dataset
from covidseg.data.grey import clean
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import DatasetError, SettingsError
from covidseg.lungs import LungSettings, threshold_lungs, with_bar

CLIP = (-0.3, 1.5)
SMOOTHED = 1 / 256  # standard deviation of the smoothing, as a share of the slice's longer side
CACHED = 4  # slices of 160 pixels whose features a CPU's cache can hold


@dataclass(frozen=True)
class PrepareSettings:
    """How slices are cut out.

    Attributes:
        size: Side of the square crops in pixels; a multiple of 40, so that 5-pixel patches and stride-8 nets fit.
        margin: Width added around the lungs' bounding box, as a fraction of its longer side.
        least_lung: Slices with a smaller share of lung are left out of training.
    """

    size: int = 160
    margin: float = 0.1
    least_lung: float = 0.01

    def __post_init__(self) -> None:
        if self.size <= 0 or self.size % 40:
            raise SettingsError(f"crops of {self.size} pixels do not divide into 5-pixel patches and strides of 8",
                                remedy="Take a multiple of 40")


@dataclass(frozen=True)
class Crops:
    """Crops to the lungs of ``N`` slices, and where they came from.

    Attributes:
        images: ``(N, S, S)`` float32, 0 = air in the lung, 1 = soft tissue, clipped to [-0.3, 1.5].
        lungs: ``(N, S, S)`` bool.
        boxes: ``(N, 4)`` int, top row, left column and side lengths (rows, columns) in the full slice.
    """

    images: np.ndarray
    lungs: np.ndarray
    boxes: np.ndarray

    def __len__(self) -> int:
        return len(self.images)

    def take(self, index: np.ndarray) -> Crops:
        """Some of the slices: ``index`` holds their numbers."""
        return Crops(self.images[index], self.lungs[index], self.boxes[index])


@dataclass(frozen=True)
class WeakSet:
    """Slices with one label each: the only supervision of the method.

    Attributes:
        crops: The pictures and lungs, by threshold or completed (:mod:`covidseg.lungnet`).
        labels: ``(N,)`` int, 1 = the slice shows a lesion.
        patients: ``(N,)`` str, for balanced sampling.
        names: ``(N,)`` str, ``volume:slice``.
    """

    crops: Crops
    labels: np.ndarray
    patients: np.ndarray
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


def slices_at_once(batch: int, side: int) -> int:
    """How many slices go through a net together: ``batch`` up to 160 pixels, fewer of larger ones.

    With as many pixels in each batch, time grows no faster than the number of pixels, and memory not at all.
    """
    return max(1, min(batch, batch * 160 ** 2 // side ** 2))


def slices_in_cache(batch: int, side: int, device: torch.device) -> int:
    """How many of a batch of slices a net should read at a time: few on a CPU, where they then stay in its cache.

    Layers that grow the data go through the slices in such parts; those after them take the whole batch.
    """
    return min(batch, slices_at_once(CACHED, side)) if device.type == "cpu" else batch


def normalise(image: np.ndarray, lung: np.ndarray) -> np.ndarray:
    """Scales a slice by two points measured in it, so that its unit and display window no longer matter.

    Args:
        image: ``(H, W)`` HU or display values.
        lung: ``(H, W)`` bool, not empty.

    Returns:
        ``(H, W)`` float32: 0 at the lung's 10th percentile (air), 1 at the median of the bright tissue around it,
        clipped to [-0.3, 1.5].
    """
    image = image.astype(np.float32)
    air, tissue = air_and_tissue(image, lung)
    return np.clip((image - air) / (tissue - air), *CLIP).astype(np.float32)


def air_and_tissue(image: np.ndarray, lung: np.ndarray) -> tuple[float, float]:
    """The values of :func:`normalise`, same arguments, that become 0 and 1.

    They are measured in a smoothed picture: noise, as of a low dose, pulls the 10th percentile down, and with it the
    whole lung would look denser.
    """
    image = ndi.gaussian_filter(image.astype(np.float32), SMOOTHED * max(image.shape))
    air = np.percentile(image[lung], 10)
    # Tissue close to the lungs only: the air around the patient and burnt-in text say nothing about the window.
    rows, columns = np.flatnonzero(lung.any(axis=1)), np.flatnonzero(lung.any(axis=0))
    near = image[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
    bright = near[near > threshold_otsu(near)] if near.min() < near.max() else near
    return air, max(float(np.median(bright)), float(air) + 1e-3)


def lung_box(lung: np.ndarray, margin: float, aspect: float = 1.0) -> tuple[int, int, int, int]:
    """Square around a lung mask with a margin: top, left, height, width. May reach beyond the slice.

    It is a square in millimetres: with pixels of another ``aspect``, height over width, it has fewer rows or columns.
    """
    rows, columns = np.flatnonzero(lung.any(axis=1)), np.flatnonzero(lung.any(axis=0))
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    side = max(height * aspect, width) * (1 + 2 * margin)  # in widths of a pixel
    tall, wide = int(np.ceil(side / aspect)), int(np.ceil(side))
    return int(rows[0] + height // 2 - tall // 2), int(columns[0] + width // 2 - wide // 2), tall, wide


def crop(image: np.ndarray, box: np.ndarray, size: int, fill: float) -> np.ndarray:
    """Cuts ``box`` out of ``(H, W)``, fills what lies beyond the slice and resizes to ``(size, size)`` float32."""
    top, left, height, width = (int(v) for v in box)
    canvas = np.full((height, width), fill, dtype=np.float32)
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(image.shape[0], top + height), min(image.shape[1], left + width)
    canvas[y0 - top:y1 - top, x0 - left:x1 - left] = image[y0:y1, x0:x1]
    return resize(canvas, (size, size), order=1, anti_aliasing=max(height, width) > size,
                  preserve_range=True).astype(np.float32)


def uncrop(small: np.ndarray, box: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Puts a ``(S, S)`` map back into a full slice of ``shape``; 0 outside the box. Inverse of :func:`crop`."""
    top, left, height, width = (int(v) for v in box)
    large = resize(small.astype(np.float32), (height, width), order=1, preserve_range=True)
    full = np.zeros(shape, dtype=np.float32)
    y0, x0 = max(0, top), max(0, left)
    y1, x1 = min(shape[0], top + height), min(shape[1], left + width)
    full[y0:y1, x0:x1] = large[y0 - top:y1 - top, x0 - left:x1 - left]
    return full


def uncrop_all(maps: np.ndarray, boxes: np.ndarray, found: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Puts the maps of some slices of a volume back into all of its slices.

    Args:
        maps: ``(N, S, S)`` numbers or bool, one map for each crop.
        boxes: ``(N, 4)`` int, where the crops came from.
        found: ``(N,)`` int, the number of each crop's slice.
        shape: of the volume, slices, rows and columns.

    Returns:
        ``shape`` float32, 0 outside the boxes and in slices without a map.
    """
    full = np.zeros(shape, np.float32)
    for k, small, box in zip(found, maps, boxes, strict=True):
        full[k] = uncrop(small, box, shape[1:])
    return full


def crop_masks(masks: np.ndarray, boxes: np.ndarray, size: int) -> np.ndarray:
    """Cuts masks ``(N, H, W)`` out as :func:`make_crops` cuts slices: ``(N, size, size)`` bool."""
    small = [crop(m, b, size, 0.0) > 0.5 for m, b in zip(masks, boxes, strict=True)]
    return np.array(small, bool).reshape(len(boxes), size, size)


def make_crops(pixels: np.ndarray, lungs: np.ndarray, settings: PrepareSettings, aspect: float = 1.0) -> Crops:
    """Normalises and crops slices that have a lung.

    Args:
        pixels: ``(N, H, W)`` HU or display values.
        lungs: ``(N, H, W)`` bool, none of them empty.
        settings: crop size and margin.
        aspect: height of a pixel over its width; those of the crops are square.
    """
    boxes = np.array([lung_box(lung, settings.margin, aspect) for lung in lungs]).reshape(-1, 4)
    images = [crop(normalise(clean(image).values, lung), box, settings.size, 0.0)
              for image, lung, box in zip(pixels, lungs, boxes, strict=True)]
    shape = (len(boxes), settings.size, settings.size)
    return Crops(np.array(images, np.float32).reshape(shape), crop_masks(lungs, boxes, settings.size), boxes)


def net_maps(net: nn.Module, crops: Crops, part: slice) -> tuple[Tensor, Tensor]:
    """Some of the slices as a net takes them: pictures and lungs, ``(B, 1, S, S)`` each.

    They are on the device of the net and in the precision of its weights.
    """
    weight = next(net.parameters())
    pictures, lungs = (torch.from_numpy(maps[part])[:, None].to(weight) for maps in (crops.images, crops.lungs))
    return pictures, lungs


def join_crops(parts: list[Crops]) -> Crops:
    """The slices of several crops, one after another."""
    return Crops(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("images", "lungs", "boxes")))


def weak_set(dataset: Dataset, settings: PrepareSettings = PrepareSettings(),
             lung_settings: LungSettings = LungSettings(), *, progress: bool = False) -> WeakSet:
    """Reads the labelled slices of a data folder; opens images and labels only, never a mask.

    Raises:
        DatasetError: a label names a slice that the volume does not have, or one of the two classes is missing.
        InputFileError: a scan cannot be read, or does not look like chest CT (see :attr:`Dataset.check`).
        NoLungError: a scan shows nothing that could be lung.
    """
    crops, labels, patients, names = [], [], [], []
    for case in with_bar(dataset.cases, "lung masks", progress, "volume"):
        scan = read_scan(case.image)
        labelled = dataset.labelled(case, len(scan.pixels))
        aspect = scan.aspect()
        lungs = threshold_lungs(scan.pixels, lung_settings, aspect=aspect, check=scan if dataset.check else None)
        keep = [k for k in labelled if lungs[k].mean() >= settings.least_lung]
        if keep:
            crops.append(make_crops(scan.pixels[keep], lungs[keep], settings, aspect))
            labels += [case.labels[k] for k in keep]
            patients += [case.patient] * len(keep)
            names += [f"{case.id}:{k}" for k in keep]
    if set(labels) != {0, 1}:
        raise DatasetError("training needs slices with and without a lesion, and lungs in both", path=dataset.root,
                           remedy="Add volumes or correct has_lesion in the label table")
    return WeakSet(join_crops(crops), np.array(labels), np.array(patients), np.array(names))


def with_true_lungs(dataset: Dataset, data: WeakSet) -> WeakSet:
    """The same slices with the lung masks of the data folder, for comparison with lungs that were found.

    Raises:
        DatasetError: a volume has no lung mask.
    """
    lungs = np.zeros_like(data.crops.lungs)
    for case in dataset.cases:
        if case.lung is None:
            raise DatasetError(f"volume {case.id} has no lung mask", path=dataset.root,
                               remedy="Leave the comparison with true lungs out, or add lung/ID.nii.gz")
        mine = np.array([name.rsplit(":", 1)[0] == case.id for name in data.names])
        numbers = [int(name.rsplit(":", 1)[1]) for name in data.names[mine]]
        masks = read_mask(case.lung, like=read_scan(case.image))[numbers]
        lungs[mine] = crop_masks(masks, data.crops.boxes[mine], lungs.shape[-1])
    return replace(data, crops=replace(data.crops, lungs=lungs))


# --- input of the nets ----------------------------------------------------------------------------------------------

def net_input(pictures: Tensor, lungs: Tensor) -> Tensor:
    """Two channels as DeCoVNet takes them: the picture with everything outside the lung set to air, and the lung.

    Args:
        pictures: ``(B, 1, S, S)`` normalised.
        lungs: ``(B, 1, S, S)`` 0 or 1.

    Returns:
        ``(B, 2, S, S)``.
    """
    return torch.cat([pictures * lungs, lungs], dim=1)
