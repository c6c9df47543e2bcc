"""Places that cannot be written: a full disk, a limit on file sizes, a read-only one, something in the way.

A full and a read-only disk are played where the program meets the system; the limit on file sizes is the system's own.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

from covidseg.errors import CovidsegError, OutputError, SettingsError
from covidseg.predict import SHIPPED
from faults.supplies import Supplies, good, nothing
from faults.trial import During, Fault, Make


@contextmanager
def full_disk() -> Iterator[None]:
    """The disk says that it is full when written bytes are to be put on it, as disks with a write cache do."""
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("os.fsync", full):
        yield


@contextmanager
def small_files(most: int = 1000) -> Iterator[None]:
    """The system lets this process write no file of more than some bytes, and breaks off in the middle of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only() -> Iterator[None]:
    """New files and folders are refused as a read-only disk does; permissions would not bind an administrator."""
    def refuse(path: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    opened, made = os.open, os.mkdir

    def refusing_open(path: Any, flags: int, *more: Any, **options: Any) -> int:
        if flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            refuse(path)
        return opened(path, flags, *more, **options)

    def refusing_mkdir(path: Any, *more: Any, **options: Any) -> None:
        if not os.path.isdir(path):
            refuse(path)
        made(path, *more, **options)

    with patch("os.open", refusing_open), patch("os.mkdir", refusing_mkdir):
        yield


def with_old_result(supplies: Supplies) -> None:
    """A result of an earlier day, which has to stay."""
    good(supplies)
    Path("out").mkdir()
    shutil.copy(supplies.phantom / "lung" / "phantom_02.nii.gz", "out/scan.nii.gz")


def in_the_way(supplies: Supplies) -> None:
    good(supplies)
    Path("out").write_text("a file where a folder should be")


def to_measure(supplies: Supplies) -> None:
    shutil.copy(supplies.truth(), "mask.nii.gz")


def shipped_nets(supplies: Supplies) -> None:
    shutil.copytree(SHIPPED, "nets")


def _fault(title: str, command: str, *names: str, make: Make = good, during: During = nullcontext,
           error: type[CovidsegError] = OutputError) -> Fault:
    return Fault(title, f"covidseg {command}", error, names, make, during)


FAULTS = [
    _fault("the disk is full; an older mask stays", "lungs scan.nii.gz -o out --overwrite",
           "out/scan.nii.gz", "No space left",
           make=with_old_result, during=full_disk),
    _fault("the disk is full", "predict scan.nii.gz -o mask.nii.gz", "mask.nii.gz", during=full_disk),
    _fault("the disk is full in the middle of training", "train --data data --out run", "run/stages",
           make=Supplies.data, during=full_disk),
    _fault("the disk is full when figures are to be written",
           "evaluate mask.nii.gz truth.nii.gz --json figures.json", "figures.json", make=to_measure, during=full_disk),
    _fault("the disk is full when nets are to be copied", "export nets -o copy", "copy", make=shipped_nets,
           during=full_disk),
    _fault("writing breaks off in the middle of a mask", "predict scan.nii.gz -o mask.nii.gz", "mask.nii.gz",
           during=lambda: small_files(500)),
    _fault("writing breaks off in the middle of a stage of training", "train --data data --out run", "run/stages",
           make=Supplies.data, during=small_files),
    _fault("a read-only disk; an older mask stays", "lungs scan.nii.gz -o out --overwrite",
           "out/scan.nii.gz", "Read-only",
           make=with_old_result, during=read_only),
    _fault("a read-only disk", "predict scan.nii.gz -o out", "out", "Read-only", during=read_only),
    _fault("a read-only disk to train on", "train --data data --out run", "run/stages", make=Supplies.data,
           during=read_only),
    _fault("a read-only disk for the phantom", "data get phantom --to phantom", "phantom", make=nothing,
           during=read_only),
    _fault("a file where a folder should be", "predict scan.nii.gz -o out", "out", make=in_the_way),
    _fault("the mask would replace its scan", "predict scan.nii.gz -o scan.nii.gz", "scan.nii.gz",
           error=SettingsError),
]
GROUPS = {"writing": FAULTS}
