"""How things are measured: alternating rounds for two rivals, fresh processes for memory, and what a record says."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from bench.memory import memory_mb, reset_peak

PRELOAD = ["covidseg.pipeline", "covidseg.predict", "monai.networks.nets", "monai.inferers"]


@dataclass(frozen=True)
class Setup:
    """What all measurements share.

    Attributes:
        device: Where nets compute.
        folder: Folder for files made on the way; removed at the end.
        rounds: How often each way has its turn.
        small: Whether sizes are tiny, for the tests of the benchmark itself; figures mean nothing then.
    """

    device: torch.device
    folder: Path
    rounds: int = 5
    small: bool = False

    def size(self, full: int, small: int) -> int:
        """A size for the real run, or a small one for the tests."""
        return small if self.small else full


@dataclass(frozen=True)
class Comparison:
    """Ours against another way to the same result.

    Attributes:
        task: What is done.
        other_name: What it is compared with.
        unit: Unit of both figures; smaller is better.
        ours: The figure of covidseg.
        other: The figure of the other way.
        goal: The ratio ``other / ours`` that was to be reached; None where there was no goal.
        difference: The largest absolute difference between the two results; None where they are not the same thing.
        tolerance: The largest difference that passes as equal.
        note: What to know when reading the figures.
    """

    task: str
    other_name: str
    unit: str
    ours: float
    other: float
    goal: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    note: str = ""

    @property
    def ratio(self) -> float:
        """How many times as fast (or as small) ours is."""
        return self.other / self.ours

    @property
    def met(self) -> bool | None:
        """Whether the goal was reached, at equal results where they have to be; None without a goal."""
        if self.goal is None:
            return None
        equal = self.tolerance is None or (self.difference is not None and self.difference <= self.tolerance)
        return equal and self.ratio >= self.goal

    def as_json(self) -> dict[str, Any]:
        return {"ratio": round(self.ratio, 3), "met": self.met, **asdict(self)}


@dataclass(frozen=True)
class Limit:
    """One measured figure that has to stay below a limit; without one it is only reported."""

    task: str
    unit: str
    value: float
    limit: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        return None if self.limit is None else self.value <= self.limit

    def as_json(self) -> dict[str, Any]:
        return {"met": self.met, **asdict(self)}


def wait(device: torch.device) -> None:
    """A GPU works on while Python goes on: wait before the clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def alternating(ways: Sequence[Callable[[], Any]], rounds: int,
                device: torch.device = torch.device("cpu")) -> list[float]:
    """Median seconds of each way. They take turns, so that a disturbance meets all; a first turn is not counted."""
    seconds: list[list[float]] = [[] for _ in ways]
    for turn in range(rounds + 1):
        for times, way in zip(seconds, ways, strict=True):
            wait(device)
            start = time.perf_counter()
            way()
            wait(device)
            if turn:
                times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in seconds]


def _report(pipe: Any, threads: int, work: Callable[..., Any], prepare: Callable[..., Any] | None, spend: float,
            arguments: tuple[Any, ...]) -> None:
    try:
        torch.set_num_threads(threads)
        given = arguments if prepare is None else (prepare(*arguments),)
        reset_peak()
        before, seconds, result = memory_mb("VmRSS"), list[float](), None
        while not seconds or sum(seconds) < spend:
            start = time.perf_counter()
            result = work(*given)
            seconds.append(time.perf_counter() - start)
        pipe.send((result, min(seconds), max(0.0, memory_mb("VmHWM") - before)))
    except BaseException as error:
        pipe.send(error)
        raise


def in_fresh_process(work: Callable[..., Any], *arguments: Any, prepare: Callable[..., Any] | None = None,
                     spend: float = 0) -> tuple[Any, float, float]:
    """Calls a function of a module in a process of its own, with the libraries loaded beforehand.

    Args:
        work: what is measured; its result has to be small and picklable.
        arguments: of ``work``, or of ``prepare`` where there is one.
        prepare: makes the one argument of ``work``, before the clock starts and memory is counted.
        spend: seconds for which ``work`` is called again and again; 0 is one call.

    Returns:
        Its result, seconds of the fastest call (the one least disturbed), and MB at the peak above what the process
        held before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, theirs = context.Pipe()
    process = context.Process(target=_report,
                              args=(theirs, torch.get_num_threads(), work, prepare, spend, arguments))
    process.start()
    theirs.close()
    try:
        answer = mine.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} ended with {process.exitcode} and gave no answer") from None
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent ``b`` of the power law ``value = a * size ** b`` that fits best (least squares of logarithms).

    1 is linear growth; below 1, something does not grow along.
    """
    x, y = torch.tensor(sizes).double().log(), torch.tensor(values).double().log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def processor() -> str:
    """Model of the processor; says nothing about who owns the machine."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown"


def say(line: str) -> None:
    """One line of progress."""
    print(line, file=sys.stderr, flush=True)
