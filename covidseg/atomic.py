"""Writing a file in one piece: whoever looks sees the old file or the whole new one, never half of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from covidseg.errors import OutputError


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
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not mkstemp, which lets only the owner read: the permissions of ordinary files can be asked for only by
        # changing them for the whole program, and another thread might make a file right then.
        new = path.with_name(f".{path.name}-{secrets.token_hex(4)}{suffix}")
        new.touch(exist_ok=False)
        temporary = new
        yield temporary
        _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise OutputError(f"cannot be written ({getattr(error, 'strerror', None) or error})", path=path,
                          remedy="Check free space and permissions, or choose another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Puts the bytes of a file on the disk, so that not even a power cut leaves its new name without them."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())
