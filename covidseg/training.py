"""What every training loop shares: seeds, device, precision, averaged weights, schedule, batches made ahead, history.

A stage's loop stands whole in the module of that stage; :class:`Training` holds what would be the same in each::

    training = Training("classifier", settings, seed, device, log)    # seeds come before a net is made
    net = training.begin(Classifier(settings), start)
    for maps, target in training.batches(make_batch, data):
        evidence = training.run(net.maps, maps)
        loss = ...                                                      # what the stage is about
        training.step(loss, loss=loss)
    return training.averaged()
"""

from __future__ import annotations

import copy
import random
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from covidseg.devices import average_gradients, from_first, keep_freed_memory, made_for_half, processes, rank
from covidseg.errors import SettingsError

Log = Callable[[str], None]
Batch = tuple[Tensor, ...]
History = list[dict[str, float]]  # see Training
Net = TypeVar("Net", bound=nn.Module)
T = TypeVar("T")


class LoopSettings(Protocol):
    """What the settings of every stage with a loop have: optimiser steps, slices a step, peak learning rate."""

    @property
    def steps(self) -> int: ...
    @property
    def batch(self) -> int: ...
    @property
    def rate(self) -> float: ...


class Labelled(Protocol):
    """Slices or slabs to draw batches from: ``labels`` ``(N,)`` 0 or 1, ``patients`` ``(N,)`` str."""

    @property
    def labels(self) -> np.ndarray: ...
    @property
    def patients(self) -> np.ndarray: ...


class Training:
    """One training: AdamW with one cycle of the learning rate, and an average of the weights.

    Args:
        name: of this training in the log.
        settings: steps, batch and rate.
        seed: of start weights, batches and augmentation; set when this object is made, so make the net after it.
        device: where the net is trained.
        log: receives one line an epoch.
        lines: epochs.
        weight_decay: of AdamW; at 0 it is Adam.
        cycle: whether the learning rate warms up and decays; otherwise it stays.

    Attributes:
        generator: Source of randomness for batches, on the CPU. Of several processes each has another one.
        seed: For further sources of randomness in making batches; likewise.
        history: Losses so far, an entry an epoch: the step, and the mean of each loss since the entry before.
    """

    def __init__(self, name: str, settings: LoopSettings, seed: int, device: torch.device, log: Log = print, *,
                 lines: int = 6, weight_decay: float = 1e-2, cycle: bool = True) -> None:
        self.settings, self.device = settings, device
        self.generator = seed_everything(seed)
        self.seed = seed + 7919 * rank()
        if processes() > 1:  # the same start weights, but batches of its own for each
            self.generator.manual_seed(self.seed)
        self._weight_decay, self._cycle = weight_decay, cycle
        self._name, self._log, self._every = name, log, max(1, settings.steps // lines)
        self._start, self._number, self._since = time.monotonic(), 0, list[dict[str, float]]()
        self.history: History = []

    def begin(self, net: Net, start: nn.Module | None = None) -> Net:
        """Puts a new net on the device and sets up what trains it.

        Args:
            net: with random weights.
            start: a trained net of the same shape to go on from.
        """
        if start is not None:
            net.load_state_dict(start.state_dict())
        net = on_device(net, self.device)
        self._net = net
        self._average = Average(net).to(self.device)
        self._optimizer = torch.optim.AdamW(net.parameters(), lr=self.settings.rate, weight_decay=self._weight_decay)
        self._schedule = learning_rate(self._optimizer, self.settings.steps) if self._cycle else None
        return net

    def batches(self, make: Callable[[Tensor], Batch], data: Labelled, *,
                hold: Collection[int] = ()) -> Iterator[Batch]:
        """The batches of all steps, half of each with a lesion, on the device.

        Args:
            make: takes the numbers of a batch's slices, ``(B,)`` int64, and returns its tensors, ``(B, ...)`` each.
                Runs in a thread of its own, ahead of the net.
            data: what the numbers are drawn from, see :func:`balanced_batches`.
            hold: steps, from 1, whose batch is made only when the loop has come to it: what it is made of changes
                until then.
        """
        numbers = balanced_batches(data.labels, data.patients, self.own_batch(), self.settings.steps, self.generator)
        return self.prefetched(map(make, numbers), hold=hold)

    def prefetched(self, batches: Iterator[Batch], *, hold: Collection[int] = ()) -> Iterator[Batch]:
        """Batches that the caller makes in a way of its own, on the device, the next ones being made ahead."""
        return overlapped(batches, self.device, hold=hold)

    def own_batch(self) -> int:
        """Slices a step of this process: all of them, or its share.

        Raises:
            SettingsError: a share would be less than one slice of each class.
        """
        share = self.settings.batch // processes()
        if processes() > 1 and share < 2:
            raise SettingsError(f"a batch of {self.settings.batch} slices is too small for {processes()} processes",
                                remedy=f"Start {max(1, self.settings.batch // 2)} processes or fewer")
        return share

    @staticmethod
    def run(function: Callable[..., Tensor], *inputs: Tensor, half: bool | None = None) -> Tensor:
        """Runs a net, or a method of it, on a batch.

        On a GPU it computes in bfloat16 where torch thinks it safe (automatic mixed precision: Micikevicius et al.,
        ICLR 2018), and losses, which are computed from the result, stay in float32.

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
            outputs = function(*inputs)
        return outputs.float() if half else outputs

    def step(self, loss: Tensor, /, **shown: Tensor) -> None:
        """Backward, optimiser, learning rate, average and history; one line an epoch, not a bar that redraws itself.

        Args:
            loss: scalar.
            shown: scalars for log and history, by their names there.
        """
        self._optimizer.zero_grad()
        loss.backward()
        average_gradients(self._net)
        self._optimizer.step()
        if self._schedule is not None:
            self._schedule.step()
        self._average.update(self._net)
        self._number += 1
        self._since.append({name: value.item() for name, value in shown.items()})
        if self._number % self._every == 0 or self._number == self.settings.steps:
            means = {name: sum(each[name] for each in self._since) / len(self._since) for name in shown}
            self.history.append({"step": self._number, **means})
            text = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
            seconds = time.monotonic() - self._start
            self._log(f"{self._name} step {self._number:4d}/{self.settings.steps}  {text}  {seconds:5.1f} s")
            self._since = []

    @property
    def average(self) -> Any:
        """The averaged net so far, in evaluation mode."""
        return self._average.net

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns; of several processes, in the first of them: all have to go on with the same."""
        return from_first(make)

    def averaged(self) -> Any:
        """The averaged net in evaluation mode, of the class that was trained; its ``history`` holds the losses."""
        net: Any = self._average.net.eval()
        net.history = self.history
        return net


def seed_everything(seed: int) -> torch.Generator:
    """Seeds Python, NumPy and torch, and returns a CPU generator for batches and augmentation."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  libraries underneath draw from the global state
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def on_device(net: Net, device: torch.device) -> Net:
    """The net on the device where it is to be trained, its weights with channels last: a third faster on a CPU.

    Convolutions in three dimensions have no such layout and stay as they are.
    """
    if device.type == "cpu":
        keep_freed_memory()
    if any(weight.dim() > 4 for weight in net.parameters()):
        return net.to(device)
    return net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


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
