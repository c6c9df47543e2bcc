"""Series of DICOM slices, made with pydicom from arrays; for tests and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

Array = np.ndarray


def slice_of(pixels: Array, position: Array, series: str = "1.2.3.123456", **tags: Any) -> Dataset:
    """A CT slice ``(rows, columns)`` of stored int16 values; its tags are replaced, or removed by None."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.Modality, data.SOPClassUID, data.SOPInstanceUID = "CT", CTImageStorage, generate_uid()
    data.StudyInstanceUID, data.SeriesInstanceUID = "1.2.3", series
    data.PatientID = data.PatientName = "one"
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    data.Rows, data.Columns = pixels.shape
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 1
    data.RescaleSlope, data.RescaleIntercept = 1, -1024
    data.ImageOrientationPatient, data.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [f"{x:.6g}" for x in position]
    data.PixelSpacing, data.SliceThickness = [0.8, 0.7], 5
    data.PixelData = np.ascontiguousarray(pixels).tobytes()
    for name, value in tags.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.file_meta.MediaStorageSOPClassUID, data.file_meta.MediaStorageSOPInstanceUID = (
        data.SOPClassUID, data.SOPInstanceUID)
    return data


def save(data: Dataset, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, data, enforce_file_format=True)
    return path


def write_series(folder: Path, hu: Array, step: tuple[float, float, float] = (0, 0, 5), **tags: Any) -> list[Path]:
    """Writes ``(slices, rows, columns)`` HU from feet to head, under names without suffix and in no order.

    Returns the file of each slice.
    """
    names = np.random.default_rng(0).permutation(len(hu))
    start = np.array([-80.0, -90.0, -1200.0])
    return [save(slice_of((pixels + 1024).astype(np.int16), start + k * np.array(step), **tags),
                 folder / f"IM{names[k]:05d}") for k, pixels in enumerate(hu)]


def multiframe(hu: Array, places: list[float]) -> Dataset:
    """Enhanced CT of ``(frames, rows, columns)`` HU, each at its millimetres towards the head."""
    data = slice_of((hu + 1024).astype(np.int16)[0], np.zeros(3), ImagePositionPatient=None,
                    ImageOrientationPatient=None, PixelSpacing=None, RescaleSlope=None, RescaleIntercept=None,
                    SliceThickness=None, SOPClassUID=EnhancedCTImageStorage)
    data.NumberOfFrames, data.PixelData = len(hu), (hu + 1024).astype(np.int16).tobytes()

    def group(**tags: Any) -> Dataset:
        made = Dataset()
        for name, value in tags.items():
            setattr(made, name, value)
        return made
    data.SharedFunctionalGroupsSequence = [group(
        PlaneOrientationSequence=[group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])],
        PixelMeasuresSequence=[group(PixelSpacing=[0.8, 0.7], SliceThickness=5)],
        PixelValueTransformationSequence=[group(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")])]
    data.PerFrameFunctionalGroupsSequence = [
        group(PlanePositionSequence=[group(ImagePositionPatient=[-80, -90, z])]) for z in places]
    return data
