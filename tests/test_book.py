"""The builder of the book, and the pages that it made, in a browser where there is one."""

from __future__ import annotations

import html
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import yaml
from nbformat.v4 import new_code_cell, new_notebook, new_output

from covidseg.compare import Line, table_lines
from covidseg.records import read_records
from covidseg.report import spread

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"


def load_builder() -> ModuleType:
    """tools/build_book.py is a program, not part of the package: load it from its file."""
    spec = importlib.util.spec_from_file_location("build_book", ROOT / "tools" / "build_book.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


builder = load_builder()


def toc_pages() -> list[str]:
    return builder.toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))


# --- the builder -------------------------------------------------------------------------------------------------

def test_toc_lists_every_chapter_and_nothing_else() -> None:
    pages = toc_pages()
    assert len(pages) == len(set(pages))
    sources = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "chapters").glob("*.*")
               if path.suffix in {".ipynb", ".md"}}
    assert set(pages) == sources


def test_toc_is_read_in_order_through_parts_and_sections() -> None:
    toc = {"root": "a", "parts": [{"chapters": [{"file": "b", "sections": [{"file": "c"}]}, {"file": "d"}]}]}
    assert builder.toc_files(toc) == ["a", "b", "c", "d"]


def test_tidy_hides_injected_parameters_and_drops_paths() -> None:
    cell = new_code_cell("x = 1", metadata={"tags": ["injected-parameters"], "papermill": {}})
    notebook = new_notebook(cells=[cell], metadata={"papermill": {"input_path": "/somewhere"}})
    clean = builder.tidy(notebook)
    assert clean.cells[0].metadata == {"tags": ["injected-parameters", "remove-cell"]}
    assert "papermill" not in clean.metadata
    assert "papermill" in notebook.metadata  # the original stays as it was


def test_outputs_with_machine_paths_are_found() -> None:
    good, bad = new_code_cell("1"), new_code_cell("2")
    good.outputs = [new_output("stream", text="runs/classifier.safetensors")]
    bad.outputs = [new_output("execute_result", data={"text/plain": "PosixPath('/some/place/runs')"})]
    assert builder.machine_paths(new_notebook(cells=[good, bad]), ["/some/place"]) == [bad.id]


def test_thebe_scripts_are_removed() -> None:
    page = ('<script src="a.js"></script><script>const THEBE_JS_URL = "x"; const y = 1</script>'
            '<script async="async" src="../_static/sphinx-thebe.js?v=1"></script><p>text</p>')
    assert builder.without_thebe(page) == '<script src="a.js"></script><p>text</p>'


@pytest.mark.slow
def test_chapter_runs_are_reported_and_failures_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook that fails is written with its error, and says so; one that works reports its slowest cell."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    parameters = new_code_cell('profile = "quick"', metadata={"tags": ["parameters"]}, id="parameters")
    body = new_code_cell('import sys, time\ntime.sleep(0.5)\nprint("note", file=sys.stderr)\n'
                         'assert profile == "full", f"profile is {profile}"', id="body")
    source = tmp_path / "source.ipynb"
    nbformat.write(new_notebook(cells=[parameters, body], metadata=kernel), source)

    good = builder.run_chapter("good", source, tmp_path / "good.ipynb", tmp_path, "full")
    assert good.error == ""
    assert good.slowest_cell == "body"
    assert good.slowest_seconds >= 0.5
    assert good.stderr_cells == ("body",)
    injected = nbformat.read(tmp_path / "good.ipynb", as_version=4).cells[1]
    assert {"injected-parameters", "remove-cell"} <= set(injected.metadata["tags"])

    bad = builder.run_chapter("bad", source, tmp_path / "bad.ipynb", tmp_path, "quick")
    assert "profile is quick" in bad.error
    kept = nbformat.read(tmp_path / "bad.ipynb", as_version=4)
    assert any(o.output_type == "error" for cell in kept.cells if cell.cell_type == "code" for o in cell.outputs)


def test_stage_keeps_executed_chapters_when_asked(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "stage"
    (root / "chapters").mkdir(parents=True)
    (root / "_toc.yml").write_text("root: chapters/a\n")
    (root / "chapters" / "a.ipynb").write_text("clean")
    builder.stage(root, target, keep_executed=False)
    (target / "chapters" / "a.ipynb").write_text("executed")
    (root / "chapters" / "b.md").write_text("new")
    builder.stage(root, target, keep_executed=True)
    assert (target / "chapters" / "a.ipynb").read_text() == "executed"
    assert (target / "chapters" / "b.md").read_text() == "new"
    builder.stage(root, target, keep_executed=False)
    assert (target / "chapters" / "a.ipynb").read_text() == "clean"


# --- the built pages, as files -----------------------------------------------------------------------------------

def missing_pages(html: Path, pages: list[str]) -> list[str]:
    """Entries of the table of contents without a page."""
    return [page for page in pages if not (html / f"{page}.html").exists()]


def pages_with_paths(html: Path, folders: list[str]) -> list[str]:
    """Pages, downloads and the search index that name a folder of the machine which built them."""
    files = [*html.rglob("*.html"), *html.rglob("*.ipynb"), *html.glob("searchindex.js")]
    return [f"{file.relative_to(html)}: {folder}" for file in sorted(files) for folder in folders
            if folder in file.read_text(encoding="utf-8")]


@pytest.fixture(scope="module")
def book() -> Path:
    if not (HTML / "index.html").exists():
        pytest.skip("the book is not built: run `make book` first")
    return HTML


@pytest.mark.book
def test_every_page_is_built(book: Path) -> None:
    assert missing_pages(book, toc_pages()) == [], "run `make book` again"
    assert toc_pages()[0] in (book / "index.html").read_text(encoding="utf-8")


@pytest.mark.book
def test_build_left_no_warnings(book: Path) -> None:
    assert not (book.parent / "warnings.txt").exists()


@pytest.mark.book
def test_pages_name_no_machine_path(book: Path) -> None:
    assert pages_with_paths(book, [*builder.private_folders(), "/home/"]) == []


@pytest.mark.book
def test_every_page_carries_the_disclaimer(book: Path) -> None:
    for page in toc_pages():
        assert "not a medical device" in (book / f"{page}.html").read_text(encoding="utf-8"), page


def figures_missing(page: str, lines: Sequence[Line]) -> list[str]:
    """Systems of a comparison whose figures are not on a page: a row with the title and all five, in order."""
    text = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))
    return [line.title for line in lines
            if " ".join([line.title, *(spread(column) for column in line.micro.T)]) not in text]


@pytest.mark.book
def test_results_page_shows_the_recorded_comparison(book: Path) -> None:
    record = read_records("table1-medseg9-full")["table1-medseg9-full"]
    page = (book / "chapters/09_results.html").read_text(encoding="utf-8")
    assert figures_missing(page, table_lines(record["results"])) == [], "run `make book` again"


def test_check_of_the_results_page_fires() -> None:
    record = read_records("table1-medseg9-full")["table1-medseg9-full"]
    lines = table_lines(record["results"])
    page = "".join(f"<tr><td>{line.title}</td>" + "".join(f"<td>{spread(c)}</td>\n" for c in line.micro.T) + "</tr>"
                   for line in lines)
    assert figures_missing(page, lines) == []
    ours = next(line for line in lines if line.key == "extended")
    assert figures_missing(page.replace(spread(ours.micro[:, 0]), "0.999 ± 0.001"), lines) == [ours.title]


def test_page_checks_fire(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("saved in /home/someone/covidseg")
    assert missing_pages(tmp_path, ["a", "b"]) == ["b"]
    assert pages_with_paths(tmp_path, ["/home/", "/elsewhere/"]) == ["a.html: /home/"]


# --- the built pages, in a browser -------------------------------------------------------------------------------

FAULTS_SCRIPT = """() => {
  const faults = [];
  const width = document.documentElement.clientWidth;
  if (document.documentElement.scrollWidth > width) {
    const wide = [...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > width + 1)
      .map(e => e.tagName.toLowerCase() + (e.id ? "#" + e.id : "")).slice(0, 5);
    faults.push(`scrolls sideways: ${document.documentElement.scrollWidth} of ${width} px, ${wide.join(", ")}`);
  }
  for (const image of document.querySelectorAll("article img, main img, body > img")) {
    const name = (image.getAttribute("src") || "").slice(0, 60);
    if (!image.alt.trim()) faults.push(`picture without description: ${name}`);
    if (image.complete && image.naturalWidth === 0 && !/^https?:/.test(name)) faults.push(`broken picture: ${name}`);
  }
  return faults;
}"""


def page_faults(browser: Any, file: Path, width: int) -> list[str]:
    """What goes wrong when a page is opened ``width`` pixels wide with every outside host blocked."""
    page = browser.new_page(viewport={"width": width, "height": 900})
    faults: list[str] = []

    def on_console(message: Any) -> None:
        # The network of a test is no matter of the page: formulas come from a host outside.
        if message.type == "error" and not str(message.location.get("url", "")).startswith("http"):
            faults.append(f"console: {message.text}")

    try:
        page.on("console", on_console)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.route("http*://**", lambda route: route.abort())
        page.goto(file.as_uri(), wait_until="load")
        page.wait_for_timeout(300)
        return faults + page.evaluate(FAULTS_SCRIPT)
    finally:
        page.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium without a window; the tests that want it skip where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("COVIDSEG_CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)
    if path is None:
        pytest.skip("no Chromium here: install it, or name it in COVIDSEG_CHROMIUM")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        instance = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


@pytest.mark.book
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("name", toc_pages())
def test_page_opens_without_faults(book: Path, browser: Any, name: str, width: int) -> None:
    file = book / f"{name}.html"
    assert file.exists(), "run `make book` again"
    assert page_faults(browser, file, width) == []


def test_browser_check_fires(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<body style="margin:0"><img src="gone.png"><div id="wide" style="width:700px">x</div>'
                    '<script src="https://outside.example/x.js"></script>'
                    '<script>console.error("loud"); undefinedFunction();</script></body>')
    faults = page_faults(browser, page, 390)
    for expected in ("console: loud", "undefinedFunction is not defined", "scrolls sideways: 700 of 390 px, div#wide",
                     "picture without description: gone.png", "broken picture: gone.png"):
        assert any(expected in fault for fault in faults), (expected, faults)
    assert not any("outside.example" in fault for fault in faults)
    assert "scrolls sideways" not in " ".join(page_faults(browser, page, 1280))
