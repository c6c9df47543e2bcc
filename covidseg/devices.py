"""What nets run on: a device, its memory, and several processes that ``torchrun`` started.

Several processes train the same net, each on batches of its own, and average their gradients before each step. Torch's
``DistributedDataParallel`` does the same around one ``forward``; a loop of this package calls a net in several pieces,
and some pieces more than once a step, which that class cannot follow. Losses and batch normalisation are those of a
process's own batch, as there. The first process alone reads and writes files and decides what the others go on with
(:func:`from_first`). In a process that is alone these functions do nothing.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from covidseg.errors import ProcessError, SettingsError, one_of

WAIT = timedelta(minutes=30)  # for a process that is silent; one that ended is noticed at once
T = TypeVar("T")


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` takes a CUDA GPU if there is one, else the CPU. Of several processes each takes another GPU.

    Raises:
        SettingsError: there is no such device, or there are fewer GPUs than processes.
    """
    one_of(name, ("auto", "cpu", "cuda"), "device")
    if name == "cuda" and not torch.cuda.is_available():
        raise SettingsError("torch finds no CUDA GPU here", remedy="Take --device cpu, or auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return own_gpu() if name == "cuda" and several() else torch.device(name)


def use_deterministic_kernels() -> None:
    """Makes a GPU give the same weights each time, at some cost in time; a CPU does so anyway.

    Operations for which torch has no such kernel are named in a warning, and so in the report of the run.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first product is computed
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    torch.use_deterministic_algorithms(True, warn_only=True)


def keep_freed_memory() -> bool:
    """Makes Linux's memory allocator (glibc) keep large blocks that were freed, for the next step or slices.

    By default it gives every block above 32 MB back, and the system fills the next one with zeros, page by page. That
    made training slower by a tenth at 160 pixels and by a third at 512. Costs a sixth more memory there.

    Returns:
        Whether the allocator was told; other systems' allocators are left as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # Options M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h, bytes.
    return set_option is not None and all([set_option(-3, 2**30), set_option(-1, 2**31 - 1)])


def made_for_half(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16; older ones imitate it, and are slower for it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


# --- several processes -----------------------------------------------------------------------------------------------

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
    finished = False
    try:
        yield
        with _exchange():
            dist.all_reduce(torch.zeros(1))  # nobody leaves before the first process has written everything
        finished = True
    finally:
        if finished or device.type == "cpu":  # after a fault GPUs might wait for the one that is gone
            dist.destroy_process_group()


def processes() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Number of this process among them, from 0."""
    return dist.get_rank() if processes() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


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


def average_gradients(net: nn.Module) -> None:
    """Puts the gradients of all processes together; to be called between ``backward`` and the optimiser's step."""
    if processes() == 1:
        return
    with _exchange():
        for weight in net.parameters():
            if weight.grad is not None:
                dist.all_reduce(weight.grad)
                weight.grad /= processes()
