"""Quizzes: their files are sound, faults are found, and the page works without JavaScript."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from covidseg.book import quiz
from covidseg.errors import SettingsError

RIGHT = {"answer": "a <b>", "correct": True, "feedback": "because"}
WRONG = {"answer": "c", "correct": False, "feedback": "no"}


def question(*answers: dict[str, Any], kind: str = "multiple_choice") -> dict[str, Any]:
    return {"question": "Which?", "type": kind, "answers": list(answers)}


@pytest.mark.parametrize("name", quiz.quizzes())
def test_quiz_file_is_sound(name: str) -> None:
    found = quiz.questions(name)
    assert found
    assert len({q["question"] for q in found}) == len(found)
    assert "$" not in json.dumps(found)  # formulas would fetch MathJax from another host


@pytest.mark.parametrize("bad", [
    question(RIGHT), question(WRONG, WRONG), question(RIGHT, RIGHT), question(RIGHT, WRONG, kind="numeric"),
    question(RIGHT, {**WRONG, "feedback": ""}), {**question(RIGHT, WRONG), "question": ""}])
def test_faults_are_found(bad: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiz, "FOLDER", tmp_path)
    (tmp_path / "x.json").write_text(json.dumps([question(RIGHT, WRONG), bad]))
    with pytest.raises(SettingsError, match="question 2"):
        quiz.questions("x")
    (tmp_path / "x.json").write_text(json.dumps([question(RIGHT, WRONG), question(RIGHT, RIGHT, kind="many_choice")]))
    assert len(quiz.questions("x")) == 2


def test_unknown_quiz_is_refused() -> None:
    with pytest.raises(SettingsError, match="no quiz 'nothing'"):
        quiz.questions("nothing")


def test_text_names_answers_and_folds_the_right_one() -> None:
    text = quiz.as_text([question(WRONG, RIGHT)])
    assert "<li>c</li><li>a &lt;b&gt;</li>" in text
    assert "<summary>Answer</summary>a &lt;b&gt;: because</details>" in text


def test_quiz_answers_back_in_a_browser(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real output of a cell, put into a page as the book does, with no network."""
    shown: list[Any] = []
    monkeypatch.setattr("jupyterquiz.dynamic.display.display", shown.append)
    monkeypatch.setattr("IPython.display.display", shown.append)
    quiz.quiz("00_welcome")
    page_html = "".join(f"<script>{o.data}</script>" if type(o).__name__ == "Javascript" else o.data for o in shown)
    file = tmp_path / "quiz.html"
    file.write_text(f"<body>{page_html}</body>", encoding="utf-8")
    first = quiz.questions("00_welcome")[0]
    right = next(a for a in first["answers"] if a["correct"])
    page, asked = browser.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_timeout(1200)  # the quiz looks for MathJax after half a second
    page.get_by_text(right["answer"], exact=True).first.click()
    assert page.get_by_text(right["feedback"][:30]).first.is_visible()
    assert [url for url in asked if url.startswith("http")] == []
    plain = browser.new_context(java_script_enabled=False).new_page()
    plain.goto(file.as_uri())
    assert plain.locator("noscript ol > li, ol > li").first.is_visible()
