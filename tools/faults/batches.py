"""One bad scan among good ones, and parts of a prediction that do not belong together."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

from covidseg.batch import Part, PartRun
from covidseg.errors import DatasetError, InputFileError, NoLungError, SettingsError
from covidseg.predict import load_predictor
from faults.pictures import water
from faults.supplies import Supplies
from faults.trial import REPORTS, Fault, Make

THREE = ("a.nii.gz", "b.nii.gz", "c.nii.gz")
PREDICT = f"covidseg predict {' '.join(THREE)} -o out"
SECOND = "parts/part-2-of-2.csv"


def bad_in_the_middle(supplies: Supplies) -> None:
    supplies.copies(*THREE[::2])
    Path(THREE[1]).write_bytes(supplies.volume().read_bytes()[:9000])


def two_kinds(supplies: Supplies) -> None:
    """A good scan, a damaged one, and one without lungs."""
    bad_in_the_middle(supplies)
    water(supplies)
    Path("scan.nii.gz").replace(THREE[2])


def same_names(supplies: Supplies) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
        supplies.copies(f"{name}/scan.nii.gz")


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


def in_parts(name: str, change: Callable[[bytes], bytes]) -> Make:
    """Masks of two scans, predicted in two parts, and among them a file that has other bytes."""
    def make(supplies: Supplies) -> None:
        path = Path(shutil.copytree(predicted(supplies), "masks"), name)
        path.write_bytes(change(path.read_bytes()))
    return make


def one_part(supplies: Supplies) -> None:
    Path(shutil.copytree(predicted(supplies), "masks"), SECOND).unlink()


def of_other_nets(report: bytes) -> bytes:
    return report.replace(load_predictor().fingerprint().encode(), b"0123456789abcdef")


def _merge(title: str, make: Make, *names: str) -> Fault:
    return Fault(title, "covidseg merge masks", DatasetError, names, make)


FAULTS = [
    Fault("a damaged scan among good ones: the others are done", PREDICT, InputFileError, (THREE[1],),
          bad_in_the_middle, results=("out/a.nii.gz", "out/c.nii.gz", *REPORTS)),
    Fault("a damaged scan among good ones, for their lungs", f"covidseg lungs {' '.join(THREE)} -o out",
          InputFileError, (THREE[1],), bad_in_the_middle, results=("out/a.nii.gz", "out/c.nii.gz")),
    Fault("two bad scans of different kinds: the code is that of the last", PREDICT, NoLungError, THREE[1:],
          two_kinds, results=("out/a.nii.gz", *REPORTS), lines=2),
    Fault("two scans of the same name", "covidseg predict one/scan.nii.gz two/scan.nii.gz -o out", SettingsError,
          ("scan",), same_names),
    _merge("a part that was never done", one_part, "masks", "2/2"),
    _merge("a part whose report is damaged", in_parts(SECOND, lambda report: report[:-50]), "masks", "2/2"),
    _merge("a part that was done with other nets", in_parts(SECOND, of_other_nets), "masks", "2/2"),
    _merge("a mask that was changed after it was predicted",
           in_parts("phantom_01.nii.gz", lambda mask: mask[:-1] + b"!"), "masks/phantom_01.nii.gz"),
]
GROUPS = {"batches and parts": FAULTS}
