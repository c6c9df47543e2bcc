"""Commands that measure: ``covidseg evaluate``, ``verdicts``, ``reproduce`` and ``ablate``."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from covidseg import DISCLAIMER
from covidseg.cli.common import Deterministic, Device, Method, Profile, Seed, Unchecked, console
from covidseg.errors import SettingsError

if TYPE_CHECKING:
    import torch

    from covidseg.data.folder import Dataset
    from covidseg.pipeline import Run
    from covidseg.profiles import Profile as Settings

Data = Annotated[str, typer.Option(help="A data folder, or a name from `covidseg data list`; `medseg` trains on "
                                        "medseg2 and measures on medseg1.")]
TEST_HELP = ("Folder or name to measure on; default: the test side of the set's own split. Where no volume has a "
             "lesion mask, verdicts on slices are measured in place of outlines.")
Test = Annotated[str | None, typer.Option(help=TEST_HELP)]
TestOrLeftOut = Annotated[str | None, typer.Option(
    help=f"{TEST_HELP} `left-out`: each patient of the training set in turn, by nets trained on all others.")]

# Names that stand for two sets, one to train on and one to measure on: MedSeg's second and first, as in Table 1.
PAIRS = {"medseg": ("medseg2", "medseg1")}
LEFT_OUT = "left-out"


def evaluate(prediction: Annotated[Path, typer.Argument(help="Predicted mask (NIfTI).")],
             truth: Annotated[Path, typer.Argument(help="True mask of the same scan.")],
             lungs: Annotated[Path | None, typer.Option(help="Count only pixels inside this lung mask.")] = None,
             out: Annotated[Path | None, typer.Option(
                 "--json", help="Also write the figures to this file; - prints only them.")] = None,
             ) -> None:
    """Measures a mask: Dice, IoU, PPV, sensitivity, specificity, and HD95, the distance of the outlines."""
    from covidseg.data.scan import read_classes, read_mask, read_scan
    from covidseg.evaluation.metrics import class_counts, class_sensitivity, confusion, distance, hd95, macro, micro
    from covidseg.evaluation.tables import classes_json, distance_json, figure, scores_json, scores_table
    from covidseg.store import write_text

    if out is not None and out.resolve() in (path.resolve() for path in (prediction, truth, lungs) if path is not None):
        raise SettingsError("the figures would replace a mask", path=out, remedy="Name another file after --json")
    reference = read_scan(truth)
    classes, predicted = read_classes(truth), read_mask(prediction, like=reference)
    if lungs is not None:
        inside = read_mask(lungs, like=reference)
        keep, classes, predicted = inside.any(axis=(1, 2)), classes * inside, predicted & inside
        # Pixels outside the lung leave the count altogether, also as true negatives.
        counts = np.concatenate([confusion(predicted[k][inside[k]][None, None], classes[k][inside[k]][None, None] > 0)
                                 for k in np.flatnonzero(keep)]) if keep.any() else np.zeros((1, 4), np.int64)
    else:
        counts = confusion(predicted, classes > 0)
    pooled, each = micro(counts), macro(counts)
    side = reference.grid.pixel_mm()
    height, width = side or (1.0, 1.0)
    apart = distance(hd95(predicted, classes > 0, (height / width, 1.0)),
                     np.full(len(classes), width if side else np.nan))
    found = class_sensitivity(class_counts(predicted, classes))
    content = {"slices": len(counts), "micro": scores_json(pooled), "macro": scores_json(each),
               "hd95": distance_json(apart), **classes_json(found)}
    if str(out) == "-":
        print(json.dumps(content, indent=2))  # alone on standard output, for pipes
        return
    table = scores_table([("mask", pooled.as_dict(), each.as_dict())])
    console.print(table.rich(f"{prediction.name} against {truth.name}, {len(counts)} slices"))
    console.print(f"HD95 {figure(apart.mean, '.1f')} {apart.unit}, mean of {apart.slices} slices; left out: "
                  f"{apart.empty} in which only one of the masks holds anything", soft_wrap=True)
    if found:
        console.print("sensitivity by class: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()),
                      soft_wrap=True)
    if out is not None:
        write_text(out, json.dumps(content, indent=2) + "\n")


def verdicts(data: Annotated[str, typer.Argument(help="A data folder with slice labels; lesion masks are not opened.")],
             run: Annotated[Path | None, typer.Option(
                 help="Folder of a run or export with the nets; default: those that come with covidseg.")] = None,
             out: Annotated[Path | None, typer.Option(
                 "--json", help="Also write what was said of each slice to this file.")] = None) -> None:
    """Asks trained nets about slices of which only the label is known: how many healthy ones do they mark?"""
    from covidseg.evaluation.verdicts import judge_nets, verdict_json
    from covidseg.pipeline import open_data
    from covidseg.predict import SHIPPED, load_predictor
    from covidseg.store import write_text

    testing, nets = open_data(data).without_masks(), load_predictor(run or SHIPPED)
    title = "the nets that come with covidseg" if run is None else run.name
    console.print(DISCLAIMER)
    results = [{"title": title, "seed": 0, **verdict_json(judge_nets(nets, testing, progress=True))}]
    if out is not None:
        command = f"covidseg verdicts {Path(data).name}{f' --run {run.name}' if run else ''}"
        content = {**_made_with(command, testing, Path(data).name, nets.profile, nets.device()),
                   "nets": nets.fingerprint(), "results": results}
        write_text(out, json.dumps(content, indent=1) + "\n")
    show_verdicts(results, f"verdicts on {Path(data).name}", out)


def reproduce(data: Data, test: TestOrLeftOut = None, profile: Profile = "quick",
              seeds: Annotated[str, typer.Option(help="Seeds, with commas: all is trained with each of them.")] = "0",
              systems: Annotated[str | None, typer.Option(
                  help="Names of systems, with commas; default: all of them.")] = None,
              device: Device = "auto",
              out: Annotated[Path | None, typer.Option(
                  help="Folder for a run of each seed; goes on there if it was stopped.")] = None,
              deterministic: Deterministic = False, unchecked: Unchecked = False) -> None:
    """Trains all systems on the same slice labels, measures them on the same slices, and prints Table 1.

    On a set without lesion masks it prints how well they tell slices with a lesion from healthy ones, and how much they
    mark in both. With the same --out, what was trained for one test set serves for the next.
    """
    from covidseg.devices import use_deterministic_kernels
    from covidseg.evaluation import experiments
    from covidseg.evaluation.leftout import compare_left_out
    from covidseg.evaluation.methods import BASELINE_PROFILES, system_names
    from covidseg.pipeline import open_run, write_run
    from covidseg.store import write_text

    if deterministic:
        use_deterministic_kernels()
    data, test = sides(data, test)
    asked = systems.split(",") if systems else None
    system_names(asked)  # a misspelt name ends it here, before any training
    folder = out or Path("runs") / f"{Path(data).name}-{profile}"
    testing, tested = measured_on(data, test)
    command = _command("reproduce", data, test, unchecked, profile=profile, seeds=seeds, systems=systems)
    start, results = time.monotonic(), []
    console.print(DISCLAIMER)
    for seed in _numbers(seeds):
        run = open_run(data, profile, seed, folder / f"seed{seed}", "train" if test is None else None, device,
                       check=not unchecked, log=console.print)
        if test == LEFT_OUT:
            results += compare_left_out(run, asked, BASELINE_PROFILES[profile], progress=True)
        else:
            results += experiments.compare(run, testing, asked, BASELINE_PROFILES[profile], progress=True)
            if "extended" in system_names(asked):  # so that `predict --run` and `export` take the folder
                write_run(run, f"{command} (seed {seed})")
        console.print(f"seed {seed} done after {time.monotonic() - start:.0f} s")
    content = {**recorded(command, testing, tested, run, start), "rivals": asdict(BASELINE_PROFILES[profile]),
               "results": results}
    report = folder / ("left-out.json" if test == LEFT_OUT else
                       "table1.json" if experiments.outlined(testing) else "verdicts.json")
    write_text(report, json.dumps(content, indent=1) + "\n")
    made = f"profile {profile}, seeds {seeds}"
    if not experiments.outlined(testing):
        show_verdicts(results, f"trained on slice labels of {Path(data).name}, verdicts on {tested}, {made}", report)
        return
    lines, strongest = experiments.table_lines(results), experiments.strongest_earlier(results)
    console.print(experiments.table1(lines, narrow=True).rich(
        f"trained on slice labels of {Path(data).name}, measured on {tested}: {results[0]['slices']} full slices, "
        f"{made}"))
    if (volumes := experiments.volume_table(results)) is not None:
        console.print(volumes.rich("Dice of each volume"))
    for sentence in experiments.differences(lines, strongest) if strongest else []:
        console.print(sentence, soft_wrap=True)
    console.print(f"report in {report}")


def show_verdicts(results: list[dict[str, Any]], title: str, report: Path | None) -> None:
    """Prints the table of :mod:`covidseg.evaluation.verdicts`, and where the report is."""
    from covidseg.evaluation.verdicts import verdict_count, verdict_table

    console.print(verdict_table(results, narrow=True).rich(f"{title}: {verdict_count(results)}"))
    if report is not None:
        console.print(f"report in {report}")


def _command(name: str, data: str, test: str | None, unchecked: bool, **options: str | None) -> str:
    """What was asked for, without folder names of this machine."""
    given = {"data": Path(data).name, "test": test and Path(test).name, **options}
    return " ".join([f"covidseg {name}", *(f"--{option} {value}" for option, value in given.items() if value),
                     *(["--unchecked"] if unchecked else [])])


def _numbers(text: str) -> list[int]:
    """``0,1,2`` as numbers; a SettingsError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise SettingsError(f"'{text}' is no list of different seeds", remedy="Write them with commas: --seeds 0,1,2")
    return numbers


def ablate_command(
        data: Data, test: Test = None,
        only: Annotated[str | None, typer.Option(help="Names of variants, with commas; default: all of them.")] = None,
        profile: Profile = "quick", method: Method = "extended", seed: Seed = 0,
        seeds: Annotated[str | None, typer.Option(help="Several seeds, with commas, in place of --seed.")] = None,
        device: Device = "auto",
        out: Annotated[Path | None, typer.Option(help="Folder of the run; goes on there if it was stopped.")] = None,
        unchecked: Unchecked = False) -> None:
    """Trains variants of the method with one thing changed at a time, and prints what each part adds.

    With the same --out, what was trained for one test set serves for the next.
    """
    from covidseg.evaluation.experiments import ablate, outlined, variant_names
    from covidseg.evaluation.tables import ablation_table
    from covidseg.pipeline import open_run
    from covidseg.store import write_text

    data, test = sides(data, test)
    if test == LEFT_OUT:
        raise SettingsError("ablate leaves no patients out", remedy="Name a set to measure on after --test")
    asked = only.split(",") if only else None
    variant_names(asked)  # a misspelt name ends it here, before anything is trained
    numbers = _numbers(seeds) if seeds else [seed]
    folder = out or Path("runs") / f"{Path(data).name}-{profile}-{method}{'' if seeds else f'-seed{seed}'}"
    testing, tested = measured_on(data, test)
    start, results = time.monotonic(), []
    console.print(DISCLAIMER)
    for number in numbers:
        run = open_run(data, profile, number, folder, "train" if test is None else None, device, method=method,
                       check=not unchecked, log=console.print)
        for name, result in ablate(run, testing, asked, log=run.log):
            console.print(f"{name} done after {time.monotonic() - start:.0f} s", markup=False)
            results.append(result)
    which = {"seeds": seeds} if seeds else {"seed": str(seed)}
    command = _command("ablate", data, test, unchecked, only=only, profile=profile, method=method, **which)
    content = {**recorded(command, testing, tested, run, start), "seeds": numbers, "variants": results}
    report = folder / ("ablation.json" if outlined(testing) else "ablation-verdicts.json")
    write_text(report, json.dumps(content, indent=2) + "\n")
    made = f"{method}, seeds {', '.join(map(str, numbers))}"
    if not outlined(testing):
        show_verdicts(results, f"trained on slice labels of {Path(data).name}, verdicts on {tested}, {made}", report)
        return
    console.print(ablation_table(results, narrow=True).rich(
        f"trained on {Path(data).name}, measured on {tested}, {made}"))
    console.print(f"report in {report}")


# --- what is measured, and what a recorded result says of itself -----------------------------------------------------

def sides(data: str, test: str | None) -> tuple[str, str | None]:
    """Training set and measured set; a name of :data:`PAIRS` stands for both, unless it is a folder."""
    if data in PAIRS and not Path(data).is_dir():
        first, second = PAIRS[data]
        return first, test or second
    return data, test


def measured_on(data: str, test: str | None) -> tuple[Dataset, str]:
    """What to measure on and its name: ``test``, or by default the test side of the split of ``data``.

    To leave patients out in turn is to measure on ``data`` itself, without its masks.
    Volumes without a lesion mask are left out (most of MosMedData's), unless none has one.
    """
    from covidseg.pipeline import open_data

    if test is None:
        return open_data(data, "test"), f"{Path(data).name} (test side)"
    if test == LEFT_OUT:
        return open_data(data).without_masks(), "patients left out in turn"
    found = open_data(test)
    masked = [case.id for case in found.cases if case.mask is not None] or [case.id for case in found.cases]
    if left_out := len(found.cases) - len(masked):
        console.print(f"{left_out} of {len(found.cases)} volumes of {Path(test).name} have no lesion mask and are not "
                      "measured")
    return found.subset(masked), Path(test).name


def recorded(command: str, testing: Dataset, tested: str, run: Run, start: float) -> dict[str, Any]:
    """What every recorded result of a training says about how it was made."""
    from covidseg.store import file_hash

    return {**_made_with(command, testing, tested, run.profile, run.device),
            "seconds": round(time.monotonic() - start, 1),
            "data": {case.id: file_hash(case.image) for case in run.data.cases}}


def _made_with(command: str, testing: Dataset, tested: str, profile: Settings, device: torch.device) -> dict[str, Any]:
    """What every recorded result says about how it was made; nothing that names the machine or a folder on it."""
    from covidseg.profiles import profile_json
    from covidseg.store import environment, file_hash

    return {"note": DISCLAIMER, "command": command, "test": tested, "environment": environment(device),
            "settings": profile_json(profile),
            "test_data": {path.name: file_hash(path) for case in testing.cases
                          for path in (case.image, case.mask) if path is not None}}
