"""Padding, metal and faulty voxels are recognised in any unit, and plain slices stay as they are."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import display, field, hot_voxel, metal
from PIL import Image
from scipy import ndimage as ndi

from covidseg.data.grey import clean
from covidseg.data.phantom import PhantomPatient, PhantomSettings, make_patient
from covidseg.lungs import threshold_lungs
from covidseg.preprocess import normalise

PATIENT = make_patient(PhantomSettings(slices=8), 0)
LUNGS = threshold_lungs(PATIENT.hu)
K = 4


@pytest.fixture(scope="module")
def patient() -> PhantomPatient:
    return PATIENT


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_a_plain_slice_stays_as_it_is(patient):
    for pixels in (patient.hu, display(patient.hu, -1350, 150), display(patient.hu, -1000, 400)):
        for image in pixels:
            picture = clean(image)
            assert picture.values is image
            assert picture.beyond is None


@pytest.mark.parametrize("image", [np.zeros((40, 40)), np.full((3, 5), 7, np.uint8), np.eye(64), np.ones((1, 1))])
def test_a_slice_without_tissue_passes_through(image):
    assert np.array_equal(clean(image).values, image)


@settings(max_examples=15, deadline=None)
@given(gain=st.floats(1e-3, 1e3), offset=st.floats(-1e5, 1e5), padding=st.floats(-30, 30))
def test_gain_offset_and_padding_do_not_matter(gain, offset, padding):
    """Padding in units of the way from air to tissue, so that it lies far below, between and far above them."""
    pixels = (field(PATIENT, 1000 * padding, PATIENT.hu[3:6]) * gain + offset).astype(np.float64)
    assert dice(threshold_lungs(pixels, volume=False), threshold_lungs(PATIENT.hu[3:6], volume=False)) > 0.999


@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "int32", "uint32", "float32", "float64"])
@pytest.mark.parametrize("beyond", [None, "low", "high"])
def test_the_type_of_the_voxels_does_not_matter(kind, beyond, patient):
    scale = 0.1 if kind == "uint8" else 1
    limits = np.iinfo(kind) if np.dtype(kind).kind in "iu" else np.finfo(np.float16)
    pixels = (patient.hu + 1024) * scale + (20 if kind == "uint8" else 2000)
    if beyond is not None:
        pixels = field(patient, float(limits.min if beyond == "low" else limits.max), pixels)
    assert dice(threshold_lungs(pixels.astype(kind)), LUNGS) > 0.998


def test_padding_is_found_where_it_lies(patient):
    for value in (-2000, 0, 3000):
        picture = clean(field(patient, value, patient.hu, 8)[K])
        assert dice(picture.beyond, field(patient, 1, np.zeros_like(patient.hu), 8)[K] > 0) > 0.98
        assert picture.values.min() > -1300
        assert picture.values.max() < 1600


def test_padding_that_a_lossy_picture_smears_is_found(patient):
    black = field(patient, 4, 40 + 0.8 * display(patient.hu, -1000, 400), 8)[K].astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(black).save(stream, "jpeg", quality=92)
    smeared = np.asarray(Image.open(stream))
    beyond = clean(smeared).beyond
    assert beyond is not None
    assert len(np.unique(smeared[beyond])) > 1
    assert clean(smeared.astype(np.float32)).beyond is None, "of other types, one value has to be one value"
    assert clean(smeared.astype(np.float32), lossy=True).beyond is not None
    assert dice(threshold_lungs(smeared[None]), LUNGS[K:K + 1]) > 0.99


def test_a_turned_picture_has_corners_beyond_its_field(patient):
    turned = ndi.rotate(patient.hu[K].astype(float), 12, reshape=False, order=1, cval=0)
    corner = clean(turned).beyond
    assert corner[0, 0]
    assert 0.05 < corner.mean() < 0.3


def test_a_body_in_air_of_one_value_is_no_field_of_view(patient):
    body = ndi.binary_fill_holes(patient.hu[K] > -400)
    assert clean(np.where(body, patient.hu[K], -1000)).beyond is None


def test_what_no_tissue_can_have_is_cut_off(patient):
    for pixels in (metal(patient, 10, 15000), hot_voxel(patient, 1e6), hot_voxel(patient, -1e6)):
        values = clean(pixels[5]).values
        assert values.min() > -1400
        assert values.max() < 1700


def test_crops_are_normalised_by_what_is_picture(patient):
    lung = LUNGS[K]
    expected = normalise(patient.hu[K], lung)
    for pixels in (field(patient, -32768, patient.hu, 8), metal(patient, 10, 15000)):
        found = normalise(clean(pixels[K]).values, lung)
        assert np.abs(found - expected)[lung].max() < 0.05
