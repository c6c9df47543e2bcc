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
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import TINY, WARM, in_turn, quiet, same_weights, toy
from torch import nn

from covidseg.augment import augment, jitter
from covidseg.classifier import ClassifierSettings, Guidance, train_classifier
from covidseg.devices import made_for_half, pick_device, use_deterministic_kernels
from covidseg.lungnet import train_lung_net
from covidseg.patches import train_mil
from covidseg.preprocess import net_input
from covidseg.segmenter import train_segmenter
from covidseg.training import Average, Training, balanced_batches, learning_rate, overlapped, seed_everything

pytestmark = pytest.mark.nets

# Patient a has many slices, b few, c no lesion, d nothing but lesions.
PATIENTS = np.array(["a"] * 60 + ["b"] * 4 + ["c"] * 20 + ["d"] * 10)
LABELS = np.array([0, 1] * 30 + [0, 1, 1, 1] + [0] * 20 + [1] * 10)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draws(seed: int) -> tuple[float, float, float, float]:
    own = seed_everything(seed)
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


def test_half_of_each_batch_is_positive_and_the_seed_alone_decides() -> None:
    def batches(seed: int) -> torch.Tensor:
        return torch.stack(list(balanced_batches(LABELS, PATIENTS, 8, 50, generator(seed))))
    drawn = batches(1)
    assert drawn.shape == (50, 8)
    assert (LABELS[drawn].sum(1) == 4).all()
    assert torch.equal(drawn, batches(1))
    assert not torch.equal(drawn, batches(2))


def test_patients_are_equally_likely_and_so_are_the_slices_of_each() -> None:
    picked = torch.cat(list(balanced_batches(LABELS, PATIENTS, 8, 600, generator()))).numpy()
    for label, expected in ((0, {"a", "b", "c"}), (1, {"a", "b", "d"})):
        who = PATIENTS[picked[LABELS[picked] == label]]
        assert set(who) == expected
        for patient in expected:  # 2400 draws: one standard deviation is below 0.01
            assert np.mean(who == patient) == pytest.approx(1 / 3, abs=0.05)
    counts = np.bincount(picked, minlength=len(LABELS))[(PATIENTS == "d")]
    assert counts.min() > 0.6 * counts.mean()
    assert counts.max() < 1.4 * counts.mean()


CPU = torch.device("cpu")


class Making:
    """Batches of one number each, and a record of which were begun and where."""

    def __init__(self, count: int = 6, fails_at: int = 0) -> None:
        self.count, self.fails_at, self.begun = count, fails_at, list[int]()
        self.threads, self.cores = set[str](), set[int]()

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
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


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


def test_overlapped_batches_come_in_order_from_one_other_thread_that_keeps_ahead() -> None:
    making, cores = Making(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for number, (batch,) in enumerate(overlapped(iter(making), CPU), start=1):
            assert batch.item() == number
            assert making.settled() == list(range(1, min(number + 2, 6) + 1))
        other: list[int] = []
        thread = threading.Thread(target=lambda: other.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        assert torch.get_num_threads() == 2
        assert other == [2], "no other thread is held to one core"
    finally:
        torch.set_num_threads(cores)
    assert number == 6
    assert making.threads == {"batches_0"}
    assert making.cores == {1}
    assert not helpers()


def test_a_held_batch_is_begun_only_when_it_is_asked_for() -> None:
    making = Making()
    batches = overlapped(iter(making), CPU, hold={2, 5})
    seen = []
    for _ in range(6):
        next(batches)
        seen.append(len(making.settled()))
    assert seen == [1, 4, 4, 4, 6, 6]


def test_faults_of_the_other_thread_reach_the_loop_after_the_batches_before_it_and_end_the_thread() -> None:
    batches = overlapped(iter(Making(fails_at=3)), CPU)
    assert [next(batches)[0].item() for _ in range(2)] == [1, 2]
    assert helpers()
    with pytest.raises(ValueError, match="batch 3"):
        next(batches)
    assert not helpers()
    for (batch,) in overlapped(iter(Making(count=10**6)), CPU):
        if batch.item() == 3:
            break
    assert not helpers(), "leaving the loop ends the thread"


def symmetries(image: torch.Tensor) -> list[torch.Tensor]:
    """The eight ways to lay a square on itself."""
    turned = [torch.rot90(image, k, (-2, -1)) for k in range(4)]
    return turned + [t.flip(-1) for t in turned]


def test_augmentation_moves_all_channels_alike_and_jitter_none_and_both_change_the_picture_only() -> None:
    code = torch.arange(36.0).reshape(1, 1, 6, 6).expand(3, 1, 6, 6)
    maps = torch.cat([code, code, 100 + code], dim=1)
    for change, ways in ((augment, set(range(8))), (jitter, {0})):
        source, before, seen = generator(), maps.clone(), set()
        for _ in range(80):
            out = change(maps, source)
            fits = [k for k, image in enumerate(symmetries(code)) if torch.equal(out[:, 1:2], image)]
            assert len(fits) == 1, "channel 1 has to be one of the eight positions, its values untouched"
            seen.add(fits[0])
            assert torch.equal(out[:, 2:3], symmetries(100 + code)[fits[0]])
            for picture, moved in zip(out[:, 0], out[:, 1], strict=True):
                assert not torch.equal(picture, moved)
                assert np.corrcoef(picture.ravel(), moved.ravel())[0, 1] > 0.999
        assert seen == ways
        assert torch.equal(maps, before), "the input itself stays as it is"
        assert torch.equal(change(maps, generator(3)), change(maps, generator(3)))
        assert not torch.equal(change(maps, generator(3)), change(maps, generator(4)))


def test_jitter_draws_gain_offset_and_noise_for_each_slice() -> None:
    maps = torch.zeros(500, 1, 10, 10)
    maps[:, :, 5:] = 1.0
    out = jitter(maps, generator())[:, 0]
    offset, top = out[:, :5].mean((1, 2)), out[:, 5:].mean((1, 2))
    assert (top - offset).mean().item() == pytest.approx(1, abs=0.03)
    assert (top - offset).std().item() == pytest.approx(0.1, rel=0.2)
    assert offset.mean().item() == pytest.approx(0, abs=0.01)
    assert offset.std().item() == pytest.approx(0.04, rel=0.2)
    noise = out[:, :5].std((1, 2))
    assert noise.min() < 0.005
    assert 0.02 < noise.max() < 0.05


def test_net_input_sets_everything_outside_the_lung_to_air() -> None:
    pictures, lungs = torch.rand(2, 1, 8, 8) + 1, (torch.rand(2, 1, 8, 8) > 0.5).float()
    out = net_input(pictures, lungs)
    assert out.shape == (2, 2, 8, 8)
    assert (out[:, :1][lungs == 0] == 0).all()
    assert torch.equal(out[:, :1][lungs == 1], pictures[lungs == 1])
    assert torch.equal(out[:, 1:], lungs)


def filled(value: float) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    return net


def test_average_forgets_the_start_and_then_moves_by_its_decay() -> None:
    average, target = Average(filled(0.0), decay=0.9), filled(1.0)
    distances = []
    for _ in range(200):
        average.update(target)
        distances.append(abs(1 - average.net[0].weight[0].item()))
    assert distances == sorted(distances, reverse=True)
    assert distances[0] < 0.2, "the random start is soon forgotten"
    assert distances[-1] < 1e-6
    average.update(filled(2.0))
    assert average.net[0].weight.flatten().tolist() == pytest.approx([1.1, 1.1])


def test_average_copies_counters_and_shares_nothing_with_the_net() -> None:
    net = filled(0.0)
    average = Average(net)
    net[1].num_batches_tracked += 7
    net[1].running_mean += 1
    average.update(net)
    assert average.net[1].num_batches_tracked.item() == 7
    assert 0 < average.net[1].running_mean[0].item() < 1.0001
    assert not any(p.requires_grad for p in average.net.parameters())
    assert not average.net.training
    with torch.no_grad():
        net[0].weight.fill_(9)
    assert average.net[0].weight.max() == 0
    picture = torch.rand(1, 1, 4, 4)
    assert torch.equal(average(picture), average.net(picture))


def wide_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1))


def test_a_net_on_the_cpu_is_run_as_it_is() -> None:
    net, inputs = wide_net(), torch.rand(4, 2, 12, 12)
    expected = copy.deepcopy(net)(inputs)
    assert torch.equal(Training.run(net, inputs), expected)
    assert torch.equal(Training.run(lambda a, b: a + b, inputs, inputs), 2 * inputs)


def test_in_half_precision_the_net_computes_in_bfloat16_and_all_that_comes_out_is_full() -> None:
    net, inputs = wide_net(), torch.rand(4, 2, 12, 12)
    inside: list[torch.dtype] = []
    net[3].register_forward_hook(lambda module, given, result: inside.append(result.dtype))
    plain = copy.deepcopy(net)(inputs)
    logits = Training.run(net, inputs, half=True)
    assert inside == [torch.float32, torch.bfloat16]
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


def test_progress_prints_one_line_an_epoch_with_means() -> None:
    lines: list[str] = []
    training = Training("stage", ClassifierSettings(steps=10), 0, CPU, lines.append, lines=3)
    net = training.begin(filled(0.0))
    for step in range(1, 11):
        training.step(net(torch.ones(1, 1, 2, 2)).sum(), loss=torch.tensor(float(step)), other=torch.tensor(1.0))
    assert [row["step"] for row in training.history] == [3, 6, 9, 10]
    assert [row["loss"] for row in training.history] == [2.0, 5.0, 8.0, 10.0]
    assert len(lines) == 4
    assert "stage" in lines[0]
    assert "loss 2.000" in lines[0]
    assert "other 1.000" in lines[0]


# --- the loops of the stages --------------------------------------------------------------------------------------

def classifier(seed: int) -> nn.Module:
    data, _ = toy(12)
    return train_classifier(data, replace(TINY.classifier, steps=6), seed=seed, log=quiet)


def taught_classifier(seed: int) -> nn.Module:
    data, disks = toy(12)
    guidance = Guidance(disks.astype(np.float32), data.crops.lungs, 1.0)
    return train_classifier(data, replace(TINY.classifier, steps=6), guidance=guidance, seed=seed, log=quiet)


def patches(seed: int) -> nn.Module:
    data, disks = toy(12)
    net, phases = train_mil(data, disks.astype(np.float32), TINY.mil, seed=seed, log=quiet)
    assert len(phases) > 1
    return net


def lung_net(seed: int) -> nn.Module:
    settings = replace(TINY.lung_net, again=3, paint=replace(TINY.lung_net.paint, share=1.0))
    return train_lung_net(toy(12)[0], settings, seed=seed, log=quiet)


def segmenter(seed: int) -> nn.Module:
    """Also after the fine labels were refreshed, where no batch may be made of the old ones."""
    data, disks = toy(12)
    doubtful = np.where(disks, np.float32(0.6), np.float32(0.2))
    settings = replace(TINY.segmenter, steps=12, refresh=(0.3, 0.6), paste=0.5)
    return train_segmenter(data, doubtful, np.ones_like(doubtful), settings, seed=seed, log=quiet)


@pytest.mark.parametrize("trained", [classifier, taught_classifier, patches, lung_net, segmenter])
def test_a_training_repeats_with_the_seed_and_batches_made_ahead_are_those_made_in_turn(
        trained: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    first, real = trained(2), overlapped
    assert not first.training
    assert not same_weights(first, trained(3))
    monkeypatch.setattr("covidseg.training.overlapped", in_turn)
    assert same_weights(first, trained(2))
    if trained is segmenter:
        monkeypatch.setattr("covidseg.training.overlapped", lambda batches, device, hold: real(batches, device))
        assert not same_weights(first, trained(2)), "what they are held for matters"
