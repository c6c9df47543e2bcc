"""Shared fixtures: a small phantom, made once per run, real scans and a browser where there are any."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# The tests' nets are tiny: threads would spend their time waiting for each other. Must be set before torch starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

from covidseg.phantom import PhantomSettings, write_phantom

# Array-building strategies are slow on a busy machine; a deadline would make tests flaky, not better. The examples
# are the same in every run, so that a failure comes back when the test is run again.
settings.register_profile("covidseg", deadline=None, max_examples=25, derandomize=True, database=None,
                          suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("covidseg")

TINY = PhantomSettings(patients=4, slices=10, size=128, seed=3, vessel_targets=150)


@pytest.fixture(scope="session")
def tiny_phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a phantom of 4 patients with 10 slices of 128 x 128. Shared by all tests: copy it to change it."""
    return write_phantom(tmp_path_factory.mktemp("tiny") / "phantom", TINY)


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
        instance = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()
