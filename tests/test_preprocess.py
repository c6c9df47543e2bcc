"""Crops and their scale: windows do not matter, boxes fit, and weak training never opens a mask."""

from __future__ import annotations

import csv
import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from inputs import squeezed
from tiny import dice

from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.scan import Grid, read_mask, read_scan, write_like
from covidseg.errors import DatasetError, InputFileError, NoLungError
from covidseg.lungs import threshold_lungs
from covidseg.preprocess import (
    CLIP,
    PrepareSettings,
    WeakSet,
    air_and_tissue,
    crop,
    crop_masks,
    lung_box,
    make_crops,
    net_input,
    normalise,
    uncrop,
    uncrop_all,
    weak_set,
    with_true_lungs,
)

WINDOWS = [(-1000, 200), (-1200, 600), (-1350, 150)]
SMALL = PrepareSettings(size=80)


@pytest.fixture(scope="module")
def first(tiny_phantom: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and threshold lungs of the first volume."""
    pixels = read_scan(load_dataset(tiny_phantom).cases[0].image).pixels
    return pixels, threshold_lungs(pixels)


# --- one scale for all windows ----------------------------------------------------------------------------------

def test_air_is_zero_and_soft_tissue_is_one(first):
    for image, lung in zip(*first, strict=True):
        scaled = normalise(image, lung)
        assert scaled.dtype == np.float32
        assert np.percentile(scaled[lung], 10) == pytest.approx(0, abs=0.03)  # measured in the smoothed picture
        assert (scaled >= CLIP[0]).all()
        assert (scaled <= CLIP[1]).all()
        # Soft tissue is within 150 HU of water, wherever it lies.
        tissue = scaled[(image > -100) & (image < 100)]
        assert 0.85 < np.median(tissue) < 1.1


def test_two_points_by_hand():
    lung = np.zeros((10, 10), bool)
    lung[2:8, 2:8] = True
    image = np.full((10, 10), -1000.0)  # air around the patient, outside the lungs' rows and columns
    image[2:8, 2:8] = -800
    image[2:8, 4:6] = 40  # the mediastinum between the lungs
    lung[2:8, 4:6] = False
    scaled = normalise(image, lung)
    for part, value in ((scaled[lung], 0), (scaled[2:8, 4:6], 1), (scaled[0], (-1000 + 800) / 840)):
        np.testing.assert_allclose(part, value, atol=1e-6)
    image[0, 3:8] = 3000  # burnt-in text
    np.testing.assert_array_equal(normalise(image, lung)[1:], scaled[1:])
    np.testing.assert_array_equal(normalise(np.full((8, 8), 7, np.uint8), np.ones((8, 8), bool)), 0)


@given(st.floats(0.05, 50), st.floats(-2000, 2000))
def test_gain_and_offset_cancel(gain, offset):
    rng = np.random.default_rng(0)
    image = np.where(rng.random((20, 20)) < 0.5, -800, 40) + rng.normal(0, 40, (20, 20))
    lung = image < -400
    np.testing.assert_allclose(normalise(image * gain + offset, lung), normalise(image, lung), atol=2e-3)


def test_noise_of_a_low_dose_moves_the_scale_by_little():
    """Measured in the noisy picture itself, air would lie 150 HU lower, and all of the lung look denser by a sixth."""
    rows, columns = np.indices((256, 256))
    lung = np.hypot(rows - 128, columns - 128) < 80
    image = np.where(lung, -850.0, 40.0)
    noisy = image + np.random.default_rng(0).normal(0, 120, image.shape)
    (air, tissue), (other, same) = air_and_tissue(image, lung), air_and_tissue(noisy, lung)
    assert abs(other - air) < 60
    assert abs(same - tissue) < 10
    assert abs(np.percentile(noisy[lung], 10) - np.percentile(image[lung], 10)) > 130


@pytest.mark.parametrize("window", WINDOWS)
def test_display_windows_cancel_inside_the_lung(first, window):
    low, high = window
    for image, lung in zip(*first, strict=True):
        shown = np.rint(np.clip((image.astype(float) - low) / (high - low), 0, 1) * 255).astype(np.uint8)
        difference = np.abs(normalise(shown, lung) - normalise(image, lung))[lung]
        assert difference.mean() < 0.005  # measured .002: the rounding to 256 levels
        assert np.percentile(difference, 99) < 0.02


# --- boxes ------------------------------------------------------------------------------------------------------

@st.composite
def lungs_anywhere(draw: st.DrawFn) -> np.ndarray:
    lung = np.zeros((draw(st.integers(1, 40)), draw(st.integers(1, 40))), bool)
    for _ in range(2):
        lung[draw(st.integers(0, lung.shape[0] - 1)), draw(st.integers(0, lung.shape[1] - 1))] = True
    return lung


@given(lungs_anywhere(), st.floats(0, 0.5))
def test_a_box_is_a_square_that_holds_the_lung_and_its_margin(lung, margin):
    top, left, height, width = lung_box(lung, margin)
    rows, columns = np.nonzero(lung)
    longer = max(np.ptp(rows), np.ptp(columns)) + 1
    assert height == width
    assert longer * (1 + 2 * margin) <= height < longer * (1 + 2 * margin) + 1.001
    assert top <= rows.min() <= rows.max() < top + height
    assert left <= columns.min() <= columns.max() < left + width
    # In the middle, give or take the rounding.
    assert abs((top + height / 2) - (rows.min() + rows.max() + 1) / 2) <= 1
    assert abs((left + width / 2) - (columns.min() + columns.max() + 1) / 2) <= 1


@given(lungs_anywhere(), st.floats(0, 0.5), st.floats(0.2, 5))
def test_a_box_is_as_high_as_wide_in_millimetres(lung, margin, aspect):
    top, left, height, width = lung_box(lung, margin, aspect)
    rows, columns = np.nonzero(lung)
    assert abs(height * aspect - width) <= 1 + aspect
    assert top <= rows.min() <= rows.max() < top + height
    assert left <= columns.min() <= columns.max() < left + width


def test_crops_have_square_pixels_whatever_those_of_the_scan_are(first):
    pixels, lungs = (volume[2:8] for volume in first)
    expected = make_crops(pixels, lungs, SMALL)
    for factor, axis, aspect in ((2, 1, 2.0), (2, 2, 0.5)):
        found = make_crops(squeezed(pixels, factor, axis), squeezed(lungs, factor, axis), SMALL, aspect)
        assert dice(found.lungs, expected.lungs) > 0.95           # measured .97
        apart = np.abs(found.images - expected.images)[expected.lungs & found.lungs]
        assert apart.mean() < 0.1                                 # measured .07; of crops one pixel apart it is .10


def inside(box: tuple[int, int, int, int], shape: tuple[int, int]) -> np.ndarray:
    """Pixels of the slice that lie in the box, found one by one."""
    top, left, height, width = box
    rows, columns = np.mgrid[:shape[0], :shape[1]]
    return (rows >= top) & (rows < top + height) & (columns >= left) & (columns < left + width)


@st.composite
def slices_and_boxes(draw: st.DrawFn) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """A slice and a square box that meets it but may reach beyond it on every side."""
    image = draw(arrays(np.float32, st.tuples(st.integers(2, 12), st.integers(2, 12)),
                        elements=st.floats(-1, 2, width=32)))
    side = draw(st.integers(2, 20))
    top = draw(st.integers(1 - side, image.shape[0] - 1))
    left = draw(st.integers(1 - side, image.shape[1] - 1))
    return image, (top, left, side, side)


@given(slices_and_boxes())
def test_without_resizing_uncrop_undoes_crop_exactly(pair):
    image, box = pair
    small = crop(image, box, box[2], fill=-7)
    assert small.shape == (box[2], box[2])
    part = inside(box, image.shape)
    assert np.isclose(small, -7).sum() == small.size - part.sum()  # what lies beyond the slice, and nothing else
    np.testing.assert_allclose(uncrop(small, box, image.shape), np.where(part, image, 0), atol=1e-5)


@given(slices_and_boxes(), st.integers(4, 30))
def test_with_resizing_a_constant_stays_constant_and_values_stay_in_range(pair, size):
    image, box = pair
    part = inside(box, image.shape)
    full = uncrop(crop(np.full_like(image, 0.5), box, size, fill=0.5), box, image.shape)
    np.testing.assert_allclose(full, np.where(part, 0.5, 0), atol=1e-5)
    small = crop(image, box, size, fill=0)
    assert small.shape == (size, size)
    assert small.dtype == np.float32
    assert small.min() >= min(image.min(), 0) - 1e-5
    assert small.max() <= max(image.max(), 0) + 1e-5
    assert not uncrop(small, box, image.shape)[~part].any()


@pytest.mark.parametrize("box", [(20, 30, 90, 90), (-15, -20, 120, 120), (40, 60, 100, 100)])
@pytest.mark.parametrize("size", [80, 160, 200])
def test_a_mask_comes_back_where_it_was(box, size):
    rows, columns = np.mgrid[:128, :128]
    disk = np.hypot(rows - 75, columns - 85) < 25
    expected = disk & inside(box, disk.shape)
    back = uncrop(crop(disk.astype(float), box, size, 0.0), box, disk.shape) > 0.5
    assert dice(back, expected) > 0.985
    # Half a pixel of displacement would show in the centre of mass.
    assert np.argwhere(back).mean(axis=0) == pytest.approx(np.argwhere(expected).mean(axis=0), abs=0.2)


def test_maps_come_back_into_their_own_slices(first):
    pixels, lungs = first
    found = np.array([2, 5, 7])
    crops = make_crops(pixels[found], lungs[found], SMALL)
    for maps in (crops.images, crops.lungs):
        full = uncrop_all(maps, crops.boxes, found, pixels.shape)
        assert full.dtype == np.float32
        assert full.shape == pixels.shape
        assert np.flatnonzero(full.any(axis=(1, 2))).tolist() == found.tolist()
        for k, small, box in zip(found, maps, crops.boxes, strict=True):
            np.testing.assert_array_equal(full[k], uncrop(small, box, pixels.shape[1:]))
    nothing = uncrop_all(crops.images[:0], crops.boxes[:0], found[:0], pixels.shape)
    assert nothing.shape == pixels.shape
    assert not nothing.any()
    with pytest.raises(ValueError, match="shorter"):
        uncrop_all(crops.images, crops.boxes[:2], found, pixels.shape)


def test_crops_of_a_volume(first):
    pixels, lungs = first
    crops, narrow = make_crops(pixels, lungs, SMALL), make_crops(pixels, lungs, replace(SMALL, margin=0.0))
    assert len(crops) == len(pixels)
    assert crops.images.shape == crops.lungs.shape == (10, 80, 80)
    assert (crops.images.dtype, crops.lungs.dtype) == (np.float32, bool)
    for k, (box, lung) in enumerate(zip(crops.boxes, crops.lungs, strict=True)):
        assert tuple(box) == lung_box(lungs[k], SMALL.margin)
        assert dice(uncrop(lung, box, lungs[k].shape) > 0.5, lungs[k]) > 0.97
        assert crops.images[k][lung].mean() < 0.4 < crops.images[k][~lung].mean()
        taken = np.argwhere(lung)
        assert taken.min() >= 5, "a tenth on either side: at least 0.1 / 1.2 of 80 pixels, less the rounding"
        assert taken.max() <= 74
    assert (narrow.boxes[:, 2] < crops.boxes[:, 2]).all()
    assert all(lung.any(axis=0)[[0, -1]].any() or lung.any(axis=1)[[0, -1]].any() for lung in narrow.lungs)
    np.testing.assert_array_equal(crop_masks(lungs, crops.boxes, SMALL.size), crops.lungs)
    for mask, image in zip(crop_masks(pixels > -100, crops.boxes, SMALL.size), crops.images, strict=True):
        assert image[mask].mean() > image[~mask].mean() + 0.5, "the picture is bright where the mask says so"
    few = crops.take(np.array([5, 0]))
    for part in ("images", "lungs", "boxes"):
        np.testing.assert_array_equal(getattr(few, part), np.stack([getattr(crops, part)[k] for k in (5, 0)]))
    none = make_crops(pixels[:0], lungs[:0], SMALL)
    assert len(none) == 0
    assert none.images.shape == none.lungs.shape == crop_masks(lungs[:0], none.boxes, 80).shape == (0, 80, 80)
    assert none.boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        crop_masks(lungs[:2], crops.boxes[:1], 80)


def test_net_input_sets_everything_outside_the_lung_to_air():
    pictures, lungs = torch.rand(2, 1, 8, 8) + 1, (torch.rand(2, 1, 8, 8) > 0.5).float()
    out = net_input(pictures, lungs)
    assert out.shape == (2, 2, 8, 8)
    assert torch.equal(out[:, :1], torch.where(lungs == 1, pictures, 0))
    assert torch.equal(out[:, 1:], lungs)


# --- the weak set -----------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weak(tiny_phantom: Path) -> WeakSet:
    return weak_set(load_dataset(tiny_phantom), SMALL)


@pytest.fixture
def copied_data(tiny_phantom: Path, tmp_path: Path) -> Path:
    """A copy of the phantom that a test may change."""
    return Path(shutil.copytree(tiny_phantom, tmp_path / "data"))


def relabel(root: Path, label: str | None = None, drop: str = "", extra: str = "") -> None:
    """Changes the label table: every label, the rows of one volume, or one more line."""
    table = root / "slice_labels.csv"
    with table.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    lines = [f"{r['volume']},{r['slice']},{label if label is not None else r['has_lesion']},{r['patient']}"
             for r in rows if r["volume"] != drop]
    table.write_text("\n".join(["volume,slice,has_lesion,patient", *lines, extra]) + "\n")


def test_the_weak_set_holds_the_labels_of_the_table_and_each_crop_belongs_to_its_name(tiny_phantom, weak):
    with (tiny_phantom / "slice_labels.csv").open(newline="") as stream:
        table = {f"{r['volume']}:{r['slice']}": (int(r["has_lesion"]), r["patient"]) for r in csv.DictReader(stream)}
    assert len(weak) == len(weak.crops) == 40
    assert weak.names.tolist() == list(table)
    assert list(zip(weak.labels.tolist(), weak.patients.tolist(), strict=True)) == list(table.values())
    for index in (0, 13, 39):
        volume, k = weak.names[index].rsplit(":", 1)
        pixels = read_scan(tiny_phantom / "im" / f"{volume}.nii.gz").pixels
        one = make_crops(pixels[[int(k)]], threshold_lungs(pixels)[[int(k)]], SMALL)
        np.testing.assert_array_equal(one.images[0], weak.crops.images[index])


def test_masks_are_never_opened(copied_data, weak):
    """That they have no influence either, whatever they say, shows in the tests of the pipeline."""
    for part in ("mask", "lung", "kind"):
        for path in (copied_data / part).iterdir():
            path.write_bytes(b"this is no scan")
    data = load_dataset(copied_data)
    assert data.cases[0].mask is not None  # they are seen, but not opened
    assert weak_set(data, SMALL).names.tolist() == weak.names.tolist()
    assert not {"mask", "truth", "lesions"} & {f.name for f in fields(WeakSet)}


def test_slices_without_enough_lung_or_label_are_left_out(copied_data, weak):
    data = load_dataset(copied_data)
    demanding = weak_set(data, replace(SMALL, least_lung=0.1))
    shares = {f"{c.id}:{k}": mask.mean() for c in data.cases
              for k, mask in enumerate(threshold_lungs(read_scan(c.image).pixels))}
    assert demanding.names.tolist() == [n for n in weak.names if shares[n] >= 0.1]
    assert 0 < len(demanding) < len(weak)
    assert len(demanding.crops) == len(demanding.labels) == len(demanding.patients) == len(demanding.names)
    with pytest.raises(DatasetError, match="lungs in both"):
        weak_set(data, replace(SMALL, least_lung=0.99))
    relabel(copied_data, drop="phantom_01")
    assert weak_set(load_dataset(copied_data), SMALL).names.tolist() == [
        n for n in weak.names if "phantom_01" not in n]


@pytest.mark.parametrize(("change", "refused"), [
    ({"label": "0"}, "with and without a lesion"), ({"label": "1"}, "with and without a lesion"),
    ({"extra": "phantom_02,10,1,phantom_02"}, "phantom_02 has 10 slices, slice 10 is labelled")])
def test_labels_that_cannot_teach_are_refused(copied_data, change, refused):
    relabel(copied_data, **change)
    with pytest.raises(DatasetError, match=refused):
        weak_set(load_dataset(copied_data), SMALL)


def test_no_lung_anywhere(tmp_path):
    write_like(np.full((3, 64, 64), -1000, np.int16), Grid((64, 64, 3), np.eye(4)), tmp_path / "im" / "a.nii.gz")
    (tmp_path / "slice_labels.csv").write_text("volume,slice,has_lesion\na,0,0\na,1,1\n")
    with pytest.raises(NoLungError, match=r"a\.nii\.gz"):
        weak_set(load_dataset(tmp_path), SMALL)


def test_scans_that_do_not_look_like_ct_are_read_on_request(copied_data):
    scan = read_scan(copied_data / "im" / "phantom_02.nii.gz")
    fat = np.where((scan.pixels > -200) & (scan.pixels < -20), 1500, scan.pixels)  # as bright as in MR
    write_like(fat.astype(np.int16), scan.grid, scan.path)
    data = load_dataset(copied_data)
    for refused in (data, data.subset(["phantom_02", "phantom_03"])):
        with pytest.raises(InputFileError, match=r"phantom_02\.nii\.gz: does not look like chest CT"):
            weak_set(refused, SMALL)
        taken = weak_set(replace(refused, check=False), SMALL).names.tolist()
        assert [name for name in taken if name.startswith("phantom_02")]
    assert not replace(data, check=False).subset(["phantom_02"]).check, "what is asked of all is asked of some"


# --- true lungs, for comparison ---------------------------------------------------------------------------------

def test_true_lungs_are_those_of_the_data_folder(tiny_phantom, weak):
    data = load_dataset(tiny_phantom)
    true = with_true_lungs(data, weak)
    masks = {case.id: read_mask(case.lung) for case in data.cases}
    for name, box, lung in zip(true.names, true.crops.boxes, true.crops.lungs, strict=True):
        volume, k = name.rsplit(":", 1)
        np.testing.assert_array_equal(lung, crop(masks[volume][int(k)], box, SMALL.size, 0.0) > 0.5)
        assert lung.any()
    assert not np.array_equal(true.crops.lungs, weak.crops.lungs)
    for found, expected in ((true.crops.images, weak.crops.images), (true.crops.boxes, weak.crops.boxes),
                            (true.labels, weak.labels), (true.patients, weak.patients), (true.names, weak.names)):
        assert found is expected, "all else stays"
    # Lungs follow the names, not the order of the folder; a volume without a slice does no harm.
    mine = np.flatnonzero([not name.startswith("phantom_01") for name in weak.names])
    order = np.random.default_rng(0).permutation(mine)[:25]
    some = WeakSet(weak.crops.take(order), weak.labels[order], weak.patients[order], weak.names[order])
    np.testing.assert_array_equal(with_true_lungs(data, some).crops.lungs, true.crops.lungs[order])
    bare = Dataset(data.root, (*data.cases[:2], replace(data.cases[2], lung=None), data.cases[3]))
    with pytest.raises(DatasetError, match="phantom_02 has no lung mask"):
        with_true_lungs(bare, weak)
