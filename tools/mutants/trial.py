"""Tries mutants: runs a module's tests in a forked child that loads the changed source in the module's place.

The child forgets the package and imports it afresh, so that every module that uses the mutant gets the mutant. All
other modules stay loaded. Tests run until the first failure, those that killed most mutants before first.
"""

from __future__ import annotations

import gc
import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import hypothesis
import pytest

PATIENCE = 4      # a mutant may take so many times the processor time of the tests without any change,
AT_LEAST = 20     # and this many seconds in any case;
WAITING = 5       # on a busy machine a second of the processor may take this long
# Without what pytest would do for readers, and the plugins that cost time at the start.
QUICK = ("-x", "-q", "--tb=no", "--assert=plain", *(f"-pno:{name}" for name in (
    "cacheprovider", "xdist", "pytest_cov", "hypothesispytest", "unraisableexception", "threadexception")))
MEMORY = 6 << 30  # bytes that a child may map beyond what this process has: some mutants ask for all there is


@dataclass
class Target:
    """A module and the tests that have to notice changes in it.

    Attributes:
        module: its full name.
        source: its file.
        tests: files of tests.
        options: further arguments of pytest.
        kills: how many mutants each test killed so far, by its name in pytest.
        seconds: how long each test took without a change.
    """

    module: str
    source: Path
    tests: Sequence[Path]
    options: Sequence[str] = ()
    kills: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """How one run of the tests ended: ``survived``, ``killed`` or ``timeout``; by which test; its processor time."""

    verdict: str
    by: str = ""
    seconds: float = 0.0


def baseline(target: Target) -> float:
    """Runs the tests on the module as it is, and notes how long each of them takes.

    Returns:
        Seconds of processor time.

    Raises:
        RuntimeError: a test fails, or there is none; mutants would all count as killed.
    """
    outcome = attempt(target, target.source.read_text(encoding="utf-8"), 3600)
    if outcome.verdict != "survived":
        raise RuntimeError(f"the tests of {target.module} fail without any change: {outcome.by or outcome.verdict}")
    return outcome.seconds


def limit(seconds: float) -> int:
    """Processor time that a mutant may take whose tests take ``seconds`` without a change."""
    return int(max(AT_LEAST, PATIENCE * seconds)) + 1


def attempt(target: Target, source: str, seconds: int) -> Outcome:
    """Runs the tests with ``source`` in the module's place, for ``seconds`` of processor time at most."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    folder = Path(tempfile.mkdtemp())
    child = fork.Process(target=_child, args=(target, source, seconds, folder, sender))
    child.start()
    sender.close()
    told, late = None, not receiver.poll(WAITING * seconds)
    if late:
        child.kill()
    else:
        with suppress(EOFError):  # it ended without a word: out of time, or the interpreter itself broke
            told = receiver.recv()
    child.join()
    shutil.rmtree(folder, ignore_errors=True)
    if told is None:
        late = late or child.exitcode == -signal.SIGXCPU
        return Outcome("timeout" if late else "killed", "the process ended")
    code, failed, durations, used = told
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"no test of {target.module} was found")
    if code == pytest.ExitCode.OK:
        target.seconds.update(durations)
        return Outcome("survived", seconds=used)
    target.kills[failed] += 1
    return Outcome("killed", failed or "the tests cannot be loaded", used)


class _Replaced(importlib.machinery.SourceFileLoader):
    """Finds one module, and loads other source than its file has."""

    def __init__(self, name: str, path: Path, source: str) -> None:
        super().__init__(name, str(path))
        self._source = source.encode()

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, name: str) -> Any:  # never from the cache of compiled modules, nor into it
        return self.source_to_code(self._source, self.path)

    def get_data(self, path: str) -> bytes:
        return self._source


class _Watcher:
    """Plugin of pytest: puts the tests in order, notes how long each takes, and ends the run at the first failure."""

    def __init__(self, target: Target, sender: Connection) -> None:
        self.target, self.sender, self.durations = target, sender, Counter[str]()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kills, seconds = self.target.kills, self.target.seconds
        items.sort(key=lambda item: (-kills[item.nodeid], seconds.get(item.nodeid, 0.0)))
        # A failing example need not be made smaller: nobody reads it.
        phases = [hypothesis.Phase.explicit, hypothesis.Phase.generate]
        hypothesis.settings.register_profile("mutants", hypothesis.settings(), phases=phases)
        hypothesis.settings.load_profile("mutants")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.durations[report.nodeid] += report.duration
        if report.failed:
            self.end(pytest.ExitCode.TESTS_FAILED, report.nodeid)

    def end(self, code: int, failed: str = "") -> None:
        """Tells how it went and ends the process at once: clean-up and exit handlers are not the child's to run."""
        self.sender.send((int(code), failed, dict(self.durations), time.process_time()))
        self.sender.close()
        os._exit(0)


def _child(target: Target, source: str, seconds: int, folder: Path, sender: Connection) -> None:
    """What the forked process does: limits, the changed module, the tests, and word of how they went."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    package = target.module.partition(".")[0]
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    sys.meta_path.insert(0, _Replaced(target.module, target.source, source))
    watcher = _Watcher(target, sender)
    watcher.end(pytest.main([*QUICK, "--basetemp", str(folder / "tests"), *target.options, *map(str, target.tests)],
                            plugins=[watcher]))


def warm(names: Sequence[str]) -> None:
    """Imports what is heavy, once for all children."""
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # the children's collectors leave it alone
