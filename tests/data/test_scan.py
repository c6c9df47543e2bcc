"""Reading and writing scans: every orientation, every type, every broken file."""

from __future__ import annotations

import gzip
import itertools
import os
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from covidseg.data.scan import Grid, read_mask, read_scan, scan_id, write_like
from covidseg.errors import CovidsegError, InputFileError, OutputError, SettingsError

# One letter of each pair, in every order: the 48 ways to lay a volume out along its axes.
PAIRS = ("RL", "AP", "IS")
ORIENTATIONS = ["".join(letters) for order in itertools.permutations(PAIRS) for letters in itertools.product(*order)]
MM = {"R": 0.7, "L": 0.7, "A": 0.8, "P": 0.8, "I": 5.0, "S": 5.0}
UPRIGHT_SHAPE = (4, 5, 6)  # slices, rows, columns


def upright_volume(dtype: type = np.int16) -> np.ndarray:
    """Distinct values, so that a swapped or flipped axis cannot go unseen."""
    return (np.arange(np.prod(UPRIGHT_SHAPE)).reshape(UPRIGHT_SHAPE) * 3 - 250).astype(dtype)


def stored(codes: str) -> tuple[np.ndarray, np.ndarray]:
    """The upright volume as a file of that orientation holds it, and its affine: by indexing alone, no nibabel.

    A letter names the direction in which an axis counts upwards; NIfTI's world axes point to L->R, P->A, I->S.
    """
    volume = upright_volume()
    axis_of = {"I": 0, "S": 0, "A": 1, "P": 1, "R": 2, "L": 2}
    upwards = {"S", "P", "L"}  # directions in which the upright axes count
    array = volume.transpose([axis_of[c] for c in codes])
    array = array[tuple(slice(None) if c in upwards else slice(None, None, -1) for c in codes)]
    affine = np.zeros((4, 4))
    affine[:, 3] = (-10, 20, 30, 1)
    for axis, c in enumerate(codes):
        world = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}[c]
        affine[world, axis] = MM[c] * (1 if c in "RAS" else -1)
    return array, affine


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None, **header: object) -> Path:
    image = nib.Nifti1Image(array, np.diag((-0.7, -0.8, 5.0, 1.0)) if affine is None else affine)
    for field, value in header.items():
        image.header[field] = value
    nib.save(image, path)
    return path


# --- orientation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_read_upright_and_written_back_as_it_was(tmp_path, codes):
    array, affine = stored(codes)
    path = save(tmp_path / "scan.nii.gz", array, affine)
    assert "".join(nib.aff2axcodes(nib.load(path).affine)) == codes  # the test's own affine is right
    scan = read_scan(path)
    np.testing.assert_array_equal(scan.pixels, upright_volume())
    assert scan.spacing == pytest.approx((5.0, 0.8, 0.7), rel=1e-6)

    back = nib.load(write_like(scan.pixels, scan.grid, tmp_path / "back.nii.gz"))
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-5)
    assert back.get_data_dtype() == np.int16


def test_an_oblique_scan_keeps_its_spacing_and_affine(tmp_path):
    turn = np.deg2rad(12)
    affine = np.diag((-0.7, -0.8, 5.0, 1.0))
    affine[:3, :3] = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)],
                               [0, np.sin(turn), np.cos(turn)]]) @ affine[:3, :3]
    scan = read_scan(save(tmp_path / "tilted.nii.gz", upright_volume().transpose(2, 1, 0), affine))
    np.testing.assert_array_equal(scan.pixels, upright_volume())
    assert scan.spacing == pytest.approx((5.0, 0.8, 0.7), rel=1e-6)
    np.testing.assert_allclose(nib.load(write_like(scan.pixels, scan.grid, tmp_path / "b.nii.gz")).affine, affine,
                               atol=1e-5)


# --- types, units and axes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int32, np.float32])
def test_the_stored_type_is_kept(tmp_path, dtype):
    values = np.arange(120).reshape(6, 5, 4).astype(dtype)
    scan = read_scan(save(tmp_path / "scan.nii.gz", values))
    assert scan.pixels.dtype == dtype
    assert scan.value_range == (0, 119)


@pytest.mark.parametrize("dtype", [">i2", ">f4", ">u2"])
@pytest.mark.parametrize("name", ["big.nii", "big.nii.gz"])
def test_both_byte_orders(tmp_path, dtype, name):
    values = np.arange(120).reshape(6, 5, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(values.astype(dtype), np.diag((-0.7, -0.8, 5.0, 1.0)), header), tmp_path / name)
    assert nib.load(tmp_path / name).get_data_dtype() == dtype
    scan = read_scan(tmp_path / name)
    np.testing.assert_array_equal(scan.pixels, values.transpose(2, 1, 0))
    assert scan.value_range == (0, 119)


@pytest.mark.parametrize(("stored_type", "slope", "inter"), [
    ("<i2", 2, -1024), ("<i2", 0.1, 3), ("<u1", 1, -1000), ("<f4", 0.5, 7), ("<f8", 1, 0), (">i2", 1 / 3, 0)])
def test_values_are_converted_block_by_block_as_by_nibabel(tmp_path, stored_type, slope, inter):
    values = np.random.default_rng(0).integers(0, 200, (128, 129, 130)).astype(stored_type)  # two blocks and a bit
    assert values.size > 2 << 20
    header = nib.Nifti1Header(endianness=stored_type[0])
    header.set_data_dtype(stored_type)
    image = nib.Nifti1Image(values, np.diag((-0.7, -0.8, 5.0, 1.0)), header)
    nib.save(image, tmp_path / "scaled.nii")
    with (tmp_path / "scaled.nii").open("r+b") as stream:  # nibabel rescales on saving
        stream.seek(112)
        stream.write(np.array([slope, inter], f"{stored_type[0]}f4").tobytes())
    expected = np.asanyarray(nib.load(tmp_path / "scaled.nii").dataobj).astype(np.float32).transpose(2, 1, 0)
    pixels = read_scan(tmp_path / "scaled.nii").pixels
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize(("lowest", "unit"), [(-1024, "HU"), (-201, "HU"), (-200, "display"), (0, "display")])
def test_the_unit_follows_from_the_lowest_value(tmp_path, lowest, unit):
    values = np.full((6, 5, 4), 100, np.int16)
    values[0, 0, 0] = lowest
    scan = read_scan(save(tmp_path / "scan.nii.gz", values))
    assert (scan.unit, scan.value_range) == (unit, (lowest, 100))


def test_a_flat_file_is_one_slice_and_its_result_is_flat_again(tmp_path):
    flat = np.arange(30, dtype=np.int16).reshape(6, 5)
    path = save(tmp_path / "slice.nii.gz", flat)
    assert nib.load(path).shape == (6, 5)
    scan = read_scan(path)
    assert scan.pixels.shape == (1, 5, 6)
    np.testing.assert_array_equal(scan.pixels[0], flat.T)
    assert scan.grid.two_dimensional
    back = nib.load(write_like(scan.pixels > 3, scan.grid, tmp_path / "mask.nii.gz"))
    assert back.shape == (6, 5)
    np.testing.assert_array_equal(np.asanyarray(back.dataobj), flat > 3)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.nii.gz", like=scan), scan.pixels > 3)


@pytest.mark.parametrize("extra", [(1,), (1, 1)])
def test_trailing_axes_of_one_are_dropped(tmp_path, extra):
    values = np.arange(120, dtype=np.int16).reshape(6, 5, 4)
    scan = read_scan(save(tmp_path / "scan.nii.gz", values.reshape(6, 5, 4, *extra)))
    np.testing.assert_array_equal(scan.pixels, values.transpose(2, 1, 0))
    assert scan.grid.shape == (6, 5, 4)


@pytest.mark.parametrize(("name", "expected"), [
    ("case_01.nii.gz", "case_01"), ("case_01.nii", "case_01"), ("a.b.nii.gz", "a.b"), ("CASE.NII.GZ", "CASE"),
    ("/some/where/x.nii.gz", "x"), ("notes.txt", "notes.txt")])
def test_scan_id(name, expected):
    assert scan_id(name) == expected


def test_upper_case_suffixes_are_read(tmp_path):
    save(tmp_path / "a.nii", upright_volume().T)
    os.rename(tmp_path / "a.nii", tmp_path / "A.NII")
    np.testing.assert_array_equal(read_scan(tmp_path / "A.NII").pixels, upright_volume())


PEAK = """
import sys
from covidseg.data.scan import read_scan

def memory(name: str) -> int:  # kilobytes
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = memory("VmRSS")  # not the peak until now: that of the imports would hide some of what comes
scan = read_scan(sys.argv[1])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
def test_reading_needs_one_copy_of_a_volume(tmp_path):
    noise = np.random.default_rng(0).integers(-1000, 400, (256, 256, 20)).astype(np.int16)
    path = save(tmp_path / "scan.nii.gz", np.tile(noise, 16))
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert 0.9 * 16 * noise.nbytes < 1024 * int(done.stdout) < 1.25 * 16 * noise.nbytes


# --- broken input -----------------------------------------------------------------------------------------------

def check_refused(path: Path, *words: str) -> None:
    """An InputFileError that names the file, says what is wrong with it and what to do."""
    with pytest.raises(InputFileError) as caught:
        read_scan(path)
    for word in (path.name, *words):
        assert word in str(caught.value)
    assert caught.value.remedy
    assert caught.value.path == path
    with pytest.raises(InputFileError):
        read_mask(path)


def test_missing_file_folder_and_other_formats(tmp_path):
    check_refused(tmp_path / "none.nii.gz", "no such file")
    (tmp_path / "folder.nii.gz").mkdir()
    check_refused(tmp_path / "folder.nii.gz", "folder")
    (tmp_path / "slice.dcm").write_bytes(b"\0" * 128 + b"DICM")
    check_refused(tmp_path / "slice.dcm", "without a picture")
    (tmp_path / "picture.nii").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 400)
    check_refused(tmp_path / "picture.nii", "cannot be read")
    (tmp_path / "picture.nii.gz").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 400)
    check_refused(tmp_path / "picture.nii.gz", "cannot be read")
    (tmp_path / "empty.nii.gz").write_bytes(b"")
    check_refused(tmp_path / "empty.nii.gz", "cannot be read")


def test_four_axes_one_axis_and_colour(tmp_path):
    check_refused(save(tmp_path / "series.nii.gz", np.zeros((6, 5, 4, 3), np.int16)), "(6, 5, 4, 3)", "one volume")
    check_refused(save(tmp_path / "line.nii.gz", np.zeros(6, np.int16)), "(6,)")
    colour = np.zeros((6, 5, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    check_refused(save(tmp_path / "rgb.nii.gz", colour), "colour")
    check_refused(save(tmp_path / "complex.nii.gz", np.zeros((6, 5, 4), np.complex64)), "complex")


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_no_numbers(tmp_path, bad):
    values = np.zeros((6, 5, 4), np.float32)
    values[1, 2, 3] = bad
    check_refused(save(tmp_path / "nan.nii.gz", values), "not numbers")


def test_numbers_that_float32_cannot_hold(tmp_path):
    values = np.zeros((6, 5, 4))
    values[1, 2, 3] = 1e300
    check_refused(save(tmp_path / "large.nii.gz", values), "not numbers")


def test_no_affine_is_not_replaced_by_an_invented_one(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), None), tmp_path / "bare.nii.gz")
    assert nib.load(tmp_path / "bare.nii.gz").affine.shape == (4, 4)  # nibabel would go on with a made-up one
    check_refused(tmp_path / "bare.nii.gz", "no usable affine")


@pytest.mark.parametrize("spacing", [(1e-4, 1, 1), (1, 1, 5000), (0.7e-3, 0.7e-3, 5e-3)])
def test_a_spacing_that_no_ct_has(tmp_path, spacing):
    path = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((6, 5, 4), np.int16), np.diag([*spacing, 1.0])), path)
    check_refused(path, "mm, which no CT has", "spacing")


def test_a_unit_that_is_asked_for_has_to_be_there(tmp_path):
    eight_bit = save(tmp_path / "grey.nii.gz", np.arange(120, dtype=np.uint8).reshape(6, 5, 4))
    hounsfield = save(tmp_path / "hu.nii.gz", np.arange(-1000, 200, 10, dtype=np.int16).reshape(6, 5, 4))
    with pytest.raises(InputFileError, match=r"grey.nii.gz: holds values from 0 to 119, which are not Hounsfield"):
        read_scan(eight_bit, unit="HU")
    with pytest.raises(InputFileError, match=r"hu.nii.gz: .*-1000 to 190, which are not grey levels"):
        read_scan(hounsfield, unit="display")
    assert read_scan(eight_bit, unit="display").unit == read_scan(eight_bit).unit == "display"
    assert read_scan(hounsfield, unit="HU").unit == read_scan(hounsfield).unit == "HU"
    with pytest.raises(SettingsError, match=r"'hu'.*HU, display"):
        read_scan(hounsfield, unit="hu")


def test_an_axis_of_length_zero(tmp_path):
    raw = bytearray(save(tmp_path / "scan.nii", np.zeros((6, 5, 4), np.int16)).read_bytes())
    raw[46:48] = np.array(0, "<i2").tobytes()  # dim[3]
    (tmp_path / "scan.nii").write_bytes(raw)
    check_refused(tmp_path / "scan.nii", "(6, 5, 0)", "no voxel")


@pytest.mark.parametrize("step", [np.nan, np.inf])
def test_a_spacing_that_is_no_number_beside_a_whole_affine(tmp_path, step):
    raw = bytearray(save(tmp_path / "scan.nii", np.zeros((6, 5, 4), np.int16)).read_bytes())
    raw[88:92] = np.array(step, "<f4").tobytes()  # pixdim[3]
    (tmp_path / "scan.nii").write_bytes(raw)
    check_refused(tmp_path / "scan.nii", "not a number")
    raw[88:92] = np.array(5, "<f4").tobytes()
    raw[92:96] = np.array(step, "<f4").tobytes()  # pixdim[4], of an axis that a volume does not have
    (tmp_path / "scan.nii").write_bytes(raw)
    assert read_scan(tmp_path / "scan.nii").pixels.shape == (4, 5, 6)


def test_a_flat_or_infinite_affine(tmp_path):
    path = save(tmp_path / "flat.nii", np.zeros((6, 5, 4), np.int16))
    raw = bytearray(path.read_bytes())
    for name, row in (("zero", (0, 0, 0, 0)), ("infinite", (0, 0, np.inf, 0))):
        raw[312:328] = np.array(row, "<f4").tobytes()  # srow_z
        (tmp_path / f"{name}.nii").write_bytes(raw)
        check_refused(tmp_path / f"{name}.nii", "no usable affine")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    noise = np.random.default_rng(0).integers(-1000, 400, (20, 20, 10)).astype(np.int16)
    for name in ("whole.nii.gz", "whole.nii"):
        raw = save(tmp_path / name, noise).read_bytes()
        part = tmp_path / name.replace("whole", "part")
        part.write_bytes(raw[:int(share * len(raw))])
        check_refused(part, "cannot be read", "damaged")


def test_one_flipped_bit_never_gives_other_voxels_in_silence(tmp_path):
    rng = np.random.default_rng(1)
    noise = rng.integers(-1000, 400, (20, 20, 10)).astype(np.int16)
    raw = save(tmp_path / "whole.nii.gz", noise).read_bytes()
    expected, refused = read_scan(tmp_path / "whole.nii.gz").pixels, 0
    for position in rng.choice(np.arange(10, len(raw)), 40, replace=False):  # the first ten hold a date
        flipped = bytearray(raw)
        flipped[position] ^= 1 << rng.integers(8)
        (tmp_path / "flipped.nii.gz").write_bytes(flipped)
        try:
            np.testing.assert_array_equal(read_scan(tmp_path / "flipped.nii.gz").pixels, expected)
        except InputFileError:
            refused += 1
    assert refused == 40


def packed(tmp_path: Path) -> tuple[Path, bytes]:
    """A compressed scan, and its bytes."""
    noise = np.random.default_rng(3).integers(-1000, 400, (20, 20, 10)).astype(np.int16)
    path = save(tmp_path / "packed.nii.gz", noise)
    return path, path.read_bytes()


@pytest.mark.parametrize("position", range(-8, 0))
def test_every_byte_of_checksum_and_length_counts(tmp_path, position):
    path, raw = packed(tmp_path)
    for bit in range(8):
        flipped = bytearray(raw)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        check_refused(path, "cannot be read")


def test_bytes_after_the_end(tmp_path):
    path, raw = packed(tmp_path)
    expected = read_scan(path).pixels
    path.write_bytes(raw + b"more than there should be")
    check_refused(path, "cannot be read")
    path.write_bytes(raw + bytes(512))  # blocks of a tape
    np.testing.assert_array_equal(read_scan(path).pixels, expected)
    path.write_bytes(raw + gzip.compress(bytes(9)))  # a second part, whole
    np.testing.assert_array_equal(read_scan(path).pixels, expected)
    path.write_bytes(raw + gzip.compress(bytes(9))[:-3])
    check_refused(path, "cannot be read")


def test_a_file_in_several_compressed_parts(tmp_path):
    path, raw = packed(tmp_path)
    expected, plain = read_scan(path).pixels, gzip.decompress(raw)
    path.write_bytes(gzip.compress(plain[:700]) + gzip.compress(plain[700:]))
    np.testing.assert_array_equal(read_scan(path).pixels, expected)


def test_a_header_that_promises_more_than_the_file_can_hold_reserves_nothing(tmp_path):
    for name in ("large.nii", "large.nii.gz"):
        path = save(tmp_path / name, np.zeros((6, 5, 4), np.int16))
        raw = bytearray(path.read_bytes() if name.endswith(".nii") else gzip.decompress(path.read_bytes()))
        raw[40:48] = np.array([3, 30000, 30000, 30000], "<i2").tobytes()  # 54 TB
        path.write_bytes(raw if name.endswith(".nii") else gzip.compress(raw))
        check_refused(path, "cannot be read", "bytes are said to be in a file of")


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_header_raises_nothing_but_typed_errors(tmp_path):
    rng = np.random.default_rng(2)
    raw = save(tmp_path / "whole.nii", np.zeros((20, 22, 6), np.int16)).read_bytes()
    seen = set()
    for _ in range(400):
        changed = bytearray(raw)
        changed[rng.integers(352)] = rng.integers(256)
        (tmp_path / "changed.nii").write_bytes(changed)
        try:
            read_scan(tmp_path / "changed.nii")
        except CovidsegError as error:
            seen.add(type(error))
    assert seen == {InputFileError}
    for field, values in ((70, np.array([9999], "<i2")), (40, np.array([3, -6, 5, 4], "<i2"))):  # datatype; dim
        changed = bytearray(raw)
        changed[field:field + values.nbytes] = values.tobytes()
        (tmp_path / "changed.nii").write_bytes(changed)
        check_refused(tmp_path / "changed.nii")


# --- masks ------------------------------------------------------------------------------------------------------

def test_a_mask_is_true_above_zero_and_lies_upright(tmp_path):
    values = np.zeros((6, 5, 4), np.uint8)
    values[0, 1, 2], values[5, 4, 3] = 1, 3
    mask = read_mask(save(tmp_path / "m.nii.gz", values))
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.argwhere(mask), [[2, 1, 0], [3, 4, 5]])


def test_a_mask_has_to_fit_its_image(tmp_path):
    scan = read_scan(save(tmp_path / "im.nii.gz", upright_volume().T))
    fitting = np.ones((6, 5, 4), np.uint8)
    assert read_mask(save(tmp_path / "ok.nii.gz", fitting), like=scan).all()
    rounded = np.diag((-0.7001, -0.8, 5.0, 1.0))
    assert read_mask(save(tmp_path / "rounded.nii.gz", fitting, rounded), like=scan).all()
    with pytest.raises(InputFileError, match=r"shape \(6, 5, 3\).*im\.nii\.gz"):
        read_mask(save(tmp_path / "short.nii.gz", fitting[..., :3]), like=scan)
    with pytest.raises(InputFileError, match="another affine"):
        read_mask(save(tmp_path / "flipped.nii.gz", fitting, np.diag((0.7, -0.8, 5.0, 1.0))), like=scan)
    shifted = np.diag((-0.7, -0.8, 5.0, 1.0))
    shifted[2, 3] = 5
    with pytest.raises(InputFileError, match="another affine"):
        read_mask(save(tmp_path / "shifted.nii.gz", fitting, shifted), like=scan)


@pytest.mark.parametrize(("values", "complaint"), [
    (np.array([-1000, 0, 1000], np.int16), "numbers below 0"), (np.array([0, 0.25, 1], np.float32), "fractions"),
    (np.array([-1, 0, 1], np.float32), "numbers below 0")])
def test_what_is_no_mask(tmp_path, values, complaint):
    with pytest.raises(InputFileError, match=rf"m.nii.gz: is no mask: it holds {complaint}.*threshold"):
        read_mask(save(tmp_path / "m.nii.gz", np.resize(values, (6, 5, 4))))


def test_masks_may_be_stored_as_numbers_with_a_point_that_are_nearly_whole(tmp_path):
    values = np.resize(np.array([0, 1.0001, 2.9999], np.float32), (6, 5, 4))
    assert read_mask(save(tmp_path / "m.nii.gz", values)).sum() == 80


# --- writing ----------------------------------------------------------------------------------------------------

def test_remarks_and_names_in_the_input_do_not_reach_the_output(tmp_path):
    image = nib.Nifti1Image(upright_volume().T, np.diag((-0.7, -0.8, 5.0, 1.0)))
    for field in ("descrip", "db_name", "aux_file", "intent_name"):
        image.header[field] = b"JANE DOE 1950"
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", b"JANE DOE, ward 7"))
    nib.save(image, tmp_path / "named.nii")
    assert (tmp_path / "named.nii").read_bytes().count(b"JANE DOE") == 5  # the input does hold the name
    scan = read_scan(tmp_path / "named.nii")
    for name in ("mask.nii", "mask.nii.gz"):
        raw = write_like(scan.pixels > 0, scan.grid, tmp_path / name).read_bytes()
        raw = gzip.decompress(raw) if name.endswith(".gz") else raw
        assert b"JANE" not in raw
        assert b"named" not in raw


@pytest.mark.parametrize("name", ["out.nii", "out.nii.gz", "new/folder/out.nii.gz"])
def test_both_suffixes_can_be_written_and_read_by_others(tmp_path, name):
    scan = read_scan(save(tmp_path / "im.nii.gz", upright_volume().T))
    path = write_like(scan.pixels, scan.grid, tmp_path / name)
    np.testing.assert_array_equal(np.asanyarray(nib.load(path).dataobj), upright_volume().T)
    assert nib.load(write_like(scan.pixels > 0, scan.grid, path)).get_data_dtype() == np.uint8
    assert path.stat().st_mode == (tmp_path / "im.nii.gz").stat().st_mode


def test_equal_results_are_equal_files(tmp_path, monkeypatch):
    scan = read_scan(save(tmp_path / "im.nii.gz", upright_volume().T))
    for number, name in enumerate(("a.nii.gz", "b.nii.gz")):
        monkeypatch.setattr("time.time", lambda number=number: 1e9 * number)
        write_like(scan.pixels, scan.grid, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_a_result_of_another_shape_is_refused(tmp_path):
    grid = Grid((6, 5, 4), np.diag((-0.7, -0.8, 5.0, 1.0)))
    with pytest.raises(OutputError, match="does not fit"):
        write_like(np.ones((4, 6, 5), bool), grid, tmp_path / "m.nii.gz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["save", "replace"])
def test_a_full_disk_leaves_no_temporary_file_and_the_old_result(tmp_path, monkeypatch, broken):
    grid = Grid((6, 5, 4), np.diag((-0.7, -0.8, 5.0, 1.0)))
    target = write_like(np.ones((4, 5, 6), bool), grid, tmp_path / "m.nii.gz")
    before = target.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        if broken == "save":
            Path(str(args[1])).write_bytes(b"half")  # what a full disk leaves behind
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((nib, "save", full) if broken == "save" else (os, "replace", full)))
    with pytest.raises(OutputError, match="No space left") as caught:
        write_like(np.zeros((4, 5, 6), bool), grid, target)
    assert caught.value.path == target
    assert [p.name for p in tmp_path.iterdir()] == ["m.nii.gz"]
    assert target.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path):
    grid = Grid((6, 5, 4), np.diag((-0.7, -0.8, 5.0, 1.0)))
    mask = np.ones((4, 5, 6), bool)
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "folder.nii.gz" / "kept").write_text("")
    for target in (tmp_path / "file" / "m.nii.gz", tmp_path / "folder.nii.gz"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_like(mask, grid, target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.nii.gz", "kept"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_write_permission(tmp_path):
    grid = Grid((6, 5, 4), np.diag((-0.7, -0.8, 5.0, 1.0)))
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission"):
        write_like(np.ones((4, 5, 6), bool), grid, closed / "m.nii.gz")
