"""Stored results of stages: safetensors files, a checksum beside each, found again by a hash of what made them.

A stage's key holds its settings, its seed and the key of what it was computed from, the first one the code of the
package (:func:`code_hash`), so that a changed setting, scan or line of code leads to another file and nothing stale is
ever read. Files are written under a temporary name in the same folder and renamed, so that a run that is stopped leaves
whole files only and goes on where it stopped. Programs that share a folder wait for each other's stages.

With each result is noted what making it took: seconds, the most memory, and the warnings that were given.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as serialize
from torch import nn

from covidseg import __version__
from covidseg.atomic import write_whole
from covidseg.devices import from_first, is_first
from covidseg.errors import ArtifactError, OutputError

Arrays = dict[str, np.ndarray]
Notes = dict[str, Any]


def fingerprint(*parts: Any) -> str:
    """Hash of settings (dataclasses), numbers, texts, paths' contents and other fingerprints: 16 hex digits.

    A :class:`~pathlib.Path` stands for the bytes of the file.
    """
    digest = hashlib.sha256(__version__.encode())
    for part in parts:
        if isinstance(part, Path):
            digest.update(file_hash(part).encode())
        else:
            plain = asdict(part) if is_dataclass(part) and not isinstance(part, type) else part
            digest.update(json.dumps(plain, sort_keys=True).encode())
        digest.update(b"\0")  # so that (1, 23) and (12, 3) differ
    return digest.hexdigest()[:16]


@cache
def code_hash(root: Path = Path(__file__).parent) -> str:
    """Hash of the package's code but for book and command line, which make no results; hexadecimal.

    The version alone would not do: between two releases many states of the code have the same.
    """
    made_by = (file for file in sorted(root.rglob("*.py")) if file.relative_to(root).parts[0] not in ("book", "cli"))
    return hashlib.sha256("".join(map(file_hash, made_by)).encode()).hexdigest()


def file_hash(path: Path) -> str:
    """sha256 of a file, or of all files in a folder and below whatever their names, hexadecimal."""
    if path.is_dir():
        inside = sorted(file_hash(file) for file in path.rglob("*") if file.is_file())
        return hashlib.sha256("".join(inside).encode()).hexdigest()
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a small text file in one piece, as UTF-8.

    Raises:
        OutputError: the file cannot be written.
    """
    # A file name may hold bytes that are no UTF-8; they are shown escaped.
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def save_arrays(path: Path, arrays: Arrays, notes: dict[str, Any] | None = None) -> None:
    """Writes arrays and JSON notes as safetensors, and their sha256 beside them (``NAME.sha256``).

    Raises:
        OutputError: the file cannot be written.
    """
    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    metadata = {"notes": json.dumps(notes or {})}
    # Not save_file, which has a temporary file of its own that would stay behind if the program is killed.
    content = serialize(plain, metadata)
    write_whole(path, lambda temporary: temporary.write_bytes(content))
    write_hash(path)


def set_aside(path: Path) -> Path:
    """Gives a file the next free number, as ``NAME-1.json``, and its checksum too, so that another can have its name.

    Returns:
        Where it is now.

    Raises:
        OutputError: it cannot be renamed.
    """
    numbered = (path.with_name(f"{path.stem}-{number}{path.suffix}") for number in itertools.count(1))
    free = next(name for name in numbered if not name.exists())
    try:
        path.rename(free)
    except OSError as error:
        raise OutputError(f"cannot be renamed ({error.strerror or error})", path=path,
                          remedy="Check permissions, or choose another folder") from error
    beside = path.with_name(path.name + ".sha256")
    if beside.exists():  # as it is, but for the name: it may be the checksum of something else
        write_text(free.with_name(free.name + ".sha256"),
                   beside.read_text(encoding="utf-8", errors="replace").replace(path.name, free.name))
    return free


def write_hash(path: Path) -> None:
    """Writes the sha256 of a file beside it, as the program ``sha256sum`` does.

    Raises:
        OutputError: it cannot be written.
    """
    write_text(path.with_name(path.name + ".sha256"), f"{file_hash(path)}  {path.name}\n")


def write_with_hash(path: Path, text: str) -> None:
    """Writes a small text file, and its sha256 beside it for :func:`check_hash`.

    Raises:
        OutputError: one of the two cannot be written.
    """
    write_text(path, text)
    write_hash(path)


def check_hash(path: Path, remedy: str = "Run the stage again") -> None:
    """Compares a file with the sha256 beside it.

    Raises:
        ArtifactError: one of them is missing, or the file was changed.
    """
    beside = path.with_name(path.name + ".sha256")
    if not path.exists() or not beside.exists():
        raise ArtifactError("the file or its .sha256 is missing", path=path, remedy=remedy)
    expected = beside.read_text(encoding="utf-8", errors="replace").split()
    if not expected or expected[0] != file_hash(path):
        raise ArtifactError("does not have the checksum it was written with", path=path,
                            remedy=f"The file is damaged. {remedy}")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, dict[str, Any]]]:
    """A stored file, of which no array has been read yet, and its notes."""
    try:
        with safe_open(path, framework="numpy") as stored:
            notes = json.loads((stored.metadata() or {}).get("notes", "{}"))
            if not isinstance(notes, dict):
                raise ValueError("its notes have no names")
            yield stored, notes
    except (OSError, SafetensorError, ValueError, RecursionError) as error:  # the last two of notes that are no JSON
        raise ArtifactError(f"is missing or not a safetensors file ({error})", path=path,
                            remedy="Run the stage again") from error


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads what :func:`save_arrays` wrote, after checking its sha256.

    Raises:
        ArtifactError: the file or its checksum is missing, or the file was changed.
    """
    check_hash(path)
    with _opened(path) as (stored, notes):
        return {name: stored.get_tensor(name) for name in stored.keys()}, notes  # noqa: SIM118


def _load_or_drop(path: Path) -> tuple[Arrays, dict[str, Any]] | None:
    """A stored result; None if it is not stored, or was damaged, in which case the file is deleted."""
    if path.exists():
        try:
            return load_arrays(path)
        except ArtifactError:
            path.unlink(missing_ok=True)
    return None


class Store:
    """A folder of stage results. ``store.get`` computes a result once and reads it from then on.

    Of several processes of one training the first alone reads and writes it: what it has stored, all have stored. Of
    several programs that share the folder, one makes a stage and the others wait for it.

    Args:
        folder: is made when the first result is stored.
        log: told when this program waits for another one.
    """

    def __init__(self, folder: Path, log: Callable[[str], None] = lambda line: None) -> None:
        self.folder, self.log = folder, log
        self._within = 0.0  # seconds spent on stages that were asked for while another one was being made

    def path(self, stage: str, key: str) -> Path:
        """Where the result of a stage with this key lies."""
        return self.folder / f"{stage}-{key}.safetensors"

    def get(self, stage: str, key: str, make: Callable[[], tuple[Arrays, dict[str, Any]]]
            ) -> tuple[Arrays, dict[str, Any]]:
        """The stored result, or the result of ``make()``, which is stored.

        A file that no longer fits its checksum is computed again: the key says that nothing else has changed. The
        notes also hold ``seconds``, what this stage took without the stages before it, ``peak_memory_mb``, of this
        process until the stage was done, and ``warnings``, each once.
        """
        path = self.path(stage, key)
        with self.alone(path) if is_first() else nullcontext():
            stored = from_first(lambda: _load_or_drop(path))
            if stored is not None:
                return stored
            start, outer, self._within = time.monotonic(), self._within, 0.0
            with noted_warnings() as warned:
                arrays, notes = make()
            seconds = time.monotonic() - start
            notes = {**notes, "seconds": round(seconds - self._within, 2), "peak_memory_mb": peak_memory(),
                     "warnings": warned}
            self._within = outer + seconds
            if is_first():
                save_arrays(path, arrays, notes)
            return from_first(lambda: (arrays, notes))

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Keeps other programs from making the same file meanwhile. A program that dies lets go of it."""
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            # A folder in which no lock can be made is only read, or cannot be written, which is said when it is tried.
            with suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire(blocking=False)
                except Timeout:
                    self.log(f"another program is making {path.name} in this folder; waiting for it")
                    lock.acquire()
            yield
        finally:
            lock.release()

    def notes(self, stage: str, key: str) -> dict[str, Any]:
        """The notes of a stored stage; reads neither its arrays nor its checksum.

        Raises:
            ArtifactError: it is not stored, or cannot be read.
        """
        with _opened(self.path(stage, key)) as (_, notes):
            return notes

    def seconds(self, stage: str, key: str) -> float:
        """What a stored stage took, without the stages before it.

        Raises:
            ArtifactError: it is not stored, cannot be read, or does not say.
        """
        seconds = self.notes(stage, key).get("seconds", 0.0)
        if not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise ArtifactError("its notes do not say what it took", path=self.path(stage, key),
                                remedy="Run the stage again")
        return float(seconds)


def net_arrays(net: nn.Module) -> Arrays:
    """Weights and buffers of a net as NumPy arrays, each under one name."""
    own = _own_names(net)
    return {name: value.detach().cpu().numpy() for name, value in net.state_dict().items() if name in own}


def _own_names(net: nn.Module) -> set[str]:
    """One name for each weight and buffer. MONAI's nets hold some layers in two places, and each under two names."""
    return {name for kind in (net.named_parameters(), net.named_buffers()) for name, _ in kind}


def load_net(net: nn.Module, arrays: Arrays, path: Path | None = None) -> nn.Module:
    """Puts stored weights into a net of the same shape, in evaluation mode.

    Args:
        path: of the file that they were read from, to be named if they do not fit.

    Raises:
        ArtifactError: names or shapes differ.
    """
    try:
        given = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        missing, unknown = net.load_state_dict(given, strict=False)
        if wrong := [*sorted(_own_names(net).intersection(missing)), *unknown]:
            raise RuntimeError("missing or unknown: " + ", ".join(wrong))
    except RuntimeError as error:
        differs = shorten(str(error).split("\n", 1)[-1], 160)
        raise ArtifactError(f"stored weights do not fit this net ({differs})", path=path,
                            remedy="Train again with this version of covidseg") from error
    return net.eval()


@dataclass(frozen=True)
class Form:
    """How a kind of result is stored.

    Attributes:
        pack: Turns a result into arrays and JSON notes.
        unpack: Turns them back.
    """

    pack: Callable[[Any], tuple[Arrays, Notes]]
    unpack: Callable[[Arrays, Notes], Any]


def array_form(name: str, stored: type | None = None) -> Form:
    """One array; what is stored in half precision is used in single precision."""
    return Form(lambda value: ({name: value if stored is None else value.astype(stored)}, {}),
                lambda arrays, _: arrays[name] if stored is None else arrays[name].astype(np.float32))


def net_form(empty: Callable[[], nn.Module], device: torch.device) -> Form:
    """A net and the losses of its training; its weights are put into an empty net."""
    def unpack(arrays: Arrays, notes: Notes) -> nn.Module:
        net: Any = load_net(empty(), arrays).to(device)
        net.history = notes.get("history", [])
        return net
    return Form(lambda net: (net_arrays(net), {"history": getattr(net, "history", [])}), unpack)


# --- what a program needed ------------------------------------------------------------------------------------------

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "nibabel", "monai", "grad-cam")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and kind of machine; nothing that names it or its user."""
    return {
        "covidseg": __version__, "python": platform.python_version(), "system": platform.system(),
        "packages": {name: version(name) for name in PACKAGES}, "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Notes the warnings given inside the ``with`` block, each once; they are shown as ever.

    One thread at a time can do so, since what shows warnings serves all threads.

    Yields:
        A list that grows: ``UserWarning: text`` each, without the name of the file that warned.
    """
    noted: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *where: Any) -> None:
        text = f"{category.__name__}: {message}"
        if text not in noted:
            noted.append(text)
        show(message, category, *where)

    warnings.showwarning = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        warnings.showwarning = show


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held so far, in MB (10**6 bytes): ``process`` and, on a GPU, ``gpu``."""
    peak = {}
    if sys.platform == "linux":  # getrusage gives no less than what the program held that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak["process"] = round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    else:
        import resource

        peak["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # bytes on macOS
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peak
