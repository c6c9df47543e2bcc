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
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from covidseg.store import write_text
from fuzz.harness import Finding, Target
from fuzz.targets import TARGETS

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = {"nifti": 3, "gzip": 2}  # shares of the time; the others have 1: their files are read much faster
PACKAGES = ("covidseg", "atheris", "numpy", "nibabel", "isal", "safetensors")
PATIENCE = 300  # seconds that a process may take to start and to end
SHARED = Path("/dev/shm")  # memory that looks like a disk, where there is such a thing


@dataclass(frozen=True)
class Result:
    """What the search in one target came to.

    Attributes:
        target: Name of the target.
        what: What it reads.
        executions: Number of files that were read.
        seconds: Time of the search, without the start of the process.
        reached: Branches of the instrumented modules that were run through.
        findings: One finding for each kind of fault.
    """

    target: str
    what: str
    executions: int
    seconds: int
    reached: int
    findings: list[Finding]

    def __str__(self) -> str:
        return (f"{self.target}: {self.executions:,} files in {self.seconds} s, {self.reached:,} branches reached, "
                f"{len(self.findings)} findings")


def search(target: Target, seconds: int, folder: Path, worker: Sequence[str] = ("-m", "fuzz.worker")) -> Result:
    """Searches one target in a process of its own.

    Args:
        target: Where to search.
        seconds: Time of the search.
        folder: Place for the corpus, and for an example of each finding (``kept``).
        worker: What Python is called with.
    """
    command = [sys.executable, *worker, target.name, "--seconds", str(seconds), "--folder", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=seconds + PATIENCE,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        log, end = done.stderr, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        log, end = (error.stderr or b"").decode(errors="replace"), "no end"

    def last(pattern: str) -> int:
        found = re.findall(pattern, log)
        return int(found[-1]) if found else 0
    findings = [Finding(**json.loads(path.read_text(encoding="utf-8")))
                for path in sorted((folder / "kept").glob("*.json"))]
    executions = last(r"stat::number_of_executed_units:\s*(\d+)")
    if end or not executions:  # a crash in native code, a file that takes too long or too much memory, or no start
        said = [line for line in log.splitlines() if re.search(r"ERROR|Error|SUMMARY", line)]
        text = re.sub(r"(/[^\s/:]+)+/", "", said[-1] if said else "")[:200]  # without folders of this machine
        findings.append(Finding(target.name, end or "no search", "process", text))
    return Result(target.name, target.what, executions, last(r"Done \d+ runs in (\d+) second"), last(r"cov: (\d+)"),
                  findings)


def shares(seconds: int, names: Sequence[str]) -> dict[str, int]:
    """Seconds of each target, ``seconds`` in all."""
    total = sum(WEIGHTS.get(name, 1) for name in names)
    return {name: max(1, round(seconds * WEIGHTS.get(name, 1) / total)) for name in names}


def record(results: Sequence[Result]) -> dict[str, Any]:
    """What was tried and found, as JSON."""
    return {
        "note": "Files that are broken on purpose; anything but a good result or a CovidsegError is a finding.",
        "command": "make fuzz", "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "environment": {"python": platform.python_version(), "system": platform.system(),
                        "packages": {name: version(name) for name in PACKAGES}},
        "seconds": sum(row.seconds for row in results), "executions": sum(row.executions for row in results),
        "findings": sum(len(row.findings) for row in results), "targets": [asdict(row) for row in results]}


def main(arguments: list[str] | None = None) -> int:
    """Searches and writes ``fuzz.json``; returns 1 if anything was found. A search in some targets writes no record."""
    parser = argparse.ArgumentParser(prog="fuzz", description="Feed broken files to the readers of covidseg.")
    parser.add_argument("--seconds", type=int, default=600, help="of search in all targets together")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="only this; may be given again")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    parser.add_argument("--kept", type=Path, default=ROOT / "_build" / "fuzz", help="folder for files that fail")
    options = parser.parse_args(arguments)
    results = list[Result]()
    for name, seconds in shares(options.seconds, options.target or list(TARGETS)).items():
        with tempfile.TemporaryDirectory(dir=SHARED if SHARED.is_dir() else None) as folder:
            results.append(search(TARGETS[name], seconds, Path(folder)))
            for path in sorted((Path(folder) / "kept").glob("*")):
                options.kept.mkdir(parents=True, exist_ok=True)
                (options.kept / f"{name}-{path.name}").write_bytes(path.read_bytes())
        print(results[-1], flush=True)
        for finding in results[-1].findings:
            print(f"  {finding.error} in {finding.where}: {finding.text}")
    if not options.target:
        write_text(options.out / "fuzz.json", json.dumps(record(results), indent=1) + "\n")
    found = sum(len(row.findings) for row in results)
    print(f"{found} findings; the files are in {options.kept.name}/" if found else "no findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
