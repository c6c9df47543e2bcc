"""Draws the picture of the README: one slice of the phantom on its way through the stages, by the nets of the package.

``python tools/readme_picture.py`` writes ``chapters/images/stages.png``; ``make nets`` does so after it shipped other
nets. The file names the nets that drew it, so that a test notices a picture of older ones.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from covidseg.book import figures as viz
from covidseg.book.lesson import SHIPPED, open_lesson
from covidseg.evaluation.evaluate import Unseen
from covidseg.evaluation.metrics import confusion
from covidseg.evaluation.statistics import slice_dice
from covidseg.gradcam import activation_maps
from covidseg.patches import patch_probabilities
from covidseg.pipeline import Run
from covidseg.segmenter import lesion_probabilities
from covidseg.store import file_hash, fingerprint

PICTURE = Path(__file__).resolve().parents[1] / "chapters" / "images" / "stages.png"
TITLES = ('slice, labelled "lesion"', "lungs", "coarse: Grad-CAM", "fine: 5 × 5 patches", "segmenter, and truth")


def nets_hash(shipped: Path = SHIPPED) -> str:
    """Says which nets come with the package."""
    return fingerprint(*(file_hash(path) for path in sorted(shipped.glob("*.safetensors"))))


def typical(drawn: np.ndarray, look: Unseen) -> int:
    """Of the slices with more lesion than most, the one with the median Dice: neither best nor worst."""
    size = look.truth.sum(axis=(1, 2))
    much = np.flatnonzero(size >= np.median(size[look.labels == 1]))
    dice = slice_dice(confusion(drawn[much], look.truth[much]))
    return int(much[np.argsort(dice)[len(dice) // 2]])


def draw(run: Run, look: Unseen) -> Figure:
    """A typical test slice: its lungs, the maps of both tasks, what is outlined, and the truth."""
    profile, last = run.profile, run.profile.mutual.last
    drawn = lesion_probabilities(run.segmenter(), look.crops) >= profile.segmenter.threshold
    pick = typical(drawn, look)
    crop = look.crops.take(np.array([pick]))
    first, later = (activation_maps(run.ensemble(number), crop, profile.cam) for number in (1, last))

    figure, axes = viz.new_figure(1, 5, (2.25, 2.75))
    for panel, title in zip(axes[0], TITLES, strict=True):
        viz.draw_slice(panel, crop.images[0], title=title)
    viz.overlay(axes[0, 1], {"lung": crop.lungs[0]})
    viz.draw_heat(axes[0, 2], first[0], crop.lungs[0])
    bar = viz.draw_heat(axes[0, 3], patch_probabilities(run.mil(last)[0], crop, later)[0], crop.lungs[0])
    viz.overlay(axes[0, 4], {"truth": look.truth[pick], "prediction": drawn[pick]})
    viz.legend(figure, ["lung", "truth", "prediction"])
    figure.colorbar(bar, ax=axes[0], fraction=0.02, label="maps: evidence, 0 to 1")
    return figure


def main(target: Path = PICTURE) -> None:
    viz.use_style()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["COVIDSEG_RUNS"] = folder  # an empty one, so that all nets are those of the package
        lesson = open_lesson()
        figure = draw(lesson.run, lesson.look)
    figure.savefig(target, metadata={"Software": None, "Source": nets_hash()})


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
