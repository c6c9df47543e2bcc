"""Mutation testing tells mutants that tests notice from those that they miss, and has a record."""

from __future__ import annotations

import ast
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECORD = ROOT / "results" / "mutants.json"
TOY = '''\
from __future__ import annotations


def grade(points: int | None) -> str:
    """Up from 50 points."""
    return "passed" if points >= 50 else "failed"
'''
LOOSE = '''\
from toy import grade


def test_grades():
    assert [grade(0), grade(100)] == ["failed", "passed"]
'''
STRICT = LOOSE + '''

def test_the_limit():
    assert [grade(49), grade(50), grade(51)] == ["failed", "passed", "passed"]
'''
# The command line on the toy, and single sources of which one never ends, one needs too much memory, one ends Python.
RUN = '''
import json, sys
from pathlib import Path
from mutants import __main__ as command
from mutants.trial import Target, attempt, baseline

folder = Path(sys.argv[1])
options = ["--rootdir", str(folder), "-c", str(folder / "none.ini")]
toy = Target("toy", folder / "toy.py", [folder / "test_toy.py"], options)
command.TESTS, command.HEAVY, command.target = {"toy": ()}, (), lambda name: toy
code = command.main(["--out", str(folder)])
bodies = {"endless": "while True: pass", "greedy": "return bytes(1 << 45)", "gone": "__import__('os')._exit(3)",
          "broken": "return (", "same": "return 'passed' if points >= 50 else 'failed'"}
verdicts = {name: attempt(toy, f"def grade(points):\\n    {body}", 1).verdict for name, body in bodies.items()}
(folder / "test_toy.py").write_text("def test_always_fails():\\n    assert False\\n")
try:
    baseline(toy)
except RuntimeError as error:
    verdicts["baseline"] = str(error)
print(json.dumps({"code": code, "verdicts": verdicts}))
'''


def on_the_toy(folder: Path, tests: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command says about the toy, and its record."""
    for name, text in (("toy.py", TOY), ("test_toy.py", tests), ("none.ini", "[pytest]\n")):
        (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", RUN, str(folder)], env={"PYTHONPATH": str(ROOT / "tools")},
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((folder / "mutants.json").read_text(encoding="utf-8"))
    return json.loads(done.stdout.splitlines()[-1]), record["modules"]["toy"]


def test_what_loose_tests_miss_survives_and_what_strict_ones_notice_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray")
    said, loose = on_the_toy(tmp_path, LOOSE)
    assert said["code"] == 1, "below the goal"
    line = 'return "passed" if points {} else "failed"'
    missed = {row["now"] for row in loose["survivors"]}
    assert {line.format("> 50"), line.format(">= 51"), line.format(">= 49")} <= missed
    assert line.format("< 50") not in missed
    assert {row["line"] for row in loose["survivors"]} == {6}
    assert said["verdicts"] == {"endless": "timeout", "greedy": "killed", "gone": "killed", "broken": "killed",
                                "same": "survived", "baseline":
                                "the tests of toy fail without any change: test_toy.py::test_always_fails"}
    said, strict = on_the_toy(tmp_path, STRICT)
    assert said["code"] == 0
    assert strict["survivors"] == []
    assert strict["share"] == 1
    assert strict["tried"] == loose["tried"] == strict["killed"]


def test_mutants_differ_in_what_runs() -> None:
    pytest.importorskip("cosmic_ray")
    from mutants.change import mutants_of, sample

    source = TOY + '''

@dataclass(frozen=True)
class Pair:
    first: int | None = 1
'''
    mutants = mutants_of(source)
    assert len({ast.dump(ast.parse(mutant.source)) for mutant in mutants}) == len(mutants)
    assert {mutant.line for mutant in mutants} == {6, 9, 11}, "nothing in line 4, which has an annotation only"
    assert not any("frozen=False" in mutant.source or "int |" not in mutant.was + mutant.source for mutant in mutants)
    assert [(mutant.was, mutant.now) for mutant in mutants if mutant.line == 9] == [("@dataclass(frozen=True)", "")]
    assert {mutant.now for mutant in mutants if mutant.line == 11} == {f"first: int | None = {n}" for n in (0, 2)}
    assert str(mutants[-1]).startswith("line 11: first: int | None = 1  ->  first")
    few = sample(mutants, 4)
    assert len(few) == 4
    assert few == sample(mutants, 4) != sample(mutants, 4, seed=1)
    assert [mutants.index(mutant) for mutant in few] == sorted(mutants.index(mutant) for mutant in few)
    assert sample(mutants, 999) == mutants


# --- the record --------------------------------------------------------------------------------------------------

def faults_in(content: dict[str, Any]) -> list[str]:
    """What is missing from, or contradicts itself in, a record of mutants."""
    found = [f"no {name}" for name in ("metrics", "patches", "lungs")
             if name not in content["modules"]]
    for name, row in content["modules"].items():
        if row["killed"] + row["timeouts"] + row["survived"] != row["tried"] or row["tried"] > row["possible"]:
            found.append(f"{name} does not add up")
        if len(row["survivors"]) != row["survived"] or row["share"] != round(1 - row["survived"] / row["tried"], 4):
            found.append(f"{name} hides survivors")
        if row["share"] < content["goal"] or row["tried"] < min(80, row["possible"]):
            found.append(f"{name} falls short")
    return found + re.findall(r"/(?:home|work|tmp|root)\b\S*", json.dumps(content))


def test_the_record_is_whole_and_reaches_the_goal() -> None:
    assert faults_in(json.loads(RECORD.read_text(encoding="utf-8"))) == []


def test_an_incomplete_record_is_noticed() -> None:
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    assert content["goal"] == 0.85
    for change, fault in (({"killed": 0}, "does not add up"), ({"survivors": []}, "hides survivors"),
                          ({"share": 0.5}, "falls short"), ({"note": "/home/a"}, "/home/a")):
        changed = copy.deepcopy(content)
        changed["modules"]["lungs"].update(change)
        assert any(fault in found for found in faults_in(changed)), fault
    del content["modules"]["patches"]
    assert faults_in(content) == ["no patches"]
