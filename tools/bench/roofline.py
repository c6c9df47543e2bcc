"""How fast could a training step be? A roofline: the machine's arithmetic and memory against what the layers need.

A layer cannot be faster than its multiplications at the speed of a large matrix product, nor than reading its input and
weights and writing its output at the speed of a large copy (Williams et al., CACM 2009). The sum over all layers,
three times for a training step (forward, and backward to the input and to the weights), is a bound for a library that
runs layer by layer. What a measured step takes beyond it goes to preparing batches, losses, optimiser, and to layers
that do not reach the machine's speed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.measure import timed

BACKWARD_AND_FORWARD = 3


@dataclass(frozen=True)
class Machine:
    """Speeds that were measured: multiplications and additions a second, and bytes a second read or written."""

    operations: float
    bandwidth: float


def seconds_of(layers: list[tuple[float, float]], machine: Machine) -> tuple[float, float]:
    """Shortest time of a training step: the bound of the roofline, and that of the arithmetic alone.

    Args:
        layers: operations and bytes of each call on the way forward, see :func:`counted`.
        machine: what computes.
    """
    bound = sum(max(operations / machine.operations, moved / machine.bandwidth) for operations, moved in layers)
    arithmetic = sum(operations for operations, _ in layers) / machine.operations
    return BACKWARD_AND_FORWARD * bound, BACKWARD_AND_FORWARD * arithmetic


def measure_machine(device: torch.device, side: int = 2048, copies: int = 1 << 26) -> Machine:
    """Best of several large matrix products (float32, or bfloat16 on a GPU, as the nets compute) and large copies."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    a = torch.randn(side, side, device=device, dtype=kind)
    b = torch.empty(copies, device=device)
    target = torch.empty_like(b)

    def best(work: Callable[[], Any]) -> float:
        return min(timed(work, device) for _ in range(6))
    return Machine(2 * side ** 3 / best(lambda: a @ a), 2 * b.nbytes / best(lambda: target.copy_(b)))


def operations_of(layer: nn.Module, output: Tensor) -> float:
    """Multiplications and additions of one call of a layer; 0 for layers that only pass numbers on."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        return 2.0 * output.numel() * layer.weight[0].numel()
    if isinstance(layer, nn.ConvTranspose2d):
        return 2.0 * output.numel() * layer.weight[:, 0].numel() / (layer.stride[0] * layer.stride[1])
    return 0.0


def counted(work: Callable[[], Any]) -> list[tuple[float, float]]:
    """Calls ``work`` and counts all layers without layers inside that run with gradients.

    Returns:
        Operations of each call of a layer, and the bytes that it read and wrote.
    """
    seen = list[tuple[float, float]]()

    def count(layer: nn.Module, inputs: Any, output: Any) -> None:
        if next(layer.children(), None) is not None or not isinstance(output, Tensor) or not torch.is_grad_enabled():
            return
        weights = sum(parameter.nbytes for parameter in layer.parameters())
        read = sum(i.nbytes for i in inputs if isinstance(i, Tensor))
        seen.append((operations_of(layer, output), weights + read + output.nbytes))
    hook = nn.modules.module.register_module_forward_hook(count)
    try:
        work()
    finally:
        hook.remove()
    return seen
