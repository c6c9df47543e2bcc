"""More than one process: training under torchrun, and prediction in parts.

``python -m bench.scaling STEPS FILE`` is one process of a training.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.command import TOOLS, environment
from bench.measure import Setup
from bench.volumes import write_volume

GRIDS = ((1, 1), (1, 2), (2, 1))       # processes and threads of each, for training
WORKERS = (1, 2, 4)                    # processes at a time, for prediction
SCANS = 8


def trained(folder: Path, processes: int, threads: int, steps: int) -> float:
    """Milliseconds of one training step of the segmenter in so many processes."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] \
        if processes > 1 else []
    target = folder / "step.txt"
    done = subprocess.run([sys.executable, *launcher, "-m", "bench.scaling", str(steps), str(target)], check=False,
                          capture_output=True, text=True, env=environment(OMP_NUM_THREADS=str(threads)))
    if done.returncode:
        raise RuntimeError(f"training in {processes} processes ended with {done.returncode}:\n{done.stderr}")
    return float(target.read_text())


def predicted(scans: list[Path], out: Path, workers: int) -> float:
    """Seconds for all scans in as many parts as there are processes, one thread each."""
    start = time.perf_counter()
    running = [subprocess.Popen(
        [sys.executable, "-m", "covidseg", "predict", *map(str, scans), "-o", str(out), "--part", f"{k}/{workers}",
         "--device", "cpu"], env=environment(OMP_NUM_THREADS="1"), stdout=subprocess.DEVNULL, cwd=TOOLS.parent)
        for k in range(1, workers + 1)]
    if any([process.wait() for process in running]):
        raise RuntimeError(f"prediction in {workers} parts failed")
    return time.perf_counter() - start


def run(setup: Setup) -> dict[str, Any]:
    steps = setup.size(24, 2)
    training = []
    for processes, threads in GRIDS:
        step = float(np.median([trained(setup.folder, processes, threads, steps)
                                for _ in range(1 if setup.small else 3)]))
        training.append({"processes": processes, "threads": threads, "step_ms": round(step, 2)})
    scans = []
    for k in range(setup.size(SCANS, 2)):
        scans.append(write_volume(setup.folder / "scans" / f"scan{k}.nii.gz", setup.size(24, 4), setup.size(512, 192)))
    prediction = [{"processes": workers, "threads": 1,
                   "seconds": round(predicted(scans, setup.folder / f"out{workers}", workers), 2)}
                  for workers in (WORKERS if not setup.small else WORKERS[:2])]
    return {"cores": os.cpu_count(), "training": training, "prediction": prediction, "scans": len(scans)}


def worker() -> None:
    """One process of a training that torchrun started, or the only one."""
    steps, target = int(sys.argv[1]), Path(sys.argv[2])

    from bench.training import silent, soft_targets, step_seconds
    from bench.volumes import weak_set
    from covidseg.devices import is_first, joined, pick_device
    from covidseg.profiles import profile_named
    from covidseg.segmenter import certainty, train_segmenter

    data = weak_set()
    targets = soft_targets(data)
    settings = replace(profile_named("quick").segmenter, refresh=())
    device = pick_device("cpu")
    with joined(device):

        def training(n: int) -> None:
            train_segmenter(data, targets, certainty(targets), replace(settings, steps=n), device=device, log=silent)
        training(2)
        seconds = step_seconds(training, device, max(1, steps // 6), steps)
        if is_first():
            target.write_text(str(1e3 * seconds))


if __name__ == "__main__":
    worker()
