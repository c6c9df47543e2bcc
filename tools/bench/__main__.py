"""Command line of ``make bench``: measures, records, and prints the tables of the book, ratio first."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.measure import Setup, processor, say
from covidseg import DISCLAIMER
from covidseg.book.results import bench_markdown
from covidseg.devices import pick_device
from covidseg.store import environment, write_text

ROOT = Path(__file__).resolve().parents[2]
# In this order; a GPU changes nothing in the others.
SECTIONS = ("reading", "lungs", "cams", "patches", "training", "predicting", "growth", "scaling")
ON_GPU = ("lungs", "cams", "patches", "training", "predicting")


def record(sections: dict[str, Any], small: bool, device: torch.device) -> dict[str, Any]:
    """What was measured so far, as JSON."""
    return {"note": DISCLAIMER, "command": "make bench", "device": device.type, "small": small,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": {**environment(device), "processor": processor(), "cores": os.cpu_count()},
            "sections": {name: sections[name] for name in SECTIONS if name in sections}}


def main(arguments: list[str] | None = None) -> int:
    """Runs the sections and writes ``bench-DEVICE.json``; a section that was not asked for keeps its last figures."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure covidseg's speed side by side.")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[], help="measure only these")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each rival")
    parser.add_argument("--small", action="store_true", help="tiny sizes: does it run at all?")
    options = parser.parse_args(arguments)
    device = pick_device(options.device)
    path = options.out / f"bench-{device.type}.json"
    sections = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() and options.only else {}
    wanted = options.only or (ON_GPU if device.type == "cuda" else SECTIONS)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(device, Path(folder), options.rounds, options.small)
        for name in wanted:
            start = time.monotonic()
            say(f"{name} ...")
            load = round(os.getloadavg()[0], 2)  # others at work would show here
            measured = importlib.import_module(f"bench.{name}").run(setup)
            sections[name] = {**measured, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                              "seconds": round(time.monotonic() - start, 1), "load_before": load}
            content = record(sections, options.small, device)  # if a later section fails, the earlier ones are there
            write_text(path, json.dumps(content, indent=1) + "\n")
    for kind in ("comparisons", "limits", "roofline"):
        print(bench_markdown(content, kind) + "\n")
    say(f"{torch.get_num_threads()} threads; record in {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
