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
# Sources of which one is the module's own, one wrong, one never ends, one needs too much memory, one ends Python.
BODIES = {"same": "return 'passed' if points >= 50 else 'failed'", "wrong": "return 'passed'", "broken": "return (",
          "endless": "while True: pass", "greedy": "return bytes(1 << 45)", "gone": "__import__('os')._exit(3)"}
VERDICTS = {"same": "survived", "wrong": "killed", "broken": "killed", "endless": "timeout", "greedy": "killed",
            "gone": "killed"}
# Each of them is tried, then the command line on the toy, then tests that fail without a change.
RUN = '''
import json, sys
from pathlib import Path
from mutants.trial import Target, attempt, baseline

folder, bodies = Path(sys.argv[1]), json.loads(sys.argv[2])
toy = Target("toy", folder / "toy.py", [folder / "test_toy.py"],
             ["--rootdir", str(folder), "-c", str(folder / "none.ini")])
said = {name: attempt(toy, f"def grade(points):\\n    {body}", 5) for name, body in bodies.items()}
if len(sys.argv) > 3:
    from mutants import __main__ as command
    command.MODULES, command.HEAVY, command.target = {"toy": "toy"}, (), lambda name: toy
    said["code"] = command.main(["--out", str(folder)])
    (folder / "test_toy.py").write_text("def test_always_fails():\\n    assert False\\n")
    try:
        baseline(toy)
    except RuntimeError as error:
        said["baseline"] = str(error)
print(json.dumps(said))
'''


def on_the_toy(folder: Path, tests: str, bodies: dict[str, str], *more: str) -> dict[str, Any]:
    """What is said about the toy, in a process without threads."""
    for name, text in (("toy.py", TOY), ("test_toy.py", tests), ("none.ini", "[pytest]\n")):
        (folder / name).write_text(text, encoding="utf-8")
    done = subprocess.run([sys.executable, "-c", RUN, str(folder), json.dumps(bodies), *more],
                          env={"PYTHONPATH": str(ROOT / "tools")}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to ask")
def test_a_mutant_is_noticed_by_the_tests_or_survives(tmp_path: Path) -> None:
    few = {name: BODIES[name] for name in ("same", "wrong")}
    assert on_the_toy(tmp_path, LOOSE, few) == {name: VERDICTS[name] for name in few}


@pytest.mark.weekly
def test_what_loose_tests_miss_survives_and_what_strict_ones_notice_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("cosmic_ray", reason="comes with `make mutants`")
    said = on_the_toy(tmp_path, LOOSE, BODIES, "command")
    loose = json.loads((tmp_path / "mutants.json").read_text(encoding="utf-8"))["modules"]["toy"]
    assert said == {**VERDICTS, "code": 1, "baseline": "the tests of toy fail without any change (killed): run them "
                    "with pytest"}
    line = 'return "passed" if points {} else "failed"'
    missed = {row["now"] for row in loose["survivors"]}
    assert {line.format("> 50"), line.format(">= 51"), line.format(">= 49")} <= missed
    assert line.format("< 50") not in missed
    assert {row["line"] for row in loose["survivors"]} == {6}
    assert on_the_toy(tmp_path, STRICT, {}, "command")["code"] == 0
    strict = json.loads((tmp_path / "mutants.json").read_text(encoding="utf-8"))["modules"]["toy"]
    assert strict["survivors"] == []
    assert strict["share"] == 1
    assert strict["tried"] == loose["tried"] == strict["killed"]


@pytest.mark.weekly
def test_mutants_differ_in_what_runs() -> None:
    pytest.importorskip("cosmic_ray", reason="comes with `make mutants`")
    from mutants.change import mutants_of

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


@pytest.mark.weekly
def test_each_module_has_tests() -> None:
    command = pytest.importorskip("mutants.__main__", reason="comes with `make mutants`")
    assert all(command.target(name).source.is_file() and command.target(name).tests for name in command.MODULES)


def faults_in(content: dict[str, Any]) -> list[str]:
    """What is missing from, or contradicts itself in, a record of mutants."""
    found = [f"no {name}" for name in ("metrics", "patches", "lungs") if name not in content["modules"]]
    for name, row in content["modules"].items():
        if row["killed"] + row["timeouts"] + row["survived"] != row["tried"] or row["tried"] > row["possible"]:
            found.append(f"{name} does not add up")
        if len(row["survivors"]) != row["survived"] or row["share"] != round(1 - row["survived"] / row["tried"], 4):
            found.append(f"{name} hides survivors")
        if row["share"] < content["goal"] or row["tried"] < min(80, row["possible"]):
            found.append(f"{name} falls short")
    return found + re.findall(r"/(?:home|work|tmp|root)\b\S*", json.dumps(content))


def test_the_record_is_whole_and_reaches_the_goal() -> None:
    content = json.loads(RECORD.read_text(encoding="utf-8"))
    assert content["goal"] == 0.85
    assert faults_in(content) == []
    for change, fault in (({"killed": 0}, "does not add up"), ({"survivors": []}, "hides survivors"),
                          ({"share": 0.5}, "falls short"), ({"note": "/home/a"}, "/home/a")):
        changed = copy.deepcopy(content)
        changed["modules"]["lungs"].update(change)
        assert any(fault in found for found in faults_in(changed)), fault
    del content["modules"]["patches"]
    assert faults_in(content) == ["no patches"]
