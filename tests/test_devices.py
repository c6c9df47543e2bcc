"""Several processes train one net; the first alone writes; when one ends, the others say so and end as well."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import STAGES, TINY, WARM, quiet, toy, weights
from torch import Tensor, nn

from covidseg.cli import app, main
from covidseg.devices import average_gradients, from_first, is_first, joined, own_gpu, pick_device, processes, rank
from covidseg.errors import ProcessError, SettingsError
from covidseg.predict import load_predictor
from covidseg.profiles import PROFILES, Profile
from covidseg.segmenter import SegmenterSettings, train_segmenter
from covidseg.store import Store, save_arrays
from covidseg.training import Training

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]
SECONDS = 200  # for whatever is started here


# --- processes as torchrun starts them -----------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def place(rank: int, port: int) -> dict[str, str]:
    """What torchrun tells each of two processes."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def _begin(job: Callable[..., Any], rank: int, port: int, folder: Path, given: tuple[Any, ...]) -> None:
    os.environ |= place(rank, port)
    sys.stdout, sys.stderr = (open(folder / f"{rank}.{name}", "w", buffering=1) for name in ("out", "err"))  # noqa: SIM115
    torch.set_num_threads(1)
    torch.save(job(*given), folder / f"{rank}.pt")


def start(job: Callable[..., Any], folder: Path, *given: Any) -> list[BaseProcess]:
    """Two processes that do a job; what it returns and prints is in the folder: ``RANK.pt``, ``.out`` and ``.err``."""
    import monai.networks.nets  # noqa: F401 - takes ten seconds, here once or in each of the processes

    folder.mkdir()
    port = free_port()
    started = [WARM.Process(target=_begin, args=(job, rank, port, folder, given)) for rank in range(2)]
    for process in started:
        process.start()
    return started


def finish(started: list[BaseProcess]) -> list[int | None]:
    """The exit codes; whoever has not ended in time is killed."""
    until = time.monotonic() + SECONDS
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    codes = [process.exitcode for process in started]
    for process in started:
        process.kill()
    return codes


# --- the same training ---------------------------------------------------------------------------------------------

def gradients(rank: int) -> list[Tensor | None]:
    """Averaged gradients of a net of which one part is not used in the second process."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    net(torch.full((1, 2), rank + 1.0)).sum().backward()
    average_gradients(net)
    return [weight.grad for weight in net.parameters()]


def decisions(folder: Path) -> list[Any]:
    """What ``Store.get`` returns, how often it computed and what it wrote: each process has a folder of its own."""
    rank = int(os.environ["RANK"])
    store, made, found = Store(folder / f"store{rank}"), [0], []

    def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        made[0] += 1
        return {"of": np.array([rank])}, {"made": made[0]}

    def ask(stage: str) -> None:
        arrays, notes = store.get(stage, "0123", make)
        found.append((int(arrays["of"][0]), notes["made"], made[0]))
    if not is_first():
        save_arrays(store.path("elsewhere", "0123"), *make())
    for _ in range(2):
        ask("cam")
    if is_first():
        store.path("cam", "0123").write_bytes(b"damaged")
    ask("cam")
    ask("elsewhere")
    return [found, sorted(path.name for path in store.folder.glob("*.safetensors"))]


def all_in_two(folder: Path) -> dict[str, Any]:
    data, _ = toy(12)
    drawn: list[np.ndarray] = []
    with joined(CPU):
        training = Training("toy", SegmenterSettings(steps=3, batch=4), 0, CPU, quiet)
        start = weights(training.begin(nn.Linear(2, 1)))
        list(training.batches(lambda index: drawn.append(index.numpy()) or (index,), data))  # type: ignore[func-returns-value]
        net = train_segmenter(data, data.crops.lungs, np.ones(data.crops.lungs.shape, np.float32),
                              SegmenterSettings(channels=(4, 8, 8), steps=3, batch=4), seed=1, log=quiet)
        with pytest.raises(SettingsError, match="too small for 2 processes") as caught:
            Training("toy", SegmenterSettings(batch=3), 0, CPU, quiet).own_batch()
        return {"processes": processes(), "gradients": gradients(rank()), "store": decisions(folder), "start": start,
                "drawn": drawn, "weights": {name: value.numpy() for name, value in net.named_parameters()},
                "remedy": caught.value.remedy}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    codes = finish(start(all_in_two, folder / "run", folder))
    assert codes == [0, 0], "".join(path.read_text() for path in sorted((folder / "run").glob("*.err")))
    return [torch.load(folder / "run" / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.slow
def test_two_processes_train_one_net_on_batches_of_their_own(two: list[dict[str, Any]]) -> None:
    assert [found["processes"] for found in two] == [2, 2]
    for part in ("start", "weights"):
        assert all(np.array_equal(value, two[1][part][name]) for name, value in two[0][part].items()), part
    assert [len(batch) for found in two for batch in found["drawn"]] == [2] * 6, "half of a batch each"
    assert not np.array_equal(*(np.stack(found["drawn"]) for found in two))
    assert two[0]["remedy"] == "Start 1 processes or fewer"


@pytest.mark.slow
def test_gradients_are_those_of_the_batches_of_all(two: list[dict[str, Any]]) -> None:
    alone = [gradients(rank) for rank in range(2)]
    for one, other, first, second in zip(*alone, *(found["gradients"] for found in two), strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, (one + other) / 2)


@pytest.mark.slow
def test_the_first_process_alone_decides_what_is_stored_and_writes_it(two: list[dict[str, Any]]) -> None:
    """Asked: for a new stage, once more, after damage, and for one that only the second process would find."""
    first, second = (found["store"] for found in two)
    asked, files = zip(first, second, strict=True)
    assert asked == ([(0, 1, 1), (0, 1, 1), (0, 2, 2), (0, 3, 3)], [(0, 1, 2), (0, 1, 2), (0, 2, 3), (0, 3, 4)])
    assert files == (["cam-0123.safetensors", "elsewhere-0123.safetensors"], ["elsewhere-0123.safetensors"])


# --- the command ---------------------------------------------------------------------------------------------------

def command(profile: Profile, *arguments: str) -> None:
    """``covidseg`` with another profile by the name of ``quick``."""
    PROFILES["quick"] = profile
    sys.argv = ["covidseg", *arguments]
    main()


SCRIPT = """
import runpy
from covidseg.profiles import PROFILES
from tiny import TINY
PROFILES["quick"] = TINY
runpy.run_module("covidseg", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_ends_the_other_says_so_and_torchrun_goes_on_with_what_is_stored(
        tiny_phantom: Path, tmp_path: Path, killed: int) -> None:
    out, left = tmp_path / "out", 1 - killed
    endless = replace(TINY, classifier=replace(TINY.classifier, steps=10**6))
    asked = ["train", "--data", str(tiny_phantom), "--out", str(out), "--device", "cpu"]
    started = start(command, tmp_path / "run", endless, *asked)
    waits = time.monotonic()
    while not list((out / "stages").glob("weak-*.sha256")):
        assert time.monotonic() < waits + SECONDS
        assert all(process.is_alive() for process in started)
        time.sleep(0.1)
    time.sleep(1)
    os.kill(started[killed].pid, signal.SIGKILL)  # type: ignore[arg-type]
    assert finish(started)[left] == 10
    error = (tmp_path / "run" / f"{left}.err").read_text()
    assert error.count("error:") == 1
    assert "another process of this training has ended" in error
    assert "goes on with the last stored stage" in " ".join(error.split())
    assert "Traceback" not in error
    assert (tmp_path / "run" / "1.out").read_text() == "", "the first process alone prints"
    if killed:
        return

    # Again, as the README says it, but for settings that train in a second.
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tools"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *asked],
        text=True, capture_output=True, timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "300", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "lungs step" not in done.stdout, "the lung net is stored"
    for said in ("classifier step    8/8", "patches step", "segmenter step    8/8", "run finished"):
        assert done.stdout.count(said) == 1 + (said == "patches step") * 7, "the first process alone prints"
    assert json.loads((out / "run.json").read_text())["stages"].keys() == set(STAGES)
    assert len(list((out / "stages").glob("*.safetensors"))) == len(STAGES)
    load_predictor(out)


def test_other_commands_refuse_to_run_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ["lungs", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out")]
    with pytest.raises(SettingsError, match="`lungs` runs in one process, only `train` in several") as caught:
        app(asked, standalone_mode=False)
    assert caught.value.remedy == "Start it without torchrun"
    assert caught.value.exit_code == 9


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place(1, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="another process of this training does not answer"), \
            joined(CPU, timedelta(seconds=1)):
        pytest.fail("there is no other process")


def test_a_process_that_is_one_of_several_has_to_know_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in place(0, 1):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SettingsError, match=r"was not told where the others are.*RANK"), joined(CPU):
        pytest.fail("it cannot join anybody")


@pytest.mark.parametrize(("said", "fault"), [
    ("[/x/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:40331", "has ended (Connection closed"),
    ("[/x/pair.cc:544] Read error [127.0.0.1]:5: Connection reset by peer\nmore", "has ended (Read error"),
    ("[/x/unbound_buffer.cc:81] Timed out waiting 3000ms for recv operation to complete", "does not answer (Timed out"),
    ("NCCL error: unhandled cuda error", "cannot exchange data (NCCL error")])
def test_errors_of_the_communication_are_named(said: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: Any, **more: Any) -> None:
        raise RuntimeError(said)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.distributed, "init_process_group", broken)
    with pytest.raises(ProcessError) as caught, joined(CPU):
        pass
    assert fault in str(caught.value)
    assert "/x/" not in str(caught.value)
    assert str(caught.value).endswith("Start the same command again: it goes on with the last stored stage.")
    assert caught.value.exit_code == 10


@pytest.mark.parametrize(("rank", "device"), [("0", "cuda:0"), ("1", "cuda:1"), ("2", None)])
def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch, rank: str, device: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto") == torch.device("cuda"), "a process that is alone"
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", rank)
    if device is None:
        with pytest.raises(SettingsError, match=r"process 3 on this machine finds only 2 GPUs.*--nproc-per-node 2"):
            pick_device("cuda")
    else:
        assert pick_device("auto") == pick_device("cuda") == own_gpu() == torch.device(device)
    assert pick_device("cpu") == CPU


# --- alone ---------------------------------------------------------------------------------------------------------

def test_alone_there_is_nothing_to_share() -> None:
    with joined(CPU):
        assert processes() == 1
        assert rank() == 0
        assert is_first()
        assert from_first(lambda: "made") == "made"
    assert Training("toy", SegmenterSettings(batch=1), 0, CPU, quiet).own_batch() == 1
