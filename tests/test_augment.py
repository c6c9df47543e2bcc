"""Painted lesions and vessels: in the lung, labelled exactly, alike at every crop size, only on lesion-free slices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage as ndi
from tiny import generator

from covidseg.augment import (
    Painter,
    PaintSettings,
    augment,
    jitter,
    paint_lesions,
    paint_organ,
    paint_vessels,
    places,
    rescan,
)
from covidseg.preprocess import Crops

SIZE = 80
SIDES = (80, 160)
BLOBS, FIELDS = {"scattered": 1.0}, {"scattered": 0.0}
# Far brighter than tissue and cut off there: what is painted is then the softness itself.
GLARING = {"solid": (50.0, 50.0), "haze": (50.0, 50.0, 50.0), "faint": 0.0}


def two_lungs(side: int = SIZE) -> np.ndarray:
    """Two upright ellipses with a mediastinum between them."""
    rows, columns = (np.indices((side, side)) + 0.5) / side - 0.5
    return (np.hypot(rows / 0.38, (columns + 0.22) / 0.15) < 1) | (np.hypot(rows / 0.38, (columns - 0.22) / 0.15) < 1)


LUNG = two_lungs()


def lesions(seed: int = 0, side: int = SIZE, **settings: Any) -> tuple[np.ndarray, np.ndarray]:
    """Lesions painted on black: picture and mask."""
    return paint_lesions(np.zeros((side, side), np.float32), two_lungs(side),
                         PaintSettings(**settings), np.random.default_rng(seed))


def vessels(seed: int = 0, side: int = SIZE, **settings: Any) -> np.ndarray:
    """Vessels painted on black."""
    return paint_vessels(np.zeros((side, side), np.float32), two_lungs(side),
                         PaintSettings(**settings), np.random.default_rng(seed))


def organ(seed: int, side: int) -> np.ndarray:
    """What an organ takes of a slice that is all lung."""
    lung = np.ones((side, side), bool)
    return ~paint_organ(lung.astype(np.float32), lung, (0.1, 0.1), np.random.default_rng(seed))[1]


def noise(*limits: float) -> np.ndarray:
    return np.random.default_rng(9).uniform(*limits, LUNG.shape).astype(np.float32)


# --- flips and turns, brightness --------------------------------------------------------------------------------

def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The eight ways to lay a square on itself."""
    turned = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    return turned + [t.flip(-1) for t in turned]


@pytest.mark.parametrize(("change", "ways"), [(augment, set(range(8))), (jitter, {0})])
def test_augmentation_moves_all_channels_alike_and_jitter_none_and_both_change_the_picture_only(
        change: Callable[..., torch.Tensor], ways: set[int]) -> None:
    code = torch.arange(36.0).reshape(1, 1, 6, 6).expand(3, 1, 6, 6)
    maps = torch.cat([code, code, 100 + code], dim=1)
    source, before, seen = generator(), maps.clone(), set()
    for _ in range(80):
        out = change(maps, source)
        fits = [k for k, image in enumerate(symmetries(code)) if torch.equal(out[:, 1:2], image)]
        assert len(fits) == 1, "channel 1 has to be one of the eight positions, its values untouched"
        seen.add(fits[0])
        assert torch.equal(out[:, 2:3], symmetries(100 + code)[fits[0]])
        for picture, moved in zip(out[:, 0], out[:, 1], strict=True):
            assert not torch.equal(picture, moved)
            assert np.corrcoef(picture.ravel(), moved.ravel())[0, 1] > 0.999
    assert seen == ways
    assert torch.equal(maps, before), "the input itself stays as it is"
    first, again, other = (change(maps, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_jitter_draws_gain_offset_and_noise_for_each_slice() -> None:
    maps = torch.zeros(500, 1, 10, 10)
    maps[:, :, 5:] = 1.0
    out = jitter(maps, generator())[:, 0]
    offset, top = out[:, :5].mean((1, 2)), out[:, 5:].mean((1, 2))
    for figures, mean, close, spread in ((top - offset, 1, 0.03, 0.1), (offset, 0, 0.01, 0.04)):
        assert figures.mean().item() == pytest.approx(mean, abs=close)
        assert figures.std().item() == pytest.approx(spread, rel=0.2)
    grain = out[:, :5].std((1, 2))
    assert grain.min() < 0.005
    assert 0.02 < grain.max() < 0.05


def test_another_scanner_blurs_or_sharpens_edges_or_adds_noise_and_leaves_other_channels_alone() -> None:
    maps = torch.zeros(300, 2, 24, 24)
    maps[:, :, :, 12:] = 1.0
    before, out = maps.clone(), rescan(maps, generator())
    assert torch.equal(maps, before), "the input itself stays as it is"
    assert torch.equal(out[:, 1], maps[:, 1])
    step = (out[:, 0, :, 12] - out[:, 0, :, 11]).mean(dim=1)             # 1 where the kernel stays
    grain = out[:, 0, :, :6].std(dim=(1, 2))
    softer, sharper = (step < 0.95).float().mean().item(), (step > 1.05).float().mean().item()
    assert 0.2 < softer < 0.45
    assert 0.08 < sharper < 0.3
    assert step.min() > 0.2
    assert 0.3 < (grain > 0.004).float().mean().item() < 0.55, "half keep their dose"
    assert 0.06 < grain.max().item() < 0.16
    assert abs(out[:, 0].mean().item() - 0.5) < 0.01, "neither changes the mean"
    first, again, other = (rescan(maps, generator(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    same = (rescan(maps, generator(), 0.3)[:, 0] == maps[:, 0]).all(dim=(1, 2)).float().mean().item()
    assert 0.7 < same < 0.85, "three in ten go to the other scanner, where a quarter looks the same"
    assert rescan(maps, generator(), 0.0) is maps


# --- lesions ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", [BLOBS, FIELDS], ids=["blobs", "field"])
@pytest.mark.parametrize("seed", range(6))
def test_lesions_stay_in_the_lung_and_are_where_the_mask_says(seed: int, kind: dict) -> None:
    picture, mask = lesions(seed, **kind)
    assert (picture.dtype, mask.dtype) == (np.float32, bool)
    assert mask.any()
    assert not (mask & ~LUNG).any()
    assert (picture[~LUNG] == 0).all()
    assert picture[mask].mean() > 2 * picture[LUNG & ~mask].mean()
    assert picture.max() <= 1


@pytest.mark.parametrize("seed", range(6))
def test_the_mask_is_where_a_lesion_is_half_there(seed: int) -> None:
    picture, mask = lesions(seed, **BLOBS, **GLARING, count=(1, 1), solid_share=1.0)
    np.testing.assert_array_equal(mask, picture > 0.5)
    picture, mask = lesions(seed, **BLOBS, **GLARING, count=(3, 3), solid_share=1.0)
    assert not (mask & (picture <= 0.5)).any()
    assert ((picture > 0.5) & ~mask).sum() < 0.15 * mask.sum() + 10, "two soft rims may add up to more than a half"
    picture, mask = lesions(seed, **FIELDS, **GLARING, solid_share=0.0)
    assert not ((picture > 0.5) & ~mask).any()
    assert (picture[mask] > 0.5).mean() > 0.95, "its texture may leave a few dark spots"


@pytest.mark.parametrize("kind", [BLOBS, FIELDS], ids=["blobs", "field"])
@pytest.mark.parametrize("seed", range(8))
def test_away_from_a_lesion_and_where_it_is_as_bright_as_tissue_the_picture_stays(seed: int, kind: dict) -> None:
    image = noise(0, 0.2)
    image[30:34], image[46:50] = 1.0, 1.4  # a vessel and a rib's edge across both lungs
    before = image.copy()
    picture, mask = paint_lesions(image, LUNG, PaintSettings(**kind), np.random.default_rng(seed))
    assert np.array_equal(image, before), "the picture that came in is not changed"
    assert np.array_equal(picture[~LUNG], image[~LUNG])
    for tissue in np.s_[30:34], np.s_[46:50]:
        assert np.array_equal(picture[tissue], image[tissue])
    if kind is BLOBS:
        distance = ndi.distance_transform_edt(~mask)
        assert np.abs(picture - image)[distance > 0.2 * SIZE].max(initial=0) < 0.01


def test_consolidation_glass_and_faint_glass_differ_in_brightness() -> None:
    # One blob each: where blobs overlap they add up.
    def levels(share: float, faint: float, figure: Callable[[np.ndarray], float]) -> list[float]:
        painted = (lesions(seed, **BLOBS, count=(1, 1), solid_share=share, faint=faint) for seed in range(8))
        return [figure(picture[mask]) for picture, mask in painted]
    glass, solid = (levels(share, 0.0, lambda inside: np.percentile(inside, 80)) for share in (0.0, 1.0))
    assert max(glass) < 0.7
    assert np.mean(glass) + 0.2 < np.mean(solid)
    faint, usual = (levels(0.0, share, np.mean) for share in (1.0, 0.0))
    assert max(faint) < 0.25
    assert np.mean(faint) < 0.6 * np.mean(usual)


def test_a_field_gets_a_solid_core_unless_nothing_may_be_solid() -> None:
    with_core, without = ([lesions(seed, **FIELDS, solid_share=share, solid=(1.0, 1.0))[0].max()
                           for seed in range(12)] for share in (1.0, 0.0))
    assert np.mean(with_core) > np.mean(without) + 0.15


def test_small_blobs_prefer_the_chest_wall_and_shun_the_mediastinum() -> None:
    place = places(LUNG)
    small = {**BLOBS, "count": (3, 3), "radius": (0.02, 0.04)}
    near, anywhere = ([lesions(seed, **small, outer=outer)[1] for seed in range(25)] for outer in (50.0, 0.0))
    assert np.mean([place.depth[m].mean() for m in near]) < 0.7 * np.mean([place.depth[m].mean() for m in anywhere])
    # Evenly spread blobs would hit the strip at the mediastinum as often as its size says.
    strip = LUNG & (place.medial < 0.06)
    assert np.mean([m[strip].mean() for m in anywhere]) < 0.7 * np.mean([m[LUNG & ~strip].mean() for m in anywhere])


def test_a_field_covers_the_share_that_was_asked_for() -> None:
    for cover in (0.1, 0.5):
        for seed in range(4):
            _, mask = lesions(seed, **FIELDS, cover=(cover, cover))
            assert mask.sum() / LUNG.sum() == pytest.approx(cover, abs=0.01)


# --- vessels ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seed", range(6))
def test_vessels_are_bright_and_only_brighten_and_grow_from_the_mediastinum(seed: int) -> None:
    place, picture = places(LUNG), vessels(seed)
    bright = picture > 0.5
    assert picture.dtype == np.float32
    assert (picture[~LUNG] == 0).all()
    assert 0.75 < picture.max() <= 1.1
    parts, count = ndi.label(bright, np.ones((3, 3)))
    sizes = ndi.sum(bright, parts, range(1, count + 1))
    assert place.medial[parts == 1 + np.argmax(sizes)].min() < 0.06
    image = noise(0, 1.4)
    over = paint_vessels(image, LUNG, PaintSettings(), np.random.default_rng(seed))
    assert (over >= image - 1e-6).all()
    assert (over > image + 0.1).sum() > 20
    assert np.array_equal(over[~LUNG], image[~LUNG])
    assert np.array_equal(image, noise(0, 1.4)), "the picture that came in is not changed"


def test_number_of_blobs_and_number_and_thickness_of_vessels() -> None:
    def share(**settings: object) -> float:
        return float(np.mean([(vessels(seed, **settings) > 0.5).sum() for seed in range(10)]))
    assert share(thickness=(0.03, 0.031)) > 1.5 * share(thickness=(0.0125, 0.013))
    assert share(branches=(8, 8)) > 2 * share(branches=(1, 1))
    small = {**BLOBS, "radius": (0.02, 0.021), "solid_share": 1.0}
    ones, fives = ([ndi.label(lesions(seed, **small, count=(n, n))[1], np.ones((3, 3)))[1] for seed in range(10)]
                   for n in (1, 5))
    assert max(ones) <= 2  # a ragged blob may fall apart
    assert np.mean(fives) > 3


# --- crop sizes -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("paint", "count", "least", "related"), [
    (lambda seed, side: lesions(seed, side, **BLOBS)[1], 30, 0.001, 0.6),
    (lambda seed, side: lesions(seed, side, **FIELDS)[1], 30, 0.001, 0.6),
    (lambda seed, side: vessels(seed, side) > 0.5, 20, 0.003, -1), (organ, 12, 0.001, -1)],
    ids=["blobs", "field", "vessels", "organ"])
def test_another_crop_size_is_covered_to_the_same_share(
        paint: Callable[[int, int], np.ndarray], count: int, least: float, related: float) -> None:
    small, large = (np.array([paint(seed, side).sum() / two_lungs(side).sum() for seed in range(count)])
                    for side in SIDES)
    assert min(small.min(), large.min()) > least, "nothing vanishes"
    assert small.mean() == pytest.approx(large.mean(), rel=0.25)
    assert np.corrcoef(small, large)[0, 1] > related


@pytest.mark.parametrize("seed", range(5))
def test_an_organ_is_bright_and_even_and_cut_out_of_the_lung(seed: int) -> None:
    dark, bright = (np.full(LUNG.shape, level, np.float32) for level in (0.1, 1.2))
    picture, left = paint_organ(dark, LUNG, (0.08, 0.08), np.random.default_rng(seed))
    assert picture.dtype == np.float32
    assert not (left & ~LUNG).any()
    gone = LUNG & ~left
    assert 0 < gone.sum() < 1.3 * np.pi * (0.08 * len(LUNG)) ** 2
    assert (picture[ndi.binary_erosion(gone, iterations=2)] > 0.7).all()
    core = picture[picture > 0.85]
    assert len(core) > 20
    assert np.std(core) < 0.06
    far = ~ndi.binary_dilation(picture > 0.3, iterations=len(LUNG) // 8)
    assert far.any()
    np.testing.assert_allclose(picture[far], 0.1, atol=0.02)
    over, _ = paint_organ(bright, LUNG, (0.1, 0.1), np.random.default_rng(seed))
    assert (over >= 1.2 - 1e-5).all(), "it darkens nothing"


# --- lungs that hardly are any ----------------------------------------------------------------------------------

def odd_lungs() -> dict[str, np.ndarray]:
    rows, columns = np.indices((SIZE, SIZE))
    found = {name: np.zeros((SIZE, SIZE), bool) for name in ("pixel", "two pixels", "line", "corner")}
    found["pixel"][40, 41] = True
    found["two pixels"][[5, 60], [70, 3]] = True
    found["line"][40, 10:60] = True
    found["corner"][:3, :3] = True
    return {**found, "round": np.hypot(rows - 40, columns - 40) < 25, "full": np.ones((SIZE, SIZE), bool)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", odd_lungs())
def test_odd_lungs_are_painted_without_fault(name: str) -> None:
    lung, image = odd_lungs()[name], np.full((SIZE, SIZE), 0.1, np.float32)
    area = 0
    for seed in range(8):
        for kind in (BLOBS, FIELDS):
            picture, mask = paint_lesions(image, lung, PaintSettings(**kind), np.random.default_rng(seed))
            assert np.isfinite(picture).all()
            assert np.array_equal(picture[~lung], image[~lung])
            assert not (mask & ~lung).any()
            area += mask.sum()
        picture = paint_vessels(image, lung, PaintSettings(), np.random.default_rng(seed))
        assert np.array_equal(picture, image), "without a mediastinum there is nothing to grow from"
    assert area > 0


# --- batches ----------------------------------------------------------------------------------------------------

COUNT = 6


def crops() -> Crops:
    """Black slices; the lungs of every other one are shifted upwards."""
    lungs = np.stack([np.roll(LUNG, -6 * (k % 2), axis=0) for k in range(COUNT)])
    return Crops(np.zeros(lungs.shape, np.float32), lungs, np.zeros((COUNT, 4), int))


INDEX = torch.tensor([5, 2, 3, 0, 1, 4])
FREE = torch.tensor([True, False, True, True, False, True])


def batch(index: torch.Tensor = INDEX) -> torch.Tensor:
    """Picture, lung, target, weight."""
    maps = torch.zeros(len(index), 4, SIZE, SIZE)
    maps[:, 1] = torch.from_numpy(crops().lungs)[index].float()
    maps[:, 3] = 1
    return maps


EVERY = torch.ones(COUNT, dtype=torch.bool)


def painted(seed: int = 0, free: torch.Tensor = FREE, of: Crops | None = None, **settings: Any) -> torch.Tensor:
    return Painter(of or crops(), PaintSettings(**settings))(batch(), INDEX, free, generator(seed))


def brightest(maps: torch.Tensor) -> torch.Tensor:
    """Of each picture."""
    return maps[:, 0].flatten(1).max(1).values


def lesion_pixels(maps: torch.Tensor) -> torch.Tensor:
    return maps[:, 2].flatten(1).sum(1)


def test_only_lesion_free_slices_are_painted() -> None:
    maps, source = batch(), generator()
    painter = Painter(crops(), PaintSettings(share=1.0, vessels=1.0))
    maps[~FREE, 2, 40, 20] = 1
    before = maps.clone()
    result = painter(maps, INDEX, FREE, source)
    assert torch.equal(result[~FREE], maps[~FREE])
    assert (lesion_pixels(result[FREE]) > 0).all()
    assert (brightest(result[FREE]) > 0.1).all()
    assert torch.equal(result[:, [1, 3]], maps[:, [1, 3]])
    assert torch.equal(maps, before), "the batch that came in is not changed"
    assert not torch.equal(result, painter(maps, INDEX, FREE, source)), "the next batch is painted differently"
    assert torch.equal(result, painter(maps, INDEX, FREE, generator())), "but the same generator paints the same"


def test_vessels_are_no_lesions_and_lesions_come_without_vessels() -> None:
    result = painted(share=0.0, vessels=1.0)
    assert (brightest(result[FREE]) > 0.75).all()
    assert (result[:, 2] == 0).all()
    faint = {"solid_share": 0.0, "faint": 1.0, **BLOBS, "count": (1, 1)}
    result = painted(share=1.0, vessels=0.0, **faint)
    assert (lesion_pixels(result[FREE]) > 0).all()
    assert brightest(result).max() < 0.5, "nothing as bright as a vessel"
    assert brightest(painted(share=1.0, vessels=1.0, **faint)).max() > 0.75


def test_each_slice_is_painted_into_its_own_lung() -> None:
    for seed in range(3):
        result = painted(seed, EVERY, share=1.0, vessels=1.0)
        for channel in (0, 2):
            assert (result[:, channel][result[:, 1] == 0] == 0).all()
    # A field that covers all of a lung reaches its ends, wherever it lies.
    result = painted(0, EVERY, share=1.0, vessels=0.0, **FIELDS, cover=(0.99, 0.99))
    assert (result[:, 2].sum((1, 2)) > 0.97 * result[:, 1].sum((1, 2))).all()
    empty = crops()
    empty.lungs[3] = False
    result = painted(0, EVERY, empty, share=1.0, vessels=1.0)
    untouched = [k for k in range(COUNT) if torch.equal(result[k], batch()[k])]
    assert untouched == [2], "position 2 of the batch holds slice 3, which has no lung"


def test_both_switched_off() -> None:
    source = generator()
    result = Painter(crops(), PaintSettings(share=0, vessels=0))(batch(), INDEX, FREE, source)
    assert torch.equal(result, batch())
    assert torch.equal(source.get_state(), generator().get_state()), "nothing was drawn: as without painting"


@pytest.mark.parametrize(("share", "vessels"), [(0.3, 0.0), (0.0, 0.7)])
def test_shares_are_probabilities(share: float, vessels: float) -> None:
    index, free = torch.zeros(150, dtype=torch.long), torch.ones(150, dtype=torch.bool)
    result = Painter(crops(), PaintSettings(share=share, vessels=vessels))(batch(index), index, free, generator())
    there = lesion_pixels(result) > 0 if share else brightest(result) > 0.5
    assert there.float().mean().item() == pytest.approx(share + vessels, abs=0.1)
