"""Opens zip archives that come from elsewhere: every CRC checked, nothing outside the folder, no zip bombs."""

from __future__ import annotations

import errno
import shutil
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from lzma import LZMAError
from pathlib import Path, PurePosixPath

from covidseg.errors import DownloadError, OutputError

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
