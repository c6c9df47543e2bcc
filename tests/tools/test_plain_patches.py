"""One pass over a slice scores its patches as windows cut out for each of them do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from bench import plain_patches
from bench.plain_patches import REACH, STRIDE, by_windows, windows_of

from covidseg.patches import MilSettings, PatchNet, grid_ids, square_ids

pytestmark = [pytest.mark.nets, pytest.mark.weekly]

SIDE = 160


@pytest.fixture
def net() -> PatchNet:
    torch.manual_seed(0)
    net = PatchNet(MilSettings(width=4))
    for module in net.modules():  # larger than at the start, so that what is far away shows in the scores
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
    return net.eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.rand(1, 2, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


LUNGS = np.ones((1, SIDE, SIDE), bool)
COARSE = np.zeros(LUNGS.shape, bool)
COARSE[0, 31:60, 40:77], COARSE[0, 100:160, 120:160] = True, True
# Squares in a shifted position all over the slice, corners and all; grids over two components; wider squares.
READINGS = {name: torch.from_numpy(ids[0].astype(np.int64)) for name, ids in (
    ("squares", square_ids(LUNGS, offset=(2, 3))), ("grid", grid_ids(LUNGS, COARSE)), ("wide", square_ids(LUNGS, 8)))}


@pytest.mark.parametrize("reading", READINGS)
def test_windows_give_the_scores_of_the_whole_slice(reading: str, net: PatchNet, inputs: torch.Tensor) -> None:
    ids = READINGS[reading]
    with torch.no_grad():
        dense = torch.cat(net(inputs, ids[None]))                                          # (2, P + 1)
    numbers = torch.randperm(int(ids.max()), generator=torch.Generator().manual_seed(2))[:60] + 1
    corners = ids[[0, 0, -1, -1, SIDE // 2], [0, -1, 0, -1, 0]]
    chosen = [*corners.tolist(), *numbers.tolist()]
    assert dense[:, chosen].std(dim=1).min() > 0.01
    for batch in (1, 7):
        found = torch.stack(by_windows(net, inputs, ids, chosen, batch))
        torch.testing.assert_close(found, dense[:, chosen], atol=1e-5, rtol=0)


def test_a_window_may_not_be_smaller(monkeypatch: pytest.MonkeyPatch, net: PatchNet, inputs: torch.Tensor) -> None:
    """The comparison has teeth: a window that lacks the last cells gives other scores."""
    ids = READINGS["squares"]
    middle = [int(ids[SIDE // 2, SIDE // 2 + 5 * k]) for k in range(-4, 4)]
    dense = net(inputs, ids[None])[0][0, middle]
    monkeypatch.setattr(plain_patches, "REACH", REACH - 2 * STRIDE)
    assert (by_windows(net, inputs, ids, middle)[0] - dense).abs().max() > 1e-4


def test_windows_lie_on_the_cells_of_the_net_and_within_the_slice() -> None:
    ids = READINGS["squares"]
    windows = windows_of(ids)
    assert len(windows) == int(ids.max())
    assert all(0 <= part.start <= part.stop <= SIDE and part.start % STRIDE == part.stop % STRIDE == 0
               for window in windows for part in window)
    inner = windows[int(ids[SIDE // 2, SIDE // 2]) - 1]
    assert all(part.stop - part.start == 2 * STRIDE + 2 * REACH for part in inner)
