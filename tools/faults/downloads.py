"""Downloads that break off, are changed or are refused, and archives that are damaged or made to do harm."""

from __future__ import annotations

import hashlib
import io
import stat
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from covidseg.errors import CovidsegError, DownloadError, OutputError
from faults.disks import read_only
from faults.server import COMMAND, FILE, Page, publisher
from faults.supplies import Supplies, nothing
from faults.trial import During, Fault, Make


def archive(*names: str, sizes: int | None = None, mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """A zip archive of small files.

    Args:
        names: of its members.
        sizes: bytes that its directory claims for each member; by default the true number.
        mode: Unix mode of the members.
    """
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as made:
        for name in names:
            member = zipfile.ZipInfo(name, (2021, 1, 1, 0, 0, 0))
            member.external_attr = mode << 16
            made.writestr(member, b"a scan", method)
            if sizes is not None:
                member.file_size = sizes
    return stream.getvalue()


GOOD = archive("rp_im/1.nii.gz")
DAMAGED = GOOD[:40] + bytes([GOOD[40] ^ 1]) + GOOD[41:]
DOWNLOAD = Path("set", "downloads", FILE)


def md5(body: bytes) -> str:
    return f"md5:{hashlib.md5(body, usedforsecurity=False).hexdigest()}"


def serving(body: bytes | None, checksum: str = "", size: int = 0, **how: Any) -> During:
    """While the command runs, the publisher sends this, as the other arguments of :class:`Page` say."""
    return lambda: publisher(None if body is None else Page(body, **deepcopy(how)), checksum, size)


@contextmanager
def no_space() -> Iterator[None]:
    """The disk has a kilobyte left."""
    with publisher(Page(GOOD)), patch("shutil.disk_usage", lambda place: SimpleNamespace(free=1024)):
        yield


@contextmanager
def locked() -> Iterator[None]:
    """The folder that is to be filled lies on a read-only disk."""
    with publisher(Page(GOOD)), read_only():
        yield


def fetched_before(supplies: Supplies) -> None:
    """The checksum that was noted at the first download, of a file that was deleted since."""
    DOWNLOAD.parent.mkdir(parents=True)
    DOWNLOAD.with_name(f"{FILE}.sha256").write_text(f"{hashlib.sha256(GOOD).hexdigest()}  {FILE}\n")


def damaged_since(supplies: Supplies) -> None:
    """A file that was fetched and checked, and has another byte now."""
    fetched_before(supplies)
    DOWNLOAD.write_bytes(DAMAGED)


def _fault(title: str, during: During, *names: str, leaves: tuple[str, ...] = (), make: Make = nothing,
           error: type[CovidsegError] = DownloadError) -> Fault:
    return Fault(title, COMMAND, error, (FILE, *names), make, during, leaves=leaves)


FAULTS = [
    _fault("the line breaks again and again; what has come is kept, to go on from",
           serving(GOOD * 1000, drops=[20_000] * 9), leaves=(f"{DOWNLOAD}.part*",)),
    _fault("another checksum than the published one", serving(GOOD, md5(b"another file"))),
    _fault("another checksum than at the first download", serving(archive("rp_im/2.nii.gz")), make=fetched_before),
    _fault("damaged since it was downloaded", serving(GOOD), make=damaged_since),
    _fault("another size than the published one", serving(GOOD, size=len(GOOD) + 1)),
    _fault("the file has moved (404)", serving(None), "404"),
    _fault("sent on to an address without encryption",
           serving(b"", redirect="http://example.org/rp_im.zip"), "http://example.org"),
    _fault("a web page instead of an archive", serving(b"<html>Please log in.</html>")),
    _fault("an archive with one damaged byte", serving(DAMAGED)),
    _fault("an archive with a path that leaves its folder", serving(archive("../../evil.nii.gz")), "leaves"),
    _fault("the same, with the checksum of its publisher",
           serving(evil := archive("rp_im/../../evil.nii.gz"), md5(evil)), "leaves",
           leaves=(str(DOWNLOAD),)),
    _fault("an archive with a link", serving(archive("rp_im/1.nii.gz", mode=stat.S_IFLNK | 0o777)), "link"),
    _fault("a zip bomb of 20 GB", serving(archive(*"abcde", sizes=4 << 30)), "bomb"),
    _fault("an archive of six thousand files", serving(archive(*map(str, range(6000)), method=zipfile.ZIP_STORED)),
           "6000"),
    _fault("no room for the download", no_space, "disk"),
    _fault("a read-only disk for the download", locked, error=OutputError),
]
GROUPS = {"downloads and archives": FAULTS}
