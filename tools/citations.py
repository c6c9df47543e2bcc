"""Citations: links in a notebook, which anybody can read anywhere, and entries of the bibliography in the book.

A chapter says ``([Otsu, 1979](https://doi.org/...))``. In the staged copy that becomes the role ``{cite:p}`otsu1979```,
so that the page leads to the list of references. What belongs together is found by the address in ``references.bib``.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from pybtex.database import Entry, parse_file

LINK = r"\[([^][]+)\]\((https?://[^\s]+?)\)"


def address(entry: Entry) -> str:
    """Where a work can be found: its DOI, or else its URL; empty if it has neither."""
    doi = entry.fields.get("doi", "")
    return f"https://doi.org/{doi}".replace("(", "%28").replace(")", "%29") if doi else entry.fields.get("url", "")


def label(entry: Entry) -> str:
    """Author and year, such as ``Zhang and Zhang, 2021``."""
    names = [" ".join([*person.prelast_names, *person.last_names]).replace("{", "").replace("}", "")
             for person in entry.persons["author"]]
    who = names[0] if len(names) == 1 else " and ".join(names) if len(names) == 2 else f"{names[0]} et al."
    return f"{who}, {entry.fields['year']}" if "year" in entry.fields else who


@cache
def read_bibliography(path: Path) -> dict[str, Entry]:
    """Entries of a ``.bib`` file by key; read once, though asked for by every chapter."""
    return dict(parse_file(str(path)).entries)


def with_links(text: str, entries: dict[str, Entry]) -> str:
    """Markdown whose roles ``{cite:p}`key``` have become links.

    Raises:
        KeyError: the bibliography has no such entry.
    """
    def links(found: re.Match[str]) -> str:
        works = [entries[key.strip()] for key in found[1].split(",")]
        return "(" + "; ".join(f"[{label(work)}]({address(work)})" for work in works) + ")"
    return re.sub(r"\{cite:p\}`([^`]+)`", links, text)


def with_roles(text: str, entries: dict[str, Entry]) -> str:
    """Markdown whose links to works of the bibliography, in parentheses, have become roles of the book."""
    keys = {address(entry): key for key, entry in entries.items()}

    def role(found: re.Match[str]) -> str:
        cited = [keys.get(url) for _, url in re.findall(LINK, found[0])]
        return found[0] if None in cited else "{cite:p}`" + ",".join(map(str, cited)) + "`"
    return re.sub(rf"\({LINK}(?:; {LINK})*\)", role, text)


def cited(text: str, entries: dict[str, Entry]) -> set[str]:
    """Keys of the works that a text links to, or names in a role."""
    keys = {address(entry): key for key, entry in entries.items()}
    roles = {key.strip() for found in re.findall(r"\{cite:\w+\}`([^`]+)`", text) for key in found.split(",")}
    return roles | {keys[url] for _, url in re.findall(LINK, text) if url in keys}
