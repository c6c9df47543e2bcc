"""Threshold lung masks: right on the phantom, the same in every display window, unmoved by what lies around."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage as ndi
from skimage import data
from skimage.color import rgb2gray
from skimage.morphology import disk
from skimage.morphology import opening as gray_opening
from skimage.transform import resize

from covidseg import lungs as lung_module
from covidseg.data.folder import load_dataset
from covidseg.data.phantom import PhantomPatient, PhantomSettings, make_patient
from covidseg.data.scan import read_mask, read_scan
from covidseg.errors import CovidsegError, InputFileError, NoLungError
from covidseg.evaluation.evaluate import evaluate_lungs, read_truth
from covidseg.lungs import LungPasses, LungSettings, is_volume, lung_masks

# Denser and fainter lesions than the course's phantom has, whatever its settings are tuned to.
CHEST = PhantomSettings(patients=3, slices=10, size=256, seed=1, vessel_targets=150, dense_share=0.36, core_share=0.3,
                        ground_glass_hu=(-690, -470), faint_share=0.3, consolidation_hu=(-90, 40), edge_mm=(3.0, 8.0),
                        lesion_share=(0.07, 0.18), noise_hu=(25, 45), reader_wobble=0.1)
WINDOWS = [(-1000, 200), (-1200, 600), (-1350, 150)]
MIDDLE = 4  # a slice through the middle of the chest


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def display(hu: np.ndarray, window: tuple[float, float] = (-1000, 200)) -> np.ndarray:
    """8-bit grey levels of a display window, as in pictures on the web."""
    low, high = window
    return np.rint(np.clip((hu.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def ill() -> PhantomPatient:
    return make_patient(CHEST, 0)


@pytest.fixture(scope="module")
def healthy() -> PhantomPatient:
    patient = make_patient(CHEST, 2)
    assert patient.healthy
    return patient


@pytest.fixture(scope="module")
def found(ill: PhantomPatient) -> np.ndarray:
    return lung_masks(ill.hu)


# --- how good they are ------------------------------------------------------------------------------------------

def test_dice_against_the_true_lungs_of_the_phantom(ill, healthy, found):
    # Measured .980 and .983; the worst slice .958.
    assert dice(found, ill.lung) > 0.97
    assert dice(lung_masks(healthy.hu), healthy.lung) > 0.97
    assert min(dice(a, b) for a, b in zip(found, ill.lung, strict=True)) > 0.94


def test_dice_on_coarse_slices(tiny_phantom):
    result = evaluate_lungs(load_dataset(tiny_phantom))  # measured .97 on average
    assert len(result.dice) == len(result.names) == 40
    assert result.dice.mean() > 0.95
    assert result.dice.min() > 0.90


def test_lesions_stay_inside(ill, found):
    plain = ill.hu < -400
    ground_glass, consolidation, crazy_paving = (ill.kind == kind for kind in (1, 2, 3))
    for lesion in (ground_glass, crazy_paving):
        assert lesion.sum() > 1000
        assert found[lesion].mean() > 0.97
    # Of consolidation, more than half is lost; a plain threshold loses all of it.
    assert consolidation.sum() > 1000
    assert plain[consolidation].mean() < 0.05
    assert found[consolidation].mean() > 0.35


@pytest.mark.slow
@pytest.mark.realct
def test_dice_on_real_volumes(realct):
    result = evaluate_lungs(load_dataset(realct / "medseg9"))
    assert len(result.dice) == 407
    assert result.dice.mean() >= 0.96


@pytest.mark.slow
@pytest.mark.realct
def test_real_lesions_stay_inside_a_mask_that_is_not_everything(realct):
    truth, = read_truth(load_dataset(realct / "medseg100"))
    mask = lung_masks(truth.scan.pixels)
    assert (mask & truth.mask).sum() / truth.mask.sum() >= 0.85
    assert mask.mean() <= 0.35


# --- what is no chest CT is refused -----------------------------------------------------------------------------

CT = Path("scan.nii.gz")


def as_mr(hu: np.ndarray) -> np.ndarray:
    """Grey levels as a T1-weighted MR scan gives them: fat bright, muscle dark grey, lung and bone nearly black."""
    levels = np.interp(hu, [-1000, -500, -200, -120, -60, -20, 30, 80, 200, 400, 1500],
                       [0.02, 0.1, 0.6, 1, 1, 0.5, 0.35, 0.35, 0.5, 0.3, 0.1])
    return 1000 * levels + np.random.default_rng(0).normal(0, 20, hu.shape)


def test_ct_in_any_unit_and_window_passes(ill, healthy):
    for patient in (ill, healthy):
        for pixels in (patient.hu, *(display(patient.hu, window) for window in WINDOWS)):
            assert np.array_equal(lung_masks(pixels, check=CT), lung_masks(pixels))


def test_mr_is_refused(ill, healthy):
    for patient in (ill, healthy):
        pixels = as_mr(patient.hu)
        assert lung_masks(pixels).any(), "a threshold alone would take it"
        with pytest.raises(InputFileError, match=r"scan.nii.gz: does not look like chest CT.*MR") as caught:
            lung_masks(pixels, check=CT)
        assert "--unchecked" in caught.value.remedy


def test_a_photograph_is_refused():
    for name in ("camera", "coffee", "astronaut", "cat"):
        picture = getattr(data, name)()
        grey = picture if picture.ndim == 2 else (255 * rgb2gray(picture)).astype(np.uint8)
        with pytest.raises(CovidsegError, match=r"does not look like chest CT|no lung"):
            lung_masks(grey[None], check=CT)


def test_slices_without_anything_like_a_lung_are_refused():
    noise = np.random.default_rng(0).normal(0, 30, (3, 64, 64))
    for pixels in (np.zeros((3, 64, 64)), noise):
        with pytest.raises(NoLungError, match=r"scan.nii.gz: no lung was found in any slice"):
            lung_masks(pixels, check=CT)


def test_slices_with_too_little_air_to_tell_are_refused():
    moon = data.moon()[None, ::2, ::2]
    assert lung_masks(moon).any(), "a threshold alone would take it"
    with pytest.raises(NoLungError, match=r"scan.nii.gz: shows too little air.*--unchecked"):
        lung_masks(moon, check=CT)


def test_a_few_slices_of_the_belly_do_not_make_a_scan_implausible(ill):
    mixed = np.concatenate([np.full((3, *ill.hu.shape[1:]), -1000, ill.hu.dtype), ill.hu])
    assert lung_masks(mixed, check=CT)[3:].any()


def test_one_lung_alone_is_enough(healthy):
    right = healthy.lung[MIDDLE] & (np.arange(256) < 128)
    image = np.where(right, 40, healthy.hu[MIDDLE])
    assert ndi.label(healthy.lung[MIDDLE] & ~right)[1] == 1
    assert lung_masks(image[None], check=CT).any()


@pytest.mark.parametrize(("plausible", "said"), [
    ([True, True, False], None), ([True, False, None], None), ([True, None, None], None),
    ([True, False, False], "in 2 of 3 slices"), ([None, False, None], "in 1 of 1 slices"),
    ([False, False, False], "in 3 of 3 slices")])
def test_a_scan_is_refused_if_most_of_its_slices_that_tell_are_implausible(ill, monkeypatch, plausible, said):
    answers = iter(plausible)
    monkeypatch.setattr("covidseg.lungs.looks_like_ct", lambda image, region: next(answers))
    if said is None:
        assert lung_masks(ill.hu[3:6], check=CT).any()
    else:
        with pytest.raises(InputFileError, match=said):
            lung_masks(ill.hu[3:6], check=CT)


@pytest.mark.slow
@pytest.mark.realct
def test_every_real_scan_is_plausible(realct):
    for path in [*sorted((realct / "medseg9" / "im").glob("*.nii.gz")), realct / "medseg100" / "dev_im.nii.gz"]:
        assert lung_masks(read_scan(path).pixels, check=path).any()


# --- the unit and the window do not matter ----------------------------------------------------------------------

@pytest.mark.parametrize("window", WINDOWS)
def test_hounsfield_units_and_display_windows_give_the_same_mask(ill, found, window):
    shown = lung_masks(display(ill.hu, window))
    assert dice(shown, found) > 0.99
    assert min(dice(a, b) for a, b in zip(shown, found, strict=True)) > 0.97


def test_gain_and_offset_do_not_matter(ill, found):
    assert dice(lung_masks((ill.hu.astype(np.float32) + 1024) * 0.01), found) > 0.999


def test_padding_far_below_air_does_not_matter(ill, found):
    padded = ill.hu.copy()
    rows, columns = np.mgrid[:256, :256]
    padded[:, np.hypot(rows - 127.5, columns - 127.5) > 127] = -3024  # outside the scanner's round field of view
    assert dice(lung_masks(padded), found) > 0.99


def test_one_slice_alone_gives_nearly_what_the_volume_gives(ill, found):
    for k in range(len(ill.hu)):
        assert dice(lung_masks(ill.hu[k:k + 1])[0], found[k]) > 0.97


# --- what lies around does not matter ---------------------------------------------------------------------------

def framed(shown: np.ndarray, width: int) -> np.ndarray:
    """A white border, as pictures cut out of a page have."""
    changed = shown.copy()
    changed[:, :width], changed[:, -width:], changed[:, :, :width], changed[:, :, -width:] = 255, 255, 255, 255
    return changed


def with_text(shown: np.ndarray) -> np.ndarray:
    """Strokes of letters, in two lines over air and skin."""
    changed = shown.copy()
    for top in (10, 24):
        for left in range(10, 80, 8):
            changed[:, top:top + 9, left:left + 2] = 255
            changed[:, top + 4:top + 6, left:left + 5] = 255
    return changed


def with_table(shown: np.ndarray) -> np.ndarray:
    """A curved couch below the patient."""
    changed = shown.copy()
    for column, row in enumerate((238 - ((np.arange(256) - 128) / 32) ** 2).astype(int)):
        changed[:, row:row + 3, column] = 150
    return changed


@pytest.mark.parametrize("change", [lambda shown: framed(shown, 3), with_text, with_table])
def test_frames_text_and_tables_change_little(ill, change):
    shown = display(ill.hu)
    changed = change(shown)
    assert (changed != shown).mean() > 0.005
    before, after = (lung_masks(pixels, volume=False) for pixels in (shown, changed))
    assert dice(after, before) > 0.98
    assert min(dice(a, b) for a, b in zip(after, before, strict=True)) > 0.95


def test_a_broad_frame_away_from_the_body_changes_little(ill):
    wide = np.pad(display(ill.hu), ((0, 0), (24, 24), (24, 24)))
    before, after = lung_masks(wide, volume=False), lung_masks(framed(wide, 10), volume=False)
    assert min(dice(a, b) for a, b in zip(after, before, strict=True)) > 0.98


@pytest.mark.xfail(strict=True, reason="known limit: a broad frame that touches the body makes air around it lung")
def test_a_broad_frame_that_touches_the_body_changes_little(ill):
    shown = display(ill.hu)
    assert dice(lung_masks(framed(shown, 10)), lung_masks(shown)) > 0.9


def test_text_burnt_into_the_lung_is_filled(ill, found):
    changed = display(ill.hu[MIDDLE])
    rows, columns = (int(v.mean()) for v in np.nonzero(ndi.binary_erosion(found[MIDDLE], iterations=12)
                                                       & (np.arange(256) < 128)))
    changed[rows - 3:rows + 3, columns - 5:columns + 5] = 255
    assert dice(lung_masks(changed[None])[0], found[MIDDLE]) > 0.97


def test_the_windpipe_is_dropped(ill, healthy):
    for patient in (ill, healthy):
        mask = lung_masks(patient.hu)
        for k in range(6, 10):  # above the fork; below it, the main bronchi join the lungs
            air, _ = ndi.label(ndi.binary_opening((patient.hu[k] < -800) & ~patient.lung[k]))
            tube = air == np.bincount(air[110:150, 118:142].ravel(), minlength=2)[1:].argmax() + 1
            assert 50 < tube.sum() < 150
            assert not mask[k][tube].any()


def test_a_round_hole_in_the_midline_is_dropped_beside_lungs_only(healthy):
    # A round hole of air in the midline, where the phantom has soft tissue only.
    rows, columns = np.mgrid[:256, :256]
    body = np.flatnonzero((healthy.hu[MIDDLE] > -200).any(axis=0))
    middle = body.mean()
    inside = ndi.binary_erosion(~healthy.lung[MIDDLE] & (healthy.hu[MIDDLE] > -200), iterations=9)
    free = np.flatnonzero(inside[:, round(middle)])
    hole = np.hypot(rows - free[len(free) // 2], columns - middle) < 7
    image = healthy.hu[MIDDLE].copy()
    image[hole] = -980
    assert not lung_masks(image[None])[0][hole].any()
    # With no lung beside it, the same hole counts: it is its place among others that gives it away.
    lungless = np.where(healthy.lung[MIDDLE] & (image < -200), 40, image)
    lungless[hole] = -980
    assert lung_masks(lungless[None])[0][hole].mean() > 0.5


# --- disease ----------------------------------------------------------------------------------------------------

def paint(patient: PhantomPatient, k: int, density: float, radius: int, rim: int) -> tuple[np.ndarray, np.ndarray]:
    """A dense core at the side wall of the larger lung, with a hazy rim around it; the slice and the core."""
    noise = np.random.default_rng(k).normal(0, 30, (256, 256))
    sides, _ = ndi.label(patient.lung[k])
    side = sides == 1 + np.argmax(np.bincount(sides.ravel())[1:])
    at_rows, at_columns = np.nonzero(side)
    row = int(at_rows.min() + 0.5 * np.ptp(at_rows))
    on_row = at_columns[at_rows == row]
    column = on_row.min() if at_columns.mean() < 128 else on_row.max()
    rows, columns = np.mgrid[:256, :256]
    distance = np.hypot(rows - row, columns - column)
    core, haze = side & (distance < radius), side & (distance < radius + rim)
    image = patient.hu[k].astype(np.float32)
    image[haze] = np.maximum(image, -180 + noise)[haze]
    image[core] = (density + noise)[core]
    return image, core


@pytest.mark.parametrize("density", [-650, -500, -350])
def test_ground_glass_at_the_pleura_stays_in(healthy, density):
    for k in (2, 3, 4, 5, 6):
        image, core = paint(healthy, k, density, radius=24, rim=0)
        assert lung_masks(image[None])[0][core].mean() > 0.85


def test_consolidation_with_a_hazy_rim_at_the_pleura_stays_in(healthy):
    kept, threshold_keeps = [], []
    for k in (2, 3, 4, 5, 6):
        image, core = paint(healthy, k, 30, radius=12, rim=16)
        kept.append(lung_masks(image[None])[0][core].mean())
        threshold_keeps.append((image < -400)[core].mean())
    assert max(threshold_keeps) == 0
    # Four slices of five; where the lung is narrow, the rim takes too little of the side to count as disease.
    assert np.sort(kept)[1] > 0.7


@pytest.mark.xfail(strict=True, reason="known limit: solid consolidation without a hazy rim joins the chest wall")
def test_solid_consolidation_at_the_pleura_stays_in(healthy):
    image, core = paint(healthy, MIDDLE, 30, radius=16, rim=0)
    assert lung_masks(image[None])[0][core].mean() > 0.5


# --- odd input --------------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # constant slices have no correlation
@pytest.mark.parametrize("value", [-1024, 0, 255])
def test_constant_slices_have_no_lung(value):
    for volume in (None, True, False):
        mask = lung_masks(np.full((3, 64, 64), value, np.int16), volume=volume)
        assert mask.shape == (3, 64, 64)
        assert mask.dtype == bool
        assert not mask.any()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_empty_slices_between_others_have_no_lung(ill):
    pixels = ill.hu[3:7].copy()
    pixels[1] = -1024
    mask = lung_masks(pixels)
    assert mask.any(axis=(1, 2)).tolist() == [True, False, True, True]


def test_a_body_without_lung_has_none():
    rows, columns = np.mgrid[:256, :256]
    body = np.hypot((rows - 128) / 80, (columns - 128) / 110) < 1
    belly = np.where(body, 40, -1000) + np.random.default_rng(0).normal(0, 20, (256, 256))
    assert not lung_masks(belly[None]).any()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("shape", [(1, 7), (8, 8), (40, 3)])
def test_noise_and_tiny_slices_do_not_crash(shape):
    noise = np.random.default_rng(0).integers(0, 256, (2, *shape)).astype(np.uint8)
    for volume in (True, False):
        assert lung_masks(noise, volume=volume).shape == noise.shape


@pytest.mark.parametrize("shape", [(256, 320), (200, 256), (512, 512), (630, 630), (512, 400)])
def test_other_sizes(ill, found, shape):
    hu, lung = ill.hu[MIDDLE].astype(float), ill.lung[MIDDLE]
    scale = min(shape) / 256
    square = round(256 * scale)
    image, truth = np.full(shape, -1000.0), np.zeros(shape, bool)
    y, x = (shape[0] - square) // 2, (shape[1] - square) // 2
    image[y:y + square, x:x + square] = resize(hu, (square, square), order=1, preserve_range=True)
    truth[y:y + square, x:x + square] = resize(lung.astype(float), (square, square), order=1) > 0.5
    mask = lung_masks(image[None])[0]
    assert mask.shape == shape
    assert dice(mask, truth) > 0.93


def test_the_mask_stays_inside_the_body(ill, found):
    for image, mask in zip(ill.hu, found, strict=True):
        body = ndi.binary_fill_holes(ndi.binary_opening(image > -300, iterations=2))
        assert not (mask & ~body).any()
        assert mask[1:-1, 1:-1].sum() == mask.sum()


def test_the_input_is_not_changed_and_the_result_is_repeatable(ill, found):
    before = ill.hu.copy()
    np.testing.assert_array_equal(lung_masks(ill.hu), found)
    np.testing.assert_array_equal(ill.hu, before)


def test_mirrored_slices_give_mirrored_masks(ill, found):
    assert dice(lung_masks(ill.hu[:, :, ::-1])[:, :, ::-1], found) > 0.995


def test_settings_have_an_effect(ill, found):
    narrow = lung_masks(ill.hu, replace(LungSettings(), air_level=0.3, lesion_level=0.3))
    assert narrow.sum() < 0.97 * found.sum()


# --- volumes and stacks -----------------------------------------------------------------------------------------

def test_is_volume_tells_ordered_slices_from_unrelated_ones(ill, healthy, tiny_phantom):
    assert is_volume(ill.hu)
    assert is_volume(display(healthy.hu))
    others = [read_scan(c.image).pixels for c in load_dataset(tiny_phantom).cases]
    assert all(is_volume(pixels) for pixels in others)
    assert not is_volume(np.stack([pixels[k] for pixels in others for k in (0, 8)]))
    assert not is_volume(np.random.default_rng(0).normal(size=(5, 64, 64)))
    assert not is_volume(ill.hu[:1])


@pytest.mark.filterwarnings("error")
def test_empty_slices_do_not_make_a_volume_a_stack(ill):
    pixels = ill.hu.copy()
    pixels[[0, 4, 9]] = -1024
    assert is_volume(pixels)
    assert not is_volume(np.full((3, 64, 64), -1024))


def test_slices_have_to_look_alike_in_the_middle():
    """Of the likenesses of neighbours, the middle one counts, and it has to be above 0.9."""
    rng = np.random.default_rng(0)
    first, other = rng.normal(size=(2, 32, 32))
    for share, expected in ((0.3, True), (0.6, False)):  # likenesses of about 0.96 and 0.86
        near = first + share * other
        assert is_volume(np.stack([first, near, first, near, rng.normal(size=(32, 32))])) == expected


@pytest.mark.parametrize("smallest", [0.02, 0.05])
def test_a_stack_drops_components_below_a_share_of_the_body(monkeypatch, smallest):
    body = np.ones((40, 50), bool)
    for pixels in range(1, 150):
        aerated = np.zeros_like(body)
        aerated.ravel()[:pixels] = True
        aerated[20:, 20:] = True
        monkeypatch.setattr("covidseg.lungs.regions", lambda image, settings, aerated=aerated:
                            lung_module.Regions(body, aerated, np.zeros_like(body)))
        monkeypatch.setattr("covidseg.lungs.without_trachea", lambda lung, body: lung)
        monkeypatch.setattr("covidseg.lungs.complete", lambda lung, region, settings: lung)
        found = lung_masks(np.zeros((1, 40, 50)), LungSettings(smallest=smallest), volume=False)[0]
        assert found[30, 30]
        assert found[0, 0] == (pixels > smallest * 2000)


def test_a_volume_drops_small_components_that_a_stack_keeps(healthy):
    pixels = healthy.hu.copy()
    rows, columns = np.mgrid[:256, :256]
    # Gas in the stomach: small in three dimensions, but large enough in its one slice.
    solid = ndi.binary_erosion((pixels[0] > -200) & ~healthy.lung[0], iterations=2)
    depth = ndi.distance_transform_edt(solid)
    depth[:, 100:156] = 0  # beside the midline, where it cannot be taken for the windpipe
    row, column = np.unravel_index(depth.argmax(), depth.shape)
    gas = np.hypot((rows - row) / 9, (columns - column) / 14) < 1
    pixels[0][gas] = -980
    assert lung_masks(pixels, volume=False)[0][gas].mean() > 0.5
    as_volume = lung_masks(pixels, volume=True)
    assert not as_volume[0][gas & ~healthy.lung[0]].any()
    np.testing.assert_array_equal(lung_masks(pixels), as_volume)  # told by the slices themselves


def largest_in_3d(aerated: np.ndarray, share: float) -> np.ndarray:
    labels, _ = ndi.label(aerated)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return (areas > share * areas.max())[labels]


def test_components_in_3d_are_found_slice_by_slice(monkeypatch):
    """The components that two slices at a time lead to are those of the whole volume."""
    rng = np.random.default_rng(0)
    kept = []
    for trial in range(20):
        noise = ndi.gaussian_filter(rng.normal(size=(7, 40, 50)), (0.5, 2, 2))
        aerated = noise > (0.2 + 0.1 * (trial % 5)) * noise.std()
        aerated[trial % 7] &= trial % 2 == 0  # every other volume has a gap
        volume = iter([lung_module.Regions(np.ones_like(a), a, np.zeros_like(a)) for a in aerated])
        monkeypatch.setattr("covidseg.lungs.regions", lambda image, settings, volume=volume: next(volume))
        monkeypatch.setattr("covidseg.lungs.without_trachea", lambda lung, body: lung)
        monkeypatch.setattr("covidseg.lungs.complete", lambda lung, region, settings: lung)
        found = lung_masks(np.zeros(aerated.shape), LungSettings(smallest_3d=0.3), volume=True)
        assert np.array_equal(found, largest_in_3d(aerated, 0.3))
        kept.append((found.sum() / aerated.sum()) < 0.98)
    assert sum(kept) > 5, "there is something to drop"


def test_masks_can_be_had_in_any_order_and_without_the_slices(ill, found):
    passes = LungPasses()
    for image in ill.hu:
        passes.look(image.copy())
    assert len(passes) == len(found)
    assert passes.is_volume()
    for k in (MIDDLE, 0, 9, MIDDLE):
        assert np.array_equal(passes.mask(k), found[k])
    kept = sum(map(len, passes._packed))
    assert kept < 0.05 * len(found) * 256 * 256, "packed, and a fraction of a byte for each pixel"


def test_no_slices_have_no_masks():
    assert lung_masks(np.zeros((0, 64, 64))).shape == (0, 64, 64)


# --- fast ways to say the same ----------------------------------------------------------------------------------

def plain_closing(mask: np.ndarray, radius: int) -> np.ndarray:
    padded = np.pad(mask, radius + 1)
    grown = ndi.distance_transform_edt(~padded) <= radius
    return (ndi.distance_transform_edt(grown) > radius)[radius + 1:-radius - 1, radius + 1:-radius - 1]


def plain_fill_holes(mask: np.ndarray, largest: float = np.inf) -> np.ndarray:
    holes, _ = ndi.label(~mask & ndi.binary_fill_holes(mask))
    areas = np.bincount(holes.ravel())
    small = areas <= largest
    small[0] = False
    return mask | small[holes]


def block_mean(image: np.ndarray, side: int) -> np.ndarray:
    factor = max(1, image.shape[0] // side)
    return image.astype(np.float32).reshape(-1, factor, image.shape[1] // factor, factor).mean(axis=(1, 3))


@pytest.fixture
def plain(monkeypatch):
    """Calls ``lung_masks`` with the building blocks in place that their definitions ask for."""
    def masks(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(lung_module, "opening", lambda mask, radius: gray_opening(mask, disk(radius)))
            patched.setattr(lung_module, "closing", plain_closing)
            patched.setattr(lung_module, "fill_holes", plain_fill_holes)
            patched.setattr(lung_module, "erode", lambda mask, radius: ndi.distance_transform_edt(mask) > radius)
            patched.setattr("covidseg.lungs.to_grid", block_mean)
            patched.setattr("covidseg.lungs.enlarge", lambda mask, shape:
                            resize(mask.astype(np.float32), shape, order=1) > 0.5)
            return lung_masks(*arguments)
    return masks


@pytest.mark.parametrize("volume", [True, False])
def test_fast_steps_give_the_masks_of_plain_ones(ill, plain, volume):
    large = ill.hu[2:6].repeat(2, axis=1).repeat(2, axis=2)
    large += np.random.default_rng(0).integers(-30, 30, large.shape).astype(np.int16)
    cut = large[:, 150:406, 100:356]  # the body reaches all four edges
    for pixels in (large, cut, display(large)):
        assert np.array_equal(lung_masks(pixels, LungSettings(), volume), plain(pixels, LungSettings(), volume))


@pytest.mark.realct
def test_fast_steps_give_the_masks_of_plain_ones_on_real_scans(realct, plain):
    for case in load_dataset(realct / "medseg9").cases[:3]:
        pixels = read_scan(case.image).pixels[::9]
        masks = lung_masks(pixels, LungSettings(), False)
        assert np.array_equal(masks, plain(pixels, LungSettings(), False))
        assert masks.any()


def test_a_slice_is_averaged_down_and_a_mask_enlarged(ill):
    for side in (256, 128, 64, 32):
        image = ill.hu[MIDDLE].astype(np.float32) / 3
        np.testing.assert_allclose(lung_module.to_grid(image, side), block_mean(image, side), rtol=1e-5, atol=1e-3)
        assert np.array_equal(lung_module.to_grid(ill.hu[MIDDLE], side), block_mean(ill.hu[MIDDLE], side))
    for shape in ((512, 512), (256, 256), (400, 400), (768, 768)):
        assert np.array_equal(lung_module.enlarge(ill.lung[MIDDLE], shape),
                              resize(ill.lung[MIDDLE].astype(np.float32), shape, order=1) > 0.5)


def test_true_lungs_of_the_phantom_are_read_upright(tiny_phantom):
    for case in load_dataset(tiny_phantom).cases:
        scan = read_scan(case.image)
        assert scan.pixels[read_mask(case.lung, like=scan)].mean() < -600
