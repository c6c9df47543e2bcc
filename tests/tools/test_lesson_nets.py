"""The shipped nets: whole, small, of today's settings, and the check that tells others from them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import lesson_nets
import numpy as np
import pytest

from covidseg.book.lesson import NETS, SHIPPED, ship
from covidseg.pipeline import Run
from covidseg.profiles import REPORT, profile_json, profile_named
from covidseg.store import load_arrays, save_arrays


def test_package_ships_the_nets_of_the_default_run() -> None:
    """`make nets` has to be run again when the quick profile changes."""
    stored = [load_arrays(SHIPPED / f"{stage}.safetensors")[0] for stage in NETS]
    assert all(np.isfinite(value).all() for arrays in stored for value in arrays.values())
    report = json.loads((SHIPPED / REPORT).read_text(encoding="utf-8"))
    assert report["settings"] == profile_json(profile_named("quick"))
    assert report["seed"] == 0
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 5e6


@pytest.mark.nets
def test_nets_that_differ_are_told(tiny_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lesson_nets.differences, "__defaults__", (tmp_path,))
    assert lesson_nets.check(tiny_run) == (False, "the shipped nets are of other settings; run `make nets`")
    ship(tiny_run, tmp_path)
    assert max(lesson_nets.differences(tiny_run).values()) < 0.02
    same, said = lesson_nets.check(tiny_run)
    assert same, said
    assert "lung_net 0.00" in said
    path = tmp_path / "segmenter.safetensors"
    arrays, notes = load_arrays(path)
    save_arrays(path, {name: -value if value.dtype == np.float16 else value for name, value in arrays.items()}, notes)
    same, said = lesson_nets.check(tiny_run)
    assert not same
    assert "differ from those trained" in said
    other = Run(tiny_run.data, replace(tiny_run.profile, true_lungs=True), tiny_run.seed, tmp_path / "run", "cpu",
                lambda line: None)
    assert lesson_nets.differences(other) == {}
