"""The benchmark: how it measures, what it counts, and whether the records say all that they must."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import __main__ as program
from bench import measure
from bench.command import covidseg, memory_mb
from bench.measure import alternating, comparison, exponent, in_fresh_process, limited
from bench.roofline import Machine, counted, seconds_of
from fresh import fail, hold, measure_length
from packaging.requirements import Requirement
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from covidseg.book.results import bench_markdown
from covidseg.unet import make_unet

ROOT = Path(__file__).resolve().parents[2]
RECORDS = sorted((ROOT / "results").glob("bench-*.json"))
SECTIONS = {"cpu": set(program.SECTIONS), "cuda": set(program.ON_GPU)}


@pytest.mark.skipif(sys.platform != "linux", reason="no /proc to ask")
def test_a_small_benchmark_leaves_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert program.main(["--small", "--rounds", "1", "--only", "patches", "--device", "cpu",
                         "--out", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "bench-cpu.json").read_text(encoding="utf-8"))
    assert faults(content) == ["was measured with tiny sizes",
                               *(f"no section {name}" for name in sorted(SECTIONS["cpu"] - {"patches"}))]
    assert all(row["difference"] <= row["tolerance"] for row in content["sections"]["patches"]["comparisons"])
    assert "a window for each patch" in capsys.readouterr().out


@pytest.mark.parametrize(("ours", "other", "more", "met"), [
    (2.0, 10.0, {"goal": 5}, True), (2.0, 9.9, {"goal": 5}, False), (2.0, 9.9, {}, None),
    (1.0, 99.0, {"goal": 5, "difference": 0.1, "tolerance": 1e-5}, False),
    (1.0, 99.0, {"goal": 5, "tolerance": 1e-5}, False),
    (1.0, 99.0, {"goal": 5, "difference": 1e-6, "tolerance": 1e-5}, True)])
def test_a_ratio_meets_its_goal_at_equal_results_only(ours: float, other: float, more: dict[str, Any],
                                                      met: bool | None) -> None:
    row = comparison("a", "b", "s", ours, other, **more)
    assert (row["ratio"], row["met"]) == (other / ours, met)


def test_a_figure_keeps_its_limit() -> None:
    assert [limited("a", "s", value, limit)["met"] for value, limit in ((9.0, 10), (11.0, 10), (11.0, None))] == [
        True, False, None]


@pytest.mark.weekly
def test_ways_take_turns_and_the_first_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    # Seconds from one look at the clock to the next: each way begins and ends.
    clock = itertools.accumulate([0, 100, 50, 100, *[50, 1, 50, 9], *[50, 2, 50, 9], *[50, 1, 50, 8]])
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
    assert in_fresh_process(measure_length, 200)[2] < 50  # what was there before the clock started does not count
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


@pytest.mark.weekly
def test_operations_are_those_that_torch_counts_and_bytes_those_that_layers_move() -> None:
    net = nn.Sequential(make_unet(2, (8, 16, 32)), nn.Flatten(), nn.Linear(32 * 32, 3))
    inputs = torch.rand(2, 2, 32, 32)
    with FlopCounterMode(display=False) as counter:
        net(inputs)
    assert sum(operations for operations, _ in counted(lambda: net(inputs))) == counter.get_total_flops()
    layer = nn.Linear(4, 4)
    assert counted(lambda: layer(torch.rand(2, 4))) == [(64, 4 * (20 + 8 + 8))]
    with torch.no_grad():
        assert counted(lambda: layer(torch.rand(2, 4))) == [], "without gradients it is no training"


def test_a_layer_is_bound_by_the_slower_of_arithmetic_and_memory() -> None:
    bound, arithmetic = seconds_of([(100.0, 10.0), (0.0, 50.0)], Machine(operations=10.0, bandwidth=5.0))
    assert (bound, arithmetic) == (3 * (10 + 10), 3 * 10)


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
            own = comparison(**{key: value for key, value in row.items() if key not in ("ratio", "met")})
            if own != row:
                found.append(f"{name}: {row['task']}: ratio or goal does not fit the figures")
        for row in section.get("limits", []):
            if limited(**{key: value for key, value in row.items() if key != "met"}) != row:
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
    ratios = [row["ratio"] for section in content["sections"].values() for row in section.get("comparisons", [])]
    assert len(table.splitlines()) == len(ratios) + 2
    assert all(f"| **{ratio:.1f}** |" in table for ratio in ratios)
    assert "exponent" not in bench_markdown(content, "limits")
    assert bench_markdown(content, "roofline").count("\n") == 1 + len(content["sections"]["training"]["roofline"])
    content["sections"]["reading"]["comparisons"][0]["met"] = False
    assert bench_markdown(content).count("**no**") == table.count("**no**") + 1


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
