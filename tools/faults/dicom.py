"""Folders of DICOM slices that make no scan, or more than one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from dicoms import write_series
from pydicom.uid import SecondaryCaptureImageStorage

from covidseg.errors import InputFileError, SettingsError
from faults.supplies import Supplies
from faults.trial import Fault, Make

GROUP = "DICOM"
REPORTS = ("out/parts/part-1-of-1.csv", "out/predictions.csv")
PREDICT = "covidseg predict cd -o out"


def series(folder: str = "cd", **tags: Any) -> Make:
    """A scan as a series with other tags."""
    return lambda where, supplies: write_series(where / folder, supplies.scan().pixels, (0, 0, 10), **tags)


def both(*makes: Make) -> Make:
    """One thing after the other."""
    return lambda folder, supplies: [make(folder, supplies) for make in makes]


def only(*kept: int) -> Make:
    """Some of the slices of a series, from the feet."""
    def make(folder: Path, supplies: Supplies) -> None:
        files = write_series(folder / "cd", supplies.scan().pixels, (0, 0, 10))
        for number, path in enumerate(files):
            if number not in kept:
                path.unlink()
    return make


def with_nifti(folder: Path, supplies: Supplies) -> None:
    series()(folder, supplies)
    shutil.copy(supplies.volume(), folder / "cd" / "scan.nii.gz")


FAULTS = [
    Fault("MR, not CT", PREDICT, InputFileError, ("cd", "is MR"), series(Modality="MR"), leaves=REPORTS),
    Fault("a localizer and nothing else", PREDICT, InputFileError, ("cd", "localizer"),
          series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]), leaves=REPORTS),
    Fault("screenshots", "covidseg lungs cd -o out", InputFileError, ("cd", "secondary capture"),
          series(SOPClassUID=SecondaryCaptureImageStorage)),
    Fault("no pixels in its files", PREDICT, InputFileError, ("cd",), series(PixelData=None), leaves=REPORTS),
    Fault("two series with equally many slices", PREDICT, InputFileError, ("cd", "--series"),
          both(series("cd/a"), series("cd/b", SeriesInstanceUID="1.2.3.654321")), leaves=REPORTS),
    Fault("two patients", PREDICT, InputFileError, ("cd", "several examinations"),
          both(series("cd/a"), series("cd/b", SeriesInstanceUID="1.2.3.654321", StudyInstanceUID="1.2.4")),
          leaves=REPORTS),
    Fault("a series that is not there", "covidseg predict cd -o out --series 3", InputFileError, ("cd", "series 3"),
          series(), leaves=REPORTS),
    Fault("a gap of five slices", PREDICT, InputFileError, ("cd", "lacks slices"), only(0, 1, 7), leaves=REPORTS),
    Fault("two different slices at each place", "covidseg lungs cd -o out", InputFileError, ("cd", "same place"),
          both(series("cd/a"), lambda folder, supplies: write_series(
              folder / "cd" / "b", supplies.scan(2).pixels, (0, 0, 10)))),
    Fault("NIfTI among the slices", PREDICT, InputFileError, ("cd", "both NIfTI and DICOM"), with_nifti),
    Fault("results among the slices", "covidseg predict cd -o cd/out", SettingsError, ("cd/out",), series()),
]
