"""What the training loops of all stages share: seeds, balanced batches made ahead, augmentation, an averaged net.

There is no trainer class. Each stage has its own short loop in its own module and takes these parts from here.
"""

from __future__ import annotations

import copy
import ctypes
import os
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from covidseg.errors import SettingsError, one_of
from covidseg.parallel import gathered, own_gpu, own_share, several, with_whole_batch_norms

Log = Callable[[str], None]
Batch = tuple[Tensor, ...]


def seed_everything(seed: int) -> torch.Generator:
    """Seeds Python, NumPy and torch, and returns a CPU generator for batches and augmentation."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries underneath draw from the global state
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


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


Net = TypeVar("Net", bound=nn.Module)


def on_device(net: Net, device: torch.device) -> Net:
    """The net on the device where it is to be trained, its weights with channels last: a third faster on a CPU.

    Where several processes train it, its batch normalisations are replaced by those of the whole batch.
    """
    with_whole_batch_norms(net)
    if device.type == "cpu":
        keep_freed_memory()
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


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


def balanced_batches(labels: np.ndarray, patients: np.ndarray, batch: int, steps: int,
                     generator: torch.Generator) -> Iterator[Tensor]:
    """Index batches in which neither class nor patient can be guessed from how often it comes.

    Half of each batch is positive. Within a class every patient is equally likely, and so is every slice of a
    patient, so that a net gains nothing by recognising the scanner or the window of a volume.

    Yields:
        ``(batch,)`` int64, ``steps`` times.
    """
    pools = {}
    for label in (0, 1):
        of_class = np.flatnonzero(labels == label)
        pools[label] = [torch.as_tensor(of_class[patients[of_class] == p]) for p in np.unique(patients[of_class])]
    for _ in range(steps):
        picks = []
        for k in range(batch):
            pool = pools[k % 2]
            slices = pool[int(torch.randint(len(pool), (1,), generator=generator))]
            picks.append(slices[int(torch.randint(len(slices), (1,), generator=generator))])
        yield torch.stack(picks)


def overlapped(batches: Iterator[Batch], device: torch.device, *, ahead: int = 2,
               hold: Collection[int] = ()) -> Iterator[Batch]:
    """The same batches on a device, the next ones being made in a thread of their own while a net computes.

    One thread makes all of them in turn, so that random numbers are drawn in the order in which a plain loop draws
    them. It computes on one core; NumPy and torch let go of Python's lock meanwhile.

    Args:
        batches: makes each batch when asked for it; what it raises, the consumer gets.
        device: where the batches are wanted.
        ahead: so many batches are made before they are asked for.
        hold: numbers, from 1, of batches that are begun only when they are asked for, because what they are made of
            changes until then.
    """
    begun: deque[Future[Batch | None]] = deque()
    number = asked = 0
    worker = ThreadPoolExecutor(1, "batches")
    try:
        threads = torch.get_num_threads()
        worker.submit(_use_one_core, device).result()
        torch.set_num_threads(threads)                      # torch gives the last number set to threads yet to come
        while True:
            asked += 1
            while number < asked + ahead and (number < asked or number + 1 not in hold):
                number += 1
                begun.append(worker.submit(_next_batch, batches, pinned=device.type == "cuda"))
            batch = begun.popleft().result()
            if batch is None:
                return
            yield tuple(part.to(device, non_blocking=True) for part in batch)
    finally:
        worker.shutdown(cancel_futures=True)


def _next_batch(batches: Iterator[Batch], pinned: bool) -> Batch | None:
    """The next batch, None after the last; in pinned memory, from where a GPU fetches it while it computes."""
    batch = next(batches, None)
    return tuple(part.pin_memory() for part in batch) if pinned and batch is not None else batch


def _use_one_core(device: torch.device) -> None:
    """Makes the thread that calls it leave the other cores to the net, and use the same GPU."""
    torch.get_num_threads()                                 # the first question in a thread undoes what was set before
    torch.set_num_threads(1)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


def made_for_half(device: torch.device) -> bool:
    """Whether a device is a GPU that computes in bfloat16; older ones imitate it, and are slower for it."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def run_net(function: Callable[..., Tensor], *inputs: Tensor, half: bool | None = None) -> Tensor:
    """Runs a net, or a method of it, on a batch; all training loops run theirs through here.

    Of several processes each runs it on a share of the batch, and all of them get the whole result.

    On a GPU it computes in bfloat16 where torch thinks it safe (automatic mixed precision: Micikevicius et al., ICLR
    2018), and losses, which are computed from the result, stay in float32.

    Args:
        function: takes the inputs and returns one tensor ``(B, ...)``.
        inputs: ``(B, ...)`` each.
        half: whether to compute in bfloat16; by default on GPUs that are made for it.

    Returns:
        ``(B, ...)`` in full precision.
    """
    device = inputs[0].device
    half = made_for_half(device) if half is None else half
    with torch.autocast(device.type, torch.bfloat16, enabled=half):
        outputs = function(*map(own_share, inputs))
    return gathered(outputs.float() if half else outputs, len(inputs[0]))


class Average(nn.Module):
    """Exponential moving average of a net's weights: steadier than the net itself (Tarvainen and Valpola, 2017)."""

    def __init__(self, net: nn.Module, decay: float = 0.98) -> None:
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).eval()
        self.decay = decay
        self.steps = 0

    @torch.no_grad()
    def update(self, net: nn.Module) -> None:
        """Moves towards ``net``; the first steps move faster, so that the random start is soon forgotten."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 9))
        for mine, new in zip(self.net.state_dict().values(), net.state_dict().values(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(new, 1 - decay)
            else:
                mine.copy_(new)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.net(*inputs)


def learning_rate(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.OneCycleLR:
    """One warm-up and one decay over the whole training (Smith and Topin, 2018)."""
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=steps, pct_start=0.15)


class Progress:
    """Prints one line an epoch: a bar that redraws itself would leave hundreds of lines in a rendered page."""

    def __init__(self, stage: str, steps: int, lines: int, log: Log = print) -> None:
        self.stage, self.steps, self.every, self.log = stage, steps, max(1, steps // lines), log
        self.start, self.sums, self.count, self.history = time.monotonic(), {}, 0, []  # type: ignore[var-annotated]

    def step(self, number: int, **losses: float) -> None:
        """Adds the losses of step ``number`` (from 1) and prints their mean once an epoch."""
        for name, value in losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.count += 1
        if number % self.every == 0 or number == self.steps:
            means = {name: total / self.count for name, total in self.sums.items()}
            self.history.append({"step": number, **means})
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            seconds = time.monotonic() - self.start
            self.log(f"{self.stage} step {number:4d}/{self.steps}  {text}  {seconds:5.1f} s")
            self.sums, self.count = {}, 0
