"""Tries a mutant: runs a module's tests in a forked child that loads the changed source in the module's place.

The child forgets the package and imports it afresh, so that every module that uses the mutant gets the mutant. All
other modules stay loaded. Tests run until the first failure.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

# Without what pytest would do for readers, and the plugins that cost time at the start.
QUICK = ("-x", "-q", "--tb=no", "--assert=plain", *(f"-pno:{name}" for name in (
    "cacheprovider", "xdist", "pytest_cov", "unraisableexception", "threadexception")))
MEMORY = 6 << 30  # bytes that a child may map beyond what this process has: some mutants ask for all there is
WAITING = 10      # on a busy machine a second of the processor may take this long, and a start sixty seconds
# How a child ends; any other way, by a broken interpreter for one, is noticed as well.
VERDICTS = {pytest.ExitCode.OK: "survived", -signal.SIGXCPU: "timeout", -signal.SIGKILL: "timeout"}


@dataclass(frozen=True)
class Target:
    """A module by its full name, its file, the tests that have to notice changes in it, and options of pytest."""

    module: str
    source: Path
    tests: Sequence[Path]
    options: Sequence[str] = ()


def baseline(target: Target) -> float:
    """Seconds of processor time that the tests take on the module as it is.

    Raises:
        RuntimeError: a test fails, or there is none; mutants would all count as killed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    if (verdict := attempt(target, target.source.read_text(encoding="utf-8"), 3600)) != "survived":
        raise RuntimeError(f"the tests of {target.module} fail without any change ({verdict}): run them with pytest")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def attempt(target: Target, source: str, seconds: int) -> str:
    """Runs the tests with ``source`` in the module's place, for ``seconds`` of processor time at most.

    Returns:
        ``survived``, ``killed`` or ``timeout``.
    """
    folder = Path(tempfile.mkdtemp())
    child = multiprocessing.get_context("fork").Process(target=_child, args=(target, source, seconds, folder))
    child.start()
    child.join(60 + WAITING * seconds)
    child.kill()
    child.join()
    shutil.rmtree(folder, ignore_errors=True)
    return VERDICTS.get(child.exitcode or 0, "killed")


@dataclass(frozen=True)
class _Replaced:
    """Finds one module in another file."""

    module: str
    file: Path

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_file_location(name, self.file) if name == self.module else None


def _child(target: Target, source: str, seconds: int, folder: Path) -> None:
    """What the forked process does: limits, the changed module, and the tests, whose exit code is its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    mapped = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + MEMORY, mapped + MEMORY))
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    package = target.module.partition(".")[0]
    for name in [name for name in sys.modules if name == package or name.startswith(package + ".")]:
        del sys.modules[name]
    changed = folder / target.source.name
    changed.write_text(source, encoding="utf-8")
    sys.meta_path.insert(0, _Replaced(target.module, changed))  # type: ignore[arg-type]
    code = pytest.main([*QUICK, "--basetemp", str(folder / "tests"), *target.options, *map(str, target.tests)])
    os._exit(int(code))  # at once: clean-up and exit handlers are not the child's to run
