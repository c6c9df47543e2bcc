"""Places that cannot be written: a full disk, a limit on file sizes, a read-only one, something in the way.

A full and a read-only disk are played where the program meets the system; the limit on file sizes is the system's own.
"""

from __future__ import annotations

import errno
import os
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from covidseg.errors import OutputError, SettingsError
from covidseg.predict import SHIPPED
from faults.files import LOCK, nothing
from faults.pictures import good, truth
from faults.supplies import Supplies
from faults.trial import Fault

GROUP = "writing"


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """The disk says that it is full when written bytes are to be put on it, as disks with a write cache do."""
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with patch("os.fsync", full):
        yield


@contextmanager
def small_files(folder: Path, most: int = 1000) -> Iterator[None]:
    """The system lets this process write no file of more than some bytes, and breaks off in the middle of one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
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


def with_old_result(folder: Path, supplies: Supplies) -> None:
    """A result of an earlier day, which has to stay."""
    good(folder, supplies)
    (folder / "out").mkdir()
    shutil.copy(supplies.phantom / "lung" / "phantom_02.nii.gz", folder / "out" / "scan.nii.gz")


def in_the_way(folder: Path, supplies: Supplies) -> None:
    good(folder, supplies)
    (folder / "out").write_text("a file where a folder should be")


def to_train(folder: Path, supplies: Supplies) -> None:
    supplies.data(folder / "data")


def to_measure(folder: Path, supplies: Supplies) -> None:
    shutil.copy(truth(folder, supplies), folder / "mask.nii.gz")


FAULTS = [
    Fault("the disk is full; an older mask stays", "covidseg lungs scan.nii.gz -o out", OutputError,
          ("out/scan.nii.gz", "No space left"), with_old_result, full_disk),
    Fault("the disk is full", "covidseg predict scan.nii.gz -o mask.nii.gz", OutputError, ("mask.nii.gz",), good,
          full_disk),
    Fault("the disk is full in the middle of training", "covidseg train --data data --out run", OutputError,
          ("run/stages",), to_train, full_disk, leaves=LOCK),
    Fault("the disk is full when figures are to be written",
          "covidseg evaluate mask.nii.gz truth.nii.gz --json figures.json", OutputError, ("figures.json",), to_measure,
          full_disk),
    Fault("the disk is full when nets are to be copied", "covidseg export nets -o copy", OutputError, ("copy",),
          lambda folder, supplies: shutil.copytree(SHIPPED, folder / "nets"), full_disk),
    Fault("writing breaks off in the middle of a mask", "covidseg predict scan.nii.gz -o mask.nii.gz", OutputError,
          ("mask.nii.gz",), good, lambda folder: small_files(folder, 500)),
    Fault("writing breaks off in the middle of a stage of training", "covidseg train --data data --out run",
          OutputError, ("run/stages",), to_train, small_files, leaves=LOCK),
    Fault("a read-only disk; an older mask stays", "covidseg lungs scan.nii.gz -o out", OutputError,
          ("out/scan.nii.gz", "Read-only"), with_old_result, read_only),
    Fault("a read-only disk", "covidseg predict scan.nii.gz -o out", OutputError, ("out", "Read-only"), good,
          read_only),
    Fault("a read-only disk to train on", "covidseg train --data data --out run", OutputError, ("run/stages",),
          to_train, read_only),
    Fault("a read-only disk for the phantom", "covidseg data get phantom --to phantom", OutputError, ("phantom",),
          nothing, read_only),
    Fault("a file where a folder should be", "covidseg predict scan.nii.gz -o out", OutputError, ("out",), in_the_way),
    Fault("the mask would replace its scan", "covidseg predict scan.nii.gz -o scan.nii.gz", SettingsError,
          ("scan.nii.gz",), good),
]
