"""The chapters as they are kept in git: no outputs, the same opening cells, readable ids, described pictures."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from notebooks import tags, with_folds

from covidseg import __version__

CHAPTERS = sorted((Path(__file__).resolve().parents[2] / "chapters").glob("*.ipynb"))
WELCOME = nbformat.read(CHAPTERS[0], as_version=4)
SETUP = """# @title Set-up: on Colab this cell installs covidseg
import sys

if "google.colab" in sys.modules:
    %pip install -q "covidseg @ git+https://github.com/covidseg/covidseg@main"
"""
BEGIN = f'\n\nbegin("{__version__}")'
PARAMETERS = '''# @title What the chapter runs on
# data may also be a list of two folders of your own: training scans with slice labels, and test scans with outlines.
data = "phantom"  # @param ["phantom", "medseg"]
profile = "quick"  # @param ["quick", "full"]
seed = 0  # @param {type: "integer"}'''
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def strip_faults(notebook: NotebookNode) -> list[str]:
    """Traces of a run, and metadata that papermill or another machine would trip over."""
    faults = []
    for cell in notebook.cells:
        if cell.cell_type == "code" and (cell.outputs or cell.execution_count is not None):
            faults.append(f"{cell.id}: has outputs, run `make strip`")
        if extra := set(cell.metadata) - {"tags", "mystnb", "cellView", "jupyter"}:
            faults.append(f"{cell.id}: has metadata {', '.join(sorted(extra))}, run `make strip`")
        if "injected-parameters" in tags(cell):
            faults.append(f"{cell.id}: was injected by papermill, remove it")
    if notebook.metadata.get("kernelspec") != KERNEL:
        faults.append(f"kernelspec must be {KERNEL}")
    if extra := set(notebook.metadata) - {"kernelspec", "language_info"}:
        faults.append(f"notebook has metadata {', '.join(sorted(extra))}")
    if (notebook.nbformat, notebook.nbformat_minor) != (4, 5):
        faults.append("notebook format must be 4.5")
    return faults


def opening_faults(notebook: NotebookNode) -> list[str]:
    """Deviations from the cells that open every chapter."""
    opening = ("title", "setup", "parameters")
    if tuple(cell.id for cell in notebook.cells[:3]) != opening:
        return [f"the first cells must be {', '.join(opening)}"]
    title, setup, parameters = notebook.cells[:3]
    faults = []
    if not re.match(r"# \S", title.source) or not re.search(r"^- ", title.source, re.MULTILINE):
        faults.append("title: must start with a heading and list what the reader can do afterwards")
    if not setup.source.startswith(SETUP) or "hide-input" not in tags(setup):
        faults.append("setup: must install on Colab as in the other chapters, with the tag hide-input")
    if not setup.source.endswith(BEGIN):
        faults.append(f"setup: must end with {BEGIN.strip()}, the version that this notebook belongs to")
    if parameters.source != PARAMETERS or not {"parameters", "hide-input"} <= set(tags(parameters)):
        faults.append("parameters: must be the same in every chapter, with the tags parameters and hide-input")
    return faults


def id_faults(notebook: NotebookNode) -> list[str]:
    """Cell ids that are double, unreadable or the eight random characters that Jupyter makes up."""
    ids = [cell.id for cell in notebook.cells]
    faults = [f"{i}: is used twice" for i in sorted({i for i in ids if ids.count(i) > 1})]
    return faults + [f"{i}: is no readable name" for i in ids
                     if not re.fullmatch(r"[a-z][a-z0-9-]{2,63}", i) or re.fullmatch(r"[0-9a-f]{8,}", i)]


def picture_faults(notebook: NotebookNode) -> list[str]:
    """Pictures without a description: cells tagged ``figure`` carry it as ``mystnb.image.alt``."""
    faults = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown" and re.search(r"!\[\s*\]\(|<img(?![^>]*\salt=[\"'][^\"'])", cell.source):
            faults.append(f"{cell.id}: a picture has no alternative text")
        if cell.cell_type != "code":
            continue
        if "plt.show(" in cell.source and "figure" not in tags(cell):
            faults.append(f"{cell.id}: draws, so it needs the tag figure")
        alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        if "figure" in tags(cell) and len(alt) < 20:
            faults.append(f"{cell.id}: needs mystnb.image.alt that says what is to be seen")
    return faults


def faults(notebook: NotebookNode) -> list[str]:
    return [*strip_faults(notebook), *opening_faults(notebook), *id_faults(notebook), *picture_faults(notebook)]


@pytest.fixture
def welcome() -> NotebookNode:
    return copy.deepcopy(WELCOME)


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_is_as_it_should_be(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert faults(notebook) == []


def test_strip_check_fires(welcome: NotebookNode) -> None:
    welcome.cells[1].outputs = [nbformat.v4.new_output("stream", text="left over")]
    welcome.cells[2].metadata["papermill"] = {"duration": 1}
    welcome.metadata["papermill"] = {"input_path": "somewhere"}
    del welcome.metadata["kernelspec"]["language"]
    assert strip_faults(welcome) == [
        "setup: has outputs, run `make strip`", "parameters: has metadata papermill, run `make strip`",
        f"kernelspec must be {KERNEL}", "notebook has metadata papermill"]
    welcome.cells[2].metadata["tags"] = ["injected-parameters"]
    welcome.nbformat_minor = 4
    assert {"parameters: was injected by papermill, remove it", "notebook format must be 4.5"} <= set(
        strip_faults(welcome))


def test_what_pages_fold_is_folded_on_colab_and_in_jupyterlab_too() -> None:
    cells = [nbformat.v4.new_code_cell(name, id=name, metadata={"tags": marks}) for name, marks in (
        ("plot", ["hide-input"]), ("claim", ["claim", "remove-input"]), ("parameters", ["parameters", "hide-input"]),
        ("lesson", []))]
    cells[-1].metadata["cellView"] = "form"  # a cell that is shown again
    folded = {cell.id: cell.metadata for cell in with_folds(nbformat.v4.new_notebook(cells=cells)).cells}
    assert folded["plot"] == {"tags": ["hide-input"], "cellView": "form", "jupyter": {"source_hidden": True}}
    assert folded["claim"]["jupyter"] == {"source_hidden": True}
    assert folded["parameters"] == {"tags": ["parameters", "hide-input"], "cellView": "form"}
    assert folded["lesson"] == {"tags": []}


def test_opening_check_fires(welcome: NotebookNode) -> None:
    welcome.cells[0].source = "No heading"
    welcome.cells[1].source = "import sys\nbegin('0.0.9')"
    welcome.cells[2].source = 'profile = "full"\nseed = 0'
    assert [fault.split(":")[0] for fault in opening_faults(welcome)] == ["title", "setup", "setup", "parameters"]
    del welcome.cells[1]
    assert opening_faults(welcome) == ["the first cells must be title, setup, parameters"]


def test_id_check_fires(welcome: NotebookNode) -> None:
    welcome.cells[0].id = welcome.cells[1].id = "a1b2c3d4"
    welcome.cells[2].id = "Cell 3"
    assert id_faults(welcome) == ["a1b2c3d4: is used twice", "a1b2c3d4: is no readable name",
                                  "a1b2c3d4: is no readable name", "Cell 3: is no readable name"]


def test_picture_check_fires(welcome: NotebookNode) -> None:
    welcome.cells[0].source += "\n![](picture.png)"
    welcome.cells[1].source += "\nplt.show()"
    welcome.cells[2].metadata["tags"] = ["parameters", "figure"]
    assert picture_faults(welcome) == [
        "title: a picture has no alternative text", "setup: draws, so it needs the tag figure",
        "parameters: needs mystnb.image.alt that says what is to be seen"]


def double_names(notebooks: dict[str, NotebookNode]) -> list[str]:
    """Names of figures that two cells of the book have: a reference could mean either."""
    places: dict[str, list[str]] = {}
    for name, notebook in notebooks.items():
        for cell in notebook.cells:
            if figure := cell.metadata.get("mystnb", {}).get("figure", {}).get("name"):
                places.setdefault(figure, []).append(f"{name}:{cell.id}")
    return [f"{figure}: {', '.join(cells)}" for figure, cells in places.items() if len(cells) > 1]


def test_each_figure_has_a_name_of_its_own() -> None:
    assert double_names({path.stem: nbformat.read(path, as_version=4) for path in CHAPTERS}) == []
    cell = nbformat.v4.new_code_cell("1", id="one", metadata={"mystnb": {"figure": {"name": "fig-a"}}})
    assert double_names({"x": nbformat.v4.new_notebook(cells=[cell]), "y": nbformat.v4.new_notebook(cells=[cell])}) == [
        "fig-a: x:one, y:one"]
