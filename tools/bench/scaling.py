"""Prediction by more than one process: each does a part of the scans."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench.command import TOOLS, environment
from bench.measure import Setup
from bench.volumes import write_volume

PROCESSES = (1, 2, 4)
SCANS = 8


def predicted(scans: list[Path], out: Path, processes: int) -> float:
    """Seconds for all scans in as many parts as there are processes, one thread each."""
    start = time.perf_counter()
    running = [subprocess.Popen(
        [sys.executable, "-m", "covidseg", "predict", *map(str, scans), "-o", str(out), "--part", f"{k}/{processes}",
         "--device", "cpu"], env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, cwd=TOOLS.parent)
        for k in range(1, processes + 1)]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"prediction in {processes} parts failed")
    return time.perf_counter() - start


def run(setup: Setup) -> dict[str, Any]:
    """Measures all numbers of processes, on equal scans."""
    scans = [write_volume(setup.folder / "scans" / f"scan{k}.nii.gz", setup.size(24, 4), setup.size(512, 192))
             for k in range(setup.size(SCANS, 2))]
    rows = [{"processes": processes, "threads": 1,
             "seconds": round(predicted(scans, setup.folder / f"out{processes}", processes), 2)}
            for processes in PROCESSES[:setup.size(3, 2)]]
    return {"cores": os.cpu_count(), "prediction": rows, "scans": len(scans)}
