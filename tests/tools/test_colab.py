"""The check of the chapters on Colab's versions: what it asks for, and that it tells a chapter that fails."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

import colab_check
import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_the_package_installs_beside_colabs_versions() -> None:
    """Its lower bounds must not force Colab to replace what is imported already."""
    lines = colab_check.CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    wanted = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert {"torch", "torchvision", "numpy", "nibabel", "ipywidgets"} <= set(wanted)
    for text in PROJECT["dependencies"]:
        requirement = Requirement(text)
        if requirement.name in wanted:
            assert requirement.specifier.contains(wanted[requirement.name]), text


@pytest.mark.weekly
def test_a_chapter_that_fails_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    folder = tmp_path / "away"
    folder.mkdir()
    for name, code in (("good", "import os; assert 'COVIDSEG_RUNS' not in os.environ"), ("bad", "1 / 0")):
        nbformat.write(new_notebook(cells=[new_code_cell(code)], metadata=kernel), tmp_path / f"{name}.ipynb")
    failed = colab_check.run_chapters(Path(sys.executable), [tmp_path / "good.ipynb", tmp_path / "bad.ipynb"], folder)
    assert failed == ["bad"]
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed
    assert "colab: good: ran" in printed
