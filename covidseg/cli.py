"""The command ``covidseg``. Every fault ends with one line and a documented exit code; ``--debug`` shows the trace."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from covidseg import DISCLAIMER, __version__, cli_measure
from covidseg.cli_common import Device, Method, Profile, Seed, console, errors
from covidseg.cli_data import app as data_app
from covidseg.errors import CovidsegError, InputFileError, NoLungError, SettingsError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help=f"COVID-19 lesions in chest CT from slice labels alone.\n\n{DISCLAIMER}")
app.add_typer(data_app, name="data", help="Data sets: what there is, licences, download, check.")
for command, name in ((cli_measure.evaluate, "evaluate"), (cli_measure.reproduce, "reproduce"),
                      (cli_measure.ablate_command, "ablate")):
    app.command(name)(command)

Debug = Annotated[bool, typer.Option("--debug", help="Show the whole trace of an error.")]
Volume = Annotated[bool | None, typer.Option(
    "--volume/--stack", help="Slices of one body in order, or unrelated slices. Default: measured.")]
_state = {"debug": False}


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"covidseg {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(context: typer.Context, debug: Debug = False,
             version: Annotated[bool, typer.Option("--version", help="Print the version and stop.",
                                                   callback=_version, is_eager=True)] = False) -> None:
    _state["debug"] = debug
    # As covidseg.distributed.several() has it, which takes seconds to import.
    if os.environ.get("WORLD_SIZE", "1") != "1" and context.invoked_subcommand != "train":
        raise SettingsError(f"`{context.invoked_subcommand}` runs in one process, only `train` in several",
                            remedy="Start it without torchrun")


def _targets(out: Path, sources: list[Path]) -> dict[Path, Path]:
    """Where each result goes: ``out`` itself if it is named like a file, else ``out/NAME.nii.gz``.

    Raises:
        SettingsError: a result would replace a scan, or two results would have the same name.
    """
    from covidseg.io import SUFFIXES, scan_id

    one_file = out.name.lower().endswith(SUFFIXES)
    if one_file and len(sources) > 1:
        raise SettingsError("several inputs cannot be written to one file", path=out, remedy="Name a folder after -o")
    targets = {source: out if one_file else out / f"{scan_id(source)}.nii.gz" for source in sources}
    scans = {source.resolve() for source in sources}
    for source, target in targets.items():
        if target.resolve() in scans:
            raise SettingsError("the result would replace the scan itself", path=target,
                                remedy="Name another folder after -o")
        if sum(other == target for other in targets.values()) > 1:
            raise SettingsError(f"several inputs are called {scan_id(source)}, their results would replace each other",
                                path=target, remedy="Do them one by one, each with its own -o")
    return targets


def _inputs(sources: list[Path]) -> list[Path]:
    """Files as given; folders stand for the NIfTI files in them."""
    from covidseg.io import SUFFIXES

    files: list[Path] = []
    for source in sources:
        inside = [p for p in sorted(source.iterdir()) if p.name.lower().endswith(SUFFIXES)] if source.is_dir() else []
        if source.is_dir() and not inside:
            raise InputFileError("holds no NIfTI files", path=source, remedy="Name .nii or .nii.gz files")
        files += inside or [source]
    return files


def _each(files: list[Path], work) -> None:  # type: ignore[no-untyped-def]
    """Does ``work`` on each file; a bad file is reported and the rest go on, the exit code says so."""
    failed: CovidsegError | None = None
    for number, path in enumerate(files, start=1):
        try:
            console.print(f"[{number}/{len(files)}] {path.name}: {work(path)}", highlight=False, markup=False,
                          soft_wrap=True)
        except CovidsegError as error:
            if len(files) == 1 or _state["debug"]:
                raise
            errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
            failed = error
    if failed is not None:
        raise typer.Exit(failed.exit_code)


@app.command()
def lungs(inputs: Annotated[list[Path], typer.Argument(help="CT scans (NIfTI) or folders of them.")],
          out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or a .nii.gz file for one scan.")],
          volume: Volume = None) -> None:
    """Writes threshold lung masks; no training needed."""
    from covidseg.io import read_scan, write_like
    from covidseg.lungs import lung_masks

    files = _inputs(inputs)
    targets = _targets(out, files)

    def work(path: Path) -> str:
        scan = read_scan(path)
        mask = lung_masks(scan.pixels, volume=volume)
        if not mask.any():
            raise NoLungError("no lung was found in any slice", path=path,
                              remedy="covidseg expects chest CT with air in the lungs darker than tissue")
        target = write_like(mask, scan.grid, targets[path])
        share = mask.mean(axis=(1, 2))
        return f"lung in {(share > 0).sum()} of {len(mask)} slices, wrote {target}"

    _each(files, work)


@app.command()
def train(data: Annotated[str, typer.Option(help="A data folder, or a name from `covidseg data list`.")],
          out: Annotated[Path, typer.Option(help="Folder of the run; a run that was stopped goes on there.")],
          profile: Profile = "quick", method: Method = "extended", seed: Seed = 0, device: Device = "auto",
          part: Annotated[str, typer.Option(help="all volumes, or one side of the set's split: train, test.")] = "all",
          ) -> None:
    """Trains all stages on slice labels. With several GPUs: torchrun --nproc-per-node 2 -m covidseg train ..."""
    from covidseg.distributed import is_first, joined
    from covidseg.train import pick_device

    with joined(pick_device(device)):
        console.quiet = not is_first()
        _train(data, out, profile, method, seed, device, None if part == "all" else part)


def _train(data: str, out: Path, profile: str, method: str, seed: int, device: str, part: str | None) -> None:
    from covidseg.pipeline import open_run
    from covidseg.report import write_run

    start = time.monotonic()
    run = open_run(data, profile, seed, out, part, device, method=method,
                   log=lambda line: console.print(line, highlight=False))
    console.print(f"{DISCLAIMER}\ntraining on {run.data.labels()} labelled slices of {len(run.data.cases)} volumes, "
                  f"profile {profile}, {method}, seed {seed}, {run.device}", highlight=False)
    run.segmenter()
    name = Path(data).name
    write_run(run, f"covidseg train --data {name} --profile {profile} --method {method} --seed {seed}")
    console.print(f"run finished in {time.monotonic() - start:.0f} s, in {out}", highlight=False)


@app.command()
def predict(inputs: Annotated[list[Path], typer.Argument(help="CT scans (NIfTI) or folders of them.")],
            out: Annotated[Path, typer.Option("-o", "--out", help="Folder, or a .nii.gz file for one scan.")],
            run: Annotated[Path | None, typer.Option(
                help="Folder written by `covidseg train`. Default: the nets that come with covidseg.")] = None,
            volume: Volume = None,
            threshold: Annotated[float | None, typer.Option(
                min=0.001, max=1.0, help="Lesion from this probability on. Default: as the run was made.")] = None,
            probability: Annotated[bool, typer.Option(
                "--probability", help="Also write NAME_probability.nii.gz.")] = False,
            device: Device = "auto") -> None:
    """Writes lesion masks that lie on their scans voxel by voxel."""
    from covidseg.io import read_scan, scan_id, write_like
    from covidseg.predict import SHIPPED, load_predictor
    from covidseg.train import pick_device

    files = _inputs(inputs)
    targets = _targets(out, files)
    predictor = load_predictor(SHIPPED if run is None else run, pick_device(device))
    level = predictor.profile.segmenter.threshold if threshold is None else threshold

    def work(path: Path) -> str:
        scan = read_scan(path)
        maps = predictor.probabilities(scan, volume)
        target = write_like(maps >= level, scan.grid, targets[path])
        if probability:
            write_like(maps, scan.grid, target.with_name(f"{scan_id(target)}_probability.nii.gz"))
        return f"lesion in {(maps >= level).any(axis=(1, 2)).sum()} of {len(maps)} slices, wrote {target}"

    console.print(DISCLAIMER)
    _each(files, work)


@app.command("export")
def export_command(run: Annotated[Path, typer.Argument(help="Folder written by `covidseg train`.")],
                   out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the nets.")]) -> None:
    """Copies the nets of a run, without its training data, into a small folder to share: `predict --run` reads it."""
    from covidseg.predict import export_run

    files = export_run(run, out)
    size = sum(path.stat().st_size for path in files)
    console.print(f"{len(files)} files, {size / 1e6:.1f} MB, in {out}", highlight=False)


def main() -> None:
    """Entry point: turns covidseg's own errors into one line and their exit code."""
    try:
        app()
    except CovidsegError as error:
        if _state["debug"]:
            raise
        errors.print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
