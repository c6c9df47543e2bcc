"""DICOM in: which series of a folder is taken, and that every voxel lies where its slice says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicoms import multiframe, save, slice_of, write_series
from nibabel.orientations import apply_orientation
from pydicom.data import get_testdata_file
from pydicom.uid import RLELossless, SecondaryCaptureImageStorage

from covidseg.data import nifti
from covidseg.data.dicom import describe, find_series
from covidseg.data.scan import Scan, read_mask, read_scan, write_like
from covidseg.errors import InputFileError, SettingsError

# Distinct values and three sizes, so that nothing swapped or flipped goes unseen; every slice goes below -200.
HU = (np.arange(4 * 6 * 5).reshape(4, 6, 5) * 7 - 900).astype(np.int16)  # (slices, rows, columns)
# Directions of columns and rows, and the step from slice to slice.
PLANES = {"axial": ((1, 0, 0, 0, 1, 0), (0, 0, 5)), "from the head": ((1, 0, 0, 0, 1, 0), (0, 0, -5)),
          "prone": ((-1, 0, 0, 0, -1, 0), (0, 0, 5)), "coronal": ((1, 0, 0, 0, 0, -1), (0, 2, 0)),
          "sagittal": ((0, 1, 0, 0, 0, -1), (2, 0, 0)), "turned": ((0.8, 0.6, 0, -0.6, 0.8, 0), (0, 0, 5)),
          "gantry tilt": ((1, 0, 0, 0, 0.9396926, -0.3420201), (0, 0, 5))}


def stored(scan: Scan) -> np.ndarray:
    """Voxels ``(i, j, k)`` in the order of the scan's affine."""
    return apply_orientation(scan.pixels, scan.grid.from_upright())


def test_each_voxel_lies_where_its_slice_says(tmp_path: Path) -> None:
    for name, (directions, step) in PLANES.items():
        files = write_series(tmp_path / name / "deep" / "down", HU, step, ImageOrientationPatient=list(directions))
        (tmp_path / name / "DICOMDIR").write_bytes(b"\0" * 128 + b"DICM of no use")
        (tmp_path / name / "readme.txt").write_text("from the hospital")
        scan = read_scan(tmp_path / name)
        voxels, to_voxel = stored(scan), np.linalg.inv(scan.grid.affine)
        for path, pixels in zip(files, HU, strict=True):
            data = pydicom.dcmread(path)
            x, y = np.array(directions).reshape(2, 3)
            for row, column in ((0, 0), (5, 1), (2, 4)):
                point = data.ImagePositionPatient + x * 0.7 * column + y * 0.8 * row
                place = to_voxel @ [-point[0], -point[1], point[2], 1]
                np.testing.assert_allclose(place, np.rint(place), atol=1e-3, err_msg=name)
                assert voxels[tuple(np.rint(place[:3]).astype(int))] == pixels[row, column], name
        assert (scan.pixels.dtype, scan.unit) == (np.int16, "HU")
        across = {plane: (f"the slices are {plane}: axial ones are cut across them, with pixels of {pixels} mm, and "
                          "nets learn from axial slices",)
                  for plane, pixels in (("coronal", "2.00 x 0.70"), ("sagittal", "0.70 x 2.00"))}
        assert scan.warnings == across.get(name, ())
        assert scan.grid.voxel_ml() == pytest.approx(
            0.7 * 0.8 * abs(np.cross(x, y) @ np.array(step)) / 1000), "less than its sides where it is sheared"
        upright = {"axial": HU, "from the head": HU[::-1], "prone": HU[:, ::-1, ::-1]}
        np.testing.assert_array_equal(scan.pixels, upright.get(name, scan.pixels))


@pytest.mark.parametrize("name", PLANES)
def test_a_mask_lies_on_the_series_for_simpleitk(name: str, tmp_path: Path) -> None:
    directions, step = PLANES[name]
    write_series(tmp_path / "scan", HU, step, ImageOrientationPatient=list(directions))
    scan = read_scan(tmp_path / "scan")
    mask = scan.pixels > 0
    path = write_like(mask, scan.grid, tmp_path / "mask.nii.gz")
    series = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(tmp_path / "scan")))
    result = sitk.ReadImage(str(path))
    assert result.GetSize() == series.GetSize()
    for get in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(result, get)(), getattr(series, get)(), atol=1e-4)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(result) > 0, sitk.GetArrayFromImage(series) > 0)
    np.testing.assert_array_equal(read_mask(path, like=scan), mask)


# --- distances ------------------------------------------------------------------------------------------------------

def at(folder: Path, places: list[float], **tags: object) -> list[Path]:
    """Slices at these millimetres; all voxels have ten times that in HU, less 500."""
    return [save(slice_of(np.full((6, 5), 524 + 10 * z, np.int16), np.array([0, 0, z]), **tags), folder / f"{k}.dcm")
            for k, z in enumerate(places)]


@pytest.mark.parametrize(("places", "distance", "warning"), [
    ([0, 5, 10, 25, 30], 5, "missing slices between 10.0 and 25.0 mm, elsewhere every 5.00 mm"),
    ([0, 5, 10, 17, 22], 5.5, "uneven distances between 10.0 and 17.0 mm, elsewhere every 5.00 mm"),
    ([0, 0.6, 1.3, 1.9, 2.5], 0.625, None),  # rounded to .1 mm
    ([0, *np.arange(1, 21) * 1.0, *(20 + np.arange(1, 21) * 1.05)], 1.025, "uneven distances"),  # a drift
    ([0, 20, 40, 60], 20, None), ([7], 5, None)])
def test_distances(places: list[float], distance: float, warning: str | None, tmp_path: Path) -> None:
    at(tmp_path, places)
    scan = read_scan(tmp_path)
    assert scan.spacing[0] == pytest.approx(distance)
    here = [places[0] + k * distance for k in range(len(scan.pixels))]
    assert here[-1] == pytest.approx(places[-1])
    np.testing.assert_allclose(scan.pixels[:, 0, 0], np.multiply(here, 10) - 500, atol=1.1)
    assert bool(scan.warnings) == bool(warning)
    assert warning is None or warning in scan.warnings[0]


@pytest.mark.parametrize(("places", "words"), [
    ([0, 5, 10, 60, 65], "lacks slices: their distance is 5.00 mm, but for that between 10.0 and 60.0 mm"),
    ([0, 1, 2, 3, 23], "lacks slices"), ([0, 5, 36], "lacks slices: their distance is 5.00 mm")])
def test_too_much_is_missing(places: list[float], words: str, tmp_path: Path) -> None:
    at(tmp_path, places)
    with pytest.raises(InputFileError, match=words):
        read_scan(tmp_path)


def test_slices_shifted_sideways_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path, HU)
    save(slice_of(HU[0], np.array([-80, -70, -1180.0])), tmp_path / "stray")
    with pytest.raises(InputFileError, match="sideways"):
        read_scan(tmp_path)


def test_copies_and_other_slices_at_the_same_place(tmp_path: Path) -> None:
    files = write_series(tmp_path, HU)
    shutil.copy(files[1], tmp_path / "copy")
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.pixels, HU)
    assert scan.warnings == ("left out 1 copy of a slice",)
    save(slice_of(HU[0], np.array([-80, -90, -1195.0])), tmp_path / "other")
    with pytest.raises(InputFileError, match=r"different slices at the same place \(-1195.0 mm\)"):
        read_scan(tmp_path)


def test_acquisitions_of_one_series_are_told_apart(tmp_path: Path) -> None:
    write_series(tmp_path / "a", HU, AcquisitionNumber=1)
    write_series(tmp_path / "b", HU[:3] + 7, AcquisitionNumber=2)
    np.testing.assert_array_equal(read_scan(tmp_path).pixels, HU)
    np.testing.assert_array_equal(read_scan(tmp_path, series="2").pixels, HU[:3] + 7)
    write_series(tmp_path / "c", HU[:1], AcquisitionNumber=3, SeriesInstanceUID="1.9")  # each rotation, one volume
    save(slice_of(HU[1] + 1024, np.array([-80, -90, -1195.0]), "1.9", AcquisitionNumber=4), tmp_path / "c" / "4")
    np.testing.assert_array_equal(read_scan(tmp_path / "c").pixels, HU[:2])


# --- values ---------------------------------------------------------------------------------------------------------

def test_every_slice_has_its_own_rescaling(tmp_path: Path) -> None:
    for k, intercept in enumerate((-1024, 0, -1000)):
        save(slice_of(HU[k] - intercept, np.array([0, 0, 5.0 * k]), RescaleIntercept=intercept), tmp_path / f"{k}")
    np.testing.assert_array_equal(read_scan(tmp_path).pixels, HU[:3])
    save(slice_of(2 * HU[3] + 1, np.array([0, 0, 15.0]), RescaleSlope=0.5, RescaleIntercept=0), tmp_path / "half")
    scan = read_scan(tmp_path)
    assert scan.pixels.dtype == np.float32
    np.testing.assert_array_equal(scan.pixels, HU + np.array([0, 0, 0, 0.5])[:, None, None])


@pytest.mark.parametrize(("unsigned", "padding", "intercept"), [
    (False, -2000, -1024), (True, 63536, -1024), (False, 0, 0), (False, -32768, -1024)])
def test_padding_becomes_air(unsigned: bool, padding: int, intercept: int, tmp_path: Path) -> None:
    image = np.full((20, 20), 100 - intercept, np.uint16 if unsigned else np.int16)
    image[5:9, 5:9] -= 100   # 0 HU, the padding of the third case, but not at the edge
    image[:3] = padding
    save(slice_of(image, np.zeros(3), RescaleIntercept=intercept, PixelRepresentation=int(not unsigned),
                  PixelPaddingValue=padding), tmp_path / "slice.dcm")
    pixels = read_scan(tmp_path).pixels[0]
    assert (pixels[:3] == -1024).all()
    assert (pixels[5:9, 5:9] == 0).all()
    assert set(np.unique(pixels[3:])) == {0, 100}


def test_compressed_and_odd_files_as_pydicom_ships_them(tmp_path: Path) -> None:
    image = np.tile(HU[0], (8, 8))
    data = slice_of(image, np.zeros(3))
    data.compress(RLELossless)
    np.testing.assert_array_equal(read_scan(save(data, tmp_path / "rle.dcm")).pixels[0], image - 1024)
    for name, shape in (("693_J2KI.dcm", (1, 512, 512)), ("CT_small.dcm", (1, 128, 128)),
                        ("J2K_pixelrep_mismatch.dcm", (1, 512, 512))):
        assert read_scan(get_testdata_file(name, download=False)).pixels.shape == shape
    path = get_testdata_file("CT_small.dcm", download=False)
    expected = pydicom.dcmread(path).pixel_array.astype(int) - 1024
    expected[expected == -3024] = -1024
    np.testing.assert_array_equal(read_scan(path).pixels[0], expected)


# --- which series ---------------------------------------------------------------------------------------------------

@pytest.fixture
def cd(tmp_path: Path) -> Path:
    """Two series of CT, a localizer, a screenshot and MR."""
    write_series(tmp_path / "A", HU[:3], SeriesInstanceUID="1.2.111111")
    write_series(tmp_path / "B", HU, SeriesInstanceUID="1.2.222222")
    write_series(tmp_path / "C", HU[:1], SeriesInstanceUID="1.2.222222", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    write_series(tmp_path / "D", HU[:1], SeriesInstanceUID="1.3", SOPClassUID=SecondaryCaptureImageStorage)
    write_series(tmp_path / "E", HU, SeriesInstanceUID="1.4", Modality="MR")
    return tmp_path


def test_most_slices_are_taken_and_others_can_be_named(cd: Path) -> None:
    found, skipped = find_series(cd)
    assert [str(one) for one in found] == ["4 slices of 5 x 6, 0.70 x 0.80 x 5.00 mm, axial, UID ...222222",
                                           "3 slices of 5 x 6, 0.70 x 0.80 x 5.00 mm, axial, UID ...111111"]
    assert {reason: len(files) for reason, files in skipped.items()} == {
        "MR, not CT": 4, "a localizer": 1, "a secondary capture (a screenshot or a report)": 1}
    assert describe(skipped) == \
        "MR, not CT (4 files); a localizer (1 file); a secondary capture (a screenshot or a report) (1 file)"
    scan = read_scan(cd)
    np.testing.assert_array_equal(scan.pixels, HU)
    assert scan.warnings == ("took the series with most slices of 2 (`covidseg data series` lists them): "
                             "4 slices of 5 x 6, 0.70 x 0.80 x 5.00 mm, axial, UID ...222222",)
    for name in ("2", "111111", "1.2.111111"):
        named = read_scan(cd, series=name)
        assert (len(named.pixels), named.warnings) == (3, ())
    for name in ("3", "0", "11111", "9.9"):
        with pytest.raises(InputFileError, match=rf"holds no series {name}. Choose one with --series: 1: 4 slices"):
            read_scan(cd, series=name)


def test_several_that_might_be_meant_are_refused_with_a_list(cd: Path) -> None:
    write_series(cd / "F", HU, SeriesInstanceUID="1.5.333333")
    with pytest.raises(InputFileError, match=r"equally many slices.* 2: 4 slices of 5 x 6.*333333; 3: 3 slices"):
        read_scan(cd)
    assert len(read_scan(cd, series=2).pixels) == 4
    write_series(cd / "G", HU[:2], SeriesInstanceUID="1.6", StudyInstanceUID="9")
    with pytest.raises(InputFileError, match=r"several examinations.*4: 2 slices"):
        read_scan(cd)
    for number in range(6):
        write_series(cd / f"H{number}", HU[:1], SeriesInstanceUID=f"1.7.{number}")
    with pytest.raises(InputFileError, match=r"9: 1 slice of .*; `covidseg data series` lists all"):
        read_scan(cd)


CORONAL = {"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}
DERIVED = {"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]}


@pytest.mark.parametrize(("others", "rule"), [
    ([CORONAL | DERIVED], "took the axial series of 2"),
    ([CORONAL], "took the axial series of 2"),
    ([DERIVED], "took the original series of 2"),
    ([DERIVED, CORONAL], "took the axial, original series of 3"),
    ([{}, DERIVED, CORONAL], "took the axial, original series with most slices of 4"),
    ([{}, CORONAL], "took the axial series with most slices of 3")])
def test_axial_series_come_first_then_original_ones_then_those_with_most_slices(
        others: list[dict], rule: str, tmp_path: Path) -> None:
    """A reformation of a scan has more slices than the scan; the gantry of the scan may be tilted."""
    write_series(tmp_path / "scan", HU, SeriesInstanceUID="1.2.777777",
                 ImageOrientationPatient=list(PLANES["gantry tilt"][0]))
    for number, tags in enumerate(others):
        hu = np.concatenate([HU, HU + 9]) if tags else HU[:3]
        write_series(tmp_path / f"{number}", hu, (0, 0.8, 0) if "ImageOrientationPatient" in tags else (0, 0, 2.5),
                     SeriesInstanceUID=f"1.2.88888{number}", **tags)
    scan = read_scan(tmp_path)
    assert scan.pixels.shape == HU.shape
    assert scan.warnings == (
        f"{rule} (`covidseg data series` lists them): 4 slices of 5 x 6, 0.70 x 0.80 x 4.70 mm, axial, UID ...777777",)


def test_a_listed_series_says_its_plane(tmp_path: Path) -> None:
    c, s = np.cos(0.7), np.sin(0.7)  # 40 degrees
    for number, directions in enumerate(((1, 0, 0, 0, 1, 0), (1, 0, 0, 0, 0, -1), (0, 1, 0, 0, 0, -1),
                                         (1, 0, 0, 0, c, -s))):
        normal = np.cross(directions[:3], directions[3:])
        write_series(tmp_path / f"{number}", HU[:number + 1], tuple(5 * normal), SeriesInstanceUID=f"1.2.{number}",
                     ImageOrientationPatient=[f"{x:.6g}" for x in directions], ImageType=["DERIVED", "SECONDARY"])
    assert [str(one).split(", ")[2:4] for one in find_series(tmp_path)[0]] == [
        ["axial", "derived"], ["oblique", "derived"], ["sagittal", "derived"], ["coronal", "derived"]]
    assert read_scan(tmp_path, series="2").warnings == (
        "the slices are oblique: those taken for axial lie askew in the body, and nets learn from axial slices",)


def test_series_of_the_same_rank_are_refused(tmp_path: Path) -> None:
    write_series(tmp_path / "a", HU, (0, 2, 0), SeriesInstanceUID="1.5", **CORONAL)
    write_series(tmp_path / "b", HU, (2, 0, 0), SeriesInstanceUID="1.6", ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(InputFileError, match=r"equally many slices.* coronal, UID .* sagittal, UID"):
        read_scan(tmp_path)


NAMELESS = {"SeriesInstanceUID": "", "StudyInstanceUID": ""}


@pytest.mark.parametrize(("folders", "tags"), [(("a", "b"), {}), (("a", "a"), {"PatientID": "LINDGREN"}),
                                               (("a", "a"), {"FrameOfReferenceUID": "1.9"}),
                                               (("a", "a"), {"SeriesNumber": 9})])
def test_two_patients_without_uids_are_not_merged(folders: tuple[str, str], tags: dict, tmp_path: Path) -> None:
    """The second lies half a step farther up, so that no place is taken twice."""
    write_series(tmp_path / folders[0], HU, **NAMELESS)
    for k, pixels in enumerate(HU[:3]):
        save(slice_of(pixels, np.array([-80, -90, -1197.5 + 5 * k]), **NAMELESS, **tags),
             tmp_path / folders[1] / f"{k}")
    with pytest.raises(InputFileError, match="that have no UID, perhaps of several examinations") as caught:
        read_scan(tmp_path)
    assert "Name the folder of each" in caught.value.remedy
    assert "LINDGREN" not in f"{caught.value} {find_series(tmp_path)[0]}", "what tells people apart is not shown"
    assert "4 slices of 5 x 6, 0.70 x 0.80 x 5.00 mm, axial, no UID" in caught.value.remedy
    np.testing.assert_array_equal(read_scan(tmp_path, series="1").pixels, HU)


def test_one_series_without_uids_is_read_and_said(tmp_path: Path) -> None:
    file = write_series(tmp_path, HU, **NAMELESS)[0]
    scan = read_scan(tmp_path)
    np.testing.assert_array_equal(scan.pixels, HU)
    assert scan.warnings == ("the files do not say which series they belong to: took those of one folder for one",)
    assert read_scan(file).warnings == ()


@pytest.mark.parametrize(("tags", "words"), [
    ({"Modality": "MR"}, "is MR, not CT"), ({"Modality": "LINDGREN"}, "is of another kind, not CT"),
    ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "is a localizer"),
    ({"SOPClassUID": SecondaryCaptureImageStorage}, "is a secondary capture"),
    ({"PhotometricInterpretation": "MONOCHROME1"}, "is CT stored as a negative"),
    ({"PixelData": None}, "is DICOM without a picture, or damaged"),
    *(({"PixelSpacing": spacing}, "without position, direction or spacing")
      for spacing in (None, [0, 0.7], [0.8, 0], [-0.8, 0.7])),
    ({"ImagePositionPatient": None}, "without position"), ({"ImageOrientationPatient": None}, "without position"),
    ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "direction that is none"),
    ({"PixelSpacing": [0.001, 0.001]}, "which no CT has")])
def test_what_is_no_ct_is_refused_with_the_reason(tags: dict, words: str, tmp_path: Path) -> None:
    file, = write_series(tmp_path / "one", HU[:1], **tags)
    for path in (file, tmp_path / "one"):
        with pytest.raises(InputFileError, match=words) as caught:
            read_scan(path)
        assert caught.value.remedy


def test_a_slice_of_unknown_thickness(tmp_path: Path) -> None:
    scan = read_scan(write_series(tmp_path, HU[:1], SliceThickness=None)[0])
    assert scan.spacing[0] == 1
    assert scan.warnings == ("the thickness of the slice is unknown and taken for 1 mm",)


def test_a_damaged_slice_is_said_and_counts_as_missing(tmp_path: Path) -> None:
    files = write_series(tmp_path, np.concatenate([HU, HU]))
    files[3].write_bytes(files[3].read_bytes()[:-20])
    assert read_scan(tmp_path).warnings == (
        "left out: DICOM without a picture, or damaged (1 file: IM00006)",
        "missing slices between -1190.0 and -1180.0 mm, elsewhere every 5.00 mm: interpolated there")


NO_DICOM = "left out: no DICOM, so perhaps slices that are empty or cut short"


@pytest.mark.parametrize("suffix", ["", ".dcm", ".IMA", ".17"])
def test_files_that_may_be_slices_do_not_vanish(suffix: str, tmp_path: Path) -> None:
    """At the ends of a series no slice is missed between others."""
    files = [file.rename(tmp_path / f"{k}{suffix}")
             for k, file in enumerate(write_series(tmp_path, np.concatenate([HU, HU])))]
    assert read_scan(tmp_path).warnings == ()
    for name in ("readme.txt", "viewer.exe", ".hidden", "DICOMDIR"):
        (tmp_path / name).write_bytes(b"from the hospital")
    assert read_scan(tmp_path).warnings == ()
    files[7].write_bytes(files[7].read_bytes()[:100])
    scan = read_scan(tmp_path)
    assert (len(scan.pixels), scan.warnings) == (7, (f"{NO_DICOM} (1 file: 7{suffix})",))
    files[0].write_bytes(b"")
    scan = read_scan(tmp_path)
    assert (len(scan.pixels), scan.warnings) == (6, (f"{NO_DICOM} (2 files: 0{suffix}, 7{suffix})",))
    for file in files[1:5]:
        file.write_bytes(b"")
    assert read_scan(tmp_path).warnings == (f"{NO_DICOM} (6 files: 0{suffix}, 1{suffix}, 2{suffix}, 3 more)",)


def test_a_slice_that_is_a_broken_link_or_says_no_place_does_not_vanish(tmp_path: Path) -> None:
    files = write_series(tmp_path, HU)
    files[0].unlink()
    files[0].symlink_to(tmp_path / "annex" / "IM")
    scan = read_scan(tmp_path)
    assert (len(scan.pixels), scan.warnings) == (3, (f"{NO_DICOM} (1 file: {files[0].name})",))
    data = pydicom.dcmread(files[3])
    del data.ImagePositionPatient
    data.save_as(files[3])
    scan = read_scan(tmp_path)
    assert (len(scan.pixels), scan.warnings) == (2, (
        f"{NO_DICOM} (1 file: {files[0].name})",
        f"left out: CT without position, direction or spacing (1 file: {files[3].name})"))


def test_what_cannot_be_opened_is_refused(tmp_path: Path, closed: Callable[..., None]) -> None:
    for name in ("file", "folder", "loop"):
        write_series(tmp_path / name, HU)
    slice_ = tmp_path / "file" / "IM00003"
    below = write_series(tmp_path / "folder" / "below", HU)[0].parent
    (tmp_path / "loop" / "IM").symlink_to("IM")
    closed(slice_, below)
    for path, words in ((slice_, "Permission denied"), (below, "Permission denied"),
                        (tmp_path / "loop" / "IM", "Too many levels")):
        with pytest.raises(InputFileError, match=words) as caught:
            read_scan(path.parent)
        assert (caught.value.path, bool(caught.value.remedy)) == (path, True)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="no such folder"):
        find_series(tmp_path / "none")
    with pytest.raises(InputFileError, match="File name too long"):
        find_series(tmp_path / ("x" * 300))


def test_slices_behind_links_belong_to_the_series(tmp_path: Path) -> None:
    for part, k in (("here", 0), ("there", 2)):
        for number in (k, k + 1):
            save(slice_of((HU[number] + 1024).astype(np.int16), np.array([0, 0, 5.0 * number])),
                 tmp_path / part / f"{number}")
    (tmp_path / "here" / "more").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "back").symlink_to(tmp_path / "here")  # in a circle
    scan = read_scan(tmp_path / "here")
    np.testing.assert_array_equal(scan.pixels, HU)
    assert scan.warnings == ()


def test_a_series_of_more_voxels_than_any_ct_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at(tmp_path / "series", [0, 5, 15])  # with a gap of one slice
    save(multiframe(HU, [0, 5, 10, 15]), tmp_path / "frames.dcm")
    monkeypatch.setattr(nifti, "MAX_VOXELS", 119)
    for path in (tmp_path / "series", tmp_path / "frames.dcm"):
        with pytest.raises(InputFileError, match="claims to hold 120 voxels"):
            read_scan(path)

    def full(*args: object) -> None:
        raise MemoryError

    monkeypatch.setattr(nifti, "MAX_VOXELS", 120)
    monkeypatch.setattr(np, "clip", full)
    for path in (tmp_path / "series", tmp_path / "frames.dcm"):
        with pytest.raises(InputFileError, match="needs more memory"):
            read_scan(path)


def test_pixels_that_cannot_be_decoded(tmp_path: Path) -> None:
    data = slice_of(np.tile(HU[0], (8, 8)), np.zeros(3))
    data.compress(RLELossless)
    whole = save(data, tmp_path / "slice.dcm").read_bytes()
    start = whole.index(bytes.fromhex("e07f1000"))
    (tmp_path / "slice.dcm").write_bytes(whole[:start + 20] + b"\xff" * (len(whole) - start - 28) + whole[-8:])
    with pytest.raises(InputFileError, match="damaged"):
        read_scan(tmp_path / "slice.dcm")


def test_folders_without_a_scan_or_with_two_kinds(tmp_path: Path) -> None:
    with pytest.raises(InputFileError, match="is a folder without files"):
        read_scan(tmp_path)
    for name in ("a.txt", "b.txt", "picture.png", "IM0001", ".hidden"):
        (tmp_path / name).write_text("text")
    with pytest.raises(InputFileError, match=r"neither NIfTI nor DICOM, but 2 .txt, 1 without suffix, 1 .png"):
        read_scan(tmp_path)
    write_series(tmp_path / "below", HU)
    scan = read_scan(tmp_path)
    nifti = write_like(scan.pixels, scan.grid, tmp_path / "scan.nii.gz")
    with pytest.raises(InputFileError, match="holds both NIfTI and DICOM"):
        read_scan(tmp_path)
    with pytest.raises(SettingsError, match="no series"):
        read_scan(nifti, series="1")


def test_scans_in_folders_of_a_folder_are_named(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ct.nii.gz").touch()
    with pytest.raises(InputFileError, match=r"holds NIfTI files in its folders only: a, b\. Name these folders"):
        read_scan(tmp_path)
