"""A run that is killed goes on where it stopped, to the same bits; programs that share a folder wait for each other."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import STAGES, TINY, WARM, finished_run, quiet, stage_name

from covidseg.atomic import HOST, MARK
from covidseg.data.folder import load_dataset
from covidseg.pipeline import Run, write_run
from covidseg.predict import load_predictor
from covidseg.store import Store, load_arrays


@pytest.fixture(scope="module")
def whole(tiny_phantom: Path) -> Run:
    """A run that nothing disturbed."""
    return finished_run(tiny_phantom)


def train(data: Path, folder: Path, most: int | None = None) -> None:
    """Trains all stages; the process kills itself when ``most`` are stored and the next one is only half there."""
    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename" and str(arguments[1]).endswith(".safetensors") \
                and len(list(folder.glob("stages/*.safetensors"))) == most:
            os.kill(os.getpid(), signal.SIGKILL)
    if most is not None:
        sys.addaudithook(watch)  # for the rest of this process's life
    run = Run(load_dataset(data), TINY, 0, folder, "cpu", quiet)
    run.segmenter()
    write_run(run, "a test")


def start(work: Callable[..., Any], *arguments: Any) -> BaseProcess:
    process = WARM.Process(target=work, args=arguments, daemon=True)
    process.start()
    return process


def exit_codes(*processes: BaseProcess) -> list[int | None]:
    for process in processes:
        process.join(200)
    return [process.exitcode for process in processes]


def check_same(folder: Path, whole: Run) -> None:
    """Every stage bit for bit, and a report that fits its checksum; nothing half written is left."""
    for stage in STAGES:
        mine, theirs = ({key: (value.dtype, value.tobytes()) for key, value in load_arrays(path)[0].items()}
                        for path in (place / "stages" / stage_name(whole, stage) for place in (folder, whole.folder)))
        assert mine == theirs, stage
    load_predictor(folder)
    left = [path.name for path in folder.rglob(".*") if path.is_file() and path.suffix != ".lock"]
    assert not left


@pytest.mark.parametrize("kills", [[1, 8], pytest.param(range(len(STAGES)), marks=pytest.mark.weekly)],
                         ids=["twice", "after each stage"])
def test_a_killed_run_goes_on_to_the_same_bits(kills: list[int], whole: Run, tiny_phantom: Path,
                                               tmp_path: Path) -> None:
    folder = tmp_path / "run"
    for most in kills:
        assert exit_codes(start(train, tiny_phantom, folder, most)) == [-signal.SIGKILL]
        assert len(list(folder.glob("stages/*.safetensors"))) == most
    assert exit_codes(start(train, tiny_phantom, folder)) == [0]
    check_same(folder, whole)


@pytest.mark.weekly
def test_two_programs_in_one_folder_do_no_harm(whole: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    assert exit_codes(*(start(train, tiny_phantom, tmp_path / "run") for _ in range(2))) == [0, 0]
    check_same(tmp_path / "run", whole)


WAITS = "another program is making cam-0123.safetensors in this folder"


def make_stage(folder: Path, calls: Path, log: Path, wait: bool) -> None:
    """Makes a stage; with ``wait`` it is not ready before another program has said that it waits for it."""
    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        with calls.open("a") as stream:
            stream.write("made\n")
        while wait and not (log.exists() and WAITS in log.read_text()):
            time.sleep(0.05)
        return {"a": np.arange(3)}, {}

    def note(line: str) -> None:
        with log.open("a") as stream:
            stream.write(line + "\n")
    Store(folder, note).get("cam", "0123", make)


def test_one_makes_a_stage_and_the_other_waits_for_it(tmp_path: Path) -> None:
    calls, log = tmp_path / "calls", tmp_path / "log"
    assert exit_codes(*(start(make_stage, tmp_path / "stages", calls, log, True) for _ in range(2))) == [0, 0]
    assert calls.read_text() == "made\n"


def test_a_killed_program_holds_nobody_up(tmp_path: Path) -> None:
    calls, log = tmp_path / "calls", tmp_path / "log"
    first = start(make_stage, tmp_path / "stages", calls, log, True)
    while not calls.exists():
        time.sleep(0.05)
    first.kill()
    first.join()
    (tmp_path / "stages" / f"{MARK}{HOST}-1-half").write_bytes(b"what it was writing")
    assert exit_codes(start(make_stage, tmp_path / "stages", calls, log, False)) == [0]
    assert not list((tmp_path / "stages").glob(f"{MARK}*"))
    assert load_arrays(tmp_path / "stages" / "cam-0123.safetensors")[0]["a"].tolist() == [0, 1, 2]
