"""The rules that ``conftest.py`` sets for all tests hold, and show when they are broken."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import leaves_machine, pytest_collection_modifyitems

ROOT = Path(__file__).resolve().parents[1]
ELSEWHERE = "192.0.2.1"  # kept for examples: nobody has it


@pytest.mark.parametrize("reach", [
    lambda: socket.create_connection((ELSEWHERE, 80), timeout=1),
    lambda: socket.socket().connect_ex((ELSEWHERE, 80)),
    lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"", (ELSEWHERE, 53)),
    lambda: socket.getaddrinfo("example.org", 80)])
def test_a_test_that_reaches_for_the_network_fails(reach: Callable[[], object]) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"wants to reach .*: tests run without a network"):
        reach()


def test_this_very_computer_may_be_reached() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname(), 5) as client:
        assert client.getpeername() == server.getsockname()


@pytest.mark.parametrize(("host", "leaves"), [
    ("localhost", False), ("127.0.0.1", False), ("127.8.9.1", False), ("::1", False), (b"localhost", False),
    ("", False), (None, False), ("10.0.0.1", True), ("fe80::1%eth0", True), ("localhost.example.org", True),
    (b"example.org", True)])
def test_what_is_another_computer(host: str | bytes | None, leaves: bool) -> None:
    assert leaves_machine(host) == leaves


CHAIN = """
import pytest

done = []

@pytest.mark.parametrize("number", range(8))
def test_one_after_another(number):
    done.append(number)
    assert done == list(range(number + 1))
"""


@pytest.mark.parametrize(("options", "code"), [((), 0), (("-p", "randomly", "--randomly-seed=1"), 1)])
def test_a_test_that_needs_another_fails_in_another_order(options: tuple[str, ...], code: int, tmp_path: Path) -> None:
    """``make shuffle`` finds such tests; in the usual order nobody would notice."""
    (tmp_path / "test_chain.py").write_text(CHAIN)
    done = subprocess.run([sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "--rootdir", tmp_path,
                           "-p", "no:cacheprovider", *options, tmp_path], capture_output=True, text=True)
    assert done.returncode == code, done.stdout
    assert ("assert done == list(range(number + 1))" in done.stdout) == bool(code)


@pytest.mark.parametrize(("markexpr", "kept"), [
    ("", ["usual"]), ("nets", ["usual"]), ("not book", ["usual"]), ("weekly", ["weekly", "usual"])])
def test_weekly_tests_run_only_where_they_are_asked_for(markexpr: str, kept: list[str]) -> None:
    """By ``make weekly``; another ``-m``, like that of ``make processors``, does not ask for them."""
    left_out: list[Any] = []
    config: Any = SimpleNamespace(option=SimpleNamespace(markexpr=markexpr),
                                  hook=SimpleNamespace(pytest_deselected=lambda items: left_out.extend(items)))
    items: list[Any] = [SimpleNamespace(path=name, get_closest_marker=lambda mark, own=name: mark == own)
                        for name in ("weekly", "usual")]
    pytest_collection_modifyitems(config, items)
    assert [item.path for item in items] == kept
    assert len(items) + len(left_out) == 2
