"""Command line of ``make fuzz``: one process a target, a table, and a record of what was tried and found."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from covidseg.store import write_text
from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"nifti": 3, "gzip": 2}  # shares of the time; the others have 1: their files are read much faster
PACKAGES = ("covidseg", "atheris", "numpy", "nibabel", "isal", "safetensors")
PATIENCE = 300  # seconds that a process may take to start and to end
SHARED = Path("/dev/shm")  # memory that looks like a disk, where there is such a thing


def search(name: str, seconds: int, kept: Path, worker: Sequence[str] = ("-m", "fuzz.worker")) -> dict[str, Any]:
    """Searches one target in a process of its own, until the time is over or something is found.

    Args:
        name: of the target.
        seconds: time of the search.
        kept: folder for the file that was found, and for what was said about it.
        worker: what Python is called with.

    Returns:
        A row of the record: number of files that were read, seconds without the start of the process, branches of the
        instrumented modules that were run through, and what was found, with the type and the text of the exception.
    """
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
        command = [sys.executable, *worker, name, "--seconds", str(seconds), "--folder", folder,
                   "--kept", str(kept / f"{name}-")]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                  errors="replace", timeout=seconds + PATIENCE,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            log, end = done.stdout, f"exit code {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired as error:
            log, end = (error.stdout or b"").decode(errors="replace"), "no end"

    def last(pattern: str) -> int:
        found = re.findall(pattern, log)
        return int(found[-1]) if found else 0
    executions, findings = last(r"stat::number_of_executed_units:\s*(\d+)"), []
    if end or not executions:
        # An exception, or a crash in native code, a file that takes too long or too much memory, or no start at all.
        said = [line for line in log.splitlines() if re.match(r"\w+(Error|Exception)\b|==\d+== ?ERROR", line)]
        text = re.sub(r"(/[^\s/:]+)+/", "", said[0] if said else "")[:200]  # without folders of this machine
        findings.append({"error": end or "no search", "text": text})
        (kept / f"{name}.log").write_text(log, encoding="utf-8")
    return {"target": name, "what": TARGETS[name].what, "executions": executions,
            "seconds": last(r"Done \d+ runs in (\d+) second"), "reached": last(r"cov: (\d+)"), "findings": findings}


def shares(seconds: int, names: Sequence[str]) -> dict[str, int]:
    """Seconds of each target, ``seconds`` in all."""
    total = sum(WEIGHTS.get(name, 1) for name in names)
    return {name: max(1, round(seconds * WEIGHTS.get(name, 1) / total)) for name in names}


def record(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What was tried and found, as JSON."""
    return {
        "note": "Files that are broken on purpose; anything but a good result or a CovidsegError is a finding.",
        "command": "make fuzz", "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {"python": platform.python_version(), "system": platform.system(),
                        "packages": {name: version(name) for name in PACKAGES}},
        "seconds": sum(row["seconds"] for row in rows), "executions": sum(row["executions"] for row in rows),
        "findings": sum(len(row["findings"]) for row in rows), "targets": list(rows)}


def main(arguments: list[str] | None = None) -> int:
    """Searches and writes ``fuzz.json``; returns 1 if anything was found. A search in some targets writes no record."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Feed broken files to the readers of covidseg.")
    parser.add_argument("--seconds", type=int, default=600, help="of search in all targets together")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    parser.add_argument("--kept", type=Path, default=ROOT / "_build" / "fuzz", help="folder for files that fail")
    options = parser.parse_args(arguments)
    rows = []
    for name, seconds in shares(options.seconds, options.target or list(TARGETS)).items():
        rows.append(row := search(name, seconds, options.kept))
        print(f"{name}: {row['executions']:,} files in {row['seconds']} s, {row['reached']:,} branches reached, "
              f"{len(row['findings'])} findings", flush=True)
        for finding in row["findings"]:
            print(f"  {finding['error']}: {finding['text']}")
    content = record(rows)
    if not options.target:
        write_text(options.out / "fuzz.json", json.dumps(content, indent=1) + "\n")
    found = content["findings"]
    print(f"{found} findings; the files are in {options.kept.name}/" if found else "no findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
