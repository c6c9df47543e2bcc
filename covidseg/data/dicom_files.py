"""What one DICOM file holds: its CT slices, which are its only picture or its frames, and their HU.

SimpleITK reads the files: it decodes every compressed transfer syntax and applies rescale slope and intercept. A file
of frames says in nested tags where each of them lies and how its values become HU. SimpleITK keeps those tags to
itself, and believes that all distances and values follow the first frames; so pydicom reads them.

Tags serve to tell which slices belong together and where they lie; nothing else of them may be shown.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from skimage.segmentation import clear_border

from covidseg.errors import InputFileError

# SOP classes; others hold screenshots, doses, ...
PLAIN_CT = "1.2.840.10008.5.1.4.1.1.2"
ENHANCED_CT = ("1.2.840.10008.5.1.4.1.1.2.1", "1.2.840.10008.5.1.4.1.1.2.2")  # the second: converted from plain CT
AIR = -1024          # HU
# Why a file is no slice of a series, where it may be one all the same (that is said with the names of the files), and
# what to do about it.
UNREADABLE = "DICOM without a picture, or damaged"
NO_DICOM = "no DICOM, so perhaps slices that are empty or cut short"
UNPLACED = "CT without position, direction or spacing"
FRAMES = "multi-frame CT that does not say where each frame lies"
ASKEW = "CT with a direction that is none"
NEGATIVE = "CT stored as a negative (MONOCHROME1)"
LOST = {UNREADABLE: "Copy the series again", NO_DICOM: "Copy the series again",
        UNPLACED: "Export the series again, as slices with all their tags",
        FRAMES: "Export the series again, as single slices or as Enhanced CT",
        ASKEW: "Export the series again",
        NEGATIVE: "Export the series again, with MONOCHROME2 as photometric interpretation"}
# Numbers of a slice: their tag in a plain file, their sequence and keyword among those of a frame, and their count.
NUMBERS = {
    "position": ("0020|0032", "PlanePositionSequence", "ImagePositionPatient", 3),
    "directions": ("0020|0037", "PlaneOrientationSequence", "ImageOrientationPatient", 6),
    "spacing": ("0028|0030", "PixelMeasuresSequence", "PixelSpacing", 2),
    "thickness": ("0018|0050", "PixelMeasuresSequence", "SliceThickness", 1),
    "slope": ("0028|1053", "PixelValueTransformationSequence", "RescaleSlope", 1),
    "intercept": ("0028|1052", "PixelValueTransformationSequence", "RescaleIntercept", 1),
    "acquisition": ("0020|0012", "FrameContentSequence", "FrameAcquisitionNumber", 1)}
Numbers = dict[str, np.ndarray | None]


@dataclass(frozen=True)
class Slice:
    """What is known of a CT slice without its pixels.

    Attributes:
        path: The file that it is in.
        frame: Its number there, from 0.
        uid: The UID of its series.
        study: The UID of its examination; without a UID of the series, all that else tells it apart, never to be shown.
        position: ``(3,)`` mm, centre of the first voxel, in DICOM's axes (left, back, head).
        axes: ``(3, 3)``; its columns are the directions of columns, rows and slices in these axes.
        size: Columns and rows of the slice, and frames of the file.
        spacing: Millimetres between columns and between rows.
        thickness: Millimetres; 0 if unknown.
        acquisition: Which scan of a series it belongs to, in the scanner's own count.
        derived: Whether it was computed from other pictures.
        padding: Value outside of the field of view, if the file says so, as :func:`decode` returns it.
        factor, offset: What to multiply decoded values by, and what then to add, for HU; 1 and 0 but for frames that
            are rescaled in another way than the first.
        whole: Whether HU are whole numbers.
    """

    path: Path
    frame: int
    uid: str
    study: str = field(repr=False)
    position: np.ndarray
    axes: np.ndarray
    size: tuple[int, int, int]
    spacing: tuple[float, float]
    thickness: float
    acquisition: float | None
    derived: bool
    padding: float | None
    factor: float
    offset: float
    whole: bool

    def place(self) -> float:
        """Millimetres along the normal of the slice."""
        return float(self.position @ self.axes[:, 2])

    def fits(self, other: Slice) -> bool:
        """Whether two slices of one size can be slices of one volume."""
        return np.allclose(self.axes, other.axes, atol=1e-2) and np.allclose(self.spacing, other.spacing, rtol=1e-2)


@contextmanager
def silent() -> Iterator[None]:
    """Keeps ITK from printing what it thinks of a file, which would quote from it."""
    before = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(before)


def slices_in(path: Path) -> list[Slice] | str:
    """The CT slices of a DICOM file, one for each frame; or the reason why it holds none."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return UNREADABLE

    def tag(name: str) -> str:
        return reader.GetMetaData(name).strip(" \0") if reader.HasMetaDataKey(name) else ""

    modality, kind, image_type, size = tag("0008|0060"), tag("0008|0016"), tag("0008|0008").upper(), reader.GetSize()
    if modality != "CT":
        return f"{modality if re.fullmatch('[A-Z]{2}', modality) else 'of another kind'}, not CT"
    if kind not in (PLAIN_CT, *ENHANCED_CT) or reader.GetNumberOfComponents() != 1:
        return "a secondary capture (a screenshot or a report)"
    if "LOCALIZER" in image_type:
        return "a localizer"
    if tag("0028|0004") == "MONOCHROME1":  # GDCM inverts the values of which HU are made, or fails, as of 12 bits
        return NEGATIVE
    if kind == PLAIN_CT and size[2] > 1:
        return FRAMES
    frames = _frames(path) if kind in ENHANCED_CT else [
        {name: _numbers(tag(number).split("\\"), count) for name, (number, _, _, count) in NUMBERS.items()}]
    if len(frames) != size[2]:
        return FRAMES
    uid, study = tag("0020|000e"), tag("0020|000d")
    if not uid:  # badly anonymised: several people may be in a folder tree, or even in a folder
        study = "\\".join((study, *map(tag, ("0010|0020", "0020|0052", "0020|0011")), str(path.parent)))
    padding = _numbers(tag("0028|0120").split("\\"), 1)
    applied = _rescaling(frames[0])  # to all frames, by GDCM
    whole = reader.GetPixelID() not in (sitk.sitkFloat32, sitk.sitkFloat64)
    slices = []
    for number, told in enumerate(frames):
        position, directions, pixel, thickness, acquisition = map(
            told.get, ("position", "directions", "spacing", "thickness", "acquisition"))
        if position is None or directions is None or pixel is None or not (pixel > 0).all():
            return UNPLACED
        x, y = directions[:3], directions[3:]
        if not np.allclose([x @ x, y @ y, x @ y], [1, 1, 0], atol=1e-2):
            return ASKEW
        slope, intercept = _rescaling(told)
        factor = slope / applied[0]
        slices.append(Slice(
            path, number, uid, study, position, np.stack([x, y, np.cross(x, y)], axis=1), size,
            spacing=(float(pixel[1]), float(pixel[0])), thickness=0.0 if thickness is None else float(thickness[0]),
            acquisition=None if acquisition is None else float(acquisition[0]),
            derived=image_type.startswith("DERIVED"),
            padding=None if padding is None else float(padding[0]) * applied[0] + applied[1],
            factor=factor, offset=intercept - factor * applied[1],
            whole=whole and slope.is_integer() and intercept.is_integer()))
    return slices


def _frames(path: Path) -> list[Numbers]:
    """The numbers of each frame of an Enhanced CT; none if it is damaged.

    What all frames share is asked for first, as GDCM does.
    """
    import pydicom  # which plain files can do without

    groups = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")

    def numbers(frame: Any) -> Numbers:
        found: Numbers = {}
        for name, (_, sequence, keyword, count) in NUMBERS.items():
            items = shared.get(sequence) or frame.get(sequence)
            found[name] = _numbers(items[0].get(keyword), count) if items else None
        return found
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would quote from the file
            data = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(groups))
            shared = (data.get(groups[0]) or [{}])[0]
            return [numbers(frame) for frame in data.get(groups[1]) or []]
    except Exception:  # pydicom meets damage with errors of many kinds
        return []


def _numbers(values: Any, count: int) -> np.ndarray | None:
    """Values of a tag as ``(count,)`` float; None if they are others or not as many."""
    try:
        numbers = np.array(values, float).ravel()
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == count and np.isfinite(numbers).all() else None


def _rescaling(told: Numbers) -> tuple[float, float]:
    """Slope and intercept from stored values to HU."""
    slope, intercept = told["slope"], told["intercept"]
    return 1.0 if slope is None else float(slope[0]) or 1.0, 0.0 if intercept is None else float(intercept[0])


def decode(path: Path) -> np.ndarray:
    """Values ``(frames, rows, columns)`` of a file, all rescaled as the first frame is.

    Raises:
        InputFileError: the file is damaged.
    """
    try:
        values: np.ndarray = sitk.GetArrayFromImage(sitk.ReadImage(str(path), imageIO="GDCMImageIO"))
    except RuntimeError as error:
        raise InputFileError("is damaged, or compressed in a way that cannot be decoded", path=path,
                             remedy="Copy the series again, or export it uncompressed") from error
    return values


def to_hu(values: np.ndarray, one: Slice) -> np.ndarray:
    """HU ``(rows, columns)``, int16 or float32, of the decoded values of a slice, with air for padding."""
    hu = values.copy()
    if (one.factor, one.offset) != (1, 0):
        hu = values * one.factor + one.offset
        hu = np.rint(hu) if one.whole else hu
    if one.padding is not None:
        outside = values == one.padding
        if one.padding * one.factor + one.offset >= AIR:
            # Tissue can have that value too: only what reaches the edge of the picture is padding.
            outside &= ~clear_border(outside)
        hu[outside] = 0 if hu.dtype.kind == "u" else AIR  # without a negative number, air lies near 0
    # GDCM makes 32 bits of 16 with an intercept; what does not fit into 16 is metal.
    return np.clip(hu, -32768, 32767).astype(np.int16) if one.whole else hu.astype(np.float32)
