"""The nets of the phantom's default run, which come with the package so that a chapter starts at once.

`make book` trains every stage in its chapter and then asks :func:`differences` whether the shipped nets say the same.
Training ends a little differently on another processor; a net of other settings or of an older recipe says something
else. After such a change `make nets` ships those of the last build.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from covidseg.book.lesson import NETS, SHIPPED, bring, ship
from covidseg.gradcam import activation_maps
from covidseg.lungnet import robust_lungs
from covidseg.patches import patch_probabilities
from covidseg.pipeline import Run, open_run
from covidseg.preprocess import Crops
from covidseg.segmenter import lesion_probabilities

# Mean difference of two maps in [0, 1] over the lung. Two seeds differ by three times as much.
TOLERANCE = 0.1


def answers(run: Run, crops: Crops) -> dict[str, np.ndarray]:
    """What each net of a run says of the same slices, maps ``(N, S, S)`` in [0, 1]."""
    cams = activation_maps(run.ensemble(), crops, run.profile.cam)
    return {"lung_net": robust_lungs(run.lung_net(), crops, run.profile.lung_net).lungs,
            "classifier1": cams, "mil1": patch_probabilities(run.mil()[0], crops, cams),
            "segmenter": lesion_probabilities(run.segmenter(), crops)}


def differences(run: Run, shipped: Path = SHIPPED) -> dict[str, float]:
    """Mean difference over the lung between what the nets of a run say and what the shipped ones say, by stage.

    Empty if the shipped nets are of other settings or another seed.
    """
    with TemporaryDirectory() as folder:
        other = Run(run.data, run.profile, run.seed, Path(folder), "cpu", lambda line: None)
        if not bring(other, NETS, shipped):
            return {}
        crops = run.weak().crops.take(np.arange(0, len(run.weak()), 8))
        ours, theirs = answers(run, crops), answers(other, crops)
    return {stage: float(np.abs(ours[stage].astype(float) - theirs[stage])[crops.lungs].mean()) for stage in ours}


def check(run: Run) -> tuple[bool, str]:
    """Whether the shipped nets say what those that the chapters train do, and that in a line."""
    found = differences(run)
    if not found:
        return False, "the shipped nets are of other settings; run `make nets`"
    told = ", ".join(f"{stage} {value:.3f}" for stage, value in found.items())
    if all(value <= TOLERANCE for value in found.values()):  # not so for a difference that is no number
        return True, f"the shipped nets say what the chapters train (differences {told})"
    return False, f"the shipped nets differ from those trained ({told}); run `make nets`"


def last_run(runs: Path) -> Run:
    """The phantom's default run of the last build."""
    return open_run("phantom", folder=runs / "phantom-quick-extended-seed0", device="cpu", log=lambda line: None)


if __name__ == "__main__":  # `make nets`
    written = ship(last_run(Path(sys.argv[1])))
    print(f"{len(written)} files, {sum(path.stat().st_size for path in written) / 1e6:.1f} MB in {SHIPPED.name}/")
