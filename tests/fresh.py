"""Work for fresh processes, which have to import it: a module that needs nothing."""

from __future__ import annotations

import itertools
import time

_calls = itertools.count(1)


def hold(megabytes: int) -> int:
    return len(bytearray(megabytes << 20))


def prepare(megabytes: int) -> bytes:
    return b"x" * (megabytes << 20)


def measured_length(given: bytes) -> int:
    return len(given)


def fail() -> None:
    raise ValueError("broken")


def slow_at_first() -> int:
    """Says how often it was called."""
    count = next(_calls)
    time.sleep(1.5 if count == 1 else 0.05)
    return count
