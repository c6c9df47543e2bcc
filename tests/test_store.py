"""Stored results: what is written whole, found again and told about."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import nn

from covidseg.errors import ArtifactError, OutputError
from covidseg.lungs import LungSettings
from covidseg.preprocess import PrepareSettings
from covidseg.store import (
    PACKAGES,
    Store,
    code_hash,
    environment,
    file_hash,
    fingerprint,
    load_arrays,
    load_net,
    net_arrays,
    noted_warnings,
    save_arrays,
    write_text,
)

SOME = {"weights": np.linspace(-1, 1, 60, dtype=np.float32).reshape(3, 4, 5), "boxes": np.arange(8).reshape(2, 4)}
DTYPES = st.sampled_from([bool, np.uint8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64])


def check_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        np.testing.assert_array_equal(found[name], value)


def checksum(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


# --- round trip -------------------------------------------------------------------------------------------------

@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=8),
                       DTYPES.flatmap(lambda t: arrays(t, array_shapes(min_dims=0, max_dims=4, min_side=0,
                                                                       max_side=4))), max_size=4))
@example({"t": SOME["weights"].T, "strided": SOME["weights"][:, ::2], "backwards": SOME["boxes"][::-1]})
def test_any_arrays_come_back(tmp_path, some):
    save_arrays(tmp_path / "x.safetensors", some)
    found, notes = load_arrays(tmp_path / "x.safetensors")
    check_equal(found, some)
    assert notes == {}


def test_notes_come_back_and_the_checksum_is_the_one_that_sha256sum_reads(tmp_path):
    notes = {"seed": 3, "names": ["a:1", "Zoë:2"], "loss": [0.5, 0.25], "nested": {"x": None}}
    path = tmp_path / "new" / "x.safetensors"
    save_arrays(path, SOME, notes)
    assert load_arrays(path)[1] == notes
    assert checksum(path).read_text() == f"{file_hash(path)}  x.safetensors\n"
    (tmp_path / "abc").write_bytes(b"abc")  # the example of the standard, FIPS 180-2
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- damage -----------------------------------------------------------------------------------------------------

def test_one_changed_byte_is_found_wherever_it_is(tmp_path):
    path = tmp_path / "x.safetensors"
    save_arrays(path, SOME, {"seed": 1})
    rng = np.random.default_rng(0)
    digits = range(64)  # the name behind them says nothing about the contents
    for file, positions in ((path, rng.choice(path.stat().st_size, 40, replace=False)), (checksum(path), digits)):
        whole = file.read_bytes()
        for position in positions:
            changed = bytearray(whole)
            changed[position] ^= 1 << rng.integers(8)
            file.write_bytes(changed)
            with pytest.raises(ArtifactError, match="checksum"):
                load_arrays(path)
        file.write_bytes(whole)
    check_equal(load_arrays(path)[0], SOME)


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("where", [(Path, "write_bytes"), (os, "replace")])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch, reason, where):
    path = tmp_path / "x.safetensors"
    save_arrays(path, SOME)

    def half(target: Any, *rest: Any) -> None:
        if where == (Path, "write_bytes"):
            with target.open("wb") as stream:
                stream.write(b"half a fi")
        raise reason
    monkeypatch.setattr(*where, half)
    with pytest.raises(OutputError if isinstance(reason, OSError) else KeyboardInterrupt):
        save_arrays(path, {"other": np.zeros(3)})
    monkeypatch.undo()
    check_equal(load_arrays(path)[0], SOME)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "x.safetensors.sha256"]


def test_text_is_written_as_utf8_unless_the_place_cannot_be_written(tmp_path):
    write_text(tmp_path / "a" / "t.txt", "Größe\n")
    assert (tmp_path / "a" / "t.txt").read_bytes() == "Größe\n".encode()
    (tmp_path / "file").write_text("in the way")
    for write in (lambda p: save_arrays(p, SOME), lambda p: write_text(p, "text")):
        with pytest.raises(OutputError, match="cannot be written"):
            write(tmp_path / "file" / "x")
    assert {p.name for p in tmp_path.rglob("*")} == {"a", "t.txt", "file"}


# --- fingerprints -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Outer:
    inner: LungSettings = field(default_factory=LungSettings)
    name: str = "x"


@pytest.mark.parametrize("base", [LungSettings(), PrepareSettings()])
def test_any_changed_setting_changes_the_fingerprint(base):
    step = 40  # sizes of crops have to stay multiples of 40
    changed = [replace(base, **{f.name: getattr(base, f.name) + step}) for f in fields(base)]
    assert len({fingerprint(s, 0) for s in (base, *changed)}) == len(fields(base)) + 1
    assert fingerprint(replace(base), 0) == fingerprint(base, 0)


def test_a_fingerprint_sees_seed_nesting_order_version_and_what_files_hold(monkeypatch, tmp_path):
    base = fingerprint(Outer(), 0)
    assert len(base) == 16
    assert int(base, 16) >= 0
    assert base == fingerprint(Outer(), 0)
    others = [fingerprint(Outer(), 1), fingerprint(Outer(LungSettings(rim=3)), 0), fingerprint(0, Outer()),
              fingerprint(Outer()), fingerprint(Outer(), "0"), fingerprint(Outer(), 0, []),
              fingerprint(1, 23), fingerprint(12, 3), fingerprint([1, 2]), fingerprint([2, 1])]
    for name, content in (("a", b"same"), ("b", b"same"), ("c", b"other")):
        (tmp_path / name).write_bytes(content)
    first, again, other = (fingerprint(tmp_path / name) for name in "abc")
    assert first == again != other
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}), "keys have no order"
    monkeypatch.setattr("covidseg.store.__version__", "0.0.0")
    others.append(fingerprint(Outer(), 0))
    assert len({base, *others}) == 1 + len(others)


def test_code_that_makes_results_changes_the_hash_of_the_code(tmp_path):
    for name in ("lungs.py", "data/grey.py", "book/figures.py", "cli/app.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    hashes = [code_hash(tmp_path)]
    for name in ("book/figures.py", "cli/app.py", "lungs.py", "data/grey.py"):
        (tmp_path / name).write_text("2")
        code_hash.cache_clear()
        hashes.append(code_hash(tmp_path))
    assert hashes[0] == hashes[1] == hashes[2], "pages and commands make no results"
    assert len(set(hashes)) == 3


# --- the store --------------------------------------------------------------------------------------------------

@pytest.fixture
def make() -> Mock:
    """A stage that counts how often it was computed."""
    return Mock(return_value=(SOME, {"made": "here"}))


def test_the_store_computes_once_and_reuses_what_is_good(tmp_path, make):
    for _ in range(3):
        stored, notes = Store(tmp_path / "stages").get("cam", "0123", make)
        check_equal(stored, SOME)
        assert notes.keys() == {"made", "seconds", "peak_memory_mb", "warnings"}
        assert notes["made"] == "here"
        assert notes["seconds"] >= 0
    assert make.call_count == 1
    store = Store(tmp_path / "stages")
    store.get("cam", "4567", make)
    store.get("mil", "0123", make)
    assert make.call_count == 3  # another key and another stage are other results
    assert {p.name for p in (tmp_path / "stages").glob("*.safetensors")} == {
        store.path(stage, key).name for stage, key in (("cam", "0123"), ("cam", "4567"), ("mil", "0123"))}


class Stages:
    """Stages that take a given time by a clock of their own and ask for others in between."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.store = 1000.0, Store(folder)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def get(self, stage: str, takes: float, *before: Callable[[], Any]) -> dict[str, Any]:
        """Half of the time goes by before the other stages are asked for, half after them."""
        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            self.now += takes / 2
            for ask in before:
                ask()
            self.now += takes / 2
            return SOME, {"made": "here"}
        return self.store.get(stage, "0123", make)[1]

    def seconds(self, *stages: str) -> list[float]:
        return [self.store.seconds(stage, "0123") for stage in stages]


@pytest.fixture
def stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:
    return Stages(tmp_path, monkeypatch)


def test_a_stage_took_its_own_time_not_that_of_the_stages_before_it(stages):
    def cam() -> dict[str, Any]:
        return stages.get("cam", 5)

    def stop() -> None:
        raise KeyboardInterrupt
    notes = stages.get("fine", 2, lambda: stages.get("mil", 3, cam, cam), cam, lambda: stages.get("weak", 7))
    assert (notes["made"], notes["seconds"]) == ("here", 2)
    assert stages.now == 1000 + 5 + 3 + 2 + 7, "the second time it is stored"
    assert stages.seconds("cam", "mil", "fine", "weak") == [5, 3, 2, 7]
    assert stages.get("segmenter", 4)["seconds"] == 4, "what was made before is no concern of the next one"
    assert stages.get("fine", 100) == notes, "what is stored says what it took when it was made"
    with pytest.raises(KeyboardInterrupt):
        stages.get("mil2", 6, lambda: stages.get("cam2", 5), stop)
    assert not list(stages.store.folder.glob("mil2*")), "a stage that was stopped stores nothing"
    stages.get("fine2", 2, lambda: stages.get("mil2", 6, lambda: stages.get("cam2", 5)))
    assert stages.seconds("cam2", "mil2", "fine2") == [5, 6, 2]


def test_times_need_a_stored_stage_but_not_its_arrays(tmp_path):
    store = Store(tmp_path)
    path = store.path("cam", "0123")
    with pytest.raises(ArtifactError, match="missing"):
        store.seconds("cam", "0123")
    save_arrays(path, SOME)
    assert store.seconds("cam", "0123") == 0, "nobody measured it"
    save_arrays(path, SOME, {"seconds": 2.5})
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert store.seconds("cam", "0123") == 2.5, "neither the arrays nor their checksum are read"
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="not a safetensors file"):
        store.seconds("cam", "0123")


@pytest.mark.parametrize(("harm", "fault"), [
    (lambda path: path.write_bytes(path.read_bytes()[:200]), "checksum"),
    (lambda path: path.write_bytes(b""), "checksum"), (lambda path: path.unlink(), "missing"),
    (lambda path: checksum(path).unlink(), "missing"), (lambda path: checksum(path).write_bytes(b""), "checksum"),
    (lambda path: checksum(path).write_bytes(b"\xff\xfe\0"), "checksum"),
    (lambda path: (path.write_bytes(b"no arrays"), write_text(checksum(path), file_hash(path))),
     "not a safetensors file")],
    ids=["cut", "empty", "no file", "no checksum", "empty checksum", "bad checksum", "something else"])
def test_damage_is_named_and_the_store_computes_again(tmp_path, make, harm, fault):
    store = Store(tmp_path)
    store.get("cam", "0123", make)
    path = store.path("cam", "0123")
    harm(path)
    with pytest.raises(ArtifactError, match=fault):
        load_arrays(path)
    for _ in range(2):
        check_equal(store.get("cam", "0123", make)[0], SOME)
        assert make.call_count == 2
    check_equal(load_arrays(path)[0], SOME)  # the good file lies there now


# --- nets -------------------------------------------------------------------------------------------------------

def net(width: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.5), nn.ReLU())


def test_a_net_comes_back_with_copies_of_weights_and_buffers_ready_to_predict(tmp_path):
    trained = net()
    trained(torch.randn(5, 1, 8, 8))  # moves the running means
    save_arrays(tmp_path / "n.safetensors", net_arrays(trained))
    stored, _ = load_arrays(tmp_path / "n.safetensors")
    before = stored["0.weight"].copy()
    found = load_net(net(seed=1), stored)
    assert not found.training
    images = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(found(images), trained.eval()(images), rtol=0, atol=0)
    assert not torch.equal(found(images), net(seed=1).eval()(images))
    with torch.no_grad():
        found[0].weight += 1
    np.testing.assert_array_equal(stored["0.weight"], before)


def test_weights_of_another_net_are_refused():
    with pytest.raises(ArtifactError, match="do not fit"):
        load_net(net(width=5), net_arrays(net()))
    with pytest.raises(ArtifactError, match=r"net\.safetensors: .*do not fit.*0\.bias"):
        load_net(net(), {k: v for k, v in net_arrays(net()).items() if k != "0.bias"}, Path("net.safetensors"))
    with pytest.raises(ArtifactError, match=r"do not fit.*unheard\.of"):
        load_net(net(), {**net_arrays(net()), "unheard.of": np.zeros(1)})


def test_a_layer_that_a_net_holds_twice_is_stored_once():
    def twice(seed: int) -> nn.Module:
        one, holder = net(seed=seed), nn.Module()
        holder.first, holder.again = one, one
        return holder
    stored = net_arrays(twice(0))
    assert stored.keys() == {f"first.{name}" for name in net().state_dict()}
    found = load_net(twice(1), stored)
    np.testing.assert_array_equal(found.again[0].weight.detach(), stored["first.0.weight"])
    with pytest.raises(ArtifactError, match=r"do not fit.*first\.0\.bias"):
        load_net(twice(1), {k: v for k, v in stored.items() if k != "first.0.bias"})


# --- watch ------------------------------------------------------------------------------------------------------------

def warn(text: str, kind: type[Warning] = UserWarning) -> None:
    warnings.warn(text, kind, stacklevel=1)


def test_warnings_are_noted_once_and_shown_as_ever_and_reach_those_who_note_the_whole() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with noted_warnings() as outer:
            with noted_warnings() as inner:
                warn("odd")
                warn("odd")
                warn("old", DeprecationWarning)
            with pytest.raises(ZeroDivisionError), noted_warnings():
                1 / 0  # noqa: B018
            warn("after")
        warn("later")
    assert inner == ["UserWarning: odd", "DeprecationWarning: old"]
    assert outer == [*inner, "UserWarning: after"]
    assert [str(found.message) for found in shown] == ["odd", "odd", "old", "after", "later"]


def test_peak_memory_counts_what_was_held_in_megabytes() -> None:
    code = "import numpy as np; from covidseg.store import peak_memory as p; a = p(); np.ones(25_000_000); b = p(); " \
           "print(b['process'] - a['process'])"
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 190 < grown < 220


def test_environment_names_versions_but_neither_machine_nor_user() -> None:
    content = environment(torch.device("cpu"))
    assert set(content["packages"]) == set(PACKAGES)
    assert content["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["device"] == "cpu"
    assert content["threads"] >= 1
    assert content["deterministic"] is False
    text = json.dumps(content)
    assert platform.node() not in text
    assert str(Path.home()) not in text
