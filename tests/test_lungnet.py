"""The lung net completes what the threshold lost, the rules around it do what they say, and no positive is seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import dice, quiet, same_weights
from torch import nn

from covidseg.lungnet import LungNetSettings, lung_probabilities, make_lung_net, robust_lungs, train_lung_net
from covidseg.preprocess import Crops, WeakSet

pytestmark = pytest.mark.nets

SIZE = 64
SMALL = LungNetSettings(steps=3, size=SIZE, channels=(4, 8), batch=4)
# Without organs, which look like its consolidations to a net so small.
LEARNING = LungNetSettings(steps=140, size=SIZE, channels=(8, 16, 32, 32), batch=8, rate=1e-2, organs=0.0)


def chests(count: int, seed: int = 0, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Two dark ellipses in bright tissue, never twice the same: pictures and true lungs, ``(count, size, size)``."""
    random = np.random.default_rng(seed)
    images = np.empty((count, size, size), np.float32)
    lungs = np.zeros(images.shape, bool)
    for image, lung in zip(images, lungs, strict=True):
        rows, columns = (np.indices((size, size)) + 0.5) / size - 0.5
        up, left = random.uniform(-0.03, 0.03, 2)
        height, width, apart = random.uniform(0.3, 0.4), random.uniform(0.14, 0.17), random.uniform(0.2, 0.22)
        for side in (-1, 1):
            lung |= np.hypot((rows - up) / height, (columns - left - side * apart) / width) < 1
        image[:] = np.where(lung, 0.08, 1.0) + random.normal(0, 0.04, lung.shape)
        image[np.hypot((rows - up) / 0.5, (columns - left) / 0.47) > 1] = -0.2  # air around the patient
    return images, lungs


def crops_of(images: np.ndarray, lungs: np.ndarray) -> Crops:
    return Crops(images, lungs, np.zeros((len(images), 4), int))


def weak(images: np.ndarray, lungs: np.ndarray, labels: np.ndarray | None = None) -> WeakSet:
    """Without lesions, unless labels say so."""
    count = len(images)
    return WeakSet(crops_of(images, lungs), np.zeros(count, int) if labels is None else labels,
                   np.array(["p"] * count), np.array([f"v:{k}" for k in range(count)]))


def near(row: float, column: float) -> np.ndarray:
    """Distance of every pixel from a place."""
    rows, columns = np.indices((SIZE, SIZE))
    return np.hypot(rows - row, columns - column)


def consolidated(count: int) -> tuple[Crops, np.ndarray, np.ndarray]:
    """Slices with a bright disk at the outer wall of one lung; the mask given to the net lacks it.

    Returns:
        Crops, true lungs, and what is missing.
    """
    images, lungs = chests(count, seed=77)
    random = np.random.default_rng(5)
    hidden = np.zeros_like(lungs)
    for k, lung in enumerate(lungs):
        row = SIZE // 2 + random.integers(-8, 9)
        column = np.flatnonzero(lung[row])[-1 if k % 2 else 0]
        hidden[k] = lung & (near(row, column) < random.uniform(8, 12))
        images[k][hidden[k]] = random.normal(0.95, 0.04, hidden[k].sum())
    return crops_of(images, lungs & ~hidden), lungs, hidden


# --- learning ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train_lung_net(weak(*chests(40)), LEARNING, seed=0, log=quiet)


def test_consolidation_at_the_chest_wall_becomes_lung_again_if_painted_and_healthy_lungs_stay(trained: nn.Module
                                                                                              ) -> None:
    crops, truth, hidden = consolidated(16)
    found = robust_lungs(trained, crops, LEARNING).lungs
    assert dice(found, truth) > dice(crops.lungs, truth) + 0.025  # .985 against .943
    assert dice(found, truth) > 0.97
    assert found[hidden].mean() > 0.8
    images, lungs = chests(8, seed=78)
    assert dice(robust_lungs(trained, crops_of(images, lungs), LEARNING).lungs, lungs) > 0.97
    bare = replace(LEARNING, paint=replace(LEARNING.paint, share=0.0))
    net = train_lung_net(weak(*chests(40)), bare, seed=0, log=quiet)
    found = robust_lungs(net, crops, bare).lungs
    assert dice(found, truth) > 0.9, "it has learned healthy lungs all the same"
    assert found[hidden].mean() < 0.3
    assert (lung_probabilities(net, crops, bare)[hidden].mean()
            < lung_probabilities(trained, crops, LEARNING)[hidden].mean() - 0.4)


def mixed() -> WeakSet:
    """Every other slice has a lesion."""
    images, lungs = chests(8)
    return weak(images, lungs, np.arange(8) % 2)


def trained_on(data: WeakSet, **changed: object) -> nn.Module:
    return train_lung_net(data, replace(SMALL, **changed), seed=3, log=quiet)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return trained_on(mixed())


def test_slices_with_a_lesion_are_never_used(small: nn.Module) -> None:
    other = mixed()
    other.crops.images[1::2] = np.nan
    other.crops.lungs[1::2] ^= True
    assert same_weights(small, trained_on(other))
    # The counterpart: the slices that it does use do matter, pictures as well as masks.
    for part in ("images", "lungs"):
        third = mixed()
        getattr(third.crops, part)[0::2] = np.roll(getattr(third.crops, part)[0::2], 5, axis=1)
        assert not same_weights(small, trained_on(third))


def test_the_second_generation_uses_pictures_of_lesions_and_never_their_masks(small: nn.Module) -> None:
    net, other, third, only_free = trained_on(mixed(), again=3), mixed(), mixed(), weak(*chests(4))
    assert not same_weights(net, small)
    other.crops.images[1::2] = np.roll(other.crops.images[1::2], 5, axis=1)
    assert not same_weights(net, trained_on(other, again=3))
    # A threshold mask is the prior of what the first generation makes of such a slice, here with limits that ignore it.
    third.crops.lungs[1::2] ^= True
    assert same_weights(*(trained_on(data, again=3, keep=0.0, add=0.0, add_thin=0.0) for data in (mixed(), third)))
    assert same_weights(trained_on(only_free, again=3), trained_on(only_free)), "without such pictures there is none"


def test_painted_organs_teach_it_to_leave_organs_out(trained: nn.Module) -> None:
    """Bright, even disks in the middle of a lung, which the given mask counts as lung."""
    images, lungs = chests(8, seed=79)
    disks = lungs & np.stack([near(SIZE / 2, SIZE * (0.29 if k % 2 else 0.71)) < 6 for k in range(8)])
    crops = crops_of(np.where(disks, np.float32(0.98), images), lungs)
    with_organs = train_lung_net(weak(*chests(40)), replace(LEARNING, organs=0.6), log=quiet)
    inside, without = (lung_probabilities(net, crops, LEARNING)[disks].mean() for net in (with_organs, trained))
    assert without > inside + 0.2


def test_lungs_too_small_for_the_net_do_not_stop_it_and_the_slices_stay_as_they_are() -> None:
    data = mixed()
    data.crops.lungs[:] = False
    data.crops.lungs[0, 30, 30] = True
    images, lungs, lines = data.crops.images.copy(), data.crops.lungs.copy(), list[str]()
    settings = replace(SMALL, size=32, paint=replace(SMALL.paint, share=1.0))  # where that pixel is a quarter of one
    net = train_lung_net(data, settings, log=lines.append)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    assert np.array_equal(data.crops.images, images)
    assert np.array_equal(data.crops.lungs, lungs)
    assert lines[-1].startswith("lungs step    3/3")


# --- probabilities ----------------------------------------------------------------------------------------------

class Reads(nn.Module):
    """A net that takes the picture for the probability itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.logit(pictures.clamp(1e-6, 1 - 1e-6))


def test_probabilities_of_every_pixel() -> None:
    images = np.random.default_rng(0).uniform(0.1, 0.9, (5, SIZE, SIZE)).astype(np.float32)
    crops = crops_of(images, images > 0.5)
    p = lung_probabilities(Reads(), crops, SMALL, batch=2)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, images, atol=1e-5)
    assert len(robust_lungs(Reads(), crops.take(np.arange(0)), SMALL)) == 0
    # Mean over the slice and its mirror image.
    torch.manual_seed(0)
    net = make_lung_net(SMALL).eval()
    one, other = (lung_probabilities(net, crops_of(i, crops.lungs), SMALL) for i in (images, images[:, :, ::-1].copy()))
    np.testing.assert_allclose(one[:, :, ::-1], other, atol=1e-5)
    assert np.ptp(one) > 0.01


def test_the_net_works_at_its_own_size_and_the_result_lies_where_it_belongs() -> None:
    rows, columns = np.indices((96, 96))
    image = (np.hypot(rows - 30, columns - 60) < 15).astype(np.float32)
    net, shapes = Reads(), list[tuple[int, ...]]()
    net.register_forward_pre_hook(lambda module, given: shapes.append(tuple(given[0].shape)))
    p = lung_probabilities(net, crops_of(image[None], image[None] > 0), replace(SMALL, size=32))
    assert set(shapes) == {(1, 1, 32, 32)}
    assert p.shape == (1, 96, 96)
    assert dice(p[0] > 0.5, image > 0) > 0.95
    assert np.argwhere(p[0] > 0.5).mean(axis=0) == pytest.approx([30, 60], abs=0.3)


# --- from probabilities to lungs --------------------------------------------------------------------------------

SURE, BLANK = 0.99, 0.01


def canvas(*areas: tuple[slice, slice, float]) -> np.ndarray:
    picture = np.full((SIZE, SIZE), BLANK, np.float32)
    for rows, columns, p in areas:
        picture[rows, columns] = p
    return picture


def decided(picture: np.ndarray, threshold: np.ndarray, **settings: float) -> np.ndarray:
    """What robust_lungs makes of one slice of probabilities and its threshold lung."""
    return robust_lungs(Reads(), crops_of(picture[None], threshold[None]),
                        replace(SMALL, **settings)).lungs[0]  # type: ignore[arg-type]


UPPER, LOWER = np.s_[0:32], np.s_[32:64]
LEFT, RIGHT = np.s_[0:32], np.s_[32:64]
ALL = np.s_[0:64]


@pytest.mark.parametrize(("p", "stays"), [(0.15, False), (0.25, True), (0.9, True)])
def test_threshold_lung_stays_down_to_keep(p: float, stays: bool) -> None:
    threshold = np.zeros((SIZE, SIZE), bool)
    threshold[UPPER] = True
    found = decided(canvas((UPPER, LEFT, SURE), (UPPER, RIGHT, p)), threshold, keep=0.2)
    assert found[UPPER, LEFT].all()
    assert found[UPPER, RIGHT].all() == found[UPPER, RIGHT].any() == stays
    assert not found[LOWER].any()


@pytest.mark.parametrize(("p", "much", "thin"), [(0.3, False, False), (0.4, True, False), (0.55, True, False),
                                                 (0.65, True, True)])
def test_what_the_threshold_left_out_is_added_from_add_on(p: float, much: bool, thin: bool) -> None:
    """Each slice has little or much lung of its own."""
    thresholds = np.zeros((2, SIZE, SIZE), bool)
    thresholds[0, :13], thresholds[1, :10] = True, True  # 20 and 16 % of the slice
    pictures = np.stack([canvas((lung.any(1).nonzero()[0], ALL, SURE), (LOWER, ALL, p)) for lung in thresholds])
    settings = replace(SMALL, add=0.35, add_thin=0.6, little=0.18, smallest=0.001)
    found = robust_lungs(Reads(), crops_of(pictures, thresholds), settings).lungs
    assert found[thresholds].all()
    assert found[:, LOWER].all(axis=(1, 2)).tolist() == found[:, LOWER].any(axis=(1, 2)).tolist() == [much, thin]


def test_small_components_are_dropped_and_small_holes_filled() -> None:
    for rows, stays in ((1, False), (2, True)):  # of the largest of 1600 pixels, two or four percent
        picture = canvas((np.s_[0:40], np.s_[0:40], SURE), (np.s_[50:50 + rows], np.s_[10:42], SURE))
        found = decided(picture, picture > 0.5, smallest=0.03)
        assert found[:40, :40].all()
        assert found.sum() == 1600 + 32 * rows * stays
    small, large = np.s_[40:46, 40:46], np.s_[20:27, 20:27]  # one percent of the slice is 41 pixels: 36 and 49
    picture = canvas((np.s_[10:50], np.s_[10:50], SURE), (*small, BLANK), (*large, BLANK))
    found = decided(picture, picture > 0.5, largest_hole=0.01)
    assert found[small].all()
    assert found.sum() == 1600 - 49


def test_a_slice_with_nothing_left_keeps_its_threshold_mask_and_all_else_stays() -> None:
    threshold = np.zeros((2, SIZE, SIZE), bool)
    threshold[:, UPPER, LEFT] = True
    pictures = np.stack([canvas(), canvas((UPPER, ALL, SURE))])
    crops, before = Crops(pictures, threshold, np.arange(8).reshape(2, 4)), threshold.copy()
    found = robust_lungs(Reads(), crops, SMALL)
    np.testing.assert_array_equal(found.lungs[0], threshold[0])
    assert found.lungs[1, UPPER].all(), "the slice beside it is completed all the same"
    assert found.lungs.dtype == bool
    assert np.array_equal(found.images, pictures)
    assert np.array_equal(found.boxes, crops.boxes)
    assert np.array_equal(crops.lungs, before), "the crops given are not changed"
