"""What all tests share: no network, a small phantom, real scans and a browser where there are any.

Several processes may run the tests beside each other (``make test``); they share the phantom, and the run trained on
it (``tiny.finished_run``).
"""

from __future__ import annotations

import os
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The tests' nets are tiny: threads would spend their time waiting for each other. Must be set before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, Phase, settings

from covidseg.data.phantom import PhantomSettings, write_phantom

if TYPE_CHECKING:
    from covidseg.pipeline import Run

# Array-building strategies are slow on a busy machine; a deadline would make tests flaky, not better. The examples
# are the same in every run, so that a failure comes back when the test is run again.
settings.register_profile("covidseg", deadline=None, max_examples=25, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("covidseg")
# Of `make mutants`: nobody reads a failing example, so it need not be made smaller.
settings.register_profile("mutants", settings.get_profile("covidseg"), phases=[Phase.explicit, Phase.generate])

TINY = PhantomSettings(patients=4, slices=10, size=128, seed=3, vessel_targets=150)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out weekly tests unless ``-m`` speaks of them, whatever else it asks for.

    Modules with most slow tests come first, so that no process is left with one when the others are done.
    """
    if "weekly" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("weekly")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


def leaves_machine(host: Any) -> bool:
    """Whether a host, of a socket's address or to be looked up, is another computer or may be one."""
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return False
    try:
        return not ip_address(name.partition("%")[0]).is_loopback
    except ValueError:  # a name, which somebody on the network would have to know
        return True


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Lets a test fail that would reach another computer: such tests pass or fail by the weather.

    ``pytest.fail`` raises what is no ``Exception``, so that code with a remedy for a broken network does not hide it.
    """
    def guarded(reach: Callable[..., Any], host_of: Callable[..., Any]) -> Callable[..., Any]:
        def guard(*given: Any, **named: Any) -> Any:
            if leaves_machine(host := host_of(*given, **named)):
                pytest.fail(f"a test wants to reach {host}: tests run without a network")
            return reach(*given, **named)
        return guard

    def host_of(own: socket.socket, *given: Any) -> Any:
        """The host of the address, which comes last."""
        return given[-1][0] if own.family in (socket.AF_INET, socket.AF_INET6) else None

    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex", "sendto"):
            patch.setattr(socket.socket, name, guarded(getattr(socket.socket, name), host_of))
        patch.setattr(socket, "getaddrinfo", guarded(socket.getaddrinfo, lambda host, *_, **__: host))
        yield


@pytest.fixture(scope="session")
def tiny_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a phantom of 4 patients with 10 slices of 128 x 128. Shared by all tests: copy it to change it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all processes of this run of the tests
    folder, whole = base / "tiny" / "phantom", base / "tiny" / "phantom-is-whole"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(base / "tiny" / "phantom.lock"):
        if not whole.exists():
            write_phantom(folder, TINY)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def tiny_run(tiny_phantom: Path) -> Run:
    """The finished run on the phantom. Shared by all tests: ``copied`` is one to change."""
    from tiny import finished_run

    return finished_run(tiny_phantom)


@pytest.fixture
def copied(tiny_run: Run, tmp_path: Path) -> Path:
    """A copy of the finished run's folder that a test may damage."""
    return Path(shutil.copytree(tiny_run.folder, tmp_path / "run"))


@pytest.fixture(scope="session")
def realct() -> Path:
    """Folder of real scans, from the environment variable COVIDSEG_REALCT; skips without it."""
    name = os.environ.get("COVIDSEG_REALCT", "")
    if not name:
        pytest.skip("needs real scans: set COVIDSEG_REALCT to their folder")
    folder = Path(name)
    if not folder.is_dir():
        pytest.fail(f"COVIDSEG_REALCT names {folder}, which is no folder")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window; the tests that want it skip where there is none."""
    import book_pdf

    program = book_pdf.chromium()
    if program is None:
        pytest.skip("no Chromium here: install it, or name it in COVIDSEG_CHROMIUM")
    with book_pdf.sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu",
                                             "--host-resolver-rules=MAP * ~NOTFOUND"])  # no network either
        yield instance
        instance.close()
