"""One pass over a slice scores its patches as windows cut out for each of them do."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from bench import plain_patches
from bench.plain_patches import REACH, STRIDE, in_batches, one_by_one, windows_of

from covidseg.patches import MilSettings, PatchNet, grid_ids, square_ids

pytestmark = [pytest.mark.nets, pytest.mark.weekly]

SIDE = 160
SETTINGS = MilSettings(width=4)


@pytest.fixture
def net() -> PatchNet:
    torch.manual_seed(0)
    net = PatchNet(SETTINGS)
    for module in net.modules():  # larger than at the start, so that what is far away shows in the scores
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.rand(1, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def numbers_of(reading: str) -> torch.Tensor:
    """Squares in a shifted position all over the slice, corners and all; or grids over two components."""
    lungs = np.ones((1, SIDE, SIDE), bool)
    coarse = np.zeros(lungs.shape, bool)
    coarse[0, 31:60, 40:77], coarse[0, 100:160, 120:160] = True, True
    ids = square_ids(lungs, offset=(2, 3)) if reading == "squares" else grid_ids(lungs, coarse)
    return torch.from_numpy(ids[0].astype(np.int64))


@pytest.mark.parametrize("reading", ["squares", "grid"])
def test_windows_give_the_scores_of_the_whole_slice(reading: str, net: PatchNet, inputs: torch.Tensor) -> None:
    ids = numbers_of(reading)
    count = int(ids.max())
    with torch.no_grad():
        dense = torch.cat(net(inputs, ids[None]))                                          # (2, P + 1)
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(2))[:60] + 1
    corners = ids[[0, 0, -1, -1, SIDE // 2], [0, -1, 0, -1, 0]]
    chosen = [*corners.tolist(), *numbers.tolist()]
    assert dense[:, chosen].std(dim=1).min() > 0.01
    torch.testing.assert_close(torch.stack(one_by_one(net, inputs, ids, chosen)), dense[:, chosen], atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.stack(in_batches(net, inputs, ids, chosen, batch=7)), dense[:, chosen], atol=1e-5,
                               rtol=0)


def test_a_window_may_not_be_smaller(monkeypatch: pytest.MonkeyPatch, net: PatchNet, inputs: torch.Tensor) -> None:
    """The comparison has teeth: a window that lacks the last cells gives other scores."""
    ids = numbers_of("squares")
    middle = [int(ids[SIDE // 2, SIDE // 2 + 5 * k]) for k in range(-4, 4)]
    dense = net(inputs, ids[None])[0][0, middle]
    monkeypatch.setattr(plain_patches, "REACH", REACH - 2 * STRIDE)
    assert (one_by_one(net, inputs, ids, middle)[0] - dense).abs().max() > 1e-4


def test_windows_lie_on_the_cells_of_the_net_and_within_the_slice() -> None:
    ids = numbers_of("squares")
    windows = windows_of(ids)
    assert len(windows) == int(ids.max())
    for number, window in enumerate(windows, start=1):
        for part, places in zip(window, (ids == number).nonzero(as_tuple=True), strict=True):
            assert part.start % STRIDE == part.stop % STRIDE == 0
            assert 0 <= part.start <= max(0, int(places.min()) - REACH)
            assert min(SIDE, int(places.max()) + REACH) <= part.stop <= SIDE
    inner = windows[int(ids[SIDE // 2, SIDE // 2]) - 1]
    assert all(part.stop - part.start == 2 * STRIDE + 2 * REACH for part in inner)


def test_other_widths_of_patches_have_windows_too(net: PatchNet, inputs: torch.Tensor) -> None:
    wide = PatchNet(replace(SETTINGS, patch=8))
    wide.load_state_dict(net.state_dict())
    ids = torch.from_numpy(square_ids(np.ones((1, SIDE, SIDE), bool), 8)[0].astype(np.int64))
    dense = wide.eval()(inputs, ids[None])[0][0, [1, 200]]
    torch.testing.assert_close(in_batches(wide, inputs, ids, [1, 200])[0], dense, atol=1e-5, rtol=0)
