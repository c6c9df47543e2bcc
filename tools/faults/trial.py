"""What a fault is, how it is tried in a folder of its own, and when it counts as caught."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import shlex
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from covidseg import errors
from covidseg.cli import main
from covidseg.errors import CovidsegError
from faults.supplies import Supplies

# Of a message: what is wrong, a full stop, and a sentence that says what to do.
REMEDY = re.compile(r"error: .+\. [A-Z`].*\.")
CODES = {kind.exit_code: kind.__name__ for kind in vars(errors).values()
         if isinstance(kind, type) and issubclass(kind, CovidsegError)}
# What commands may leave behind although they fail: reports that say what failed, and an empty file by which programs
# that share a run wait for each other.
REPORTS = ("out/parts/*.csv", "out/predictions.csv")
LEAVES = {"predict": REPORTS, "train": ("run/stages/.*.lock",)}

Make = Callable[[Supplies], object]
During = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class Fault:
    """Something that can be wrong, and what has to happen then.

    Attributes:
        title: What is wrong, in a few words.
        command: What a user types; with ``call``, the line of Python.
        error: The error whose exit code has to be the command's; None where it is to be understood, if with a warning.
        names: What the message has to name, usually the file.
        make: Fills the working directory, which is empty before.
        during: Holds while the command runs: a full disk, a server that misbehaves.
        call: Is done instead of the command, where there is none.
        results: New files that have to be there afterwards, as patterns: what the fault must not prevent.
        leaves: New files that may be there, beside those that such a command may always leave.
        lines: Number of error messages that are expected, one for each bad file.
    """

    title: str
    command: str
    error: type[CovidsegError] | None
    names: tuple[str, ...]
    make: Make
    during: During = nullcontext
    call: Callable[[], object] | None = None
    results: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    lines: int = 1

    def words(self) -> tuple[dict[str, str], list[str]]:
        """Variables of the environment that the command sets, and its arguments, ``covidseg`` first."""
        words = shlex.split(self.command)
        first = 0 if self.call else words.index("covidseg")
        return dict(word.split("=", 1) for word in words[:first]), words[first:]


def attempt(fault: Fault, supplies: Supplies) -> tuple[dict[str, Any], list[str]]:
    """Tries one fault in a temporary folder, and judges what happened.

    Returns:
        A row of the record, with the lines that named faults on standard output and then all of standard error; and
        why the fault does not count as caught, nothing if it does.
    """
    with tempfile.TemporaryDirectory(prefix="faults-") as name, contextlib.chdir(name):
        folder = Path.cwd()  # as the system calls it, should the temporary folder be a link
        fault.make(supplies)
        before = contents(folder)
        with fault.during():
            code, printed, complained = spoken(fault)
        after = contents(folder)
    faults = [line for line in printed.splitlines() if line.startswith("fault: ")]
    said = [tidy(line.replace(f"{folder}/", "")) for line in [*faults, *complained.splitlines()]]
    complaints = [*judged(fault, code, said), *left_over(fault, before, after)]
    shown = [said[0], f"(and {len(said) - 1} more like it)"] if fault.lines > 2 else said
    return {"fault": fault.title, "command": fault.command, "said": shown, "exit_code": code,
            "error": CODES.get(code, ""), "met": not complaints}, complaints


def tidy(line: str) -> str:
    """A line without what is another in each run or on each processor: a played publisher's port, sums of bytes.

    Processors round differently, so that the phantom's last bits differ, and with them the keys of stored stages.
    """
    line = re.sub(r"http://127\.0\.0\.1:\d+", "https://publisher.example", line)
    line = re.sub(r"-[0-9a-f]{16}(?=\.safetensors)", "-0123456789abcdef", line)
    return re.sub(r"CRC check failed \d+ != \d+", "CRC check failed", line)


def spoken(fault: Fault) -> tuple[int, str, str]:
    """Runs the command in this process, as its entry point does.

    Returns:
        Exit code, standard output and standard error. An error that nobody caught shows its trace, as in Python.
    """
    out, err = io.StringIO(), io.StringIO()
    variables, words = fault.words()
    with redirect_stdout(out), redirect_stderr(err), patch.dict(os.environ, variables), \
            patch.object(sys, "argv", words):
        try:
            main() if fault.call is None else fault.call()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        except CovidsegError as error:  # of a call
            code = error.exit_code
            err.write(f"error: {error}\n")
        except Exception:
            code = 1
            err.write(traceback.format_exc())
    return code, out.getvalue(), err.getvalue()


def judged(fault: Fault, code: int, said: list[str]) -> list[str]:
    """What is wrong with an exit code and with what was said."""
    complaints = []
    expected, lines = (fault.error.exit_code, fault.lines) if fault.error else (0, 0)
    if code != expected:
        complaints.append(f"ends with {code}, not with {expected}")
    if odd := [line for line in said if not line.startswith(("error: ", "fault: ", "warning: "))]:
        complaints.append(f"prints a trace or something else: {odd[-1]}")
    messages = [line for line in said if line.startswith("error: ")]
    if len(messages) != lines:
        complaints.append(f"says {len(messages)} messages, not {lines}")
    if any(REMEDY.fullmatch(message) is None for message in messages):
        complaints.append("says no remedy")
    complaints += [f"does not name {name}" for name in fault.names if name not in "\n".join(said)]
    return complaints


def contents(folder: Path) -> dict[str, str]:
    """Hash of every file in a folder, hidden ones as well."""
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def left_over(fault: Fault, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Files that were changed or lost, half-written ones, and results that are missing."""
    new = [name for name in after if name not in before]
    allowed = (*fault.results, *fault.leaves, *next((LEAVES[word] for word in fault.words()[1] if word in LEAVES), ()))
    complaints = [f"{name} was {'changed' if name in after else 'lost'}" for name, digest in before.items()
                  if after.get(name) != digest]
    complaints += [f"{name} is left over" for name in new
                   if not any(Path(name).match(pattern) for pattern in allowed)]
    return complaints + [f"{pattern} is missing" for pattern in fault.results
                         if not any(Path(name).match(pattern) for name in new)]
