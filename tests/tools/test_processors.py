"""``make processors``: each kind of processor that there is takes a turn, and a test that fails under one is told."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import processors
import pytest
from processors import KINDS, environment, there

pytestmark = pytest.mark.weekly


def test_what_the_user_chose_for_openblas_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENBLAS_CORETYPE", raising=False)
    assert environment(*KINDS[0])["OPENBLAS_CORETYPE"] == KINDS[0][-1]
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Zen")
    assert environment(*KINDS[0])["OPENBLAS_CORETYPE"] == "Zen"


def test_the_oldest_kind_is_there_and_an_unknown_one_is_not() -> None:
    assert there(environment(*KINDS[0]))
    assert not there(environment("avx4096", 1, "AVX2", "Haswell"))


@pytest.mark.parametrize(("bad", "said"), [(None, "2 of 2 kinds agree\n"), ("avx2", "1 of 2 kinds agree; not avx2\n")])
def test_a_failure_under_one_kind_is_told(bad: str | None, said: str, monkeypatch: pytest.MonkeyPatch,
                                          capsys: pytest.CaptureFixture[str]) -> None:
    commands = []

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[Any]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int(env["ATEN_CPU_CAPABILITY"] == bad))
    monkeypatch.setattr(processors, "there", lambda variables: variables["ATEN_CPU_CAPABILITY"] != "avx512")
    monkeypatch.setattr(processors.subprocess, "run", run)
    assert processors.main(["-x"]) == int(bad is not None)
    assert [command[-4:] for command in commands] == [["-m", "nets", "-q", "-x"]] * 2
    printed = capsys.readouterr().out
    assert printed.endswith(said)
    assert "this one has no avx512; left out" in printed


def test_ci_runs_them() -> None:
    assert "timed make processors" in (Path(__file__).resolve().parents[2] / ".ci" / "run").read_text()
