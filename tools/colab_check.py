"""Runs every chapter as Colab would: in Python 3.12 with Colab's versions, from copies far from the repository.

Builds a wheel of the package, makes an environment in ``_build/colab`` with the versions of ``colab-constraints.txt``
(uv refuses if the package's requirements do not fit them), copies the chapters to a temporary folder and runs them
there with papermill, one after the other, so that they share their ``runs`` folder as a student's session does. Ends
with 1 if a chapter fails.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from build_book import BUILD, ROOT, chapters_to_run

CONSTRAINTS = Path(__file__).with_name("colab-constraints.txt")
# Colab's Python; the variable names one that uv does not find by itself and may not download.
PYTHON = os.environ.get("COVIDSEG_COLAB_PYTHON", "3.12")


def make_environment(folder: Path, wheel: Path) -> Path:
    """Makes the environment afresh (packages come from uv's cache where they are there) and returns its Python."""
    uv = Path(sys.executable).with_name("uv")
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([uv, "venv", "--quiet", "--python", PYTHON, folder], check=True)
    python = folder / "bin" / "python"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, "--constraints", CONSTRAINTS, wheel,
                    "ipykernel", "papermill", "ipython"], check=True)
    return python


def run_chapters(python: Path, chapters: list[Path], folder: Path) -> list[str]:
    """Runs copies of the chapters in ``folder`` and returns the names of those that failed."""
    # Only this environment's kernel and settings; what the user has set up elsewhere must not help.
    environment = {key: value for key, value in os.environ.items()
                   if not key.startswith(("COVIDSEG", "JUPYTER", "IPYTHON", "PYTHON", "VIRTUAL_ENV"))}
    environment |= {"JUPYTER_PATH": str(python.parents[1] / "share" / "jupyter"), "JUPYTER_PREFER_ENV_PATH": "1",
                    "IPYTHONDIR": str(folder / ".ipython"), "MPLCONFIGDIR": str(folder / ".matplotlib"),
                    # A machine of its own has no phantom yet.
                    "XDG_CACHE_HOME": str(folder / ".cache")}
    failed = []
    for source in chapters:
        copy = Path(shutil.copy(source, folder))
        start = time.perf_counter()
        done = subprocess.run(
            [python, "-m", "papermill", "--kernel", "python3", "--no-progress-bar", copy, f"done-{copy.name}"],
            cwd=folder, env=environment, check=False, capture_output=True, text=True)
        if done.returncode:
            failed.append(source.stem)
            print("\n".join((done.stderr or done.stdout).splitlines()[-15:]))
        print(f"colab: {source.stem}: {'FAILED' if done.returncode else 'ran'} in {time.perf_counter() - start:.0f} s",
              flush=True)
    return failed


def main() -> int:
    """Command line of ``make colab``; returns the exit status."""
    with tempfile.TemporaryDirectory(prefix="colab-") as name:
        folder = Path(name)
        subprocess.run([Path(sys.executable).with_name("uv"), "build", "--quiet", "--wheel", "--no-build-isolation",
                        "--python", sys.executable, "--out-dir", folder, ROOT], check=True)
        python = make_environment(BUILD / "colab", next(folder.glob("*.whl")))
        failed = run_chapters(python, [ROOT / f"{chapter}.ipynb" for chapter in chapters_to_run(ROOT)], folder)
    if failed:
        print(f"colab: FAILED: {', '.join(failed)}")
        return 1
    print("colab: all chapters ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
