"""Short quizzes at the end of the chapters; their questions are JSON files of the package, in jupyterquiz's format."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

from covidseg.errors import SettingsError, one_of

FOLDER = Path(__file__).parent / "quizzes"
# White text on these grounds has a contrast of at least 4.5 to 1; blue and vermilion as in the figures.
COLORS = {"--jq-multiple-choice-bg": "#1f4e79", "--jq-many-choice-bg": "#7a3d00", "--jq-numeric-bg": "#1f4e79",
          "--jq-incorrect-color": "#b3261e", "--jq-correct-color": "#00694a"}


def quizzes() -> dict[str, Path]:
    """The question files by name, such as ``02_lungs``."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"))}


def questions(name: str) -> list[dict[str, Any]]:
    """Questions of one chapter.

    Raises:
        SettingsError: there is no such quiz, or a question has no answer, no feedback or not the right answers.
    """
    one_of(name, quizzes(), "quiz")
    found: list[dict[str, Any]] = json.loads(quizzes()[name].read_text(encoding="utf-8"))
    for number, question in enumerate(found, start=1):
        if fault := _fault(question):
            raise SettingsError(f"question {number} {fault}", path=quizzes()[name], remedy="Correct the file")
    return found


def _fault(question: dict[str, Any]) -> str:
    """What is wrong with a question, empty if nothing is."""
    if question.get("type") not in ("multiple_choice", "many_choice"):
        return "must be of type multiple_choice or many_choice"
    answers = question.get("answers", [])
    if not question.get("question") or len(answers) < 2:
        return "needs a text and at least two answers"
    if not all(a.get("answer") and a.get("feedback") for a in answers):
        return "has an answer without text or feedback"
    right = sum(bool(a.get("correct")) for a in answers)
    if right == 0 or (question["type"] == "multiple_choice" and right > 1):
        return f"has {right} right answers"
    return ""


def as_text(found: list[dict[str, Any]]) -> str:
    """The questions as HTML with folded answers, for readers without JavaScript and for paper."""
    items = []
    for question in found:
        answers = "".join(f"<li>{html.escape(a['answer'])}</li>" for a in question["answers"])
        right = "; ".join(f"{html.escape(a['answer'])}: {html.escape(a['feedback'])}"
                          for a in question["answers"] if a.get("correct"))
        items.append(f"<li>{html.escape(question['question'])}<ul>{answers}</ul>"
                     f"<details><summary>Answer</summary>{right}</details></li>")
    return f"<ol>{''.join(items)}</ol>"


def quiz(name: str) -> None:
    """Shows the quiz of a chapter, such as ``02_lungs``: buttons that answer back, in notebooks and in the page.

    Raises:
        SettingsError: there is no such quiz.
    """
    from IPython.display import HTML, display
    from jupyterquiz import display_quiz

    found = questions(name)
    display_quiz(found, colors=COLORS, max_width=760)
    display(HTML(f"<noscript>{as_text(found)}</noscript>"
                 "<style>.quiz-on-paper{display:none}@media print{.quiz-on-paper{display:block}}</style>"
                 f'<div class="quiz-on-paper">{as_text(found)}</div>'))
