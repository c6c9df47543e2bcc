"""Targets: what a run stores (arrays, notes, reports) and archives. Checksums fit, or all would end there."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
import shutil
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from covidseg.batch import PART_COLUMNS, merge
from covidseg.data.fetch import UnpackSettings, check_zip, unpack
from covidseg.errors import CovidsegError
from covidseg.profiles import PROFILES, profile_json, read_report
from covidseg.store import Store, load_arrays

SMALL = UnpackSettings(max_bytes=1 << 16, max_members=20)


def with_hash(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    path.with_name(path.name + ".sha256").write_text(f"{hashlib.sha256(data).hexdigest()}  {path.name}\n")
    return path


def array_seeds() -> list[bytes]:
    """Stored stages: several types, no array, no notes."""
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(4, bool)}
    notes = {"notes": json.dumps({"seconds": 1.5, "names": ["x:0"]})}
    kinds = {kind: np.zeros(2, kind) for kind in ("f2", "f8", "i8", "u1", "u2")}
    return [save(arrays, notes), save(arrays), save({}, notes), save(kinds, notes)]


def read_arrays(data: bytes, folder: Path) -> None:
    """Reads a stage whose checksum fits."""
    arrays, notes = load_arrays(with_hash(folder / "stage.safetensors", data))
    assert all(isinstance(value, np.ndarray) for value in arrays.values()), "something else than an array"
    assert isinstance(notes, dict), "notes without names"


def note_seeds() -> list[bytes]:
    """Notes of stages, as JSON."""
    return [b'{"seconds": 1.5, "warnings": ["UserWarning: a"], "peak_memory_mb": {"process": 9.5}}', b"{}"]


def read_notes(data: bytes, folder: Path) -> None:
    """Reads the notes of a stage that is whole otherwise."""
    store = Store(folder)
    with_hash(store.path("stage", "key"), save({"a": np.zeros(2)}, {"notes": data.decode("utf-8", "replace")}))
    load_arrays(store.path("stage", "key"))
    assert isinstance(store.notes("stage", "key"), dict), "notes without names"
    assert math.isfinite(store.seconds("stage", "key")), "no time"


def report_seeds() -> list[bytes]:
    """Reports of runs of both profiles."""
    stages = {stage: f"{stage}-0123456789abcdef.safetensors" for stage in ("lung_net", "mil2", "segmenter")}
    return [json.dumps({"settings": profile_json(profile), "stages": stages, "seed": 0,
                        "data": {"a": "0" * 64}, "labelled_slices": 4}).encode() for profile in PROFILES.values()]


def read_reports(data: bytes, folder: Path) -> None:
    """Reads ``run.json``: settings have the types that they should have, stages lie in the run's own folder."""
    with_hash(folder / "run.json", data)
    content, profile, files = read_report(folder)
    assert isinstance(content, dict), "no report"
    _check_types(profile, PROFILES["full"])
    for file in files.values():
        assert isinstance(file, str), "a stage without a file"
        assert (folder / "stages" / file).parent == folder / "stages", "a stage outside the run"


def _check_types(value: Any, model: Any) -> None:
    """Whether settings are of the types of others, all the way down; numbers have to be finite."""
    if dataclasses.is_dataclass(model):
        for field in dataclasses.fields(model):
            _check_types(getattr(value, field.name), getattr(model, field.name))
    elif isinstance(model, tuple):
        assert isinstance(value, tuple), "no tuple"
        for one in value:
            _check_types(one, model[0])
    elif type(model) is float:
        assert type(value) in (int, float), "no number"
        assert math.isfinite(value), "no number"
    else:
        assert type(value) is type(model), f"{type(value).__name__} for {type(model).__name__}"


def part_seeds() -> list[bytes]:
    """Tables of a part of a prediction, with a scan that is done and one that failed, and with none."""
    cells = dict.fromkeys(PART_COLUMNS, "") | {"covidseg": "0.1.0", "nets": "0123456789abcdef", "threshold": "0.25",
                                             "volume": "None"}
    done = {"name": "a", "status": "done", "slices": "9", "lesion_slices": "2", "lesion_ml": "1.500",
            "scan_sha256": "0" * 64, "mask_sha256": hashlib.sha256(b"a mask").hexdigest()}
    failed = {"name": "b", "status": "failed", "error": "InputFileError", "fault": "is broken"}
    head = ",".join(PART_COLUMNS)
    return ["\n".join([head, *(",".join((cells | row).values()) for row in rows), ""]).encode()
            for rows in ([done, failed], [])]


def read_parts(data: bytes, folder: Path) -> None:
    """Puts the table of the only part into that of all scans."""
    (folder / "parts").mkdir(exist_ok=True)
    (folder / "parts/part-1-of-1.csv").write_bytes(data)
    (folder / "a.nii.gz").write_bytes(b"a mask")
    merge(folder)


def zip_seeds() -> list[bytes]:
    """Archives in all four kinds of compression, with folders and a remark."""
    seeds = []
    for kind in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", kind) as archive:
            archive.comment = b"a remark"
            for name, content in (("in/", b""), ("in/1.txt", b"one" * 20), ("é.txt", b"two")):
                archive.writestr(zipfile.ZipInfo(name, (2020, 1, 1, 0, 0, 0)), content, kind)
        seeds.append(stream.getvalue())
    return seeds


def read_zip(data: bytes, folder: Path) -> None:
    """Tests an archive and unpacks it; nothing may appear outside the folder named."""
    archive, out = folder / "in/archive.zip", folder / "out/here"
    shutil.rmtree(folder / "out", ignore_errors=True)
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(data)
    with suppress(CovidsegError):
        check_zip(archive)
    try:
        files = unpack(archive, out, SMALL)
    finally:
        assert not [path for path in (folder / "out").glob("*") if path != out], "files outside the folder"
    assert sum(path.stat().st_size for path in files) <= SMALL.max_bytes, "more than is allowed"
