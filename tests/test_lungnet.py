"""The lung net completes what the threshold lost, the rules around it do what they say, and no positive is seen."""

from __future__ import annotations

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import in_turn, quiet, same_weights
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


def weak(images: np.ndarray, lungs: np.ndarray, labels: np.ndarray | None = None) -> WeakSet:
    count = len(images)
    labels = np.zeros(count, int) if labels is None else labels
    return WeakSet(Crops(images, lungs, np.zeros((count, 4), int)), labels, np.array(["p"] * count),
                   np.array([f"v:{k}" for k in range(count)]))


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
        rows, columns = np.indices(lung.shape)
        hidden[k] = lung & (np.hypot(rows - row, columns - column) < random.uniform(8, 12))
        images[k][hidden[k]] = random.normal(0.95, 0.04, hidden[k].sum())
    return Crops(images, lungs & ~hidden, np.zeros((count, 4), int)), lungs, hidden


def dice(found: np.ndarray, truth: np.ndarray) -> float:
    return float(2 * (found & truth).sum() / (found.sum() + truth.sum()))


# --- learning ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return train_lung_net(weak(*chests(40)), LEARNING, seed=0, log=quiet)


def test_consolidation_at_the_chest_wall_becomes_lung_again(trained: nn.Module) -> None:
    crops, truth, hidden = consolidated(16)
    found = robust_lungs(trained, crops, LEARNING).lungs
    assert dice(found, truth) > dice(crops.lungs, truth) + 0.025  # .985 against .943
    assert dice(found, truth) > 0.97
    assert found[hidden].mean() > 0.8


def test_without_painting_it_would_stay_lost(trained: nn.Module) -> None:
    crops, truth, hidden = consolidated(16)
    bare = replace(LEARNING, paint=replace(LEARNING.paint, share=0.0))
    net = train_lung_net(weak(*chests(40)), bare, seed=0, log=quiet)
    found = robust_lungs(net, crops, bare).lungs
    assert dice(found, truth) > 0.9, "it has learned healthy lungs all the same"
    assert found[hidden].mean() < 0.3
    assert (lung_probabilities(net, crops, bare)[hidden].mean()
            < lung_probabilities(trained, crops, LEARNING)[hidden].mean() - 0.4)


def test_healthy_lungs_stay_as_they_are(trained: nn.Module) -> None:
    images, lungs = chests(8, seed=78)
    crops = Crops(images, lungs, np.zeros((8, 4), int))
    assert dice(robust_lungs(trained, crops, LEARNING).lungs, lungs) > 0.97


def mixed() -> WeakSet:
    """Every other slice has a lesion."""
    images, lungs = chests(8)
    return weak(images, lungs, np.arange(8) % 2)


def test_slices_with_a_lesion_are_never_used() -> None:
    first = mixed()
    other = mixed()
    other.crops.images[1::2] = np.nan
    other.crops.lungs[1::2] = ~other.crops.lungs[1::2]
    net = train_lung_net(first, SMALL, seed=3, log=quiet)
    assert same_weights(net, train_lung_net(other, SMALL, seed=3, log=quiet))
    # The counterpart: the slices that it does use do matter, pictures as well as masks.
    for part in ("images", "lungs"):
        third = mixed()
        getattr(third.crops, part)[0::2] = np.roll(getattr(third.crops, part)[0::2], 5, axis=1)
        assert not same_weights(net, train_lung_net(third, SMALL, seed=3, log=quiet))


def test_the_second_generation_uses_pictures_of_lesions_and_never_their_masks() -> None:
    again = replace(SMALL, again=3)
    net = train_lung_net(mixed(), again, seed=3, log=quiet)
    assert not same_weights(net, train_lung_net(mixed(), SMALL, seed=3, log=quiet))
    other = mixed()
    other.crops.images[1::2] = np.roll(other.crops.images[1::2], 5, axis=1)
    assert not same_weights(net, train_lung_net(other, again, seed=3, log=quiet))
    # A threshold mask is the prior of what the first generation makes of such a slice, here with limits that ignore it.
    deaf = replace(again, keep=0.0, add=0.0, add_thin=0.0)
    third = mixed()
    third.crops.lungs[1::2] = ~third.crops.lungs[1::2]
    nets = [train_lung_net(data, deaf, seed=3, log=quiet) for data in (mixed(), third)]
    assert same_weights(*nets)


def test_the_second_generation_needs_slices_with_a_lesion() -> None:
    only_free = weak(*chests(4))
    assert same_weights(train_lung_net(only_free, replace(SMALL, again=3), log=quiet),
                        train_lung_net(only_free, SMALL, log=quiet))


def organs(images: np.ndarray, lungs: np.ndarray) -> tuple[Crops, np.ndarray]:
    """Slices with a bright, even disk in the middle of a lung, which the given mask counts as lung; and the disks."""
    disks = np.zeros_like(lungs)
    for k, lung in enumerate(lungs):
        rows, columns = np.indices(lung.shape)
        disks[k] = lung & (np.hypot(rows - SIZE / 2, columns - SIZE * (0.29 if k % 2 else 0.71)) < 6)
    return Crops(np.where(disks, 0.98, images).astype(np.float32), lungs, np.zeros((len(lungs), 4), int)), disks


def test_painted_organs_teach_it_to_leave_organs_out() -> None:
    crops, disks = organs(*chests(8, seed=79))
    inside = [lung_probabilities(train_lung_net(weak(*chests(40)), replace(LEARNING, organs=share), log=quiet), crops,
                                 LEARNING)[disks].mean() for share in (0.6, 0.0)]
    assert inside[1] > inside[0] + 0.2


def test_the_seed_fixes_the_weights() -> None:
    nets = [train_lung_net(mixed(), SMALL, seed=seed, log=quiet) for seed in (0, 0, 1)]
    assert same_weights(nets[0], nets[1])
    assert not same_weights(nets[0], nets[2])
    assert not nets[0].training


def test_batches_made_ahead_are_those_made_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(SMALL, again=3, paint=replace(SMALL.paint, share=1.0))
    ahead = train_lung_net(mixed(), settings, seed=3, log=quiet)
    monkeypatch.setattr("covidseg.training.overlapped", in_turn)
    assert same_weights(ahead, train_lung_net(mixed(), settings, seed=3, log=quiet))


def test_training_leaves_the_slices_as_they_are() -> None:
    data, before = mixed(), mixed()
    train_lung_net(data, replace(SMALL, paint=replace(SMALL.paint, share=1.0)), log=quiet)
    assert np.array_equal(data.crops.images, before.crops.images)
    assert np.array_equal(data.crops.lungs, before.crops.lungs)


def test_lungs_too_small_for_the_net_do_not_stop_it() -> None:
    data = mixed()
    data.crops.lungs[:] = False
    data.crops.lungs[0, 30, 30] = True
    settings = replace(SMALL, size=32, paint=replace(SMALL.paint, share=1.0))  # where that pixel is a quarter of one
    assert all(torch.isfinite(p).all() for p in train_lung_net(data, settings, log=quiet).parameters())


def test_it_logs_one_line_an_epoch() -> None:
    lines: list[str] = []
    train_lung_net(mixed(), replace(SMALL, steps=6), log=lines.append)
    assert len(lines) == 6
    assert lines[-1].startswith("lungs step    6/6")


# --- probabilities ----------------------------------------------------------------------------------------------

class Reads(nn.Module):
    """A net that takes the picture for the probability itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.logit(pictures.clamp(1e-6, 1 - 1e-6))


class Ramp(Reads):
    """A net that is sure of the right side only, whatever it sees."""

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-4, 4, pictures.shape[-1]).expand(pictures.shape)


class Records(Reads):
    """Remembers the shapes that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(pictures.shape))
        return super().forward(pictures)


def test_probabilities_of_every_pixel() -> None:
    images = np.random.default_rng(0).uniform(0.1, 0.9, (5, SIZE, SIZE)).astype(np.float32)
    crops = Crops(images, images > 0.5, np.zeros((5, 4), int))
    p = lung_probabilities(Reads(), crops, SMALL, batch=2)
    assert p.dtype == np.float32
    np.testing.assert_allclose(p, images, atol=1e-5)


def test_probabilities_are_averaged_over_the_mirror_image() -> None:
    crops = Crops(np.zeros((1, SIZE, SIZE), np.float32), np.ones((1, SIZE, SIZE), bool), np.zeros((1, 4), int))
    np.testing.assert_allclose(lung_probabilities(Ramp(), crops, SMALL), 0.5, atol=1e-5)
    torch.manual_seed(0)
    net = make_lung_net(SMALL).eval()
    images = np.random.default_rng(0).normal(0.5, 0.3, (1, SIZE, SIZE)).astype(np.float32)
    one, other = (lung_probabilities(net, replace(crops, images=i), SMALL)
                  for i in (images, images[:, :, ::-1].copy()))
    np.testing.assert_allclose(one[:, :, ::-1], other, atol=1e-5)
    assert np.ptp(one) > 0.01


def test_the_net_works_at_its_own_size_and_the_result_lies_where_it_belongs() -> None:
    rows, columns = np.indices((96, 96))
    image = (np.hypot(rows - 30, columns - 60) < 15).astype(np.float32)
    crops = Crops(image[None], image[None] > 0, np.zeros((1, 4), int))
    net = Records()
    p = lung_probabilities(net, crops, replace(SMALL, size=32))
    assert set(net.shapes) == {(1, 1, 32, 32)}
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
    crops = Crops(picture[None], threshold[None], np.zeros((1, 4), int))
    return robust_lungs(Reads(), crops, replace(SMALL, **settings)).lungs[0]  # type: ignore[arg-type]


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
    for rows, expected in ((np.s_[0:13], much), (np.s_[0:10], thin)):  # 20 and 16 % of the slice
        threshold = np.zeros((SIZE, SIZE), bool)
        threshold[rows] = True
        found = decided(canvas((rows, ALL, SURE), (LOWER, ALL, p)), threshold, add=0.35, add_thin=0.6, little=0.18,
                        smallest=0.001)
        assert found[rows].all()
        assert found[LOWER].all() == found[LOWER].any() == expected


def test_each_slice_has_little_or_much_lung_of_its_own() -> None:
    thresholds = np.zeros((2, SIZE, SIZE), bool)
    thresholds[0, :10], thresholds[1, :13] = True, True
    pictures = np.stack([canvas((UPPER, ALL, SURE), (LOWER, ALL, 0.5))] * 2)
    settings = replace(SMALL, add=0.4, add_thin=0.6)
    found = robust_lungs(Reads(), Crops(pictures, thresholds, np.zeros((2, 4), int)), settings).lungs
    assert found[:, LOWER].any(axis=(1, 2)).tolist() == [False, True]


@pytest.mark.parametrize(("rows", "stays"), [(1, False), (2, True)])
def test_small_components_are_dropped(rows: int, stays: bool) -> None:
    """The largest has 1600 pixels, the other 32 or 64: two or four percent."""
    picture = canvas((np.s_[0:40], np.s_[0:40], SURE), (np.s_[50:50 + rows], np.s_[10:42], SURE))
    found = decided(picture, picture > 0.5, smallest=0.03)
    assert found[:40, :40].all()
    assert found.sum() == 1600 + 32 * rows * stays


@pytest.mark.parametrize(("side", "filled"), [(6, True), (7, False)])
def test_small_holes_are_filled_and_large_ones_stay(side: int, filled: bool) -> None:
    """One percent of the slice is 41 pixels; holes have 36 or 49."""
    picture = canvas((np.s_[10:50], np.s_[10:50], SURE), (np.s_[20:20 + side], np.s_[20:20 + side], BLANK))
    found = decided(picture, picture > 0.5, largest_hole=0.01)
    assert found[20:20 + side, 20:20 + side].all() == found[20:20 + side, 20:20 + side].any() == filled
    assert found.sum() == 1600 - (not filled) * side * side


def test_a_small_hole_is_filled_beside_a_large_one() -> None:
    picture = canvas((np.s_[10:50], np.s_[10:50], SURE), (np.s_[15:35], np.s_[15:35], BLANK),
                     (np.s_[40:43], np.s_[40:43], BLANK))
    found = decided(picture, picture > 0.5)
    assert found[40:43, 40:43].all()
    assert not found[15:35, 15:35].any()


def test_a_slice_with_nothing_left_keeps_its_threshold_mask() -> None:
    threshold = np.zeros((2, SIZE, SIZE), bool)
    threshold[:, UPPER, LEFT] = True
    pictures = np.stack([canvas(), canvas((UPPER, ALL, SURE))])
    found = robust_lungs(Reads(), Crops(pictures, threshold, np.zeros((2, 4), int)), SMALL).lungs
    np.testing.assert_array_equal(found[0], threshold[0])
    assert found[1, UPPER].all(), "the slice beside it is completed all the same"


def test_pictures_and_boxes_stay_and_the_crops_given_are_not_changed() -> None:
    images, lungs = chests(3)
    crops = Crops(1 - images, lungs, np.arange(12).reshape(3, 4))
    before = lungs.copy()
    found = robust_lungs(Reads(), crops, replace(SMALL, keep=0.95))
    assert np.array_equal(found.images, crops.images)
    assert np.array_equal(found.boxes, crops.boxes)
    assert np.array_equal(crops.lungs, before)
    assert found.lungs.dtype == bool
    assert not np.array_equal(found.lungs, before)


def test_no_slices_no_lungs() -> None:
    empty = Crops(np.zeros((0, 40, 40), np.float32), np.zeros((0, 40, 40), bool), np.zeros((0, 4), int))
    assert len(robust_lungs(Reads(), empty, SMALL)) == 0


def test_the_net_gives_one_logit_a_pixel_and_sizes_of_the_defaults_divide() -> None:
    settings = LungNetSettings()
    assert settings.size % 2 ** (len(settings.channels) - 1) == 0
    with torch.no_grad():
        assert make_lung_net(SMALL)(torch.zeros(2, 1, 32, 32)).shape == (2, 1, 32, 32)
    assert dataclasses.asdict(settings)["paint"]["vessels"] == 0, "vessels are part of the lung as they are"
