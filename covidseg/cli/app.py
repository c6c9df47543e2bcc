"""The command ``covidseg``. Every fault ends with one line and a documented exit code; ``--debug`` shows the trace."""

from __future__ import annotations

import io
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from covidseg import DISCLAIMER, __version__
from covidseg.cli import measure, predict
from covidseg.cli.common import (
    Deterministic,
    Device,
    Method,
    Profile,
    Seed,
    Unchecked,
    complain,
    console,
    say,
    state,
)
from covidseg.cli.data import app as data_app
from covidseg.errors import CovidsegError, SettingsError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help=f"COVID-19 lesions in chest CT from slice labels alone.\n\n{DISCLAIMER}")
app.add_typer(data_app, name="data", help="Data sets: what there is, licences, download, check.")
for command, name in ((predict.lungs, "lungs"), (predict.predict, "predict"), (predict.merge, "merge"),
                      (measure.evaluate, "evaluate"), (measure.verdicts, "verdicts"), (measure.reproduce, "reproduce"),
                      (measure.ablate_command, "ablate")):
    app.command(name)(command)

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]


def _version(wanted: bool) -> None:
    if wanted:
        say(f"covidseg {__version__}")
        raise typer.Exit


@app.callback()
def _options(context: typer.Context, debug: Debug = False,
             version: Annotated[bool, typer.Option("--version", help="Print the version and stop.",
                                                   callback=_version, is_eager=True)] = False) -> None:
    state["debug"] = debug
    # As covidseg.devices.several() has it, which takes seconds to import.
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand != "train":
        raise SettingsError(f"`{context.invoked_subcommand}` runs in one process, only `train` in several",
                            remedy="Start it without torchrun")


@app.command()
def train(data: Annotated[str, typer.Option(help="A data folder, or a name from `covidseg data list`.")],
          out: Annotated[Path, typer.Option(help="Folder of the run; a run that was stopped goes on there.")],
          profile: Profile = "quick", method: Method = "extended", seed: Seed = 0, device: Device = "auto",
          part: Annotated[str, typer.Option(help="all volumes, or one side of the set's split: train, test.")] = "all",
          deterministic: Deterministic = False, unchecked: Unchecked = False) -> None:
    """Trains all stages on slice labels. With several GPUs: torchrun --nproc-per-node 2 -m covidseg train ..."""
    from covidseg.data.folder import named
    from covidseg.devices import is_first, joined, pick_device, use_deterministic_kernels
    from covidseg.pipeline import open_run, write_run

    if deterministic:
        use_deterministic_kernels()
    data = named(data)
    with joined(pick_device(device)):
        console.quiet = not is_first()
        start = time.monotonic()
        run = open_run(data, profile, seed, out, None if part == "all" else part, device, method=method,
                       check=not unchecked, log=say)
        say(DISCLAIMER)
        taken = run.threshold().names  # also the first thing that training needs
        volumes = len({name.rsplit(":", 1)[0] for name in taken})
        say(f"training on {len(taken)} labelled slices of {volumes} volumes, profile {profile}, {method}, seed {seed}, "
            f"{run.device}")
        if left_out := run.data.labels() - len(taken):
            say(f"{left_out} more labelled slices are left out: they show no lung, or less than "
                f"{run.profile.prepare.least_lung:.0%} of the slice is lung")
        run.segmenter()
        write_run(run, f"covidseg train --data {Path(data).name} --profile {profile} --method {method} --seed {seed}"
                       f"{f' --part {part}' * (part != 'all')}{' --deterministic' * deterministic}"
                       f"{' --unchecked' * unchecked}")
        say(f"run finished in {time.monotonic() - start:.0f} s, in {out}")


@app.command("export")
def export_command(run: Annotated[Path, typer.Argument(help="Folder written by `covidseg train`.")],
                   out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the nets.")]) -> None:
    """Copies the nets of a run, without its training data, into a small folder to share: `predict --run` reads it."""
    from covidseg.predict import export_run

    files = export_run(run, out)
    size = sum(path.stat().st_size for path in files)
    say(f"{len(files)} files, {size / 1e6:.1f} MB, in {out}")


def main() -> None:
    """Entry point: turns covidseg's own errors, and those of files, into one line and their exit code."""
    # Threads that wait for each other sleep; spinning, they take the cores from whatever else runs, and everything gets
    # several times as slow. OpenMP reads this when torch is imported, which no module above does.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names of files that are no UTF-8; stderr does so anyway
    # A scheduler that wants the machine back ends programs so; what is half written is removed on the way out. Several
    # processes of one training are ended by torchrun, and waiting for each other would keep them alive.
    if os.environ.get("WORLD_SIZE", "1") == "1" and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        if empty := [text for text in sys.argv[1:] if not text or re.fullmatch("--[a-z-]+=", text)]:
            # Path("") is the current folder, which nobody means who writes "$SCAN" and has not set it.
            raise SettingsError(f"an argument is empty: {empty[0] or repr('')}",
                                remedy="If it stands for a variable of the shell, set that first")
        app()
    except (CovidsegError, OSError) as error:
        if state["debug"]:
            raise
        fault = error if isinstance(error, CovidsegError) else CovidsegError(
            f"cannot be used ({error.strerror or error})", path=error.filename,
            remedy="Check its name, its permissions and the disk")
        complain("error", str(fault))
        sys.exit(fault.exit_code)
