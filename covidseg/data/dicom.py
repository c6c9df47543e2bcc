"""DICOM in: the series of a folder as it comes from a PACS or a CD, and the volume that the slices of one make.

SimpleITK reads the files: it decodes every compressed transfer syntax and applies the rescale slope and intercept of
each. How slices make a volume is decided here, because ITK's own reader of series believes that all distances are
equal, that no slice is missing and that the gantry stands upright.

Tags serve to tell which slices belong together and where they lie; only geometry leaves this module. A listed series
shows its number, size, spacing and the last digits of its UID, which tell series apart and no person. Its description
stays out: people type names, dates and wards into it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from skimage.segmentation import clear_border

from covidseg.data.nifti import SPACING, fitting_memory, kind_of, refuse_huge, scans_in
from covidseg.data.scan import Grid, files_below, is_dicom, shown
from covidseg.errors import InputFileError

CT = {"1.2.840.10008.5.1.4.1.1.2": "CT", "1.2.840.10008.5.1.4.1.1.2.1": "Enhanced CT",
      "1.2.840.10008.5.1.4.1.1.2.2": "Legacy Converted Enhanced CT"}  # SOP classes; others hold screenshots, doses, ...
AIR = -1024          # HU
SAME_PLACE = 0.01    # mm; scanners do not cut finer
EVEN = 0.05, 0.06    # distances are even if no slice lies farther off: share of a distance, and mm (rounded positions)
WIDEST_GAP = 30.0    # mm that may be interpolated; whole lesions fit into more
STRAIGHT = 0.5       # mm that slices may stray sideways
DIGITS = 6           # of a UID, shown and accepted
MENTIONED = 9        # series in an error
NAMED = 3            # files in a warning
# Why a file is no slice of a series, where it may be one all the same: that is said with the names of the files.
UNREADABLE = "DICOM without a picture, or damaged"
NO_DICOM = "no DICOM, so perhaps slices that are empty or cut short"
UNPLACED = "CT without position, direction or spacing"
ASKEW = "CT with a direction that is none"
DISORDERED = "multi-frame CT whose frames are not in even distances or in order"
LOST = (UNREADABLE, NO_DICOM, UNPLACED, ASKEW, DISORDERED)
SLICE = re.compile(r"(\.(dcm|dicom|dic|ima|\d+))?", re.IGNORECASE)  # suffixes of slices; a UID as name ends in a number


@dataclass(frozen=True)
class File:
    """What is known of a CT picture without its pixels.

    Attributes:
        path: The file.
        position: ``(3,)`` mm, centre of the first voxel, in DICOM's axes (left, back, head).
        axes: ``(3, 3)``; its columns are the directions of columns, rows and slices in these axes.
        size: Columns, rows and frames.
        spacing: Millimetres between columns, rows and slices; the last is the thickness of a single frame, or 0.
        acquisition: Which scan of a series it belongs to, in the scanner's own count.
        padding: HU outside of the field of view, if the file says so.
        whole: Whether HU are whole numbers.
    """

    path: Path
    position: np.ndarray
    axes: np.ndarray
    size: tuple[int, int, int]
    spacing: tuple[float, float, float]
    acquisition: str
    padding: float | None
    whole: bool

    def place(self) -> float:
        """Millimetres along the normal of the slice."""
        return float(self.position @ self.axes[:, 2])

    def fits(self, other: File) -> bool:
        """Whether two pictures of one size can be slices of one volume; a file of several frames is one by itself."""
        return self.size[2] == 1 and np.allclose(self.axes, other.axes, atol=1e-2) \
            and np.allclose(self.spacing[:2], other.spacing[:2], rtol=1e-2)


@dataclass(frozen=True)
class Series:
    """Pictures of one size and direction that make a volume, in order along their normal."""

    uid: str
    study: str
    files: tuple[File, ...]

    def slices(self) -> int:
        """How many there are, duplicates included."""
        return sum(file.size[2] for file in self.files)

    def __str__(self) -> str:
        """What a list shows of it."""
        first, count = self.files[0], self.slices()
        gaps = np.diff([file.place() for file in self.files])
        gaps = gaps[gaps > SAME_PLACE]
        mm = (*first.spacing[:2], float(np.median(gaps)) if len(gaps) else first.spacing[2])
        return (f"{count} slice{'s' * (count != 1)} of {first.size[0]} x {first.size[1]}, "
                f"{' x '.join(f'{step:.2f}' for step in mm)} mm, UID ...{self.uid[-DIGITS:]}")


def inputs_in(folder: Path) -> list[Path]:
    """What a folder stands for: the NIfTI files in it, or the folder itself if DICOM files lie in it or below.

    Raises:
        InputFileError: it holds neither, or both, or something in it cannot be opened.
    """
    nifti = scans_in(folder)
    dicom = any(map(is_dicom, files_below(folder)))
    if nifti and dicom:
        raise InputFileError("holds both NIfTI and DICOM files", path=folder,
                             remedy="Name the NIfTI files one by one, or the folder of the DICOM series alone")
    if not nifti and not dicom:
        kinds = Counter(path.suffix.lower() or "without suffix" for path in files_below(folder))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        raise InputFileError(f"holds neither NIfTI nor DICOM, but {found}" if kinds else "is a folder without files",
                             path=folder, remedy="Name .nii or .nii.gz files, or the folder of a DICOM series")
    return nifti or [folder]


def find_series(path: Path) -> tuple[list[Series], dict[str, list[Path]]]:
    """All series of CT in a folder and below, those with most slices first.

    Args:
        path: a folder, or one DICOM file.

    Returns:
        The series, and the files that are no part of one, for each reason; of those that are no DICOM, the ones beside
        DICOM that are named like slices.

    Raises:
        InputFileError: there is no such folder, or something in it cannot be opened.
    """
    if not (kind := kind_of(path)):
        raise InputFileError("no such folder", path=path, remedy="Check the spelling of the path")
    groups: dict[tuple, list[list[File]]] = defaultdict(list)  # of a series, those of one direction and spacing
    skipped: dict[str, list[Path]] = defaultdict(list)
    others = []
    with _silent():
        for name in files_below(path) if kind == "folder" else [path]:
            if not is_dicom(name):
                others += [name] if SLICE.fullmatch(name.suffix) else []
                continue
            found = _read_tags(name)
            if isinstance(found, str):
                skipped[found].append(name)
            else:
                uid, study, file = found
                alike = groups[uid, study, file.size]
                group = next((group for group in alike if group[0].fits(file)), None)
                if group is None:
                    alike.append([file])
                else:
                    group.append(file)
    series = [Series(uid, study, tuple(sorted(files, key=File.place))) for (uid, study, _), alike in groups.items()
              for group in alike for files in _acquisitions(group)]
    if others and (series or skipped):
        skipped[NO_DICOM] = others
    return sorted(series, key=lambda one: (-one.slices(), one.uid, str(one.files[0].path))), skipped


def describe(skipped: dict[str, list[Path]]) -> str:
    """What :func:`find_series` left out, most files first, with the names of those that may be slices."""
    def text(reason: str, files: list[Path]) -> str:
        names = [shown(file.name) for file in files[:NAMED]] + [f"{len(files) - NAMED} more"] * (len(files) > NAMED)
        listed = f": {', '.join(names)}" if reason in LOST else ""
        return f"{reason} ({len(files)} file{'s' * (len(files) != 1)}{listed})"
    return "; ".join(text(*item) for item in sorted(skipped.items(), key=lambda item: -len(item[1])))


def choose(path: Path, wanted: str | None = None) -> tuple[Series, tuple[str, ...]]:
    """The series of CT with most slices, or the one that is wanted, and what else is there, as warnings.

    Args:
        path: a folder, or one DICOM file.
        wanted: number in the list of :func:`find_series`, counted from 1, or UID or its last six digits or more.

    Raises:
        InputFileError: there is no series of CT, or none that is wanted, or several might be meant.
    """
    found, skipped = find_series(path)
    if not found:
        fault = f"is {next(iter(skipped))}" if len(skipped) == 1 else f"holds no CT slices: {describe(skipped)}"
        raise InputFileError(fault, path=path, remedy="Give a series of CT slices")
    listed = "; ".join(f"{number}: {one}" for number, one in enumerate(found[:MENTIONED], start=1))
    listed += "; `covidseg data series` lists all" if len(found) > MENTIONED else ""
    chosen = found if wanted is None else [
        one for number, one in enumerate(found, start=1)
        if wanted in (str(number), one.uid) or (len(wanted) >= DIGITS and one.uid.endswith(wanted))]
    if not chosen:
        raise InputFileError(f"holds no series {wanted}", path=path, remedy=f"Choose one with --series: {listed}")
    if len({one.study for one in chosen}) > 1:
        raise InputFileError("holds series of several examinations", path=path,
                             remedy=f"Name the folder of each, or choose one with --series: {listed}")
    if len(chosen) > 1 and chosen[0].slices() == chosen[1].slices():
        raise InputFileError("holds several series with equally many slices", path=path,
                             remedy=f"Choose one with --series: {listed}")
    warnings = []
    if len(chosen) > 1:
        warnings.append(f"took the series with most slices of {len(chosen)} (`covidseg data series` lists them)")
    warnings += [f"left out: {describe({reason: skipped[reason]})}" for reason in LOST if reason in skipped]
    return chosen[0], tuple(warnings)


def read_series(path: Path, wanted: str | None = None) -> tuple[np.ndarray, Grid, tuple[str, ...]]:
    """Reads a series of CT slices as one volume.

    Args:
        path: a folder, or one DICOM file, which makes a scan of one slice or of its frames.
        wanted: see :func:`choose`.

    Returns:
        HU ``(i, j, k)`` as a NIfTI file would hold them, int16 or float32; their grid; what is odd about them.

    Raises:
        InputFileError: there is no such series, its slices make no volume or one that is too large, or a file is
            damaged or cannot be opened.
    """
    series, warnings = choose(path, wanted)
    first, more = series.files[0], list(warnings)
    if first.size[2] > 1:
        refuse_huge(first.size, path)
        with _silent(), fitting_memory(path):
            voxels = _read_pixels(first)
        step = first.axes[:, 2] * first.spacing[2]
    else:
        step, steps, odd = _stacking(path, series.files)
        more += odd
        refuse_huge((*first.size[:2], round(float(steps[-1])) + 1), path)
        with _silent(), fitting_memory(path):
            voxels, copies = _stack(path, series.files, steps)
        if copies:
            more.append(f"left out {copies} cop{'ies' if copies > 1 else 'y'} of a slice")
    x, y, _ = (first.axes * first.spacing).T
    affine = np.eye(4)
    affine[:3] = np.diag([-1, -1, 1]) @ np.stack([x, y, step, first.position], axis=1)  # DICOM's axes to NIfTI's
    grid = Grid((first.size[0], first.size[1], len(voxels)), affine)
    if not all(SPACING[0] <= distance <= SPACING[1] for distance in grid.spacing()):
        raise InputFileError(f"has voxels of {' x '.join(f'{mm:.3g}' for mm in grid.spacing())} mm, which no CT has",
                             path=path, remedy="Export the series again")
    return voxels.transpose(2, 1, 0), grid, tuple(more)


# --- files ----------------------------------------------------------------------------------------------------------

@contextmanager
def _silent() -> Iterator[None]:
    """Keeps ITK from printing what it thinks of a file, which would quote from it."""
    shown = sitk.ProcessObject.GetGlobalWarningDisplay()
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalWarningDisplay(shown)


def _read_tags(path: Path) -> tuple[str, str, File] | str:
    """UID of series and study of a CT picture, and the picture; or the reason why it is none."""
    reader = sitk.ImageFileReader()
    reader.SetImageIO("GDCMImageIO")
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return UNREADABLE

    def tag(name: str) -> str:
        return reader.GetMetaData(name).strip(" \0") if reader.HasMetaDataKey(name) else ""

    def numbers(name: str, count: int) -> np.ndarray | None:
        try:
            values = np.array([float(text) for text in tag(name).split("\\")])
        except ValueError:
            return None
        return values if len(values) == count and np.isfinite(values).all() else None

    modality, size, spacing = tag("0008|0060"), reader.GetSize(), reader.GetSpacing()
    if modality != "CT":
        return f"{modality if re.fullmatch('[A-Z]{2}', modality) else 'of another kind'}, not CT"
    if tag("0008|0016") not in CT or reader.GetNumberOfComponents() != 1:
        return "a secondary capture (a screenshot or a report)"
    if "LOCALIZER" in tag("0008|0008").upper():
        return "a localizer"
    if size[2] > 1:
        # GDCM reads positions of frames in even distances; otherwise it falls back on 1 mm in all directions. It takes
        # the rescaling of the first frame for all, which scanners write alike.
        if spacing == (1, 1, 1):
            return DISORDERED
        position, axes = np.array(reader.GetOrigin()), np.array(reader.GetDirection()).reshape(3, 3)
    else:
        where, along, pixel = numbers("0020|0032", 3), numbers("0020|0037", 6), numbers("0028|0030", 2)
        if where is None or along is None or pixel is None or not (pixel > 0).all():  # of which GDCM makes 1 mm
            return UNPLACED
        x, y = along[:3], along[3:]
        if not np.allclose([x @ x, y @ y, x @ y], [1, 1, 0], atol=1e-2):
            return ASKEW
        position, axes = where, np.stack([x, y, np.cross(x, y)], axis=1)
        thickness = numbers("0018|0050", 1)
        spacing = (*spacing[:2], 0.0 if thickness is None else float(thickness[0]))
    padding, slope, intercept = (numbers(f"0028|{name}", 1) for name in ("0120", "1053", "1052"))
    if padding is not None:
        padding = padding * (1 if slope is None else slope or 1) + (0 if intercept is None else intercept)
    whole = reader.GetPixelID() not in (sitk.sitkFloat32, sitk.sitkFloat64)
    return tag("0020|000e"), tag("0020|000d"), File(path, position, axes, size, spacing, tag("0020|0012"),
                                                    None if padding is None else float(padding[0]), whole)


def _read_pixels(file: File) -> np.ndarray:
    """HU ``(frames, rows, columns)`` int16 or float32, with air for padding.

    Raises:
        InputFileError: the file is damaged.
    """
    try:
        values = sitk.GetArrayFromImage(sitk.ReadImage(str(file.path), imageIO="GDCMImageIO"))
    except RuntimeError as error:
        raise InputFileError("is damaged, or compressed in a way that cannot be decoded", path=file.path,
                             remedy="Copy the series again, or export it uncompressed") from error
    if file.padding is not None:
        outside = values == file.padding
        if file.padding >= AIR:  # tissue can have that value too: only what reaches the edge of the picture is padding
            outside &= ~np.stack([clear_border(one) for one in outside])
        values[outside] = 0 if values.dtype.kind == "u" else AIR  # without a negative number, air lies near 0
    # GDCM makes 32 bits of 16 with an intercept; what does not fit into 16 is metal.
    return np.clip(values, -32768, 32767).astype(np.int16) if file.whole else values.astype(np.float32)


# --- from slices to a volume ----------------------------------------------------------------------------------------

def _acquisitions(files: list[File]) -> list[list[File]]:
    """A series that passes the same places several times, as the scans it holds, if the scanner counted them."""
    parts: dict[str, list[File]] = defaultdict(list)
    for file in files:
        parts[file.acquisition].append(file)

    def places(part: list[File]) -> int:
        return len({round(file.place() / SAME_PLACE) for file in part})
    each = list(map(places, parts.values()))
    again = sum(each) - places(files)  # a little overlap is no second scan
    return list(parts.values()) if len(parts) > 1 and 2 * again >= min(each) else [files]


def _stacking(path: Path, files: tuple[File, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """How slices lie in a volume that has one distance throughout.

    Returns:
        The step from slice to slice, ``(3,)`` mm in DICOM's axes, which a tilted gantry leaves oblique to the slices;
        the place of each file in steps, ``(files,)``, whole but for uneven distances; warnings.

    Raises:
        InputFileError: too much is missing, or slices stray sideways.
    """
    z, positions = np.array([file.place() for file in files]), np.array([file.position for file in files])
    new = np.diff(z, prepend=-np.inf) > SAME_PLACE
    places = z[new]
    if len(places) == 1:
        thickness = files[0].spacing[2]
        unknown = () if thickness > 0 else ("the thickness of the slice is unknown and taken for 1 mm",)
        return files[0].axes[:, 2] * (thickness if thickness > 0 else 1.0), np.zeros(len(files)), unknown
    gaps = np.diff(places)
    usual = float(np.quantile(gaps, 0.5, method="lower"))  # one that is there, also between a small and a wide gap
    counts = np.maximum(1, np.rint(gaps / usual))
    step = (positions[-1] - positions[0]) / counts.sum()  # the mean, since positions are rounded
    distance = float(step @ files[0].axes[:, 2])
    steps = (z - z[0]) / distance
    if np.linalg.norm(positions - positions[0] - steps[:, None] * step, axis=1).max() > STRAIGHT:
        raise InputFileError("has slices that are shifted sideways against each other", path=path,
                             remedy="Export the series again, or resample it to a regular grid first")
    near = max(EVEN[0], EVEN[1] / distance)
    off = np.abs(steps[new] - np.concatenate([[0], counts.cumsum()]))
    steps = np.where(np.abs(steps - np.rint(steps)) <= near, np.rint(steps), steps)
    odd = np.flatnonzero(np.abs(gaps - distance) > 2 * near * distance)
    if off.max() > near and not len(odd):  # distances that drift
        odd = np.array([min(int(off.argmax()), len(gaps) - 1)])
    if not len(odd):
        return step, steps, ()
    where = ", ".join(f"{places[k]:.1f} and {places[k + 1]:.1f} mm" for k in odd[:3])
    where += f" and at {len(odd) - 3} more places" if len(odd) > 3 else ""
    # NIfTI knows one distance only. To close the gaps would move all that follows, and air in them would cut lungs and
    # lesions apart; so what is missing is interpolated, and said. A gap in which a lesion could hide is refused.
    if gaps.max() > max(WIDEST_GAP, 1.5 * usual) or counts.sum() > 2 * len(gaps):
        raise InputFileError(f"lacks slices: their distance is {usual:.2f} mm, but for that between {where}", path=path,
                             remedy="Export the whole series again, or each part as a series of its own")
    kind = "uneven distances" if off.max() > near else "missing slices"
    return step, steps, (f"{kind} between {where}, elsewhere every {usual:.2f} mm: interpolated there",)


def _stack(path: Path, files: tuple[File, ...], steps: np.ndarray) -> tuple[np.ndarray, int]:
    """HU ``(slices, rows, columns)`` at all whole steps, interpolated where no file lies, and how many were copies.

    Raises:
        InputFileError: two slices at the same place differ, or a file is damaged.
    """
    columns, rows, _ = files[0].size
    whole = all(file.whole for file in files)
    volume = np.empty((round(float(steps[-1])) + 1, rows, columns), np.int16 if whole else np.float32)
    k = copies = 0
    before: tuple[float, float, np.ndarray] | None = None  # millimetres, step and pixels of the last slice
    for file, step in zip(files, steps.tolist(), strict=True):
        pixels = _read_pixels(file)[0]
        if before is not None and file.place() - before[0] <= SAME_PLACE:
            if not np.array_equal(pixels, before[2]):
                raise InputFileError(f"has different slices at the same place ({file.place():.1f} mm)", path=path,
                                     remedy="Export each of its scans as a series of its own")
            copies += 1
            continue
        while k <= step:
            if k == step or before is None:
                volume[k] = pixels
            else:
                share = (k - before[1]) / (step - before[1])
                between = (1 - share) * before[2] + share * pixels
                volume[k] = np.rint(between) if whole else between
            k += 1
        before = file.place(), step, pixels
    return volume, copies
