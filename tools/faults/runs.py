"""Runs whose weights or report were damaged, edited, exchanged, or made by another version."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from covidseg.errors import ArtifactError, CovidsegError, InputFileError
from covidseg.predict import SHIPPED
from covidseg.profiles import REPORT
from covidseg.store import write_hash
from faults.pictures import good
from faults.supplies import Supplies
from faults.trial import Fault, Make

GROUP = "runs and weights"
PREDICT = "covidseg predict --run run scan.nii.gz -o out"
WEIGHTS = "segmenter.safetensors"


def copied(folder: Path, supplies: Supplies) -> Path:
    """A scan, and a run of one's own to spoil: that of the nets which come with covidseg."""
    good(folder, supplies)
    return Path(shutil.copytree(SHIPPED, folder / "run"))


def with_weights(change: Callable[[Path], object]) -> Make:
    """A run with other weights."""
    def make(folder: Path, supplies: Supplies) -> None:
        change(copied(folder, supplies) / "stages" / WEIGHTS)
    return make


def with_report(change: Callable[[Path], object]) -> Make:
    """A run with another report."""
    def make(folder: Path, supplies: Supplies) -> None:
        change(copied(folder, supplies) / REPORT)
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


def _fault(title: str, make: Make, *names: str, error: type[CovidsegError] = ArtifactError) -> Fault:
    return Fault(title, PREDICT, error, names, make)


FAULTS = [
    _fault("one bit of the weights is another", with_weights(flip), WEIGHTS),
    _fault("weights that are cut off", with_weights(cut), WEIGHTS),
    _fault("weights without their checksum", with_weights(no_checksum), WEIGHTS),
    _fault("weights of another net, with their checksum", with_weights(exchange), WEIGHTS),
    _fault("no weights", with_weights(Path.unlink), WEIGHTS),
    _fault("one bit of the report is another", with_report(flip), REPORT),
    _fault("a report that is cut off", with_report(cut), REPORT),
    _fault("a report that was edited by hand", with_report(edited), REPORT),
    _fault("a report without its checksum", with_report(no_checksum), REPORT),
    _fault("a run of a later version, with a setting that this one does not know",
           with_report(rewritten(lambda content: content["settings"].update(attention="wide"))), REPORT, "attention"),
    _fault("a run of an earlier version, which lacks a setting",
           with_report(rewritten(lambda content: content["settings"].pop("segmenter"))), REPORT, "segmenter"),
    _fault("a run of other nets, whose weights do not fit its settings",
           with_report(rewritten(lambda content: content["settings"]["segmenter"].update(channels=[4, 8]))), WEIGHTS),
    _fault("a report that is no report", with_report(rewritten(lambda content: content.pop("stages"))), REPORT),
    _fault("a folder that holds no run", lambda folder, supplies: copied(folder, supplies).joinpath(REPORT).unlink(),
           "run", error=InputFileError),
    Fault("weights that are damaged, to be shared", "covidseg export run -o nets", ArtifactError, (WEIGHTS,),
          with_weights(flip)),
]
