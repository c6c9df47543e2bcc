"""Reading and writing scans: every orientation, every type, every broken file."""

from __future__ import annotations

import errno
import gzip
import itertools
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from data_server import ORIENTATIONS, oriented
from nibabel.affines import from_matvec
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from covidseg.data import nifti
from covidseg.data.nifti import PLACE, kind_of, scans_in
from covidseg.data.scan import Grid, read_classes, read_mask, read_scan, scan_id, shown, write_like
from covidseg.errors import CovidsegError, InputFileError, OutputError, SettingsError

UPRIGHT_SHAPE = (4, 5, 6)  # slices, rows, columns


def upright_volume(dtype: type = np.int16) -> np.ndarray:
    """Distinct values, so that a swapped or flipped axis cannot go unseen."""
    return (np.arange(np.prod(UPRIGHT_SHAPE)).reshape(UPRIGHT_SHAPE) * 3 - 250).astype(dtype)


AFFINE = np.diag((-0.7, -0.8, 5.0, 1.0))
GRID = Grid((6, 5, 4), AFFINE)
BLANK = np.zeros((6, 5, 4), np.int16)


def save(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def patch(path: Path, **fields: object) -> Path:
    """Overwrites fields of a header as they stand in the file: nibabel would correct them."""
    raw = bytearray(gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes())
    header = np.frombuffer(raw, nib.Nifti1Header.template_dtype.newbyteorder("<" if raw[0] else ">"), 1)
    for field, value in fields.items():
        header[field] = value
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def noise(shape: tuple[int, ...] = (20, 20, 10)) -> np.ndarray:
    return np.random.default_rng(0).integers(-1000, 400, shape).astype(np.int16)


# --- orientation ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("codes", ORIENTATIONS)
def test_every_orientation_is_read_upright_and_written_back_as_it_was(tmp_path, codes):
    array, affine = oriented(upright_volume(), codes)
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
    affine = AFFINE.copy()
    affine[:3, :3] = [[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]] @ AFFINE[:3, :3]
    scan = read_scan(save(tmp_path / "tilted.nii.gz", upright_volume().transpose(2, 1, 0), affine))
    np.testing.assert_array_equal(scan.pixels, upright_volume())
    assert scan.spacing == pytest.approx((5.0, 0.8, 0.7), rel=1e-6)
    np.testing.assert_allclose(nib.load(write_like(scan.pixels, scan.grid, tmp_path / "b.nii.gz")).affine, affine,
                               atol=1e-5)


# --- what a header says by two ways -------------------------------------------------------------------------------

def tilted() -> np.ndarray:
    """The affine of a gantry tilted by 20 degrees: slices that follow each other askew, 5 mm along the table."""
    sheared = AFFINE.copy()
    sheared[1:3, 2] = 5 * np.sin(np.deg2rad(20)), 5 * np.cos(np.deg2rad(20))
    return sheared


def placed(path: Path, sform: np.ndarray | None, qform: np.ndarray | None, **fields: object) -> Path:
    """A scan that says its place by a sform, a qform or both, and then something else in some fields."""
    image = nib.Nifti1Image(upright_volume().T, AFFINE)
    image.set_qform(qform, None if qform is None else 1, update_affine=False)
    image.set_sform(sform, 0 if sform is None else 2)
    nib.save(image, path)
    return patch(path, **fields) if fields else path


def test_a_sheared_voxel_holds_less_than_its_sides_say(tmp_path):
    scan = read_scan(save(tmp_path / "tilted.nii", upright_volume().T, tilted()))
    assert scan.spacing == pytest.approx((5, 0.8, 0.7), rel=1e-6)
    assert scan.grid.voxel_ml() == pytest.approx(0.7 * 0.8 * 5 * np.cos(np.deg2rad(20)) / 1000, rel=1e-6)
    assert scan.warnings == ()


AWAY = from_matvec(AFFINE[:3, :3], (0, 0, -76))
BOTH_WAYS = {"far apart": (AFFINE, AWAY, {}), "sheared": (tilted(), AFFINE, {}), "only a qform": (None, AWAY, {}),
             "only a sform": (AWAY, None, {}), "broken qform": (AFFINE, AFFINE, {"quatern_b": 4}),
             "NaN as qform": (AFFINE, AFFINE, {"quatern_b": np.nan}), "a unit": (AFFINE, AFFINE, {"xyzt_units": 2}),
             "a spacing of 0": (AFFINE, None, {"pixdim": (1, 0.7, 0.8, 0, 1, 1, 1, 1)})}


@pytest.mark.parametrize("case", BOTH_WAYS)
def test_a_result_says_its_place_by_all_ways_as_its_scan(tmp_path, case):
    sform, qform, fields = BOTH_WAYS[case]
    path = placed(tmp_path / "scan.nii", sform, qform, **fields)
    scan = read_scan(path)
    back = read_header_fields(write_like(scan.pixels > 0, scan.grid, tmp_path / "mask.nii"))
    for name, value in read_header_fields(path).items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


def read_header_fields(path: Path) -> dict[str, np.ndarray]:
    header = np.frombuffer(path.read_bytes(), nib.Nifti1Header.template_dtype, 1)[0]
    return {name: header[name][:4] if name == "pixdim" else header[name] for name in PLACE}


@pytest.mark.parametrize(("sform", "qform", "fields", "words"), [
    (AFFINE, AFFINE, {}, None), (AFFINE, None, {}, None), (None, AFFINE, {}, None),
    (AFFINE, None, {"pixdim": (1, 0.7, 0.8, 4.96, 1, 1, 1, 1)}, None),  # rounded
    (AFFINE, None, {"pixdim": (1, 0.7, 0.8, 3.75, 1, 1, 1, 1)}, ["0.7 x 0.8 x 5 mm", "0.7 x 0.8 x 3.75 mm"]),
    (AFFINE, None, {"pixdim": (1, 0.7, 0.8, 0, 1, 1, 1, 1)}, ["0.7 x 0.8 x 5 mm", "0.7 x 0.8 x 0 mm"]),
    (AFFINE, None, {"pixdim": (1, -0.7, 0.8, 5, 1, 1, 1, 1)}, ["0.7 x 0.8 x 5 mm", "-0.7 x 0.8 x 5 mm"]),
    (AFFINE, AFFINE, {"pixdim": (-5, 0.7, 0.8, 5, 1, 1, 1, 1)}, ["qform cannot be computed"]),
    (AFFINE, AWAY, {}, ["(0.0, 0.0, 0.0) mm", "(0.0, 0.0, -76.0) mm"]),
    (AFFINE, AFFINE @ np.diag((1, 1, -1, 1)), {}, ["voxel (0, 0, 3)", "15.0) mm", "-15.0) mm"]),
    (AFFINE, AFFINE, {"quatern_b": 4}, ["qform cannot be computed"]),
    (AFFINE, AFFINE, {"quatern_b": np.nan}, ["nan"]), (AFFINE, AFFINE, {"xyzt_units": 1}, ["metres"])])
def test_ways_that_disagree_are_a_warning_with_both_values(tmp_path, sform, qform, fields, words):
    warnings = read_scan(placed(tmp_path / "scan.nii", sform, qform, **fields)).warnings
    assert len(warnings) == (words is not None)
    for word in words or ():
        assert word in warnings[0]


@pytest.mark.parametrize(("pixdim", "words"), [
    ((1, 0.7, 0.8, 0), ["0.7 x 0.8 x 0 mm, which no CT has", "Correct the spacing"]),
    ((1, 0, 0.8, 5), ["0 x 0.8 x 5 mm, which no CT has"]), ((1, 0.7, -0.8, 5), ["0.7 x -0.8 x 5 mm, which no CT has"]),
    ((1, 0.7, 0.8, np.nan), ["spacing are unknown"]), ((-5, 0.7, 0.8, 5), ["pixdim[0]"]),
    ((np.nan, 0.7, 0.8, 5), ["pixdim[0]"])])
def test_a_spacing_that_only_the_qform_has_is_never_made_up(tmp_path, pixdim, words):
    check_refused(placed(tmp_path / "scan.nii", None, AFFINE, pixdim=(*pixdim, 1, 1, 1, 1)), *words)


def test_a_first_number_of_zero_is_as_the_standard_has_it(tmp_path):
    affine = np.diag((0.7, 0.8, 5, 1))
    scan = read_scan(placed(tmp_path / "scan.nii", None, affine, pixdim=(0, 0.7, 0.8, 5, 1, 1, 1, 1)))
    np.testing.assert_allclose(scan.grid.affine, affine, atol=1e-6)
    assert scan.warnings == ()


def test_a_flat_file_does_not_say_how_thick_its_slice_is(tmp_path):
    image = nib.Nifti1Image(upright_volume()[0].T, AFFINE)
    image.set_qform(AFFINE, 1, update_affine=False)
    image.set_sform(None, 0)
    nib.save(image, tmp_path / "slice.nii")
    assert read_scan(tmp_path / "slice.nii").warnings == ()
    scan = read_scan(patch(tmp_path / "slice.nii", pixdim=(1, 0.7, 0.8, 0, 1, 1, 1, 1)))
    assert scan.spacing == pytest.approx((1, 0.8, 0.7))
    assert scan.warnings == ("the thickness of the slice is unknown and taken for 1 mm",)


@pytest.mark.parametrize("field", ["sform_code", "qform_code"])
def test_a_place_of_an_unknown_kind_is_not_passed_over(tmp_path, field):
    assert read_scan(placed(tmp_path / "scan.nii", AFFINE, AWAY, **{field: 5})).spacing == pytest.approx((5, 0.8, 0.7))
    check_refused(placed(tmp_path / "scan.nii", AFFINE, AWAY, **{field: 9}), f"{field} is said to be 9")


# --- types, units and axes --------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [">i2", ">f4", ">u2"])
@pytest.mark.parametrize("name", ["big.nii", "big.nii.gz"])
def test_both_byte_orders(tmp_path, dtype, name):
    values = np.arange(120).reshape(6, 5, 4)
    header = nib.Nifti1Header(endianness=">")
    header.set_data_dtype(dtype)
    nib.save(nib.Nifti1Image(values.astype(dtype), AFFINE, header), tmp_path / name)
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
    nib.save(nib.Nifti1Image(values, AFFINE, header), tmp_path / "scaled.nii")
    patch(tmp_path / "scaled.nii", scl_slope=slope, scl_inter=inter)
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

open("/proc/self/clear_refs", "w").write("5")  # forget the peak of the imports
before = memory("VmRSS")
scan = read_scan(sys.argv[1])
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc to ask")
def test_reading_needs_one_copy_of_a_volume(tmp_path):
    volume = np.tile(noise((256, 256, 20)), 16)
    path = save(tmp_path / "scan.nii.gz", volume)
    done = subprocess.run([sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True)
    assert 0.9 * volume.nbytes < 1024 * int(done.stdout) < 1.25 * volume.nbytes


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
    for name, content in (("a.nii", b"\x89PNG\r\n\x1a\n" + b"\0" * 400), ("empty.nii.gz", b"")):
        (tmp_path / name).write_bytes(content)
        check_refused(tmp_path / name, "cannot be read")


@pytest.mark.parametrize(("array", "fault"), [
    (np.zeros((6, 5, 4, 3), np.int16), "(6, 5, 4, 3), not one volume"), (np.zeros(6, np.int16), "(6,)"),
    (np.zeros((6, 5, 4), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")]), "colour"),
    (np.zeros((6, 5, 4), np.complex64), "complex"),
    *((np.resize([0, bad], (6, 5, 4)).astype(dtype), "not numbers") for bad, dtype in (
        (np.nan, np.float32), (np.inf, np.float32), (-np.inf, np.float32), (1e300, np.float64)))])
def test_voxels_that_are_no_grey_values_of_one_volume(tmp_path, array, fault):
    check_refused(save(tmp_path / "scan.nii.gz", array), fault)


@pytest.mark.parametrize(("fields", "words"), [
    ({"sform_code": 0, "qform_code": 0}, ["no usable affine"]),  # nibabel would go on with a made-up one
    ({"srow_z": (0, 0, 0, 0)}, ["no usable affine"]), ({"srow_z": (0, 0, np.inf, 0)}, ["no usable affine"]),
    ({"dim": (3, 6, 5, 0, 1, 1, 1, 1)}, ["(6, 5, 0)", "no voxel"]), ({"dim": (3, -6, 5, 4, 1, 1, 1, 1)}, []),
    ({"datatype": 9999}, []),
    ({"pixdim": (1, 1, 1, np.nan, 1, 1, 1, 1)}, ["not a number"]),
    ({"pixdim": (1, 1, 1, np.inf, 1, 1, 1, 1)}, ["not a number"]),
    ({"dim": (3, 30000, 30000, 30000, 1, 1, 1, 1)}, ["cannot be read", "bytes are said to be in a file of"])])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_headers_that_say_what_cannot_be(tmp_path, fields, words, name):
    check_refused(patch(save(tmp_path / name, BLANK), **fields), *words)


def test_the_spacing_of_an_axis_that_a_volume_does_not_have_does_no_harm(tmp_path):
    path = patch(save(tmp_path / "scan.nii", BLANK), pixdim=(1, 1, 1, 5, np.nan, 1, 1, 1))
    assert read_scan(path).pixels.shape == (4, 5, 6)


@pytest.mark.parametrize("spacing", [(1e-4, 1, 1), (1, 1, 5000), (0.7e-3, 0.7e-3, 5e-3)])
def test_a_spacing_that_no_ct_has(tmp_path, spacing):
    check_refused(save(tmp_path / "scan.nii.gz", BLANK, np.diag([*spacing, 1.0])), "mm, which no CT has", "spacing")


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


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files(tmp_path, share):
    for name in ("whole.nii.gz", "whole.nii"):
        raw = save(tmp_path / name, noise()).read_bytes()
        part = tmp_path / name.replace("whole", "part")
        part.write_bytes(raw[:int(share * len(raw))])
        check_refused(part, "cannot be read", "damaged")


def test_one_flipped_bit_never_gives_other_voxels_in_silence(tmp_path):
    """The first ten bytes hold a date, the last eight checksum and length."""
    rng = np.random.default_rng(1)
    path = save(tmp_path / "scan.nii.gz", noise())
    raw = path.read_bytes()
    inside = [(position, rng.integers(8)) for position in rng.choice(np.arange(10, len(raw) - 8), 40, replace=False)]
    for position, bit in [*inside, *itertools.product(range(-8, 0), range(8))]:
        flipped = bytearray(raw)
        flipped[position] ^= 1 << bit
        path.write_bytes(flipped)
        check_refused(path, "cannot be read")


def test_bytes_after_the_end(tmp_path):
    path = save(tmp_path / "packed.nii.gz", noise())
    raw, expected, more = path.read_bytes(), read_scan(path).pixels, gzip.compress(bytes(9))
    for whole, rest in ((False, b"more than there should be"), (True, bytes(512)),  # blocks of a tape
                        (True, more), (False, more[:-3])):                          # a second part
        path.write_bytes(raw + rest)
        if whole:
            np.testing.assert_array_equal(read_scan(path).pixels, expected)
        else:
            check_refused(path, "cannot be read")


def test_a_file_in_several_compressed_parts(tmp_path):
    path = save(tmp_path / "packed.nii.gz", noise())
    expected, plain = read_scan(path).pixels, gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(plain[:700]) + gzip.compress(plain[700:]))
    np.testing.assert_array_equal(read_scan(path).pixels, expected)


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


@pytest.mark.parametrize("offset", [0, 348])
@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_voxels_begin_where_the_standard_says_at_the_earliest(tmp_path, offset, kind):
    path = tmp_path / "scan.nii"
    nib.save(kind(upright_volume().T, AFFINE), path)
    raw = bytearray(path.read_bytes())
    np.frombuffer(raw, kind.header_class.template_dtype, 1)["vox_offset"] = offset
    path.write_bytes(raw)
    np.testing.assert_array_equal(read_scan(path).pixels, upright_volume())
    raw[kind.header_class.sizeof_hdr] = 1  # remarks follow, so that voxels cannot
    path.write_bytes(raw)
    check_refused(path, f"begin at byte {offset}", "vox_offset")


@pytest.mark.parametrize(("fields", "word"), [
    *(({"vox_offset": offset}, "begin at byte") for offset in (np.nan, np.inf, -16, 352.5)),
    ({"vox_offset": 353}, ""), ({"vox_offset": 1e9}, "byte 1000000000"), ({"bitpix": 8}, "8 bits and to be int16")])
@pytest.mark.parametrize("name", ["scan.nii", "scan.nii.gz"])
def test_fields_that_contradict_the_file(tmp_path, fields, word, name):
    check_refused(patch(save(tmp_path / name, upright_volume().T), **fields), word)


@pytest.mark.parametrize(("name", "change"), [("scan.nii", gzip.compress), ("scan.nii.gz", gzip.decompress)])
def test_compressed_or_not_is_told_by_the_content(tmp_path, name, change):
    path = save(tmp_path / name, upright_volume().T)
    path.write_bytes(change(path.read_bytes()))
    np.testing.assert_array_equal(read_scan(path).pixels, upright_volume())


@pytest.mark.parametrize(("name", "content", "words"), [
    ("a.hdr", b"", ["pair", "nib-convert"]), ("a.img.gz", b"", ["pair", "nib-convert"]),
    ("a.nii.gz", b"<!DOCTYPE html>", ["a web page"]), ("a.nii.gz", b"PK\3\4" + bytes(400), ["a zip archive"]),
    ("a.nii", b"version https://git-lfs.github.com/spec/v1", ["Git LFS"])])
def test_what_a_file_is_instead_is_said(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    check_refused(tmp_path / name, *words)


def test_names_that_lead_to_no_file(tmp_path):
    (tmp_path / "link.nii.gz").symlink_to("nowhere.nii.gz")
    check_refused(tmp_path / "link.nii.gz", "a link to a file that is not there")
    (tmp_path / "loop.nii").symlink_to("loop.nii")
    check_refused(tmp_path / "loop.nii", "cannot be opened", "name")
    os.mkfifo(tmp_path / "pipe.nii")
    check_refused(tmp_path / "pipe.nii", "no ordinary file")
    check_refused(tmp_path / f"{'long' * 70}.nii", "cannot be opened", "name")


@pytest.mark.parametrize("fields", [{"datatype": 9999}, {"vox_offset": 100}, {"pixdim": (1, -0.7, 0.8, 5, 1, 1, 1, 1)}])
def test_an_error_is_the_only_thing_that_is_said(tmp_path, fields, caplog):
    with suppress(InputFileError):
        read_scan(patch(save(tmp_path / "scan.nii", BLANK), **fields))
    assert not caplog.records, "nibabel's own lines say little"


def test_what_the_file_system_refuses_is_a_typed_error(tmp_path, monkeypatch, closed):
    long = tmp_path / ("long" * 70)
    for path in (long, tmp_path / "no" / "such", tmp_path / "a\0b"):
        if path != long:
            assert kind_of(path) == ""
        with pytest.raises(InputFileError) as caught:
            read_scan(path)
        assert (caught.value.path, bool(caught.value.remedy)) == (path, True)
    with pytest.raises(InputFileError, match=r"cannot be opened \(File name too long\).*Check its name"):
        read_scan(long)
    path = save(tmp_path / "scan.nii", BLANK)
    for one, kind in ((path, "file"), (tmp_path, "folder"), (Path("/dev/null"), "other"), (path / "below", "")):
        assert kind_of(one) == kind
    closed(path, tmp_path)
    check_refused(path, "cannot be opened (Permission denied)")
    with pytest.raises(InputFileError, match="Permission denied"):
        read_scan(tmp_path)
    with pytest.raises(InputFileError, match="Permission denied"):
        scans_in(tmp_path)

    def refuse(path: Path, **kwargs: object) -> None:  # what lies in a folder of another user
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "stat", refuse)
    for other in (path, tmp_path, tmp_path / "IM0001"):
        with pytest.raises(InputFileError, match="Permission denied"):
            read_scan(other)


# --- size ---------------------------------------------------------------------------------------------------------

def test_more_voxels_than_any_ct_has(tmp_path, monkeypatch):
    nifti.refuse_huge((1024, 1024, 2000), tmp_path)
    with pytest.raises(InputFileError, match="claims to hold 27000000000 voxels, more than any CT has"):
        nifti.refuse_huge((30000, 30000, 30), tmp_path)
    path = save(tmp_path / "scan.nii.gz", BLANK)
    monkeypatch.setattr(nifti, "MAX_VOXELS", 119)
    check_refused(path, "claims to hold 120 voxels")


def test_memory_that_is_not_there_is_a_typed_error(tmp_path, monkeypatch):
    def full(*args: object, **kwargs: object) -> None:
        raise MemoryError("Unable to allocate 50.3 GiB")

    path = save(tmp_path / "scan.nii.gz", BLANK.astype(np.float32))
    scan = read_scan(path)
    with monkeypatch.context() as limit:
        limit.setattr(nib, "save", full)
        with pytest.raises(OutputError, match="needs more memory"):
            write_like(scan.pixels, scan.grid, tmp_path / "out.nii")
    with monkeypatch.context() as limit:
        limit.setattr(np, "rint", full)  # the copies that a mask needs
        for read in (read_mask, read_classes):
            with pytest.raises(InputFileError, match="needs more memory"):
                read(path)
    monkeypatch.setattr(np, "empty", full)
    check_refused(path, "needs more memory than this machine has free")
    assert [one.name for one in tmp_path.iterdir()] == ["scan.nii.gz"]


# --- files in a folder ------------------------------------------------------------------------------------------

def test_the_scans_of_a_folder(tmp_path):
    for name in ("b.nii", "A.NII.GZ", "._b.nii", ".hidden.nii.gz", "notes.txt", "a.nii.gz.part"):
        (tmp_path / name).touch()
    assert [path.name for path in scans_in(tmp_path)] == ["A.NII.GZ", "b.nii"]
    assert scans_in(tmp_path / "none") == []


def test_a_name_that_is_no_utf8_can_be_written():
    assert shown(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert shown("café") == "café"


# --- masks ------------------------------------------------------------------------------------------------------

def test_a_mask_is_true_above_zero_and_lies_upright(tmp_path):
    values = np.zeros((6, 5, 4), np.uint8)
    values[0, 1, 2], values[5, 4, 3] = 1, 3
    mask = read_mask(save(tmp_path / "m.nii.gz", values))
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.argwhere(mask), [[2, 1, 0], [3, 4, 5]])


def test_a_mask_has_to_fit_its_image(tmp_path):
    scan = read_scan(save(tmp_path / "im.nii.gz", upright_volume().T))
    fitting, moved = np.ones((6, 5, 4), np.uint8), AFFINE.copy()
    moved[2, 3] = 5
    for affine in (AFFINE, np.diag((-0.7001, -0.8, 5.0, 1.0))):  # rounded
        assert read_mask(save(tmp_path / "m.nii.gz", fitting, affine), like=scan).all()
    with pytest.raises(InputFileError, match=r"shape \(6, 5, 3\).*im\.nii\.gz"):
        read_mask(save(tmp_path / "m.nii.gz", fitting[..., :3]), like=scan)
    for affine in (np.diag((0.7, -0.8, 5.0, 1.0)), moved, np.diag((-0.7, -0.8, 5.2, 1.0))):
        with pytest.raises(InputFileError, match="another affine"):
            read_mask(save(tmp_path / "m.nii.gz", fitting, affine), like=scan)


def test_a_small_difference_in_spacing_adds_up_over_a_slice(tmp_path):
    """A hundredth of a millimetre in each step is five millimetres at the end of 512."""
    scan = read_scan(save(tmp_path / "im.nii.gz", np.zeros((512, 8, 2), np.uint8)))
    rounded, other = (save(tmp_path / name, np.ones((512, 8, 2), np.uint8), np.diag((-step, -0.8, 5.0, 1.0)))
                      for name, step in (("rounded.nii.gz", 0.7005), ("other.nii.gz", 0.709)))
    assert read_mask(rounded, like=scan).all()
    with pytest.raises(InputFileError, match=r"4\.6 mm away"):
        read_mask(other, like=scan)


@pytest.mark.parametrize("codes", ["LPS", "SAR", "ALI"])
def test_a_mask_of_the_same_place_may_have_its_voxels_in_another_order(tmp_path, codes):
    array, affine = oriented(upright_volume(), "RAS")
    scan = read_scan(save(tmp_path / "im.nii.gz", array, affine))
    mask = nib.Nifti1Image((array > 0).astype(np.uint8), affine)
    turned = ornt_transform(io_orientation(affine), axcodes2ornt(codes))
    nib.save(mask.as_reoriented(turned), tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.nii.gz", like=scan), scan.pixels > 0)
    moved = mask.as_reoriented(turned)
    moved.affine[0, 3] += 1
    nib.save(nib.Nifti1Image(np.asarray(moved.dataobj), moved.affine), tmp_path / "m.nii.gz")
    with pytest.raises(InputFileError, match="another affine"):
        read_mask(tmp_path / "m.nii.gz", like=scan)


@pytest.mark.parametrize(("values", "complaint"), [
    (np.array([-1000, 0, 1000], np.int16), "numbers below 0"), (np.array([0, 0.25, 1], np.float32), "fractions"),
    (np.array([-1, 0, 1], np.float32), "numbers below 0")])
def test_what_is_no_mask(tmp_path, values, complaint):
    with pytest.raises(InputFileError, match=rf"m.nii.gz: is no mask: it holds {complaint}.*threshold"):
        read_mask(save(tmp_path / "m.nii.gz", np.resize(values, (6, 5, 4))))


def test_masks_may_be_stored_as_numbers_with_a_point_that_are_nearly_whole(tmp_path):
    values = np.resize(np.array([0, 1.0001, 2.9999], np.float32), (6, 5, 4))
    assert read_mask(save(tmp_path / "m.nii.gz", values)).sum() == 80


def test_the_numbers_of_a_mask_are_its_classes(tmp_path):
    for values, expected in ((np.array([0, 1, 3], np.uint8), [0, 1, 3]), (np.array([0, 1, 300], np.int16), [0, 1, 255]),
                             (np.array([0, 0.0001, 2.9999], np.float32), [0, 1, 3])):
        path = save(tmp_path / "m.nii.gz", np.resize(values, (6, 5, 4)))
        classes = read_classes(path)
        assert classes.dtype == np.uint8
        assert np.unique(classes).tolist() == expected
        np.testing.assert_array_equal(classes > 0, read_mask(path))
    with pytest.raises(InputFileError, match="shape"):
        read_classes(path, like=read_scan(save(tmp_path / "im.nii.gz", np.zeros((6, 5, 3), np.int16))))


def test_a_voxel_of_one_millimetre_each_way_has_no_known_size():
    assert Grid((6, 5, 4), np.diag([-0.7, -0.8, 5.0, 1.0])).pixel_mm() == pytest.approx((0.8, 0.7))
    assert Grid((6, 5, 4), np.diag([-1.0, -1.0, 5.0, 1.0])).pixel_mm() == (1, 1)
    assert Grid((6, 5, 4), np.diag([-1.0, -1.0, 1.0, 1.0])).pixel_mm() is None


# --- writing ----------------------------------------------------------------------------------------------------

def test_remarks_and_names_in_the_input_do_not_reach_the_output(tmp_path):
    image = nib.Nifti1Image(upright_volume().T, AFFINE)
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


@pytest.mark.parametrize("shape", [(4, 6, 5), (5, 6), (4, 5, 6, 1), (120,), ()])
def test_a_result_of_another_shape_is_refused(tmp_path, shape):
    with pytest.raises(OutputError, match=r"does not fit.*\(slices, rows, columns\)"):
        write_like(np.ones(shape, bool), GRID, tmp_path / "m.nii.gz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dtype", "values", "stored"), [
    (int, (0, 255), np.uint8), (int, (-1, 127), np.int8), (int, (0, 256), np.uint16), (int, (-1024, 3071), np.int16),
    (int, (0, 2**32 - 1), np.uint32), (int, (-70000, 70000), np.int32), (np.uint64, (0, 1), np.uint8),
    (">i8", (0, 1), np.uint8), (bool, (0, 1), np.uint8), (np.int16, (0, 1), np.int16), (">i2", (0, 1), np.int16),
    (np.uint16, (0, 1), np.uint16), (np.float16, (0, 0.5), np.float32), (float, (0, 0.1), np.float32),
    (np.longdouble, (0, 0.5), np.float32), (np.float32, (0, 0.5), np.float32)])
@pytest.mark.parametrize("name", ["m.nii", "m.nii.gz"])
def test_any_numbers_are_stored_in_a_type_that_programs_read(tmp_path, dtype, values, stored, name):
    array = np.resize(np.array(values, dtype), UPRIGHT_SHAPE)
    array[0, 0] = values[0]
    written = nib.load(write_like(array, GRID, tmp_path / name))
    assert written.get_data_dtype() == stored
    np.testing.assert_array_equal(np.asanyarray(written.dataobj), array.astype(stored)[:, :, ::-1].T[::-1])
    result = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name)))
    np.testing.assert_array_equal(result, array.astype(stored))


@pytest.mark.parametrize(("values", "words"), [
    (np.array([1j]), "type complex128 cannot be stored"), (np.array(["a"]), "cannot be stored"),
    (np.array([None]), "type object cannot be stored"), (np.array([0], "m8[s]"), "cannot be stored"),
    (np.array([2**32]), "whole numbers from 4294967296 to 4294967296, beyond 32 bits"),
    (np.array([-1, 2**31]), "beyond 32 bits"), (np.array([np.nan]), "not numbers"),
    (np.array([0, np.inf], np.float32), "not numbers"), (np.array([1e39]), "beyond float32")])
def test_what_nifti_cannot_store_is_refused(tmp_path, values, words):
    with pytest.raises(OutputError, match=words) as caught:
        write_like(np.resize(values, UPRIGHT_SHAPE), GRID, tmp_path / "m.nii.gz")
    assert (caught.value.path, bool(caught.value.remedy)) == (tmp_path / "m.nii.gz", True)
    with pytest.raises(OutputError, match="more than 32767 voxels along an axis"):
        write_like(np.zeros((40000, 1, 1), bool), Grid((1, 1, 40000), AFFINE), tmp_path / "m.nii.gz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["o.png", "o", "o.gz", "nii.gz"])
def test_a_name_that_is_no_nifti_file_is_refused(tmp_path, name):
    with pytest.raises(OutputError, match=r"not named as a NIfTI file.*\.nii or \.nii\.gz"):
        write_like(np.ones((4, 5, 6), bool), GRID, tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("broken", ["save", "replace"])
def test_a_full_disk_leaves_no_temporary_file_and_the_old_result(tmp_path, monkeypatch, broken):
    target = write_like(np.ones((4, 5, 6), bool), GRID, tmp_path / "m.nii.gz")
    before = target.read_bytes()

    def full(*args: object, **kwargs: object) -> None:
        if broken == "save":
            Path(str(args[1])).write_bytes(b"half")  # what a full disk leaves behind
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((nib, "save", full) if broken == "save" else (os, "replace", full)))
    with pytest.raises(OutputError, match="No space left") as caught:
        write_like(np.zeros((4, 5, 6), bool), GRID, target)
    assert caught.value.path == target
    assert [p.name for p in tmp_path.iterdir()] == ["m.nii.gz"]
    assert target.read_bytes() == before


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "folder.nii.gz").mkdir()
    (tmp_path / "folder.nii.gz" / "kept").write_text("")
    for target in (tmp_path / "file" / "m.nii.gz", tmp_path / "folder.nii.gz"):
        with pytest.raises(OutputError, match="cannot be written"):
            write_like(np.ones((4, 5, 6), bool), GRID, target)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "folder.nii.gz", "kept"]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_without_write_permission(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="Permission"):
        write_like(np.ones((4, 5, 6), bool), GRID, closed / "m.nii.gz")
