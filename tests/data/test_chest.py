"""What is taken for chest CT, what is refused and why, and what a person is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from inputs import CHESTS, OTHERS, field, white_lung

from covidseg.data.chest import spans
from covidseg.data.phantom import PhantomPatient, PhantomSettings, make_patient
from covidseg.data.scan import Grid, Scan, read_scan
from covidseg.errors import InputFileError, NoLungError
from covidseg.lungs import survey_lungs, threshold_lungs


@pytest.fixture(scope="module")
def patient() -> PhantomPatient:
    return make_patient(PhantomSettings(slices=10), 0)


@pytest.fixture(scope="module")
def plain(patient: PhantomPatient) -> np.ndarray:
    return threshold_lungs(patient.hu)


def scan_of(pixels: np.ndarray, millimetres: float = 1.3) -> Scan:
    grid = Grid((*pixels.shape[:0:-1], len(pixels)), np.diag([-millimetres, -millimetres, 10.0, 1.0]))
    return Scan(pixels, (10.0, millimetres, millimetres), (float(pixels.min()), float(pixels.max())), "HU",
                Path("scan.nii.gz"), grid)


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


@pytest.mark.parametrize("name", CHESTS)
def test_a_chest_is_taken_however_it_comes_and_has_the_same_lungs(name, patient, plain):
    pixels = CHESTS[name](patient)
    found = survey_lungs(pixels, check=scan_of(pixels))
    lungs = found.masks[:, ::-1] if name == "prone" else found.masks
    assert dice(lungs, plain) > 0.98
    assert found.masks.any(axis=(1, 2)).all()
    assert all("picture ends" in text for text in found.warnings)


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_chest_ct_is_refused_with_the_reason(name, patient):
    make, said = OTHERS[name]
    pixels = make(patient)
    with pytest.raises((InputFileError, NoLungError), match=rf"scan.nii.gz.*({said})"):
        threshold_lungs(pixels, check=scan_of(pixels))


@pytest.mark.parametrize(("millimetres", "taken"), [(1.3, True), (0.5, True), (0.12, False)])
def test_a_child_is_taken_and_an_animal_is_not(millimetres, taken, patient):
    scan = scan_of(patient.hu, millimetres)
    if taken:
        assert threshold_lungs(patient.hu, check=scan).any()
    else:
        with pytest.raises(InputFileError, match=r"has [0-9.]+ cm2.*voxel size"):
            threshold_lungs(patient.hu, check=scan)


def test_most_slices_that_tell_decide(patient):
    mr, empty = OTHERS["MR of a chest"][0](patient), np.full_like(patient.hu[:6], -1000)
    for good, bad, taken in ((4, 3, True), (3, 4, False), (1, 0, True)):
        pixels = np.concatenate([patient.hu[3:3 + good], mr[3:3 + bad], empty])
        if taken:
            assert threshold_lungs(pixels, check=scan_of(pixels)).any()
        else:
            with pytest.raises(InputFileError, match=f"in {bad} of {good + bad} slices"):
                threshold_lungs(pixels, check=scan_of(pixels))


def test_a_person_is_told_where_lungs_are_missing(patient, plain):
    gone = patient.hu.copy()
    gone[[3, 4, 6]] = -1000
    assert survey_lungs(gone, volume=True).warnings == (
        "no lung was found in slices 3-4, 6, between slices that have it",)
    assert survey_lungs(patient.hu).warnings == ()


def test_a_person_is_told_where_the_picture_ends_inside_a_lung(patient):
    for pixels in (field(patient, -1000, patient.hu, -8), field(patient, -2000, patient.hu, -8)):
        assert any("the picture ends inside a lung in slices" in text for text in survey_lungs(pixels).warnings)
    left = np.flatnonzero(patient.lung.any(axis=(0, 1)))[0]
    cut = patient.hu[:, :, left + 12:]
    found = survey_lungs(cut, check=scan_of(cut))
    assert any("the picture ends inside a lung in slices" in text for text in found.warnings)
    assert dice(found.masks, threshold_lungs(patient.hu)[:, :, left + 12:]) > 0.97


def test_a_person_is_told_of_one_lung_alone(patient, plain):
    found = survey_lungs(white_lung(patient), check=scan_of(patient.hu))
    (text,) = found.warnings
    assert text.startswith("lung was found on one side only in slices 0-")


def test_spans():
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans([]) == ""


@pytest.mark.slow
@pytest.mark.realct
def test_every_real_scan_is_plausible(realct):
    for path in [*sorted((realct / "medseg9" / "im").glob("*.nii.gz")), realct / "medseg100" / "dev_im.nii.gz"]:
        scan = read_scan(path)
        assert threshold_lungs(scan.pixels, check=scan).any()
