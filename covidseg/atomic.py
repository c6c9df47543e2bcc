"""Writing a file in one piece: whoever looks sees the old file or the whole new one, never half of it.

Temporary files lie beside what they become and are locked while they are written. A lock ends with its program, so
that what a killed program left behind is known, and removed when the next file is written in that folder. On some file
systems that hosts share, such as Lustre mounted with ``localflock`` and NFS with ``local_lock``, a host does not see
the locks of others: what another host makes is left alone for a day, locked or not.
"""

from __future__ import annotations

import os
import platform
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from covidseg.errors import CovidsegError, OutputError

try:
    import fcntl
except ModuleNotFoundError as error:
    raise CovidsegError("covidseg runs on Linux and macOS; this system has no file locks of their kind (module fcntl)",
                        remedy="On Windows install WSL (wsl --install), and covidseg inside it") from error

# A temporary name is the mark, the host and number of the program that writes, and a random end. It has nothing of the
# target's name, which may be as long as names can be. A host has no hyphen here, so that none is how another begins.
MARK = ".covidseg-"
HOST = re.sub(r"[^A-Za-z0-9]", "_", platform.node())[:64]
DAY = 24 * 60 * 60  # seconds; nothing takes nearly as long to write


def write_whole(path: Path, write: Callable[[Path], object], *, suffix: str = "") -> None:
    """Calls ``write`` with the temporary name of :func:`whole_file`; arguments and errors are the same."""
    with whole_file(path, suffix=suffix) as temporary:
        write(temporary)


@contextmanager
def whole_file(path: Path, *, suffix: str = "") -> Iterator[Path]:
    """A temporary file in the folder of ``path``, to be written inside the ``with`` block, then renamed to ``path``.

    Args:
        path: target; its folder is made if it is missing.
        suffix: ending of the temporary name, for libraries that go by it.

    Raises:
        OutputError: the file cannot be written; nothing is left behind, and an old file stays as it was.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, which lets only the owner read: the permissions of ordinary files can be asked for only by
        # changing them for the whole program, and another thread might make a file right then.
        with _temporary(path.parent, suffix=suffix) as temporary:
            yield temporary
            _flush(temporary)
            os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot be written ({getattr(error, 'strerror', None) or error})", path=path,
                          remedy="Check free space and permissions, or choose another folder") from error


@contextmanager
def work_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder in ``parent``, which is there already; it is removed at the end with what is left in it."""
    with _temporary(parent, folder=True) as folder:
        yield folder


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keeps other programs that ask for the same folder waiting; they go on when this one is done or dead.

    The folder is made if it is missing. One that cannot be made or locked keeps nobody waiting; what is wrong with it
    is said when something is written there. Where locks are those of a host, programs on other hosts do not wait.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(_held(os.open(folder, os.O_RDONLY))), fcntl.LOCK_EX)
        yield


@contextmanager
def _temporary(parent: Path, *, folder: bool = False, suffix: str = "") -> Iterator[Path]:
    """A new file or folder, locked until it is removed or renamed; what killed programs left is removed."""
    for other in parent.glob(f"{MARK}*"):
        with suppress(OSError):  # it is gone, somebody locks it, or it may not be touched
            _remove_left(other)
    path = parent / f"{MARK}{HOST}-{os.getpid()}-{secrets.token_hex(4)}{suffix}"
    try:
        with _held(_make_locked(path, folder)):
            yield path
    finally:
        _remove(path)


def _remove_left(other: Path) -> None:
    """Removes a temporary file or folder that nobody locks, if this host would know of a lock or it is a day old."""
    known = other.name.startswith(f"{MARK}{HOST}-")
    if known or time.time() - other.stat().st_mtime > DAY:
        with _held(os.open(other, os.O_RDONLY if other.is_dir() else os.O_RDWR)) as place:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(other)


def _make_locked(path: Path, folder: bool) -> int:
    """Makes a file or folder and locks it; what is returned holds the lock while it is open."""
    while True:
        if folder:
            path.mkdir()
        try:
            place = os.open(path, os.O_RDONLY if folder else os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if not folder:  # it was to be made here, so what is missing is its parent
                raise
            continue  # another program took it for a leftover before it was opened
        with suppress(OSError):  # a file system without locks: nobody can tell what is left over, and nobody removes it
            fcntl.flock(place, fcntl.LOCK_EX)
        if path.exists():
            return place
        os.close(place)  # another program took it for a leftover before it was locked


@contextmanager
def _held(place: int) -> Iterator[int]:
    """Closes what is open, and unlocks it also for a process that was forked meanwhile and has it open, too."""
    try:
        yield place
    finally:
        with suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)
        os.close(place)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Puts the bytes of a file on the disk, so that not even a power cut leaves its new name without them."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
