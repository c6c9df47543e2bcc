"""What the book does to notebooks: one source gives the page, the students' copy and the check of the solutions.

Cells tagged ``solution`` hold the folded solution of the exercise before them. Students' notebooks leave them out;
:func:`with_solutions` runs them, so that no solution is printed that does not work.
"""

from __future__ import annotations

import base64
import copy
import io
import re
import zipfile
from pathlib import Path

import nbformat
from citations import read_bibliography, with_links
from nbformat import NotebookNode

FOLDED = {"hide-input", "remove-input", "remove-cell"}


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell, none if it has no such entry."""
    return list(cell.metadata.get("tags", []))


def with_pictures(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """A copy that carries the pictures it shows, ``attachment:NAME.svg``, for a notebook is opened and sent alone.

    Args:
        folder: where the pictures lie as files.
    """
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        cell.pop("attachments", None)
        names = re.findall(r"\]\(attachment:([\w-]+\.svg)\)", cell.source) if cell.cell_type == "markdown" else []
        if names:
            cell.attachments = {name: {"image/svg+xml": base64.b64encode((folder / name).read_bytes()).decode()}
                                for name in names}
    return notebook


def without_pictures(notebook: NotebookNode) -> NotebookNode:
    """A copy that shows its pictures from files in ``images/``, as the pages do."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        if cell.pop("attachments", None):
            cell.source = cell.source.replace("](attachment:", "](images/")
    return notebook


def without_solutions(notebook: NotebookNode) -> NotebookNode:
    """The students' copy: solutions gone, an empty code cell in their place, no outputs."""
    notebook = copy.deepcopy(notebook)
    for number, cell in enumerate(notebook.cells):
        if "solution" in tags(cell):
            answer = nbformat.v4.new_code_cell("# your answer", id=cell.id.replace("solution", "answer"))
            notebook.cells[number] = answer
        elif cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def solution_code(cell: NotebookNode) -> str:
    """The Python of a solution, empty if it has none."""
    return "\n".join(re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL))


def with_solutions(notebook: NotebookNode) -> NotebookNode:
    """A copy in which each solution's code is a cell of its own behind it."""
    notebook = copy.deepcopy(notebook)
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if "solution" in tags(cell) and (code := solution_code(cell)):
            cells.append(nbformat.v4.new_code_cell(code, id=f"run-{cell.id}"))
    notebook.cells = cells
    return notebook


def students_zip(chapters: list[Path]) -> bytes:
    """All students' notebooks as one archive; the same bytes for the same chapters."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in chapters:
            text = nbformat.writes(without_solutions(nbformat.read(path, as_version=4)))
            archive.writestr(zipfile.ZipInfo(path.name, (2026, 1, 1, 0, 0, 0)), text)
    return packed.getvalue()


def with_folds(notebook: NotebookNode) -> NotebookNode:
    """A copy whose cells that the pages fold are folded on Colab and in JupyterLab too.

    Colab has a form for the parameters, so that folding them hides nothing; in JupyterLab they have to stay open.
    """
    notebook = copy.deepcopy(notebook)
    for cell in notebook.cells:
        cell.metadata.pop("cellView", None)
        cell.metadata.pop("jupyter", None)
        if cell.cell_type == "code" and FOLDED & set(tags(cell)):
            cell.metadata["cellView"] = "form"
            if "parameters" not in tags(cell):
                cell.metadata["jupyter"] = {"source_hidden": True}
    return notebook


def for_readers_anywhere(notebook: NotebookNode, chapters: Path) -> NotebookNode:
    """A copy of a chapter that needs nothing beside it: pictures come along, citations are links, plots are folded."""
    notebook = with_folds(with_pictures(notebook, chapters / "images"))
    entries = read_bibliography(chapters / "references.bib")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, entries)
    return notebook


if __name__ == "__main__":  # `make strip`
    for path in sorted((Path(__file__).resolve().parents[1] / "chapters").glob("*.ipynb")):
        source = nbformat.read(path, as_version=4)
        if (whole := for_readers_anywhere(source, path.parent)) != source:
            nbformat.write(whole, path)
