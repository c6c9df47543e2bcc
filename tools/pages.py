"""What the builder does to pages: pictures beside them, tables of the build in them, and faults of others mended."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import nbformat
from citations import read_bibliography, with_roles
from notebooks import tags, without_pictures

# Where notebooks, which are opened anywhere, find the reference.
REFERENCE = r"https://covidseg\.github\.io/covidseg/docs/api/"


def localise(stage_folder: Path) -> None:
    """Turns what staged chapters carry for readers elsewhere, pictures and citations, into parts of the book.

    Of a claim a page shows the sentence; how it is checked stands in the notebook.
    """
    entries = read_bibliography(stage_folder / "chapters" / "references.bib")
    for path in stage_folder.glob("chapters/*.ipynb"):
        notebook = nbformat.read(path, as_version=4)
        local = without_pictures(notebook)
        for cell in local.cells:
            if cell.cell_type == "markdown":
                text = with_roles(cell.source, entries)
                cell.source = re.sub(rf"{REFERENCE}([\w.]+)\.html", r"../docs/api/\1.md", text)
            elif "claim" in tags(cell):
                cell.metadata["tags"] = [*(tag for tag in tags(cell) if tag != "hide-input"), "remove-input"]
        if local != notebook:
            nbformat.write(local, path)


# The modules of the reference, in the order of the chapters; each has a page, made from its docstrings.
API = ("lungs", "lungnet", "preprocess", "classifier", "gradcam", "patches", "curriculum", "segmenter", "augment",
       "training", "pipeline", "profiles", "predict", "data.folder", "data.scan", "data.phantom", "evaluation.metrics",
       "evaluation.statistics", "evaluation.evaluate", "baselines.decovnet", "baselines.ad3d_mil", "book.lesson",
       "errors")


def write_api(stage_folder: Path) -> None:
    """Writes the pages of the reference that ``_toc.yml`` lists, ``docs/api/NAME.md``, from the list of modules."""
    folder = stage_folder / "docs" / "api"
    folder.mkdir(parents=True, exist_ok=True)
    for name in API:
        directive = f".. automodule:: covidseg.{name}\n   :members:\n   :member-order: bysource\n"
        (folder / f"{name}.md").write_text(f"# covidseg.{name}\n\n```{{eval-rst}}\n{directive}```\n", encoding="utf-8")
    (folder / "index.md").write_text(
        "# Reference\n\nWhat the modules of the package offer, in the order of the chapters.\n\n"
        + "".join(f"- [covidseg.{name}]({name}.md)\n" for name in API), encoding="utf-8")


def chapter_title(path: Path) -> str:
    """The first heading of a notebook."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown" and (found := re.match(r"# (.+)", cell.source)):
            return found[1]
    return path.stem


def status_tables(status: dict[str, Any], folder: Path) -> dict[str, str]:
    """Tables of a build as Markdown, by the name that a page asks for them.

    Args:
        status: content of ``status.json``.
        folder: of the staged sources.
    """
    chapters = [run for run in status["chapters"] if (folder / (run["chapter"] + ".ipynb")).exists()]
    runs = [f"| [{chapter_title(folder / (run['chapter'] + '.ipynb'))}]({Path(run['chapter']).name}) | "
            f"{run['seconds']:.0f} | {run['slowest_seconds']:.0f} | `{run['slowest_cell']}` |"
            for run in chapters]
    total = sum(run["seconds"] for run in chapters)
    versions = [f"| {name} | {number} |" for name, number in status["versions"].items()]
    return {"times": "\n".join(["| chapter | seconds | slowest cell, seconds | which |", "|---|--:|--:|---|", *runs,
                                f"| **all** | **{total:.0f}** | | |"]),
            "versions": "\n".join(["| package | version |", "|---|---|", f"| Python | {status['python']} |",
                                   *versions]),
            "profile": f"Profile `{status['profile']}`, on {status['machine']}, {status['date']}."}


def fill_tables(stage_folder: Path, tables: dict[str, str]) -> None:
    """Puts the tables of the build where staged Markdown pages ask for them, ``<!-- table: NAME -->``."""
    for path in stage_folder.glob("chapters/*.md"):
        text = path.read_text(encoding="utf-8")
        filled = re.sub(r"<!-- table: (\w+) -->", lambda found: tables.get(found[1], "(not measured yet)"), text)
        if filled != text:
            path.write_text(filled, encoding="utf-8")


def mended(page: str) -> str:
    """A page without what its makers do wrong.

    Thebe is not offered by this book, and its scripts come twice, a script error. The bibliography calls itself a
    list without being one, which confuses screen readers, and to them what unfolds pages in the sidebar has no name.
    """
    page = re.sub(r"<script>const THEBE_JS_URL.*?</script>", "", page, flags=re.DOTALL)
    page = re.sub(r'<script[^>]*src="[^"]*sphinx-thebe\.js[^"]*"[^>]*></script>', "", page)
    page = re.sub(r'<script type="text/x-thebe-config">.*?</script>', "", page, flags=re.DOTALL)
    page = page.replace('<summary><span class="toctree-toggle"',
                        '<summary aria-label="pages below"><span class="toctree-toggle"')
    return page.replace('<div role="list" class="citation-list">', '<div class="citation-list">')


def trim_mathjax(folder: Path) -> None:
    """Leaves one of MathJax's many bundles, the one that the pages load, with its fonts and extensions."""
    for path in folder.iterdir():
        if path.name not in ("tex-chtml.js", "output", "input", "a11y", "sre"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
