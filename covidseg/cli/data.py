"""``covidseg data``: list, describe, fetch and check data sets."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Column, Table

from covidseg import DISCLAIMER
from covidseg.cli.common import Unchecked, show
from covidseg.data.check import FolderReport, check_folder, check_mosmed
from covidseg.data.fetch import first_checksum
from covidseg.data.layout import get_dataset, lay_out_mosmed
from covidseg.data.registry import Entry, cache_root, entry, expanded, home, is_present, load_registry
from covidseg.errors import DownloadError, InputFileError

app = typer.Typer(no_args_is_help=True, help="List, describe, fetch and check data sets.")

Name = Annotated[str, typer.Argument(metavar="NAME", help="Name of a data set, see `covidseg data list`.")]


@app.command("list")
def list_sets() -> None:
    """Show which data sets there are and which are present."""
    table = Table("name", "data set", "licence", "download", "state")
    for item in load_registry().values():
        size = f"{item.megabytes} MB" if item.megabytes else "none, generated"
        table.add_row(item.name, item.title, item.licence, size, state(item))
    show(table)
    print(f"Data folder: {cache_root()}")


def state(item: Entry) -> str:
    """``present``, ``not present``, or what else is known about the data set in the cache."""
    folder = home(item.name)
    if is_present(folder):
        return "present"
    if any((folder / "downloads").glob("*.part")):
        return "partly downloaded"
    return "made when needed" if item.kind == "generated" else "not present"


@app.command()
def info(name: Name) -> None:
    """Describe a data set: source, licence, files, checksums, how to cite it."""
    item = entry(name)
    rows = [("name", item.name), ("title", item.title), ("DOI", f"https://doi.org/{item.doi}" if item.doi else ""),
            ("page", item.page), ("licence", item.licence),
            ("size", f"about {item.megabytes} MB" if item.megabytes else ""), ("cite as", item.citation),
            ("note", item.note), ("state", f"{state(item)} in {home(item.name)}")]
    for label, text in rows:
        if text:
            print(f"{label + ':':<9}{text}")
    for remote in item.files:
        seen = first_checksum(home(name) / "downloads" / remote.name)
        checksum = f"{remote.checksum} (published)" if remote.checksum else \
            f"sha256:{seen} (no checksum is published; this one was seen at the first download)" if seen is not None \
            else "no checksum is published: the first download will be recorded and every later one compared with it"
        print(f"file:    {remote.name} ({remote.role}{', optional' if remote.optional else ''})\n"
              f"         {remote.url}\n         {checksum}")
    print(f"\n{item.licence_text()}")


@app.command()
def get(
    name: Name,
    to: Annotated[Path | None, typer.Option("--to", help="Data folder to fill, instead of the cache.")] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Accept the licence without being asked.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Fetch the optional files too.")] = False,
) -> None:
    """Fetch a data set: show its licence, download, check, unpack and arrange it."""
    item = entry(name)
    folder = expanded(to) if to is not None else home(name)
    if is_present(folder) and not everything:
        print(f"{name} is present in {folder}")
        return
    if item.kind == "generated":
        from covidseg.data.phantom import write_phantom  # here, so that other commands need not load the generator

        write_phantom(folder, progress=True)
    else:
        print(f"{item.title}\n\nLicence: {item.licence}\n\n{item.licence_text()}\n\nPlease cite: {item.citation}\n")
        if item.kind == "by-hand" and not (folder / "studies").is_dir():
            _explain(item, folder)
            return
        if item.kind == "by-hand":
            report = check_mosmed(folder)
            _show(report)
            report.raise_faults()
            lay_out_mosmed(folder)
        else:
            _accept_licence(item, yes)
            get_dataset(item, folder, everything=everything)
    print(f"{name} is ready in {folder}\n{DISCLAIMER}")


def _accept_licence(item: Entry, yes: bool) -> None:
    """Has the licence accepted that was shown; a refusal, or nobody to ask, is a DownloadError."""
    if yes:
        print("Licence accepted by --yes.")
    elif not _interactive():
        raise DownloadError(f"the licence of {item.name} has not been accepted and there is no terminal to ask on",
                            remedy=f"Read it above; to accept it run `covidseg data get {item.name} --yes`")
    elif not typer.confirm("Do you accept this licence?"):
        raise DownloadError(f"the licence of {item.name} was not accepted, nothing was downloaded")


def _interactive() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _explain(item: Entry, folder: Path) -> None:
    """How to fetch a set by hand."""
    target = "" if folder == home(item.name) else f" --to {shlex.quote(str(folder))}"
    print(f"""covidseg cannot download this set for you (about {item.megabytes // 1000} GB). By hand:

1. Open {item.page} and follow the publisher's steps for the set COVID19_1110.
2. Unpack it so that you have
     {folder / 'studies'}/CT-0/study_0001.nii.gz ... (1110 studies in CT-0 to CT-4)
     {folder / 'masks'}/study_0255_mask.nii.gz ... (50 outlines)
3. Run `covidseg data get {item.name}{target}` again: it checks the files and writes the slice labels
   of the studies that have any.""")


@app.command()
def check(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A data folder.")],
          as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
          unit: Annotated[str | None, typer.Option(
              help="HU or display, where every scan has to hold that.")] = None,
          unchecked: Unchecked = False) -> None:
    """Check every scan, mask and label of a data folder; ends with exit code 4 if anything is wrong.

    Warnings are of scans that can be used, but should be looked at before; they leave the exit code as it is.
    """
    report = check_folder(folder, unit, anatomy=not unchecked)
    if as_json:
        print(json.dumps({"root": str(report.root), "faults": report.all_faults(), "warnings": report.all_warnings(),
                          "volumes": [vars(v) for v in report.volumes]}, indent=1))
    else:
        _show(report)
    report.raise_faults()


@app.command()
def series(folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of DICOM slices.")]) -> None:
    """List the CT series of a DICOM folder, with the number that --series takes; nothing that names a patient."""
    from covidseg.data.dicom import describe, find_series

    found, skipped = find_series(folder)
    if not found and not skipped:
        raise InputFileError("holds no DICOM files", path=folder, remedy="Name the folder of a DICOM series")
    for number, one in enumerate(found, start=1):
        print(f"{number}: CT, {one}")
    if skipped:
        print(f"left out: {describe(skipped)}")


def _show(report: FolderReport) -> None:
    table = Table(Column("volume", overflow="fold"), Column("patient", overflow="fold"), "slices, rows, columns",
                  "spacing in mm", "values", "lesion / free / unlabelled", "outlines", "faults")
    for v in report.volumes:
        values = f"{v.unit} {v.value_range[0]:g} to {v.value_range[1]:g}" if v.value_range else "unreadable"
        outlines = " ".join(kind for kind, there in (("lung", v.lung), ("mask", v.mask)) if there) or "none"
        table.add_row(v.id, v.patient, " ".join(map(str, v.shape)), " ".join(f"{s:.2f}" for s in v.spacing),
                      values, f"{v.lesion}/{v.free}/{v.unlabelled}", outlines, str(len(v.faults)))
    show(table)
    lesion, free = sum(v.lesion for v in report.volumes), sum(v.free for v in report.volumes)
    print(f"{len(report.volumes)} volumes of {len({v.patient for v in report.volumes})} patients, "
          f"{lesion} slices with a lesion, {free} without")
    for warning in report.all_warnings():
        print(f"warning: {warning}")
    for fault in report.all_faults():
        print(f"fault: {fault}")
