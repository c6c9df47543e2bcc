"""DICOM in: the series of a folder as it comes from a PACS or a CD, and the volume that the slices of one make.

How slices make a volume is decided here, because ITK's own reader of series believes that all distances are equal, that
no slice is missing and that the gantry stands upright. A file of several frames is a bundle of slices.

Only geometry leaves this module. A listed series shows its number, size, spacing, plane and the last digits of its UID,
which tell series apart and no person. Its description stays out: people type names, dates and wards into it.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from covidseg.data.dicom_files import LOST, NO_DICOM, Slice, decode, silent, slices_in, to_hu
from covidseg.data.nifti import SPACING, fitting_memory, is_scan, kind_of, refuse_huge, scans_in
from covidseg.data.scan import Grid, files_below, is_dicom, shown
from covidseg.errors import InputFileError

PLANES = ("sagittal", "coronal", "axial")  # by the axis of the body, left, back or head, that is square to the slices
ALONG = 0.85         # cosine of the angle to that axis: 32 degrees, since a gantry tilts by up to 30
SAME_PLACE = 0.01    # mm; scanners do not cut finer
EVEN = 0.05, 0.06    # distances are even if no slice lies farther off: share of a distance, and mm (rounded positions)
WIDEST_GAP = 30.0    # mm that may be interpolated; whole lesions fit into more
STRAIGHT = 0.5       # mm that slices may stray sideways
DIGITS = 6           # of a UID, shown and accepted
MENTIONED = 9        # series in an error
NAMED = 3            # files in a warning
SLICE = re.compile(r"(\.(dcm|dicom|dic|ima|\d+))?", re.IGNORECASE)  # suffixes of slices; a UID as name ends in a number


@dataclass(frozen=True)
class Series:
    """Slices of one size and direction that make a volume, in order along their normal, duplicates included."""

    slices: tuple[Slice, ...]

    @property
    def uid(self) -> str:
        """Of the series; empty if its files do not say."""
        return self.slices[0].uid

    @property
    def plane(self) -> str:
        """One of :data:`PLANES`, or ``oblique``."""
        normal = np.abs(self.slices[0].axes[:, 2])
        return PLANES[normal.argmax()] if normal.max() >= ALONG else "oblique"

    @property
    def axial(self) -> bool:
        """Whether its slices lie across the body, as a scanner cuts; others are made of such slices."""
        return self.plane == "axial"

    @property
    def original(self) -> bool:
        """Whether the files do not say that any slice was computed from other pictures."""
        return not any(one.derived for one in self.slices)

    def rank(self) -> tuple[bool, bool, int]:
        """The lower, the sooner a series is meant when nobody says which."""
        return not self.axial, not self.original, -len(self.slices)

    def __str__(self) -> str:
        """What a list shows of it."""
        first, count = self.slices[0], len(self.slices)
        gaps = np.diff([one.place() for one in self.slices])
        gaps = gaps[gaps > SAME_PLACE]
        mm = (*first.spacing, float(np.median(gaps)) if len(gaps) else first.thickness)
        return (f"{count} slice{'s' * (count != 1)} of {first.size[0]} x {first.size[1]}, "
                f"{' x '.join(f'{step:.2f}' for step in mm)} mm, {self.plane}{', derived' * (not self.original)}, "
                f"{f'UID ...{self.uid[-DIGITS:]}' if self.uid else 'no UID'}")


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
        if deeper := sorted({shown(path.parent.name) for path in files_below(folder) if is_scan(path)}):
            raise InputFileError(f"holds NIfTI files in its folders only: {', '.join(deeper[:NAMED])}"
                                 f"{f' and {len(deeper) - NAMED} more' if len(deeper) > NAMED else ''}", path=folder,
                                 remedy="Name these folders, or the files")
        kinds = Counter(path.suffix.lower() or "without suffix" for path in files_below(folder))
        found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
        raise InputFileError(f"holds neither NIfTI nor DICOM, but {found}" if kinds else "is a folder without files",
                             path=folder, remedy="Name .nii or .nii.gz files, or the folder of a DICOM series")
    return nifti or [folder]


def find_series(path: Path) -> tuple[list[Series], dict[str, list[Path]]]:
    """All series of CT in a folder and below: axial ones first, of these original ones, of these those of most slices.

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
    groups: dict[tuple, list[list[Slice]]] = defaultdict(list)  # of a series, those of one direction and spacing
    skipped: dict[str, list[Path]] = defaultdict(list)
    others = []
    with silent():
        for name in files_below(path) if kind == "folder" else [path]:
            if not is_dicom(name):
                others += [name] if SLICE.fullmatch(name.suffix) else []
                continue
            found = slices_in(name)
            if isinstance(found, str):
                skipped[found].append(name)
                continue
            for one in found:
                alike = groups[one.uid, one.study, one.size[:2]]
                group = next((group for group in alike if group[0].fits(one)), None)
                if group is None:
                    alike.append([one])
                else:
                    group.append(one)
    series = [Series(tuple(sorted(part, key=Slice.place))) for alike in groups.values()
              for group in alike for part in _acquisitions(group)]
    if others and (series or skipped):
        skipped[NO_DICOM] = others
    return sorted(series, key=lambda one: (one.rank(), one.uid, str(one.slices[0].path))), skipped


def describe(skipped: dict[str, list[Path]]) -> str:
    """What :func:`find_series` left out, most files first, with the names of those that may be slices."""
    def text(reason: str, files: list[Path]) -> str:
        names = [shown(file.name) for file in files[:NAMED]] + [f"{len(files) - NAMED} more"] * (len(files) > NAMED)
        listed = f": {', '.join(names)}" if reason in LOST else ""
        return f"{reason} ({len(files)} file{'s' * (len(files) != 1)}{listed})"
    return "; ".join(text(*item) for item in sorted(skipped.items(), key=lambda item: -len(item[1])))


def choose(path: Path, wanted: str | None = None) -> tuple[Series, tuple[str, ...]]:
    """The first series of CT in the list, or the one that is wanted, and what else is there, as warnings.

    Args:
        path: a folder, or one DICOM file.
        wanted: number in the list of :func:`find_series`, counted from 1, or UID or its last six digits or more.

    Raises:
        InputFileError: there is no series of CT, or none that is wanted, or several might be meant.
    """
    found, skipped = find_series(path)
    if not found:
        only = next(iter(skipped)) if len(skipped) == 1 else ""
        raise InputFileError(f"is {only}" if only else f"holds no CT slices: {describe(skipped)}", path=path,
                             remedy=LOST.get(only, "Give a series of CT slices"))
    listed = "; ".join(f"{number}: {one}" for number, one in enumerate(found[:MENTIONED], start=1))
    listed += "; `covidseg data series` lists all" if len(found) > MENTIONED else ""
    chosen = found if wanted is None else [
        one for number, one in enumerate(found, start=1)
        if wanted in (str(number), one.uid) or (len(wanted) >= DIGITS and one.uid.endswith(wanted))]
    if not chosen:
        raise InputFileError(f"holds no series {wanted}", path=path, remedy=f"Choose one with --series: {listed}")
    if len({one.slices[0].study for one in chosen}) > 1:
        nameless = "" if all(one.uid for one in chosen) else " that have no UID, perhaps"
        raise InputFileError(f"holds series{nameless} of several examinations", path=path,
                             remedy=f"Name the folder of each, or choose one with --series: {listed}")
    best, *others = chosen
    if others and best.rank() == others[0].rank():
        raise InputFileError("holds several series with equally many slices", path=path,
                             remedy=f"Choose one with --series: {listed}")
    warnings = [_rule(chosen)] if others else []
    if not best.uid and len({one.path for one in best.slices}) > 1:
        warnings.append("the files do not say which series they belong to: took those of one folder for one")
    warnings += [f"left out: {describe({reason: skipped[reason]})}" for reason in LOST if reason in skipped]
    return best, tuple(warnings)


def _rule(found: list[Series]) -> str:
    """Which of several series was taken, the first, and what it has that others lack."""
    best, rest, words = found[0], found, []
    for word in ("axial", "original"):
        if getattr(best, word) and not all(getattr(one, word) for one in rest):
            words.append(word)
            rest = [one for one in rest if getattr(one, word)]
    what = f"{', '.join(words)} series{' with most slices' if len(rest) > 1 else ''}".strip()
    return f"took the {what} of {len(found)} (`covidseg data series` lists them): {best}"


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
    first, more = series.slices[0], list(warnings)
    step, steps, odd = _stacking(path, series.slices)
    more += odd
    depth = max(round(float(steps[-1])) + 1, *(one.size[2] for one in series.slices))  # a file is read as a whole
    refuse_huge((*first.size[:2], depth), path)
    with silent(), fitting_memory(path):
        voxels, copies = _stack(path, series.slices, steps)
    if copies:
        more.append(f"left out {copies} cop{'ies' if copies > 1 else 'y'} of a slice")
    x, y = (first.axes[:, :2] * first.spacing).T
    affine = np.eye(4)
    affine[:3] = np.diag([-1, -1, 1]) @ np.stack([x, y, step, first.position], axis=1)  # DICOM's axes to NIfTI's
    grid = Grid((*first.size[:2], len(voxels)), affine)
    if not all(SPACING[0] <= distance <= SPACING[1] for distance in grid.spacing()):
        raise InputFileError(f"has voxels of {' x '.join(f'{mm:.3g}' for mm in grid.spacing())} mm, which no CT has",
                             path=path, remedy="Export the series again")
    if not series.axial:
        _, rows, columns = grid.spacing()
        then = ("those taken for axial lie askew in the body" if series.plane == "oblique" else
                f"axial ones are cut across them, with pixels of {rows:.2f} x {columns:.2f} mm")
        more.append(f"the slices are {series.plane}: {then}, and nets learn from axial slices")
    return voxels.transpose(2, 1, 0), grid, tuple(more)


# --- from slices to a volume ----------------------------------------------------------------------------------------

def _acquisitions(slices: list[Slice]) -> list[list[Slice]]:
    """A series that passes the same places several times, as the scans it holds, if the scanner counted them."""
    parts: dict[float | None, list[Slice]] = defaultdict(list)
    for one in slices:
        parts[one.acquisition].append(one)

    def places(part: list[Slice]) -> int:
        return len({round(one.place() / SAME_PLACE) for one in part})
    each = list(map(places, parts.values()))
    again = sum(each) - places(slices)  # a little overlap is no second scan
    return list(parts.values()) if len(parts) > 1 and 2 * again >= min(each) else [slices]


def _stacking(path: Path, slices: tuple[Slice, ...]) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """How slices lie in a volume that has one distance throughout.

    Returns:
        The step from slice to slice, ``(3,)`` mm in DICOM's axes, which a tilted gantry leaves oblique to the slices;
        the place of each in steps, ``(slices,)``, whole but for uneven distances; warnings.

    Raises:
        InputFileError: too much is missing, or slices stray sideways.
    """
    z, positions = np.array([one.place() for one in slices]), np.array([one.position for one in slices])
    new = np.diff(z, prepend=-np.inf) > SAME_PLACE
    places = z[new]
    if len(places) == 1:
        thickness = slices[0].thickness
        unknown = () if thickness > 0 else ("the thickness of the slice is unknown and taken for 1 mm",)
        return slices[0].axes[:, 2] * (thickness if thickness > 0 else 1.0), np.zeros(len(slices)), unknown
    gaps = np.diff(places)
    usual = float(np.quantile(gaps, 0.5, method="lower"))  # one that is there, also between a small and a wide gap
    counts = np.maximum(1, np.rint(gaps / usual))
    step = (positions[-1] - positions[0]) / counts.sum()  # the mean, since positions are rounded
    distance = float(step @ slices[0].axes[:, 2])
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


def _stack(path: Path, slices: tuple[Slice, ...], steps: np.ndarray) -> tuple[np.ndarray, int]:
    """HU ``(slices, rows, columns)`` at all whole steps, interpolated where no slice lies, and how many were copies.

    Raises:
        InputFileError: two slices at the same place differ, or a file is damaged.
    """
    columns, rows, _ = slices[0].size
    whole = all(one.whole for one in slices)
    volume = np.empty((round(float(steps[-1])) + 1, rows, columns), np.int16 if whole else np.float32)
    k = copies = 0
    before: tuple[float, float, np.ndarray] | None = None  # millimetres, step and pixels of the last slice
    decoded: dict[Path, np.ndarray] = {}                   # files of which slices are still to come
    left = Counter(one.path for one in slices)
    for one, step in zip(slices, steps.tolist(), strict=True):
        if one.path not in decoded:
            decoded[one.path] = decode(one.path)
        pixels = to_hu(decoded[one.path][one.frame], one)
        left[one.path] -= 1
        if not left[one.path]:
            del decoded[one.path]
        if before is not None and one.place() - before[0] <= SAME_PLACE:
            if not np.array_equal(pixels, before[2]):
                raise InputFileError(f"has different slices at the same place ({one.place():.1f} mm)", path=path,
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
        before = one.place(), step, pixels
    return volume, copies
