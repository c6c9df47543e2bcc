"""Scans as people have them: what other programs write, how folders and names look, and what is meant all the same.

Where the error is None the scan is to be understood, if with a warning.
"""

from __future__ import annotations

import gzip
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from covidseg.errors import CovidsegError, DatasetError, InputFileError, OutputError, SettingsError
from faults.batches import predicted
from faults.files import bytes_of
from faults.supplies import AFFINE, Supplies, nothing, stored, with_header
from faults.trial import REPORTS, Fault, Make

LUNGS = "covidseg lungs scan.nii -o out"
DONE = ("out/scan.nii.gz",)


def two_ways(sform: np.ndarray, qform: np.ndarray) -> Make:
    """A scan that says its place by two matrices."""
    def make(supplies: Supplies) -> None:
        image: Any = nib.Nifti1Image(np.asarray(nib.load(supplies.volume()).dataobj), AFFINE)
        image.set_qform(qform, 1)
        image.set_sform(sform, 2)
        nib.save(image, "scan.nii")
    return make


def header(**fields: Any) -> Make:
    """A scan whose header says something else in these fields."""
    return lambda supplies: with_header(supplies, **fields)


def copies(*names: str | bytes) -> Make:
    """A scan under these names."""
    def make(supplies: Supplies) -> None:
        for name in map(os.fsdecode, names):
            Path(name).parent.mkdir(exist_ok=True)
            shutil.copy(supplies.volume(), name)
    return make


def with_side_file(supplies: Supplies) -> None:
    """What macOS leaves on a disk that is not its own, and a suffix in capitals."""
    copies("scans/SCAN.NII.GZ")(supplies)
    Path("scans/._SCAN.NII.GZ").write_bytes(b"\0\5\x16\7Mac OS X")


def in_another_part(supplies: Supplies) -> None:
    shutil.copytree(predicted(supplies), "masks")
    copies("other.nii.gz")(supplies)


def of_another(supplies: Supplies) -> None:
    """A scan that is called as that of another patient whose mask is there."""
    shutil.copytree(predicted(supplies), "masks")
    shutil.copy(supplies.volume(2), "phantom_01.nii.gz")


def oblong(supplies: Supplies) -> None:
    """Pixels three times as high as wide, as of coronal slices."""
    pixels = supplies.scan().pixels
    stored(pixels[:, 1::3].transpose(2, 1, 0), "scan.nii", AFFINE @ np.diag((1, 3, 1, 1)))


def separated(mark: str) -> Make:
    """A data folder whose label table has another separator."""
    def make(supplies: Supplies) -> None:
        table = supplies.data() / "slice_labels.csv"
        table.write_text(table.read_text(encoding="utf-8").replace(",", mark), encoding="utf-8")
    return make


def turned_mask(supplies: Supplies) -> None:
    """Masks of one place, whose voxels follow each other in another order."""
    mask: Any = nib.load(supplies.phantom / "mask" / "phantom_01.nii.gz")
    nib.save(mask, "truth.nii.gz")
    nib.save(mask.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]])), "mask.nii.gz")


def beside_a_mask(supplies: Supplies) -> None:
    """A scan, and its true mask in a folder, where it has the name of the scan."""
    supplies.copies("scan.nii.gz")
    Path("out").mkdir()
    shutil.copy(supplies.truth(), "out/scan.nii.gz")


def dangling(supplies: Supplies) -> None:
    Path("scan.nii").symlink_to(".git/annex/objects/scan.nii")


def _fault(title: str, make: Make, error: type[CovidsegError] | None = None, *names: str, command: str = LUNGS,
           results: tuple[str, ...] = DONE) -> Fault:
    return Fault(title, command, error, names, make, results=() if error else results)


SHEARED = AFFINE + np.outer((0, 1, 0, 0), (0, 0, 10.9, 0))
FAULTS = [
    _fault("sheared, as a tilted gantry makes it", two_ways(SHEARED, SHEARED), None, "its sform"),
    _fault("sform 76 mm away from the qform", two_ways(AFFINE, AFFINE + np.outer((0, 0, 1, 0), (0, 0, 0, -76))), None,
           "its sform puts voxel", "its qform at", "-76.0"),
    _fault("sform and pixdim disagree about the distance of slices", header(pixdim=[1, 3.506, 3.506, 20, 1, 1, 1, 1]),
           None, "its sform says", "x 20 mm"),
    _fault("lengths in metres, it says", header(xyzt_units=1), None, "metres"),
    _fault("vox_offset 0", header(vox_offset=0)),
    _fault("vox_offset is not a number", header(vox_offset=np.nan), InputFileError, "scan.nii", "vox_offset"),
    _fault("vox_offset beyond the file", header(vox_offset=1e8), InputFileError, "scan.nii", "byte 100000000"),
    _fault("bitpix and datatype disagree", header(bitpix=8), InputFileError, "scan.nii", "8 bits"),
    _fault("compressed, although its suffix is .nii", bytes_of(lambda raw: raw, "scan.nii")),
    _fault("not compressed, although its suffix says so", bytes_of(gzip.decompress, "scan.nii.gz"),
           command="covidseg lungs scan.nii.gz -o out"),
    _fault("one half of a pair of files", bytes_of(gzip.decompress, "scan.hdr"), InputFileError, "scan.hdr",
           "nib-convert", command="covidseg lungs scan.hdr -o out"),
    _fault("a web page that was saved as a scan", bytes_of(lambda raw: b"<!DOCTYPE html>", "scan.nii"), InputFileError,
           "scan.nii", "web page"),
    _fault("a link to a file that was not fetched", dangling, InputFileError, "scan.nii", "a link"),
    _fault("a side file of macOS, and a suffix in capitals", with_side_file, results=("out/SCAN.nii.gz",),
           command="covidseg lungs scans -o out"),
    _fault("a name that is no UTF-8", copies(b"scans/caf\xe9.nii.gz"), results=("out/caf*.nii.gz", *REPORTS),
           command="covidseg predict scans -o out"),
    _fault("a probability that would replace the scan", copies("c_probability.nii.gz"), SettingsError,
           "c_probability.nii.gz",
           command="covidseg predict c_probability.nii.gz -o c.nii.gz --probability"),
    _fault("a probability that would replace another result", copies("c.nii.gz", "c_probability.nii.gz"), SettingsError,
           "c_probability.nii.gz",
           command="covidseg predict c.nii.gz c_probability.nii.gz -o out --probability"),
    _fault("a part of another list of scans", in_another_part, SettingsError, "masks", "phantom_00",
           command="covidseg predict other.nii.gz -o masks --part 1/2"),
    _fault("a label table with semicolons", separated(";"), results=(), command="covidseg data check data"),
    _fault("a label table with bars", separated("|"), DatasetError, "slice_labels.csv", "with commas",
           command="covidseg train --data data --out run"),
    _fault("a mask of the same place in another voxel order", turned_mask, results=(),
           command="covidseg evaluate mask.nii.gz truth.nii.gz"),
    _fault("a name of recorded results, not of a data set", nothing, DatasetError, "medseg9",
           "medseg2", command="covidseg data info medseg9"),
    _fault("a spacing of 0, and nothing else to know it by",
           header(pixdim=[1, 3.506, 3.506, 0, 1, 1, 1, 1], sform_code=0, qform_code=1),
           InputFileError, "scan.nii", "3.51 x 3.51 x 0 mm"),
    _fault("a true mask where the prediction would go", beside_a_mask, OutputError, "out/scan.nii.gz", "--overwrite",
           command="covidseg predict scan.nii.gz -o out"),
    _fault("test scans that are training scans", Supplies.data, DatasetError, "are trained on",
           command="covidseg reproduce --data data --test data --out run"),
    Fault("a mask of another scan of that name", "covidseg predict phantom_01.nii.gz -o masks", OutputError,
          ("masks/phantom_01.nii.gz", "another scan"), of_another,
          leaves=("masks/parts/*.csv", "masks/predictions.csv")),
    _fault("pixels three times as high as wide", oblong),
    _fault("figures that would replace a mask", turned_mask, SettingsError, "truth.nii.gz",
           command="covidseg evaluate mask.nii.gz truth.nii.gz --json truth.nii.gz"),
]
GROUPS = {"scans as people have them": FAULTS}
