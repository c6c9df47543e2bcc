"""The patients of a phantom, one at a time, and the folder of all of them."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from covidseg.atomic import work_folder
from covidseg.data.folder import VOLUME_COLUMNS, write_table
from covidseg.data.phantom.anatomy import Array, apply_scanner, coverage, lung_tissue, make_chest, make_frame
from covidseg.data.phantom.lesions import (
    MIN_LESION_AREA_MM2,
    Lesions,
    add_lesions,
    blur_motion,
    dependent_density,
    nodules,
)
from covidseg.data.phantom.settings import PhantomSettings
from covidseg.data.phantom.vessels import draw_fissures, grow_branches
from covidseg.data.scan import Grid, write_like
from covidseg.errors import DatasetError, OutputError, SettingsError

STREAM = 6  # a stream whose default set is neither easier nor harder than most
VERSION = 2  # raise it whenever the same settings give other voxels
LOOKALIKES = ("crowded_vessels", "dependent_density", "motion", "nodules")


@dataclass(frozen=True)
class PhantomPatient:
    """One patient: a volume and the whole truth about it. Arrays are upright, ``(slices, rows, columns)``."""

    id: str      # as in slice_labels.csv
    hu: Array    # int16, HU
    lung: Array  # bool, healthy and diseased lung; mediastinum and trachea are not part of it
    mask: Array  # bool, lesions; part of the lung
    kind: Array  # uint8, 0 none, 1 ground glass, 2 consolidation, 3 crazy paving
    spacing: tuple[float, float, float]  # mm between slices, rows and columns
    healthy: bool  # no lesion at all
    lookalikes: tuple[str, ...]  # kinds in the volume, of LOOKALIKES
    lookalike_slices: dict[str, tuple[int, ...]]  # for each of them, the slices in which it is most plainly seen

    def labels(self) -> Array:
        """``(slices,)`` int: 1 where the lesion covers at least MIN_LESION_AREA_MM2, otherwise 0."""
        area = self.mask.sum(axis=(1, 2)) * self.spacing[1] * self.spacing[2]
        return (area >= MIN_LESION_AREA_MM2).astype(int)


def is_healthy(settings: PhantomSettings, index: int) -> bool:
    """Whether patient ``index`` is one of the healthy ones: they are spread evenly over the indices."""
    return _healthy_before(settings, index + 1) > _healthy_before(settings, index)


def _healthy_before(settings: PhantomSettings, index: int) -> int:
    return int(index * (settings.healthy_share + 1e-9))  # a third of 12 patients is 4, whatever the rounding


def _breath(settings: PhantomSettings, index: int) -> float:
    """Breathing level of a patient, 0..1, see :class:`Frame`.

    Golden-ratio steps spread the levels evenly over few patients, among the healthy and among the diseased.
    """
    before = _healthy_before(settings, index)
    rank = before if is_healthy(settings, index) else index - before
    return (np.random.default_rng(settings.seed).random() + rank * 0.618034) % 1


def make_patient(settings: PhantomSettings, index: int) -> PhantomPatient:
    """Makes patient ``index``, counted from 0; the result depends on ``settings`` and ``index`` alone.

    Raises:
        SettingsError: there is no such patient.
    """
    if not 0 <= index < settings.patients:
        raise SettingsError(f"there is no phantom patient {index}", remedy=f"Give 0 to {settings.patients - 1}")
    rng = np.random.default_rng([settings.seed, index, STREAM])
    healthy = is_healthy(settings, index)
    f = make_frame(rng, settings.slices, settings.size, _breath(settings, index))
    chest = make_chest(rng, f)
    lung = chest.lung < 0  # (S, H, W)
    seen: dict[str, tuple[int, ...]] = {}
    wanted = [kind for kind in LOOKALIKES if rng.random() < settings.lookalike_rate]
    if healthy and not wanted and settings.lookalike_rate > 0:
        wanted = ["dependent_density"]

    # Lung tissue, look-alikes and lesions in it, and vessels over both; all arrays are (S, H, W).
    tissue = lung_tissue(rng, f, settings.tissue_hu, settings.drift_hu)
    if "dependent_density" in wanted:
        added = dependent_density(rng, settings, f, lung)
        tissue += added
        area = (added > 60).sum(axis=(1, 2)) * f.spacing[1] * f.spacing[2]
        seen["dependent_density"] = tuple(np.flatnonzero(area >= 100).tolist())  # mm^2
    none = Lesions(tissue, np.zeros(f.shape, dtype=bool), np.zeros(f.shape, dtype=np.uint8))
    lesions = none if healthy else add_lesions(rng, settings, f, chest, tissue)
    air = lesions.tissue  # HU inside the lungs, completed in place
    tubes = grow_branches(rng, f, chest, settings.vessel_targets, crowded="crowded_vessels" in wanted)
    if tubes.crowded:
        seen["crowded_vessels"] = tubes.crowded
    air += tubes.vessels * (rng.uniform(0, 45) - air)
    air += tubes.wall * (np.maximum(-350, air) - air)
    air += draw_fissures(rng, f, chest) * 160 * (air < -600)
    if "nodules" in wanted:
        share, where = nodules(rng, f, chest)
        air += share * (rng.uniform(-150, 30) - air)
        seen["nodules"] = tuple(sorted(set(where)))

    # The lungs in the body, open airways, and the scanner.
    hu = chest.outside + coverage(chest.lung, f.spacing[1]) * (air - chest.outside)
    hu += np.maximum(tubes.lumen, tubes.trunk) * (-960 - hu)
    if "motion" in wanted:
        count = max(1, settings.slices // 8)
        moved = sorted(rng.choice(settings.slices * 2 // 3, size=count, replace=False).tolist())
        for k in moved:
            blur_motion(rng, f, hu, chest.heart, k)
        seen["motion"] = tuple(moved)
    apply_scanner(rng, f, hu, settings.noise_hu)
    return PhantomPatient(f"phantom_{index:02d}", np.clip(np.rint(hu), -1024, 3071).astype(np.int16),
                          lung & (tubes.trunk < 0.5) | lesions.mask, lesions.mask, lesions.kind, f.spacing, healthy,
                          tuple(sorted(seen)), seen)


def write_phantom(folder: str | Path, settings: PhantomSettings | None = None, *, progress: bool = False) -> Path:
    """Writes a phantom data set in the layout of :mod:`covidseg.data.folder`, plus ``kind/`` and ``phantom.json``.

    A finished folder of the same settings is left as it is. The set is built beside its target and moved there
    when complete, so that a crash leaves no half folder.

    Raises:
        DatasetError: the folder holds something else, or a phantom of other settings or with files missing.
        OutputError: the folder cannot be written.
    """
    folder, settings = Path(folder), settings or PhantomSettings()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        return _check_finished(folder, settings)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with work_folder(folder.parent) as workshop:
            built = workshop / "phantom"
            built.mkdir()
            _write_patients(built, settings, progress)
            try:
                os.replace(built, folder)  # in place of an empty folder as well
            except OSError:
                if not folder.exists():
                    raise
                return _check_finished(folder, settings)  # somebody else was faster
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder,
                          remedy="Check free space and permissions, or choose another folder") from error
    return folder


def _write_patients(folder: Path, settings: PhantomSettings, progress: bool) -> None:
    files: dict[str, int] = {}
    rows: list[list[object]] = []
    for index in range(settings.patients):
        patient = make_patient(settings, index)
        depth, pixel, _ = patient.spacing
        slices, height, width = patient.hu.shape
        grid = Grid((width, height, slices), np.diag((-pixel, -pixel, depth, 1.0)))  # stored like most real files
        parts = {"im": patient.hu, "lung": patient.lung, "mask": patient.mask, "kind": patient.kind}
        for part, array in parts.items():
            path = write_like(array, grid, folder / part / f"{patient.id}.nii.gz")
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
        rows += [[patient.id, k, int(label), patient.id] for k, label in enumerate(patient.labels())]
        if progress:
            print(f"{patient.id}: {patient.labels().sum()} of {slices} slices with lesion; "
                  f"look-alikes: {', '.join(patient.lookalikes) or 'none'}")
    table = folder / "slice_labels.csv"
    write_table(table, (*VOLUME_COLUMNS, "patient"), rows)
    files[table.name] = table.stat().st_size
    (folder / "phantom.json").write_text(json.dumps({**_passport(settings), "files": files}, indent=1) + "\n",
                                         encoding="utf-8")


def _passport(settings: PhantomSettings) -> dict[str, Any]:
    """What identifies a phantom: two folders with the same passport hold the same scans."""
    # Through JSON and back, so that tuples compare equal to the lists that a file gives.
    return json.loads(json.dumps({"version": VERSION, "settings": asdict(settings)}))


def mark(settings: PhantomSettings | None = None) -> str:
    """Eight hex digits that stand for a version and settings of the phantom."""
    passport = json.dumps(_passport(settings or PhantomSettings()), sort_keys=True)
    return hashlib.sha256(passport.encode()).hexdigest()[:8]


def _check_finished(folder: Path, settings: PhantomSettings) -> Path:
    """The folder, if it holds the whole phantom of these settings."""
    another = "Choose another folder, or delete this one to have it made again"
    try:
        stored = json.loads((folder / "phantom.json").read_text(encoding="utf-8"))
        files = dict(stored.pop("files"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DatasetError("is not empty and holds no finished phantom", path=folder, remedy=another) from None
    if stored != _passport(settings):
        raise DatasetError("holds a phantom of other settings or of another version", path=folder, remedy=another)
    broken = [name for name, size in files.items()
              if not (folder / name).is_file() or (folder / name).stat().st_size != size]
    if broken:
        raise DatasetError(f"lacks or has changed {len(broken)} of its files, first {broken[0]}", path=folder,
                           remedy=another)
    return folder
