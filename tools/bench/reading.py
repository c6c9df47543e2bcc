"""Reading a compressed NIfTI volume: ``read_scan`` against nibabel's ``get_fdata``."""

from __future__ import annotations

import statistics
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from bench.measure import Setup, comparison, in_fresh_process
from bench.volumes import write_volume
from covidseg.data.scan import read_scan


def ours(path: Path) -> float:
    return float(read_scan(path).pixels[0].sum(dtype=np.int64))


def theirs(path: Path) -> float:
    return float(nib.load(path).get_fdata()[..., 0].sum())  # type: ignore[attr-defined]


def integers(path: Path) -> float:
    return float(np.asanyarray(nib.load(path).dataobj)[..., 0].sum(dtype=np.int64))  # type: ignore[attr-defined]


def run(setup: Setup) -> dict[str, Any]:
    slices = setup.size(300, 8)
    path = write_volume(setup.folder / "reading.nii.gz", slices, setup.size(512, 64))
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    sums = {}
    for turn in range(setup.rounds + 1):
        for function in (ours, theirs, integers):
            sums[function.__name__], taken, peak = in_fresh_process(partial, function, path)
            if turn:  # the first turn brings the file into memory
                seconds.setdefault(function.__name__, []).append(taken)
                memory[function.__name__] = peak
    time = {name: statistics.median(values) for name, values in seconds.items()}
    what, checked = f"a volume of 512 x 512 x {slices}", "covidseg checks the CRC, nibabel does not"
    other = "nibabel, get_fdata()"
    rows = [comparison(f"reading {what}", other, "s", time["ours"], time["theirs"], goal=3, note=checked),
            comparison(f"memory for reading {what}", other, "MB", memory["ours"], memory["theirs"],
                       goal=4, note="above what the process held before; int16 here, float64 there"),
            comparison(f"reading {what}", "nibabel, integers", "s", time["ours"], time["integers"], note=checked)]
    if len(set(sums.values())) > 1:
        raise RuntimeError(f"the readers disagree: {sums}")
    return {"comparisons": rows, "megabytes": round(path.stat().st_size / 1e6, 1)}
