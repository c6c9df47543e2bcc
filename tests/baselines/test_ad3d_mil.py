"""AD3D-MIL: instances, attention, pooling and the lesion map, against direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from baselines.test_trunk import numbers_by_hand

from covidseg.baselines.ad3d_mil import POOLINGS, Ad3dMil, Ad3dMilSettings

pytestmark = pytest.mark.nets


def net(dims: int = 2, **changes: object) -> Ad3dMil:
    torch.manual_seed(0)
    return Ad3dMil(Ad3dMilSettings(dims=dims, **changes)).eval()  # type: ignore[arg-type]


@pytest.mark.parametrize("dims", [2, 3])
def test_number_of_parameters(dims: int) -> None:
    places = 3 ** dims
    generator = 128 * 64 * places + 64 + 64 * 32 * places + 32
    attention, score = 32 * 32 + 32 + 32 + 1, 32 + 1
    assert sum(p.numel() for p in net(dims).parameters()) == numbers_by_hand(1, dims) + generator + attention + score


@pytest.mark.parametrize(("dims", "shape", "grid"), [(2, (3, 2, 160, 160), (8, 8)), (2, (1, 2, 40, 40), (5, 5)),
                                                     (3, (2, 2, 6, 120, 120), (3, 8, 8))])
def test_instances_of_slices_and_slabs(dims: int, shape: tuple[int, ...], grid: tuple[int, ...]) -> None:
    one = net(dims)
    with torch.no_grad():
        assert one.instances(torch.rand(shape)).shape == (shape[0], 32, *grid)
        p, lesion = one.judge(torch.rand(shape))
    assert p.shape == (shape[0],)
    assert lesion.shape == (shape[0], 1, *grid)


def direct(one: Ad3dMil, bag: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention (K,), pooled vector (32,) and instance probabilities (K,) of one bag (K, 32), in NumPy."""
    s = {name: value.numpy().astype(float) for name, value in one.state_dict().items()}
    e = np.array([np.exp(s["attend_w.weight"][0] @ np.tanh(s["attend_v.weight"] @ x + s["attend_v.bias"]))
                  for x in bag])
    a = e / e.sum()
    z = sum(weight * x for weight, x in zip(a, bag, strict=True))
    scores = bag @ s["score.weight"][0] + s["score.bias"][0]
    return a, z, 1 / (1 + np.exp(-scores))


def test_lesion_map_is_attention_times_the_instances_own_probability() -> None:
    one, maps = net(), torch.rand(2, 2, 80, 80)
    with torch.no_grad():
        instances, (p, lesion) = one.instances(maps), one.judge(maps)
    score = one.score.weight[0].detach().numpy()
    for k in range(2):
        a, z, probability = direct(one, instances[k].flatten(1).T.numpy())
        np.testing.assert_allclose(lesion[k, 0].flatten(), a * probability, atol=1e-6)
        assert p[k].item() == pytest.approx(1 / (1 + np.exp(-(score @ z + one.score.bias.item()))), abs=1e-5)


def test_mean_and_max_pooling() -> None:
    bag = torch.randn(3, 5, 32)
    with torch.no_grad():
        torch.testing.assert_close(net(pooling="mean").pool(bag), bag.mean(dim=1))
        torch.testing.assert_close(net(pooling="max").pool(bag), bag.amax(dim=1))
        assert torch.equal(net(pooling="max").attention(bag), torch.full((3, 5), 0.2))
        assert not torch.allclose(net().pool(bag), bag.mean(dim=1), atol=1e-3)
    assert POOLINGS == ("attention", "max", "mean")


def test_loss_is_a_clamped_likelihood() -> None:
    one = net()
    maps, target = torch.rand(4, 2, 40, 40), torch.tensor([0.0, 1.0, 1.0, 0.0])
    with torch.no_grad():
        p = one(maps).sigmoid().numpy()
        expected = -np.mean([np.log(p[1]), np.log(p[2]), np.log(1 - p[0]), np.log(1 - p[3])])
        assert one.loss(maps, target).item() == pytest.approx(expected, rel=1e-5)
        one.score.bias.fill_(100.0)
        assert one.loss(maps, torch.zeros(4)).item() == pytest.approx(-np.log(1e-5), rel=1e-2)


def test_nothing_outside_the_lung_is_seen() -> None:
    one, maps = net(), torch.rand(1, 2, 40, 40)
    maps[:, 1] = 0
    maps[:, 1, 10:30, 10:30] = 1
    other = maps.clone()
    other[:, 0, :10] = 9
    with torch.no_grad():
        assert torch.equal(one(maps), one(other))
        other[:, 0, 12] = 9
        assert not torch.equal(one(maps), one(other))
