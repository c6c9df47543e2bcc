"""Fine labels, and the segmenter that learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import dice, generator, quiet, same_weights, toy
from torch.nn import functional as F

from covidseg.augment import NO_PAINT, PaintSettings, paste_lesions
from covidseg.errors import SettingsError
from covidseg.preprocess import Crops, WeakSet
from covidseg.profiles import PROFILES
from covidseg.segmenter import (
    GAINS,
    PLAIN,
    FineLabels,
    FineSettings,
    SegmenterSettings,
    certainty,
    exact_loss,
    fine_labels,
    fuse,
    lesion_probabilities,
    make_segmenter,
    robust_loss,
    supervised_settings,
    train_segmenter,
    walk,
)

pytestmark = pytest.mark.nets
SETTINGS = FineSettings(seed_lesion=0.7, seed_lung=0.3, beta=130.0, smallest=12)


def odds(p: np.ndarray) -> np.ndarray:
    return np.log(p / (1 - p))


@pytest.mark.parametrize(("share", "middle"), [(0.0, 0.5), (1.0, 0.3), (0.15, 0.25), (0.5, 0.5)])
def test_log_odds_are_averaged(share: float, middle: float) -> None:
    settings, (a, b) = FineSettings(cam_share=share, cam_middle=middle), np.random.default_rng(0).random((2, 2, 9, 9))
    fused = fuse(a, b, settings)
    assert fused.dtype == np.float32
    one, other = a.clip(0.02, 0.98), b.clip(0.02, 0.98)  # certainties stay finite
    np.testing.assert_allclose(odds(fused), share * (odds(one) - odds(middle)) + (1 - share) * odds(other), atol=1e-4)
    # The middle of the activation map counts as one half.
    assert fuse(np.array([middle]), np.array([0.5]), settings)[0] == pytest.approx(0.5)
    ends = fuse(np.array([0.0, 1.0]), np.array([0.0, 1.0]), settings)
    assert 0 < ends[0] < 0.1
    assert 0.9 < ends[1] < 1


SIDE = 60
ROWS, COLUMNS = np.mgrid[:SIDE, :SIDE]
DISK = (ROWS - 30) ** 2 + (COLUMNS - 30) ** 2 <= 12**2
LUNG = (ROWS - 30) ** 2 + (COLUMNS - 30) ** 2 <= 27**2


def scene(offset: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """A bright disk with noise, and a blurred probability whose centre is ``offset`` pixels off."""
    image = np.where(DISK, 0.7, 0.2) + np.random.default_rng(0).normal(0, 0.03, DISK.shape)
    distance = np.hypot(ROWS - 30, COLUMNS - 30 - offset)
    return image.astype(np.float32), (1 / (1 + np.exp((distance - 12) / 4))).astype(np.float32)


def test_the_walker_moves_a_shifted_map_to_the_edge_where_there_is_contrast_and_stays_in_the_lung() -> None:
    image, probability = scene()
    inside = probability * LUNG
    assert dice(inside > 0.5, DISK) < 0.87
    assert dice(walk(image, inside, LUNG, SETTINGS), DISK) > 0.95
    flat = np.random.default_rng(0).normal(0.2, 1e-3, DISK.shape).astype(np.float32)
    assert dice(walk(flat, inside, LUNG, SETTINGS), inside > 0.5) > 0.9, "without contrast the map decides"
    image, probability = scene(offset=10)
    cut = LUNG & (COLUMNS < 33)
    found = walk(image, probability, cut, SETTINGS)  # the map itself reaches far beyond the lung
    assert found.any()
    assert not (found & ~cut).any()


def test_without_seeds_of_either_kind_there_is_nothing_to_walk() -> None:
    image, _ = scene()
    for level in (0.0, 0.5, SETTINGS.seed_lesion):
        assert not walk(image, np.full(image.shape, level, np.float32), LUNG, SETTINGS).any()
    outside = np.where(LUNG, 0.1, 0.9).astype(np.float32)
    assert not walk(image, outside, LUNG, SETTINGS).any(), "seeds outside the lung are none"
    no_lung = np.where(COLUMNS < 30, 0.9, 0.4).astype(np.float32)
    assert np.array_equal(walk(image, no_lung, LUNG, SETTINGS), LUNG & (COLUMNS < 30)), "the map at one half"
    one = np.where(COLUMNS < 12, 0.9, np.where(COLUMNS < 36, 0.1, 0.5)).astype(np.float32)
    found = walk(image, one, (COLUMNS < 25) | (COLUMNS > 35), SETTINGS)
    assert found[:, :12].any()
    assert not found[:, 35:].any(), "a lung that no seed reaches stays free"


def test_specks_are_dropped() -> None:
    image, probability = (np.full((SIDE, SIDE), value, np.float32) for value in (0.2, 0.1))
    speck, lesion = np.s_[10:13, 10:13], np.s_[30:36, 30:36]
    for part in (speck, lesion):
        image[part], probability[part] = 0.8, 0.9
    for smallest, stays in ((1, 9), (9, 9), (10, 0)):
        found = walk(image, probability, LUNG | True, replace(SETTINGS, smallest=smallest))
        assert found[speck].sum() == stays
        assert found[lesion].all()


def test_fine_labels_of_a_set() -> None:
    data, disks = toy(6)
    maps = np.where(disks, 0.9, 0.1).astype(np.float32)
    maps[0, 15:25, 15:25] = 0.95  # slice 0 has no lesion, whatever the maps say
    fine, free = fine_labels(data, maps, maps, SETTINGS), data.labels == 0
    for part, value in ((fine.labels, 0), (fine.probabilities, 0), (fine.targets, 0), (fine.weights, 1)):
        assert (part[free] == value).all()
    for k in np.flatnonzero(~free):
        lung = data.crops.lungs[k]
        assert dice(fine.labels[k], disks[k]) > 0.95
        assert (fine.weights[k][~lung] == 1).all()
        np.testing.assert_array_equal(fine.probabilities[k], fuse(maps[k], maps[k], SETTINGS) * lung)
        assert fine.targets[k][disks[k]].mean() > 0.9 > 0.2 > fine.targets[k][lung & ~disks[k]].mean()
    assert fine.labels.dtype == bool
    assert fine.probabilities.dtype == np.float32
    assert (fine.probabilities[~data.crops.lungs] == 0).all()
    assert 0.5 <= fine.weights.min() < fine.weights.max() <= 1


def test_targets_and_weights_by_hand() -> None:
    """Walker and map agree, disagree by half, or flatly contradict each other."""
    fine = FineLabels(np.array([[[True, True, True, False, False, False]]]),
                      np.array([[[1.0, 0.5, 0.0, 0.0, 0.5, 1.0]]], np.float32))
    np.testing.assert_allclose(fine.targets, [[[1, 0.75, 0.5, 0, 0.25, 0.5]]])
    np.testing.assert_allclose(fine.weights, [[[1, 0.75, 0.5, 1, 0.75, 0.5]]])
    assert fine.targets.dtype == fine.weights.dtype == np.float32
    np.testing.assert_array_equal(certainty(fine.targets), fine.weights)


# --- segmenter --------------------------------------------------------------------------------------------------------

SMALL = SegmenterSettings(channels=(4, 4, 8), steps=6, batch=4)
ENTROPY_ONLY = SegmenterSettings(dice_weight=0.0)


Case = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@pytest.fixture
def case() -> Case:
    """Logits, hard target and weights, in double precision so that the limit q -> 0 can be taken."""
    source, shape = generator(), (2, 1, 12, 12)
    logits, target, weight = 2 * torch.randn(shape, generator=source, dtype=torch.float64), *(
        torch.rand(shape, generator=source, dtype=torch.float64) for _ in range(2))
    return logits, (target < 0.3).double(), weight


@pytest.mark.parametrize(("robustness", "by_name"), [
    (1e-6, lambda logits, target: F.binary_cross_entropy_with_logits(logits, target, reduction="none")),
    (1.0, lambda logits, target: (logits.sigmoid() - target).abs())], ids=["cross entropy", "mean absolute error"])
def test_at_its_limits_the_loss_has_a_name(robustness: float, by_name: Callable[..., torch.Tensor], case: Case) -> None:
    logits, target, weight = case
    expected = (weight * by_name(logits, target)).sum() / weight.sum()
    settings = replace(ENTROPY_ONLY, robustness=robustness)
    assert robust_loss(logits, target, weight, settings).item() == pytest.approx(expected.item(), rel=1e-4)
    assert torch.isfinite(robust_loss(logits, target, torch.zeros_like(weight), SegmenterSettings()))


def test_pixels_of_weight_zero_have_no_gradient(case: Case) -> None:
    logits, target, weight = case
    weight = torch.where(weight < 0.5, 0.0, weight)
    loss = robust_loss(logits.requires_grad_(True), target, weight, SegmenterSettings())
    slopes, = torch.autograd.grad(loss, logits)
    assert torch.equal(slopes == 0, weight == 0)
    shifted = torch.where(weight == 0, logits + 5, logits)
    assert robust_loss(shifted, target, weight, SegmenterSettings()).item() == pytest.approx(loss.item())


def test_a_robust_loss_pulls_less_on_a_label_that_is_plainly_wrong() -> None:
    one, logits = torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -4.0, requires_grad=True)
    pulls = [-torch.autograd.grad(robust_loss(logits, one, one, replace(ENTROPY_ONLY, robustness=q)), logits)[0].item()
             for q in (0.01, 0.5, 1.0)]
    assert pulls[0] > 2 * pulls[1] > 2 * pulls[2] > 0


LEARNING = SegmenterSettings(channels=(8, 8, 16), steps=40, batch=8, rate=1e-2, robustness=0.4, dice_weight=0.5)


def errors(net: torch.nn.Module) -> tuple[float, float]:
    """Mean absolute error inside the lung, and Dice, on fresh slices."""
    fresh, disks = toy(16, seed=9)
    p = lesion_probabilities(net, fresh.crops)
    return float(np.abs(p - disks)[fresh.crops.lungs].mean()), dice(p > 0.5, disks)


@pytest.fixture(scope="module")
def small() -> tuple[WeakSet, np.ndarray, np.ndarray]:
    """Twelve slices, their disks, and weights of one."""
    data, disks = toy(12)
    return data, disks, np.ones(disks.shape, np.float32)


def test_training_lowers_the_error() -> None:
    data, disks = toy(24)
    torch.manual_seed(1)
    before, _ = errors(make_segmenter(LEARNING).eval())
    net = train_segmenter(data, disks, np.ones(disks.shape, np.float32), LEARNING, seed=1, log=quiet)
    after, overlap = errors(net)
    assert after < 0.5 * before
    assert overlap > 0.85
    assert not net.training


def test_a_short_training_finds_rare_lesions_if_it_starts_from_how_rare_they_are() -> None:
    """From one half it has only learned by then that lesions are rare, and its opinion dims the fine labels."""
    def crescents(data: WeakSet, disks: np.ndarray) -> tuple[WeakSet, np.ndarray]:
        return data, disks & np.roll(disks, 5, axis=2)                       # a fiftieth of the picture
    (data, rare), (fresh, truth) = crescents(*toy(24)), crescents(*toy(16, seed=9))
    ones, short = np.ones(rare.shape, np.float32), replace(LEARNING, steps=20, rate=3e-3, refresh=(0.4, 0.7))
    found = {}
    for prior in (0.5, PROFILES["quick"].segmenter.prior):
        net = train_segmenter(data, rare, ones, replace(short, prior=prior, paint=NO_PAINT), seed=1, log=quiet)
        found[prior] = dice(lesion_probabilities(net, fresh.crops) > 0.1, truth)
    assert found[0.5] < 0.2 < 0.4 < found[PROFILES["quick"].segmenter.prior]


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1])
def test_a_prior_is_a_probability(prior: float) -> None:
    with pytest.raises(SettingsError, match=r"prior is .* 0\.05"):
        SegmenterSettings(prior=prior)


def test_what_teaches_and_what_does_not(small: tuple[WeakSet, np.ndarray, np.ndarray]) -> None:
    """The upper half of the slices with a lesion has no weight, and the labels of the others are exact."""
    data, disks, ones = small
    lesion, weights, light, nonsense = data.labels == 1, ones.copy(), ones.copy(), disks.copy()
    weights[lesion, :20] = light[:, :20] = 0
    nonsense[lesion, :20] ^= True

    def trained(targets: np.ndarray, weights: np.ndarray) -> torch.nn.Module:
        return train_segmenter(data, targets, weights, replace(SMALL, refresh=()), seed=2, log=quiet)
    first = trained(disks, weights)
    for what, targets, given, same in (
            ("pixels of weight zero teach nothing", nonsense, weights, True),
            ("the same with weight", nonsense, ones, False),
            ("the weight of slices with a lesion counts", disks, ones, False),
            ("slices without a lesion are exact whatever their weight", disks, light, True),
            ("labels outside the lung teach nothing", disks | ~data.crops.lungs, weights, True)):
        assert same_weights(first, trained(targets, given)) == same, what


def test_pictures_of_other_scanners_teach_fine_labels_and_not_true_masks(
        small: tuple[WeakSet, np.ndarray, np.ndarray]) -> None:
    data, disks, ones = small
    assert supervised_settings(SMALL).rescan == 0 < SMALL.rescan

    def trained(rescan: float) -> torch.nn.Module:
        return train_segmenter(data, disks, ones, replace(SMALL, refresh=(), rescan=rescan), seed=2, log=quiet)
    assert not same_weights(trained(0.0), trained(1.0))


def pixels(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(1, 1, 2, 2)


def test_the_exact_loss_and_the_dice_parts_by_hand() -> None:
    logits, target, inside = pixels(20, 20, -20, 0), pixels(1, 0, 1, 1), pixels(1, 1, 0, 1)
    entropy = (0 + 20 + float(np.log(2))) / 3
    assert exact_loss(logits, target, inside, ENTROPY_ONLY).item() == pytest.approx(entropy, rel=1e-5)
    overlap = exact_loss(logits, target, inside, replace(ENTROPY_ONLY, dice_weight=1.0)).item() - entropy
    assert overlap == pytest.approx(1 - (2 * 1.5 + 1) / (2.5 + 2 + 1), abs=1e-5)
    with_dice, without = (robust_loss(pixels(20, 20, -20, -20), pixels(1, 0, 1, 0), pixels(1, 1, 1, 1),
                                      replace(ENTROPY_ONLY, dice_weight=weight)) for weight in (1.0, 0.0))
    assert (with_dice - without).item() == pytest.approx(1 - (2 * 1 + 1) / (4 + 1), abs=1e-5)


def test_fine_labels_are_refreshed_when_the_settings_say_so(small: tuple[WeakSet, np.ndarray, np.ndarray]) -> None:
    data, disks, weights = small
    taught, kept, nets, steps = disks.copy(), weights.copy(), [], []
    for refresh in ((0.34, 0.67), ()):
        log: list[str] = []
        nets.append(train_segmenter(data, taught, kept, replace(SMALL, refresh=refresh), seed=2, log=log.append))
        steps.append([line.split()[-1] for line in log if "refreshed" in line])
    assert steps == [["2", "4"], []]
    assert not same_weights(*nets)
    assert np.array_equal(taught, disks), "the labels given are not changed"
    assert np.array_equal(kept, weights)


def test_a_refreshment_weighs_each_pixel_by_its_certainty(small: tuple[WeakSet, np.ndarray, np.ndarray]) -> None:
    """With nothing but the old labels in the mixture, only the weights can change, and only to their certainty."""
    data, disks, even = small
    doubtful = (0.7 * disks + 0.1).astype(np.float32)
    doubtful[data.labels == 0] = 0
    for weights, same in ((certainty(doubtful), True), (even, False)):
        nets = [train_segmenter(data, doubtful, weights, replace(SMALL, refresh=refresh, keep=1.0), seed=2, log=quiet)
                for refresh in ((), (0.34,))]
        assert same_weights(*nets) == same


def test_true_masks_are_trusted() -> None:
    settings = supervised_settings(SegmenterSettings())
    assert settings.threshold == 0.5 > SegmenterSettings().threshold
    assert settings.robustness < SegmenterSettings().robustness
    assert settings.fine_weight == 1
    assert settings.refresh == ()
    assert settings.paint == NO_PAINT
    assert supervised_settings(settings) == settings


def test_painting_alone_teaches_what_a_lesion_is() -> None:
    """Fine labels of no weight: all that is learned comes from lesions painted on lesion-free slices."""
    data, disks = toy(24)
    nothing = np.zeros(disks.shape, np.float32)
    bright = replace(PaintSettings(), share=1.0, scattered=1.0, count=(1, 2), radius=(0.1, 0.2), solid_share=1.0,
                     solid=(0.5, 0.8))
    settings = SegmenterSettings(channels=(8, 8, 16), steps=40, batch=8, rate=1e-2, refresh=())
    painted = train_segmenter(data, nothing, nothing, replace(settings, paint=bright), seed=1, log=quiet)
    assert errors(painted)[1] > 0.7
    # Nothing painted, and slices that are said to be free show disks: so disks are lung.
    swapped = replace(data, labels=1 - data.labels)
    without = train_segmenter(swapped, nothing, nothing, replace(settings, paint=NO_PAINT), seed=1, log=quiet)
    assert errors(without)[1] < 0.1


def test_probabilities_are_averaged_over_flips_and_stay_in_the_lung() -> None:
    data, _ = toy(5)
    torch.manual_seed(0)
    net = make_segmenter(SMALL).eval()
    p = lesion_probabilities(net, data.crops)
    assert p.shape == data.crops.images.shape
    assert p.dtype == np.float32
    assert (p[~data.crops.lungs] == 0).all()
    assert 0 < p[data.crops.lungs].min() <= p.max() < 1
    np.testing.assert_allclose(lesion_probabilities(net, data.crops, batch=2), p, atol=1e-6)
    plain = lesion_probabilities(net, data.crops, gains=PLAIN)
    for axis in (1, 2):
        flipped = Crops(np.flip(data.crops.images, axis).copy(), np.flip(data.crops.lungs, axis).copy(),
                        data.crops.boxes)
        np.testing.assert_allclose(np.flip(lesion_probabilities(net, flipped, gains=PLAIN), axis), plain, atol=1e-5)
    # Seen at one gain, the flips are those of a picture that is as much brighter; the lung stays what it is.
    brighter = Crops(1.25 * data.crops.images, data.crops.lungs, data.crops.boxes)
    np.testing.assert_allclose(lesion_probabilities(net, data.crops, gains=(1.25,) * 4),
                               lesion_probabilities(net, brighter, gains=PLAIN), atol=1e-6)
    assert np.abs(p - plain).max() > 1e-4
    np.testing.assert_array_equal(lesion_probabilities(net, data.crops, gains=GAINS), p)
    assert len(lesion_probabilities(net, data.crops.take(np.arange(0)))) == 0


def batch_of_maps() -> tuple[torch.Tensor, torch.Tensor]:
    """Two fine-labelled slices with a lesion each, two lesion-free ones: picture, lung, target, weight."""
    maps = torch.zeros(4, 4, 20, 20)
    maps[:, 1, 2:18, 2:18] = 1
    maps[:, 3] = 1
    for k, target in ((0, 0.9), (1, 0.6)):
        maps[k, 0, 4:9, 4:9] = 0.8
        maps[k, 2, 4:9, 4:9] = target
    maps[2, 1, :, :10] = 0                                   # half of this lung is missing
    return maps, torch.tensor([False, False, True, True])


def test_lesions_are_moved_into_lesion_free_slices_only() -> None:
    maps, exact = batch_of_maps()
    before = maps.clone()
    pasted = paste_lesions(maps, exact, 1.0, generator())
    assert torch.equal(maps, before), "the slices of the set stay as they are"
    assert torch.equal(pasted[:2], before[:2])
    assert torch.equal(pasted[:, [1, 3]], before[:, [1, 3]]), "lung and weight stay"
    assert sorted(round(v, 3) for v in pasted[3, 2].unique().tolist()) in ([0.0, 0.9], [0.0, 0.6])
    assert int((pasted[3, 2] > 0).sum()) == 25, "the whole lesion, as it was or mirrored"
    assert float(pasted[3, 0][pasted[3, 2] > 0].min()) > 0.3, "and its picture with it"
    assert not pasted[2, 2][before[2, 1] == 0].any(), "no lesion outside the lung"


def test_paste_follows_its_share_and_the_seed_and_leaves_unsure_pixels() -> None:
    maps, exact = batch_of_maps()
    for where, share in ((exact, 0.0), (exact | True, 1.0)):
        assert torch.equal(paste_lesions(maps, where, share, generator()), maps)
    assert torch.equal(*(paste_lesions(maps, exact, 0.5, generator(3)) for _ in range(2)))
    count = sum(bool(paste_lesions(maps, exact, 0.3, generator(k))[3, 2].any()) for k in range(100))
    assert 15 < count < 45
    maps[:2, 2] = 0.2
    assert not paste_lesions(maps, exact, 1.0, generator())[2:, 2].any()
