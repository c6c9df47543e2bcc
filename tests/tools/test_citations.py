"""Citations are links in the notebooks and entries of the bibliography on the pages, and nothing is listed uncited."""

from __future__ import annotations

from pathlib import Path

import citations
import pytest
from pybtex.database import Entry

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"
ENTRIES = citations.read_bibliography(CHAPTERS / "references.bib")
BIB = """@article{one, author = {Otsu, Nobuyuki}, year = {1979}, doi = {10.1/a(1)b}}
@article{two, author = {van der Meer, A. and Li, B.}, year = {2020}, url = {https://x.example/two}}
@article{many, author = {A, A. and B, B. and C, C.}, year = {2021}, doi = {10.1/c}}
@misc{undated, author = {Wang, Yao}, url = {https://x.example/w}}"""


@pytest.fixture
def small(tmp_path: Path) -> dict[str, Entry]:
    (tmp_path / "a.bib").write_text(BIB)
    return citations.read_bibliography(tmp_path / "a.bib")


def test_roles_become_links_and_links_roles(small: dict[str, Entry]) -> None:
    text = "By {cite:p}`one,two` and {cite:p}`many`, see {cite:p}`undated`."
    links = citations.with_links(text, small)
    assert links == ("By ([Otsu, 1979](https://doi.org/10.1/a%281%29b); [van der Meer and Li, 2020]"
                     "(https://x.example/two)) and ([A et al., 2021](https://doi.org/10.1/c)), "
                     "see ([Wang](https://x.example/w)).")
    assert citations.with_roles(links, small) == text
    assert citations.cited(links, small) == citations.cited(text, small) == {"one", "two", "many", "undated"}
    other = "a link ([home](https://elsewhere.example)) that is no citation, f(x), [a](b.md)"
    assert citations.with_roles(other, small) == other
    assert citations.cited(other, small) == set()


def test_unknown_work(small: dict[str, Entry]) -> None:
    with pytest.raises(KeyError, match="nobody"):
        citations.with_links("{cite:p}`nobody`", small)


def test_every_work_can_be_found_and_is_cited() -> None:
    assert [key for key, entry in ENTRIES.items() if not citations.address(entry)] == []
    assert len({citations.address(entry) for entry in ENTRIES.values()}) == len(ENTRIES)
    texts = [path.read_text(encoding="utf-8") for path in CHAPTERS.glob("*.[im][pd]*")]
    assert set(ENTRIES) - set().union(*(citations.cited(text, ENTRIES) for text in texts)) == set()
