"""What the result of each stage depends on, as one hash: a result is stored and found again under this key.

A stage's key is made from its settings, the seed and the key of the stage before it, so that a change concerns that
stage and all after it.
"""

from __future__ import annotations

import functools

from covidseg.artifacts import fingerprint
from covidseg.dataset import Dataset
from covidseg.profiles import Profile


class Keys:
    """Keys of the stages of one run; ``keys("cam2")`` is that of the activation maps after round 2.

    Args:
        data: the training volumes.
        profile: settings of all stages.
        seed: of all stages.
    """

    def __init__(self, data: Dataset, profile: Profile, seed: int) -> None:
        self.data, self.profile, self.seed = data, profile, seed

    def __call__(self, stage: str) -> str:
        p = self.profile
        if stage == "threshold":
            return self._threshold
        if stage == "rounds":
            return fingerprint(self("mil1"), p.mutual)
        if stage == "fine":
            return fingerprint(self("rounds"), p.fine)
        if stage == "weak":
            lungs = [case.lung for case in self.data.cases if case.lung] if p.true_lungs else []
            return fingerprint(self("lung_net"), p.true_lungs, *lungs)
        if stage.startswith("patches"):  # the patch net's maps, with no setting of their own
            return fingerprint(self(stage.replace("patches", "mil")), "maps")
        name, number = stage.rstrip("0123456789"), int(stage.lstrip("abcdefghijklmnopqrstuvwxyz_") or 1)
        before, settings = {
            "lung_net": ("threshold", p.lung_net),
            "classifier": ("weak" if number == 1 else f"mil{number - 1}", p.classifier),
            "cam": (f"classifier{number}", p.cam), "mil": (f"cam{number}", p.mil), "segmenter": ("fine", p.segmenter),
        }[name]
        # Round 1 is the same for every exchange, but for patches that get no prior at all.
        exchange = (p.mutual, number) if number > 1 else (p.mutual.exchange == "none",) if name == "mil" else ()
        return fingerprint(self(before), settings, self.seed, *exchange)

    @functools.cached_property
    def _threshold(self) -> str:
        """That of the first stage; reads all scans, and so only once."""
        return fingerprint(self.profile.lungs, self.profile.prepare, *(
            part for case in self.data.cases for part in (case.image, case.patient, sorted(case.labels.items()))))


def measured_key(test: Dataset) -> str:
    """Key of a test set: its pictures, masks and lungs, and its labels, which decide what is measured."""
    cases = [(case.id, case.patient, sorted(case.labels.items())) for case in test.cases]
    files = [path for case in test.cases for path in (case.image, case.mask, case.lung) if path is not None]
    return fingerprint(cases, *files)
