"""How things are measured: alternating rounds for two rivals, fresh processes for memory, and what a record says."""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.command import memory_mb, reset_peak

PRELOAD = ["covidseg.pipeline", "covidseg.predict", "monai.networks.nets", "monai.inferers"]


@dataclass(frozen=True)
class Setup:
    """What all measurements share.

    Attributes:
        device: Where nets compute.
        folder: For files made on the way; removed at the end.
        rounds: How often each way has its turn.
        small: Whether sizes are tiny, for tests of the benchmark; figures mean nothing then.
    """

    device: torch.device
    folder: Path
    rounds: int = 5
    small: bool = False

    def size(self, full: int, small: int) -> int:
        """A size for the real run, or a small one for the tests."""
        return small if self.small else full


def comparison(task: str, other_name: str, unit: str, ours: float, other: float, *, goal: float | None = None,
               difference: float | None = None, tolerance: float | None = None, note: str = "") -> dict[str, Any]:
    """A row of the record: ours against another way to the same result.

    Args:
        task: what is done.
        other_name: what it is compared with.
        unit: of both figures; smaller is better.
        ours: the figure of covidseg.
        other: the figure of the other way.
        goal: the ratio ``other / ours`` that was to be reached, at equal results where they have to be.
        difference: the largest absolute difference between the two results; None where they are not the same thing.
        tolerance: the largest difference that passes as equal.
        note: what to know when reading the figures.

    Returns:
        These, how many times as fast (or as small) ours is, and whether the goal was met; None without a goal.
    """
    equal = tolerance is None or (difference is not None and difference <= tolerance)
    return {"ratio": round(other / ours, 3), "met": None if goal is None else equal and other / ours >= goal,
            "task": task, "other_name": other_name, "unit": unit, "ours": ours, "other": other, "goal": goal,
            "difference": difference, "tolerance": tolerance, "note": note}


def limited(task: str, unit: str, value: float, limit: float | None = None, note: str = "") -> dict[str, Any]:
    """A row of the record: one figure that has to stay below a limit; without one it is only reported."""
    return {"met": None if limit is None else value <= limit, "task": task, "unit": unit, "value": value,
            "limit": limit, "note": note}


def timed(work: Callable[[], Any], device: torch.device = torch.device("cpu")) -> float:
    """Seconds of one call. A GPU works on while Python goes on, so it is waited for before the clock is read."""
    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()
    start = now()
    work()
    return now() - start


def alternating(ways: Sequence[Callable[[], Any]], rounds: int,
                device: torch.device = torch.device("cpu")) -> list[float]:
    """Median seconds of each way. They take turns, so that a disturbance meets all; a first turn is not counted."""
    turns = [[timed(way, device) for way in ways] for _ in range(rounds + 1)]
    return [statistics.median(times) for times in zip(*turns[1:], strict=True)]


def _report(pipe: Any, threads: int, prepare: Callable[..., Callable[[], Any]], arguments: tuple[Any, ...],
            spend: float) -> None:
    try:
        torch.set_num_threads(threads)
        work = prepare(*arguments)
        reset_peak()
        before, seconds, results = memory_mb("VmRSS"), list[float](), list[Any]()
        while not seconds or sum(seconds) < spend:
            seconds.append(timed(lambda: results.append(work())))
        pipe.send((results[-1], min(seconds), max(0.0, memory_mb("VmHWM") - before)))
    except BaseException as error:
        pipe.send(error)
        raise


def in_fresh_process(prepare: Callable[..., Callable[[], Any]], *arguments: Any,
                     spend: float = 0) -> tuple[Any, float, float]:
    """Measures work in a process of its own, with the libraries loaded beforehand.

    Args:
        prepare: a function of a module. It returns the work, whose result has to be small and picklable; what it makes
            for that counts neither as time nor as memory.
        arguments: of ``prepare``.
        spend: seconds for which the work is done again and again; 0 is once.

    Returns:
        Its result, seconds of the fastest call (the one least disturbed), and MB at the peak above what the process
        held before.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    mine, theirs = context.Pipe()
    process = context.Process(target=_report, args=(theirs, torch.get_num_threads(), prepare, arguments, spend))
    process.start()
    theirs.close()
    try:
        answer = mine.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{prepare.__name__} ended with {process.exitcode} and gave no answer") from None
    process.join()
    if isinstance(answer, BaseException):
        raise answer
    return answer


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Exponent ``b`` of the power law ``value = a * size ** b`` that fits best (least squares of logarithms).

    1 is linear growth; below 1, something does not grow along.
    """
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


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
