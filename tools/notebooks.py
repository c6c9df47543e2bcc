"""What the book does to notebooks: one source gives the page, the students' copy and the check of the solutions.

Cells tagged ``solution`` hold the folded solution of the exercise before them. Students' notebooks leave them out;
:func:`with_solutions` runs them, so that no solution is printed that does not work.
"""

from __future__ import annotations

import copy
import io
import re
import zipfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode

# Where the published book keeps its pictures. The chapters name them there, for Colab opens a notebook alone; in the
# staged copy they become files beside it, so that the pages need no other host.
PICTURES = "https://covidseg.github.io/covidseg/_images/"


def tags(cell: NotebookNode) -> list[str]:
    """Tags of a cell, none if it has no such entry."""
    return list(cell.metadata.get("tags", []))


def with_local_pictures(text: str) -> str:
    """Markdown of a chapter with the book's pictures as files in ``images/``."""
    return text.replace(PICTURES, "images/")


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
