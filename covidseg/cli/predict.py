"""The commands ``covidseg lungs``, ``predict`` and ``merge``: masks of scans, one by one or in parts."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from covidseg import DISCLAIMER
from covidseg.cli.common import Device, Unchecked, as_fault, complain, say, state
from covidseg.data.folder import named
from covidseg.data.nifti import SUFFIXES, entries
from covidseg.data.scan import is_dicom, read_scan, scan_id, shown, write_like
from covidseg.errors import CovidsegError, InputFileError, SettingsError

Inputs = Annotated[list[Path], typer.Argument(
    help="CT scans: NIfTI files, folders of them, or folders of DICOM slices, each of which is one scan.")]
Out = Annotated[Path, typer.Option("-o", "--out", help="Folder, or a .nii.gz file for one scan.")]
Series = Annotated[str | None, typer.Option(
    help="Of a DICOM folder with several series: number in `covidseg data series`, UID or its last digits. "
         "Default: axial before others, original before derived, then most slices.")]
Volume = Annotated[bool | None, typer.Option(
    "--volume/--stack", help="Slices of one body in order, or unrelated slices. Default: measured.")]
Overwrite = Annotated[bool, typer.Option(
    "--overwrite", help="Also replace files that are there already, true masks or corrected ones among them.")]


def is_file(out: Path) -> bool:
    """Whether ``-o`` names one file, and not a folder."""
    return out.name.lower().endswith(SUFFIXES)


def targets_of(out: Path, sources: list[Path], beside: Sequence[str] = ()) -> dict[Path, Path]:
    """Where each result goes: ``out`` itself if it is named like a file, else ``out/NAME.nii.gz``.

    Args:
        out: file or folder.
        sources: the scans.
        beside: endings of what is written beside each result, as ``_probability.nii.gz``.

    Raises:
        SettingsError: a file that will be written is a scan, or is to be written twice.
    """
    if is_file(out) and len(sources) > 1:
        raise SettingsError("several inputs cannot be written to one file", path=out, remedy="Name a folder after -o")
    targets = {source: out if is_file(out) else out / f"{scan_id(source)}.nii.gz" for source in sources}
    scans, written = set(map(_real, sources)), dict[Path, Path]()
    for source, target in targets.items():
        if _among_slices(source, target):
            raise SettingsError("the result would lie among the slices", path=target,
                                remedy="Name a folder outside of the scan's after -o")
        for file in (target, *(target.with_name(f"{scan_id(target)}{ending}") for ending in beside)):
            if _real(file) in scans:
                raise SettingsError("the result would replace a scan", path=file, remedy="Name another folder after -o")
            if (other := written.setdefault(file, source)) is not source:
                names = " and ".join(dict.fromkeys(map(scan_id, (other, source))))
                raise SettingsError(f"several inputs are called {names}, their results would replace each other",
                                    path=file, remedy="Do them one by one, each with its own -o")
    return targets


def _among_slices(source: Path, target: Path) -> bool:
    """Whether a result would lie in a folder of DICOM slices, which then would hold two kinds of scans and be none."""
    if os.path.isdir(source):
        return _real(source) in _real(target).parents
    return os.path.exists(source) and not is_file(source) and _real(source.parent) == _real(target).parent \
        and any(is_dicom(path) for path in entries(source.parent) if path != source)


def _real(path: Path) -> Path:
    """Where a path leads. What cannot be followed stays as it is: that is said when the file is opened."""
    return Path(os.path.realpath(path))


def files_of(sources: list[Path]) -> list[Path]:
    """Files as given; folders stand for the NIfTI files in them, or for the DICOM series, if there is one."""
    files: list[Path] = []
    for source in sources:
        if os.path.isdir(source):  # Path.is_dir fails where a name is too long or a folder may not be searched
            from covidseg.data.dicom import inputs_in  # with SimpleITK, which files alone can do without

            folder = Path(named(source))
            try:
                files += inputs_in(folder)
            except InputFileError:  # said when it is read, like all that is wrong with one scan of many
                files.append(folder)
        else:
            files.append(source)
    return files


def each(files: list[Path], work: Callable[[Path], str]) -> CovidsegError | None:
    """Does ``work`` on each file; a bad file is reported and the rest go on. Returns the last error.

    A file is bad whatever the error is that it ends with: those that nobody expects are faults of one scan, too.
    """
    failed: CovidsegError | None = None
    for number, path in enumerate(files, start=1):
        try:
            done = work(path)
        except Exception as error:
            if state["debug"]:
                raise
            failed = as_fault(error, path)
            if len(files) > 1:  # a single one is reported when the program ends
                complain("error", str(failed))
        else:
            say(f"[{number}/{len(files)}] {path.name}: {done}")
    return failed


def warn(path: Path, warnings: Iterable[str]) -> None:
    """Prints what is odd about a scan."""
    for text in filter(None, warnings):
        complain("warning", f"{shown(path.name)}: {text}")


def end(failed: CovidsegError | None, files: list[Path]) -> None:
    """Ends with the exit code of an error, if there was one."""
    if failed is not None:
        raise failed if len(files) == 1 else typer.Exit(failed.exit_code)


def lungs(inputs: Inputs, out: Out, series: Series = None, volume: Volume = None,
          threshold_only: Annotated[bool, typer.Option(
              "--threshold-only", help="Without the lung net, which adds what disease hides.")] = False,
          unchecked: Unchecked = False, overwrite: Overwrite = False) -> None:
    """Writes lung masks: by threshold, completed by the lung net that comes with covidseg."""
    from covidseg.batch import refuse_to_replace
    from covidseg.predict import lungs_of_scan, shipped_predictor

    files = files_of(inputs)
    targets = targets_of(out, files)
    if not overwrite:
        refuse_to_replace([target for target in targets.values() if os.path.exists(target)])
    find = lungs_of_scan if threshold_only else shipped_predictor().lungs

    def work(path: Path) -> str:
        scan = read_scan(path, series=series)
        found = find(scan, volume=volume, check=not unchecked, progress=True)
        write_like(found.masks, scan.grid, targets[path])
        warn(path, scan.warnings + found.warnings)
        return f"lung in {found.slices()} of {len(found.masks)} slices, wrote {targets[path]}"

    end(each(files, work), files)


def predict(inputs: Inputs, out: Out,
            run: Annotated[Path | None, typer.Option(
                help="Folder written by `covidseg train`. Default: the nets that come with covidseg.")] = None,
            series: Series = None, volume: Volume = None,
            threshold: Annotated[float | None, typer.Option(
                min=0.001, max=1.0, help="Lesion from this probability on. Default: as the run was made.")] = None,
            probability: Annotated[bool, typer.Option(
                "--probability", help="Also write NAME_probability.nii.gz.")] = False,
            preview: Annotated[bool, typer.Option(
                "--preview", help="Also write NAME_preview.html, a page to look at in a browser.")] = False,
            part: Annotated[str | None, typer.Option(
                help="i/n: of all scans, only part i of n, for several machines; see `covidseg merge`.")] = None,
            unchecked: Unchecked = False, overwrite: Overwrite = False, device: Device = "auto") -> None:
    """Writes lesion masks that lie on their scans voxel by voxel, and a table of what was found.

    A folder of DICOM slices is one scan, the first CT series of those that `covidseg data series` lists, or that of
    --series; its mask is NIfTI and has the folder's name.

    Scans that are done, by the same nets and with the same settings, are left as they are. Masks that predict itself
    made from the same scans are replaced if they are out of date; other files are not.
    """
    from covidseg.batch import PREVIEW, PROBABILITY, Part, PartRun, parse_part, write_table
    from covidseg.devices import pick_device
    from covidseg.predict import SHIPPED, load_predictor

    which = Part() if part is None else parse_part(part)
    if part is not None and is_file(out):
        raise SettingsError("parts cannot be written to one file", path=out, remedy="Name a folder after -o")
    beside = [ending for ending, wanted in ((PROBABILITY, probability), (PREVIEW, preview)) if wanted]
    targets = targets_of(out, files_of(inputs), beside)
    predictor = load_predictor(SHIPPED if run is None else run, pick_device(device))
    level = predictor.profile.segmenter.threshold if threshold is None else threshold
    work = PartRun(predictor, which, targets, None if is_file(out) else out, level, volume, probability,
                   not unchecked, series, preview, overwrite)

    def predicted(path: Path) -> str:
        row, before = work.predict(path, progress=True)
        warn(path, row["warnings"].split("; "))
        found = f"lung in {row['lung_slices']} and lesion in {row['lesion_slices']} of {row['slices']} slices"
        return f"{found}, {'as predicted before in' if before else 'wrote'} {targets[path]}"

    say(DISCLAIMER)
    failed = each(work.files, predicted)
    if part is None and not is_file(out):
        write_table(out, work.table())
    end(failed, work.files)


def merge(out: Annotated[Path, typer.Argument(help="Folder that all parts of `covidseg predict` wrote into.")],
          overwrite: Annotated[bool, typer.Option(
              "--overwrite", help="Also replace a predictions.csv of something else.")] = False) -> None:
    """Puts the tables of all parts together in one, predictions.csv; ends as predict does if scans have failed."""
    from covidseg.batch import exit_code_of
    from covidseg.batch import merge as merge_parts

    rows = merge_parts(out, overwrite)
    failed = [row for row in rows if row["status"] == "failed"]
    say(f"{len(rows)} scans{f', {len(failed)} of them failed' if failed else ''}, in {out / 'predictions.csv'}")
    if failed:
        raise typer.Exit(exit_code_of(failed[-1]))
