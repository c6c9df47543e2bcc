"""Commands that measure: ``covidseg evaluate``, ``verdicts``, ``reproduce`` and ``ablate``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from covidseg import DISCLAIMER
from covidseg.cli.common import (
    LAST_SEED,
    Deterministic,
    Device,
    Method,
    Profile,
    Seed,
    Unchecked,
    complain,
    say,
    show,
)
from covidseg.cli.report import (
    check_json_file,
    command_line,
    made_with,
    recorded,
    show_verdicts,
    write_json,
    write_report,
)
from covidseg.data.folder import named
from covidseg.errors import DatasetError, NoLungError, SettingsError

if TYPE_CHECKING:
    from covidseg.data.folder import Dataset

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


JsonFile = Annotated[Path | None, typer.Option(
    "--json", help="Also write what was measured to this file; - prints only that.")]


def evaluate(prediction: Annotated[Path, typer.Argument(help="Predicted mask (NIfTI).")],
             truth: Annotated[Path, typer.Argument(help="True mask of the same scan.")],
             lungs: Annotated[Path | None, typer.Option(help="Count only pixels inside this lung mask.")] = None,
             out: JsonFile = None) -> None:
    """Measures a mask: Dice, IoU, PPV, sensitivity, specificity, and HD95, the distance of the outlines.

    Every value above 0 counts as lesion; a mask of several classes also has a sensitivity of each.
    """
    from covidseg.data.scan import read_classes, read_mask, read_scan
    from covidseg.evaluation.metrics import (
        class_counts,
        class_names,
        class_sensitivity,
        confusion,
        distance,
        hd95,
        macro,
        micro,
    )
    from covidseg.evaluation.tables import classes_json, distance_json, figure, scores_json, scores_table

    check_json_file(out, "micro", "macro", "hd95")
    reference = read_scan(truth)
    classes, predicted = read_classes(truth), read_classes(prediction, like=reference)
    for path, values in ((prediction, predicted), (truth, classes)):
        if len(several := np.unique(values[values > 0]).tolist()) > 1:
            shown = ", ".join(map(str, several[:8])) + f" and {len(several) - 8} more" * (len(several) > 8)
            complain("warning", f"{path.name}: holds the values {shown}; every one of them counts as lesion")
    predicted = predicted > 0
    if lungs is not None:
        inside = read_mask(lungs, like=reference)
        if not inside.any():
            raise NoLungError("holds no lung, so that there is nothing to measure", path=lungs,
                              remedy="Give the lung mask of this scan, or leave --lungs out")
        keep, classes, predicted = inside.any(axis=(1, 2)), classes * inside, predicted & inside
        # Pixels outside the lung leave the count altogether, also as true negatives.
        counts = np.concatenate([confusion(predicted[k][inside[k]][None, None], classes[k][inside[k]][None, None] > 0)
                                 for k in np.flatnonzero(keep)])
    else:
        counts = confusion(predicted, classes > 0)
    pooled, each = micro(counts), macro(counts)
    side = reference.grid.pixel_mm()
    height, width = side or (1.0, 1.0)
    apart = distance(hd95(predicted, classes > 0, (height / width, 1.0)),
                     np.full(len(classes), width if side else np.nan))
    names = dict(enumerate(class_names(truth), start=1))
    numbers = sorted({*names, *np.unique(classes).tolist()} - {0})  # other masks know other classes
    found = class_sensitivity(class_counts(predicted, classes, numbers),
                              [names.get(k, f"class {k}") for k in numbers])
    write_json(out, {"slices": len(counts), "micro": scores_json(pooled), "macro": scores_json(each),
                     "hd95": distance_json(apart), **classes_json(found)}, indent=2)
    if str(out) == "-":
        return
    say(f"{prediction.name} against {truth.name}, {len(counts)} slices")
    show(scores_table([("mask", pooled.as_dict(), each.as_dict())]).rich(""))
    say(f"HD95 {figure(apart.mean, '.1f')} {apart.unit}, mean of {apart.slices} slices; left out: {apart.empty} in "
        "which only one of the masks holds anything")
    if found:
        say("sensitivity by class: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))


def verdicts(data: Annotated[str, typer.Argument(help="A data folder with slice labels; lesion masks are not opened.")],
             run: Annotated[Path | None, typer.Option(
                 help="Folder of a run or export with the nets; default: those that come with covidseg.")] = None,
             out: JsonFile = None) -> None:
    """Asks trained nets about slices of which only the label is known: how many healthy ones do they mark?"""
    from covidseg.evaluation.verdicts import judge_nets, verdict_json
    from covidseg.pipeline import open_data
    from covidseg.predict import SHIPPED, load_predictor
    from covidseg.profiles import read_report

    check_json_file(out, "nets", "results")
    data, run = named(data), None if run is None else Path(named(run))
    testing, nets = open_data(data).without_masks(), load_predictor(run or SHIPPED)
    title = "the nets that come with covidseg" if run is None else run.name
    if seen := trained_on(read_report(run or SHIPPED)[0].get("data", {}), testing):
        complain("warning", f"{title}: trained on {_some(seen)} of these scans, so that figures are too good")
    if str(out) != "-":
        say(DISCLAIMER)
    results = [{"title": title, "seed": 0, **verdict_json(judge_nets(nets, testing, progress=True))}]
    command = f"covidseg verdicts {Path(data).name}{f' --run {run.name}' if run else ''}"
    known = {"trained_on": seen} if seen else {}
    write_json(out, {**made_with(command, testing, Path(data).name, nets.profile, nets.device()), **known,
                     "nets": nets.fingerprint(), "results": results}, indent=1)
    if str(out) != "-":
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
    mark in both. With the same --out, what was trained for one test set serves for the next; the report of the one
    before is kept under a number.
    """
    from covidseg.devices import use_deterministic_kernels
    from covidseg.evaluation import experiments
    from covidseg.evaluation.leftout import compare_left_out
    from covidseg.evaluation.methods import BASELINE_PROFILES, system_names
    from covidseg.pipeline import open_run, write_run

    if deterministic:
        use_deterministic_kernels()
    data, test = sides(data, test)
    asked = systems.split(",") if systems else None
    system_names(asked)  # a misspelt name ends it here, before any training
    numbers = _numbers(seeds)
    folder = out or Path("runs") / f"{Path(data).name}-{profile}"
    testing, tested = measured_on(data, test)
    command = command_line("reproduce", data, test, unchecked, profile=profile, seeds=seeds, systems=systems)
    start, results = time.monotonic(), []
    say(DISCLAIMER)
    for seed in numbers:
        run = open_run(data, profile, seed, folder / f"seed{seed}", "train" if test is None else None, device,
                       check=not unchecked, log=say)
        refuse_trained_on(run.data, testing, test)
        if test == LEFT_OUT:
            results += compare_left_out(run, asked, BASELINE_PROFILES[profile], progress=True)
        else:
            results += experiments.compare(run, testing, asked, BASELINE_PROFILES[profile], progress=True)
            if "extended" in system_names(asked):  # so that `predict --run` and `export` take the folder
                write_run(run, f"{command} (seed {seed})")
        say(f"seed {seed} done after {time.monotonic() - start:.0f} s")
    content = {**recorded(command, testing, tested, run, start), "rivals": asdict(BASELINE_PROFILES[profile]),
               "results": results}
    report = folder / ("left-out.json" if test == LEFT_OUT else
                       "table1.json" if experiments.outlined(testing) else "verdicts.json")
    write_report(report, content, indent=1)
    made = f"profile {profile}, seeds {seeds}"
    if not experiments.outlined(testing):
        show_verdicts(results, f"trained on slice labels of {Path(data).name}, verdicts on {tested}, {made}", report)
        return
    lines, strongest = experiments.table_lines(results), experiments.strongest_earlier(results)
    say(f"trained on slice labels of {Path(data).name}, measured on {tested}: {results[0]['slices']} full slices, "
        f"{made}")
    show(experiments.table1(lines, narrow=True).rich(""))
    if (volumes := experiments.volume_table(results)) is not None:
        say("Dice of each volume")
        show(volumes.rich(""))
    for sentence in experiments.differences(lines, strongest) if strongest else []:
        say(sentence)
    say(f"report in {report}")


def _numbers(text: str) -> list[int]:
    """``0,1,2`` as numbers; a SettingsError for anything else."""
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0 or max(numbers) > LAST_SEED or len(set(numbers)) < len(numbers):
        raise SettingsError(f"'{text}' is no list of different seeds", remedy=
                            f"Write whole numbers from 0 to {LAST_SEED} with commas: --seeds 0,1,2")
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

    With the same --out, what was trained for one test set serves for the next; the report of the one before is kept
    under a number.
    """
    from covidseg.evaluation.experiments import ablate, outlined, variant_names
    from covidseg.evaluation.tables import ablation_table
    from covidseg.pipeline import open_run

    data, test = sides(data, test)
    if test == LEFT_OUT:
        raise SettingsError("ablate leaves no patients out", remedy="Name a set to measure on after --test")
    asked = only.split(",") if only else None
    variant_names(asked)  # a misspelt name ends it here, before anything is trained
    numbers = _numbers(seeds) if seeds else [seed]
    folder = out or Path("runs") / f"{Path(data).name}-{profile}-{method}{'' if seeds else f'-seed{seed}'}"
    testing, tested = measured_on(data, test)
    start, results = time.monotonic(), []
    say(DISCLAIMER)
    for number in numbers:
        run = open_run(data, profile, number, folder, "train" if test is None else None, device, method=method,
                       check=not unchecked, log=say)
        refuse_trained_on(run.data, testing, test)
        for name, result in ablate(run, testing, asked, log=run.log):
            say(f"{name} done after {time.monotonic() - start:.0f} s")
            results.append(result)
    which = {"seeds": seeds} if seeds else {"seed": str(seed)}
    command = command_line("ablate", data, test, unchecked, only=only, profile=profile, method=method, **which)
    content = {**recorded(command, testing, tested, run, start), "seeds": numbers, "variants": results}
    report = folder / ("ablation.json" if outlined(testing) else "ablation-verdicts.json")
    write_report(report, content, indent=2)
    made = f"{method}, seeds {', '.join(map(str, numbers))}"
    if not outlined(testing):
        show_verdicts(results, f"trained on slice labels of {Path(data).name}, verdicts on {tested}, {made}", report)
        return
    say(f"trained on {Path(data).name}, measured on {tested}, {made}")
    show(ablation_table(results, narrow=True).rich(""))
    say(f"report in {report}")


# --- what is measured -----------------------------------------------------------------------------------------------

def sides(data: str, test: str | None) -> tuple[str, str | None]:
    """Training set and measured set; a name of :data:`PAIRS` stands for both, unless it is a folder."""
    data, test = named(data), None if test is None else named(test)
    if data in PAIRS and not Path(data).is_dir():
        first, second = PAIRS[data]
        return first, test or second
    return data, test


def measured_on(data: str, test: str | None) -> tuple[Dataset, str]:
    """What to measure on and its name: ``test``, or by default the test side of the split of ``data``.

    To leave patients out in turn is to measure on ``data`` itself, without its masks.
    Volumes without a lesion mask are left out (most of MosMedData's), unless none has one.

    Raises:
        DatasetError: the set is not there, or no slice of it has an outline or a label.
    """
    from covidseg.evaluation.experiments import outlined
    from covidseg.evaluation.verdicts import demand_labels
    from covidseg.pipeline import open_data

    if test is None:
        return open_data(data, "test"), f"{Path(data).name} (test side)"
    if test == LEFT_OUT:
        return open_data(data).without_masks(), "patients left out in turn"
    found = open_data(test)
    if not outlined(found):
        demand_labels(found)  # here, and not when all is trained
        return found, Path(test).name
    masked = [case.id for case in found.cases if case.mask is not None]
    if left_out := len(found.cases) - len(masked):
        say(f"{left_out} of {len(found.cases)} volumes of {Path(test).name} have no lesion mask and are not measured")
    return found.subset(masked), Path(test).name


def trained_on(data: Mapping[str, str], testing: Dataset) -> list[str]:
    """Names of the scans of a set that are among training scans, of which the hashes are known."""
    from covidseg.store import file_hash

    known = set(data.values())
    return [case.id for case in testing.cases if file_hash(case.image) in known]


def refuse_trained_on(training: Dataset, testing: Dataset, test: str | None) -> None:
    """A scan that was trained on is no test. Splits, and patients left out in turn, see to that themselves.

    Raises:
        DatasetError: the same scan is in both sets.
    """
    from covidseg.store import file_hash

    if test is None or test == LEFT_OUT:
        return
    if seen := trained_on({case.id: file_hash(case.image) for case in training.cases if case.labels}, testing):
        raise DatasetError(f"{_some(seen)} of its scans are trained on, too, so that figures would be too good",
                           path=testing.root, remedy="Name other scans after --test; `covidseg reproduce --test "
                                                     "left-out` measures each patient by nets trained on the others")


def _some(names: list[str]) -> str:
    """How many there are, and the names of the first."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})"
