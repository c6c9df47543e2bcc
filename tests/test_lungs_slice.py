"""The steps of the lung mask of one slice, each on a picture so simple that the answer is known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from scipy import ndimage as ndi
from skimage.transform import resize

from covidseg.lungs import (
    LUNG_SHARE,
    TISSUE_SPREAD,
    LungSettings,
    Regions,
    _sides,
    complete,
    dilate,
    enlarge,
    erode,
    grid_shape,
    looks_like_ct,
    regions,
    to_grid,
    without_trachea,
)

SIDE = 160
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
SHARP = LungSettings(smooth=0.0)
AIR, TISSUE = -900.0, 100.0
GRAIN = np.random.default_rng(0).normal(0, 2, (SIDE, SIDE))  # so that no threshold meets a value exactly


def disk(row: float, column: float, radius: float) -> np.ndarray:
    return np.hypot(ROWS - row, COLUMNS - column) <= radius


def box(top: int, left: int, height: int, width: int) -> np.ndarray:
    """A rectangle of pixels, ``(SIDE, SIDE)`` bool."""
    return (top <= ROWS) & (top + height > ROWS) & (left <= COLUMNS) & (left + width > COLUMNS)


NOTHING, BODY = box(0, 0, 0, 0), box(20, 10, 120, 140)
LEFT, RIGHT = box(40, 30, 80, 40), box(40, 90, 80, 40)


def chest(**levels: tuple[np.ndarray, float]) -> np.ndarray:
    """A box of tissue in air with two boxes of air in it, and places at levels between 0 (air) and 1 (tissue)."""
    image = np.where(BODY & ~LEFT & ~RIGHT, TISSUE, AIR) + GRAIN
    for place, level in levels.values():
        image[place] = AIR + level * (TISSUE - AIR)
    return image


# --- the working grid -------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("shape", "side", "expected"), [
    ((512, 512), 256, (256, 256)), ((512, 400), 256, (256, 200)), ((300, 600), 100, (50, 100)),
    ((256, 256), 256, (256, 256)), ((40, 100), 256, (40, 100)), ((1000, 3), 100, (100, 1)), ((7, 1), 2, (2, 1))])
def test_the_longer_side_is_cut_to_that_of_the_grid(shape, side, expected):
    assert grid_shape(shape, side) == expected
    assert to_grid(np.zeros(shape), side).shape == expected


@pytest.mark.parametrize("shape", [(512, 384), (384, 512), (500, 500), (96, 97), (129, 64)])
def test_slices_that_are_no_multiple_of_the_grid_are_resized(shape):
    image = np.random.default_rng(0).normal(-300, 400, shape).astype(np.float32)
    small = to_grid(image, 64)
    assert small.dtype == np.float32
    np.testing.assert_allclose(small, resize(image, grid_shape(shape, 64), order=1, anti_aliasing=True,
                                             preserve_range=True), rtol=1e-5, atol=1e-3)


def test_multiples_of_the_grid_are_averaged_block_by_block():
    image = np.random.default_rng(0).integers(-1000, 1000, (96, 96)).astype(np.int16)
    for side in (48, 32, 24):
        factor = 96 // side
        blocks = image.reshape(side, factor, side, factor).mean(axis=(1, 3))
        np.testing.assert_allclose(to_grid(image, side), blocks, rtol=1e-5, atol=1e-3)
    assert np.array_equal(to_grid(image, 96), image)
    assert np.array_equal(to_grid(image, 97), image)


@pytest.mark.parametrize("shape", [(320, 320), (320, 300), (300, 320), (160, 160), (480, 480), (161, 330)])
def test_masks_are_enlarged_along_a_smooth_outline(shape):
    mask = disk(70, 80, 40)
    assert np.array_equal(enlarge(mask, shape), resize(mask.astype(np.float32), shape, order=1) > 0.5)


def test_settings_cannot_be_changed():
    """They are the default of functions: a change would reach every later call."""
    with pytest.raises(FrozenInstanceError):
        LungSettings().grid = 3  # type: ignore[misc]


def test_packed_regions_come_back_whole():
    rng = np.random.default_rng(0)
    for shape in ((5, 7), (8, 8), (1, 3), (30, 41)):
        region = Regions(*(rng.random((3, *shape)) < 0.5))
        packed = region.packed()
        found = Regions.unpacked(packed, shape)
        for name in ("body", "aerated", "diseased"):
            assert np.array_equal(getattr(found, name), getattr(region, name))
    assert len(Regions(BODY, LEFT, RIGHT).packed()) < SIDE * SIDE / 8


# --- what thresholds find ---------------------------------------------------------------------------------------

def test_body_and_lungs_of_a_box_in_air():
    region = regions(chest(), SHARP)
    # The corners of boxes are rounded where openings touch them: by 6 pixels for the body, by 1 for lungs.
    assert not (region.body & ~BODY).any()
    assert np.array_equal(region.body, dilate(erode(BODY, 6), 6))
    assert np.array_equal(region.aerated, dilate(erode(LEFT | RIGHT, 1), 1))
    assert not region.diseased.any()


@pytest.mark.parametrize(("level", "aerated", "diseased"), [
    (0.3, True, False), (0.61, True, False), (0.63, False, True), (0.85, False, True), (0.87, False, False)])
def test_levels_tell_aerated_from_diseased_lung(level, aerated, diseased):
    spot = box(70, 40, 12, 12)  # one eighth of a lung
    region = regions(chest(spot=(spot, level)), SHARP)
    inner = erode(spot, 3)
    assert (region.aerated[inner].all(), region.diseased[inner].all()) == (aerated, diseased)
    assert (region.aerated[inner].any(), region.diseased[inner].any()) == (aerated, diseased)


def test_levels_are_settings():
    image = chest(spot=(box(70, 40, 12, 12), 0.5))
    lower = regions(image, replace(SHARP, air_level=0.4, lesion_level=0.45))
    assert not (lower.aerated | lower.diseased)[75, 45]
    assert regions(image, replace(SHARP, air_level=0.4)).diseased[75, 45]


def test_air_is_what_the_darkest_tenth_of_the_body_is():
    """A few pixels much darker than the rest, as a windpipe beside hazy lungs, do not set the scale."""
    haze = box(100, 95, 12, 30)
    for share, expected in ((0.07, True), (0.095, True), (0.105, False), (0.2, False)):
        deep = np.zeros_like(BODY)
        deep.ravel()[np.flatnonzero(LEFT)[:round(share * ((LEFT | RIGHT) & ~haze).sum())]] = True
        # Seen from air, the haze is at 0.58 of the way to tissue; from what is deeper, at 0.65.
        assert regions(chest(haze=(haze, 0.58), deep=(deep, -0.2)), SHARP).aerated[106, 110] == expected


def test_a_thin_rim_of_haze_is_no_disease_and_a_thick_one_is():
    for width, expected in ((4, False), (5, True), (9, True)):
        region = regions(chest(rim=(box(40, 70, 80, width), 0.75)), SHARP)
        assert region.diseased[80, 71] == expected
    wide = replace(SHARP, rim=3)
    assert not regions(chest(rim=(box(40, 70, 80, 5), 0.75)), wide).diseased.any()


def test_nothing_near_the_surface_is_lung():
    image = chest(dark=(box(60, 18, 30, 20), 0.0))  # from 8 pixels below the surface on
    for skin, first in ((4, 18), (10, 20), (14, 24)):
        aerated = regions(image, replace(SHARP, skin=skin)).aerated
        assert aerated[75].nonzero()[0].min() == first


def test_air_around_what_is_not_the_body_is_none_of_it():
    """The largest bright thing is the body; a table beside it has no lung, and thin things do not hang on to it."""
    image = chest()
    image[box(146, 10, 8, 140)] = TISSUE                                  # a couch
    image[box(2, 10, 18, 3)] = image[box(0, 60, 20, 3)] = TISSUE          # tubes that touch the body
    region, alone = regions(image, SHARP), regions(chest(), SHARP)
    assert (region.body ^ alone.body).sum() < 5, "where the tube touches it"
    assert np.array_equal(region.aerated, alone.aerated)
    assert not region.diseased.any()


def test_a_body_with_hardly_any_dark_pixel_has_no_lung():
    """29 dark pixels are too few to measure air by, 30 are enough."""
    for pixels, found in ((29, False), (30, True)):
        image = np.where(BODY, TISSUE, AIR) + GRAIN
        places = np.flatnonzero(box(70, 70, 5, 6))[:pixels]
        image.ravel()[places] = AIR
        region = regions(image, replace(SHARP, skin=0))
        assert region.body.sum() > 0.9 * BODY.sum()
        assert region.aerated.any() == found


def test_values_far_below_air_count_as_air():
    assert np.array_equal(regions(np.where(BODY, chest(), -3024), SHARP).aerated, regions(chest(), SHARP).aerated)


def test_noise_is_smoothed_first():
    noisy = chest() + np.random.default_rng(1).normal(0, 350, BODY.shape)
    rough, smooth = (regions(noisy, replace(SHARP, smooth=width)).aerated for width in (0.0, 1.0))
    assert (smooth ^ (LEFT | RIGHT)).sum() < 0.3 * (rough ^ (LEFT | RIGHT)).sum()


@pytest.mark.parametrize("image", [np.full((30, 30), 7.0), np.eye(30) * 100])
def test_a_picture_without_a_body_has_no_regions(image):
    region = regions(image, SHARP)
    for mask in (region.body, region.aerated, region.diseased):
        assert mask.shape == image.shape
        assert not mask.any()


# --- whether it can be CT ---------------------------------------------------------------------------------------

def plausible(aerated: np.ndarray, *, low: float = TISSUE, high: float = TISSUE, diseased: np.ndarray = NOTHING
              ) -> bool | None:
    """Asks about a body of which one third each is dark, middling and bright tissue."""
    image = np.where(aerated, AIR, TISSUE)
    image[(COLUMNS % 3 == 0) & ~aerated], image[(COLUMNS % 3 == 2) & ~aerated] = low, high
    image[diseased] = -3000  # must not matter
    return looks_like_ct(image, Regions(BODY, aerated, diseased))


def test_tissue_of_one_brightness_is_plausible_and_of_many_is_not():
    reach = TISSUE - AIR
    assert TISSUE_SPREAD == 0.25
    for spread, expected in ((0, True), (0.24, True), (0.26, False), (2, False)):
        assert plausible(LEFT | RIGHT, low=TISSUE - spread * reach / 2, high=TISSUE + spread * reach / 2) is expected


def test_a_body_that_is_mostly_lung_is_not_plausible():
    for height, expected in ((73, True), (76, False)):  # 0.60 and 0.63 of the body
        assert plausible(box(22, 10, round(120 * height / 120), 140)) is expected
    assert LUNG_SHARE == 0.62


def test_too_little_lung_tells_nothing():
    assert plausible(NOTHING) is None
    assert plausible(box(60, 60, 16, 20)) is None     # 0.019 of the body
    assert plausible(box(60, 60, 17, 20)) is True     # 0.0202
    assert plausible(BODY) is None, "no tissue at all"


def test_diseased_lung_is_no_tissue():
    assert plausible(LEFT, diseased=RIGHT) is True


def test_air_is_measured_where_it_is_dark():
    """Vessels in the lung do not count as air."""
    image = np.where(LEFT | RIGHT, AIR, TISSUE)
    image[(COLUMNS % 3 == 0) & ~LEFT & ~RIGHT] += 200
    vessels = image.copy()
    vessels[(ROWS % 3 != 0) & (LEFT | RIGHT)] = 0.0
    region = Regions(BODY, LEFT | RIGHT, NOTHING)
    assert looks_like_ct(image, region) is True
    assert looks_like_ct(vessels, region) is True
    vessels[LEFT | RIGHT] = 0.0
    assert looks_like_ct(vessels, region) is False


# --- the windpipe -----------------------------------------------------------------------------------------------

TUBE = disk(60, 79.5, 6)
MIDDLE = 79.5  # of the body's columns, 10 to 149
SMALL_BODY_SHARE = 0.012


def dropped(extra: np.ndarray, lungs: np.ndarray = LEFT | RIGHT) -> bool:
    """Whether a component is dropped, beside lungs that stay as they are."""
    keep = without_trachea(lungs | extra, BODY)
    assert np.array_equal(keep & lungs, lungs)
    assert not (keep & ~lungs & ~extra).any()
    gone = not keep[extra].any()
    assert gone or keep[extra].all()
    return gone


def test_a_small_round_component_in_the_midline_is_dropped():
    assert dropped(TUBE)
    assert dropped(disk(30, MIDDLE, 6))


@pytest.mark.parametrize("away", [-1, 1])
def test_it_has_to_lie_near_the_midline(away):
    lungs = box(40, 14, 80, 20) | box(40, 126, 80, 20)
    # Of the width of 139 columns, 0.12 is 16.7.
    assert dropped(disk(60, MIDDLE + 16 * away, 6), lungs)
    assert not dropped(disk(60, MIDDLE + 17.5 * away, 6), lungs)


def test_it_has_to_be_small():
    lungs = box(40, 14, 80, 30) | box(40, 116, 80, 30)
    assert BODY.sum() * SMALL_BODY_SHARE == pytest.approx(201.6)
    assert dropped(box(50, 73, 14, 14), lungs)
    assert not dropped(box(50, 72, 14, 15), lungs)


def test_it_has_to_be_round():
    assert dropped(box(50, 77, 8, 6))
    assert dropped(box(50, 77, 10, 6))           # eccentricity .80
    assert not dropped(box(50, 77, 12, 6))       # .87


def test_it_has_to_be_solid():
    cross = box(50, 72, 15, 15) & ~box(50, 72, 6, 6) & ~box(59, 81, 6, 6)
    assert not dropped(cross & (box(50, 77, 15, 5) | box(55, 72, 5, 15)))
    assert dropped(box(50, 74, 12, 12) & ~box(50, 74, 2, 2))


def test_lungs_alone_stay_and_so_does_a_hole_without_lungs():
    for aerated in (LEFT | RIGHT, LEFT, TUBE, NOTHING):
        assert np.array_equal(without_trachea(aerated, BODY), aerated)
    two = disk(50, MIDDLE, 6) | disk(90, MIDDLE, 6)
    assert np.array_equal(without_trachea(two, BODY), two), "if all would go, all stay"


# --- what is added to aerated lung ------------------------------------------------------------------------------

def completed(lung: np.ndarray, haze: np.ndarray = NOTHING, body: np.ndarray = BODY,
              **settings: float) -> np.ndarray:
    return complete(lung, Regions(body, lung, haze), replace(LungSettings(), **settings))


def test_healthy_lungs_stay_as_they_are():
    assert np.array_equal(completed(LEFT | RIGHT), LEFT | RIGHT)


def test_disease_counts_where_it_touches_lung():
    beside, apart = box(60, 70, 30, 8), box(124, 80, 8, 8)
    mask = completed(LEFT, beside | apart)
    assert mask[beside].all()
    assert not mask[apart].any()


@pytest.mark.parametrize(("radius", "filled"), [(13.5, True), (14.3, False)])
def test_holes_are_filled_up_to_a_size(radius, filled):
    hole = disk(80, 49.5, radius)
    assert abs(hole.sum() - 600) < 50
    assert completed(LEFT & ~hole)[80, 49] == filled
    assert completed(LEFT & ~hole, largest_hole=650)[80, 49]


def notched(depth: int) -> tuple[np.ndarray, np.ndarray]:
    """A lung with a slit from one side, and the slit."""
    slit = box(70, 30, depth, 20)
    return LEFT & ~slit, slit


def test_slits_are_closed_in_a_healthy_side_and_wider_ones_in_a_diseased_one():
    haze = box(50, 70, 40, 8)  # 0.09 of the side
    for width, healthy, diseased in ((11, True, True), (15, False, True), (27, False, True), (31, False, False)):
        lung, slit = notched(width)
        place = 70 + width // 2, 45
        assert slit[place]
        assert completed(lung)[place] == healthy, width
        assert completed(lung, haze, hull_depth=0)[place] == diseased, width
    lung, _ = notched(15)
    assert completed(lung, close=9)[77, 45]
    assert not completed(lung, haze, close_diseased=6, hull_depth=0)[77, 45]


def test_a_side_is_diseased_from_a_share_of_it_on():
    lung, _ = notched(15)  # 2900 pixels
    for rows, severe in ((22, False), (24, True)):  # 176 and 192 of them more: 0.057 and 0.062 of the side
        assert completed(lung, box(90, 70, rows, 8), hull_depth=0)[77, 45] == severe
    assert completed(lung, box(90, 70, 22, 8), hull_depth=0, diseased=0.05)[77, 45]


def test_each_side_is_judged_by_itself():
    lung, _ = notched(15)
    mask = completed(lung | RIGHT, box(50, 130, 60, 12), hull_depth=0)
    assert not mask[77, 45], "the other side's disease"


def test_near_the_wall_the_hull_of_a_diseased_side_is_added():
    """What solid consolidation takes away has the shape of a bay, open to the wall or to the middle."""
    haze = box(44, 70, 20, 14)
    bay = box(70, 30, 40, 12)                       # at the outer wall
    far = box(70, 58, 40, 12)                       # towards the middle
    lung = LEFT & ~bay & ~far
    depth = ndi.distance_transform_edt(BODY)
    with_hull, without = completed(lung, haze), completed(lung, haze, hull_depth=0)
    assert with_hull[bay].mean() > 0.95 > without[bay].mean() + 0.3
    added = with_hull & ~without
    assert depth[added].max() < np.percentile(depth[without], 50)
    assert depth[added].max() > np.percentile(depth[without], 40)
    assert np.array_equal(completed(LEFT & ~bay)[90, 31:34], [False] * 3), "a healthy side has no hull"
    assert not (completed(lung, haze, hull_depth=30.0) & ~with_hull).any()
    assert completed(lung, haze, hull_depth=30.0).sum() < with_hull.sum()


def test_nothing_outside_the_body_is_added():
    body = BODY & ~box(0, 0, SIDE, 32)
    mask = completed(LEFT, box(44, 70, 40, 14), body=body)
    assert not (mask & ~body).any()
    assert mask[80, 32]


def test_crumbs_have_no_hull():
    crumb, haze = box(60, 60, 5, 1), box(60, 61, 5, 1) | box(64, 62, 1, 4)
    assert completed(crumb, haze, close_diseased=0).sum() == (crumb | haze).sum()


def test_both_sides_are_found_where_they_touch_in_front_of_the_heart():
    """A bridge of lung joins the sides; the disease of one must not close the other's slit."""
    bridge = box(44, 70, 4, 20)
    lung, _ = notched(15)
    mask = completed(lung | RIGHT | bridge, box(50, 130, 60, 12), hull_depth=0)
    assert not mask[77, 45]
    assert mask[bridge].all()
    assert mask[RIGHT].all()


@pytest.mark.parametrize("turn", [lambda a: a, np.fliplr])
def test_the_sides_part_where_the_bridge_is_thinnest(turn: Callable[[np.ndarray], np.ndarray]):
    lungs = LEFT | box(40, 84, 80, 50) | box(60, 70, 14, 4) | box(64, 74, 6, 2) | box(60, 76, 14, 8)
    whole = turn(lungs)
    parts = []
    for place, side in _sides(whole):
        full = np.zeros_like(whole)
        full[place] = side
        parts.append(turn(full))
    left, right = sorted(parts, key=lambda part: part.nonzero()[1].mean())
    assert not (left & right).any()
    assert np.array_equal(left | right, lungs)
    assert left[LEFT].all()
    assert right[box(40, 84, 80, 50)].all()
    assert left.nonzero()[1].max() in (73, 74, 75)


def test_narrow_and_small_pieces_are_one_side():
    for whole, expected in (
            (LEFT | RIGHT, 2),
            (box(40, 30, 40, 80), 1), (box(40, 30, 40, 81), 2),              # up to 80 columns is one lung
            (box(40, 1, 40, 86) | box(130, 1, 2, 158), 2),                   # and up to 0.55 of the breadth
            (box(40, 1, 40, 87) | box(130, 1, 2, 158), 3),
            (box(40, 30, 10, 90) | box(60, 30, 10, 90), 2),                  # and up to half of the lung
            (box(40, 30, 10, 90) | box(60, 30, 12, 90), 3),
            (NOTHING, 0)):
        found = list(_sides(whole))
        assert len(found) == expected
        for place, side in found:
            assert side.shape == whole[place].shape
            edges = (side[0], side[-1], side[:, 0], side[:, -1])
            assert not any(edge.any() for edge in edges), "one pixel around, as nothing here reaches the edge"
        assert sum(side.sum() for _, side in found) == whole.sum()


def test_a_side_at_the_edge_of_the_slice_has_a_box_within_it():
    for whole in (box(0, 0, 20, 20), box(SIDE - 20, SIDE - 20, 20, 20)):
        (place, side), = _sides(whole)
        assert side.shape == (21, 21)
        assert np.array_equal(whole[place], side)
