"""Work for fresh processes, which have to import it: a module that needs nothing."""

from __future__ import annotations


def hold(megabytes: int) -> int:
    return len(bytearray(megabytes << 20))


def prepare(megabytes: int) -> bytes:
    return b"x" * (megabytes << 20)


def measured_length(given: bytes) -> int:
    return len(given)


def fail() -> None:
    raise ValueError("broken")
