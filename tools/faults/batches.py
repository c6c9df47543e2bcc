"""One bad scan among good ones, and parts of a prediction that do not belong together."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

from covidseg.batch import Part, PartRun
from covidseg.errors import DatasetError, InputFileError, NoLungError, SettingsError
from covidseg.predict import load_predictor
from faults.pictures import water
from faults.supplies import Supplies
from faults.trial import Fault

GROUP = "batches and parts"
REPORTS = ("out/parts/*.csv", "out/predictions.csv")
THREE = ("a.nii.gz", "b.nii.gz", "c.nii.gz")


def bad_in_the_middle(folder: Path, supplies: Supplies) -> None:
    for name in THREE[::2]:
        shutil.copy(supplies.volume(), folder / name)
    (folder / THREE[1]).write_bytes(supplies.volume().read_bytes()[:9000])


def two_kinds(folder: Path, supplies: Supplies) -> None:
    """A damaged scan, one without lungs, and a good one."""
    bad_in_the_middle(folder, supplies)
    (folder / "c.nii.gz").unlink()
    water(folder, supplies)
    (folder / "scan.nii.gz").rename(folder / "c.nii.gz")


def in_parts(folder: Path, supplies: Supplies) -> Path:
    """Masks of two scans, predicted in two parts."""
    return Path(shutil.copytree(predicted(supplies), folder / "masks"))


@functools.cache
def predicted(supplies: Supplies) -> Path:
    """Predicts two scans in two parts, once for all faults."""
    masks = supplies.phantom.with_name("masks")
    targets = {path: masks / path.name for path in map(supplies.volume, (0, 1))}
    for number in (1, 2):
        run = PartRun(load_predictor(), Part(number, 2), targets, masks, 0.5)
        for path in run.files:
            run.predict(path)
    return masks


def one_part(folder: Path, supplies: Supplies) -> None:
    (in_parts(folder, supplies) / "parts" / "part-2-of-2.csv").unlink()


def cut_table(folder: Path, supplies: Supplies) -> None:
    table = in_parts(folder, supplies) / "parts" / "part-2-of-2.csv"
    table.write_bytes(table.read_bytes()[:-50])


def changed_mask(folder: Path, supplies: Supplies) -> None:
    mask = in_parts(folder, supplies) / "phantom_01.nii.gz"
    mask.write_bytes(mask.read_bytes()[:-1] + b"!")


def other_nets(folder: Path, supplies: Supplies) -> None:
    table = in_parts(folder, supplies) / "parts" / "part-2-of-2.csv"
    table.write_text(table.read_text(encoding="utf-8").replace(load_predictor().fingerprint(), "0123456789abcdef"))


def same_names(folder: Path, supplies: Supplies) -> None:
    for name in ("one", "two"):
        (folder / name).mkdir()
        shutil.copy(supplies.volume(), folder / name / "scan.nii.gz")


FAULTS = [
    Fault("a damaged scan among good ones: the others are done", f"covidseg predict {' '.join(THREE)} -o out",
          InputFileError, (THREE[1],), bad_in_the_middle, results=("out/a.nii.gz", "out/c.nii.gz", *REPORTS)),
    Fault("a damaged scan among good ones, for their lungs", f"covidseg lungs {' '.join(THREE)} -o out",
          InputFileError, (THREE[1],), bad_in_the_middle, results=("out/a.nii.gz", "out/c.nii.gz")),
    Fault("two bad scans of different kinds: the code is that of the last",
          f"covidseg predict {' '.join(THREE)} -o out", NoLungError, THREE[1:], two_kinds,
          results=("out/a.nii.gz", *REPORTS), lines=2),
    Fault("two scans of the same name", "covidseg predict one/scan.nii.gz two/scan.nii.gz -o out", SettingsError,
          ("scan",), same_names),
    Fault("a part that was never done", "covidseg merge masks", DatasetError, ("masks", "2/2"), one_part),
    Fault("a part whose report is damaged", "covidseg merge masks", DatasetError, ("masks", "2/2"), cut_table),
    Fault("a part that was done with other nets", "covidseg merge masks", DatasetError, ("masks", "2/2"), other_nets),
    Fault("a mask that was changed after it was predicted", "covidseg merge masks", DatasetError,
          ("masks/phantom_01.nii.gz",), changed_mask),
]
