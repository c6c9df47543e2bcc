"""What makes a chapter teachable: picture before code, sliders, exercises with solutions, a quiz, no typed figures."""

from __future__ import annotations

import copy
import io
import re
import zipfile
from pathlib import Path

import nbformat
import notebooks
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from covidseg.book.quiz import quizzes

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "chapters" / "images"
# The first page says how to use the book and teaches nothing yet; an appendix is for looking things up.
CHAPTERS = sorted((ROOT / "chapters").glob("[0-9]*.ipynb"))[1:]
ORDER = ("title", "setup", "parameters", "idea", "exercises", "key-points", "quiz-intro", "quiz",
         "further")


def order_faults(notebook: NotebookNode) -> list[str]:
    """Parts of a chapter that are missing or stand in the wrong place."""
    ids = [cell.id for cell in notebook.cells]
    missing = [part for part in ORDER if part not in ids]
    if missing:
        return [f"has no cell {', '.join(missing)}"]
    places = [ids.index(part) for part in ORDER]
    faults = [] if places == sorted(places) else ["its parts are not in the usual order"]
    cells = {cell.id: cell for cell in notebook.cells}
    for part, text in (("title", "**Time:** "), ("idea", "## The idea"), ("exercises", "## Exercises"),
                       ("key-points", "## Key points"), ("quiz-intro", "## Check yourself"),
                       ("further", "## Further reading"), ("further", "not a medical device")):
        if text not in cells[part].source:
            faults.append(f"{part}: must say {text!r}")
    if len(re.findall(r"^- ", cells["key-points"].source, re.MULTILINE)) < 3:
        faults.append("key-points: at least three")
    if not re.search(r"!\[[^\]]{40,}\]\(", cells["idea"].source):
        faults.append("idea: needs a picture with a description")
    if not any("interactive" in notebooks.tags(cell) for cell in notebook.cells):
        faults.append("has nothing to play with (tag interactive)")
    return faults


def exercise_faults(notebook: NotebookNode) -> list[str]:
    """Exercises without a folded solution that could be taken out."""
    ids = [cell.id for cell in notebook.cells]
    numbers = sorted(int(found[1]) for i in ids if (found := re.fullmatch(r"exercise-(\d+)", i)))
    faults = [] if len(numbers) >= 2 else ["has fewer than two exercises"]
    for number in numbers:
        place = ids.index(f"exercise-{number}")
        following = notebook.cells[place + 1]
        if following.id != f"solution-{number}" or "solution" not in notebooks.tags(following):
            faults.append(f"exercise-{number}: no cell solution-{number} with the tag solution behind it")
        elif not re.match(r"<details>\s*<summary>Solution</summary>\s*\n\n", following.source):
            faults.append(f"solution-{number}: is not folded")
        if not re.match(r"### Exercise \d+\.\d+: \S", notebook.cells[place].source):
            faults.append(f"exercise-{number}: needs a numbered heading")
        if "<details" in notebook.cells[place].source:
            faults.append(f"exercise-{number}: holds its own solution")
    return faults


def typed_figures(notebook: NotebookNode) -> list[str]:
    """Measured figures in prose that no cell computed: three decimals, or percentages with one."""
    faults = []
    for cell in notebook.cells:
        prose = re.sub(r"```.*?```|`[^`]*`|\$[^$]*\$|\]\([^)]*\)", "", cell.source, flags=re.DOTALL)
        if cell.cell_type == "markdown" and (found := re.findall(r"(?<![\d.])0?\.\d{3}\b|\d+\.\d ?%", prose)):
            faults.append(f"{cell.id}: {', '.join(found)} was typed, compute it or read it from a record")
    return faults


@pytest.mark.parametrize("path", sorted((ROOT / "chapters").glob("*.ipynb")), ids=lambda path: path.stem)
def test_chapter_needs_nothing_beside_it(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert notebooks.for_readers_anywhere(notebook, path.parent) == notebook, "run `make strip`"
    assert any(cell.get("attachments") for cell in notebook.cells)


def reading_minutes(guide: str) -> dict[str, int]:
    """Number of each chapter -> minutes of reading and trying, from the table for instructors."""
    return {found[1]: int(found[2]) for found in re.finditer(r"^\| (\w+) [^|]+\| (\d+) \| \d+ \|", guide, re.MULTILINE)}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_chapter_can_be_taught(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    assert order_faults(notebook) + exercise_faults(notebook) + typed_figures(notebook) == []
    assert f'quiz("{path.stem}")' in next(cell.source for cell in notebook.cells if cell.id == "quiz")
    assert path.stem in quizzes()
    assert "<summary>Solution" not in nbformat.writes(notebooks.without_solutions(notebook))
    guide = reading_minutes((ROOT / "chapters" / "instructor.md").read_text(encoding="utf-8"))
    told = re.search(r"\*\*Time:\*\* about (\d+) minutes", notebook.cells[0].source)
    assert told is not None
    assert guide[path.name[:2].lstrip("0")] == int(told[1]), "instructors and students are told the same time"


def test_times_for_instructors_are_read() -> None:
    assert reading_minutes("| chapter | a | b |\n| 5 Patches | 60 | 40 | |\n| 12 Limits | 45 | 5 | x |\n") == {
        "5": 60, "12": 45}


# --- the checks fire, and the tools do what they say -------------------------------------------------------------

@pytest.fixture
def good() -> NotebookNode:
    """The smallest chapter without a fault."""
    def text(name: str, source: str, **metadata: list[str]) -> NotebookNode:
        return new_markdown_cell(source, id=name, metadata=metadata)
    folded = "<details>\n<summary>Solution</summary>\n\n```python\nprint(1 + 1)\n```\n\n</details>"
    return new_notebook(cells=[
        text("title", "# 1 · A\n\n**Time:** 5 minutes\n\n- know"),
        new_code_cell("1", id="setup"), new_code_cell("2", id="parameters"),
        text("idea", f"## The idea\n\n![{'a' * 40}](attachment:a.svg)"),
        new_code_cell("4", id="explore", metadata={"tags": ["interactive"]}), text("exercises", "## Exercises"),
        text("exercise-1", "### Exercise 1.1: one"), text("solution-1", folded, tags=["solution"]),
        text("exercise-2", "### Exercise 1.2: two"), text("solution-2", folded, tags=["solution"]),
        text("key-points", "## Key points\n\n- a\n- b\n- c"), text("quiz-intro", "## Check yourself"),
        new_code_cell('quiz("a")', id="quiz"), text("further", "## Further reading\n\nnot a medical device")])


def test_checks_pass_a_good_chapter(good: NotebookNode) -> None:
    assert order_faults(good) == exercise_faults(good) == typed_figures(good) == []


def test_order_check_fires(good: NotebookNode) -> None:
    cells = {cell.id: cell for cell in good.cells}
    cells["idea"].source = "## The idea\n\n![short](attachment:a.svg)"
    cells["explore"].metadata["tags"] = []
    cells["key-points"].source = "## Key points\n\n- one"
    assert order_faults(good) == ["key-points: at least three", "idea: needs a picture with a description",
                                  "has nothing to play with (tag interactive)"]
    good.cells.insert(2, good.cells.pop())
    assert "its parts are not in the usual order" in order_faults(good)
    good.cells.pop(0)
    assert order_faults(good) == ["has no cell title"]


def test_exercise_check_fires(good: NotebookNode) -> None:
    cells = {cell.id: cell for cell in good.cells}
    cells["solution-1"].metadata["tags"] = []
    cells["solution-2"].source = "It is 2."
    cells["exercise-2"].source = "Two? <details>"
    assert exercise_faults(good) == [
        "exercise-1: no cell solution-1 with the tag solution behind it", "solution-2: is not folded",
        "exercise-2: needs a numbered heading", "exercise-2: holds its own solution"]
    alone = [new_markdown_cell("x", id="exercise-1"), new_markdown_cell("x", id="other")]
    assert "has fewer than two exercises" in exercise_faults(new_notebook(cells=alone))


def test_figure_check_fires(good: NotebookNode) -> None:
    good.cells[0].source += "\n\nDice rose from 0.683 to .701, by 93.2 %. The table says .74; `lr=0.001`; $x = 0.123$."
    assert typed_figures(good) == ["title: 0.683, .701, 93.2 % was typed, compute it or read it from a record"]


def test_students_get_no_solutions_and_no_outputs(good: NotebookNode, tmp_path: Path) -> None:
    good.cells[2].outputs = [nbformat.v4.new_output("stream", text="left over")]
    before = copy.deepcopy(good)
    copied = notebooks.without_solutions(good)
    assert good == before
    assert "<details>" not in nbformat.writes(copied)
    assert [cell.id for cell in copied.cells if cell.id.startswith("answer")] == ["answer-1", "answer-2"]
    assert copied.cells[2].outputs == []
    nbformat.validate(copied)
    nbformat.write(good, tmp_path / "a.ipynb")
    packed = notebooks.students_zip([tmp_path / "a.ipynb"])
    assert packed == notebooks.students_zip([tmp_path / "a.ipynb"])
    assert zipfile.ZipFile(io.BytesIO(packed)).namelist() == ["a.ipynb"]


def test_solutions_become_cells(good: NotebookNode) -> None:
    run = [cell for cell in notebooks.with_solutions(good).cells if cell.id.startswith("run-")]
    assert [cell.source for cell in run] == ["print(1 + 1)\n"] * 2


def test_pictures_travel_with_the_notebook(good: NotebookNode, tmp_path: Path) -> None:
    (tmp_path / "a.svg").write_text("<svg/>")
    carrying = notebooks.with_pictures(good, tmp_path)
    assert [list(cell.attachments) for cell in carrying.cells if "attachments" in cell] == [["a.svg"]]
    assert notebooks.with_pictures(carrying, tmp_path) == carrying
    nbformat.validate(carrying)
    local = notebooks.without_pictures(carrying)
    assert not any("attachments" in cell for cell in local.cells)
    assert "](images/a.svg)" in nbformat.writes(local)
    with pytest.raises(FileNotFoundError, match=r"a\.svg"):
        notebooks.with_pictures(good, tmp_path / "elsewhere")
