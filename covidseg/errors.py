"""Typed errors: each names the thing at fault, what is wrong with it and what to do about it.

The command line prints one line for any :class:`CovidsegError` and ends with its ``exit_code``
(documented in the README), so that scripts can tell a broken file from a broken download.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any


class CovidsegError(Exception):
    """Base of every error that covidseg raises on purpose.

    Args:
        fault: what is wrong, as one sentence without a full stop.
        path: the file, folder or address concerned, if there is one.
        remedy: what the user can do, as one sentence without a full stop.
    """

    exit_code = 1

    def __init__(self, fault: str, *, path: str | Path | None = None, remedy: str = "") -> None:
        self.fault, self.path, self.remedy = fault, path, remedy
        where = f"{path}: " if path is not None else ""
        then = f". {remedy}." if remedy else "."
        super().__init__(f"{where}{fault}{then}")


class InputFileError(CovidsegError):
    """A scan or mask cannot be read or is not what it should be."""

    exit_code = 3


class DatasetError(CovidsegError):
    """A data folder, its label table or a split is incomplete or contradicts itself."""

    exit_code = 4


class DownloadError(CovidsegError):
    """A download broke off, was refused or does not have the published checksum."""

    exit_code = 5


class ArtifactError(CovidsegError):
    """A stored model, cached stage or run folder is damaged or belongs to another version."""

    exit_code = 6


class NoLungError(CovidsegError):
    """No lung was found where one is needed."""

    exit_code = 7


class OutputError(CovidsegError):
    """A result cannot be written."""

    exit_code = 8


class SettingsError(CovidsegError):
    """A setting is outside its range, or settings contradict each other."""

    exit_code = 9


class ProcessError(CovidsegError):
    """Another process of a training in several processes ended or does not answer."""

    exit_code = 10


class ScanWarning(UserWarning):
    """A scan could be used, but a person should look at what was made of it."""


def one_of(value: Any, known: Iterable[Any], what: str) -> None:
    """Checks a setting that names one of a few things.

    Args:
        what: kind of thing, in the singular.

    Raises:
        SettingsError: it is none of those that are known.
    """
    known = list(known)
    if value not in known:
        raise SettingsError(f"there is no {what} {value!r}", remedy=f"Choose one of {', '.join(map(str, known))}")
