"""Command line of ``make mutants``: changes modules, runs their tests, prints what went unnoticed, and records."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

# Before torch starts: forked children of a process with threads may hang.
os.environ["OMP_NUM_THREADS"] = "1"

from rich.console import Console
from rich.table import Table

from mutants.change import Mutant, mutants_of, sample
from mutants.trial import Outcome, Target, attempt, baseline, limit, warm

ROOT = Path(__file__).resolve().parents[2]
GOAL = 0.85
MODULES = {"metrics": "evaluation.metrics", "patches": "patches", "lungs": "lungs"}
# Which tests have to notice a change in a module.
TESTS = {"metrics": ("evaluation/test_metrics",),
         "patches": ("test_patches", "test_patches_bags", "test_patches_net", "tools/test_plain_patches"),
         "lungs": ("test_lungs", "test_lungs_slice", "test_lungs_morphology")}
HEAVY = ("torch", "monai.metrics", "monai.networks.nets", "nibabel", "scipy.ndimage",
         "skimage.measure", "skimage.segmentation", "skimage.transform", "safetensors.torch", "hypothesis.extra.numpy",
         "matplotlib.figure", "requests", "pooch", "pytest_timeout")
OPTIONS = ("-m", "not slow and not realct", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"))
SEED = 0


def target(name: str) -> Target:
    """One of the modules that are tested, with its tests."""
    return Target(f"covidseg.{MODULES[name]}", ROOT / "covidseg" / f"{MODULES[name].replace('.', '/')}.py",
                  [ROOT / "tests" / f"{test}.py" for test in TESTS[name]], OPTIONS)


def try_all(subject: Target, count: int, seconds: int | None, console: Console) -> dict[str, Any]:
    """Tries a module's mutants, says which survive, and returns what is recorded of them.

    Raises:
        RuntimeError: the tests fail without any change, before or after: in the order that they have got by then, one
            of them fails for reasons of its own, and has killed mutants that it did not notice.
    """
    start = time.monotonic()
    every = mutants_of(subject.source.read_text(encoding="utf-8"))
    chosen = sample(every, count or len(every), SEED)
    usual = baseline(subject)
    allowed = seconds or limit(usual)
    verdicts, survivors = Counter[str](), list[Mutant]()
    for number, mutant in enumerate(chosen, start=1):
        outcome: Outcome = attempt(subject, mutant.source, allowed)
        verdicts[outcome.verdict] += 1
        if outcome.verdict == "survived":
            survivors.append(mutant)
            console.print(f"{subject.source.name} {mutant}", markup=False, highlight=False, soft_wrap=True)
        if number % 50 == 0:
            console.print(f"{subject.source.name}: {number} of {len(chosen)} mutants, "
                          f"{time.monotonic() - start:.0f} s", markup=False, highlight=False)
    baseline(subject)
    return {"possible": len(every), "tried": len(chosen), "killed": verdicts["killed"],
            "timeouts": verdicts["timeout"], "survived": verdicts["survived"],
            "share": round(1 - verdicts["survived"] / len(chosen), 4),
            "seconds_per_mutant_at_most": allowed, "seconds": round(time.monotonic() - start),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "survivors": [{"line": mutant.line, "operator": mutant.operator, "was": mutant.was, "now": mutant.now}
                          for mutant in survivors]}


def table(modules: dict[str, dict[str, Any]]) -> Table:
    """One row a module."""
    result = Table(title=f"mutants noticed by the tests; at least {GOAL:.0%} is asked for",
                   caption="a mutant that makes the tests run out of time counts as noticed")
    for head in ("module", "mutants", "tried", "killed", "timeouts", "survived", "share"):
        result.add_column(head, justify="left" if head == "module" else "right")
    for name, row in modules.items():
        result.add_row(name, *(str(row[key]) for key in ("possible", "tried", "killed", "timeouts", "survived")),
                       f"{row['share']:.1%}{'' if row['share'] >= GOAL else ' NO'}")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Tries the modules and writes the record; a module that was not asked for keeps its last figures."""
    parser = argparse.ArgumentParser(prog="mutants", description="Do the tests notice small changes in the code?")
    parser.add_argument("--module", nargs="+", choices=TESTS, default=list(TESTS), help="only these")
    parser.add_argument("--sample", type=int, default=80, metavar="N",
                        help="try only so many of each module, drawn by chance; 0 tries all (by default 80)")
    parser.add_argument("--seconds", type=int, metavar="N", help="processor time that a mutant may take; by default "
                        "four times that of the tests without a change")
    parser.add_argument("--out", type=Path, default=ROOT / "results", help="folder of the record")
    options = parser.parse_args(arguments)
    console = Console(width=None if sys.stdout.isatty() else 120)
    path = options.out / "mutants.json"
    modules = json.loads(path.read_text(encoding="utf-8"))["modules"] if path.exists() else {}
    warm(HEAVY)
    for name in options.module:
        modules[name] = try_all(target(name), options.sample, options.seconds, console)
        modules = {name: modules[name] for name in TESTS if name in modules}
        content = {"command": "make mutants", "goal": GOAL, "seed": SEED, "modules": modules}
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    console.print(table(modules))
    return 0 if all(modules[name]["share"] >= GOAL for name in options.module) else 1


if __name__ == "__main__":
    sys.exit(main())
