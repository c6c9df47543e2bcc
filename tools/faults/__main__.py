"""Command line of ``make faults``: tries everything, prints a table, records it, and fails if anything was missed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from covidseg import DISCLAIMER, __version__
from covidseg.store import write_text
from faults import batches, disks, downloads, files, headers, people, pictures, runs, tables
from faults.supplies import make_supplies
from faults.trial import Fault, Outcome, attempt

ROOT = Path(__file__).resolve().parents[2]
GROUPS: dict[str, list[Fault]] = {module.GROUP: module.FAULTS for module in (
    files, headers, pictures, tables, runs, batches, disks, downloads, people)}


def record(outcomes: dict[str, list[Outcome]]) -> dict[str, Any]:
    """What is kept; nothing in it names a machine, a folder or a day."""
    return {"note": DISCLAIMER, "command": "make faults", "covidseg": __version__,
            "faults": [{"group": group, **outcome.as_json()} for group, found in outcomes.items()
                       for outcome in found]}


def shown(outcomes: dict[str, list[Outcome]]) -> Table:
    """All faults, what was said and how it ended; what is wrong with that in capitals."""
    table = Table(title="faults, and what covidseg says", caption=DISCLAIMER, show_lines=True)
    for head, share in (("fault", 3), ("code", 1), ("error", 2), ("said", 8), ("met", 1)):
        table.add_column(head, ratio=share)
    for group, found in outcomes.items():
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]")
        for outcome in found:
            row = outcome.as_json()
            met = "yes" if row["met"] else f"NO: {'; '.join(outcome.complaints)}"
            table.add_row(escape(row["fault"]), str(row["exit_code"]), row["error"], escape("\n".join(row["said"])),
                          escape(met))
    return table


def main(arguments: list[str] | None = None) -> int:
    """Tries all faults; with ``--only`` those of some groups, without a record."""
    parser = argparse.ArgumentParser(prog="faults", description="Try every fault, and record what covidseg says.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=[], help="only these, and no record")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    outcomes: dict[str, list[Outcome]] = {}
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        supplies = make_supplies(Path(folder))
        for group, faults in GROUPS.items():
            if not options.only or group in options.only:
                outcomes[group] = [attempt(fault, supplies) for fault in faults]
    Console(width=None if sys.stdout.isatty() else 160).print(shown(outcomes))
    if not options.only:
        write_text(options.out / "faults.json", json.dumps(record(outcomes), indent=1) + "\n")
    found = [outcome for group in outcomes.values() for outcome in group]
    missed = [outcome.fault.title for outcome in found if outcome.complaints]
    print(f"{len(found) - len(missed)} of {len(found)} faults were caught as they should be, in "
          f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    for title in missed:
        print(f"missed: {title}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
