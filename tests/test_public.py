"""The public face: what `import covidseg` offers, and what it costs."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import covidseg


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, covidseg; covidseg.__all__; print(*({'torch', 'numpy', 'nibabel'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


@pytest.mark.parametrize("name", sorted(set(covidseg.__all__) - {"DISCLAIMER", "__version__"}))
def test_every_name_is_found_explained_and_annotated(name: str) -> None:
    assert name in dir(covidseg)
    function = getattr(covidseg, name)
    assert function.__module__.startswith("covidseg.")
    assert function.__doc__
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(parameter.annotation is not inspect.Parameter.empty for parameter in signature.parameters.values())


def test_an_unknown_name_is_refused_as_of_any_module() -> None:
    with pytest.raises(AttributeError, match="module 'covidseg' has no attribute 'diagnose'"):
        covidseg.diagnose  # noqa: B018


def test_the_example_of_the_readme_runs(tiny_phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    example, = re.findall(r"```python\n(import covidseg\n.*?)\nrun = ", readme, re.DOTALL)
    shutil.copy(tiny_phantom / "im" / "phantom_01.nii.gz", tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(example, names)
    mask = covidseg.read_mask(tmp_path / "mask.nii.gz", like=names["scan"])
    assert mask.any()
    assert (mask == names["mask"]).all()
