"""DeCoVNet: head, class activation map and masks, against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baselines.test_trunk import numbers_by_hand
from tiny import toy

from covidseg.baselines.decovnet import WEIGHTS, DeCoVNet, DeCoVNetSettings, keep_top
from covidseg.baselines.maps import judge_crops, lesion_maps
from covidseg.baselines.slabs import SlabSettings

pytestmark = pytest.mark.nets


def net(dims: int = 2, **changes: object) -> DeCoVNet:
    torch.manual_seed(0)
    return DeCoVNet(DeCoVNetSettings(dims=dims, **changes)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("dims", [2, 3])
def test_number_of_parameters(dims: int) -> None:
    places = 3 ** dims
    head = 128 * 64 * places + 64 + 64 * 32 * places + 32 + 32 * 32 * places + 32
    linear = 32 * 32 + 32 + 32 * 2 + 2
    assert sum(p.numel() for p in net(dims).parameters()) == numbers_by_hand(2, dims) + head + linear


@pytest.mark.parametrize("dims", [2, 3])
def test_the_published_map_is_the_chain_of_averaged_kernels(dims: int) -> None:
    one = net(dims, weights="chain")
    state = {name: value.numpy() for name, value in one.state_dict().items()}
    k1, k2, k3 = (state[f"head.{i}.weight"].reshape(*state[f"head.{i}.weight"].shape[:2], -1).mean(2)
                  for i in (1, 4, 8))                                    # (64, 128), (32, 64), (32, 32)
    weights = np.zeros(128)
    for c in range(128):
        unit = np.zeros(128)
        unit[c] = 1                                                     # one feature, through all layers
        weights[c] = (state["classes.weight"] @ (state["hidden.weight"] @ (k3 @ (k2 @ (k1 @ unit)))))[1]
    np.testing.assert_allclose(one.cam_weights().detach().numpy(), weights, atol=1e-6)
    maps = torch.rand((1, 2, 40, 40) if dims == 2 else (1, 2, 4, 40, 40))
    with torch.no_grad():
        features, cam = one.features(maps)[0].numpy(), one.judge(maps)[1][0, 0].numpy()
    np.testing.assert_allclose(cam, np.tensordot(weights, features, axes=1), atol=1e-5)


def pictures(dims: int, count: int = 2) -> torch.Tensor:
    """Pictures in a square lung, ``(count, 2, 40, 40)`` or slabs of them."""
    shape = (count, 2, 40, 40) if dims == 2 else (count, 2, 4, 40, 40)
    maps = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    maps[:, 1] = 0
    maps[:, 1, ..., 8:32, 8:32] = 1
    return maps


@pytest.mark.parametrize("dims", [2, 3])
def test_the_map_weighs_features_with_the_gradient_of_their_own_slice(dims: int) -> None:
    one, maps = net(dims), pictures(dims)
    with torch.no_grad():
        features, (p, cam) = one.features(maps), one.judge(maps)
    for k in range(len(maps)):
        start = features[k:k + 1].clone().requires_grad_(True)
        logits = one.classify(start)[0]
        gradient, = torch.autograd.grad(logits[1] - logits[0], start)
        weights = gradient[0].flatten(1).mean(dim=1).numpy()
        expected = np.tensordot(weights, features[k].numpy(), axes=1)
        np.testing.assert_allclose(cam[k, 0], expected, rtol=1e-4, atol=1e-7)
        assert np.abs(expected).max() > 1e-5
        assert p[k].item() == pytest.approx(logits.softmax(0)[1].item(), abs=1e-6)
    chained = net(dims, weights="chain")
    with torch.no_grad():
        assert not torch.allclose(chained.judge(maps)[1], cam, rtol=0.1), "not the published map"


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_judging_leaves_no_gradients_behind(dims: int, weights: str) -> None:
    one = net(dims, weights=weights, slab=SlabSettings(depth=2, size=40, step=2))
    with torch.no_grad():
        p, cam = one.judge(pictures(dims))
        assert not torch.is_grad_enabled()
        assert not p.requires_grad
        assert not cam.requires_grad
    data, _ = toy(4)
    judge_crops(one, data.crops)
    assert torch.is_grad_enabled()
    for parameter in one.parameters():
        assert parameter.grad is None
        assert parameter.requires_grad, "it can still be trained"


@pytest.mark.parametrize("dims", [2, 3])
def test_the_picture_outside_the_lung_has_no_influence(dims: int) -> None:
    maps = pictures(dims, 1)
    outside, inside = maps.clone(), maps.clone()
    outside[:, 0][maps[:, 1] == 0] = 9
    inside[:, 0, ..., 12, 12] = 9
    for masked in (True, False):
        one = net(dims, masked=masked)
        with torch.no_grad():
            here, there, other = (torch.cat([one(m), *(part.flatten(1) for part in one.judge(m)[1:])], dim=1)
                                  for m in (maps, outside, inside))
        assert torch.equal(here, there) is masked, "the publication lets the net see all of the slice"
        assert not torch.equal(here, other)


def test_the_lung_itself_is_seen() -> None:
    one, maps = net(), pictures(2, 1)
    maps[:, 0] = 0  # as dark as what is set to air
    larger = maps.clone()
    larger[:, 1] = 1
    with torch.no_grad():
        assert not torch.equal(one(maps), one(larger))


def test_keep_top_keeps_the_share_and_no_zero() -> None:
    maps = np.arange(200, dtype=np.float32).reshape(2, 10, 10)
    assert keep_top(maps, 0.05, True).sum() == 10
    assert not keep_top(maps, 0.05, True)[0].any()
    assert keep_top(maps, 0.05, False).sum(axis=(1, 2)).tolist() == [5, 5]
    sparse = np.zeros((1, 10, 10), np.float32)
    sparse[0, 0, :2] = 1
    assert keep_top(sparse, 0.05, True).sum() == 2


def test_masks_follow_from_the_activation() -> None:
    data, _ = toy(6, 80)
    crops, one = data.crops, net(top=0.1, bright=0.15, weights="chain")
    with torch.no_grad():  # an untrained map may be negative throughout: nothing would be left of it
        for weight in (one.classes.weight, one.hidden.weight, *(one.head[i].weight for i in (1, 4, 8))):
            weight.abs_()
    mask, soft = lesion_maps(one, crops)[1]
    assert set(np.unique(mask)) == {0.0, 1.0}
    assert (crops.images[mask > 0] > 0.15).all()
    assert (mask.sum(axis=(1, 2)) <= 0.1 * 80 * 80 + 1).all()
    for k in range(6):
        darkest = soft[k][mask[k] > 0].min()
        outside = (soft[k] > darkest) & (mask[k] == 0)
        assert (crops.images[k][outside] <= 0.15).all(), "only darkness keeps a stronger pixel out"
