"""A run that is killed goes on where it stopped, to the same bits; programs that share a folder wait for each other."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STAGES, TINY, WARM, finished_run, quiet, stage_name

from covidseg.data.folder import load_dataset
from covidseg.pipeline import Run, write_run
from covidseg.predict import load_predictor
from covidseg.store import Store, load_arrays

KILLS = 30


@pytest.fixture(scope="module")
def whole(tiny_phantom: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that nothing disturbed."""
    return finished_run(tiny_phantom, tmp_path_factory.mktemp("whole"))


def train(data: Path, folder: Path) -> None:
    run = Run(load_dataset(data), TINY, 0, folder, "cpu", quiet)
    run.segmenter()
    write_run(run, "a test")


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = WARM.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def check_same(folder: Path, whole: Run) -> None:
    """Every stage bit for bit, and a report that fits its checksum; nothing half written is left."""
    for stage in STAGES:
        name = stage_name(whole, stage)
        mine, theirs = (load_arrays(place / "stages" / name)[0] for place in (folder, whole.folder))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            assert value.dtype == theirs[key].dtype
            assert value.tobytes() == theirs[key].tobytes(), (stage, key)
    load_predictor(folder)
    left = [path.name for path in folder.rglob(".*") if path.is_file() and path.suffix != ".lock"]
    assert not left


@pytest.mark.slow
def test_a_run_killed_at_thirty_moments_ends_in_the_same_bits(whole: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    begin, folder, moments = time.monotonic(), tmp_path / "timed", random.Random(0)
    process = start(train, tiny_phantom, folder)
    process.join(200)
    takes = time.monotonic() - begin
    assert process.exitcode == 0
    check_same(folder, whole)
    kills, finished, folder = 0, 0, tmp_path / "killed"
    stored = set[int]()  # numbers of stages there were when a run was killed
    while kills < KILLS or not finished:
        process = start(train, tiny_phantom, folder)
        process.join(moments.uniform(0, 0.4 * takes) if kills < KILLS else 200)
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            stored.add(len(list(folder.glob("stages/*.safetensors"))))
            continue
        assert process.exitcode == 0
        check_same(folder, whole)
        finished += 1
        shutil.rmtree(folder)
    assert len(stored) > 4, "killed early and late"


def test_two_programs_in_one_folder_do_no_harm(whole: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    programs = [start(train, tiny_phantom, tmp_path / "run") for _ in range(2)]
    for program in programs:
        program.join(200)
        assert program.exitcode == 0
    check_same(tmp_path / "run", whole)


def _make(folder: Path, calls: Path, log: Path, seconds: float) -> None:
    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with calls.open("a") as stream:
            stream.write("made\n")
        time.sleep(seconds)
        return {"a": np.arange(3)}, {}

    def note(line: str) -> None:
        with log.open("a") as stream:
            stream.write(line + "\n")
    Store(folder, note).get("cam", "0123", make)


def test_one_makes_a_stage_and_the_other_waits_for_it(tmp_path: Path) -> None:
    calls, log = tmp_path / "calls", tmp_path / "log"
    programs = [start(_make, tmp_path / "stages", calls, log, 1.0) for _ in range(2)]
    for program in programs:
        program.join(60)
        assert program.exitcode == 0
    assert calls.read_text() == "made\n"
    assert "another program is making cam-0123.safetensors in this folder" in log.read_text()


def test_a_killed_program_holds_nobody_up(tmp_path: Path) -> None:
    calls, log = tmp_path / "calls", tmp_path / "log"
    first = start(_make, tmp_path / "stages", calls, log, 60.0)
    while not calls.exists():
        time.sleep(0.05)
    first.kill()
    first.join()
    (tmp_path / "stages" / ".cam-0123.safetensors-half").write_bytes(b"what it was writing")
    second = start(_make, tmp_path / "stages", calls, log, 0.0)
    second.join(60)
    assert second.exitcode == 0
    assert not list((tmp_path / "stages").glob(".*-half"))
    assert load_arrays(tmp_path / "stages" / "cam-0123.safetensors")[0]["a"].tolist() == [0, 1, 2]
