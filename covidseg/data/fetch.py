"""Downloads that can be trusted: https, resumable, with a checksum before anything is opened.

:func:`fetch` brings one file. What is half done lies in ``NAME.part`` and is continued by the next call (HTTP
``Range`` with ``If-Range``, RFC 9110), so a broken line costs nothing but time.

A file whose publisher states no checksum is trusted at first use: its sha256 is kept in ``NAME.sha256`` beside it,
and every later download has to match. That notices a later change, but not a fault in the first download; the
archive's own CRCs are tested for that.

Opens zip archives that come from elsewhere: every CRC checked, nothing outside the folder, no zip bombs.
"""

from __future__ import annotations

import errno
import json
import re
import shutil
import stat
import struct
import time
import zipfile
import zlib
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from urllib.parse import urljoin

import pooch
import requests
from tqdm import tqdm

from covidseg.atomic import write_whole
from covidseg.data.registry import RemoteFile, check_address
from covidseg.errors import DownloadError, OutputError


@dataclass(frozen=True)
class DownloadSettings:
    """How patient a download is and how much it may bring.

    Attributes:
        retries: attempts in a row that bring nothing new before giving up, at least 1.
        backoff: seconds before the second attempt; doubled each time, at most ``longest_wait``.
        longest_wait: seconds.
        timeout: seconds without an answer that count as a broken line.
        chunk: bytes written at a time; as much may be lost when the line breaks.
        spare: bytes to leave free on the disk.
        max_bytes: a file that neither the register nor the server gives a size for may not grow beyond this.
    """

    retries: int = 5
    backoff: float = 1.0
    longest_wait: float = 60.0
    timeout: float = 30.0
    chunk: int = 1 << 16
    spare: int = 64 << 20
    max_bytes: int = 16 << 30


@dataclass(frozen=True)
class Fetched:
    """A file on disk that passed its check.

    Attributes:
        path: where it is.
        checked: what it was checked against: ``"published md5"``, ``"published sha256"``, ``"first download"``,
            or ``"nothing: this is the first download"``.
        new: whether it was downloaded just now.
    """

    path: Path
    checked: str
    new: bool


class _Again(Exception):
    """This attempt failed in a way that another may not."""


class _HttpsSession(requests.Session):
    """Follows redirects (figshare uses them), but never from https to an address without encryption."""

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        target = super().get_redirect_target(resp)
        if target:
            check_address(urljoin(resp.url, target))
        return target


def fetch(remote: RemoteFile, folder: str | Path, settings: DownloadSettings | None = None, *,
          progress: bool = True) -> Fetched:
    """Downloads one file into ``folder``, or checks the one that is there.

    Args:
        remote: address, name, size and checksum.
        folder: target folder, created if need be. Written are NAME, NAME.part, NAME.part.json and NAME.sha256.
        settings: patience and limits.
        progress: whether to show a progress bar on a terminal.

    Raises:
        DownloadError: no answer, a refusal, the wrong size or checksum, or a full disk.
        OutputError: the folder cannot be written.
    """
    settings = settings or DownloadSettings()
    check_address(remote.url)
    folder = Path(folder)
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    try:
        if target.is_file():
            return Fetched(target, _verify(target, remote), new=False)
        folder.mkdir(parents=True, exist_ok=True)
        _download(remote, part, settings, progress)
        try:
            checked = _verify(part, remote)
        except DownloadError:
            # Continuing a wrong file would only give another wrong file.
            part.unlink(missing_ok=True)
            _notes(part).unlink(missing_ok=True)
            raise
        part.replace(target)
        _notes(part).unlink(missing_ok=True)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError("the disk is full; what has arrived is kept", path=part,
                                remedy="Free some space and run the same command again: it continues") from error
        raise OutputError(f"cannot be written ({error.strerror or error})", path=target,
                          remedy="Check permissions, or choose another folder with --to") from error
    return Fetched(target, checked, new=True)


def _verify(path: Path, remote: RemoteFile) -> str:
    """Checks a complete file against its published or its remembered checksum; says which."""
    if remote.size and path.stat().st_size != remote.size:
        raise DownloadError(f"{remote.name} has {path.stat().st_size} bytes, expected {remote.size}", path=path,
                            remedy="Delete it if it is still there and download again")
    if remote.checksum:
        algorithm, expected = remote.checksum.split(":")
        _compare(path, remote.name, algorithm, expected, "published by its maker")
        return f"published {algorithm}"
    if remote.name.endswith(".zip"):
        check_zip(path)
    record = path.with_name(f"{remote.name}.sha256")
    if record.exists():
        expected = (record.read_text(encoding="utf-8").split() or [""])[0]
        _compare(path, remote.name, "sha256", expected, f"seen at the first download, in {record.name}")
        return "first download"
    # The layout of sha256sum, so that `sha256sum -c` understands it too.
    line = f"{pooch.file_hash(str(path), alg='sha256')}  {remote.name}\n"
    write_whole(record, lambda temporary: temporary.write_text(line, encoding="utf-8"))
    return "nothing: this is the first download"


def _compare(path: Path, name: str, algorithm: str, expected: str, origin: str) -> None:
    found = pooch.file_hash(str(path), alg=algorithm)
    if found != expected:
        raise DownloadError(f"{name} has the {algorithm} {found}, expected {expected} ({origin})", path=path,
                            remedy="Delete it if it is still there and download again; if that repeats, the file "
                                   "at its source has changed: do not use it")


def _notes(part: Path) -> Path:
    """What the server said about the file in ``part``: its address and its version mark."""
    return part.with_name(f"{part.name}.json")


def _download(remote: RemoteFile, part: Path, settings: DownloadSettings, progress: bool) -> None:
    """Brings ``part`` to completion, over as many attempts as bring something new."""
    failures, furthest = 0, part.stat().st_size if part.exists() else 0
    with _HttpsSession() as session:
        while True:
            try:
                _attempt(session, remote, part, settings, progress)
                return
            except requests.exceptions.SSLError as error:
                raise DownloadError(f"the server could not prove who it is ({error})", path=remote.url,
                                    remedy="Check the clock and the network; never switch the check off") from error
            except (_Again, requests.ConnectionError, requests.Timeout,
                    requests.exceptions.ChunkedEncodingError) as error:
                have = part.stat().st_size if part.exists() else 0
                failures = 0 if have > furthest else failures + 1
                furthest = max(furthest, have)
                if failures >= settings.retries:
                    raise DownloadError(f"broke off after {have} bytes and {failures} attempts ({error})",
                                        path=remote.url, remedy="Run the same command again later: it continues "
                                                                "where it stopped") from error
                time.sleep(min(settings.backoff * 2 ** failures, settings.longest_wait))
            except requests.RequestException as error:
                raise DownloadError(f"cannot be downloaded ({error})", path=remote.url,
                                    remedy="Check the connection and proxy settings") from error


def _attempt(session: requests.Session, remote: RemoteFile, part: Path, settings: DownloadSettings,
             progress: bool) -> None:
    """One request: continues ``part`` where it ends, or starts it anew if the server wants that."""
    have, mark = _resumable(remote, part)
    # Compressed transfer would make lengths and ranges speak of other bytes than the file's.
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-"} | ({"If-Range": mark} if mark else {})
    with session.get(remote.url, headers=headers, stream=True, timeout=settings.timeout) as answer:
        if answer.status_code == 416:
            # Nothing behind our last byte: complete, or longer than the file; the checksum decides the former.
            if have and answer.headers.get("Content-Range", "").endswith(f"/{have}"):
                return
            part.unlink(missing_ok=True)
            raise _Again("the partial file did not fit and was started anew")
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise _Again(f"the server answered {answer.status_code} {answer.reason}")
        start = 0
        if answer.status_code == 206:
            where = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", answer.headers.get("Content-Range", ""))
            if not where or int(where[1]) != have:
                part.unlink(missing_ok=True)
                raise _Again("the server sent another range than asked for")
            start = have
        elif answer.status_code != 200:
            raise DownloadError(f"the server answered {answer.status_code} {answer.reason}", path=remote.url,
                                remedy="The file may have moved: see the page that `covidseg data info` names")
        length = answer.headers.get("Content-Length", "")
        total = start + int(length) if length.isdigit() else None
        if remote.size and total is not None and total != remote.size:
            raise DownloadError(f"{remote.name} has {total} bytes at its source, expected {remote.size}",
                                path=remote.url, remedy="The file there is not the one covidseg knows: do not use it")
        free = shutil.disk_usage(part.parent).free
        if total is not None and free < total - start + settings.spare:
            raise DownloadError(f"{remote.name} needs {(total - start) >> 20} MB more, the disk has {free >> 20} MB "
                                "free", path=part.parent, remedy="Free some space or choose another folder with --to")
        _notes(part).write_text(json.dumps({"url": remote.url, "mark": _mark(answer)}), encoding="utf-8")
        _store(answer, remote, part, start, total, settings, progress)


def _store(answer: requests.Response, remote: RemoteFile, part: Path, start: int, total: int | None,
           settings: DownloadSettings, progress: bool) -> None:
    limit = remote.size or total or settings.max_bytes
    with part.open("ab" if start else "wb") as stream, \
            tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=remote.name,
                 disable=None if progress else True) as bar:  # None: a bar on terminals only
        done = start
        for chunk in answer.iter_content(settings.chunk):
            done += len(chunk)
            if done > limit:
                raise DownloadError(f"{remote.name} goes on after {limit} bytes", path=remote.url,
                                    remedy="The file there is not the one covidseg knows: do not use it")
            stream.write(chunk)
            bar.update(len(chunk))
    # The HTTP library notices this too, but not in every version that covidseg may be installed with.
    if total is not None and done != total:
        raise _Again(f"the line broke after {done} of {total} bytes")


def _mark(answer: requests.Response) -> str:
    """The version mark for If-Range: a strong ETag, else the date of the last change, else nothing."""
    tag = answer.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else answer.headers.get("Last-Modified", "")


def _resumable(remote: RemoteFile, part: Path) -> tuple[int, str]:
    """Bytes that can be kept of a partial file, and the version mark of the file they belong to."""
    if not part.exists():
        return 0, ""
    try:
        notes = json.loads(_notes(part).read_text(encoding="utf-8"))
        url, mark = str(notes["url"]), str(notes["mark"])
    except (OSError, ValueError, KeyError, TypeError):
        url, mark = "", ""
    # Without a version mark only a published checksum would notice two halves of different files.
    if url != remote.url or not (mark or remote.checksum):
        return 0, ""
    return part.stat().st_size, mark


# --- archives -------------------------------------------------------------------------------------------------------

# What the zip reader raises on damaged, encrypted or exotic archives.
ZIP_FAULTS = (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error,
              zlib.error, LZMAError)


@dataclass(frozen=True)
class UnpackSettings:
    """How much an archive may hold. The ratio is not limited: an honest mask compresses a thousandfold.

    Attributes:
        max_bytes: bytes that an archive may unpack to; more is refused as a zip bomb.
        max_members: files and folders that an archive may hold.
    """

    max_bytes: int = 16 << 30
    max_members: int = 5000


def check_zip(path: str | Path) -> None:
    """Reads a zip archive to its end and compares every CRC; a trap is refused before it is read.

    Raises:
        DownloadError: it is not a zip archive, is damaged, or is one that :func:`unpack` would refuse.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _refuse_traps(Path(path), archive.infolist(), UnpackSettings())
            bad = archive.testzip()
    except (*ZIP_FAULTS, OSError) as error:
        raise DownloadError(f"is not a usable zip archive ({error})", path=path,
                            remedy="Delete it and download again") from error
    if bad is not None:
        raise DownloadError(f"is damaged: {bad} has a wrong CRC", path=path, remedy="Delete it and download again")


def unpack(archive: str | Path, folder: str | Path, settings: UnpackSettings | None = None) -> list[Path]:
    """Unpacks a zip archive into a folder, or refuses it as a whole before anything is written.

    Args:
        archive: the zip file.
        folder: where to; nothing is written outside.
        settings: limits on size and number of files.

    Returns:
        The files, in the archive's order.

    Raises:
        DownloadError: not a zip, damaged, encrypted, with paths or links that leave the folder, or a zip bomb.
        OutputError: the folder cannot be written.
    """
    settings = settings or UnpackSettings()
    archive, folder = Path(archive), Path(folder)
    written: list[Path] = []
    try:
        with zipfile.ZipFile(archive) as source:
            _refuse_traps(archive, source.infolist(), settings)
            members = [m for m in source.infolist() if not m.is_dir()]
            for member in members:
                target = folder.joinpath(*PurePosixPath(member.filename).parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                with source.open(member) as read, target.open("wb") as write:
                    # Reads no further than the size in the directory, which the limits were checked on, and
                    # compares the CRC there.
                    shutil.copyfileobj(read, write, 1 << 20)
                written.append(target)
    except ZIP_FAULTS as error:
        raise DownloadError(f"cannot be unpacked ({error})", path=archive,
                            remedy="Delete it and download again") from error
    except OSError as error:
        if error.errno in (None, errno.EINVAL):  # what bzip2 says of damage; a place before the file's start
            raise DownloadError(f"cannot be unpacked ({error})", path=archive,
                                remedy="Delete it and download again") from error
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder,
                          remedy="Check free space and permissions, or choose another folder with --to") from error
    return written


def _refuse_traps(archive: Path, members: list[zipfile.ZipInfo], settings: UnpackSettings) -> None:
    """Looks through the archive's directory for anything that an archive of scans has no reason to hold."""
    def refuse(fault: str) -> DownloadError:
        return DownloadError(fault, path=archive, remedy="Do not use this archive: it is damaged or made to do harm")

    total, seen = 0, set()
    for member in members:
        name = member.filename
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name:
            raise refuse(f"holds a path that leaves its folder: {name!r}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise refuse(f"holds a link: {name!r}")
        if name.casefold() in seen:
            raise refuse(f"holds the path {name!r} twice")
        seen.add(name.casefold())
        total += member.file_size
    if len(members) > settings.max_members:
        raise refuse(f"holds {len(members)} files, more than {settings.max_members}")
    if total > settings.max_bytes:
        raise refuse(f"unpacks to {total >> 20} MB, more than {settings.max_bytes >> 20} MB (a zip bomb?)")
