"""The book on paper: pages in order, bookmarks, folded parts opened, and plain words where it cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import book_pdf
import pytest
from pypdf import PdfReader

PAGE = ("<html lang=en><title>x</title><body><article><h1>{title}<a class=headerlink>#</a></h1><p>text of {title}</p>"
        "<details><summary>Solution</summary>folded {title}</details></article></body></html>")


def test_pages_become_one_file_in_order(tmp_path: Path, browser: Any) -> None:
    """With bookmarks, and with folded parts opened."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.html").write_text(PAGE.format(title=name.title()))
    target = tmp_path / "book.pdf"
    sheets = book_pdf.print_book(tmp_path, ["first", "second"], target, browser)
    reader = PdfReader(target)
    assert sheets == len(reader.pages) == 2
    assert [(item.title, reader.get_destination_page_number(item)) for item in reader.outline] == [
        ("First", 0), ("Second", 1)]
    assert "folded Second" in reader.pages[1].extract_text()
    assert not list(tmp_path.glob("*.part"))


def test_what_a_page_builds_late_is_printed(tmp_path: Path, browser: Any) -> None:
    """However slow the machine: a page is printed when it has stopped to change, not after a fixed time."""
    script = ("<script>let n = 0; (function more() { document.querySelector('p').append(` part ${++n}`);"
              " if (n < 5) setTimeout(more, 400) })()</script>")
    (tmp_path / "late.html").write_text(PAGE.format(title="Late") + script)
    target = tmp_path / "book.pdf"
    book_pdf.print_book(tmp_path, ["late"], target, browser)
    assert "part 5" in PdfReader(target).pages[0].extract_text()


@pytest.mark.weekly
def test_missing_things_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(book_pdf, "BUILD", tmp_path)
    monkeypatch.setattr(book_pdf, "chromium", lambda: None)
    assert book_pdf.main() == 1
    assert "install it" in capsys.readouterr().out
    monkeypatch.setattr(book_pdf, "chromium", lambda: "chromium")
    assert book_pdf.main() == 1
    assert "run `make book` first" in capsys.readouterr().out
    (tmp_path / "html").mkdir()
    (tmp_path / "html" / "index.html").write_text("")
    assert book_pdf.main() == 1
    assert "run `make book` again" in capsys.readouterr().out
