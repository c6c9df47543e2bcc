"""What the modules of the command line share: options, and how they print.

What is printed is never taken for markup: names of files and patients may hold brackets and colons. Lines are not
broken here, so that a path can be copied or piped whole, and tables are only fitted to a terminal.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from textwrap import shorten
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from covidseg.data.nifti import unopened
from covidseg.errors import CovidsegError

_plain = partial(Console, highlight=False, markup=False, emoji=False)
console, errors = _plain(), _plain(stderr=True)
state = {"debug": False}  # whether errors are shown with their trace
COLOURS = {"error": "red", "warning": "yellow"}

LAST_SEED = 2 ** 32 - 1  # what NumPy and torch both take
Profile = Annotated[str, typer.Option(help="quick (minutes on a CPU) or full (for a GPU, or patience).")]
Method = Annotated[str, typer.Option(help="extended (lesions painted on lesion-free slices as well) or faithful "
                                          "(no lesion painted for classifier, patches and "
                                          "segmenter: the abstract has none).")]
Seed = Annotated[int, typer.Option(min=0, max=LAST_SEED, help="Seed of all stages.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Deterministic = Annotated[bool, typer.Option("--deterministic", help="On a GPU, the same weights each time, if slower; "
                                                                     "a CPU gives them anyway.")]
Unchecked = Annotated[bool, typer.Option("--unchecked", help="Also take what does not look like chest CT.")]


def say(text: str) -> None:
    """Prints a line, whatever its length and whatever it holds."""
    console.print(text, soft_wrap=True)


def show(table: Table) -> None:
    """Prints a table: fitted to a terminal, and whole where there is none, as in a file or a pipe."""
    (console if console.is_terminal else _plain(file=console.file, width=10_000)).print(table)


def complain(kind: str, text: str) -> None:
    """Prints an ``error`` or a ``warning`` as one line on the standard error stream."""
    errors.print(Text.assemble((f"{kind}:", COLOURS[kind]), " ", text), soft_wrap=True)


def as_fault(error: Exception, path: str | Path | None) -> CovidsegError:
    """Any error as one that a line can be printed of; covidseg's own stay as they are.

    Args:
        path: what was worked on, to be named.
    """
    if isinstance(error, CovidsegError):
        return error
    if isinstance(error, OSError):  # of reading: what cannot be written is an OutputError already
        return unopened(error, path)
    reason = shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...").rstrip(": ")
    return CovidsegError(f"stopped at an error that covidseg does not expect ({reason})", path=path,
                         remedy="Please report it with the trace that `covidseg --debug` shows")
