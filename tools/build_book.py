"""Builds the book: runs every chapter of ``_toc.yml`` in order, then renders the pages with Jupyter Book.

The chapters in git carry no outputs. This program copies the sources to ``_build/stage``, runs the copies with
papermill (folder ``_build``, so that all chapters share ``_build/runs``), checks what came out and renders them::

    _build/stage/        sources with executed chapters, kept for reading when a chapter fails
    _build/status.json   seconds of every chapter, its slowest cell, package versions
    _build/warnings.txt  only if the rendering warned
    _build/html/         the book; index.html is the first page

It ends with 1 if a chapter fails, an output names a folder of this machine, or the rendering warns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nbformat
import yaml
from lesson_nets import check, last_run
from notebooks import students_zip, with_solutions
from pages import fill_tables, localise, mended, status_tables, trim_mathjax, write_api

from covidseg.book.lesson import find_scans
from covidseg.data.registry import load_registry
from covidseg.errors import DatasetError

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "_build"
STAGE = BUILD / "stage"
STATUS = BUILD / "status.json"
SOURCES = ("_config.yml", "_toc.yml", "CHANGELOG.md", "chapters", "docs")
SLOW_CELL_SECONDS = 60.0
PACKAGES = ("covidseg", "torch", "torchvision", "numpy", "scipy", "scikit-image", "nibabel", "monai", "jupyter-book")


Run = dict[str, Any]  # how one chapter ran, see run_chapter


def toc_files(toc: Any) -> list[str]:
    """Every page that a parsed ``_toc.yml`` lists, in reading order, as written there (without suffix)."""
    if isinstance(toc, list):
        return [page for part in toc for page in toc_files(part)]
    if not isinstance(toc, dict):
        return []
    own = [toc[key] for key in ("root", "file") if key in toc]
    return own + [page for value in toc.values() for page in toc_files(value)]


def chapters_to_run(root: Path) -> list[str]:
    """Pages of ``_toc.yml`` under ``root`` that are notebooks, in order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    return [page for page in toc_files(toc) if (root / f"{page}.ipynb").exists()]


def training_first(chapters: list[str], root: Path) -> list[str]:
    """Chapters in the order in which they run: those that train a stage come before those that only show nets.

    The first pages show what later chapters train, and would take the nets that come with the package.
    """
    texts = {chapter: (root / f"{chapter}.ipynb").read_text(encoding="utf-8") for chapter in chapters}
    return sorted(chapters, key=lambda chapter: "trains=" not in texts[chapter])


def tidy(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy for rendering: the injected parameters cell hidden, papermill's metadata (with its paths) gone."""
    notebook = copy.deepcopy(notebook)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags and "remove-cell" not in tags:
            cell.metadata["tags"] = [*tags, "remove-cell"]
    return notebook


def machine_paths(notebook: nbformat.NotebookNode, folders: list[str]) -> list[str]:
    """Ids of the code cells whose outputs name one of ``folders``: such a page would differ on every machine."""
    return [cell.id for cell in notebook.cells if cell.cell_type == "code"
            and any(folder in json.dumps(cell.outputs, ensure_ascii=False) for folder in folders)]


def private_folders() -> list[str]:
    """The folders that no page may name: the checkout and the home folder (unless that is ``/``)."""
    home = Path.home()
    return [str(ROOT), *([f"{home}/"] if len(home.parts) > 1 else [])]


def stage(root: Path, target: Path, *, keep_executed: bool) -> None:
    """Copies the book's sources; with ``keep_executed`` the notebooks that lie there stay as they are."""
    kept = {path.relative_to(target): path.read_bytes() for path in target.rglob("*.ipynb")} if keep_executed else {}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for name in SOURCES:
        source = root / name
        if source.is_dir():
            shutil.copytree(source, target / name,
                            ignore=shutil.ignore_patterns(".ipynb_checkpoints", "__pycache__", "runs"))
        elif source.exists():
            shutil.copy2(source, target / name)
    for path, content in kept.items():
        if (target / path).exists():  # or the chapter is gone
            (target / path).write_bytes(content)


def prepare_environment(build: Path) -> None:
    """Makes the run independent of the user's own Jupyter, IPython and Matplotlib settings.

    The kernels inherit these variables. ``JUPYTER_PATH`` puts this environment's ``python3`` kernel before any of
    the same name in the home folder.
    """
    os.environ["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    for variable, folder in (("IPYTHONDIR", "ipython"), ("MPLCONFIGDIR", "matplotlib"),
                             ("JUPYTER_RUNTIME_DIR", "jupyter"), ("JUPYTER_CONFIG_DIR", "jupyter-config")):
        path = build / "settings" / folder
        path.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(path)
    # The kernel warns that its connection to this program on the same machine is not encrypted: nothing to act on.
    profile = build / "settings" / "ipython" / "profile_default"
    profile.mkdir(exist_ok=True)
    (profile / "ipython_kernel_config.py").write_text("get_config().IPKernelApp.log_level = 'ERROR'\n")
    # Sliders are drawn beforehand: no kernel stands behind a page.
    os.environ["COVIDSEG_STATIC"] = "1"
    # Threads that wait sleep, as they do under the command line.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    # Relative to the kernels' folder, so that no chapter can print where the checkout lies.
    os.environ.setdefault("COVIDSEG_RUNS", "runs")
    # Matplotlib announces on standard error that it builds its font cache: have it done before a chapter runs.
    subprocess.run([sys.executable, "-c", "import matplotlib.font_manager"], check=False, capture_output=True)


def run_chapter(chapter: str, source: Path, target: Path, folder: Path, parameters: dict[str, Any]) -> Run:
    """Runs one notebook from ``source`` to ``target`` in ``folder``; a failed one is written too, with its error.

    Returns:
        ``chapter``, the entry in ``_toc.yml``; ``seconds`` of the whole notebook; ``slowest_cell`` and
        ``slowest_seconds``; ``stderr_cells``, which wrote to standard error, what readers see as a warning; and
        ``error``, the last line of the exception that ended the notebook, empty if it ran through.
    """
    # Imported here: papermill takes a second, and the functions above are used by tests without it.
    import papermill

    start, error, cells = time.perf_counter(), "", list[Any]()
    try:
        papermill.execute_notebook(str(source), str(target), parameters=parameters, kernel_name="python3",
                                   cwd=str(folder), log_output=False, progress_bar=False)
    except Exception as failure:  # papermill lets errors of kernels and of notebooks through as they are
        error = next((line for line in reversed(str(failure).splitlines()) if line.strip()), type(failure).__name__)
    seconds = time.perf_counter() - start
    if target.exists():
        executed = nbformat.read(target, as_version=4)
        cells = [cell for cell in executed.cells if cell.cell_type == "code"]
        nbformat.write(tidy(executed), target)
    times = {cell.id: float(cell.metadata.get("papermill", {}).get("duration") or 0.0) for cell in cells}
    slowest = max(times, key=lambda cell: times[cell], default="")
    return {"chapter": chapter, "seconds": round(seconds, 1), "slowest_cell": slowest,
            "slowest_seconds": round(times.get(slowest, 0.0), 1),
            "stderr_cells": [cell.id for cell in cells if any(o.get("name") == "stderr" for o in cell.outputs)],
            "error": error}


def render(stage_folder: Path, build: Path) -> int:
    """Renders the staged sources with warnings as errors and moves the pages to ``build/html``.

    Returns:
        0, or 1 if Jupyter Book warned or failed; then the messages are in ``build/warnings.txt``.
    """
    out, report = build / "book", build / "warnings.txt"
    shutil.rmtree(out, ignore_errors=True)
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(stage_folder),
         "-n", "-W", "--keep-going", "--all", "--path-output", str(out)],
        check=False, capture_output=True, text=True, env={**os.environ, "NO_COLOR": "1"})
    text = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout + done.stderr)
    warnings = [line for line in text.splitlines() if re.search(r"\b(WARNING|ERROR|CRITICAL)\b", line)]
    html = out / "_build" / "html"
    if done.returncode or warnings or not (html / "index.html").exists():
        report.write_text("\n".join(warnings or text.splitlines()[-40:]) + "\n", encoding="utf-8")
        print(f"book: rendering failed, {len(warnings)} warnings, also in {report.relative_to(build.parent)}:")
        print(report.read_text(encoding="utf-8"))
        return 1
    for page in html.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if (clean := mended(text)) != text:
            page.write_text(clean, encoding="utf-8")
    trim_mathjax(html / "_static" / "mathjax")
    shutil.rmtree(build / "html", ignore_errors=True)
    shutil.move(html, build / "html")
    shutil.rmtree(out, ignore_errors=True)
    return 0


def scans(data: str, test: str) -> tuple[str | list[str], str]:
    """What the chapters' parameter ``data`` has to be, and what a page may call it.

    Raises:
        DatasetError: scans are missing, and cannot be fetched or were not.
    """
    if not test:
        find_scans(data)
        return data, data
    folders = [name if name in load_registry() else str(Path(name).expanduser().resolve()) for name in (data, test)]
    find_scans(folders)
    return folders, " and ".join(Path(folder).name for folder in folders)


def last_status() -> dict[str, Any]:
    """What the last build measured; empty if there was none."""
    return json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.exists() else {}


def write_status(runs: list[Run], data: str, profile: str) -> None:
    """Keeps what a build measured; chapters that it did not run keep what the last one measured."""
    before = last_status()
    known = before.get("chapters", []) if (before.get("data"), before.get("profile")) == (data, profile) else []
    measured = {run["chapter"]: run for run in [*known, *runs]}
    status = {"data": data, "profile": profile, "python": sys.version.split()[0], "date": time.strftime("%Y-%m-%d"),
              "machine": f"{platform.system()} with {os.cpu_count()} processor cores",
              "versions": {name: version(name) for name in PACKAGES},
              "chapters": [measured[chapter] for chapter in chapters_to_run(ROOT) if chapter in measured]}
    STATUS.write_text(json.dumps(status, indent=2) + "\n", encoding="utf-8")


def run_chapters(chapters: list[str], parameters: dict[str, Any], *, solutions: bool) -> list[Run]:
    """Runs chapters one after another and says how it went; with the solutions of their exercises in copies of them."""
    prepare_environment(BUILD)
    runs = []
    for chapter in chapters:
        source, target = ROOT / f"{chapter}.ipynb", STAGE / f"{chapter}.ipynb"
        if solutions:
            target = BUILD / "solutions" / source.name
            target.parent.mkdir(exist_ok=True)
            solved, source = with_solutions(nbformat.read(source, as_version=4)), target.with_suffix(".source.ipynb")
            nbformat.write(solved, source)
        runs.append(run := run_chapter(chapter, source, target, BUILD, parameters))
        print(f"book: {chapter}{' with solutions' * solutions}: {run['seconds']:.1f} s, slowest cell "
              f"{run['slowest_cell']} {run['slowest_seconds']:.1f} s"
              + (f", writes to stderr: {', '.join(run['stderr_cells'])}" if run["stderr_cells"] else ""), flush=True)
        if run["error"]:
            print(f"book: {chapter} FAILED: {run['error']}\n      read {target.relative_to(ROOT)}", flush=True)
        if run["slowest_seconds"] > SLOW_CELL_SECONDS:
            print(f"book: warning: cell {run['slowest_cell']} of {chapter} takes longer than "
                  f"{SLOW_CELL_SECONDS:.0f} s, too long for a class", flush=True)
    return runs


def main(arguments: list[str] | None = None) -> int:
    """Command line of ``make book``; returns the exit status."""
    parser = argparse.ArgumentParser(description="Run the chapters and build the book into _build/html.")
    parser.add_argument("--profile", choices=("quick", "full"), default="quick", help="settings of the runs")
    parser.add_argument("--data", default="phantom",
                        help="scans: phantom, a registered pair such as medseg, or a folder with slice labels")
    parser.add_argument("--test", default="", metavar="FOLDER", help="folder with outlines that belongs to it")
    parser.add_argument("--only", nargs="+", metavar="TEXT", default=[],
                        help="run only chapters whose name contains one of these; the others keep their last outputs")
    parser.add_argument("--no-execute", action="store_true", help="render the chapters that were run last time")
    parser.add_argument("--solutions", action="store_true",
                        help="also run the solutions of the exercises, in copies that are not rendered")
    parser.add_argument("--strict-time", action="store_true",
                        help=f"fail if a cell takes longer than {SLOW_CELL_SECONDS:.0f} s")
    options = parser.parse_args(arguments)

    begin = time.perf_counter()
    BUILD.mkdir(exist_ok=True)
    chapters = training_first(chapters_to_run(ROOT), ROOT)
    if strange := [text for text in options.only if not any(text in chapter for chapter in chapters)]:
        parser.error(f"no chapter has {strange[0]!r} in its name; there are {', '.join(sorted(chapters))}, "
                     "and several are named one after the other: --only 02 06")
    chosen = [chapter for chapter in chapters if not options.only or any(text in chapter for text in options.only)]
    failed = False
    running = options.solutions or not options.no_execute
    try:
        data, called = scans(options.data, options.test) if running else ("", last_status().get("data", ""))
    except DatasetError as error:
        print(f"book: {error}")
        return error.exit_code
    if options.only and not options.solutions and last_status().get("data", called) != called:
        print(f"book: the other chapters show {last_status()['data']}, not {called}: build them all once")
        return 1
    if not options.solutions:
        stage(ROOT, STAGE, keep_executed=options.no_execute or bool(options.only))
    if running:
        runs = run_chapters(chosen, {"data": data, "profile": options.profile}, solutions=options.solutions)
        failed = any(run["error"] or (options.strict_time and run["slowest_seconds"] > SLOW_CELL_SECONDS)
                     for run in runs)
        if options.solutions:
            return int(failed)
        write_status(runs, called, options.profile)
        if not failed and not options.only and (called, options.profile) == ("phantom", "quick"):
            same, said = check(last_run(BUILD / "runs"))
            failed = not same
            print(f"book: {said}", flush=True)
    for chapter in chapters_to_run(STAGE):
        notebook = nbformat.read(STAGE / f"{chapter}.ipynb", as_version=4)
        if cells := machine_paths(notebook, private_folders()):
            failed = True
            print(f"book: {chapter}: outputs of {', '.join(cells)} name a folder of this machine: print file names")
    if failed:
        return 1
    localise(STAGE)
    write_api(STAGE)
    downloads = STAGE / "chapters" / "downloads"
    downloads.mkdir(exist_ok=True)
    (downloads / "covidseg-students.zip").write_bytes(
        students_zip([ROOT / f"{chapter}.ipynb" for chapter in chapters_to_run(ROOT)]))
    status = last_status()
    fill_tables(STAGE, status_tables(status, STAGE) if status else {})
    if render(STAGE, BUILD):
        return 1
    print(f"book: {(BUILD / 'html' / 'index.html').relative_to(ROOT)} is ready "
          f"({time.perf_counter() - begin:.0f} s in all)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
