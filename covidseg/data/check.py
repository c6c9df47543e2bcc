"""Looks a data folder over before hours of training are spent on it: every scan, mask and label.

Unlike the readers, which stop at the first fault, the check goes on and lists them all.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from covidseg.data.folder import Case, composed, load_dataset
from covidseg.data.layout import has_lesion
from covidseg.data.nifti import entries, is_scan, kind_of, scans_in
from covidseg.data.scan import Scan, read_mask, read_scan, scan_id
from covidseg.errors import DatasetError, InputFileError, NoLungError, one_of
from covidseg.lungs import survey_lungs

# Studies in each folder of MosMedData COVID19_1110, and the studies that have outlines.
MOSMED_STUDIES = {"CT-0": 254, "CT-1": 684, "CT-2": 125, "CT-3": 45, "CT-4": 2}
MOSMED_OUTLINED = range(255, 305)
PARTS, NEAR = ("im", "lung", "mask", "slice_labels.csv"), 0.8  # of a data folder, and what counts as a name near to it


@dataclass(frozen=True)
class VolumeReport:
    """What is known of one volume; of a scan that cannot be read that is little."""

    id: str       # as in the label table
    patient: str  # whose scan it is
    shape: tuple[int, ...] = ()      # (slices, rows, columns)
    spacing: tuple[float, ...] = ()  # mm between slices, rows and columns
    unit: str = ""                   # HU or display
    value_range: tuple[float, ...] = ()  # lowest and highest stored value
    lesion: int = 0      # slices labelled as having a lesion
    free: int = 0        # slices labelled free of lesions
    unlabelled: int = 0  # slices without a label
    lung: bool = False   # whether a true lung mask is there
    mask: bool = False   # whether a true lesion mask is there
    faults: tuple[str, ...] = ()  # what is wrong, one sentence each
    warnings: tuple[str, ...] = ()  # what a person should know before the scan is used, one sentence each


@dataclass(frozen=True)
class FolderReport:
    """What is known of a data folder and its volumes; ``faults`` are those of the folder as a whole."""

    root: Path
    volumes: tuple[VolumeReport, ...]
    faults: tuple[str, ...] = ()

    def all_faults(self) -> list[str]:
        """Every fault, with the volume it concerns in front."""
        return [*self.faults, *(f"{v.id}: {fault}" for v in self.volumes for fault in v.faults)]

    def all_warnings(self) -> list[str]:
        """What a person should know, with the volume it concerns in front; predictions say the same of a scan."""
        return [f"{v.id}: {warning}" for v in self.volumes for warning in v.warnings]

    def raise_faults(self) -> None:
        """Counts the faults in a DatasetError, if there are any."""
        if faults := self.all_faults():
            raise DatasetError(f"{len(faults)} fault{'s' if len(faults) > 1 else ''} found", path=self.root,
                               remedy="Correct what is listed above and check again")


def check_folder(root: str | Path, unit: str | None = None, *, anatomy: bool = True) -> FolderReport:
    """Reads everything in a data folder and lists what is wrong, and what is odd but can be used.

    Args:
        root: a data folder as in :mod:`covidseg.data.folder`, or MosMedData as its publisher lays it out.
        unit: ``HU`` or ``display`` where all scans have to have it.
        anatomy: whether scans have to look like chest CT, with lungs that are looked at.

    Raises:
        DatasetError: there is no folder, or nothing in it that looks like a data set.
        InputFileError: the folder, or one in it, cannot be read.
    """
    root = Path(root)
    if unit is not None:
        one_of(unit, ("HU", "display"), "unit")
    if kind_of(root / "studies") == "folder" and kind_of(root / "im") != "folder":
        return check_mosmed(root, unit, anatomy=anatomy)
    faults: list[str] = []
    try:
        cases = load_dataset(root).cases
    except DatasetError as error:
        cases = load_dataset(root, labels=False).cases  # its scans can be checked all the same
        faults.append(str(error))
    else:
        faults += [f"{case.id}: no slice has a line in the label table, so training leaves the volume out"
                   for case in cases if not case.labels]
    faults += _unread(root)
    known = {case.id for case in cases}
    for kind in ("lung", "mask"):
        faults += [f"{kind}/{path.name} belongs to no image of the same name in im/" for path in entries(root / kind)
                   if composed(scan_id(path)) not in known and not path.name.startswith(".")]
    return FolderReport(root, tuple(_check_case(case, unit, anatomy) for case in cases), tuple(faults))


def _unread(root: Path) -> list[str]:
    """Files and folders that look as if they were meant to be read, and are not."""
    faults = []
    for name in (path.name for path in entries(root)):
        meant = get_close_matches(name.lower(), PARTS, 1, NEAR) if name not in PARTS else []
        faults += [f"{name} is not read: its name has to be {part}" for part in meant if not (root / part).exists()]
    return faults + [f"im/{path.name} is not read: it is no .nii or .nii.gz file" for path in entries(root / "im")
                     if not is_scan(path) and not path.name.startswith(".")]


def _check_case(case: Case, unit: str | None, anatomy: bool) -> VolumeReport:
    try:
        scan = read_scan(case.image, unit=unit)
    except InputFileError as error:
        return VolumeReport(case.id, case.patient, faults=(str(error),))
    count = scan.pixels.shape[0]
    faults, warnings = [], scan.warnings
    if scan.value_range[0] == scan.value_range[1]:
        faults.append(f"every voxel has the value {scan.value_range[0]:g}")
    elif anatomy:
        try:
            warnings += survey_lungs(scan.pixels, aspect=scan.aspect(), check=scan).warnings
        except (InputFileError, NoLungError) as error:
            faults.append(str(error))
    if outside := [index for index in case.labels if index >= count]:
        faults.append(f"slices {_shorten(outside)} are labelled, but the last slice is {count - 1}")
    for kind, path in (("lung", case.lung), ("mask", case.mask)):
        if path is not None:
            faults += _check_mask(kind, path, scan, case.labels)
    inside = [label for index, label in case.labels.items() if index < count]
    return VolumeReport(case.id, case.patient, scan.pixels.shape, scan.spacing, scan.unit, scan.value_range,
                        sum(inside), len(inside) - sum(inside), count - len(inside),
                        case.lung is not None, case.mask is not None, tuple(faults), warnings)


def _check_mask(kind: str, path: Path, scan: Scan, labels: dict[int, int]) -> list[str]:
    try:
        mask = read_mask(path, like=scan)  # (S, H, W)
    except InputFileError as error:
        return [str(error)]
    if kind == "lung":
        return [] if mask.any() else ["the lung mask is empty"]
    drawn, clear = mask.sum(axis=(1, 2)), has_lesion(mask)
    missed = [index for index, label in labels.items() if index < len(mask) and not label and clear[index]]
    void = [index for index, label in labels.items() if index < len(mask) and label and not drawn[index]]
    return [f"slices {_shorten(slices)} are labelled {fault}" for slices, fault in (
        (missed, "free of lesions, but the mask shows some"),
        (void, "as having a lesion, but the mask shows none")) if slices]


def check_mosmed(root: Path, unit: str | None = None, *, anatomy: bool = True) -> FolderReport:
    """Checks that MosMedData was unpacked completely and in its published layout; opens the outlined studies only.

    Arguments are those of :func:`check_folder`.
    """
    faults = []
    studies: dict[int, Path] = {}
    for grade, expected in MOSMED_STUDIES.items():
        found = scans_in(root / "studies" / grade)
        if len(found) != expected:
            faults.append(f"studies/{grade} holds {len(found)} scans, the published set has {expected}")
        for path in found:
            name = re.fullmatch(r"study_(\d{4})", scan_id(path))
            if name is None:
                faults.append(f"studies/{grade}/{path.name} is not called study_NNNN.nii.gz")
            elif int(name[1]) in studies:
                faults.append(f"study {name[1]} is there twice")
            else:
                studies[int(name[1])] = path
    volumes = []
    masks = {scan_id(path): path for path in scans_in(root / "masks")}
    for number in MOSMED_OUTLINED:
        study = f"study_{number:04d}"
        if (mask := masks.get(f"{study}_mask")) is None:
            faults.append(f"masks/{study}_mask.nii.gz is missing")
        elif number not in studies:
            faults.append(f"masks/{mask.name} has no study")
        else:
            case = Case(study, studies[number], {}, study, None, mask)
            volumes.append(_check_case(case, unit, anatomy))
    return FolderReport(root, tuple(volumes), tuple(faults))


def _shorten(numbers: list[int], most: int = 8) -> str:
    text = ", ".join(str(n) for n in sorted(numbers)[:most])
    return text + (f" and {len(numbers) - most} more" if len(numbers) > most else "")
