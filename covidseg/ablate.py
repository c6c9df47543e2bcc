"""What does each part of the method add? The same data and seed, one thing changed at a time.

All variants live in one folder of stages: a stage that a change does not touch is trained once and shared. Each
finished variant leaves a small JSON file, so that an ablation that was stopped goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from covidseg.artifacts import fingerprint, write_text
from covidseg.crossval import cross_validated
from covidseg.dataset import Dataset
from covidseg.errors import one_of
from covidseg.evaluate import Evaluation, evaluate_run
from covidseg.keys import measured_key
from covidseg.pipeline import Run
from covidseg.profiles import Profile, faithful, repainted
from covidseg.report import evaluation_json
from covidseg.train import Log

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
        Name and the JSON of its evaluation, see :func:`covidseg.report.evaluation_json`.
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
