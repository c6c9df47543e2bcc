"""The command line, measured from outside: seconds from start to end, and the most memory that it held.

``python -m bench.command FILE ARGUMENTS`` is ``covidseg ARGUMENTS``, and writes its peak memory to FILE at the end.
Importing this module loads no library, so that the memory is the command's own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

TOOLS = Path(__file__).resolve().parents[1]


def memory_mb(entry: str) -> float:
    """``VmRSS`` (now) or ``VmHWM`` (the most so far) of this process in MB, from Linux' process table."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"{entry} is not in /proc/self/status")


def reset_peak() -> None:
    """Lets ``VmHWM`` start again from what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


def environment(**more: str) -> dict[str, str]:
    """This process' variables, with the modules of the benchmark on Python's path."""
    paths = [str(TOOLS.parent), str(TOOLS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def covidseg(folder: Path, *arguments: str | Path, **variables: str) -> tuple[float, float]:
    """Runs one command of covidseg in a process of its own.

    Args:
        folder: where the peak is written on the way.
        variables: of the environment, such as ``OMP_NUM_THREADS``.

    Returns:
        Seconds, start of Python and imports included, and peak memory in MB.

    Raises:
        RuntimeError: the command failed; with what it printed.
    """
    peak, start = folder / "peak.txt", time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "bench.command", peak, *map(str, arguments)], check=False, text=True,
                          capture_output=True, env=environment(**variables))
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"covidseg {arguments[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds, float(peak.read_text())


def main() -> None:
    """Runs the command that the arguments hold."""
    peak = Path(sys.argv[1])
    sys.argv = ["covidseg", *sys.argv[2:]]
    from covidseg.cli import main as command

    try:
        command()
    finally:
        peak.write_text(str(memory_mb("VmHWM")))


if __name__ == "__main__":
    main()
