"""The register of data sets: what exists, where it comes from, under which licence, and where it lies on disk.

The facts are in ``data/registry.toml``; this module reads and checks them and turns a name into a folder.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pooch

from covidseg.data.folder import load_dataset
from covidseg.errors import DatasetError, DownloadError

KINDS = ("download", "by-hand", "generated")
LAYOUTS = ("volumes", "stacks", "mosmed")
ROLES = ("image", "lung", "mask", "extra")
# Names a file may have: no path separators, no leading dot, nothing that a shell or file system reads otherwise.
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
CHECKSUM = re.compile(r"md5:[0-9a-f]{32}|sha256:[0-9a-f]{64}")
# Sets that records in results/ name and the chapters show: 8-bit pictures, of which the register has the originals.
RECORDED = {"medseg9": "medseg2", "medseg100": "medseg1"}
LOCAL = [("http", host) for host in ("localhost", "127.0.0.1", "::1")]


@dataclass(frozen=True)
class RemoteFile:
    """One file of a data set, as its publisher offers it."""

    name: str      # on disk
    url: str       # https
    checksum: str  # "md5:..." or "sha256:..." as published, empty where none has been
    size: int      # bytes, 0 where unknown
    role: str      # one of ROLES
    optional: bool = False  # whether it is fetched only on demand


@dataclass(frozen=True)
class Entry:
    """One data set of the register. Text is empty where there is none."""

    name: str    # as in `covidseg data get NAME`
    title: str
    kind: str    # one of KINDS
    layout: str  # one of LAYOUTS: how the published files lie
    doi: str
    page: str    # address of the publisher's page
    licence: str
    licence_file: str  # in data/licences, a summary of it
    megabytes: int     # rounded size of the download, 0 where there is none
    citation: str
    note: str    # what a user should know
    files: tuple[RemoteFile, ...] = ()
    same_patient: tuple[tuple[str, ...], ...] = ()  # groups of volumes that are scans of one patient

    def patient_of(self, volume: str) -> str:
        """The patient of a volume: the group's first volume, or the volume itself.

        >>> from covidseg.data.registry import entry
        >>> entry("medseg2").patient_of("3")
        '2'
        """
        return next((group[0] for group in self.same_patient if volume in group), volume)

    def licence_text(self) -> str:
        """Summary of the licence, with a link to its full text."""
        return (data_root() / "licences" / self.licence_file).read_text(encoding="utf-8").strip()


def data_root() -> Path:
    """Folder with the register, splits and licences: inside the installed package, or ``data/`` of a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "_data"
    return inside if inside.is_dir() else package.parent / "data"


def cache_root() -> Path:
    """Where data sets go unless told otherwise: ``$COVIDSEG_DATA``, or the user's cache folder."""
    chosen = os.environ.get("COVIDSEG_DATA")
    return expanded(chosen) if chosen else Path(pooch.os_cache("covidseg"))


def expanded(path: str | Path) -> Path:
    """A path with ``~`` replaced; unlike that of :class:`~pathlib.Path` it never fails, and leaves who is not known."""
    return Path(os.path.expanduser(path))


def home(name: str) -> Path:
    """Where a registered data set lies in the cache; the phantom's folder is another for other settings."""
    if entry(name).kind != "generated":
        return cache_root() / name
    from covidseg.data.phantom import mark  # here, so that looking up a name does not load the generator

    return cache_root() / f"{name}-{mark()}"


def load_registry(path: str | Path | None = None) -> dict[str, Entry]:
    """Reads and checks the register, by default the one that comes with covidseg.

    Raises:
        DatasetError: the file is missing, not TOML, lacks a field, or has an unsafe name, address or checksum.
    """
    path = Path(path) if path is not None else data_root() / "registry.toml"
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise DatasetError(f"the register of data sets cannot be read ({error})", path=path,
                           remedy="Install covidseg again") from error
    try:
        return {name: _entry(name, table) for name, table in tables.items()}
    except (ValueError, TypeError, DownloadError) as error:
        raise DatasetError(f"the register of data sets has a faulty entry: {error}", path=path,
                           remedy="Correct it") from error


def _entry(name: str, table: dict[str, Any]) -> Entry:
    """One table of the register, checked; every fault is a ValueError or TypeError."""
    _demand(bool(SAFE_NAME.fullmatch(name)) and isinstance(table, dict), f"'{name}' is not a usable name of a data set")
    table = dict(table)
    files = tuple(_remote(name, row) for row in table.pop("files", []))
    groups = tuple(tuple(str(v) for v in group) for group in table.pop("same_patient", []))
    odd = set(table) ^ ({f.name for f in fields(Entry)} - {"name", "files", "same_patient"})
    _demand(not odd, f"'{name}' lacks or does not know {', '.join(sorted(odd))}")
    item = Entry(name=name, files=files, same_patient=groups, **table)
    _demand(item.kind in KINDS and item.layout in LAYOUTS,
            f"'{name}' has kind '{item.kind}' and layout '{item.layout}', allowed are {', '.join(KINDS)} and "
            f"{', '.join(LAYOUTS)}")
    _demand((item.kind == "download") == bool(files), f"'{name}' is of kind '{item.kind}' and names {len(files)} files")
    _demand(SAFE_NAME.fullmatch(item.licence_file), f"'{name}' has an unsafe name of a licence file")
    return item


def _remote(name: str, row: dict[str, Any]) -> RemoteFile:
    item = RemoteFile(**row)
    _demand(SAFE_NAME.fullmatch(item.name), f"'{name}' names a file '{item.name}', which is not a plain file name")
    _demand(item.role in ROLES, f"{item.name} of '{name}' has the unknown role '{item.role}'")
    _demand(not item.checksum or CHECKSUM.fullmatch(item.checksum),
            f"{item.name} of '{name}' has a malformed checksum '{item.checksum}'")
    _demand(item.size >= 0, f"{item.name} of '{name}' has a negative size")
    check_address(item.url)
    return item


def _demand(met: object, fault: str) -> None:
    if not met:
        raise ValueError(fault)


def check_address(url: str) -> None:
    """Lets https pass, and http to this very computer (for tests); anything else is a DownloadError."""
    parts = urlsplit(url)
    if not parts.hostname or (parts.scheme != "https" and (parts.scheme, parts.hostname) not in LOCAL):
        raise DownloadError("is not an https address, so what arrives could have been changed on the way", path=url,
                            remedy="Use the https address of the publisher")


def entry(name: str) -> Entry:
    """The data set of that name; a DatasetError if there is none."""
    register = load_registry()
    if name not in register:
        raise DatasetError(f"there is no data set '{name}'", remedy=known_names(name))
    return register[name]


def known_names(name: str) -> str:
    """Which data sets there are, and which of them may have been meant by a name that is none."""
    known = list(load_registry())
    if name in RECORDED:
        return f"In recorded results it stands for pictures made from {RECORDED[name]}: name that. " \
               f"Known are {', '.join(known)}"
    near = get_close_matches(name.lower(), known, 1)
    return "".join(f"Did you mean {other}? " for other in near) + f"Known are {', '.join(known)}"


def is_present(folder: str | Path) -> bool:
    """Whether a folder holds a complete data set: scans and the label table, which is always written last."""
    try:
        load_dataset(folder)
    except DatasetError:
        return False
    return True


def resolve(name_or_dir: str | Path) -> Path:
    """Turns a name or a path into a data folder that :func:`covidseg.data.folder.load_dataset` reads.

    A registered name wins over a folder of the same name in the working directory (write ``./NAME`` for that).
    ``phantom`` is generated into the cache when it is not there yet.

    Raises:
        DatasetError: a known data set that has not been fetched, or neither a known name nor a folder.
    """
    register = load_registry()
    name = str(name_or_dir)
    if isinstance(name_or_dir, Path) or name not in register:
        folder = expanded(name_or_dir)
        if folder.is_dir():
            return folder
        raise DatasetError("is neither a data folder nor the name of a data set", path=name_or_dir,
                           remedy=known_names(name))
    folder = home(name)
    if register[name].kind == "generated":
        from covidseg.data.phantom import write_phantom

        return write_phantom(folder)  # makes it, or checks that the one that is there is whole
    if is_present(folder):
        return folder
    raise DatasetError(f"the data set '{name}' has not been fetched yet", path=folder,
                       remedy=f"Run `covidseg data get {name}`")
