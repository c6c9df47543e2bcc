"""The benchmark: how it measures, what it counts, and whether the records say all that they must."""

from __future__ import annotations

import copy
import itertools
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from bench import __main__ as program
from bench import measure, roofline
from bench.command import covidseg, memory_mb
from bench.measure import Comparison, Limit, alternating, exponent, in_fresh_process
from fresh import fail, hold, measured_length, prepare
from packaging.requirements import Requirement
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from covidseg.book.results import bench_markdown
from covidseg.unet import make_unet

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "results").glob("bench-*.json"))
SECTIONS = {"cpu": set(program.SECTIONS), "cuda": set(program.ON_GPU)}


# --- how it measures ---------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to ask")
def test_a_small_benchmark_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--small", "--rounds", "1", "--only", "patches", "--device", "cpu",
                         "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench-cpu.json").read_text(encoding="utf-8"))
    assert faults(content) == ["was measured with tiny sizes",
                               *(f"no section {name}" for name in sorted(SECTIONS["cpu"] - {"patches"}))]
    assert all(row["difference"] <= row["tolerance"] for row in content["sections"]["patches"]["comparisons"])
    assert "a window for each patch" in capsys.readouterr().out


def test_a_ratio_meets_its_goal_at_equal_results_only() -> None:
    good = Comparison("a", "b", "s", ours=2.0, other=10.0, goal=5)
    assert (good.ratio, good.met, good.as_json()["ratio"]) == (5, True, 5)
    assert Comparison("a", "b", "s", 2.0, 9.9, goal=5).met is False
    assert Comparison("a", "b", "s", 2.0, 9.9).met is None
    assert Comparison("a", "b", "s", 1.0, 99.0, goal=5, difference=0.1, tolerance=1e-5).met is False
    assert Comparison("a", "b", "s", 1.0, 99.0, goal=5, tolerance=1e-5).met is False
    assert Comparison("a", "b", "s", 1.0, 99.0, goal=5, difference=1e-6, tolerance=1e-5).met is True
    assert [Limit("a", "s", value, limit).met for value, limit in ((9.0, 10), (11.0, 10), (11.0, None))] == [
        True, False, None]


@pytest.mark.weekly
def test_ways_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    # Seconds from one look at the clock to the next: the first turn begins twice, then each way begins and ends.
    clock = itertools.accumulate([0, 100, *[50, 1, 50, 9], *[50, 2, 50, 9], *[50, 1, 50, 8]])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: float(next(clock)))
    seconds = alternating([lambda: calls.append("a"), lambda: calls.append("b")], rounds=3)
    assert calls == ["a", "b"] * 4
    assert seconds == [1, 9]


@pytest.mark.weekly
def test_memory_is_that_of_the_work_alone_and_its_faults_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "PRELOAD", ["bench.measure"])  # this work needs none of what the stages import
    before = memory_mb("VmHWM")
    size, seconds, peak = in_fresh_process(hold, 200)
    assert size == 200 << 20
    assert 190 < peak < 260
    assert seconds > 0
    assert memory_mb("VmHWM") - before < 150  # it was another process
    _, _, prepared = in_fresh_process(measured_length, 200, prepare=prepare)
    assert prepared < 50  # what was there before the clock started does not count
    with pytest.raises(ValueError, match="broken"):
        in_fresh_process(fail)


@pytest.mark.weekly
@pytest.mark.parametrize(("power", "expected"), [(1, 1), (2, 2), (0, 0)])
def test_exponent(power: int, expected: int) -> None:
    sizes = [1.0, 2.0, 4.0]
    assert exponent(sizes, [3 * size ** power for size in sizes]) == pytest.approx(expected)


@pytest.mark.weekly
def test_commands_are_measured_from_outside(tmp_path: Path) -> None:
    seconds, peak = covidseg(tmp_path, "--version")
    assert seconds > 0
    assert 10 < peak < 2000
    with pytest.raises(RuntimeError, match="no such file"):
        covidseg(tmp_path, "lungs", tmp_path / "missing.nii.gz", "-o", tmp_path / "out")


# --- the roofline ------------------------------------------------------------------------------------------------

@pytest.mark.weekly
def test_operations_are_those_that_torch_counts() -> None:
    net = nn.Sequential(make_unet(2, (8, 16, 32)), nn.Flatten(), nn.Linear(32 * 32, 3))
    inputs = torch.rand(2, 2, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(inputs)
    seen = roofline.counted(lambda: net(inputs))
    assert sum(seen.operations) == pytest.approx(counter.get_total_flops())


@pytest.mark.weekly
def test_layers_without_gradients_are_no_training() -> None:
    net = nn.Linear(4, 4)
    with torch.no_grad():
        assert roofline.counted(lambda: net(torch.rand(2, 4))).operations == []
    assert roofline.counted(lambda: net(torch.rand(2, 4))).bytes == [4 * (20 + 8 + 8)]


@pytest.mark.weekly
def test_a_layer_is_bound_by_the_slower_of_arithmetic_and_memory() -> None:
    work = roofline.Work(operations=[100.0, 0.0], bytes=[10.0, 50.0])
    bound, arithmetic = work.seconds(roofline.Machine(operations=10.0, bandwidth=5.0))
    assert arithmetic == pytest.approx(3 * 10)
    assert bound == pytest.approx(3 * (10 + 10))


# --- the records -------------------------------------------------------------------------------------------------

def faults(content: dict) -> list[str]:
    """What is missing from, or contradicts itself in, a recorded benchmark."""
    found = [f"no {key}" for key in ("command", "device", "environment", "sections", "finished")
             if not content.get(key)]
    found += [f"environment lacks {key}" for key in ("python", "packages", "processor", "cores", "threads")
              if not content.get("environment", {}).get(key)]
    if content.get("small"):
        found.append("was measured with tiny sizes")
    sections = content.get("sections", {})
    found += [f"no section {name}" for name in sorted(SECTIONS.get(content.get("device"), set()) - set(sections))]
    for name, section in sections.items():
        for row in section.get("comparisons", []):
            own = Comparison(**{key: value for key, value in row.items() if key not in ("ratio", "met")})
            if (round(own.ratio, 3), own.met) != (row["ratio"], row["met"]):
                found.append(f"{name}: {row['task']}: ratio or goal does not fit the figures")
        for row in section.get("limits", []):
            if Limit(**{key: value for key, value in row.items() if key != "met"}).met != row["met"]:
                found.append(f"{name}: {row['task']}: limit does not fit the figure")
        for row in section.get("roofline", []):
            if abs(row["share"] - row["bound_ms"] / row["step_ms"]) > 0.01 or row["share"] > 1:
                found.append(f"{name}: {row['stage']}: impossible share of the roofline")
    if re.search(r"/(home|root|work|tmp|Users)/", json.dumps(content)):
        found.append("names a folder of the machine")
    return found


def cpu_record() -> dict:
    return json.loads((ROOT / "results" / "bench-cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_records_are_complete(path: Path) -> None:
    assert faults(json.loads(path.read_text(encoding="utf-8"))) == []


def test_record_check_fires() -> None:
    content = cpu_record()
    content["sections"]["reading"]["comparisons"][0]["ours"] *= 2
    content["sections"]["lungs"]["limits"][0]["value"] = 99.0
    content["sections"]["training"]["roofline"][0]["share"] = 1.5
    content["sections"].pop("growth")
    content["environment"].pop("processor")
    content["command"] = "/home/bench"
    content["small"] = True
    assert len(faults(content)) == 7


def test_tables_show_the_record() -> None:
    content = cpu_record()
    table = bench_markdown(content)
    rows = [row for section in content["sections"].values() for row in section.get("comparisons", [])]
    assert len(table.splitlines()) == len(rows) + 2
    for row in rows:
        assert f"| **{row['ratio']:.1f}** |" in table
    missed = copy.deepcopy(content)
    missed["sections"]["reading"]["comparisons"][0]["met"] = False
    assert bench_markdown(missed).count("**no**") == table.count("**no**") + 1
    assert "exponent" not in bench_markdown(content, "limits")
    assert bench_markdown(content, "roofline").count("\n") == 1 + len(content["sections"]["training"]["roofline"])


def readme_faults(readme: str, content: dict) -> list[str]:
    """Lines of the README's table that do not show what was measured, or measured lines with a goal that it lacks."""
    measured = [f"| **{row['ratio']:.1f}** | {row['goal']:g} | {row['task']} | {row['other_name']} |"
                for section in content["sections"].values() for row in section.get("comparisons", [])
                if row["goal"] is not None]
    shown = re.findall(r"^\| \*\*[\d.]+\*\* \|.*$", readme, re.MULTILINE)
    return [row for row in measured if row not in shown] + [row for row in shown if row not in measured]


def test_readme_shows_the_record() -> None:
    readme, content = (ROOT / "README.md").read_text(encoding="utf-8"), cpu_record()
    assert readme_faults(readme, content) == []
    assert len(readme_faults(readme.replace("| **", "| **1"), content)) == 2 * readme.count("| **")


def test_what_is_compared_with_is_pinned_in_step_with_everything_else() -> None:
    def pins(name: str) -> dict[str, set[str]]:
        lines = re.findall(r"^(\S+==[^\\\n]*)", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE)
        found: dict[str, set[str]] = {}
        for requirement in map(Requirement, lines):
            found.setdefault(requirement.name, set()).add(str(requirement.specifier))
        return found
    ours, theirs = pins("requirements.lock"), pins("requirements-bench.lock")
    assert theirs["lungmask"] == {"==0.2.22"}
    assert {name: versions for name, versions in theirs.items() if name in ours and versions != ours[name]} == {}
