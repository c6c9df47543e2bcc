"""Runs a target on bytes and keeps what must not happen, one example of each kind."""

from __future__ import annotations

import hashlib
import json
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from covidseg.errors import CovidsegError
from fuzz.mutate import change_bytes

OURS = ("covidseg", "cli", "data", "evaluation", "fuzz")  # packages whose lines say where a fault is


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        name: on the command line.
        what: it reads, for the table.
        seeds: makes small whole files to start from.
        run: reads the bytes as such a file, in a folder that it may use as it likes, and checks what comes of it.
        change: changes the bytes in a way that the format makes likely to matter.
    """

    name: str
    what: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]
    change: Callable[[bytes, Random], bytes] = change_bytes


@dataclass(frozen=True)
class Finding:
    """A fault that is not one of covidseg's own errors.

    Attributes:
        target: in which it was found.
        error: type of the exception, or how the process ended.
        where: file and function, innermost among those of this repository.
        text: of the exception.
    """

    target: str
    error: str
    where: str
    text: str = ""


class Harness:
    """Calls a target again and again; a fault is noted and the search goes on.

    Args:
        target: what is called.
        scratch: folder for the files that it reads.
        kept: folder for one example of each kind of fault, ``NAME.bin`` with ``NAME.json``; None keeps none.

    Attributes:
        findings: one for each kind, that is type of exception and place.
        calls: how often the target was called.
    """

    def __init__(self, target: Target, scratch: Path, kept: Path | None = None) -> None:
        self.target, self.scratch, self.kept = target, scratch, kept
        self.findings: list[Finding] = []
        self.calls = 0

    def __call__(self, data: bytes) -> None:
        """Runs the target once; what it raises is either expected or becomes a finding."""
        self.calls += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.target.run(data, self.scratch)
        except CovidsegError:
            pass
        except Exception as error:
            self._note(error, data)

    def _note(self, error: Exception, data: bytes) -> None:
        name, where = type(error).__name__, place(error)
        if any((known.error, known.where) == (name, where) for known in self.findings):
            return
        text = str(error).replace(str(self.scratch), "")[:200]
        self.findings.append(Finding(self.target.name, name, where, text))
        if self.kept is not None:
            file = hashlib.sha256(f"{name} {where}".encode()).hexdigest()[:12]
            (self.kept / f"{file}.bin").write_bytes(data)
            (self.kept / f"{file}.json").write_text(json.dumps(vars(self.findings[-1])), encoding="utf-8")


def place(error: BaseException) -> str:
    """Where an exception came from: innermost file and function of this repository, without folders of the machine."""
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_tb(error.__traceback__)]
    ours = [(path, name) for path, name in frames if path.parent.name in OURS and path.name != "harness.py"]
    path, name = (ours or frames)[-1]
    return f"{path.parent.name}/{path.name}: {name}"
