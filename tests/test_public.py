"""The public face: what `import covidseg` offers, and what it costs."""

from __future__ import annotations

import inspect
import subprocess
import sys

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
