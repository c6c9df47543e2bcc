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


@pytest.mark.parametrize("bad", [None, "default"])
@pytest.mark.parametrize("newest", ["avx2", "avx512"])
def test_a_failure_under_an_older_kind_is_told(newest: str, bad: str | None, monkeypatch: pytest.MonkeyPatch,
                                               capsys: pytest.CaptureFixture[str]) -> None:
    commands = []
    older = {"avx2": 1, "avx512": 2}[newest]

    def run(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[Any]:
        commands.append(command)
        return subprocess.CompletedProcess(command, int(env["ATEN_CPU_CAPABILITY"] == bad))
    monkeypatch.setattr(processors, "there",
                        lambda variables: variables["ATEN_CPU_CAPABILITY"] in ("default", "avx2", newest))
    monkeypatch.setattr(processors.subprocess, "run", run)
    assert processors.main(["-x"]) == int(bad is not None)
    assert [command[-4:] for command in commands] == [["-m", "nets", "-q", "-x"]] * older, "not the processor's own"
    printed = capsys.readouterr().out
    assert f"{older - (bad is not None)} of {older} older kinds agree; {newest} is its own" in printed
    assert ("not default" in printed) == (bad is not None)
    assert ("this one has no avx512; left out" in printed) == (newest == "avx2")


def test_ci_runs_them() -> None:
    assert "timed make processors" in (Path(__file__).resolve().parents[2] / ".ci" / "run").read_text()
