"""The two experiments: all systems compared over several seeds (Table 1), and the method without one part (ablation).

Each finished system or variant leaves a small JSON file, so that an experiment that was stopped goes on where it
stopped. Table 1 is drawn up from such *records*, of a moment ago or from ``results/``. The variants of an ablation
live in one folder of stages: a stage that a change does not touch is trained once and shared.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from covidseg.data.folder import Dataset
from covidseg.errors import one_of
from covidseg.evaluation.crossval import cross_validated
from covidseg.evaluation.evaluate import Evaluation, evaluate_run, found_crops, measure, stage_method
from covidseg.evaluation.methods import PUBLISHED, SYSTEMS, BaselineProfile, Trained, system_names
from covidseg.evaluation.metrics import NAMES, figures, macro, micro
from covidseg.evaluation.statistics import Difference, bootstrap_difference, bootstrap_interval, paired_test
from covidseg.evaluation.tables import Record, Table, evaluation_json, figure, spread
from covidseg.evaluation.verdicts import Verdicts, judge, verdict_json
from covidseg.pipeline import Run
from covidseg.profiles import Profile, faithful
from covidseg.store import fingerprint, write_text
from covidseg.training import Log

EARLIER = ("decovnet", "decovnet-3d", "ad3d-mil", "ad3d-mil-3d")
OURS = ("faithful", "extended")


# --- all systems, seed by seed --------------------------------------------------------------------------------------

def measured_key(test: Dataset) -> str:
    """Key of a test set: its pictures, masks and lungs, and its labels, which decide what is measured."""
    cases = [(case.id, case.patient, sorted(case.labels.items())) for case in test.cases]
    files = [path for case in test.cases for path in (case.image, case.mask, case.lung) if path is not None]
    return fingerprint(cases, *files)


def outlined(test: Dataset) -> bool:
    """Whether outlines can be measured on a set; of one without any lesion mask, verdicts on slices are measured."""
    return any(case.mask is not None for case in test.cases)


def compare(run: Run, test: Dataset, names: list[str] | None = None, baselines: BaselineProfile = BaselineProfile(), *,
            progress: bool = False) -> list[Record]:
    """Trains and measures the systems with the seed of a run: what each of them reached, as JSON objects.

    Args:
        run: data, settings of the extended method, seed and folder.
        test: measured slices. With masks their outlines are measured, without any only the verdicts
            (:mod:`covidseg.evaluation.verdicts`).
        names: keys of :data:`covidseg.evaluation.methods.SYSTEMS`; default all that there are masks for.
        baselines: settings of the earlier systems.
        progress: show a bar over the test volumes.
    """
    with_masks = outlined(test)
    taught = [case.mask for case in run.data.cases if case.mask is not None]
    if names is None and not with_masks and len(taught) < len(run.data.cases):
        run.log("system: masks left out, no volume that is measured and not every one to train on has a lesion mask")
        names = [name for name in SYSTEMS if name != "masks"]
    names = system_names(names)
    key = fingerprint(run.key("segmenter"), asdict(baselines), run.seed, measured_key(test))
    keys = {name: fingerprint(key, *taught) if name == "masks" else key for name in names}
    folder = run.folder / ("table1" if with_masks else "verdicts")
    paths = {name: folder / f"{name}-{keys[name]}.json" for name in names}
    trained: dict[str, Trained] = {}
    for name in [name for name in names if not paths[name].exists()]:
        run.log(f"system: {SYSTEMS[name].title}, seed {run.seed}")
        if name == "masks" and len(taught) < len(run.data.cases):  # the test set has some
            write_text(paths[name], json.dumps(_result(name, run, None, cross_validated(run, test))) + "\n")
        else:
            trained[name] = SYSTEMS[name].train(run, baselines)
    if trained:
        methods = [system.method for system in trained.values()]
        results: Sequence[Evaluation | Verdicts] = measure(run, test, methods, progress=progress) if with_masks else \
            judge(partial(found_crops, run), test, methods, progress=progress)
        for (name, system), result in zip(trained.items(), results, strict=True):
            write_text(paths[name], json.dumps(_result(name, run, system, result)) + "\n")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()]


def _result(name: str, run: Run, trained: Trained | None, found: Evaluation | Verdicts) -> Record:
    """What one system reached with one seed, as plain JSON values."""
    return {"system": name, "seed": run.seed,
            "parameters": trained.parameters() if trained else None, "seconds": trained.seconds() if trained else None,
            **(verdict_json(found) if isinstance(found, Verdicts) else _counts_json(found))}


def _counts_json(evaluation: Evaluation) -> Record:
    """Counts are *hit false missed rest* of a slice.

    ``levels`` are *hit false* of the pooled slices for outlines drawn at 0, 0.01, ... 1.
    """
    answer = evaluation.stages[-1]
    return {
        **evaluation_json(evaluation),
        "counts": {slice_name: " ".join(str(n) for n in row)
                   for slice_name, row in zip(evaluation.names, answer.counts.tolist(), strict=True)},
        "reliability": answer.reliability.round(1).tolist(),
        "levels": [" ".join(map(str, row[:2])) for row in answer.levels.tolist()],
    }


def counts_of(results: Sequence[Record]) -> np.ndarray:
    """Counts of one system's answers, ``(seeds, N, 4)`` int64."""
    return np.array([[row.split() for row in result["counts"].values()] for result in results], np.int64)


def levels_of(results: Sequence[Record]) -> np.ndarray | None:
    """Pooled counts of one system at the levels 0 to 1, ``(seeds, 101, 4)``; None where they were not kept."""
    if any(result.get("levels") is None for result in results):
        return None
    marked = np.array([[row.split() for row in result["levels"]] for result in results], np.int64)
    return np.concatenate([marked, marked[:, :1] - marked], axis=2)  # at level 0 everything is marked


def split_table(results: Sequence[Record], parts: Mapping[str, slice]) -> Table:
    """Micro and macro Dice of every system on parts of the slices, each mean over seeds."""
    def cell(counts: np.ndarray) -> str:
        return " / ".join(figure(float(np.mean([average(each).dice for each in counts]))) for average in (micro, macro))
    return Table(("micro / macro Dice", *parts), "l" + "r" * len(parts), [
        [SYSTEMS[name].title, *(cell(counts_of(own)[:, part]) for part in parts.values())]
        for name, own in by_system(results).items()])


def patients_of(results: Sequence[Record]) -> np.ndarray | None:
    """Volume of each slice, for drawing whole volumes; None for a single stack, whose patients nobody knows."""
    volumes = np.array([name.rsplit(":", 1)[0] for name in results[0]["counts"]])
    return volumes if len(np.unique(volumes)) > 1 else None


@dataclass(frozen=True)
class Line:
    """One system in the table.

    Attributes:
        key: Name of the system among the :data:`covidseg.evaluation.methods.SYSTEMS`.
        title: Of the system, for the table.
        seeds: The seeds it was trained with.
        micro: ``(seeds, 5)`` Dice, IoU, PPV, sensitivity and specificity of pooled pixels.
        macro: ``(seeds,)`` mean Dice of the slices with a lesion.
        interval: 95 % bootstrap interval of the micro Dice over patients, mean over seeds.
        patients: Whether patients are known; if not, all intervals are over slices, and so too narrow.
        rule: ``(seeds, 6)`` micro figures and macro Dice of the outline that the system's authors draw; None if that is
            not another one.
        auc: ``(seeds,)`` of the slice verdict; NaN where there is none.
        parameters: Numbers that were learned; None where nobody counted.
        seconds: Training time of a seed; None where it was not taken.
        dice: How far ours is ahead of the strongest earlier system in micro Dice; None for other systems.
        iou: How far it is ahead in micro IoU.
        p: P-value of the paired test of both; NaN where too few patients are known.
    """

    key: str
    title: str
    seeds: tuple[int, ...]
    micro: np.ndarray
    macro: np.ndarray
    interval: tuple[float, float]
    patients: bool
    rule: np.ndarray | None
    auc: np.ndarray
    parameters: int | None
    seconds: float | None
    dice: Difference | None = None
    iou: Difference | None = None
    p: float = float("nan")


def by_system(results: Sequence[Record]) -> dict[str, list[Record]]:
    """Results of each system, its seeds in order; systems in the order of the table."""
    return {name: sorted(own, key=lambda result: result["seed"]) for name in SYSTEMS
            if (own := [result for result in results if result["system"] == name])}


def strongest_earlier(results: Sequence[Record]) -> str | None:
    """The earlier system with the highest mean micro Dice; None if none was measured."""
    means = {name: float(figures(counts_of(own).sum(axis=1))[:, 0].mean())
             for name, own in by_system(results).items() if name in EARLIER}
    return max(means, key=means.__getitem__) if means else None


def table_lines(results: Sequence[Record]) -> list[Line]:
    """The table, line by line, from the results of all seeds."""
    systems, strongest = by_system(results), strongest_earlier(results)
    lines = []
    for name, own in systems.items():
        counts, groups = counts_of(own), patients_of(own)
        auc = np.array([result["classifier_auc"] for result in own], float)  # of None it makes NaN
        seconds = [r["seconds"] for r in own if r["seconds"] is not None]
        pair: dict[str, Any] = {}
        if strongest is not None and name in OURS:
            other = counts_of(systems[strongest])
            pair = {"dice": bootstrap_difference(counts, other, "dice", groups=groups),
                    "iou": bootstrap_difference(counts, other, "iou", groups=groups),
                    "p": float("nan") if groups is None else paired_test(counts, other, groups)}
        ruled = [r["rows"][0] for r in own if SYSTEMS[name].rule and len(r["rows"]) > 1]
        rule = np.array([[*(row["micro"][each] for each in NAMES), row["macro"]["dice"]] for row in ruled], float)
        lines.append(Line(
            name, SYSTEMS[name].title, tuple(r["seed"] for r in own), figures(counts.sum(axis=1)),
            np.array([macro(each).dice for each in counts]), bootstrap_interval(counts, groups=groups),
            groups is not None, rule if len(rule) else None, auc, own[0]["parameters"],
            float(np.mean(seconds)) if seconds else None, **pair))
    return lines


HEADS = ("Dice", "IoU", "PPV", "sens.", "spec.", "macro\nDice", "95 %\nof Dice", "AUC")


def table1(lines: Sequence[Line], *, narrow: bool = False) -> Table:
    """Table 1: micro figures and macro Dice, means over seeds with their deviation.

    Under a system stands the outline that its own authors draw, if that is another one, and under the last system of
    each kind what was published of it. The abstract does not say whether its figures are micro or macro. ``narrow`` is
    for a terminal of 80 columns and leaves out all deviations but that of Dice, and what differs from a publication.
    """
    rows = []
    for k, line in enumerate(lines):
        low, high = line.interval
        system = SYSTEMS[line.key]
        drawn = [[line.title if narrow else system.full_title, *(spread(column) for column in line.micro.T),
                  spread(line.macro), "–" if np.isnan(low) else f"{low:.3f} to {high:.3f}", spread(line.auc)]]
        if line.rule is not None:
            drawn.append([f"{line.title}: its own rule", *(spread(column) for column in line.rule.T), "", ""])
        for title, first, *others in drawn:
            rows.append([title, first.replace(" ± ", "±"), *(c.split(" ± ")[0].replace(" to ", "-") for c in others)]
                        if narrow else [title, first, *others])
        published = system.published
        if published and all(SYSTEMS[later.key].published != published for later in lines[k + 1:]):
            rows.append([f"*published: {published}*", *(f"{value:.2f}" for value in PUBLISHED[published]), "", "", ""])
    return Table(("", *HEADS), "l" + "r" * len(HEADS), rows)


def differences(lines: Sequence[Line], strongest: str) -> list[str]:
    """A sentence for each of our rows: how far ahead of the strongest earlier system, and how sure that is.

    Where nobody knows the patients there is no test, since its slices would have to be independent.
    """
    return [f"{line.title} against {SYSTEMS[strongest].title}: Dice {line.dice.mean:+.3f} ({line.dice.low:+.3f} to "
            f"{line.dice.high:+.3f}), IoU {line.iou.mean:+.3f} ({line.iou.low:+.3f} to {line.iou.high:+.3f}), "
            + ("no test: the patients of these slices are not known, and intervals over slices are too narrow"
               if not line.patients else "too few patients for a paired test" if np.isnan(line.p)
               else f"signed rank test over patients p = {line.p:.1g}")
            for line in lines if line.dice is not None and line.iou is not None]


def volume_table(results: Sequence[Record]) -> Table | None:
    """Dice of every volume and system, over the pooled pixels of the volume, means over seeds; None for a stack."""
    volumes = patients_of(results) if results else None
    if volumes is None:
        return None
    systems, names = by_system(results), list(dict.fromkeys(volumes.tolist()))
    dice = np.array([[figures(counts_of(own)[:, volumes == name].sum(axis=1))[:, 0].mean() for own in systems.values()]
                     for name in names])                                                 # (volumes, systems)
    return Table(("volume", *(name.replace("-", "\n") for name in systems)), "l" + "r" * len(systems), [
        [name, *(figure(value, ".2f") for value in row)]
        for name, row in zip([*names, "mean"], [*dice, np.nanmean(dice, axis=0)], strict=True)])


# --- ablation -------------------------------------------------------------------------------------------------------

Change = Callable[[Profile], Profile]


def changed(settings: Any, path: str, value: Any) -> Any:
    """Settings of which one has another value; ``path`` names it, such as ``mil.curriculum.order``."""
    name, _, rest = path.partition(".")
    return replace(settings, **{name: changed(getattr(settings, name), rest, value) if rest else value})


def _set(settings: dict[str, Any]) -> Change:
    def change(profile: Profile) -> Profile:
        for path, value in settings.items():
            profile = changed(profile, path, value)
        return profile
    return change


@dataclass(frozen=True)
class Variant:
    """The method with one thing changed: in words, and what makes the variant's settings."""

    title: str
    change: Change


VARIANTS = {
    "whole": Variant("the whole method", _set({})),
    "threshold-lungs": Variant("threshold lungs, not completed", _set({"lung_net.steps": 0})),
    "no-curriculum": Variant("no curriculum: all patches at once", _set(  # from the first step on, with full weight
        {"mil.curriculum.order": "none", "mil.curriculum.weights": (1.0, 1.0, 1.0, 1.0)})),
    "random-order": Variant("curriculum in random order", _set({"mil.curriculum.order": "random"})),
    "reversed-order": Variant("curriculum reversed: hardest first", _set({"mil.curriculum.order": "reversed"})),
    "patch-10": Variant("patches of 10 pixels", _set({"mil.patch": 10})),
    "patch-grid": Variant("5 x 5 grid over each coarse component", _set({"mil.reading": "grid"})),
    "mean-pooling": Variant("mean pooling in place of attention", _set({"mil.pooling": "mean"})),
    "no-zeros": Variant("lesion-free slices not held at zero", _set({"mil.zeros": 0.0})),
    "true-lungs": Variant("true lungs where the data has them", _set({"true_lungs": True})),
    # Patches that know nothing of the map get no bags from it, and their labels none of its votes.
    "no-exchange": Variant("no exchange: patches from slice labels alone", _set(
        {"mutual.exchange": "none", "mil.component_weight": 0.0, "fine.cam_share": 0.0})),
    "one-way": Variant("exchange one way: map to patches", _set({"mutual.exchange": "to_patches"})),
    "no-vessels": Variant("no painted vessels", _set(
        {"classifier.paint.vessels": 0.0, "mil.paint.vessels": 0.0, "segmenter.paint.vessels": 0.0})),
    "faithful": Variant("no painted lesions, vessels only (faithful)", faithful),
    "no-paint": Variant("nothing painted, but for the lung net", _set(
        {"classifier.paint.vessels": 0.0, "mil.paint.vessels": 0.0, "segmenter.paint.vessels": 0.0,
         "mutual.painted": 0.0, "mil.paint.share": 0.0, "segmenter.paint.share": 0.0})),
    "pixel-masks": Variant("full supervision on the test set, 5-fold cross-validation", _set({})),
}


def variant_names(names: list[str] | None) -> list[str]:
    """Names of variants, all of them by default.

    Raises:
        SettingsError: there is no such variant.
    """
    for name in names or []:
        one_of(name, VARIANTS, "variant")
    return list(dict.fromkeys(names)) if names else list(VARIANTS)


def ablate(run: Run, test: Dataset, names: list[str] | None = None, *,
           log: Log = print) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trains and measures variants of a run, one after the other; ``whole`` with full supervision if there are masks.

    Runs of several seeds may share a folder.

    Args:
        run: data, settings, seed and folder of the whole method.
        test: measured slices; without any mask the verdicts on them are measured, as in :func:`compare`.
        names: keys of :data:`VARIANTS`; default all.
        log: receives a line for each variant that is trained or left out.

    Yields:
        Name of the variant, and what it reached as a JSON object.
    """
    measured = measured_key(test)
    for name in variant_names(names):
        profile = VARIANTS[name].change(run.profile)
        if names is None and profile.true_lungs and any(case.lung is None for case in run.data.cases):
            log(f"ablation: {name} left out, the training set has no true lungs")
            continue
        if names is None and name == "pixel-masks" and not outlined(test):
            log(f"ablation: {name} left out, the test set has no lesion masks")
            continue
        variant = Run(run.data, profile, run.seed, run.folder, run.device.type, log)
        tested = fingerprint(variant.key("segmenter"), measured)
        path = run.folder / "ablation" / f"{name}-{tested}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            log(f"ablation: {VARIANTS[name].title}, seed {run.seed}")
            content = {"name": name, "title": VARIANTS[name].title, "seed": run.seed, **_ablated(name, variant, test)}
            write_text(path, json.dumps(content, indent=2) + "\n")
        yield name, content


def _ablated(name: str, variant: Run, test: Dataset) -> Record:
    """What a variant reached, and the rounds of its exchange: how far the maps agreed in each, and which was used."""
    if name == "pixel-masks":
        return evaluation_json(cross_validated(variant, test))
    reached = evaluation_json(evaluate_run(variant, test, upper_bound=None if name == "whole" else False)) \
        if outlined(test) else verdict_json(judge(partial(found_crops, variant), test, [stage_method(variant)])[0])
    return {"round": variant.profile.mutual.last, "agreements": [round(each, 4) for each in variant.agreements()],
            **reached}
