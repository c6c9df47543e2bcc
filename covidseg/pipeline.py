"""All stages in order, each computed once and stored: what the command line and the chapters call.

``Run`` is a folder plus a recipe. Asking it for a stage computes whatever is missing before that stage; asking
again, from another chapter or after a break, reads what is stored.

What the result of each stage depends on is one hash, its key, under which it is stored and found again. A stage's key
is made from its settings, the seed and the key of the stage before it, so that a change concerns that stage and all
after it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg import DISCLAIMER
from covidseg.classifier import Classifier, Committee, Lesson, train_committee
from covidseg.curriculum import Phase, Round, agreement, best_round, make_lesson, settled
from covidseg.data.folder import Dataset, load_dataset
from covidseg.data.registry import resolve
from covidseg.data.splits import apply_split, read_split
from covidseg.errors import ArtifactError
from covidseg.gradcam import activation_maps, coarse_labels
from covidseg.lungnet import make_lung_net, robust_lungs, train_lung_net
from covidseg.lungs import lung_masks
from covidseg.parallel import is_first
from covidseg.patches import PatchNet, patch_probabilities, train_mil
from covidseg.preprocess import Crops, WeakSet, make_crops, uncrop_all, weak_set, with_true_lungs
from covidseg.profiles import REPORT, Profile, profile_json, profile_named
from covidseg.segmenter import FineLabels, fine_labels, make_segmenter, train_segmenter, trusting
from covidseg.store import Arrays, Store, environment, file_hash, fingerprint, load_net, net_arrays, write_with_hash
from covidseg.training import Log, pick_device

MakeNet = Callable[[], nn.Module]


def find_lungs(pixels: np.ndarray, net: nn.Module | None, profile: Profile,
               volume: bool | None = None) -> tuple[np.ndarray, Crops]:
    """See :meth:`Run.crops`; ``net`` is the lung net, or None."""
    lungs = lung_masks(pixels, profile.lungs, volume)
    found = np.flatnonzero(lungs.any(axis=(1, 2)))
    crops = make_crops(pixels[found], lungs[found], profile.prepare)
    return found, robust_lungs(net, crops, profile.lung_net)


class Run:
    """One training run on one data folder.

    Args:
        data: the training volumes; only images and slice labels are opened.
        profile: settings of all stages.
        seed: of all stages.
        folder: where results are stored.
        device: ``auto``, ``cpu`` or ``cuda``.
        log: receives one line an epoch.
    """

    def __init__(self, data: Dataset, profile: Profile, seed: int, folder: Path, device: str = "auto",
                 log: Log = print) -> None:
        self.data, self.profile, self.seed, self.folder = data, profile, seed, folder
        self.device, self.log = pick_device(device), log
        self.store, self.key = Store(folder / "stages", log), Keys(data, profile, seed)  # called with a stage's name
        self._memory: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Keeps a result in memory for the life of this object."""
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]

    def stages(self) -> list[str]:
        """Names of all stored stages, in order; trains the rounds if need be, since they decide how many there are."""
        of_round = ("classifier", "cam", "mil", "patches")
        rounds = [f"{name}{k}" for k in range(1, len(self.rounds()) + 1) for name in of_round]
        net = ["lung_net"] if self.profile.lung_net.steps else []
        return ["threshold", *net, "weak", *rounds, "rounds", "fine", "segmenter"]

    def threshold(self) -> WeakSet:
        """Stage 1: crops to the threshold lungs, and the slice labels."""
        def make() -> tuple[Arrays, dict[str, Any]]:
            data = weak_set(self.data, self.profile.prepare, self.profile.lungs)
            return ({"images": data.crops.images.astype(np.float16), "lungs": data.crops.lungs,
                     "boxes": data.crops.boxes, "labels": data.labels},
                    {"patients": data.patients.tolist(), "names": data.names.tolist()})

        def load() -> WeakSet:
            arrays, notes = self.store.get("threshold", self.key("threshold"), make)
            # Stored and used in half precision's steps, so that a stored set trains to the same weights.
            crops = Crops(arrays["images"].astype(np.float32), arrays["lungs"], arrays["boxes"])
            return WeakSet(crops, arrays["labels"], np.array(notes["patients"]), np.array(notes["names"]))
        return self._once("threshold", load)

    def lung_net(self) -> nn.Module | None:
        """Stage 1: the net that completes diseased lungs; None if the profile does without."""
        settings = self.profile.lung_net
        if not settings.steps:
            return None
        return self._net("lung_net", lambda: make_lung_net(settings),
                         lambda: train_lung_net(self.threshold(), settings, seed=self.seed, device=self.device,
                                                log=self.log))

    def weak(self) -> WeakSet:
        """Stage 1: crops with completed lungs, and the slice labels. All that the later stages see."""
        def make() -> tuple[Arrays, dict[str, Any]]:
            crops = (with_true_lungs(self.data, self.threshold()).crops if self.profile.true_lungs else
                     robust_lungs(self.lung_net(), self.threshold().crops, self.profile.lung_net))
            return {"lungs": crops.lungs}, {}

        def load() -> WeakSet:
            before = self.threshold()
            lungs = self.store.get("weak", self.key("weak"), make)[0]["lungs"]
            return replace(before, crops=replace(before.crops, lungs=lungs))
        return self._once("weak", load)

    def crops(self, pixels: np.ndarray, volume: bool | None = None) -> tuple[np.ndarray, Crops]:
        """Finds and crops the lungs of new slices just as those of the training slices; stored, like the stages.

        Args:
            pixels: ``(S, H, W)`` HU or display values.
            volume: as of :func:`covidseg.lungs.lung_masks`.

        Returns:
            Numbers of the slices that have lung, and their crops.
        """
        def make() -> tuple[Arrays, dict[str, Any]]:
            found, crops = find_lungs(pixels, self.lung_net(), self.profile, volume)
            return {"found": found, "images": crops.images, "lungs": crops.lungs, "boxes": crops.boxes}, {}
        values = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        key = fingerprint(self.key("lung_net"), pixels.shape, pixels.dtype.str, values, volume)
        arrays, _ = self.store.get("crops", key, make)
        return arrays["found"], Crops(arrays["images"], arrays["lungs"], arrays["boxes"])

    def lungs(self, pixels: np.ndarray, volume: bool | None = None) -> np.ndarray:
        """Completed lung masks of whole slices, ``(S, H, W)`` bool; arguments as of :meth:`crops`."""
        found, crops = self.crops(pixels, volume)
        return uncrop_all(crops.lungs, crops.boxes, found, pixels.shape) > 0.5

    def _net(self, stage: str, empty: MakeNet, train: MakeNet, key: str = "") -> nn.Module:
        """A trained net: stored weights put into an empty net, or the result of training."""
        def load() -> nn.Module:
            arrays, _ = self.store.get(stage, key or self.key(stage), lambda: (net_arrays(train()), {}))
            return load_net(empty(), arrays).to(self.device)
        return self._once(stage + key, load)

    def committee(self, number: int = 1) -> Committee:
        """Stage 2: the slice classifiers, after round ``number`` of the exchange; round 1 saw slice labels only."""
        settings, stage = self.profile.classifier, f"classifier{number}"

        def train() -> Committee:
            if number == 1:
                return train_committee(self.weak(), settings, seed=self.seed, device=self.device, log=self.log)
            gentle = replace(self._later(settings), rate=self.profile.mutual.gentle * settings.rate)
            return train_committee(
                self.weak(), gentle, start=self.committee(number - 1), lesson=self._lesson(number),
                seed=self.seed + number - 1, device=self.device, log=self.log, name=f"classifier-{number}")
        return self._net(stage, lambda: Committee(settings), train)  # type: ignore[return-value]

    def classifier(self, number: int = 1) -> Classifier:
        """The first of the committee, to look at; in the quick profile it is the only one."""
        return self.committee(number).members[0]  # type: ignore[return-value]

    def _lesson(self, number: int) -> Lesson:
        """What the patches of the round before teach the classifier in round ``number``."""
        return make_lesson(self.weak(), self.cam(number - 1), self.patches(number - 1), self.profile.mutual, number)

    def _later(self, settings: Any) -> Any:
        """The settings of a task in later rounds: fewer steps."""
        return replace(settings, steps=max(1, round(self.profile.mutual.again * settings.steps)))

    def cam(self, number: int = 1) -> np.ndarray:
        """Stage 3: activation maps of all training slices, ``(N, S, S)`` in [0, 1], of the classifier of a round."""
        stage = f"cam{number}"

        def make() -> tuple[Arrays, dict[str, Any]]:
            maps = activation_maps(self.committee(number), self.weak().crops, self.profile.cam)
            return {"cam": maps.astype(np.float16)}, {}
        return self._once(stage, lambda: self.store.get(stage, self.key(stage), make)[0]["cam"].astype(np.float32))

    def coarse(self) -> np.ndarray:
        """Stage 3: coarse labels, ``(N, S, S)`` uint8: 1 lesion, 0 lung, 255 unknown."""
        return coarse_labels(self.cam(), self.weak().labels, self.profile.cam)

    def mil(self, number: int = 1) -> tuple[PatchNet, list[Phase]]:
        """Stage 4: the patch net after a round, and what each phase of its curriculum admitted."""
        stage, settings = f"mil{number}", self.profile.mil

        def make() -> tuple[Arrays, dict[str, Any]]:
            prior = self.cam(number)
            if self.profile.mutual.exchange == "none":  # every patch is as likely as any other
                prior = np.full_like(prior, settings.curriculum.prior)
            net, phases = train_mil(
                self.weak(), prior, settings if number == 1 else self._later(settings),
                start=None if number == 1 else self.mil(number - 1)[0], seed=self.seed + number - 1,
                device=self.device, log=self.log, name="patches" if number == 1 else f"patches-{number}")
            arrays = {f"net.{name}": value for name, value in net_arrays(net).items()}
            for k, phase in enumerate(phases):
                arrays |= {f"phase{k}.{part}": getattr(phase, part) for part in ("target", "difficulty", "admitted")}
            return arrays, {"paces": [phase.pace for phase in phases]}

        def load() -> tuple[PatchNet, list[Phase]]:
            arrays, notes = self.store.get(stage, self.key(stage), make)
            weights = {name.removeprefix("net."): value for name, value in arrays.items() if name.startswith("net.")}
            net = load_net(PatchNet(settings), weights).to(self.device)
            phases = [Phase(pace, *(arrays[f"phase{k}.{part}"] for part in ("target", "difficulty", "admitted")))
                      for k, pace in enumerate(notes["paces"])]
            return net, phases  # type: ignore[return-value]
        return self._once(stage, load)

    def patches(self, number: int = 1) -> np.ndarray:
        """Stage 4: patch probabilities of all training slices on pixels after a round, ``(N, S, S)``."""
        def make() -> tuple[Arrays, dict[str, Any]]:
            return {"patches": patch_probabilities(self.mil(number)[0], self.weak().crops, self.cam(number))}, {}
        stage = f"patches{number}"
        return self._once(stage, lambda: self.store.get(stage, self.key(stage), make)[0]["patches"])

    def rounds(self) -> list[Round]:
        """The exchange between stages 2 and 4: all rounds, trained until the two maps agree no better."""
        def make() -> tuple[Arrays, dict[str, Any]]:
            data, rounds = self.weak(), list[Round]()
            while not rounds or not settled(rounds, self.profile.mutual):
                number = len(rounds) + 1
                common = agreement(data, self.cam(number), self.patches(number))
                taught = 0.0
                if number > 1:
                    ill = data.labels == 1
                    taught = float(self._lesson(number).taught[ill].sum() / data.crops.lungs[ill].sum())
                rounds.append(Round(common, common - rounds[-1].agreement if rounds else float("nan"), taught))
                self.log(f"round {number}: the two maps agree to {common:.3f}")
            return {"rounds": np.array([[r.agreement, r.gain, r.taught] for r in rounds])}, {}
        return self._once("rounds", lambda: [Round(*row) for row in self.store.get(
            "rounds", self.key("rounds"), make)[0]["rounds"].tolist()])

    def best(self) -> int:
        """Number of the round whose nets and maps are used from here on, see :func:`covidseg.curriculum.best_round`."""
        return best_round(self.rounds())

    def fine(self) -> FineLabels:
        """Stage 5: fine labels of all training slices, from the maps of the best round."""
        best = self.best()

        def make() -> tuple[Arrays, dict[str, Any]]:
            fine = fine_labels(self.weak(), self.cam(best), self.patches(best), self.profile.fine)
            return {"labels": fine.labels, "probabilities": fine.probabilities}, {}
        return self._once("fine", lambda: FineLabels(**self.store.get("fine", self.key("fine"), make)[0]))

    def segmenter(self) -> nn.Module:
        """Stage 6: the segmenter trained on the fine labels."""
        settings = self.profile.segmenter
        return self._net("segmenter", lambda: make_segmenter(settings),
                         lambda: train_segmenter(self.weak(), self.fine().targets, self.fine().weights, settings,
                                                 seed=self.seed, device=self.device, log=self.log))

    def supervised(self, masks: np.ndarray) -> nn.Module:
        """The upper bound: the same segmenter and loop taught with true masks of the training slices.

        Args:
            masks: ``(N, S, S)`` bool, from :func:`covidseg.evaluation.evaluate.training_truth`.
        """
        return self.taught_with_masks("supervised", self.masks_key(masks), self.weak(), masks)

    def masks_key(self, masks: np.ndarray, *parts: Any) -> str:
        """Key of a net taught with masks; ``parts`` tell its slices from those of other nets."""
        masks_hash = hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()
        return fingerprint(self.key("weak"), trusting(self.profile.segmenter), self.seed, masks_hash, *parts)

    def taught_with_masks(self, stage: str, key: str, data: WeakSet, masks: np.ndarray, name: str = "") -> nn.Module:
        """The segmenter and its training loop, taught with true masks instead of fine labels.

        Args:
            stage: name under which the net is stored.
            key: from :meth:`masks_key`.
            data: slices whose labels say which of them have a lesion in their mask.
            masks: ``(N, S, S)`` bool.
            name: of this training in the log, default that of the stage.
        """
        settings = trusting(self.profile.segmenter)
        return self._net(stage, lambda: make_segmenter(settings),
                         lambda: train_segmenter(data, masks, np.ones(masks.shape, np.float32), settings,
                                                 seed=self.seed, device=self.device, log=self.log, name=name or stage),
                         key)


def open_data(name: str, part: str | None = None) -> Dataset:
    """A data folder or registered set, or one side of its split by patient.

    Args:
        name: a folder, or a name from ``covidseg data list``.
        part: ``train`` or ``test``; None takes everything.

    Raises:
        DatasetError: the set is not there, or has no split although one side was asked for.
    """
    data = load_dataset(resolve(name))
    return data if part is None else apply_split(data, read_split(name), part)


def open_run(data: str = "phantom", profile: str = "quick", seed: int = 0, folder: Path | str | None = None,
             part: str | None = "train", device: str = "auto", log: Log = print, method: str = "extended",
             check: bool = True) -> Run:
    """The run of a data set, profile and seed; made if it does not exist.

    Args:
        data: a folder, or a name from ``covidseg data list``.
        profile: ``quick`` or ``full``.
        folder: where to store it; default ``$COVIDSEG_RUNS`` (or ``runs``) ``/DATA-PROFILE-METHOD-seedN``.
        part: the side of the set's split to train on; None takes all volumes.
        device: ``auto``, ``cpu`` or ``cuda``.
        method: ``extended`` or ``faithful``.
        check: whether the scans have to look like chest CT.
    """
    if folder is None:
        folder = Path(os.environ.get("COVIDSEG_RUNS", "runs")) / f"{Path(data).name}-{profile}-{method}-seed{seed}"
    torch.set_float32_matmul_precision("high")
    found = replace(open_data(data, part), check=check)
    if silent := [case.id for case in found.cases if not case.labels]:
        log(f"without a label, and so without a part in training: {', '.join(silent)}")
    return Run(found, profile_named(profile, method), seed, Path(folder), device, log)


# --- keys -----------------------------------------------------------------------------------------------------------

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


# --- the report of a run --------------------------------------------------------------------------------------------

def write_run(run: Run, command: str) -> Path:
    """Writes ``run.json``, which makes a folder of stages a run that ``covidseg predict`` can use.

    Of several processes all have to call it, since the first asks the others about stages that it has to read.

    ``seconds`` holds what each stage took when it was made, also if that was in an earlier run in the same folder; null
    for a stage whose file was deleted or damaged since, which the stages after it, once stored, can do without. So do
    ``peak_memory_mb``, of the process until the stage was done, and ``warnings``, of all stages together.

    Args:
        command: what was asked for, without folder names of this machine.
    """
    path, stages = run.folder / REPORT, run.stages()
    notes = {stage: _notes(run, stage) for stage in stages}
    content = {
        "note": DISCLAIMER, "command": command, "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": {stage: found.get("seconds") for stage, found in notes.items()},
        "peak_memory_mb": {stage: found.get("peak_memory_mb") for stage, found in notes.items()},
        "warnings": list(dict.fromkeys(text for found in notes.values() for text in found.get("warnings", []))),
        "seed": run.seed, "environment": environment(run.device),
        "data": {case.id: file_hash(case.image) for case in run.data.cases},
        "labelled_slices": run.data.labels(), "settings": profile_json(run.profile),
        "stages": {stage: run.store.path(stage, run.key(stage)).name for stage in stages}, "best_round": run.best(),
    }
    if is_first():
        with run.store.alone(path):  # report and checksum have to be of the same program
            write_with_hash(path, json.dumps(content, indent=2) + "\n")
    return path


def _notes(run: Run, stage: str) -> dict[str, Any]:
    """The notes of a stage; empty if its file is gone or cannot be read."""
    try:
        return run.store.notes(stage, run.key(stage))
    except ArtifactError:
        return {}
