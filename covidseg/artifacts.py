"""Stored results of stages: safetensors files, a checksum beside each, found again by a hash of what made them.

A stage's key holds its settings, its seed and the key of what it was computed from, so that a changed setting or
scan leads to another file and nothing stale is ever read. Files are written under a temporary name in the same
folder and renamed, so that a run that is stopped leaves whole files only and goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn

from covidseg import __version__
from covidseg.distributed import from_first, is_first
from covidseg.errors import ArtifactError
from covidseg.files import write_whole

Arrays = dict[str, np.ndarray]


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


def file_hash(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Writes a small text file in one piece.

    Raises:
        OutputError: the file cannot be written.
    """
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_arrays(path: Path, arrays: Arrays, notes: dict[str, Any] | None = None) -> None:
    """Writes arrays and JSON notes as safetensors, and their sha256 beside them (``NAME.sha256``).

    Raises:
        OutputError: the file cannot be written.
    """
    plain = {name: np.asarray(value, order="C") for name, value in arrays.items()}
    metadata = {"notes": json.dumps(notes or {})}
    write_whole(path, lambda temporary: save_file(plain, temporary, metadata))
    write_text(path.with_name(path.name + ".sha256"), f"{file_hash(path)}  {path.name}\n")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[safe_open, dict[str, Any]]]:
    """A stored file, of which no array has been read yet, and its notes."""
    try:
        with safe_open(path, framework="numpy") as stored:
            yield stored, json.loads((stored.metadata() or {}).get("notes", "{}"))
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ArtifactError(f"is missing or not a safetensors file ({error})", path=path,
                            remedy="Run the stage again") from error


def load_arrays(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """Reads what :func:`save_arrays` wrote, after checking its sha256.

    Raises:
        ArtifactError: the file or its checksum is missing, or the file was changed.
    """
    check = path.with_name(path.name + ".sha256")
    if not path.exists() or not check.exists():
        raise ArtifactError("the file or its .sha256 is missing", path=path, remedy="Run the stage again")
    expected = check.read_text(encoding="utf-8", errors="replace").split()
    if not expected or expected[0] != file_hash(path):
        raise ArtifactError("does not have the checksum it was written with", path=path,
                            remedy="The file is damaged: delete it and run the stage again")
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

    Of several processes the first alone reads and writes it: what it has stored, all have stored.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._within = 0.0  # seconds spent on stages that were asked for while another one was being made

    def path(self, stage: str, key: str) -> Path:
        """Where the result of a stage with this key lies."""
        return self.folder / f"{stage}-{key}.safetensors"

    def get(self, stage: str, key: str, make: Callable[[], tuple[Arrays, dict[str, Any]]]
            ) -> tuple[Arrays, dict[str, Any]]:
        """The stored result, or the result of ``make()``, which is stored.

        A file that no longer fits its checksum is computed again: the key says that nothing else has changed. The
        notes also hold ``seconds``, what this stage took without the stages before it.
        """
        path = self.path(stage, key)
        stored = from_first(lambda: _load_or_drop(path))
        if stored is not None:
            return stored
        start, outer, self._within = time.monotonic(), self._within, 0.0
        arrays, notes = make()
        seconds = time.monotonic() - start
        notes = {**notes, "seconds": round(seconds - self._within, 2)}
        self._within = outer + seconds
        if is_first():
            save_arrays(path, arrays, notes)
        return from_first(lambda: (arrays, notes))

    def seconds(self, stage: str, key: str) -> float:
        """What a stored stage took, without the stages before it; reads neither its arrays nor its checksum.

        Raises:
            ArtifactError: it is not stored, or cannot be read.
        """
        with _opened(self.path(stage, key)) as (_, notes):
            return float(notes.get("seconds", 0.0))


def net_arrays(net: nn.Module) -> Arrays:
    """Weights and buffers of a net as NumPy arrays."""
    return {name: value.detach().cpu().numpy() for name, value in net.state_dict().items()}


def load_net(net: nn.Module, arrays: Arrays) -> nn.Module:
    """Puts stored weights into a net of the same shape, in evaluation mode.

    Raises:
        ArtifactError: names or shapes differ.
    """
    try:
        net.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in arrays.items()})
    except RuntimeError as error:
        raise ArtifactError(f"stored weights do not fit this net ({str(error).splitlines()[0]})",
                            remedy="Train again with this version of covidseg") from error
    return net.eval()
