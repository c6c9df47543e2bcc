"""The shared trunk of both published systems, block by block against its table."""

from __future__ import annotations

import pytest
import torch

from covidseg.baselines.trunk import Bottleneck, GridPool, Trunk, initialise

# Blocks of the table: (inputs, outputs, kernel) of each convolution; all are without bias, a batch norm follows each.
TABLE = [(None, 16, (5, 7, 7)),
         (16, 16, (3, 1, 1)), (16, 16, (1, 3, 3)), (16, 64, (1, 1, 1)), (16, 64, (1, 1, 1)),
         (64, 32, (3, 1, 1)), (32, 32, (1, 3, 3)), (32, 128, (1, 1, 1)), (64, 128, (1, 1, 1))]


def numbers_by_hand(inputs: int, dims: int) -> int:
    total = 0
    for of, to, kernel in TABLE:
        places = 1
        for k in kernel[-dims:]:
            places *= k
        total += (of or inputs) * to * places + 2 * to
    return total


@pytest.mark.parametrize(("dims", "inputs"), [(2, 1), (2, 2), (3, 1), (3, 2)])
def test_number_of_parameters(dims: int, inputs: int) -> None:
    net = Trunk(inputs, dims)
    assert sum(p.numel() for p in net.parameters()) == numbers_by_hand(inputs, dims)


def test_the_sum_written_out_once() -> None:
    # 2 x 16 x 245 + 32; 768 + 32 + 2304 + 32 + 1024 + 128 + 1024 + 128; 6144 + 64 + 9216 + 64 + 4096 + 256 + 8192 + 256
    assert numbers_by_hand(2, 3) == 7872 + 5440 + 28288


@pytest.mark.parametrize(("slices", "side"), [(8, 64), (7, 64), (1, 160), (6, 120)])
def test_shapes_of_every_block_in_3d(slices: int, side: int) -> None:
    net, quarter, half = Trunk(2, 3).eval(), side // 4, (slices + 1) // 2
    stem = net.stem(torch.rand(1, 2, slices, side, side))
    assert stem.shape == (1, 16, slices, quarter, quarter)
    res1 = net.res1(stem)
    assert res1.shape == (1, 64, slices, quarter, quarter)
    pooled = net.pool(res1)
    assert pooled.shape == (1, 64, half, quarter, quarter)
    assert net.res2(pooled).shape == (1, 128, half, side // 8, side // 8)


def test_the_2d_port_is_the_3d_net_on_one_slice() -> None:
    torch.manual_seed(0)
    deep, flat = Trunk(2, 3).eval(), Trunk(2, 2).eval()
    initialise(deep)
    # With one slice only the middle of a kernel's z part meets anything but padding.
    state = {name: value[:, :, value.shape[2] // 2] if value.dim() == 5 else value
             for name, value in deep.state_dict().items()}
    flat.load_state_dict(state)
    picture = torch.rand(2, 2, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(deep(picture[:, :, None])[:, :, 0], flat(picture), atol=1e-5, rtol=1e-5)


def test_grids_pool_down_and_never_up() -> None:
    features = torch.rand(1, 3, 4, 15, 30)
    pooled = GridPool(3, (16, 12, 18))(features)
    assert pooled.shape == (1, 3, 4, 12, 18)
    assert pooled.max() == features.max()
    assert torch.equal(GridPool(3, (16, 24, 36))(features), features)
    assert GridPool(2, (1, 6, 9))(features[:, :, 0]).shape == (1, 3, 6, 9)
    flat = features.amax(dim=(2, 3, 4), keepdim=True)
    assert torch.equal(GridPool(3, (1, 1, 1))(features), flat)


def test_residual_paths_begin_as_nothing() -> None:
    torch.manual_seed(0)
    block = Bottleneck(3, 4, 4, 8).eval()
    features = torch.rand(1, 4, 3, 8, 8)
    assert not torch.equal(block(features), block.shortcut(features).relu())
    initialise(block)
    assert torch.equal(block(features), block.shortcut(features).relu())
