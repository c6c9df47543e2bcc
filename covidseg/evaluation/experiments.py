"""Table 1: all systems trained on the same slices with several seeds, measured on the same slices, compared in pairs.

:func:`compare` does one seed and stores what each system reached as a small JSON file, so that a comparison that was
stopped goes on where it stopped. A *record* is all of these files together with how they were made; the tables are
drawn up from a record, whether it was made a moment ago or comes with the package (``results/``).

What does each part of the method add? The same data and seed, one thing changed at a time.

All variants live in one folder of stages: a stage that a change does not touch is trained once and shared. Each
finished variant leaves a small JSON file, so that an ablation that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from rich.table import Table

from covidseg import DISCLAIMER
from covidseg.data.folder import Dataset
from covidseg.errors import one_of
from covidseg.evaluation.evaluate import Evaluation, cross_validated, evaluate_run, measure
from covidseg.evaluation.methods import PUBLISHED, SYSTEMS, Rivals, Trained
from covidseg.evaluation.methods import chosen as chosen_systems
from covidseg.evaluation.metrics import figures, macro
from covidseg.evaluation.statistics import Difference, bootstrap_difference, bootstrap_interval, paired_test
from covidseg.evaluation.tables import evaluation_json, spread
from covidseg.pipeline import Run, measured_key
from covidseg.profiles import Profile, faithful, repainted
from covidseg.store import fingerprint, write_text
from covidseg.training import Log

EARLIER = ("decovnet", "decovnet-3d", "ad3d-mil", "ad3d-mil-3d")
OURS = ("faithful", "extended")
Record = dict[str, Any]


def compare(run: Run, test: Dataset, names: list[str] | None = None, rivals: Rivals = Rivals(), *,
            progress: bool = False) -> list[Record]:
    """Trains and measures the systems with the seed of a run.

    Args:
        run: data, settings of the extended method, seed and folder.
        test: measured slices, with masks.
        names: keys of :data:`covidseg.evaluation.methods.SYSTEMS`; default all.
        rivals: settings of the earlier systems.
        progress: show a bar over the test volumes.

    Returns:
        A JSON object for each system, see :func:`_result`.
    """
    names = chosen_systems(names)
    paths = {name: run.folder / "table1" / f"{name}-{key}.json"
             for name, key in _keys(names, run, test, rivals).items()}
    missing = [name for name in names if not paths[name].exists()]
    trained: dict[str, Trained] = {}
    for name in missing:
        run.log(f"system: {SYSTEMS[name].title}, seed {run.seed}")
        if name == "masks" and any(case.mask is None for case in run.data.cases):  # the test set has some
            result = cross_validated(run, test)
            write_text(paths[name], json.dumps(_result(name, run, None, result)) + "\n")
        else:
            trained[name] = SYSTEMS[name].train(run, rivals)
    if trained:
        results = measure(run, test, [system.outliner for system in trained.values()], progress=progress)
        for (name, system), result in zip(trained.items(), results, strict=True):
            write_text(paths[name], json.dumps(_result(name, run, system, result)) + "\n")
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths.values()]


def _keys(names: list[str], run: Run, test: Dataset, rivals: Rivals) -> dict[str, str]:
    """Key of what each system reaches, from all that it depends on."""
    key = fingerprint(run.key("segmenter"), asdict(rivals), run.seed, measured_key(test))
    taught = [case.mask for case in run.data.cases if case.mask is not None]
    return {name: fingerprint(key, *taught) if name == "masks" else key for name in names}


def _result(name: str, run: Run, trained: Trained | None, evaluation: Evaluation) -> Record:
    """What one system reached with one seed, as plain JSON values; counts are *hit false missed rest* of a slice.

    ``levels`` are *hit false* of the pooled slices for outlines drawn at 0, 0.01, ... 1.
    """
    answer = evaluation.stages[-1]
    return {
        "system": name, "seed": run.seed,
        "parameters": trained.parameters() if trained else None, "seconds": trained.seconds() if trained else None,
        **evaluation_json(evaluation),
        "counts": {slice_name: " ".join(str(n) for n in row)
                   for slice_name, row in zip(evaluation.names, answer.counts.tolist(), strict=True)},
        "reliability": None if answer.reliability is None else answer.reliability.round(1).tolist(),
        "levels": None if answer.levels is None else [" ".join(map(str, row[:2])) for row in answer.levels.tolist()],
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


def patients_of(results: Sequence[Record]) -> np.ndarray | None:
    """Volume of each slice, for drawing whole volumes; None for a single stack, whose patients nobody knows."""
    volumes = np.array([name.rsplit(":", 1)[0] for name in results[0]["counts"]])
    return volumes if len(np.unique(volumes)) > 1 else None


def volume_dice(results: Sequence[Record]) -> dict[str, np.ndarray]:
    """Dice of each volume of one system's answers, over the pooled pixels of the volume.

    Returns:
        Volume -> ``(seeds,)``, NaN where a volume has no lesion and nothing was marked; empty for a single stack.
    """
    counts, volumes = counts_of(results), patients_of(results)
    if volumes is None:
        return {}
    return {name: figures(counts[:, volumes == name].sum(axis=1))[:, 0] for name in dict.fromkeys(volumes.tolist())}


@dataclass(frozen=True)
class Line:
    """One system in the table.

    Attributes:
        key, title: of the system.
        seeds: the seeds it was trained with.
        micro: ``(seeds, 5)`` Dice, IoU, PPV, sensitivity and specificity of pooled pixels.
        macro: ``(seeds,)`` mean Dice of the slices with a lesion.
        interval: 95 % bootstrap interval of the micro Dice over slices (or volumes), mean over seeds.
        auc: ``(seeds,)`` of the slice verdict; NaN where there is none.
        parameters, seconds: cost; None where it was not taken.
        dice: Ours minus the strongest earlier system, micro Dice; None for others.
        iou: the same of the micro IoU.
        p: of the paired test of both.
    """

    key: str
    title: str
    seeds: tuple[int, ...]
    micro: np.ndarray
    macro: np.ndarray
    interval: tuple[float, float]
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
    systems, rival = by_system(results), strongest_earlier(results)
    lines = []
    for name, own in systems.items():
        counts, groups = counts_of(own), patients_of(own)
        auc = np.array([np.nan if r["classifier_auc"] is None else r["classifier_auc"] for r in own])
        seconds = [r["seconds"] for r in own if r["seconds"] is not None]
        pair: dict[str, Any] = {}
        if rival is not None and name in OURS:
            other = counts_of(systems[rival])
            pair = {"dice": bootstrap_difference(counts, other, "dice", groups=groups),
                    "iou": bootstrap_difference(counts, other, "iou", groups=groups),
                    "p": paired_test(counts, other, groups=groups)}
        lines.append(Line(
            name, SYSTEMS[name].title, tuple(r["seed"] for r in own), figures(counts.sum(axis=1)),
            np.array([macro(each).dice for each in counts]), bootstrap_interval(counts, groups=groups),
            auc, own[0]["parameters"], float(np.mean(seconds)) if seconds else None, **pair))
    return lines


HEADS = ("Dice", "IoU", "PPV", "sens.", "spec.", "macro Dice", "95 % of Dice", "AUC")


def _cells(line: Line) -> list[str]:
    low, high = line.interval
    return [*(spread(column) for column in line.micro.T), spread(line.macro),
            "–" if np.isnan(low) else f"{low:.3f} to {high:.3f}", spread(line.auc)]


def _published(line: Line) -> list[str]:
    """Figures of the abstract, which does not say whether they are micro or macro; empty if there are none."""
    row = PUBLISHED.get(SYSTEMS[line.key].published)
    return [] if row is None else [*(f"{value:.2f}" for value in row), "", "", ""]


def _titles(lines: Sequence[Line]) -> list[tuple[str, list[str]]]:
    """Title and cells of each row: what was measured, and under the last system of each kind what was published."""
    rows = []
    for k, line in enumerate(lines):
        rows.append((line.title, _cells(line)))
        last = all(SYSTEMS[later.key].published != SYSTEMS[line.key].published for later in lines[k + 1:])
        if last and _published(line):
            rows.append((f"published: {SYSTEMS[line.key].published}", _published(line)))
    return rows


def table_rich(lines: Sequence[Line], title: str) -> Table:
    """Table 1 for a terminal of 80 columns: micro figures, means over seeds, for Dice the deviation as well."""
    table = Table(title=title, caption=DISCLAIMER, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("", overflow="fold")
    for head in HEADS:
        table.add_column(head.replace(" ", "\n", 1) if head.startswith("macro") else head.replace("% of", "%\nof"),
                         justify="right", no_wrap=True)
    for name, (dice, *cells) in _titles(lines):
        table.add_row(name, dice.replace(" ± ", "±"), *(cell.split(" ± ")[0].replace(" to ", "-") for cell in cells),
                      style="dim" if name.startswith("published") else None)
    return table


def table_markdown(lines: Sequence[Line]) -> str:
    """Table 1 for a page of the book."""
    rows = [f"| {f'*{name}*' if name.startswith('published') else name} | " + " | ".join(cells) + " |"
            for name, cells in _titles(lines)]
    return "\n".join(["| | " + " | ".join(HEADS) + " |", "|---|" + "--:|" * len(HEADS), *rows])


def differences(lines: Sequence[Line], rival: str) -> list[str]:
    """A sentence for each of our rows: how far ahead of the strongest earlier system, and how sure that is."""
    return [f"{line.title} against {SYSTEMS[rival].title}: Dice {line.dice.mean:+.3f} ({line.dice.low:+.3f} to "
            f"{line.dice.high:+.3f}), IoU {line.iou.mean:+.3f} ({line.iou.low:+.3f} to {line.iou.high:+.3f}), "
            + ("too few slices for a paired test" if np.isnan(line.p) else f"signed rank test p = {line.p:.1g}")
            for line in lines if line.dice is not None and line.iou is not None]


def volume_table(results: Sequence[Record], title: str) -> Table | None:
    """Dice of every volume and system for a terminal, means over seeds; None for a single stack."""
    systems = by_system(results)
    if not systems or patients_of(next(iter(systems.values()))) is None:
        return None
    dice = {name: {volume: float(np.mean(each)) for volume, each in volume_dice(own).items()}
            for name, own in systems.items()}
    table = Table(title=title, caption=DISCLAIMER, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("volume", overflow="fold")
    for name in dice:
        table.add_column(name.replace("-", "\n"), justify="right")
    for volume in next(iter(dice.values())):
        table.add_row(volume, *(_dice(each[volume]) for each in dice.values()))
    table.add_section()
    table.add_row("mean", *(_dice(float(np.nanmean(list(each.values())))) for each in dice.values()))
    return table


def _dice(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.2f}"


def cost_markdown(lines: Sequence[Line]) -> str:
    """What each system needs: parameters of the nets that answer, and seconds of training a seed, lungs included."""
    rows = [f"| {line.title} | {'–' if line.parameters is None else f'{line.parameters:,}'} | "
            f"{'–' if line.seconds is None else f'{line.seconds:.0f}'} |" for line in lines]
    return "\n".join(["| | parameters | seconds of training |", "|---|--:|--:|", *rows])


# --- ablation -------------------------------------------------------------------------------------------------------

Change = Callable[[Profile], Profile]


def _mil(**changes: Any) -> Change:
    return lambda p: replace(p, mil=replace(p.mil, **changes))


def _order(order: str) -> Change:
    def change(p: Profile) -> Profile:
        curriculum = replace(p.mil.curriculum, order=order)
        if order == "none":  # all patches from the first step on, with full weight
            curriculum = replace(curriculum, weights=(curriculum.weights[-1],) * len(curriculum.weights))
        return replace(p, mil=replace(p.mil, curriculum=curriculum))
    return change


def _exchange(exchange: str) -> Change:
    def change(p: Profile) -> Profile:
        p = replace(p, mutual=replace(p.mutual, exchange=exchange))
        # Patches that know nothing of the map get no bags from it, and their labels none of its votes.
        return p if exchange != "none" else replace(p, mil=replace(p.mil, component_weight=0.0),
                                                    fine=replace(p.fine, cam_share=0.0))
    return change


def _paint(**changes: Any) -> Change:
    """Paint changed for patches and segmenter; without vessels they also go from the classifier's slices."""
    def change(p: Profile) -> Profile:
        if "vessels" in changes:
            p = replace(p, classifier=replace(p.classifier, paint=replace(p.classifier.paint, vessels=0.0)))
        return repainted(p, **changes)
    return change


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        title: what was changed.
        change: makes the variant's settings.
        measure: trains and measures what is missing; the third argument says whether to train with the masks of the
            training slices as well.
    """

    title: str
    change: Change
    measure: Callable[[Run, Dataset, bool | None], Evaluation] = lambda run, test, bound: evaluate_run(
        run, test, upper_bound=bound)


VARIANTS = {
    "whole": Variant("the whole method", lambda p: p),
    "threshold-lungs": Variant("threshold lungs, not completed",
                               lambda p: replace(p, lung_net=replace(p.lung_net, steps=0))),
    "no-curriculum": Variant("no curriculum: all patches at once", _order("none")),
    "random-order": Variant("curriculum in random order", _order("random")),
    "reversed-order": Variant("curriculum reversed: hardest first", _order("reversed")),
    "patch-10": Variant("patches of 10 pixels", _mil(patch=10)),
    "patch-grid": Variant("5 x 5 grid over each coarse component", _mil(reading="grid")),
    "mean-pooling": Variant("mean pooling in place of attention", _mil(pooling="mean")),
    "no-zeros": Variant("lesion-free slices not held at zero", _mil(zeros=0.0)),
    "true-lungs": Variant("true lungs where the data has them", lambda p: replace(p, true_lungs=True)),
    "no-exchange": Variant("no exchange: patches from slice labels alone", _exchange("none")),
    "one-way": Variant("exchange one way: map to patches", _exchange("to_patches")),
    "no-vessels": Variant("no painted vessels", _paint(vessels=0.0)),
    "faithful": Variant("no painted lesions, vessels only (faithful)", faithful),
    "no-paint": Variant("nothing painted", _paint(share=0.0, vessels=0.0)),
    "pixel-masks": Variant("full supervision on the test set, 5-fold cross-validation", lambda p: p,
                           lambda run, test, bound: cross_validated(run, test)),
}


def chosen(names: list[str] | None) -> list[str]:
    """Names of variants, all of them by default.

    Raises:
        SettingsError: there is no such variant.
    """
    for name in names or []:
        one_of(name, VARIANTS, "variant")
    return list(dict.fromkeys(names)) if names else list(VARIANTS)


def ablate(run: Run, test: Dataset, names: list[str] | None = None, *, log: Log = print,
           upper_bound: bool | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Trains and measures variants of a run, one after the other.

    Args:
        run: data, settings, seed and folder of the whole method.
        test: measured slices, with masks.
        names: keys of :data:`VARIANTS`; default all.
        upper_bound: also measure full supervision, in the variant ``whole`` only; needs masks of the training slices.

    Yields:
        Name and the JSON of its evaluation, see :func:`covidseg.evaluation.tables.evaluation_json`.
    """
    measured = measured_key(test)
    for name in chosen(names):
        profile = VARIANTS[name].change(run.profile)
        if names is None and profile.true_lungs and any(case.lung is None for case in run.data.cases):
            log(f"ablation: {name} left out, the training set has no true lungs")
            continue
        variant = Run(run.data, profile, run.seed, run.folder, run.device.type, log)
        tested = fingerprint(variant.key("segmenter"), measured)
        path = run.folder / "ablation" / f"{name}-{tested}.json"
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
        else:
            log(f"ablation: {VARIANTS[name].title}")
            result = VARIANTS[name].measure(variant, test, upper_bound if name == "whole" else False)
            content = {"name": name, "title": VARIANTS[name].title, **evaluation_json(result)}
            write_text(path, json.dumps(content, indent=2) + "\n")
        yield name, content


def ablation_rows(results: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Rows of the table: the stages of the whole method first, then patches and segmenter of each variant.

    Returns:
        Title and the row's JSON (``micro`` and ``macro`` figures) of each.
    """
    return [(f"{result['title']}: {row['name']}", row) for result in results for row in result["rows"]
            if result["name"] == "whole" or row["name"] in ("Patch MIL", "Segmenter")]
