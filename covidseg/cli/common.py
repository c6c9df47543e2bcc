"""What the modules of the command line share: options and the console."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console, errors = Console(highlight=False), Console(highlight=False, stderr=True)
state = {"debug": False}  # whether errors are shown with their trace

Profile = Annotated[str, typer.Option(help="quick (minutes on a CPU) or full (for a GPU, or patience).")]
Method = Annotated[str, typer.Option(help="extended (lesions painted on lesion-free slices as well) or faithful "
                                          "(no painted lesion, as in the abstract).")]
Seed = Annotated[int, typer.Option(help="Seed of all stages.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="On a GPU, the same weights each time, if slower; "
                                                                     "a CPU gives them anyway.")]
Unchecked = Annotated[bool, typer.Option("--unchecked", help="Also take what does not look like chest CT.")]
