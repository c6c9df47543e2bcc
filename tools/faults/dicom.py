"""Folders of DICOM slices that make no scan, or more than one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
from dicoms import write_series
from pydicom.uid import SecondaryCaptureImageStorage

from covidseg.errors import InputFileError, SettingsError
from faults.supplies import Supplies
from faults.trial import REPORTS, Fault, Make

PREDICT = "covidseg predict cd -o out"


def series(folder: str = "cd", **tags: Any) -> Make:
    """A scan as a series with other tags."""
    return lambda supplies: write_series(Path(folder), supplies.scan().pixels, (0, 0, 10), **tags)


def both(*makes: Make) -> Make:
    """One thing after the other."""
    return lambda supplies: [make(supplies) for make in makes]


def only(*kept: int) -> Make:
    """Some of the slices of a series, from the feet."""
    def make(supplies: Supplies) -> None:
        files = write_series(Path("cd"), supplies.scan().pixels, (0, 0, 10))
        for number, path in enumerate(files):
            if number not in kept:
                path.unlink()
    return make


def with_nifti(supplies: Supplies) -> None:
    series()(supplies)
    shutil.copy(supplies.volume(), "cd/scan.nii.gz")


def coronal(supplies: Supplies) -> None:
    write_series(Path("cd/b"), np.concatenate([supplies.scan().pixels] * 2), (0, 5, 0),
                 SeriesInstanceUID="1.2.3.654321", ImageOrientationPatient=[1, 0, 0, 0, 0, -1])


NO_UIDS = {"SeriesInstanceUID": "", "StudyInstanceUID": ""}
FAULTS = [
    Fault("MR, not CT", PREDICT, InputFileError, ("cd", "is MR"), series(Modality="MR")),
    Fault("a localizer and nothing else", PREDICT, InputFileError, ("cd", "localizer"),
          series(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])),
    Fault("screenshots", "covidseg lungs cd -o out", InputFileError, ("cd", "secondary capture"),
          series(SOPClassUID=SecondaryCaptureImageStorage)),
    Fault("no pixels in its files", PREDICT, InputFileError, ("cd",), series(PixelData=None)),
    Fault("two series with equally many slices", PREDICT, InputFileError, ("cd", "--series"),
          both(series("cd/a"), series("cd/b", SeriesInstanceUID="1.2.3.654321"))),
    Fault("two patients", PREDICT, InputFileError, ("cd", "several examinations"),
          both(series("cd/a"), series("cd/b", SeriesInstanceUID="1.2.3.654321", StudyInstanceUID="1.2.4"))),
    Fault("a series that is not there", "covidseg predict cd -o out --series 3", InputFileError, ("cd", "series 3"),
          series()),
    Fault("a gap of five slices", PREDICT, InputFileError, ("cd", "lacks slices"), only(0, 1, 7)),
    Fault("two different slices at each place", "covidseg lungs cd -o out", InputFileError, ("cd", "same place"),
          both(series("cd/a"), lambda supplies: write_series(Path("cd/b"), supplies.scan(2).pixels, (0, 0, 10)))),
    Fault("NIfTI among the slices", PREDICT, InputFileError, ("cd", "both NIfTI and DICOM"), with_nifti),
    Fault("results among the slices", "covidseg predict cd -o cd/out", SettingsError, ("cd/out",), series()),
    Fault("two people whose UIDs were removed", PREDICT, InputFileError, ("cd", "several examinations"),
          both(series("cd/a", **NO_UIDS), series("cd/b", **NO_UIDS, PatientID="two"))),
    Fault("stored as a negative", PREDICT, InputFileError, ("cd", "MONOCHROME1"),
          series(PhotometricInterpretation="MONOCHROME1")),
    Fault("a coronal reformat that has more slices", PREDICT, None, ("took the axial series of 2",),
          both(series("cd/a"), coronal), results=("out/cd.nii.gz", *REPORTS)),
]
GROUPS = {"DICOM": FAULTS}
