"""What a process holds, and whether it holds more after each round of some work."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bench.command import memory_mb, reset_peak
from matplotlib import pyplot as plt

LOOKS = 4


@dataclass(frozen=True)
class Held:
    """What this process holds: memory in MB, open files, threads, and figures that pyplot keeps."""

    memory: float
    files: int
    threads: int
    figures: int


def tidy() -> None:
    """Gives back what nobody uses, so that what is held shows."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc keeps freed memory for later
    if trim is not None:
        trim(0)


def held() -> Held:
    tidy()
    return Held(memory_mb("VmRSS"), len(os.listdir("/proc/self/fd")), threading.active_count(), len(plt.get_fignums()))


def growth(work: Callable[[], object], rounds: int, warm_up: int = 3, *, most_mb: float) -> list[str]:
    """What grew while some work was repeated; empty if nothing did.

    Memory is looked at several times on the way: what leaks grows each time, while freed memory that is left in pieces
    grows now and then.

    Args:
        work: one round.
        rounds: how often it is repeated.
        warm_up: rounds before that, in which caches may fill.
        most_mb: memory in MB that counts as noise.
    """
    for _ in range(warm_up):
        work()
    looks, parts = [held()], min(LOOKS, rounds)
    for part in range(parts):
        for _ in range(part, rounds, parts):
            work()
        looks.append(held())
    leaked = parts * min(after.memory - before.memory for before, after in pairwise(looks))
    return [f"memory grew by {leaked:.1f} MB"] * (leaked > most_mb) + [
        f"{more} more {what}" for what in ("files", "threads", "figures")
        if (more := getattr(looks[-1], what) - getattr(looks[0], what)) > 0]


def peak_mb(work: Callable[[], object]) -> float:
    """The most memory in MB that some work needs above what the process held before."""
    tidy()
    reset_peak()
    before = memory_mb("VmRSS")
    work()
    return memory_mb("VmHWM") - before


def content(folder: Path) -> dict[str, bytes]:
    """All files of a folder, hidden ones as well, but for reports, which hold times."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and path.parent.name != "parts"}
