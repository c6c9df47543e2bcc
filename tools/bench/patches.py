"""Patches: one dense pass against cropped windows, and flat bags against padded ones (torchmil)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.measure import Comparison, Setup, alternating, wait
from bench.plain_patches import in_batches, one_by_one
from bench.volumes import crops
from covidseg.patches import PatchNet, flat_attention_pool, gated_attention, square_ids
from covidseg.preprocess import net_input
from covidseg.training import on_device


def windows(setup: Setup) -> list[Comparison]:
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
    for name, way in (("a window for each patch, in batches of 32", in_batches),
                      ("a window for each patch, one at a time", one_by_one)):
        way(net, inputs, ids[0], numbers[:32])
        wait(setup.device)
        start = time.perf_counter()
        scores, _ = way(net, inputs, ids[0], numbers)
        wait(setup.device)
        seconds = (time.perf_counter() - start) / len(numbers) * count
        rows.append(Comparison(
            f"scores of all 5 x 5 patches of a slice of {one.images.shape[-1]} pixels", name, "ms", 1e3 * ours,
            1e3 * seconds, goal=20, tolerance=1e-5,
            difference=float((scores - dense()[sample.to(setup.device)]).abs().max()),
            note=f"{count} patches in the lung; windows timed on {len(numbers)} of them, chosen at random"))
    return rows


def ragged_bags(setup: Setup) -> tuple[Tensor, Tensor]:
    """Embeddings ``(M, 64)`` of the patches of all bags, and the bag of each, ``(M,)``; lungs fill 10 to 40 %."""
    random = np.random.default_rng(0)
    bags, most = setup.size(64, 4), setup.size(10_000, 100)
    sizes = random.integers(most // 10, 4 * most // 10 + 1, bags)
    bag = torch.from_numpy(np.repeat(np.arange(bags), sizes))
    return torch.randn(len(bag), 64, generator=torch.Generator().manual_seed(0)), bag


def padded(h: Tensor, bag: Tensor) -> tuple[Tensor, Tensor]:
    """The same as torchmil takes it: ``(bags, longest, d)`` with zeros behind each bag, and which entries count."""
    parts = [h[bag == k] for k in range(int(bag.max()) + 1)]
    mask = nn.utils.rnn.pad_sequence([torch.ones(len(part), device=h.device) for part in parts], batch_first=True)
    return nn.utils.rnn.pad_sequence(parts, batch_first=True), mask


def heads(setup: Setup) -> Comparison:
    """Gated attention pooling of ragged bags, forward and backward, with the same weights in both."""
    from torchmil.nn.attention import AttentionPool

    torch.manual_seed(0)
    theirs = AttentionPool(64, 32, gated=True).to(setup.device)
    h, bag = (part.to(setup.device) for part in ragged_bags(setup))
    bags, (long, mask) = int(bag.max()) + 1, padded(h, bag)
    v, u = (nn.Linear(64, 32).to(setup.device) for _ in range(2))
    w = nn.Linear(32, 1, bias=False).to(setup.device)
    own = theirs.state_dict()
    for mine, name in ((v, "fc1"), (u, "fc_gated"), (w, "fc2")):
        mine.load_state_dict({key.rsplit(".", 1)[1]: value for key, value in own.items() if key.startswith(name + ".")})

    def flat(x: Tensor) -> Tensor:
        return flat_attention_pool(x, gated_attention(x, v, u, w), bag, bags)

    def trained(pooled: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Tensor]:
        def step() -> Tensor:
            leaf = x.detach().requires_grad_(True)
            pooled(leaf).square().sum().backward()
            assert leaf.grad is not None
            return leaf.grad
        return step
    ways = [trained(flat, h), trained(lambda x: theirs(x, mask), long)]
    ours, other = alternating(ways, setup.rounds, setup.device)
    with torch.no_grad():
        apart = float((flat(h) - theirs(long, mask)).abs().max())
    apart = max(apart, float((ways[0]() - ways[1]()[mask > 0]).abs().max()))
    return Comparison(f"attention pooling of {bags} ragged bags, forward and backward", "torchmil, padded bags", "ms",
                      1e3 * ours, 1e3 * other, goal=1.5, difference=apart, tolerance=1e-5,
                      note=f"{len(bag)} patches of 64 numbers; padding itself is not counted")


def run(setup: Setup) -> dict[str, Any]:
    return {"comparisons": [row.as_json() for row in (*windows(setup), heads(setup))]}
