"""Several processes train what one trains; the first alone writes; when one ends, the others say so and end as well."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import STAGES, TINY, WARM, in_double, quiet, toy, weights
from torch import Tensor, nn

from covidseg.classifier import ClassifierSettings, Lesson, train_classifier
from covidseg.cli import app, main
from covidseg.errors import ProcessError, SettingsError
from covidseg.lungnet import LungNetSettings, train_lung_net
from covidseg.parallel import (
    WholeBatchNorm2d,
    average_gradients,
    from_first,
    is_first,
    joined,
    own_gpu,
    own_share,
    processes,
    with_whole_batch_norms,
)
from covidseg.patches import MilSettings, train_mil
from covidseg.predict import load_predictor
from covidseg.profiles import PROFILES, Profile
from covidseg.segmenter import SegmenterSettings, train_segmenter
from covidseg.store import Store, save_arrays
from covidseg.training import Progress, on_device, pick_device, run_net

CPU, ROOT = torch.device("cpu"), Path(__file__).resolve().parents[1]
SECONDS = 200  # for whatever is started here


# --- processes as torchrun starts them -----------------------------------------------------------------------------

def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return int(made.getsockname()[1])


def place(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells each process."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def _begin(job: Callable[..., Any], rank: int, count: int, port: int, folder: Path, given: tuple[Any, ...]) -> None:
    os.environ |= place(rank, count, port)
    sys.stdout, sys.stderr = (open(folder / f"{rank}.{name}", "w", buffering=1) for name in ("out", "err"))  # noqa: SIM115
    torch.set_num_threads(1)
    torch.save(job(*given), folder / f"{rank}.pt")


def start(job: Callable[..., Any], count: int, folder: Path, *given: Any) -> list[BaseProcess]:
    """Processes that do a job; what it returns and prints lies in the folder: ``RANK.pt``, ``.out`` and ``.err``."""
    import monai.networks.nets  # noqa: F401 - takes ten seconds, here once or in each of the processes

    folder.mkdir()
    port = free_port()
    started = [WARM.Process(target=_begin, args=(job, rank, count, port, folder, given)) for rank in range(count)]
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


def results(job: Callable[..., Any], count: int, folder: Path, *given: Any) -> list[Any]:
    """What a job returns in each process."""
    codes = finish(start(job, count, folder, *given))
    assert codes == [0] * count, "".join(path.read_text() for path in sorted(folder.glob("*.err")))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


Trained = tuple[np.ndarray, dict[str, np.ndarray]]  # losses of each step (steps, losses), weights


# --- the same training ---------------------------------------------------------------------------------------------

def train_each(batch: int) -> dict[str, Callable[[], nn.Module]]:
    """A few steps of each net on toy slices."""
    data, disks = toy(12, 80)  # slices of 80 pixels, so that the coarsest maps are not too small
    doubtful = np.where(disks, np.float32(0.7), np.float32(0.1))
    lesson = Lesson(doubtful, data.crops.lungs, 1.0)
    return {
        "classifier": lambda: train_classifier(data, ClassifierSettings(width=4, steps=5, batch=batch), lesson=lesson,
                                               seed=1, log=quiet),
        "segmenter": lambda: train_segmenter(
            data, doubtful, np.ones_like(doubtful),
            SegmenterSettings(channels=(4, 8), steps=5, batch=batch, refresh=(0.5,), paste=0.5), seed=1, log=quiet),
        "lungs": lambda: train_lung_net(data, LungNetSettings(steps=3, again=3, size=64, channels=(4, 8), batch=batch),
                                        seed=1, log=quiet),
        "patches": lambda: train_mil(data, doubtful, MilSettings(width=4, steps=5, batch=batch), seed=1, log=quiet)[0]}


def trained(batch: int, double: bool) -> dict[str, Trained]:
    """Each net by its name."""
    found = {}
    with pytest.MonkeyPatch.context() as patch, in_double() if double else nullcontext():
        for name, train in train_each(batch).items():
            losses: list[list[float]] = []
            patch.setattr(Progress, "step", lambda self, number, to=losses, **each: to.append(list(each.values())))
            values = weights(train())
            found[name] = np.array(losses), values
    return found


@functools.cache
def alone(batch: int, double: bool) -> dict[str, Trained]:
    """:func:`trained` in this process."""
    return trained(batch, double)


def half_precision() -> list[Tensor]:
    """Result and gradients of a small net that computes in bfloat16, and its running statistics."""
    torch.manual_seed(0)
    net = on_device(nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)), CPU)
    outputs = run_net(net, torch.rand(5, 2, 12, 12), half=True)
    outputs.square().mean().backward()
    average_gradients(net)
    return [outputs.detach(), *(weight.grad for weight in net.parameters()), *net.buffers()]  # type: ignore[list-item]


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
    with joined(CPU):
        return {"processes": processes(), "double": trained(4, True), "single": trained(4, False),
                "half": half_precision(), "store": decisions(folder)}


def all_in_three() -> dict[str, Trained]:
    with joined(CPU):
        return trained(5, True)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("two")
    return results(all_in_two, 2, folder / "run", folder)


def farthest(a: Trained, b: Trained) -> tuple[float, float]:
    """Largest difference of losses and of weights."""
    assert a[0].shape == b[0].shape
    assert a[1].keys() == b[1].keys(), "saved weights have the same names"
    return float(np.abs(a[0] - b[0]).max()), max(float(np.abs(a[1][k] - b[1][k]).max()) for k in a[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "segmenter", "lungs", "patches"])
def test_two_processes_train_what_one_trains(two: list[dict[str, Any]], name: str) -> None:
    """In double precision it shows that the arithmetic is the same; maps in between are made in single precision."""
    one = alone(4, True)[name]
    assert [found["processes"] for found in two] == [2, 2]
    for found in two:
        losses, values = farthest(one, found["double"][name])
        assert losses < 1e-10
        assert values < 1e-7
    assert np.ptp(one[0][:, 0]) > 1e-3, "something was learned"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["classifier", "segmenter", "lungs", "patches"])
def test_in_single_precision_they_differ_by_rounding(two: list[dict[str, Any]], name: str) -> None:
    """Adam carries rounding on: weights without a gradient, such as a bias before a batch normalisation, drift freely.

    So they do in one process that only takes the slices of a batch in another order.
    """
    one = alone(4, False)[name]
    for found in two:
        differences = np.abs(one[0] - found["single"][name][0])
        assert differences[0].max() < 1e-6
        assert differences.max() < 1e-3
    assert farthest(*(found["single"][name] for found in two)) == (0, 0), "and do not run apart"


@pytest.mark.slow
def test_three_processes_share_five_slices_or_one(tmp_path: Path) -> None:
    """The classifier looks at one slice flipped: two of the processes have nothing to do then."""
    for found in results(all_in_three, 3, tmp_path / "run"):
        for name, one in alone(5, True).items():
            losses, values = farthest(one, found[name])
            assert losses < 1e-10
            assert values < 1e-7


@pytest.mark.slow
def test_half_precision_is_shared_as_well(two: list[dict[str, Any]]) -> None:
    for found in two:
        for part, one in zip(found["half"], half_precision(), strict=True):
            assert part.dtype == one.dtype
            torch.testing.assert_close(part, one, atol=0.02, rtol=0.02)


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


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_when_a_process_ends_the_other_says_so_and_what_is_stored_is_used_again(
        tiny_phantom: Path, tmp_path: Path, killed: int) -> None:
    out, left = tmp_path / "out", 1 - killed
    endless = replace(TINY, classifier=replace(TINY.classifier, steps=10**6))
    asked = ["train", "--data", str(tiny_phantom), "--out", str(out), "--device", "cpu"]
    started = start(command, 2, tmp_path / "run", endless, *asked)
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

    assert finish(start(command, 2, tmp_path / "again", TINY, *asked)) == [0, 0]
    printed = (tmp_path / "again" / "0.out").read_text()
    assert "lungs step" not in printed, "the lung net is stored"
    for said in ("classifier step    8/8", "patches step", "segmenter step    8/8", "run finished"):
        assert printed.count(said) == 1 + (said == "patches step") * 7, said
    assert json.loads((out / "run.json").read_text())["stages"].keys() == set(STAGES)
    assert len(list((out / "stages").glob("*.safetensors"))) == len(STAGES)


SCRIPT = """
import runpy
from covidseg.profiles import PROFILES
from tiny import TINY
PROFILES["quick"] = TINY
runpy.run_module("covidseg", run_name="__main__")
"""


@pytest.mark.slow
def test_torchrun_starts_processes_that_train_together(tiny_phantom: Path, tmp_path: Path) -> None:
    """As the README says it, but for settings that train in a second."""
    script, out = tmp_path / "script.py", tmp_path / "out"
    script.write_text(SCRIPT)
    path = os.pathsep.join(str(folder) for folder in (ROOT, ROOT / "tests", ROOT / "tools"))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, "train",
         "--data", tiny_phantom, "--out", out, "--device", "cpu"], text=True, capture_output=True, timeout=SECONDS,
        env=os.environ | {"PYTHONPATH": path, "COLUMNS": "300", "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("run finished") == done.stdout.count("segmenter step    8/8") == 1, "the first one prints"
    assert json.loads((out / "run.json").read_text())["stages"].keys() == set(STAGES)
    load_predictor(out)


def test_other_commands_refuse_to_run_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    asked = ["lungs", str(tmp_path / "scan.nii.gz"), "-o", str(tmp_path / "out")]
    with pytest.raises(SettingsError, match="`lungs` runs in one process, only `train` in several") as caught:
        app(asked, standalone_mode=False)
    assert caught.value.remedy == "Start it without torchrun"
    assert caught.value.exit_code == 9


# --- faults --------------------------------------------------------------------------------------------------------

def silent_first() -> str:
    """The first process keeps the other waiting for longer than they agreed on."""
    try:
        with joined(CPU, timedelta(seconds=1)):
            from_first(lambda: time.sleep(3))
    except ProcessError as error:
        return str(error)
    return "done"


@pytest.mark.slow
def test_a_silent_process_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    found = results(silent_first, 2, tmp_path / "run")
    assert found[1].startswith("another process of this training does not answer (")
    assert "\n" not in found[1]


def test_processes_that_do_not_find_each_other_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in place(1, 2, free_port()).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ProcessError, match="another process of this training does not answer"), \
            joined(CPU, timedelta(seconds=1)):
        pytest.fail("there is no other process")


def test_a_process_that_is_one_of_several_has_to_know_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in place(0, 1, 1):
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
    inputs = torch.rand(3, 2)
    with joined(CPU):
        assert processes() == 1
        assert is_first()
        assert own_share(inputs) is inputs
        assert from_first(lambda: "made") == "made"
    net = nn.Sequential(nn.BatchNorm2d(2))
    with_whole_batch_norms(net)
    assert type(net[0]) is nn.BatchNorm2d


def test_whole_batch_normalisation_is_the_usual_one_in_one_process() -> None:
    inputs = torch.rand(3, 2, 4, 4)
    plain, whole = nn.BatchNorm2d(2), WholeBatchNorm2d(2)
    assert torch.equal(plain(inputs), whole(inputs))
    plain.load_state_dict(whole.state_dict())
    whole.load_state_dict(plain.state_dict())
    assert torch.equal(plain.eval()(inputs), whole.eval()(inputs))
