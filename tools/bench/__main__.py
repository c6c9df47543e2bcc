"""Command line of ``make bench``: measures, prints ratio first, and records."""

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
from rich.console import Console
from rich.table import Table

from bench.measure import Setup, processor, say, ticking
from covidseg import DISCLAIMER
from covidseg.devices import pick_device
from covidseg.store import environment, write_text

ROOT = Path(__file__).resolve().parents[2]
# In this order. `growth` and `scaling` and the reading of files are about processors; a GPU changes nothing in them.
SECTIONS = ("reading", "lungs", "cams", "patches", "training", "predicting", "growth", "scaling")
ON_GPU = ("lungs", "cams", "patches", "training", "predicting")


def judged(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "NO"


def ratios(sections: dict[str, Any]) -> Table:
    """All comparisons, ratio first."""
    table = Table(title="covidseg against what one would take instead", caption="2 is twice as fast, or half")
    for head, justify in (("ratio", "right"), ("goal", "right"), ("met", "left"), ("task", "left"), ("ours", "right"),
                          ("other", "right"), ("unit", "left"), ("against", "left"), ("difference", "right")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for section in sections.values():
        for row in section.get("comparisons", []):
            table.add_row(f"{row['ratio']:.1f}", "" if row["goal"] is None else f"{row['goal']:g}", judged(row["met"]),
                          row["task"], f"{row['ours']:.3g}", f"{row['other']:.3g}", row["unit"], row["other_name"],
                          "" if row["difference"] is None else f"{row['difference']:.0e}")
    return table


def limits(sections: dict[str, Any]) -> Table:
    """All figures with a limit, and those that are only reported."""
    table = Table(title="figures of their own")
    for head, justify in (("value", "right"), ("limit", "right"), ("met", "left"), ("what", "left"), ("unit", "left")):
        table.add_column(head, justify=justify)  # type: ignore[arg-type]
    for section in sections.values():
        for row in section.get("limits", []):
            table.add_row(f"{row['value']:.4g}", "" if row["limit"] is None else f"{row['limit']:g}",
                          judged(row["met"]), row["task"], row["unit"])
    return table


def rooflines(stages: list[dict[str, Any]]) -> Table:
    """Training stages against the roofline."""
    table = Table(title="training against the roofline of this machine")
    for head in ("stage", "slices/s", "ms a step", "layers need, ms", "share"):
        table.add_column(head, justify="left" if head == "stage" else "right")
    for row in stages:
        table.add_row(row["stage"], f"{row['slices_per_second']:.1f}", f"{row['step_ms']:.0f}",
                      f"{row['bound_ms']:.0f}", f"{row['share']:.0%}")
    return table


def write_record(path: Path, sections: dict[str, Any], small: bool, device: torch.device) -> None:
    """Writes what was measured so far: if a later section fails, the earlier ones are there."""
    content = {"note": DISCLAIMER, "command": "make bench", "device": device.type, "small": small,
               "finished": datetime.now(UTC).isoformat(timespec="seconds"),
               "environment": {**environment(device), "processor": processor(), "cores": os.cpu_count()},
               "sections": sections}
    write_text(path, json.dumps(content, indent=1) + "\n")


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
    before = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() and options.only else {}
    wanted = options.only or (ON_GPU if device.type == "cuda" else SECTIONS)
    sections = dict(before)
    with tempfile.TemporaryDirectory() as folder:
        setup = Setup(device, Path(folder), options.rounds, options.small)
        for name in wanted:
            end, start = ticking(name), time.monotonic()
            load = round(os.getloadavg()[0], 2)  # others at work would show here
            measured = importlib.import_module(f"bench.{name}").run(setup)
            sections[name] = {**measured, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
                              "seconds": round(time.monotonic() - start, 1), "load_before": load}
            end()
            write_record(path, {name: sections[name] for name in SECTIONS if name in sections}, options.small, device)
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(ratios(sections))
    console.print(limits(sections))
    if "training" in sections:
        console.print(rooflines(sections["training"]["roofline"]))
    say(f"{torch.get_num_threads()} threads; record in {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
