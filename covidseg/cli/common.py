"""What the modules of the command line share: options, the console, and what a recorded result says about itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from covidseg import DISCLAIMER

if TYPE_CHECKING:
    from covidseg.data.folder import Dataset
    from covidseg.pipeline import Run


console, errors = Console(), Console(stderr=True)
state = {"debug": False}  # whether errors are shown with their trace

Profile = Annotated[str, typer.Option(help="quick (minutes on a CPU) or full (for a GPU, or patience).")]
Method = Annotated[str, typer.Option(help="extended (lesions painted on lesion-free slices as well) or faithful "
                                          "(no painted lesion, as in the abstract).")]
Seed = Annotated[int, typer.Option(help="Seed of all stages.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="On a GPU, the same weights each time, if slower; "
                                                                     "a CPU gives them anyway.")]
Unchecked = Annotated[bool, typer.Option("--unchecked", help="Also take what does not look like chest CT.")]
Data = Annotated[str, typer.Option(help="A data folder, or a name from `covidseg data list`; `medseg` trains on "
                                        "medseg2 and measures on medseg1.")]
Test = Annotated[str | None, typer.Option(
    help="Folder or name to measure on; default: the test side of the set's own split.")]


# Names that stand for two sets, one to train on and one to measure on: MedSeg's second and first, as in Table 1.
PAIRS = {"medseg": ("medseg2", "medseg1")}


def sides(data: str, test: str | None) -> tuple[str, str | None]:
    """Training set and measured set; a name of :data:`PAIRS` stands for both, unless it is a folder."""
    if data in PAIRS and not Path(data).is_dir():
        first, second = PAIRS[data]
        return first, test or second
    return data, test


def measured_on(data: str, test: str | None) -> tuple[Dataset, str]:
    """What to measure on and its name: ``test``, or by default the test side of the split of ``data``.

    Volumes without a lesion mask are left out (most of MosMedData's), unless none has one, which is an error later on.
    """
    from covidseg.pipeline import open_data

    if test is None:
        return open_data(data, "test"), f"{Path(data).name} (test side)"
    found = open_data(test)
    masked = [case.id for case in found.cases if case.mask is not None]
    if not masked or len(masked) == len(found.cases):
        return found, Path(test).name
    console.print(f"{len(found.cases) - len(masked)} of {len(found.cases)} volumes of {Path(test).name} have no lesion "
                  "mask and are not measured", highlight=False)
    return found.subset(masked), Path(test).name


def recorded(command: str, testing: Dataset, tested: str, run: Run, start: float) -> dict[str, Any]:
    """What every recorded result says about how it was made; nothing that names the machine or a folder on it."""
    from covidseg.profiles import profile_json
    from covidseg.store import environment, file_hash

    return {"note": DISCLAIMER, "command": command, "test": tested, "seconds": round(time.monotonic() - start, 1),
            "environment": environment(run.device), "settings": profile_json(run.profile),
            "data": {case.id: file_hash(case.image) for case in run.data.cases},
            "test_data": {path.name: file_hash(path) for case in testing.cases
                          for path in (case.image, case.mask) if path is not None}}
