"""The parts that all training loops share: seeds, balanced batches, augmentation, the averaged net."""

from __future__ import annotations

import copy
import os
import platform
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, WARM, in_turn, quiet, same_weights, toy
from torch import nn

from covidseg.classifier import ClassifierSettings, Guidance, train_classifier
from covidseg.devices import made_for_half, pick_device, use_deterministic_kernels
from covidseg.lungnet import train_lung_net
from covidseg.patches import train_mil
from covidseg.segmenter import train_segmenter
from covidseg.training import Average, Training, learning_rate

pytestmark = pytest.mark.nets

CPU = torch.device("cpu")
# Patient a has many slices, b few, c no lesion, d nothing but lesions.
PATIENTS = np.array(["a"] * 60 + ["b"] * 4 + ["c"] * 20 + ["d"] * 10)
LABELS = np.array([0, 1] * 30 + [0, 1, 1, 1] + [0] * 20 + [1] * 10)


def training(seed: int = 0, *, steps: int = 6, batch: int = 8, **more: Any) -> Training:
    return Training("stage", ClassifierSettings(steps=steps, batch=batch), seed, CPU, **{"log": quiet, **more})


def draws(seed: int) -> tuple[float, float, float, float]:
    own = training(seed).generator
    legacy = np.random.rand()  # noqa: NPY002  the global state is what is tested
    return random.random(), legacy, torch.rand(1).item(), torch.rand(1, generator=own).item()


def test_a_seed_fixes_every_source_of_chance() -> None:
    first, again, other = draws(5), draws(5), draws(6)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))


def _ask_for_determinism() -> None:
    assert not torch.are_deterministic_algorithms_enabled()
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled()
    assert torch.is_deterministic_algorithms_warn_only_enabled()
    assert torch.backends.cudnn.deterministic
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_deterministic_kernels_are_used_on_request() -> None:
    """In a process of its own, since it holds for the rest of it."""
    process = WARM.Process(target=_ask_for_determinism)
    process.start()
    process.join()
    assert process.exitcode == 0


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_memory_of_one_step_serves_the_next() -> None:
    # Pages that the system has to fill, in a process of its own: 100 blocks of 40 MB are a million.
    code = """
import resource, torch
from covidseg.devices import keep_freed_memory

def faults():
    torch.ones(10_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [float(torch.ones(10_000_000)[0]) for _ in range(100)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    before, told, after = done.stdout.split()
    assert told == "True"
    assert int(before) > 500_000
    assert int(after) < 200_000


@pytest.mark.parametrize("available", [True, False])
def test_auto_device_follows_the_machine(monkeypatch: pytest.MonkeyPatch, available: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert pick_device("auto").type == ("cuda" if available else "cpu")
    assert pick_device("cpu").type == "cpu"


def drawn(seed: int, steps: int) -> np.ndarray:
    """The numbers of the slices of all batches of eight, ``(steps, 8)``."""
    data = SimpleNamespace(labels=LABELS, patients=PATIENTS)
    return np.stack([numbers.numpy() for numbers, in training(seed, steps=steps).batches(lambda k: (k,), data)])


def test_half_of_each_batch_is_positive_and_the_seed_alone_decides() -> None:
    numbers = drawn(1, 50)
    assert numbers.shape == (50, 8)
    assert (LABELS[numbers].sum(1) == 4).all()
    assert np.array_equal(numbers, drawn(1, 50))
    assert not np.array_equal(numbers, drawn(2, 50))


def test_patients_are_equally_likely_and_so_are_the_slices_of_each() -> None:
    picked = drawn(0, 600).ravel()
    for label, expected in ((0, {"a", "b", "c"}), (1, {"a", "b", "d"})):
        who = PATIENTS[picked[LABELS[picked] == label]]
        assert set(who) == expected
        for patient in expected:  # 2400 draws: one standard deviation is below 0.01
            assert np.mean(who == patient) == pytest.approx(1 / 3, abs=0.05)
    counts = np.bincount(picked, minlength=len(LABELS))[(PATIENTS == "d")]
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()


class Making:
    """Batches of one number each, and a record of which were begun and where."""

    def __init__(self, count: int = 6, fails_at: int = 0, hold: Collection[int] = ()) -> None:
        self.count, self.fails_at, self.begun = count, fails_at, list[int]()
        self.threads, self.cores = set[str](), set[int]()
        self.batches = training().prefetched(self.made(), hold=hold)

    def made(self) -> Iterator[tuple[torch.Tensor, ...]]:
        for number in range(1, self.count + 1):
            self.begun.append(number)
            self.threads.add(threading.current_thread().name)
            self.cores.add(torch.get_num_threads())
            if number == self.fails_at:
                raise ValueError(f"batch {number}")
            yield (torch.tensor([float(number)]),)

    def settled(self) -> list[int]:
        """What was begun, once nothing new is."""
        before = -1
        while before != len(self.begun):
            before = len(self.begun)
            time.sleep(0.05)
        return self.begun

    def running(self) -> bool:
        return any(thread.name in self.threads for thread in threading.enumerate())


def test_batches_come_in_order_from_one_other_thread_that_keeps_ahead() -> None:
    making, cores = Making(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for number, (batch,) in enumerate(making.batches, start=1):
            assert batch.item() == number
            assert making.settled() == list(range(1, min(number + 2, 6) + 1))
        with ThreadPoolExecutor(1) as other:
            assert torch.get_num_threads() == other.submit(torch.get_num_threads).result() == 2, "only that thread"
    finally:
        torch.set_num_threads(cores)
    assert number == 6
    assert len(making.threads) == 1
    assert threading.current_thread().name not in making.threads
    assert making.cores == {1}
    assert not making.running()


def test_a_held_batch_is_begun_only_when_it_is_asked_for() -> None:
    making = Making(hold={2, 5})
    assert [len(making.settled()) for _ in making.batches] == [1, 4, 4, 4, 6, 6]


def test_faults_of_the_other_thread_reach_the_loop_after_the_batches_before_it_and_end_the_thread() -> None:
    making = Making(fails_at=3)
    assert [next(making.batches)[0].item() for _ in range(2)] == [1, 2]
    assert making.running()
    with pytest.raises(ValueError, match="batch 3"):
        next(making.batches)
    assert not making.running()
    endless = Making(count=10**6)
    for (batch,) in endless.batches:
        if batch.item() == 3:
            break
    assert endless.running()
    del endless.batches
    assert not endless.running(), "leaving the loop ends the thread"


def filled(value: float) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def test_average_forgets_the_start_and_then_moves_by_its_decay_and_shares_nothing_with_the_net() -> None:
    average, target = Average(filled(0.0), decay=0.9), filled(1.0)
    distances = []
    for _ in range(200):
        average.update(target)
        distances.append(abs(1 - average.net[0].weight[0].item()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < 0.2, "the random start is soon forgotten"
    assert distances[-1] < 1e-6
    target[1].num_batches_tracked += 7
    with torch.no_grad():
        target[0].weight.fill_(2.0)
    assert average.net[0].weight.flatten().tolist() == pytest.approx([1, 1])
    average.update(target)
    assert average.net[0].weight.flatten().tolist() == pytest.approx([1.1, 1.1])
    assert average.net[1].num_batches_tracked.item() == 7, "counters are copied"
    assert not any(p.requires_grad for p in average.net.parameters())
    assert not average.net.training
    picture = torch.rand(1, 1, 4, 4)
    assert torch.equal(average(picture), average.net(picture))


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))


def test_in_half_precision_the_net_computes_in_bfloat16_and_all_that_comes_out_is_full() -> None:
    net, inputs = wide_net(), torch.rand(4, 2, 12, 12)
    plain = copy.deepcopy(net)(inputs)
    assert torch.equal(Training.run(copy.deepcopy(net), inputs), plain), "on a CPU a net is run as it is"
    assert torch.equal(Training.run(lambda a, b: a + b, inputs, inputs), 2 * inputs)
    inside: list[torch.dtype] = []
    net[3].register_forward_hook(lambda module, given, result: inside.append(result.dtype))
    logits = Training.run(net, inputs, half=True)
    assert inside == [torch.bfloat16]
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, plain)
    torch.testing.assert_close(logits, plain, atol=0.02, rtol=0.02)
    # A loss that refuses half precision takes the result, and gradients arrive in full.
    nn.functional.binary_cross_entropy(logits.sigmoid(), torch.ones_like(logits)).backward()
    assert {p.grad.dtype for p in net.parameters()} == {torch.float32}
    assert net[1].running_mean.dtype == torch.float32


@pytest.mark.parametrize("native", [True, False])
def test_only_gpus_made_for_it_compute_in_half_precision(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert made_for_half(torch.device("cuda")) == native
    assert not made_for_half(CPU)


def test_learning_rate_rises_to_the_peak_and_falls_to_almost_nothing() -> None:
    optimizer = torch.optim.SGD(filled(0.0).parameters(), lr=0.1)
    schedule = learning_rate(optimizer, 40)
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    top = int(np.argmax(rates))
    assert max(rates) == pytest.approx(0.1, rel=0.05)
    assert 0 < top < 20
    assert rates[0] < 0.02
    assert rates[-1] < 0.001
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_one_line_an_epoch_with_means_is_printed_and_kept() -> None:
    lines: list[str] = []
    work = training(steps=10, lines=3, log=lines.append)
    net = work.begin(nn.Linear(1, 1))
    for step in range(1, 11):
        work.step(net.weight.sum(), loss=torch.tensor(float(step)), other=torch.tensor(1.0))
    assert [row["step"] for row in work.history] == [3, 6, 9, 10]
    assert [row["loss"] for row in work.history] == [2.0, 5.0, 8.0, 10.0]
    assert work.averaged().history == work.history
    assert len(lines) == 4
    for part in ("stage", "loss 2.000", "other 1.000"):
        assert part in lines[0]


# --- the loops of the stages --------------------------------------------------------------------------------------

DATA, DISKS = toy(12)
MAP, DOUBTFUL = DISKS.astype(np.float32), np.where(DISKS, np.float32(0.6), np.float32(0.2))
LOOPS: dict[str, Callable[..., Any]] = {
    "classifier": partial(train_classifier, DATA, TINY.classifier),
    "taught classifier": partial(train_classifier, DATA, TINY.classifier, guidance=Guidance(MAP, 1.0)),
    "patches": lambda **rest: train_mil(DATA, MAP, TINY.mil, **rest)[0],
    "lung net": partial(train_lung_net, DATA, replace(TINY.lung_net, again=3,
                                                      paint=replace(TINY.lung_net.paint, share=1.0))),
    # Also after the fine labels were refreshed, where no batch may be made of the old ones.
    "segmenter": partial(train_segmenter, DATA, DOUBTFUL, np.ones_like(DOUBTFUL),
                         replace(TINY.segmenter, steps=12, refresh=(0.3, 0.6), paste=0.5))}


@pytest.mark.parametrize("name", LOOPS)
def test_a_training_repeats_with_the_seed_and_batches_made_ahead_are_those_made_in_turn(
        name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def trained(seed: int) -> nn.Module:
        return LOOPS[name](seed=seed, log=quiet)
    first, ahead = trained(2), Training.prefetched
    assert not first.training
    assert not same_weights(first, trained(3))
    monkeypatch.setattr(Training, "prefetched", in_turn)
    assert same_weights(first, trained(2))
    if name == "segmenter":
        monkeypatch.setattr(Training, "prefetched", lambda self, batches, hold: ahead(self, batches))
        assert not same_weights(first, trained(2)), "what they are held for matters"
