"""Pages outside the book and typed numbers in it: they say what the records say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from covidseg.book.results import bench_markdown, read_records

ROOT = Path(__file__).resolve().parents[1]
BENCH = read_records("bench-cpu")["bench-cpu"]
FAULTS = read_records("faults")["faults"]["faults"]


def text_of(name: str) -> str:
    """A page with every run of white space as one space."""
    return re.sub(r"[ \n]+", " ", (ROOT / name).read_text(encoding="utf-8"))


def table_rows(name: str) -> set[str]:
    return {line for line in (ROOT / name).read_text(encoding="utf-8").splitlines() if line.startswith("|")}


def speed_rows() -> set[str]:
    """The lines of all tables that docs/speed.md has to show."""
    tables = [bench_markdown(BENCH, kind) for kind in ("comparisons", "limits", "roofline")]
    rows = {line for table in tables for line in table.splitlines()}
    values = {row["task"]: f"{row['value']:.2f}" for row in BENCH["sections"]["growth"]["limits"]}
    for name in BENCH["sections"]["growth"]["points"]:
        rows.add(f"| {name} | " + " | ".join(values[f"{name}: exponent of {what} in {kind}"]
                                            for what in ("time", "memory") for kind in ("slices", "pixels")) + " |")
    times = BENCH["sections"]["scaling"]["prediction"]
    return rows | {f"| {row['processes']} | {row['seconds']:.1f} |" for row in times}


def trust_rows() -> set[str]:
    """The lines of all tables that docs/trust.md has to show."""
    groups = {group: [row["met"] for row in FAULTS if row["group"] == group] for group in {r["group"] for r in FAULTS}}
    fuzz, mutants = read_records("fuzz")["fuzz"], read_records("mutants")["mutants"]
    return {*(f"| {group} | {len(met)} | {sum(met)} |" for group, met in groups.items()),
            *(f"| {one['what']} | {one['executions']:,} | {len(one['findings'])} |" for one in fuzz["targets"]),
            *(f"| `{name}` | {one['tried']} | {one['share']:.0%} |" for name, one in mutants["modules"].items())}


@pytest.mark.parametrize(("page", "wanted"), [("docs/speed.md", speed_rows()), ("docs/trust.md", trust_rows())])
def test_tables_are_those_of_the_records(page: str, wanted: set[str]) -> None:
    assert sorted(wanted - table_rows(page)) == [], "put these lines in place of the old ones"


def test_numbers_in_the_text_are_those_of_the_records() -> None:
    machine = BENCH["sections"]["training"]["machine"]
    speed = text_of("docs/speed.md")
    assert f"{machine['gigaflops']:.0f} billion multiplications" in speed
    assert f"{machine['gigabytes_per_second']:.0f} GB a second" in speed
    assert all(row["met"] for row in BENCH["sections"]["growth"]["limits"])
    assert f"tries {len(FAULTS)} faults" in text_of("docs/trust.md")


def test_times_on_the_page_of_real_data_are_those_of_the_records() -> None:
    def minutes(name: str) -> list[float]:
        content: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
        return [one["seconds"] / 60 for one in content["results"] if one["system"] == "extended"]

    page = text_of("chapters/a1_real_data.md")
    full, quick = minutes("table1-medseg9-today-full"), minutes("table1-phantom-quick")
    assert f"{min(full):.0f} to {max(full):.0f} minutes a seed (`table1-medseg9-today-full`)" in page
    assert round(quick[0]) == 4
    assert "four minutes (`table1-phantom-quick`" in page


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not re.match(r"https?://", link) and not (page.parent / link).exists()] == []


def headings(number: str) -> set[str]:
    """Headings of a chapter, without their Markdown."""
    path, = (ROOT / "chapters").glob(f"{int(number):02d}_*.ipynb")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    found = re.findall(r"^#+ (.*)$", "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    return {heading.replace("*", "") for heading in found}


def missing_headings(text: str) -> list[str]:
    """Parts of chapters that a text names, ``chapter 2, *How good is it?*``, and that are not there."""
    named = re.findall(r"chapter (\d+),(?: [a-z ]+)?((?:(?: and (?:the numbers under )?| )\*[^*]+\*)+)", text)
    return [f"{number}: {title}" for number, titles in named for title in re.findall(r"\*([^*]+)\*", titles)
            if title.rstrip(".;") not in headings(number)]


def test_check_of_named_headings_fires() -> None:
    text = "see chapter 7, *The segmenter*; chapter 7, the figure of *Nothing like it* and *Fusing*"
    assert missing_headings(text) == ["7: Nothing like it"]


@pytest.mark.parametrize("page", ["docs/slides.md", "chapters/instructor.md"])
def test_parts_of_chapters_that_a_page_names_are_there(page: str) -> None:
    text = text_of(page)
    assert len(re.findall(r"chapter \d+, [^.]*\*", text)) > 0
    assert missing_headings(text) == []


def slides_against_plan(slides: str, guide: str) -> list[str]:
    """What the slides of a workshop and the steps of its plan say differently."""
    pages = slides.split("\n---\n")[1:]  # after the settings at the top
    plan = guide[guide.index("## Plan A"):guide.index("## Plan B")]
    said, number = [], 0
    for step in re.findall(r"^\| \d+ \|.*\|$", plan, re.MULTILINE):
        ends = [int(n) for n in re.findall(r"\d+", step.rsplit("slide", 1)[1])] if "slide" in step else []
        named = set(re.findall(r"\d+", re.sub(r"slide.*", "", step.split("|")[3])))
        for k in range(ends[0], ends[-1] + 1) if ends else ():
            number += 1
            if k != number:
                said.append(f"slide {k} comes where {number} should")
            elif shown := {*re.findall(r"chapter (\d+)", pages[k - 1].split("*Show:*", 1)[-1])} - named - {"1"}:
                said.append(f"slide {k} shows chapter {', '.join(sorted(shown))}, its step does not")
    if [name for name in pages[number:] if "If there is time" not in name]:
        said.append("slides after the last step are not marked as spare")
    return said


def test_slides_follow_the_plan_of_the_workshop() -> None:
    slides, guide = ((ROOT / name).read_text(encoding="utf-8") for name in ("docs/slides.md", "chapters/instructor.md"))
    assert slides_against_plan(slides, guide) == []
    other = slides.replace("## Table 1", "## Table 1\n\n*Show:* chapter 4").replace("## If there is time", "## Last")
    assert len(slides_against_plan(other, guide.replace("slide 6", "slide 7"))) == 3
