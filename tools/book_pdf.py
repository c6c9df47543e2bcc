"""Prints the built book into one PDF, page by page through Chromium, with a bookmark for each page.

Takes ``_build/html`` and writes ``_build/covidseg-book.pdf``; needs Chromium (or ``COVIDSEG_CHROMIUM``).
"""

from __future__ import annotations

import io
import os
import re
import shutil
import sys
from pathlib import Path

import yaml
from build_book import BUILD, ROOT, toc_files
from playwright.sync_api import Browser, sync_playwright
from pypdf import PdfReader, PdfWriter

# What a reader on paper has no use for; the printed page also leaves out the theme's frame by itself.
PRINT_STYLE = """
@page { size: A4; margin: 16mm 15mm; }
@media print {
  .bd-header-announcement, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-header-article, .prev-next-footer,
  .bd-footer-content, .copybtn, .headerlink { display: none !important; }
  details > summary { list-style: none; }
  .cell, figure, table, .math { break-inside: avoid; }
  div.cell_input pre { font-size: 8pt; }
  h2, h3 { break-after: avoid; }
}
"""


# A page is ready when its formulas are set, its fonts are there and nothing was built for longer than a quiz waits
# before it sets its own formulas (half a second): on a slow machine all of that takes longer than any fixed time.
SETTLED_SCRIPT = """async () => {
  await window.MathJax?.startup?.promise;
  await document.fonts.ready;
  let changed = performance.now();
  new MutationObserver(() => { changed = performance.now(); })
    .observe(document, {subtree: true, childList: true, characterData: true});
  while (performance.now() - changed < 600) await new Promise(done => setTimeout(done, 50));
}"""


def chromium() -> str | None:
    """Path of the browser, None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return os.environ.get("COVIDSEG_CHROMIUM") or next((p for n in names if (p := shutil.which(n))), None)


def print_page(browser: Browser, file: Path) -> tuple[str, bytes]:
    """Title and PDF of one page; folded parts are opened, for nothing can be unfolded on paper."""
    page = browser.new_page()
    try:
        page.goto(file.as_uri(), wait_until="load")
        page.add_style_tag(content=PRINT_STYLE)
        page.evaluate("document.querySelectorAll('details').forEach(part => { part.open = true })")
        page.evaluate(SETTLED_SCRIPT)
        title = re.sub(r"\s*#$", "", page.locator("article h1, main h1").first.inner_text()).strip()
        return title, page.pdf(format="A4", scale=0.72, print_background=True, prefer_css_page_size=True)
    finally:
        page.close()


def print_book(html: Path, pages: list[str], target: Path, browser: Browser) -> int:
    """Prints pages of a built book into one file and returns how many sheets it has."""
    writer = PdfWriter()
    for name in pages:
        title, content = print_page(browser, html / f"{name}.html")
        first = len(writer.pages)
        writer.append(PdfReader(io.BytesIO(content)), import_outline=False)
        writer.add_outline_item(title=title, page_number=first)
    writer.add_metadata({"/Title": "covidseg: lesions from slice labels", "/Author": "The covidseg authors"})
    unfinished = target.with_name(target.name + ".part")
    with unfinished.open("wb") as stream:
        writer.write(stream)
    unfinished.replace(target)
    return len(writer.pages)


def main() -> int:
    """Command line of ``make pdf``; returns the exit status."""
    program = chromium()
    html = BUILD / "html"
    if program is None:
        print("pdf: no Chromium here: install it (Debian: apt install chromium), or name it in COVIDSEG_CHROMIUM")
        return 1
    if not (html / "index.html").exists():
        print("pdf: the book is not built: run `make book` first")
        return 1
    pages = toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))
    if missing := [page for page in pages if not (html / f"{page}.html").exists()]:
        print(f"pdf: the built book is older than _toc.yml ({missing[0]} is missing): run `make book` again")
        return 1
    target = BUILD / "covidseg-book.pdf"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        sheets = print_book(html, pages, target, browser)
        browser.close()
    print(f"pdf: {target.relative_to(ROOT)} is ready, {sheets} sheets, {target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
