"""Downloads that can be trusted, and archives that are opened only when they are harmless.

Pooch brings a file over https and gives it its name only when it is complete. A file whose publisher states no checksum
is trusted at first use: its sha256 is kept in ``NAME.sha256`` beside it, and every later download has to match. That
notices a later change, but not a fault in the first download; the archive's own CRCs are tested for that.
"""

from __future__ import annotations

import errno
import json
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urljoin

import pooch
import requests
from tqdm import tqdm

from covidseg.atomic import write_whole
from covidseg.data.registry import RemoteFile, check_address
from covidseg.errors import DownloadError, OutputError

NOT_THE_FILE = "The file there is not the one covidseg knows: do not use it"


@dataclass(frozen=True)
class DownloadSettings:
    """How patient a download is and how much it may bring."""

    retries: int = 5            # attempts in a row that bring nothing new before it is given up, at least 1
    backoff: float = 1.0        # seconds before the second attempt; they double each time
    longest_wait: float = 60.0  # most seconds between two attempts
    timeout: float = 30.0       # seconds without an answer that count as a broken line
    chunk: int = 1 << 16        # bytes written at a time; as much may be lost when the line breaks
    spare: int = 64 << 20       # bytes to leave free on the disk
    max_bytes: int = 16 << 30   # of a file of which neither the register nor the server states the size


class Fetched(NamedTuple):
    """A file on disk that passed its check, what it was checked against, and whether it was downloaded just now."""

    path: Path
    checked: str
    new: bool


def fetch(remote: RemoteFile, folder: str | Path, settings: DownloadSettings | None = None) -> Fetched:
    """Downloads one file into a folder, or checks the one that is there.

    Args:
        remote: address, name, size and checksum of the file.
        folder: made if it is missing. Beside the file it holds NAME.sha256 where no checksum is published, and
            NAME.part and NAME.part.json while the download is unfinished.
        settings: patience and limits.

    Raises:
        DownloadError: no answer, a refusal, the wrong size or checksum, or a full disk.
        OutputError: the folder cannot be written.
    """
    check_address(remote.url)
    target = Path(folder) / remote.name
    new = not target.exists()
    downloader = ResumingDownloader(remote, target.parent, settings or DownloadSettings())
    pooch.get_logger().setLevel("WARNING")  # the command line says itself what was downloaded
    try:
        # No hash for pooch, which would replace a file that has changed on disk; the check refuses that.
        pooch.retrieve(remote.url, None, remote.name, target.parent.absolute(), downloader=downloader)
        return Fetched(target, check_file(target, remote), new)
    except DownloadError:
        if new:  # a file that was there before is not ours to delete
            target.unlink(missing_ok=True)
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError("the disk is full; what has arrived is kept", path=downloader.part,
                                remedy="Free some space and run the same command again: it continues") from error
        raise OutputError(f"cannot be written ({error.strerror or error})", path=target,
                          remedy="Check permissions, or choose another folder with --to") from error


def check_file(path: Path, remote: RemoteFile) -> str:
    """Checks a complete file against its published checksum, or that of its first download; says which of them."""
    if remote.size and path.stat().st_size != remote.size:
        raise DownloadError(f"{remote.name} has {path.stat().st_size} bytes, expected {remote.size}", path=path,
                            remedy="Delete it if it is still there and download again")
    algorithm, expected = "sha256", first_checksum(path)
    if remote.checksum:
        algorithm, expected = remote.checksum.split(":")
        origin, checked = "published by its maker", f"published {algorithm}"
    else:
        if remote.name.endswith(".zip"):
            check_zip(path)
        origin, checked = f"seen at the first download, in {path.name}.sha256", "first download"
    found = pooch.file_hash(str(path), alg=algorithm)
    if expected is None:
        # The layout of sha256sum, so that `sha256sum -c` understands it too.
        write_whole(path.with_name(f"{path.name}.sha256"),
                    lambda temporary: temporary.write_text(f"{found}  {remote.name}\n", "utf-8"))
        return "nothing: this is the first download"
    if found != expected:
        raise DownloadError(f"{remote.name} has the {algorithm} {found}, expected {expected} ({origin})", path=path,
                            remedy="Delete it if it is still there and download again; if that repeats, the file "
                                   "at its source has changed: do not use it")
    return checked


def first_checksum(path: Path) -> str | None:
    """The sha256 that a file had at its first download; None before it, empty if the record is."""
    record = path.with_name(f"{path.name}.sha256")
    return "".join(record.read_text(encoding="utf-8").split()[:1]) if record.exists() else None


# --- one download ---------------------------------------------------------------------------------------------------

class ResumingDownloader:
    """A downloader for pooch that goes on where an earlier one broke off (``Range`` and ``If-Range``, RFC 9110).

    The file grows in NAME.part; NAME.part.json notes address and version of the file that the part belongs to.
    """

    def __init__(self, remote: RemoteFile, folder: Path, settings: DownloadSettings) -> None:
        self.remote, self.settings = remote, settings
        self.part, self.notes = folder / f"{remote.name}.part", folder / f"{remote.name}.part.json"

    def __call__(self, url: str, output_file: str, _: object = None) -> None:
        """Brings the file, over as many attempts as bring something new, and moves it to ``output_file``."""
        failures, furthest = 0, self._kept()[0]
        while True:
            try:
                self._attempt()
                break
            except requests.exceptions.SSLError as error:
                raise DownloadError(f"the server could not prove who it is ({error})", path=url,
                                    remedy="Check the clock and the network; never switch the check off") from error
            except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
                have = self._kept()[0]
                failures, furthest = 0 if have > furthest else failures + 1, max(furthest, have)
                if failures >= self.settings.retries:
                    raise DownloadError(f"broke off after {have} bytes and {failures} attempts ({error})", path=url,
                                        remedy="Run the same command again later: it continues where it "
                                               "stopped") from error
                time.sleep(min(self.settings.backoff * 2 ** failures, self.settings.longest_wait))
            except requests.RequestException as error:
                raise DownloadError(f"cannot be downloaded ({error})", path=url,
                                    remedy="Check the connection and proxy settings") from error
        self.part.replace(output_file)
        self.notes.unlink(missing_ok=True)

    def _kept(self) -> tuple[int, str]:
        """Bytes of the part that can be kept, and the server's mark for the version of the file they belong to."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
            url, mark, size = notes["url"], str(notes["mark"]), self.part.stat().st_size
        except (OSError, ValueError, KeyError, TypeError):
            return 0, ""
        # Without a mark, only a published checksum would notice two halves of different files.
        return (size, mark) if size and url == self.remote.url and (mark or self.remote.checksum) else (0, "")

    def _attempt(self) -> None:
        """One request: goes on at the end of the part, or starts anew if the server wants that."""
        remote, (have, mark) = self.remote, self._kept()
        # Compressed transfer would make lengths and ranges speak of other bytes than the file's.
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-" if have else None, "If-Range": mark or None}
        with requests.get(remote.url, headers=headers, stream=True, timeout=self.settings.timeout,
                          hooks={"response": _stay_encrypted}) as answer:
            code, said = answer.status_code, answer.headers
            if code == 416 or (code == 206 and not said.get("Content-Range", "").startswith(f"bytes {have}-")):
                self.part.unlink(missing_ok=True)
                raise requests.ConnectionError("the server sent another range than asked for")
            if code in (408, 429) or code >= 500:
                raise requests.ConnectionError(f"the server answered {code} {answer.reason}")
            if code not in (200, 206):
                raise DownloadError(f"the server answered {code} {answer.reason}", path=remote.url,
                                    remedy="The file may have moved: see the page that `covidseg data info` names")
            done = have if code == 206 else 0
            total = done + int(said["Content-Length"]) if said.get("Content-Length", "").isdigit() else None
            if total is not None:
                self._refuse(total, total - done)
            tag = said.get("ETag", "W/")  # a weak one does not stand for the very bytes
            mark = said.get("Last-Modified", "") if tag.startswith("W/") else tag
            self.notes.write_text(json.dumps({"url": remote.url, "mark": mark}), encoding="utf-8")
            with self.part.open("ab" if done else "wb") as stream, \
                    tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=remote.name,
                         disable=None) as bar:  # None: a bar on terminals only
                for chunk in answer.iter_content(self.settings.chunk):
                    done += len(chunk)
                    if done > (limit := remote.size or total or self.settings.max_bytes):
                        raise DownloadError(f"{remote.name} goes on after {limit} bytes", path=remote.url,
                                            remedy=NOT_THE_FILE)
                    stream.write(chunk)
                    bar.update(len(chunk))
        # The HTTP library notices this too, but not in every version that covidseg may be installed with.
        if total is not None and done != total:
            raise requests.ConnectionError(f"the line broke after {done} of {total} bytes")

    def _refuse(self, total: int, missing: int) -> None:
        """Refuses a file of another size than the published one, or too large for the disk, before it is sent."""
        if self.remote.size not in (0, total):
            raise DownloadError(f"{self.remote.name} has {total} bytes at its source, expected {self.remote.size}",
                                path=self.remote.url, remedy=NOT_THE_FILE)
        free = shutil.disk_usage(self.part.parent).free
        if free < missing + self.settings.spare:
            raise DownloadError(
                f"{self.remote.name} needs {missing >> 20} MB more, the disk has {free >> 20} MB free",
                path=self.part.parent, remedy="Free some space or choose another folder with --to")


def _stay_encrypted(answer: requests.Response, **_: object) -> None:
    """Redirects are followed (figshare uses them), but never from https to an address without encryption."""
    if answer.is_redirect:
        check_address(urljoin(answer.url, answer.headers["Location"]))


# --- archives -------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class UnpackSettings:
    """How much an archive may hold. The ratio is not limited: an honest mask compresses a thousandfold."""

    max_bytes: int = 16 << 30  # that it may unpack to; more is refused as a zip bomb
    max_members: int = 5000    # files and folders


def check_zip(path: str | Path) -> None:
    """Reads a zip archive to its end and compares every CRC; refuses what :func:`unpack` would refuse."""
    with _open_zip(Path(path), UnpackSettings(), "is not a usable zip archive") as archive:
        bad = archive.testzip()
    if bad is not None:
        raise DownloadError(f"is damaged: {bad} has a wrong CRC", path=path, remedy="Delete it and download again")


def unpack(archive: str | Path, folder: str | Path, settings: UnpackSettings | None = None) -> list[Path]:
    """Unpacks a zip archive into a folder, or refuses it as a whole before anything is written; gives its files.

    Raises:
        DownloadError: not a zip, damaged, encrypted, with paths or links that leave the folder, or a zip bomb.
        OutputError: the folder cannot be written.
    """
    with writing_to(folder), _open_zip(Path(archive), settings or UnpackSettings(), "cannot be unpacked") as source:
        # Each file is read no further than the size in the archive's directory, which the limits were checked on.
        return [Path(source.extract(member, folder)) for member in source.infolist() if not member.is_dir()]


@contextmanager
def writing_to(folder: str | Path) -> Iterator[None]:
    """Turns what the disk refuses while a data folder is filled into an OutputError."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written ({error.strerror or error})", path=folder,
                          remedy="Check free space and permissions, or choose another folder with --to") from error


@contextmanager
def _open_zip(path: Path, settings: UnpackSettings, fault: str) -> Iterator[zipfile.ZipFile]:
    """Opens an archive that holds no trap; every way in which a damaged one fails becomes a DownloadError."""
    try:
        with zipfile.ZipFile(path) as archive:
            if trap := _trap(archive.infolist(), settings):
                raise DownloadError(trap, path=path,
                                    remedy="Do not use this archive: it is damaged or made to do harm")
            yield archive
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, OverflowError, struct.error,
            zlib.error, LZMAError, OSError) as error:
        # The disk's own errors are not the archive's fault. bzip2 reports damage as an OSError without a number, and a
        # directory that points before the start of the file is an invalid argument.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL, errno.ENOENT):
            raise
        raise DownloadError(f"{fault} ({error})", path=path, remedy="Delete it and download again") from error


def _trap(members: list[zipfile.ZipInfo], settings: UnpackSettings) -> str:
    """What an archive's directory says that an archive of scans has no reason to say; empty if there is nothing."""
    seen = set[str]()
    for name, mode in ((member.filename, member.external_attr >> 16) for member in members):
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in parts[0] or "\0" in name:
            return f"holds a path that leaves its folder: {name!r}"
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"holds a {'link' if stat.S_ISLNK(mode) else 'device'}: {name!r}"
        if name.casefold() in seen:
            return f"holds the path {name!r} twice"
        seen.add(name.casefold())
    if len(members) > settings.max_members:
        return f"holds {len(members)} files, more than {settings.max_members}"
    total = sum(member.file_size for member in members)
    too_large = f"unpacks to {total >> 20} MB, more than {settings.max_bytes >> 20} MB (a zip bomb?)"
    return too_large if total > settings.max_bytes else ""
