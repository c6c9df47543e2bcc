"""Slices one by one: the same voxels, the same files and the same faults as of whole volumes, in flat memory."""

from __future__ import annotations

import gzip
import io
import itertools
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, ornt_transform

from covidseg.data import slices as slice_files
from covidseg.data.scan import read_mask, read_scan, write_like
from covidseg.data.slices import SliceReader, shown, slice_writer, write_lungs
from covidseg.errors import InputFileError, NoLungError, OutputError
from covidseg.lungs import lung_masks

ORIENTATIONS = ["".join(letters) for order in itertools.permutations(("RL", "AP", "IS"))
                for letters in itertools.product(*order)]


def save(path: Path, order: str = "LPS", dtype: type = np.int16, shape: tuple[int, ...] = (6, 5, 4)) -> Path:
    """A volume with a value of its own in each voxel, stored along these axes."""
    values = (np.arange(np.prod(shape)).reshape(shape) * 3 - 200).astype(dtype)
    affine = np.diag((-0.7, -0.8, 5.0, 1.0))
    affine[:3, 3] = (-10, 20, 30)
    image = nib.Nifti1Image(values, affine)
    if len(shape) == 3:
        image = image.as_reoriented(ornt_transform(nib.io_orientation(affine), axcodes2ornt(order)))
    nib.save(image, path)
    return path


def content(path: Path) -> bytes:
    """A file without its compression."""
    raw = path.read_bytes()
    return gzip.decompress(raw) if path.name.endswith(".gz") else raw


@pytest.mark.parametrize("order", ORIENTATIONS)
def test_slices_are_those_of_the_volume_in_stored_order(order: str, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", order)
    scan, reader = read_scan(path), SliceReader(path)
    assert reader.shape == scan.pixels.shape
    assert len(reader) == len(scan.pixels)
    for _ in range(2):
        slices = list(reader)
        assert len(slices) == len(reader)
        for position, image in enumerate(slices):
            assert image.dtype == scan.pixels.dtype
            np.testing.assert_array_equal(image, scan.pixels[reader.number(position)])
    falling = order[2] == "I"
    assert reader.number(0) == (len(reader) - 1 if falling else 0)
    assert reader.grid.in_slices() == (order[2] in "IS")


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.float32])
@pytest.mark.parametrize("order", ORIENTATIONS)
def test_a_result_is_the_file_that_a_whole_array_gives(order: str, dtype: type, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", order)
    scan, reader = read_scan(path), SliceReader(path)
    result = np.random.default_rng(0).integers(0, 2, scan.pixels.shape).astype(dtype)
    for name in ("mask.nii", "mask.nii.gz"):
        expected = write_like(result, scan.grid, tmp_path / "whole" / name)
        with slice_writer(tmp_path / "slices" / name, reader.grid, np.uint8 if dtype is bool else dtype) as write:
            for position in range(len(reader)):
                write(result[reader.number(position)])
        assert content(tmp_path / "slices" / name) == content(expected), "header and voxels, byte for byte"
    assert sorted(p.name for p in (tmp_path / "slices").iterdir()) == ["mask.nii", "mask.nii.gz"]


def test_equal_results_are_equal_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = SliceReader(save(tmp_path / "scan.nii.gz"))
    for number, name in enumerate(("a.nii.gz", "b.nii.gz")):
        monkeypatch.setattr("time.time", lambda number=number: 1e9 * number)
        with slice_writer(tmp_path / name, reader.grid) as write:
            for image in reader:
                write(image > 0)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()
    assert (tmp_path / "a.nii.gz").stat().st_mode == (tmp_path / "scan.nii.gz").stat().st_mode


def test_a_flat_file_is_one_slice(tmp_path: Path) -> None:
    path = save(tmp_path / "flat.nii.gz", shape=(6, 5))
    scan, reader = read_scan(path), SliceReader(path)
    image, = reader
    np.testing.assert_array_equal(image, scan.pixels[0])
    with slice_writer(tmp_path / "mask.nii", reader.grid) as write:
        write(image > 3)
    assert content(tmp_path / "mask.nii") == content(write_like(scan.pixels > 3, scan.grid, tmp_path / "whole.nii"))


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_types_are_those_of_the_volume(dtype: type, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii", dtype=dtype)
    assert next(iter(SliceReader(path))).dtype == read_scan(path).pixels.dtype


def test_a_header_that_is_no_scan_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such file"):
        SliceReader(tmp_path / "none.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4, 2), np.int16), np.eye(4)), tmp_path / "series.nii.gz")
    with pytest.raises(InputFileError, match="not one volume"):
        SliceReader(tmp_path / "series.nii.gz")


@pytest.mark.parametrize("order", ["LPS", "SPL"])
def test_damage_shows_in_each_pass(order: str, tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz", order, shape=(20, 20, 10))
    raw = path.read_bytes()
    reader = SliceReader(path)
    for position in (-1, -6, len(raw) // 2):
        harmed = bytearray(raw)
        harmed[position] ^= 4
        path.write_bytes(harmed)
        with pytest.raises(InputFileError, match=r"scan\.nii\.gz.*cannot be read"):
            list(reader)
    path.write_bytes(raw)
    assert len(list(reader)) == len(reader)


def test_a_voxel_that_is_no_number_shows(tmp_path: Path) -> None:
    values = np.zeros((6, 5, 4), np.float32)
    values[1, 2, 3] = np.nan
    nib.save(nib.Nifti1Image(values, np.diag((-0.7, -0.8, 5.0, 1.0))), tmp_path / "nan.nii.gz")
    with pytest.raises(InputFileError, match="not numbers"):
        list(SliceReader(tmp_path / "nan.nii.gz"))


@pytest.mark.parametrize("order", ["LPS", "SPL"])
def test_nothing_is_left_behind_when_writing_fails(order: str, tmp_path: Path) -> None:
    reader = SliceReader(save(tmp_path / "scan.nii.gz", order))
    target = tmp_path / "out" / "mask.nii.gz"

    def broken(count: int, error: Exception | None) -> None:
        with slice_writer(target, reader.grid) as write:
            for image in list(reader)[:count]:
                write(image > 0)
            if error is not None:
                raise error
    with pytest.raises(OutputError, match=f"{len(reader) - 1} slices were written, the input has {len(reader)}"):
        broken(len(reader) - 1, None)
    with pytest.raises(KeyError):
        broken(1, KeyError())
    assert not list(tmp_path.glob("out/*"))
    broken(len(reader), None)
    before = target.read_bytes()
    with pytest.raises(KeyError):
        broken(len(reader), KeyError())
    assert target.read_bytes() == before, "an old result stays"
    assert [p.name for p in target.parent.iterdir()] == ["mask.nii.gz"]


def test_a_full_disk_and_a_file_in_the_way(tmp_path: Path) -> None:
    reader = SliceReader(save(tmp_path / "scan.nii.gz"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"), \
            slice_writer(tmp_path / "file" / "mask.nii.gz", reader.grid):
        pass
    with pytest.raises(OutputError, match="No space left"), slice_writer(tmp_path / "mask.nii.gz", reader.grid):
        raise OSError(28, "No space left on device")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "scan.nii.gz"]


@pytest.mark.parametrize(("terminal", "progress"), [(True, True), (True, False), (False, True)])
def test_progress_is_shown_on_a_terminal_only(terminal: bool, progress: bool, tmp_path: Path,
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    reader, screen = SliceReader(save(tmp_path / "scan.nii.gz")), Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    assert len(list(shown(reader, "lungs", progress))) == len(reader)
    assert screen.getvalue() == "", "nothing for what is done at once"
    monkeypatch.setattr(slice_files, "PATIENCE", 0)
    assert len(list(shown(reader, "lungs", progress))) == len(reader)
    assert ("lungs" in screen.getvalue()) == (terminal and progress)


@pytest.mark.parametrize("order", ["LPS", "LPI", "SPL"])
def test_lungs_of_a_file_are_those_of_its_array(order: str, tiny_phantom: Path, tmp_path: Path) -> None:
    image = nib.load(tiny_phantom / "im" / "phantom_01.nii.gz")
    turn = ornt_transform(nib.io_orientation(image.affine), axcodes2ornt(order))
    nib.save(image.as_reoriented(turn), tmp_path / "scan.nii.gz")
    scan = read_scan(tmp_path / "scan.nii.gz")
    for volume in (None, True, False):
        expected = lung_masks(scan.pixels, volume=volume)
        found, slices = write_lungs(scan.path, tmp_path / "mask.nii.gz", volume=volume)
        assert np.array_equal(read_mask(tmp_path / "mask.nii.gz", like=scan), expected)
        assert (found, slices) == (expected.any(axis=(1, 2)).sum(), len(expected))


def test_no_lung_no_file(tmp_path: Path) -> None:
    path = save(tmp_path / "scan.nii.gz")
    with pytest.raises(NoLungError, match=r"scan\.nii\.gz.*no lung"):
        write_lungs(path, tmp_path / "out" / "mask.nii.gz")
    assert not list(tmp_path.glob("out/*"))


PEAK = """
import sys
from covidseg.data.scan import read_scan
from covidseg.data.slices import SliceReader

def peak() -> int:  # kilobytes
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak()
if sys.argv[1] == "slices":
    assert sum(1 for image in SliceReader(sys.argv[2])) > 0
else:
    read_scan(sys.argv[2])
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
def test_memory_is_one_copy_of_a_volume_and_flat_for_slices(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-1000, 400, (256, 256, 20)).astype(np.int16)

    def peak(how: str, repeats: int) -> float:
        """Megabytes that reading needs, in a process of its own."""
        path = tmp_path / f"{repeats}.nii.gz"
        nib.save(nib.Nifti1Image(np.tile(noise, repeats), np.diag((-0.7, -0.8, 5.0, 1.0))), path)
        done = subprocess.run([sys.executable, "-c", PEAK, how, str(path)], capture_output=True, text=True, check=True)
        return int(done.stdout) / 1024
    short, long = (peak("slices", repeats) for repeats in (2, 16))
    assert abs(long - short) < 4
    assert long < 12
    assert peak("volume", 16) < 1.25 * 16 * noise.nbytes / 2 ** 20
