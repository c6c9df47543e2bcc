"""Training in several processes that ``torchrun`` started: each computes its share of every batch.

All processes draw and prepare the same batches from the same seeds, each runs the net on its share, and the shares of
the result are gathered, so that every process computes the same loss on the whole batch. Losses that do not add up over
slices, such as soft Dice, thus stay what they are. Two things have to be put together on the way: the statistics of
batch normalisation (:class:`WholeBatchNorm2d`) and the gradients (:func:`average_gradients`). The weights that come out
are those of one process, but for the order in which numbers were added.

The first process alone reads and writes files and decides what the others go on with (:func:`from_first`). In a process
that is alone all functions here do nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from covidseg.errors import ProcessError, SettingsError

WAIT = timedelta(minutes=30)  # for a process that is silent; one that ended is noticed at once
T = TypeVar("T")


def several() -> bool:
    """Whether this process was started as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def own_gpu() -> torch.device:
    """The GPU of this process: each takes another one.

    Raises:
        SettingsError: there are fewer GPUs than processes on this machine.
    """
    number, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if number >= there:
        raise SettingsError(f"process {number + 1} on this machine finds only {there} GPUs",
                            remedy=f"Start it with --nproc-per-node {there}, or with --device cpu")
    return torch.device("cuda", number)


@contextmanager
def joined(device: torch.device, wait: timedelta = WAIT) -> Iterator[None]:
    """Joins the other processes, and waits for them at the end; a process that is alone goes on alone.

    Args:
        device: on which this process computes.
        wait: for how long a process may keep the others waiting.

    Raises:
        SettingsError: the environment names several processes, but says nothing about how to find them.
        ProcessError: they do not find each other, or (anywhere inside) one of them ended or keeps silent.
    """
    if not several():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        with _exchange():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=wait)
    except ValueError as error:
        raise SettingsError(f"this process should be one of several and was not told where the others are ({error})",
                            remedy="Start it by torchrun, or without the variable WORLD_SIZE") from error
    well = False
    try:
        yield
        with _exchange():
            dist.all_reduce(torch.zeros(1))  # nobody leaves before the first process has written everything
        well = True
    finally:
        if well or device.type == "cpu":     # after a fault GPUs might wait for the one that is gone
            dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes."""
    return processes() == 1 or dist.get_rank() == 0


@contextmanager
def _exchange() -> Iterator[None]:
    """Turns the errors of torch's communication into one that says what happened."""
    try:
        yield
    except RuntimeError as error:
        text = re.sub(r"^\[[^\]]*\]\s*", "", str(error).strip().splitlines()[0])     # without a place in the source
        if re.search("time(d)? ?out", text, re.IGNORECASE):
            fault = "another process of this training does not answer"
        elif re.search("closed|reset|broken pipe|refused", text, re.IGNORECASE):
            fault = "another process of this training has ended"
        else:
            fault = "the processes of this training cannot exchange data"
        raise ProcessError(f"{fault} ({text})",
                           remedy="Start the same command again: it goes on with the last stored stage") from error


def from_first(make: Callable[[], T]) -> T:
    """What ``make()`` returns in the first process, for all of them; the others do not call it."""
    if processes() == 1:
        return make()
    box: list[Any] = [make() if is_first() else None]
    with _exchange():
        dist.broadcast_object_list(box)
    return box[0]


# --- shares of a batch ----------------------------------------------------------------------------------------------

def _sizes(count: int) -> list[int]:
    """Sizes of the shares of a batch of ``count`` slices: as even as can be, empty if there are fewer slices."""
    number = processes()
    return [count // number + (k < count % number) for k in range(number)]


def own_share(batch: Tensor) -> Tensor:
    """The part of ``(B, ...)`` that this process computes."""
    return batch.split(_sizes(len(batch)))[dist.get_rank()] if processes() > 1 else batch


def gathered(share: Tensor, count: int) -> Tensor:
    """The shares of all processes put together, ``(count, ...)``; gradients go back to where a share was computed."""
    return _Gather.apply(share, _sizes(count)) if processes() > 1 else share


class _Gather(torch.autograd.Function):
    """All processes compute the same loss from the result, so that each already has the whole gradient of its share.

    It is multiplied by their number since :func:`average_gradients` divides by it. Weights that every process uses on
    the whole batch, outside of the shares, have the same gradient everywhere, and so its average.
    """

    @staticmethod
    def forward(context: Any, share: Tensor, sizes: list[int]) -> Tensor:
        context.sizes = sizes
        padded = share.new_zeros(max(sizes), *share.shape[1:])      # shares of one size can be exchanged
        padded[:len(share)] = share
        parts = [torch.empty_like(padded) for _ in sizes]
        with _exchange():
            dist.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return len(context.sizes) * gradients[0].split(context.sizes)[dist.get_rank()], None


def average_gradients(net: nn.Module) -> None:
    """Puts the gradients of all processes together; to be called between ``backward`` and the optimiser's step."""
    if processes() == 1:
        return
    gradients = [weight.grad for weight in net.parameters() if weight.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with _exchange():
        dist.all_reduce(flat)
    flat /= processes()
    for gradient, part in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(part.view(gradient.shape))


# --- batch normalisation --------------------------------------------------------------------------------------------

class _Sum(torch.autograd.Function):
    """Sum over all processes. What each adds changes the results of all, so their gradients are summed as well."""

    @staticmethod
    def forward(context: Any, own: Tensor) -> Tensor:
        return _summed(own)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        return _summed(gradients[0])


def _summed(own: Tensor) -> Tensor:
    total = own.clone(memory_format=torch.contiguous_format)
    with _exchange():
        dist.all_reduce(total)
    return total


class WholeBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of the whole batch, of which each process holds a share.

    Torch's own, ``SyncBatchNorm``, needs GPUs. Names and shapes of the weights are those of ``BatchNorm2d``, so that
    either loads what the other stored; in evaluation, or in a process that is alone, this is one.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        if not self.training or processes() == 1:
            return super().forward(inputs)
        full = inputs.float() if inputs.dtype in (torch.bfloat16, torch.float16) else inputs    # (b, C, H, W)
        count = full.new_tensor([full.numel() // full.shape[1]])                                # an empty share: 0
        sums = _Sum.apply(torch.cat([full.sum((0, 2, 3)), count]))                              # (C + 1,)
        number = sums[-1].detach()
        mean = sums[:-1] / number
        centred = full - mean[:, None, None]
        variance = _Sum.apply(centred.square().sum((0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
            self.running_mean.lerp_(mean, self.momentum)  # type: ignore[arg-type, union-attr]
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)  # type: ignore[arg-type, union-attr]
        scale = self.weight * (variance + self.eps).rsqrt()
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(inputs.dtype)


def with_whole_batch_norms(net: nn.Module) -> None:
    """Replaces the batch normalisations of a net that several processes train; others keep theirs."""
    if processes() == 1:
        return
    for module in list(net.modules()):
        for name, child in module.named_children():
            if type(child) is nn.BatchNorm2d:
                whole = WholeBatchNorm2d(child.num_features, child.eps, child.momentum).to(child.weight)
                whole.load_state_dict(child.state_dict())
                setattr(module, name, whole)
