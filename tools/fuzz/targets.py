"""Everything that reads files, by name, and how to change a file inside its format."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fuzz import scans, stored, tables

Change = Callable[[bytes], bytes]


@dataclass(frozen=True)
class Target:
    """Something that reads files.

    Attributes:
        what: What it reads, for the table.
        seeds: Makes small whole files to start from.
        run: Reads the bytes as such a file, in a folder that it may use as it likes, and checks what comes of it.
        change: Applies a change of bytes inside the format, so that what is around them still fits.
    """

    what: str
    seeds: Callable[[], list[bytes]]
    run: Callable[[bytes, Path], None]
    change: Callable[[bytes, Change], bytes] = lambda data, change: change(data)


def inside_gzip(data: bytes, change: Change) -> bytes:
    """Changes what is inside a gzip file, which is whole again afterwards."""
    try:
        return gzip.compress(change(gzip.decompress(data)), 1, mtime=0)
    except (OSError, EOFError, zlib.error):
        return change(data)


def inside_header(data: bytes, change: Change) -> bytes:
    """Changes the table at the head of a safetensors file, and corrects its length, the first eight bytes."""
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        return change(data)
    head = change(data[8:8 + length])
    return len(head).to_bytes(8, "little") + head + data[8 + length:]


TARGETS = {
    "nifti": Target("scans (.nii)", scans.nifti_seeds, scans.read_plain),
    "gzip": Target("scans (.nii.gz)", scans.gzip_seeds, scans.read_packed, inside_gzip),
    "labels": Target("label tables", tables.label_seeds, tables.read_labels),
    "splits": Target("splits", tables.split_seeds, tables.read_splits),
    "artifact": Target("stored stages", stored.array_seeds, stored.read_arrays, inside_header),
    "notes": Target("notes of stages", stored.note_seeds, stored.read_notes),
    "report": Target("reports of runs", stored.report_seeds, stored.read_reports),
    "parts": Target("reports of predictions", stored.part_seeds, stored.read_parts),
    "zip": Target("archives", stored.zip_seeds, stored.read_zip)}
