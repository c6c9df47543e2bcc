"""Work for fresh processes, which have to import it: a module that needs nothing."""

from __future__ import annotations

from collections.abc import Callable


def hold(megabytes: int) -> Callable[[], int]:
    return lambda: len(bytearray(megabytes << 20))


def measure_length(megabytes: int) -> Callable[[], int]:
    given = b"x" * (megabytes << 20)
    return lambda: len(given)


def fail() -> Callable[[], int]:
    raise ValueError("broken")
