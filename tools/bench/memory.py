"""Memory of this process; a module of its own, so that reading it loads no library."""

from __future__ import annotations

from pathlib import Path


def memory_mb(entry: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process in MB, from Linux' process table."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{entry} is not in /proc/self/status")


def reset_peak() -> None:
    """Lets ``VmHWM`` start again from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")
