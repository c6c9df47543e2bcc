"""Command line of ``make faults``: tries everything, records what was said, and fails if anything was missed."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from covidseg import DISCLAIMER, __version__
from covidseg.store import write_text
from faults import batches, dicom, disks, downloads, files, people, pictures, runs, tables
from faults.supplies import make_supplies
from faults.trial import Fault, attempt

ROOT = Path(__file__).resolve().parents[2]
GROUPS: dict[str, list[Fault]] = {name: faults for module in (
    files, dicom, pictures, tables, runs, batches, disks, downloads, people) for name, faults in module.GROUPS.items()}


Row = dict[str, Any]


def record(rows: list[Row]) -> dict[str, Any]:
    """What is kept; nothing in it names a machine, a folder or a day."""
    return {"note": DISCLAIMER, "command": "make faults", "covidseg": __version__, "faults": rows}


def main(arguments: list[str] | None = None) -> int:
    """Tries all faults; with ``--only`` those of some groups, without a record."""
    parser = argparse.ArgumentParser(prog="faults", description="Try every fault, and record what covidseg says.")
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=[], help="only these, and no record")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    options = parser.parse_args(arguments)
    start = time.monotonic()
    rows, missed = list[Row](), dict[str, list[str]]()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        supplies = make_supplies(Path(folder))
        for group in options.only or GROUPS:
            for fault in GROUPS[group]:
                row, complaints = attempt(fault, supplies)
                rows.append({"group": group, **row})
                print(f"{group}: {fault.title}: {row['error']}", *row["said"], sep="\n  ", flush=True)
                if complaints:
                    missed[fault.title] = complaints
    if not options.only:
        write_text(options.out / "faults.json", json.dumps(record(rows), indent=1) + "\n")
    print(f"{len(rows) - len(missed)} of {len(rows)} faults were caught as they should be, in "
          f"{time.monotonic() - start:.0f} s", file=sys.stderr)
    for title, complaints in missed.items():
        print(f"missed: {title}: {'; '.join(complaints)}", file=sys.stderr)
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
