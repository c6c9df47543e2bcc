"""The builder of the book, and the pages that it made, in a browser where there is one."""

from __future__ import annotations

import html
import json
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import book_pdf
import build_book as builder
import nbformat
import pages
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from nbformat.v4 import new_code_cell, new_notebook, new_output

from covidseg.book.results import read_records
from covidseg.evaluation.experiments import Line, table_lines
from covidseg.evaluation.methods import SYSTEMS
from covidseg.evaluation.tables import spread

ROOT = Path(__file__).resolve().parents[2]
HTML = ROOT / "_build" / "html"
CHAPTERS = builder.chapters_to_run(ROOT)


def toc_pages() -> list[str]:
    return builder.toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))


def test_toc_lists_every_chapter_and_nothing_else_in_order() -> None:
    listed = toc_pages()
    assert len(listed) == len(set(listed))
    assert [page for page in listed if page.startswith("docs/api/")] == [
        f"docs/api/{name}" for name in ("index", *pages.API)]
    sources = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "chapters").glob("*.*")
               if path.suffix in {".ipynb", ".md"}}
    assert {page for page in listed if not page.startswith("docs/api/")} == sources
    toc = {"root": "a", "parts": [{"chapters": [{"file": "b", "sections": [{"file": "c"}]}, {"file": "d"}]}]}
    assert builder.toc_files(toc) == ["a", "b", "c", "d"]


def test_chapters_that_train_run_first(tmp_path: Path) -> None:
    for name, source in (("a", "open_lesson(data)"), ("b", 'open_lesson(data, trains="mil1")'), ("c", "1"),
                         ("d", 'open_lesson(data, trains="segmenter")')):
        nbformat.write(new_notebook(cells=[new_code_cell(source)]), tmp_path / f"{name}.ipynb")
    assert builder.training_first(["a", "b", "c", "d"], tmp_path) == ["b", "d", "a", "c"]
    order = [name[9:11] for name in builder.training_first(CHAPTERS, ROOT)]
    assert order[:6] == ["02", "03", "04", "05", "06", "07"]


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


def test_pages_are_mended_and_thebe_goes() -> None:
    page = ('<script src="a.js"></script><script>const THEBE_JS_URL = "x"; const y = 1</script>'
            '<script async="async" src="../_static/sphinx-thebe.js?v=1"></script><p>text</p>'
            '<div role="list" class="citation-list"><summary><span class="toctree-toggle">')
    assert pages.mended(page) == ('<script src="a.js"></script><p>text</p><div class="citation-list">'
                                  '<summary aria-label="pages below"><span class="toctree-toggle">')


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

    good = builder.run_chapter("good", source, tmp_path / "good.ipynb", tmp_path, {"profile": "full"})
    assert (good["error"], good["slowest_cell"], good["stderr_cells"]) == ("", "body", ["body"])
    assert good["slowest_seconds"] >= 0.5
    injected = nbformat.read(tmp_path / "good.ipynb", as_version=4).cells[1]
    assert {"injected-parameters", "remove-cell"} <= set(injected.metadata["tags"])

    bad = builder.run_chapter("bad", source, tmp_path / "bad.ipynb", tmp_path, {"profile": "quick"})
    assert "profile is quick" in bad["error"]
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


def test_tables_of_the_build_stand_where_pages_ask_for_them(tmp_path: Path) -> None:
    (tmp_path / "chapters").mkdir()
    nbformat.write(new_notebook(cells=[nbformat.v4.new_markdown_cell("# 1 · A title\n")]),
                   tmp_path / "chapters" / "01_a.ipynb")
    page = tmp_path / "chapters" / "status.md"
    page.write_text("before\n<!-- table: times -->\n<!-- table: unknown -->\n")
    run = {"chapter": "chapters/01_a", "seconds": 61.4, "slowest_seconds": 20.6, "slowest_cell": "train"}
    status = {"profile": "quick", "machine": "Linux", "date": "2026-01-01", "python": "3.12.1",
              "versions": {"torch": "2.11.0"}, "chapters": [run, {**run, "chapter": "chapters/gone"}]}
    tables = pages.status_tables(status, tmp_path)
    pages.fill_tables(tmp_path, tables)
    assert "| [1 · A title](01_a) | 61 | 21 | `train` |\n| **all** | **61** | | |" in page.read_text()
    assert page.read_text().endswith("(not measured yet)\n")
    assert "| torch | 2.11.0 |" in tables["versions"]


def test_pictures_become_files_and_spare_mathjax_goes(tmp_path: Path) -> None:
    (tmp_path / "chapters").mkdir()
    carrying = nbformat.v4.new_markdown_cell("![x](attachment:a.svg)", attachments={"a.svg": {"image/svg+xml": "eA=="}})
    citing = nbformat.v4.new_markdown_cell(
        "As known ([Otsu, 1979](https://doi.org/10.1/x)). "
        "[lungs](https://covidseg.github.io/covidseg/docs/api/data.scan.html)")
    bibliography = "@article{otsu, author = {Otsu, N.}, year = {1979}, doi = {10.1/x}}"
    (tmp_path / "chapters" / "references.bib").write_text(bibliography)
    claimed = new_code_cell("claim()", metadata={"tags": ["claim", "hide-input"]})
    nbformat.write(new_notebook(cells=[carrying, citing, claimed]), tmp_path / "chapters" / "a.ipynb")
    pages.localise(tmp_path)
    local = nbformat.read(tmp_path / "chapters" / "a.ipynb", as_version=4).cells
    assert [cell.source for cell in local[:2]] == [
        "![x](images/a.svg)", "As known {cite:p}`otsu`. [lungs](../docs/api/data.scan.md)"]
    assert local[2].metadata["tags"] == ["claim", "remove-input"]
    for name in ("tex-chtml.js", "tex-svg.js"):
        (tmp_path / name).write_text("")
    pages.trim_mathjax(tmp_path)
    assert not (tmp_path / "tex-svg.js").exists()
    assert (tmp_path / "tex-chtml.js").exists()


def test_status_keeps_what_was_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "STATUS", tmp_path / "status.json")
    for times, data, profile, kept in (([10, 20], "phantom", "quick", [10, 20]),
                                       ([None, 30], "phantom", "quick", [10, 30]),
                                       ([None, 40], "phantom", "full", [40]),
                                       ([None, 50], "medseg", "full", [50])):
        runs = [{"chapter": name, "seconds": time} for name, time in zip(CHAPTERS[:len(times)], times, strict=True)]
        builder.write_status([run for run in runs if run["seconds"]], data, profile)
        content = json.loads((tmp_path / "status.json").read_text())
        assert [run["seconds"] for run in content["chapters"]] == kept


# --- the built pages, as files -----------------------------------------------------------------------------------

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
    assert [page for page in toc_pages() if not (book / f"{page}.html").exists()] == [], "run `make book` again"
    assert toc_pages()[0] in (book / "index.html").read_text(encoding="utf-8")


    assert not (book.parent / "warnings.txt").exists()
    for page in toc_pages():
        assert "not a medical device" in (book / f"{page}.html").read_text(encoding="utf-8"), page


@pytest.mark.book
def test_pages_name_no_machine_path(book: Path) -> None:
    assert pages_with_paths(book, [*builder.private_folders(), "/home/"]) == []


def figures_missing(page: str, lines: Sequence[Line]) -> list[str]:
    """Systems of a comparison whose figures are not on a page: a row with the title and all five, in order."""
    text = html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))
    return [line.title for line in lines
            if " ".join([SYSTEMS[line.key].full_title, *(spread(column) for column in line.micro.T)]) not in text]


def recorded() -> list[Line]:
    return table_lines(read_records("table1-medseg9-on-100-full")["table1-medseg9-on-100-full"]["results"])


@pytest.mark.book
def test_results_page_shows_the_recorded_comparison(book: Path) -> None:
    page = (book / "chapters/10_results.html").read_text(encoding="utf-8")
    assert figures_missing(page, recorded()) == [], "run `make book` again"


def test_check_of_the_results_page_fires() -> None:
    lines = recorded()
    page = "".join(f"<tr><td>{SYSTEMS[line.key].full_title}</td>"
                   + "".join(f"<td>{spread(c)}</td>\n" for c in line.micro.T) + "</tr>" for line in lines)
    assert figures_missing(page, lines) == []
    ours = next(line for line in lines if line.key == "extended")
    assert figures_missing(page.replace(spread(ours.micro[:, 0]), "0.999 ± 0.001"), lines) == [ours.title]


def test_page_checks_fire(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text("saved in /home/someone/covidseg")
    assert pages_with_paths(tmp_path, ["/home/", "/elsewhere/"]) == ["a.html: /home/"]


def broken_links(root: Path) -> list[str]:
    """Links, pictures, styles and scripts of all pages that lead to nothing inside the book."""
    pages = {page: re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", page.read_text(encoding="utf-8"), flags=re.DOTALL)
             for page in root.rglob("*.html")  # what scripts write is no link yet
             if "_static" not in page.relative_to(root).parts}  # templates of the theme lie there
    anchors = {page: set(re.findall(r"""\s(?:id|name)=["']([^"']+)""", text)) for page, text in pages.items()}
    faults = []
    for page, text in pages.items():
        for target in re.findall(r"""<(?:a|img|link|script|source)\b[^>]*?\s(?:href|src)=["']([^"']+)""", text):
            link = html.unescape(target)
            if re.match(r"[a-z][a-z+.-]*:|//", link, re.IGNORECASE) or link in ("#", ""):
                continue
            path, _, anchor = link.partition("#")
            file = (page.parent / unquote(path.partition("?")[0])).resolve() if path else page
            if not file.exists() or (anchor and file in anchors and unquote(anchor) not in anchors[file]):
                faults.append(f"{page.relative_to(root)}: {link}")
    return sorted(set(faults))


@pytest.mark.book
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_chapter_opens_on_colab(book: Path, name: str) -> None:
    """The button leads to the source in the repository, which has no outputs."""
    page = (book / f"{name}.html").read_text(encoding="utf-8")
    assert f"https://colab.research.google.com/github/covidseg/covidseg/blob/main/{name}.ipynb" in page


@pytest.mark.book
def test_students_find_their_notebooks(book: Path) -> None:
    page = (book / "chapters/instructor.html").read_text(encoding="utf-8")
    link = re.search(r'href="([^"]+covidseg-students\.zip)"', page)
    assert link is not None
    with zipfile.ZipFile(book / "chapters" / link[1]) as packed:
        assert packed.namelist() == [f"{Path(name).name}.ipynb" for name in CHAPTERS]


def raw_tables(page: str) -> list[str]:
    """Tables that stand in a page as they were typed: their cell lacks ``markdown_format: gfm``."""
    return re.findall(r"<p>\|[^\n]*", page)


def test_a_chapter_that_does_not_exist_is_not_passed_over(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        builder.main(["--only", "06", "00,06"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "no chapter has '00,06' in its name" in said
    assert "chapters/06_curriculum" in said
    assert "--only 02 06" in said


@pytest.mark.book
@pytest.mark.parametrize("name", CHAPTERS)
def test_every_table_is_drawn(book: Path, name: str) -> None:
    assert raw_tables((book / f"{name}.html").read_text(encoding="utf-8")) == []


def test_the_check_of_tables_fires() -> None:
    assert raw_tables("<p>Three slices.</p>\n<p>| a | b |\n|—|–:|\n| c | d |</p>") == ["<p>| a | b |"]
    assert raw_tables("<table><tr><td>a | b</td></tr></table><p>a | b</p>") == []


def parts_above_their_whole(page: str) -> list[str]:
    """Shares such as ``44 of 5`` in what a page says: a number of a cell that another one has taken for its own."""
    text = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", text)))
    number = r"(\d+(?:,\d{3})*)"
    found = re.findall(rf"(?<![\d.,]){number} of (?:the |all )?{number}(?![\d.,]*\d| ?[x×%])", text)
    return [f"{part} of {whole}" for part, whole in found
            if int(part.replace(",", "")) > int(whole.replace(",", ""))]


@pytest.mark.book
@pytest.mark.parametrize("name", CHAPTERS)
def test_no_part_is_larger_than_its_whole(book: Path, name: str) -> None:
    assert parts_above_their_whole((book / f"{name}.html").read_text(encoding="utf-8")) == []


def test_the_check_of_parts_fires() -> None:
    said = "<p>44 of <b>5</b> lesions, 1,200 of the\n999, 3 of 4</p><script>'9 of 1'</script>"
    assert parts_above_their_whole(said) == ["44 of 5", "1,200 of 999"]
    assert parts_above_their_whole("<p>40 pixels of 512, 600 of 512 × 512, 7 of 8.5, 90 of 80 %, 2.9 of 1</p>") == []


@pytest.mark.book
def test_no_link_is_broken(book: Path) -> None:
    assert broken_links(book.resolve()) == []


def test_link_check_fires(tmp_path: Path) -> None:
    (tmp_path / "b.html").write_text('<h1 id="here">x</h1>')
    (tmp_path / "a.html").write_text('<a href="b.html#here"></a><a href="b.html#gone"></a><a href="c.html"></a>'
                                     '<img alt="" src="p.png?v=1"><a href="#"></a><a href="https://x.example/"></a>'
                                     '<script src="s.js">"<a href=$1>"; \'<a href="$2">\'</script>')
    assert broken_links(tmp_path) == ["a.html: b.html#gone", "a.html: c.html", "a.html: p.png?v=1",
                                      "a.html: s.js"]


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
    if (image.closest(".cell_output") && getComputedStyle(image).filter !== "none")
      faults.push(`grey levels are changed: ${name}`);
  }
  // On a phone a table may scroll, a formula may not.
  for (const part of document.querySelectorAll("article :is(div.math, mjx-container[display=true], table)")) {
    if (part.tagName === "TABLE" && width < 600) continue;
    for (let box = part; box.tagName !== "ARTICLE"; box = box.parentElement) {
      if (box.scrollWidth > box.clientWidth + 2 && getComputedStyle(box).display !== "inline") {
        faults.push(`cut off: ${part.textContent.trim().slice(0, 40)} (${box.scrollWidth} of ${box.clientWidth} px)`);
        break;
      }
    }
  }
  return faults;
}"""


# Code is thousands of coloured words: of each kind a few are looked at, the others become plain text.
FEW_WORDS_SCRIPT = """() => {
  const seen = {};
  for (const word of document.querySelectorAll(".highlight pre span[class]")) {
    seen[word.className] = (seen[word.className] || 0) + 1;
    if (seen[word.className] > 3) word.replaceWith(...word.childNodes);
  }
}"""


def access_faults(page: Any) -> list[str]:
    """What axe finds that hinders readers with a keyboard, a screen reader or weak eyes; thins the page's code out."""
    page.evaluate(FEW_WORDS_SCRIPT)
    # Without its preload, which fetches the stylesheets once more and may not, from a file; and without what passed.
    found = Axe().run(page, options={"preload": False, "resultTypes": ["violations"]}).response["violations"]
    return [f"{one['id']}: {one['help']} ({node['target'][0]})" for one in found
            if one["impact"] in ("serious", "critical") for node in one["nodes"]]


AT_ONCE = "*, ::before, ::after { transition: none !important; animation: none !important }"  # or colours fade
VIEWS = ((390, "dark"), (1280, "light"))  # a phone at night, a desk by day


def slider_faults(page: Any) -> list[str]:
    """Whether an arrow key moves the first slider or button that has the focus, and another picture comes."""
    box = page.locator(".covidseg-explorer").first
    slider, shown = box.locator("input[type=range], input:checked").first, box.locator("figure:visible img")
    before = shown.get_attribute("src")
    slider.focus()
    at_end = slider.get_attribute("max") == slider.input_value()
    page.keyboard.press("ArrowLeft" if at_end else "ArrowRight")
    if shown.count() != 1:
        return [f"{shown.count()} pictures of a slider at once"]
    return ["a slider that changes nothing"] if shown.get_attribute("src") == before else []


def turn(page: Any, scheme: str) -> None:
    """Day or night; the theme's script hears of it with the next picture, and sets the colours for the one after."""
    page.emulate_media(color_scheme=scheme)
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def page_faults(browser: Any, file: Path, *views: tuple[int, str], slider: bool = False) -> list[str]:
    """What goes wrong on a page, with no network.

    Args:
        views: widths in pixels and colour schemes; the page is opened in the first, and turned to the others.
        slider: whether there must be one that works.
    """
    page = browser.new_page(viewport={"width": views[0][0], "height": 900}, color_scheme=views[0][1])
    faults: list[str] = []

    def refuse(route: Any) -> None:
        faults.append(f"asks another host: {route.request.url}")
        route.abort()

    try:
        page.on("console", lambda message: faults.append(f"console: {message.text}")
                if message.type == "error" and "ERR_FAILED" not in message.text else None)
        page.on("pageerror", lambda error: faults.append(f"script: {error}"))
        page.route(lambda url: url.startswith("http"), refuse)
        page.goto(file.as_uri(), wait_until="load")
        page.evaluate(book_pdf.SETTLED_SCRIPT)
        page.add_style_tag(content=AT_ONCE)
        for width, scheme in views:
            page.set_viewport_size({"width": width, "height": 900})
            turn(page, scheme)
            faults += page.evaluate(FAULTS_SCRIPT) + access_faults(page)
        return faults + (slider_faults(page) if slider else [])
    finally:
        page.close()


@pytest.fixture
def blank(browser: Any) -> Iterator[Any]:
    """An empty page in the browser, at night."""
    page = browser.new_page(color_scheme="dark")
    yield page
    page.close()


@pytest.mark.book
@pytest.mark.parametrize("name", toc_pages())
def test_page_opens_without_faults(book: Path, browser: Any, name: str) -> None:
    file = book / f"{name}.html"
    assert file.exists(), "run `make book` again"
    assert page_faults(browser, file, *VIEWS, slider=name in CHAPTERS[1:] and "/a" not in name) == []


@pytest.mark.book
def test_pages_follow_the_colour_scheme(book: Path, blank: Any) -> None:
    """Or the second look would be at the colours of the first."""
    blank.goto((book / f"{CHAPTERS[1]}.html").as_uri())
    blank.add_style_tag(content=AT_ONCE)
    colours = []
    for scheme in ("dark", "light", "dark"):
        turn(blank, scheme)
        colours.append(blank.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours[0] == colours[2] != colours[1]


@pytest.mark.book
def test_search_finds_a_chapter(book: Path, blank: Any) -> None:
    blank.goto((book / "search.html").as_uri() + "?q=hounsfield")
    found = blank.locator("#search-results li a")
    found.first.wait_for(timeout=10_000)
    assert any("01_ct_and_weak_labels" in str(link.get_attribute("href")) for link in found.all())


@pytest.mark.book
def test_formulas_are_set_without_a_network(book: Path, blank: Any) -> None:
    blank.route(lambda url: url.startswith("http"), lambda route: route.abort())
    blank.goto((book / "chapters/02_lungs.html").as_uri())
    blank.locator("mjx-container").first.wait_for(timeout=10_000)
    assert blank.locator("mjx-merror").count() == 0


def test_browser_check_fires(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text('<body style="margin:0"><img src="gone.png"><div id="wide" style="width:700px">x</div>'
                    '<script src="https://outside.example/x.js"></script>'
                    '<script>console.error("loud"); undefinedFunction();</script></body>')
    faults = page_faults(browser, page, (390, "light"))
    for expected in ("console: loud", "undefinedFunction is not defined", "scrolls sideways: 700 of 390 px, div#wide",
                     "picture without description: gone.png", "broken picture: gone.png",
                     "asks another host: https://outside.example/x.js", "image-alt: ", "document-title: "):
        assert any(expected in fault for fault in faults), (expected, faults)
    assert "scrolls sideways" not in " ".join(page_faults(browser, page, (1280, "light")))


def test_check_of_what_is_cut_off_fires(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "wide.html"
    wide = '<div style="width:900px">x + y</div>'
    page.write_text('<html lang="en"><title>x</title><body><main><article><h1>x</h1>'
                    f'<div class="math" tabindex="0" style="overflow:auto; width:300px">{wide}</div>'
                    '<mjx-container display="true" tabindex="0" style="display:block; overflow:auto; width:300px">'
                    f'{wide}</mjx-container>'
                    '<div tabindex="0" style="overflow:auto; width:300px">'
                    f'<table><tr><td>{wide}</td></tr></table></div>'
                    '<div class="cell_output"><img alt="a slice" style="filter:brightness(.8)" '
                    'src="data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA="></div></article></main></body></html>')
    kinds = [fault.split(" (")[0].split(": data")[0] for fault in page_faults(browser, page, (1280, "light"))]
    assert kinds == ["grey levels are changed", *["cut off: x + y"] * 3]
    kinds = [fault.split(" (")[0].split(": data")[0] for fault in page_faults(browser, page, (390, "light"))]
    assert kinds == ["grey levels are changed", *["cut off: x + y"] * 2]


def test_contrast_is_checked_in_the_dark_too(browser: Any, tmp_path: Path) -> None:
    page = tmp_path / "grey.html"
    page.write_text('<html lang="en"><title>x</title><style>body{background:#fff;color:#222}'
                    "@media(prefers-color-scheme:dark){body{background:#222;color:#333}}</style>"
                    "<body><main><h1>x</h1><p>text</p></main></body></html>")
    assert page_faults(browser, page, (390, "light")) == []
    for views in ([(390, "dark")], [(390, "light"), (1280, "dark")]):
        assert any(fault.startswith("color-contrast") for fault in page_faults(browser, page, *views))


@pytest.mark.parametrize(("script", "said"), [
    ("", ["a slider that changes nothing"]), ("this.nextSibling.firstChild.src = 'b.png'", []),
    ("this.parentNode.append(this.nextSibling.cloneNode(true))", ["2 pictures of a slider at once"])])
def test_slider_check_fires(blank: Any, tmp_path: Path, script: str, said: list[str]) -> None:
    file = tmp_path / "page.html"
    file.write_text(f'<div class="covidseg-explorer"><input type="range" max="3" value="0" oninput="{script}">'
                    '<figure><img src="a.png" width="9" height="9"></figure></div>')
    blank.goto(file.as_uri())
    assert slider_faults(blank) == said
