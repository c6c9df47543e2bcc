"""Runs a target on bytes and keeps what must not happen, one example of each kind."""

from __future__ import annotations

import gzip
import hashlib
import json
import traceback
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from covidseg.errors import CovidsegError

OURS = ("covidseg", "cli", "data", "evaluation", "fuzz")  # packages whose lines say where a fault is
Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        name: The name on the command line.
        what: What it reads, for the table.
        seeds: Makes small whole files to start from.
        run: Reads the bytes as such a file, in a folder that it may use as it likes, and checks what comes of it.
        change: Applies a change of bytes inside the format, so that what is around them still fits.
    """

    name: str
    what: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]
    change: Callable[[bytes, Change], bytes] = lambda data, change: change(data)


def inside_gzip(data: bytes, change: Change) -> bytes:
    """Changes what is inside a gzip file, which is whole again afterwards."""
    try:
        return gzip.compress(change(gzip.decompress(data)), 1, mtime=0)
    except (OSError, EOFError, zlib.error):
        return change(data)


def inside_header(data: bytes, change: Change) -> bytes:
    """Changes the table at the head of a safetensors file, and corrects its length, the first eight bytes."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return change(data)
    head = change(data[8:8 + length])
    return len(head).to_bytes(8, "little") + head + data[8 + length:]


@dataclass(frozen=True)
class Finding:
    """A fault that is not one of covidseg's own errors.

    Attributes:
        target: The target in which it was found.
        error: Type of the exception, or how the process ended.
        where: File and function, innermost among those of this repository.
        text: Text of the exception.
    """

    target: str
    error: str
    where: str
    text: str = ""


class Harness:
    """Calls a target again and again; a fault is noted and the search goes on.

    Args:
        target: What is called.
        scratch: Folder for the files that it reads.
        kept: Folder for one example of each kind of fault, ``NAME.bin`` with ``NAME.json``.

    Attributes:
        findings: One finding for each kind, that is for each type of exception and place.
    """

    def __init__(self, target: Target, scratch: Path, kept: Path) -> None:
        self.target, self.scratch, self.kept = target, scratch, kept
        self.findings: list[Finding] = []

    def __call__(self, data: bytes) -> None:
        """Runs the target once; what it raises is either expected or becomes a finding."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.run(data, self.scratch)
        except CovidsegError:
            pass
        except Exception as error:
            name, where = type(error).__name__, place(error)
            if (name, where) not in {(known.error, known.where) for known in self.findings}:
                text = str(error).replace(str(self.scratch), "")[:200]
                self.findings.append(Finding(self.target.name, name, where, text))
                file = self.kept / hashlib.sha256(f"{name} {where}".encode()).hexdigest()[:12]
                file.with_suffix(".bin").write_bytes(data)
                file.with_suffix(".json").write_text(json.dumps(vars(self.findings[-1])), encoding="utf-8")


def place(error: BaseException) -> str:
    """Where an exception came from: innermost file and function of this repository, without folders of the machine."""
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(path, name) for path, name in frames if path.parent.name in OURS and path.name != "harness.py"]
    path, name = (ours or frames)[-1]
    return f"{path.parent.name}/{path.name}: {name}"
