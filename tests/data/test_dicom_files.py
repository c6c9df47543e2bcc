"""Files of several frames: a bundle of slices, each with the place and the rescaling that the file says for it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dicoms import multiframe, save, slice_of, write_series
from pydicom.dataset import Dataset
from pydicom.uid import LegacyConvertedEnhancedCTImageStorage

from covidseg.data.dicom import find_series
from covidseg.data.scan import read_scan
from covidseg.errors import InputFileError

HU = (np.arange(4 * 6 * 5).reshape(4, 6, 5) * 7 - 900).astype(np.int16)  # (slices, rows, columns)
AXIAL, CORONAL = [1, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, -1]


def item(**tags: object) -> list[Dataset]:
    """A sequence of one item with these tags."""
    data = Dataset()
    for name, value in tags.items():
        setattr(data, name, value)
    return [data]


def placed(positions: list[tuple[float, float, float]], directions: list[list[float]] | None = None,
           hu: np.ndarray = HU) -> Dataset:
    """Enhanced CT whose frames lie at these positions, each in its own direction if these are given."""
    data = multiframe(hu, [0] * len(positions))
    for frame, position in zip(data.PerFrameFunctionalGroupsSequence, positions, strict=True):
        frame.PlanePositionSequence = item(ImagePositionPatient=list(position))
    if directions is not None:
        del data.SharedFunctionalGroupsSequence[0].PlaneOrientationSequence
        for frame, along in zip(data.PerFrameFunctionalGroupsSequence, directions, strict=True):
            frame.PlaneOrientationSequence = item(ImageOrientationPatient=along)
    return data


def rescaled(data: Dataset, by: list[tuple[float, float]]) -> Dataset:
    """The same file with slope and intercept of each frame."""
    del data.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence
    for frame, (slope, intercept) in zip(data.PerFrameFunctionalGroupsSequence, by, strict=True):
        frame.PixelValueTransformationSequence = item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU")
    return data


@pytest.mark.parametrize("places", [[0, 5, 10, 15], [15, 10, 5, 0], [0, 10, 5, 15]])
def test_frames_in_any_order(places: list[float], tmp_path: Path) -> None:
    data = multiframe(HU, places)
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = LegacyConvertedEnhancedCTImageStorage
    for number, one in enumerate((multiframe(HU, places), data)):
        scan = read_scan(save(one, tmp_path / f"{number}.dcm"))
        np.testing.assert_array_equal(scan.pixels, HU[np.argsort(places)])
        assert scan.pixels.dtype == np.int16
        assert scan.spacing == pytest.approx((5, 0.8, 0.7))
        np.testing.assert_allclose(scan.grid.affine[:3, 3], [80, 90, 0])
        assert scan.warnings == ()


@pytest.mark.parametrize(("positions", "along", "hu", "words"), [
    ([(-80, -90 + 2 * k, 5 * k) for k in range(4)], AXIAL, HU, ""),  # a tilted gantry
    ([(-80, 2 * k, 60) for k in range(4)], CORONAL, HU, "the slices are coronal"),
    ([(-80, -90, z) for z in (0, 5, 5, 10)], AXIAL, HU[[0, 1, 1, 2]], "left out 1 copy of a slice"),
    ([(-80, -90, z) for z in (0, 5, 10, 20)], AXIAL, HU, "missing slices between 10.0 and 20.0 mm"),
    ([(-80, -90, z) for z in (0, 5, 10, 17)], AXIAL, HU, "uneven distances"),
    ([(-80, -90, z) for z in (0, 5, 5, 10)], AXIAL, HU, "different slices at the same place (5.0 mm)"),
    ([(-80 + 20 * (k == 2), -90, 5 * k) for k in range(4)], AXIAL, HU, "shifted sideways"),
    ([(-80, -90, z) for z in (0, 5, 10, 90)], AXIAL, HU, "lacks slices: their distance is 5.00 mm")])
def test_frames_are_stacked_as_single_slices_are(positions: list[tuple[float, float, float]], along: list[float],
                                                 hu: np.ndarray, words: str, tmp_path: Path) -> None:
    save(placed(positions, [along] * 4, hu), tmp_path / "frames" / "file.dcm")
    for k, position in enumerate(positions):
        save(slice_of((hu[k] + 1024).astype(np.int16), np.array(position), ImageOrientationPatient=along),
             tmp_path / "slices" / f"{k}")

    def outcome(folder: str) -> tuple[list, list, tuple[str, ...]] | str:
        try:
            scan = read_scan(tmp_path / folder)
        except InputFileError as error:
            return error.fault
        return scan.pixels.tolist(), scan.grid.affine.tolist(), scan.warnings
    found = outcome("frames")
    assert found == outcome("slices")
    assert words in (found if isinstance(found, str) else " ".join(found[2]))
    assert isinstance(found, str) or bool(words) == bool(found[2])


def test_frames_of_two_directions_are_two_series(tmp_path: Path) -> None:
    path = save(placed([(-80, -90, 0), (-80, -90, 5), (-80, -90, 10), (-80, 0, 60)], [AXIAL] * 3 + [CORONAL]),
                tmp_path / "file.dcm")
    assert [(len(one.slices), one.plane) for one in find_series(path)[0]] == [(3, "axial"), (1, "coronal")]
    np.testing.assert_array_equal(read_scan(path).pixels, HU[:3])


def test_acquisitions_of_one_file_are_told_apart(tmp_path: Path) -> None:
    data = placed([(-80, -90, 0), (-80, -90, 5), (-80, -90, 10), (-80, -90, 5)])
    for frame, number in zip(data.PerFrameFunctionalGroupsSequence, (1, 1, 1, 2), strict=True):
        frame.FrameContentSequence = item(FrameAcquisitionNumber=number)
    np.testing.assert_array_equal(read_scan(save(data, tmp_path / "file.dcm")).pixels, HU[:3])


def test_what_other_readers_take_for_faults_is_read(tmp_path: Path) -> None:
    """One frame alone, distances of 1 mm in all directions, and a series of several files of frames."""
    one = read_scan(save(multiframe(HU[:1], [7]), tmp_path / "one.dcm"))
    np.testing.assert_array_equal(one.pixels, HU[:1])
    assert (one.spacing, one.warnings) == (pytest.approx((5, 0.8, 0.7)), ())
    data = multiframe(HU, [0, 1, 2, 3])
    data.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence = item(PixelSpacing=[1, 1], SliceThickness=1)
    cube = read_scan(save(data, tmp_path / "cube.dcm"))
    np.testing.assert_array_equal(cube.pixels, HU)
    assert (cube.spacing, cube.warnings) == ((1, 1, 1), ())
    for parts in ([0, 2], [1, 3]), ([0], [1, 2, 3]):  # interleaved; of unlike numbers
        folder = tmp_path / f"{parts}"
        for number, frames in enumerate(parts):
            save(multiframe(HU[frames], [5 * k for k in frames]), folder / f"{number}")
        scan = read_scan(folder)
        np.testing.assert_array_equal(scan.pixels, HU)
        assert (scan.spacing, scan.warnings) == (pytest.approx((5, 0.8, 0.7)), ())
    write_series(tmp_path / "mixed", HU[:2], (0, 0, 5))
    save(placed([(-80, -90, -1190), (-80, -90, -1185)], hu=HU[2:]), tmp_path / "mixed" / "frames")
    np.testing.assert_array_equal(read_scan(tmp_path / "mixed").pixels, HU)


def test_frames_that_do_not_say_where_they_lie_are_refused(tmp_path: Path) -> None:
    """Plain CT has one place and no more; the tags of some frames may be lost."""
    lost = [multiframe(HU, [0, 5, 10, 15]) for _ in range(5)]
    del lost[0].PerFrameFunctionalGroupsSequence
    lost[1].PerFrameFunctionalGroupsSequence.pop()
    del lost[2].PerFrameFunctionalGroupsSequence[2].PlanePositionSequence
    del lost[3].SharedFunctionalGroupsSequence
    askew = item(ImageOrientationPatient=[1, 0, 0, 1, 0, 0])
    lost[4].SharedFunctionalGroupsSequence[0].PlaneOrientationSequence = askew
    plain = slice_of(HU[0], np.zeros(3), NumberOfFrames=4, PixelData=HU.tobytes())
    frames, place = "does not say where each frame lies", "without position, direction or spacing"
    for number, (data, words) in enumerate([(lost[0], frames), (lost[1], frames), (lost[2], place), (lost[3], place),
                                            (lost[4], "direction that is none"), (plain, frames)]):
        with pytest.raises(InputFileError, match=words) as caught:
            read_scan(save(data, tmp_path / f"{number}.dcm"))
        assert "Export the series again" in caught.value.remedy


def test_every_frame_has_its_own_rescaling(tmp_path: Path) -> None:
    by = [(1.0, -1024.0), (2.0, -1000.0), (1.0, 0.0), (3.0, -1024.0)]
    expected = np.stack([slope * (hu + 1024.0) + intercept for hu, (slope, intercept) in zip(HU, by, strict=True)])
    scan = read_scan(save(rescaled(multiframe(HU, [0, 5, 10, 15]), by), tmp_path / "whole.dcm"))
    assert scan.pixels.dtype == np.int16
    np.testing.assert_array_equal(scan.pixels, expected)
    by[0], by[2] = (0.5, -1024.0), (0.25, 3.0)
    expected = np.stack([slope * (hu + 1024.0) + intercept for hu, (slope, intercept) in zip(HU, by, strict=True)])
    scan = read_scan(save(rescaled(multiframe(HU, [0, 5, 10, 15]), by), tmp_path / "parts.dcm"))
    assert scan.pixels.dtype == np.float32
    np.testing.assert_allclose(scan.pixels, expected, rtol=1e-6)


def test_padding_of_frames_becomes_air(tmp_path: Path) -> None:
    hu = np.full((2, 20, 20), 100, np.int16)
    hu[:, :3] = -2000 - 1024
    data = rescaled(multiframe(hu, [0, 5]), [(1, -1024), (2, -1000)])
    data.PixelPaddingValue = -2000
    pixels = read_scan(save(data, tmp_path / "file.dcm")).pixels
    assert (pixels[:, :3] == -1024).all()
    assert [set(np.unique(one)) for one in pixels[:, 3:]] == [{100}, {2 * 1124 - 1000}]


@pytest.mark.filterwarnings("error")
def test_a_damaged_frame_is_not_quoted(tmp_path: Path) -> None:
    """pydicom would warn of a text where a number belongs, with the text."""
    path = save(multiframe(HU, [0, 5, 10, 15]), tmp_path / "file.dcm")
    path.write_bytes(path.read_bytes().replace(b"-80.0\\", b"LIND^M", 1))
    with pytest.raises(InputFileError, match="without position, direction or spacing") as caught:
        read_scan(path)
    assert "LIND" not in str(caught.value)
