"""Command line of ``make mutants``: changes modules, runs their tests, prints what went unnoticed, and records."""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import random
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before torch starts: forked children of a process with threads may hang.
os.environ["OMP_NUM_THREADS"] = "1"

from bench.measure import PRELOAD

from mutants.change import mutants_of
from mutants.trial import Target, attempt, baseline

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.85
MODULES = {"metrics": "covidseg.evaluation.metrics", "patches": "covidseg.patches", "lungs": "covidseg.lungs"}
HEAVY = (*PRELOAD, "hypothesis.extra.numpy", "matplotlib.figure", "nibabel", "skimage.segmentation", "typer.testing")
OPTIONS = ("-m", "not slow and not realct", "--hypothesis-profile=mutants", "--rootdir", str(ROOT),
           "-c", str(ROOT / "pyproject.toml"))
SEED = 0
PATIENCE, AT_LEAST = 4, 20  # a mutant may take four times as long as the tests without a change, or 20 s


def target(name: str) -> Target:
    """One of the modules that are tested, with its tests: those whose names begin like the module's."""
    return Target(MODULES[name], ROOT / f"{MODULES[name].replace('.', '/')}.py",
                  sorted((ROOT / "tests").rglob(f"test_{name}*.py")), OPTIONS)


def try_all(subject: Target, count: int) -> dict[str, Any]:
    """The row of a module: tries its mutants, ``count`` of them drawn by chance or all if it is 0."""
    start = time.monotonic()
    every = mutants_of(subject.source.read_text(encoding="utf-8"))
    count = min(count or len(every), len(every))
    chosen = [every[k] for k in sorted(random.Random(SEED).sample(range(len(every)), count))]
    allowed = int(max(AT_LEAST, PATIENCE * baseline(subject))) + 1
    verdicts, survivors = Counter[str](), []
    for number, mutant in enumerate(chosen, start=1):
        verdicts[verdict := attempt(subject, mutant.source, allowed)] += 1
        if verdict == "survived":
            survivors.append(mutant)
            print(f"{subject.source.name} {mutant}", flush=True)
        if number % 50 == 0:
            print(f"{subject.source.name}: {number} of {count} mutants, {time.monotonic() - start:.0f} s", flush=True)
    return {"possible": len(every), "tried": count, "killed": verdicts["killed"],
            "timeouts": verdicts["timeout"], "survived": verdicts["survived"],
            "share": round(1 - verdicts["survived"] / count, 4),
            "seconds_per_mutant_at_most": allowed, "seconds": round(time.monotonic() - start),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "survivors": [{name: getattr(mutant, name) for name in ("line", "operator", "was", "now")}
                          for mutant in survivors]}


def main(arguments: list[str] | None = None) -> int:
    """Tries the modules and writes the record; a module that was not asked for keeps its last figures."""
    parser = argparse.ArgumentParser(prog="mutants", description="Do the tests notice small changes in the code?")
    parser.add_argument("--module", nargs="+", choices=MODULES, default=list(MODULES), help="only these")
    parser.add_argument("--sample", type=int, default=80, metavar="N",
                        help="try only so many of each module, drawn by chance; 0 tries all (by default 80)")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    options = parser.parse_args(arguments)
    path = options.out / "mutants.json"
    modules = json.loads(path.read_text(encoding="utf-8"))["modules"] if path.exists() else {}
    for name in HEAVY:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children's collectors leave alone what was imported
    for name in options.module:
        modules[name] = row = try_all(target(name), options.sample)
        modules = {name: modules[name] for name in MODULES if name in modules}
        content = {"command": "make mutants", "goal": GOAL, "seed": SEED, "modules": modules}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"{name}: the tests notice {row['share']:.1%} of {row['tried']} mutants, {GOAL:.0%} are asked for")
    return 0 if all(modules[name]["share"] >= GOAL for name in options.module) else 1


if __name__ == "__main__":
    sys.exit(main())
