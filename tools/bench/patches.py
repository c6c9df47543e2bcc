"""Patches: one dense pass over the slice against a window cut out for each patch."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.measure import Setup, alternating, comparison, timed
from bench.plain_patches import by_windows
from bench.volumes import crops
from covidseg.patches import PatchNet, square_ids
from covidseg.preprocess import net_input
from covidseg.training import on_device


def run(setup: Setup) -> dict[str, Any]:
    """All 5 x 5 patches of the lung in one slice of 512 pixels: one pass, or a window for each."""
    torch.manual_seed(0)
    net = on_device(PatchNet(), setup.device).eval().requires_grad_(False)
    one = crops(12, setup.size(512, 160)).take(np.array([6]))
    ids = torch.from_numpy(square_ids(one.lungs).astype(np.int64)).to(setup.device)            # (1, S, S)
    inputs = net_input(torch.from_numpy(one.images)[:, None],
                       torch.from_numpy(one.lungs)[:, None].float()).to(setup.device)          # (1, 2, S, S)
    count = int(ids.max())
    sample = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:setup.size(256, 4)] + 1
    numbers = sample.tolist()

    def dense() -> Tensor:
        with torch.inference_mode():
            return net(inputs, ids, count)[0][0]
    ours = alternating([dense], setup.rounds, setup.device)[0]
    rows = []
    for name, batch in (("in batches of 32", 32), ("one at a time", 1)):
        scores, _ = by_windows(net, inputs, ids[0], numbers, batch)
        windows = partial(by_windows, net, inputs, ids[0], numbers, batch)
        seconds = timed(windows, setup.device) / len(numbers) * count
        rows.append(comparison(
            f"scores of all 5 x 5 patches of a slice of {one.images.shape[-1]} pixels",
            f"a window for each patch, {name}", "ms", 1e3 * ours, 1e3 * seconds, goal=20, tolerance=1e-5,
            difference=float((scores - dense()[sample.to(setup.device)]).abs().max()),
            note=f"{count} patches in the lung; windows timed on {len(numbers)} of them, chosen at random"))
    return {"comparisons": rows}
