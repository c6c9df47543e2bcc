"""What a run notes about itself."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from covidseg.store import PACKAGES, environment, noted_warnings


def test_warnings_are_noted_once_and_shown_as_ever() -> None:
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        with noted_warnings() as noted:
            for _ in range(2):
                warnings.warn("odd", UserWarning, stacklevel=1)
            warnings.warn("old", DeprecationWarning, stacklevel=1)
        warnings.warn("later", UserWarning, stacklevel=1)
    assert noted == ["UserWarning: odd", "DeprecationWarning: old"]
    assert [str(found.message) for found in shown] == ["odd", "odd", "old", "later"]


def test_warnings_of_a_part_reach_those_who_note_the_whole() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *shown: None
        with noted_warnings() as outer:
            with noted_warnings() as inner:
                warnings.warn("odd", UserWarning, stacklevel=1)
            with pytest.raises(ZeroDivisionError), noted_warnings():
                1 / 0  # noqa: B018
            warnings.warn("after", UserWarning, stacklevel=1)
    assert inner == ["UserWarning: odd"]
    assert outer == ["UserWarning: odd", "UserWarning: after"]


def test_peak_memory_counts_what_was_held_in_megabytes() -> None:
    code = "import numpy as np; from covidseg.store import peak_memory as p; a = p(); np.ones(25_000_000); b = p(); " \
           "print(b['process'] - a['process'])"
    grown = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 190 < grown < 220


def test_environment_names_versions_but_neither_machine_nor_user() -> None:
    content = environment(torch.device("cpu"))
    assert set(content["packages"]) == set(PACKAGES)
    assert content["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert content["device"] == "cpu"
    assert content["threads"] >= 1
    assert content["deterministic"] is False
    text = json.dumps(content)
    assert platform.node() not in text
    assert str(Path.home()) not in text
