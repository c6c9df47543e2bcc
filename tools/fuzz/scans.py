"""Targets: scans, as ``.nii`` and as ``.nii.gz``. What is accepted has to be what nibabel reads."""

from __future__ import annotations

import gzip
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.orientations import apply_orientation

from covidseg.data.nifti import SPACING
from covidseg.data.scan import Scan, read_mask, read_scan, write_like
from covidseg.errors import InputFileError

AFFINE = np.array([[-0.7, 0, 0, 10], [0, 0, -0.8, 20], [0, 5.0, 0, -30], [0, 0, 0, 1]])


def nifti_seeds() -> list[bytes]:
    """Files of a few voxels: types, byte orders, scaling, axes, extensions, both versions of NIfTI."""
    values = np.arange(24).reshape(4, 3, 2)
    seeds = []
    for dtype in ("<i2", ">i2", "<u1", "<f4", "<f8", ">u2", "<i4", "<i8"):
        header = nib.Nifti1Header(endianness=dtype[0])
        header.set_data_dtype(dtype)
        seeds.append(nib.Nifti1Image(values.astype(dtype), AFFINE, header).to_bytes())
    scaled = bytearray(seeds[0])
    scaled[112:120] = np.array([2, -1024], "<f4").tobytes()
    plain = values.astype(np.int16)
    named = nib.Nifti1Image(plain, AFFINE)
    named.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"a remark"))
    by_quaternion = nib.Nifti1Image(plain, None)
    by_quaternion.set_qform(np.diag((-0.7, -0.8, 5.0, 1.0)), 1)
    colour = np.zeros((2, 2, 2), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    images = [named, nib.Nifti2Image(plain, AFFINE), by_quaternion, nib.Nifti1Image(plain[..., 0], AFFINE),
              nib.Nifti1Image(plain[..., None], AFFINE), nib.Nifti1Image(colour, AFFINE)]
    return [*seeds, bytes(scaled), *(image.to_bytes() for image in images), cifti()]


def cifti() -> bytes:
    """NIfTI too, but of points on a brain's surface, which nibabel reads as another kind of image."""
    axes = (nib.cifti2.ScalarAxis(["a"]), nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 1, 1), bool), affine=AFFINE))
    return nib.Cifti2Image(np.zeros((1, 2), np.float32), axes).to_bytes()


def gzip_seeds() -> list[bytes]:
    """The same, compressed; one in two parts."""
    seeds = nifti_seeds()
    return [*(gzip.compress(seed, mtime=0) for seed in seeds),
            gzip.compress(seeds[0][:360], mtime=0) + gzip.compress(seeds[0][360:], mtime=0)]


def read_or_refuse(path: Path) -> Scan | None:
    """The scan; None if the file was refused."""
    try:
        return read_scan(path)
    except InputFileError:
        return None


def check(scan: Scan) -> None:
    """A scan that was accepted: its numbers are numbers, nibabel's numbers, and a mask of it can be written."""
    pixels, path = scan.pixels, scan.path
    assert np.isfinite(pixels).all(), "voxels are no numbers"
    assert all(SPACING[0] <= step <= SPACING[1] for step in scan.spacing), "no spacing of a CT"
    values = np.asanyarray(nib.load(path).dataobj).reshape(scan.grid.shape)
    assert np.array_equal(apply_orientation(values, scan.grid.to_upright()).astype(pixels.dtype), pixels), \
        "nibabel reads other voxels"
    mask = pixels > np.median(pixels)
    written = write_like(mask, scan.grid, path.with_name("mask.nii"))
    assert np.array_equal(read_mask(written, like=scan), mask), "a mask comes back changed"


def read_plain(data: bytes, folder: Path) -> None:
    """Reads ``.nii`` as it is and compressed: both are refused, or hold the same voxels."""
    path, packed = folder / "scan.nii", folder / "packed.nii.gz"
    path.write_bytes(data)
    packed.write_bytes(gzip.compress(data, 1, mtime=0))
    scan, other = read_or_refuse(path), read_or_refuse(packed)
    assert (scan is None) == (other is None), "one way to read it accepts what another refuses"
    if scan is not None and other is not None:
        assert np.array_equal(scan.pixels, other.pixels), "two ways to read it differ"
        check(scan)


def read_packed(data: bytes, folder: Path) -> None:
    """Reads ``.nii.gz``."""
    path = folder / "scan.nii.gz"
    path.write_bytes(data)
    if (scan := read_or_refuse(path)) is not None:
        check(scan)
