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
    """``browser`` is asked for only so that the test skips where there is none; the program starts its own."""
    for name in ("first", "second"):
        (tmp_path / f"{name}.html").write_text(PAGE.format(title=name.title()))
    title, content = book_pdf.print_page(browser, tmp_path / "second.html")
    assert title == "Second"
    assert content.startswith(b"%PDF")
    text = PdfReader(book_pdf.io.BytesIO(content)).pages[0].extract_text()
    assert "folded Second" in text


def test_book_is_put_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Playwright:
        def __enter__(self) -> Any:
            return self
        def __exit__(self, *_: object) -> None: ...
        chromium = type("T", (), {"launch": staticmethod(lambda **_: type("B", (), {"close": lambda _: None})())})()

    def printed(_browser: Any, file: Path) -> tuple[str, bytes]:
        writer, content = book_pdf.PdfWriter(), book_pdf.io.BytesIO()
        for _ in range(2 if file.stem == "b" else 1):
            writer.add_blank_page(100, 100)
        writer.write(content)
        return file.stem.upper(), content.getvalue()

    monkeypatch.setattr(book_pdf, "sync_playwright", Playwright)
    monkeypatch.setattr(book_pdf, "print_page", printed)
    target = tmp_path / "book.pdf"
    assert book_pdf.print_book(tmp_path, ["a", "b", "c"], target, "chromium") == 4
    reader = PdfReader(target)
    assert [(item.title, reader.get_destination_page_number(item)) for item in reader.outline] == [
        ("A", 0), ("B", 1), ("C", 3)]
    assert not list(tmp_path.glob("*.part"))


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
