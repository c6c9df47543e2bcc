"""What tests of the readers share."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes files and folders as if this user might not open them; permissions do not bind an administrator."""
    def close(*paths: Path) -> None:
        for method in ("iterdir", "open"):
            def refuse(path: Path, *given: Any, plain: Any = getattr(Path, method), **named: Any) -> Any:
                if path in paths:
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return plain(path, *given, **named)
            monkeypatch.setattr(Path, method, refuse)
    return close
