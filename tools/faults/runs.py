"""Runs whose weights or report were damaged, edited, exchanged, or made by another version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covidseg.errors import ArtifactError, InputFileError
from covidseg.predict import SHIPPED
from covidseg.profiles import REPORT
from covidseg.store import write_hash
from faults.supplies import Supplies, good
from faults.trial import Fault, Make

PREDICT = "covidseg predict --run run scan.nii.gz -o out"
WEIGHTS = "segmenter.safetensors"
PLACES = {WEIGHTS: Path("run", "stages", WEIGHTS), REPORT: Path("run", REPORT)}


def run_with(name: str, change: Callable[[Path], object]) -> Make:
    """A scan, and the run of the nets which come with covidseg, of which one file was changed."""
    def make(supplies: Supplies) -> None:
        good(supplies)
        shutil.copytree(SHIPPED, "run")
        change(PLACES[name])
    return make


def flip(path: Path) -> None:
    """One bit in the middle of a file is another."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def exchange(path: Path) -> None:
    """The weights of another net, with a checksum that fits them."""
    shutil.copy(path.with_name("lung_net.safetensors"), path)
    write_hash(path)


def no_checksum(path: Path) -> None:
    path.with_name(f"{path.name}.sha256").unlink()


def edited(path: Path) -> None:
    """Somebody wanted another threshold."""
    path.write_text(path.read_text(encoding="utf-8").replace('"threshold": 0', '"threshold": 1', 1), encoding="utf-8")


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A report that says something else, with a checksum that fits it."""
    def rewrite(path: Path) -> None:
        content = json.loads(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(json.dumps(content), encoding="utf-8")
        write_hash(path)
    return rewrite


def _fault(title: str, name: str, change: Callable[[Path], object]) -> Fault:
    return Fault(title, PREDICT, ArtifactError, (name,), run_with(name, change))


def _report(title: str, change: Callable[[dict[str, Any]], object], *named: str) -> Fault:
    return Fault(title, PREDICT, ArtifactError, named, run_with(REPORT, rewritten(change)))


FAULTS = [
    _fault("one bit of the weights is another", WEIGHTS, flip),
    _fault("weights that are cut off", WEIGHTS, cut),
    _fault("weights without their checksum", WEIGHTS, no_checksum),
    _fault("weights of another net, with their checksum", WEIGHTS, exchange),
    _fault("no weights", WEIGHTS, Path.unlink),
    _fault("one bit of the report is another", REPORT, flip),
    _fault("a report that is cut off", REPORT, cut),
    _fault("a report that was edited by hand", REPORT, edited),
    _fault("a report without its checksum", REPORT, no_checksum),
    _report("a run of a later version, with a setting that this one does not know",
            lambda content: content["settings"].update(attention="wide"), REPORT, "attention"),
    _report("a run of an earlier version, which lacks a setting",
            lambda content: content["settings"].pop("segmenter"), REPORT, "segmenter"),
    _report("a run of other nets, whose weights do not fit its settings",
            lambda content: content["settings"]["segmenter"].update(channels=[4, 8, 8]), WEIGHTS),
    _report("a report that is no report", lambda content: content.pop("stages"), REPORT),
    Fault("a folder that holds no run", PREDICT, InputFileError, ("run",), run_with(REPORT, Path.unlink)),
    Fault("weights that are damaged, to be shared", "covidseg export run -o nets", ArtifactError, (WEIGHTS,),
          run_with(WEIGHTS, flip)),
]
GROUPS = {"runs and weights": FAULTS}
