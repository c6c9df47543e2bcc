"""The recipe: all stages in order, each computed once and stored. Command line and chapters call it.

A :class:`Run` is a folder plus a recipe. Asking it for a stage computes whatever is missing before that stage; asking
again, from another chapter or after a break, reads what is stored. A result lies under its *key*, a hash of all that it
depends on: settings, seed, and the key of the stage before it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg import DISCLAIMER
from covidseg.classifier import Classifier, Ensemble, train_ensemble
from covidseg.curriculum import Phase, agreement, make_guidance
from covidseg.data.folder import Dataset, load_dataset, named
from covidseg.data.registry import resolve
from covidseg.data.splits import apply_split, read_split, split_names
from covidseg.devices import is_first, pick_device
from covidseg.errors import ArtifactError, SettingsError
from covidseg.gradcam import activation_maps, coarse_labels
from covidseg.lungnet import make_lung_net, robust_lungs, train_lung_net
from covidseg.lungs import threshold_lungs
from covidseg.patches import PatchNet, patch_probabilities, train_mil
from covidseg.preprocess import Crops, WeakSet, make_crops, uncrop_all, weak_set, with_true_lungs
from covidseg.profiles import REPORT, Profile, profile_json, profile_named, same_run
from covidseg.segmenter import FineLabels, fine_labels, make_segmenter, supervised_settings, train_segmenter
from covidseg.store import (
    Arrays,
    Form,
    Notes,
    Store,
    array_form,
    code_hash,
    environment,
    file_hash,
    fingerprint,
    net_form,
    set_aside,
    write_with_hash,
)
from covidseg.training import History, Log


def _mil(empty: Callable[[], PatchNet], device: torch.device) -> Form:
    """The patch net and the phases of its curriculum."""
    parts = ("target", "difficulty", "admitted")

    def pack(result: tuple[PatchNet, list[Phase]]) -> tuple[Arrays, Notes]:
        net, phases = result
        arrays, notes = net_form(empty, device).pack(net)
        of_phases = {f"phase{k}.{part}": getattr(phase, part) for k, phase in enumerate(phases) for part in parts}
        return {f"net.{name}": value for name, value in arrays.items()} | of_phases, \
            notes | {"paces": [phase.pace for phase in phases]}

    def unpack(arrays: Arrays, notes: Notes) -> tuple[nn.Module, list[Phase]]:
        weights = {name.removeprefix("net."): value for name, value in arrays.items() if name.startswith("net.")}
        return net_form(empty, device).unpack(weights, notes), [
            Phase(pace, *(arrays[f"phase{k}.{part}"] for part in parts)) for k, pace in enumerate(notes["paces"])]
    return Form(pack, unpack)


# Pictures are stored and used in half precision's steps, so that a stored set trains to the same weights.
_SLICES = Form(
    lambda data: ({"images": data.crops.images.astype(np.float16), "lungs": data.crops.lungs, "boxes": data.crops.boxes,
                   "labels": data.labels}, {"patients": data.patients.tolist(), "names": data.names.tolist()}),
    lambda arrays, notes: WeakSet(Crops(arrays["images"].astype(np.float32), arrays["lungs"], arrays["boxes"]),
                                  arrays["labels"], np.array(notes["patients"]), np.array(notes["names"])))
_CROPS = Form(lambda result: ({"found": result[0], "images": result[1].images, "lungs": result[1].lungs,
                               "boxes": result[1].boxes}, {}),
              lambda arrays, _: (arrays["found"], Crops(arrays["images"], arrays["lungs"], arrays["boxes"])))
_FINE = Form(lambda fine: ({"labels": fine.labels, "probabilities": fine.probabilities}, {}),
             lambda arrays, _: FineLabels(**arrays))


def find_lungs(pixels: np.ndarray, net: nn.Module | None, profile: Profile,
               volume: bool | None = None, aspect: float = 1.0) -> tuple[np.ndarray, Crops]:
    """Finds and crops the lungs of slices; ``net`` is the lung net, or None. See :meth:`Run.crops`."""
    lungs = threshold_lungs(pixels, profile.lungs, volume, aspect=aspect)
    found = np.flatnonzero(lungs.any(axis=(1, 2)))
    crops = make_crops(pixels[found], lungs[found], profile.prepare, aspect)
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
        self.store = Store(folder / "stages", log)
        self._memory: dict[str, Any] = {}

    # --- the recipe -------------------------------------------------------------------------------------------------

    def threshold(self) -> WeakSet:
        """Chapters 1 and 2: crops to the threshold lungs, and the slice labels."""
        return self._stage("threshold", _SLICES, lambda: weak_set(self.data, self.profile.prepare, self.profile.lungs))

    def lung_net(self) -> nn.Module | None:
        """Chapter 2: the net that completes diseased lungs; None if the profile does without."""
        settings = self.profile.lung_net
        return None if not settings.steps else self._stage(
            "lung_net", net_form(lambda: make_lung_net(settings), self.device),
            lambda: train_lung_net(self.threshold(), settings, **self._how()))

    def weak(self) -> WeakSet:
        """Chapter 2: crops with completed lungs, and the slice labels. All that the later stages see."""
        data = self.threshold()
        lungs = self._stage("weak", array_form("lungs"), lambda: (
            with_true_lungs(self.data, data).crops if self.profile.true_lungs else
            robust_lungs(self.lung_net(), data.crops, self.profile.lung_net)).lungs)
        return replace(data, crops=replace(data.crops, lungs=lungs))

    def ensemble(self, number: int = 1) -> Ensemble:
        """Chapter 3: the slice classifiers after a round of the exchange; in round 1 they saw slice labels only."""
        settings = self.profile.classifier

        def make() -> Ensemble:
            if number == 1:
                return train_ensemble(self.weak(), settings, **self._how())
            painted = replace(settings, paint=replace(settings.paint, share=self.profile.mutual.painted))
            guidance = make_guidance(self.weak(), self.patches(number - 1), self.profile.mutual, number)
            return train_ensemble(self.weak(), painted, guidance=guidance, **self._how(number),
                                  name=f"classifier-{number}")
        return self._stage(f"classifier{number}", net_form(lambda: Ensemble(settings), self.device), make)

    def classifier(self, number: int = 1) -> Classifier:
        """The first of the ensemble, to look at; in the quick profile it is the only one."""
        return self.ensemble(number).members[0]  # type: ignore[return-value]

    def cam(self, number: int = 1) -> np.ndarray:
        """Chapter 4: activation maps of all training slices after a round, ``(N, S, S)`` in [0, 1]."""
        return self._stage(f"cam{number}", array_form("cam", np.float16), lambda: activation_maps(
            self.ensemble(number), self.weak().crops, self.profile.cam))

    def coarse(self) -> np.ndarray:
        """Chapter 4: coarse labels, ``(N, S, S)`` uint8: 1 lesion, 0 lung, 255 unknown."""
        return coarse_labels(self.cam(), self.weak().labels, self.profile.cam)

    def mil(self, number: int = 1) -> tuple[PatchNet, list[Phase]]:
        """Chapter 5: the patch net after a round, and what each phase of its curriculum admitted."""
        settings = self.profile.mil

        def make() -> tuple[PatchNet, list[Phase]]:
            prior = self.cam(number)
            if self.profile.mutual.exchange == "none":  # every patch is as likely as any other
                prior = np.full_like(prior, settings.curriculum.prior)
            if number == 1:
                return train_mil(self.weak(), prior, settings, **self._how())
            later = replace(settings, steps=max(1, round(self.profile.mutual.again * settings.steps)))
            return train_mil(self.weak(), prior, later, start=self.mil(number - 1)[0], **self._how(number),
                             name=f"patches-{number}")
        return self._stage(f"mil{number}", _mil(lambda: PatchNet(settings), self.device), make)

    def patches(self, number: int = 1) -> np.ndarray:
        """Chapter 5: patch probabilities of all training slices on pixels after a round, ``(N, S, S)``."""
        return self._stage(f"patches{number}", array_form("patches"), lambda: patch_probabilities(
            self.mil(number)[0], self.weak().crops, self.cam(number)))

    def agreements(self) -> list[float]:
        """Chapter 6: how far the two maps agree after each round of the exchange, in [0, 1]; to look at."""
        return [agreement(self.weak(), self.cam(number), self.patches(number))
                for number in range(1, self.profile.mutual.last + 1)]

    def fine(self) -> FineLabels:
        """Chapter 7: fine labels of all training slices, from the maps of the last round."""
        def make() -> FineLabels:
            for number, common in enumerate(self.agreements(), start=1):
                self.log(f"round {number}: the two maps agree to {common:.3f}")
            last = self.profile.mutual.last
            return fine_labels(self.weak(), self.cam(last), self.patches(last), self.profile.fine)
        return self._stage("fine", _FINE, make)

    def segmenter(self) -> nn.Module:
        """Chapter 7: the segmenter trained on the fine labels."""
        settings = self.profile.segmenter
        return self._stage(
            "segmenter", net_form(lambda: make_segmenter(settings), self.device), lambda: train_segmenter(
                self.weak(), self.fine().targets, self.fine().weights, settings, **self._how()))

    # --- what the recipe is made with -------------------------------------------------------------------------------

    def _how(self, number: int = 1) -> dict[str, Any]:
        """What every training is told, in a round of the exchange."""
        return {"seed": self.seed + number - 1, "device": self.device, "log": self.log}

    def _stage(self, name: str, form: Form, make: Callable[[], Any], key: str = "") -> Any:
        """A result: from memory, from the store, or made and stored."""
        if name + key not in self._memory:
            self._memory[name + key] = form.unpack(
                *self.store.get(name, key or self.key(name), lambda: form.pack(make())))
        return self._memory[name + key]

    def key(self, stage: str) -> str:
        """The key of a stage; ``key("cam2")`` is that of the activation maps after round 2."""
        if stage == "threshold":
            return self._first_key
        name, digits = re.fullmatch(r"(\D+)(\d*)", stage).groups()  # type: ignore[union-attr]
        p, number = self.profile, int(digits or 1)
        # Round 1 is the same for every exchange, but for patches that get no prior at all.
        mutual = (p.mutual, number) if number > 1 else ()
        before, *rest = {
            "lung_net": ("threshold", p.lung_net, self.seed),
            "weak": ("lung_net", p.true_lungs, *(case.lung for case in self.data.cases if case.lung and p.true_lungs)),
            "classifier": ("weak" if number == 1 else f"mil{number - 1}", p.classifier, self.seed, *mutual),
            "cam": (f"classifier{number}", p.cam, self.seed, *mutual),
            "mil": (f"cam{number}", p.mil, self.seed, *(mutual or [p.mutual.exchange == "none"])),
            "patches": (f"mil{number}", "maps"),  # no setting of their own
            "fine": (f"patches{p.mutual.last}", p.fine),
            "segmenter": ("fine", p.segmenter, self.seed)}[name]
        return fingerprint(self.key(before), *rest)

    @functools.cached_property
    def _first_key(self) -> str:
        """That of the first stage; reads all scans, and so only once."""
        return fingerprint(code_hash(), self.profile.lungs, self.profile.prepare, self.data.check, *(
            part for case in self.data.cases
            for part in (case.id, case.image, case.patient, sorted(case.labels.items()))))

    def stages(self) -> list[str]:
        """Names of all stored stages, in order."""
        of_round = ("classifier", "cam", "mil", "patches")
        rounds = [f"{name}{k}" for k in range(1, self.profile.mutual.last + 1) for name in of_round]
        net = ["lung_net"] if self.profile.lung_net.steps else []
        return ["threshold", *net, "weak", *rounds, "fine", "segmenter"]

    def history(self, stage: str) -> History:
        """The losses of a trained stage: one entry an epoch, with the step and the mean of each loss.

        Raises:
            ArtifactError: the stage is not stored.
        """
        return self.store.notes(stage, self.key(stage)).get("history", [])

    # --- what is asked of a run besides its stages ------------------------------------------------------------------

    def crops(self, pixels: np.ndarray, volume: bool | None = None,
              aspect: float = 1.0) -> tuple[np.ndarray, Crops]:
        """Finds and crops the lungs of new slices just as those of the training slices; stored, like the stages.

        Args:
            pixels: ``(S, H, W)`` HU or display values.
            volume: whether the slices are one body in order; by default that is measured.
            aspect: height of a pixel over its width, :meth:`covidseg.data.scan.Scan.aspect`.

        Returns:
            Numbers of the slices that have lung, and their crops.
        """
        values = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
        key = fingerprint(self.key("lung_net"), pixels.shape, pixels.dtype.str, values, volume, aspect)
        return _CROPS.unpack(*self.store.get(
            "crops", key, lambda: _CROPS.pack(find_lungs(pixels, self.lung_net(), self.profile, volume, aspect))))

    def lungs(self, pixels: np.ndarray, volume: bool | None = None, aspect: float = 1.0) -> np.ndarray:
        """Completed lung masks of whole slices, ``(S, H, W)`` bool; the arguments are those of :meth:`crops`."""
        found, crops = self.crops(pixels, volume, aspect)
        return uncrop_all(crops.lungs, crops.boxes, found, pixels.shape) > 0.5

    def supervised(self, masks: np.ndarray) -> nn.Module:
        """The upper bound: the same segmenter and loop taught with true masks of the training slices.

        Args:
            masks: ``(N, S, S)`` bool, from :func:`covidseg.evaluation.evaluate.training_truth`.
        """
        return self.taught_with_masks("supervised", self.masks_key(masks), self.weak(), masks)

    def masks_key(self, masks: np.ndarray, *parts: Any) -> str:
        """Key of a net taught with masks; ``parts`` tell its slices from those of other nets."""
        masks_hash = hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()
        return fingerprint(self.key("weak"), supervised_settings(self.profile.segmenter), self.seed, masks_hash, *parts)

    def taught_with_masks(self, stage: str, key: str, data: WeakSet, masks: np.ndarray, name: str = "") -> nn.Module:
        """The segmenter and its training loop, taught with true masks instead of fine labels.

        Args:
            stage: name under which the net is stored.
            key: from :meth:`masks_key`.
            data: slices whose labels say which of them have a lesion in their mask.
            masks: ``(N, S, S)`` bool.
            name: of this training in the log, default that of the stage.
        """
        settings = supervised_settings(self.profile.segmenter)
        return self._stage(stage, net_form(lambda: make_segmenter(settings), self.device), lambda: train_segmenter(
            data, masks, np.ones(masks.shape, np.float32), settings, **self._how(), name=name or stage), key)


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
             part: str | None = "default", device: str = "auto", log: Log = print, method: str = "extended",
             check: bool = True) -> Run:
    """The run of a data set, profile and seed; made if it does not exist.

    Args:
        data: a folder, or a name from ``covidseg data list``.
        profile: ``quick`` or ``full``.
        folder: where to store it; default ``$COVIDSEG_RUNS`` (or ``runs``) ``/DATA-PROFILE-METHOD-seedN``.
        seed: of all stages, a whole number from 0 to 2 ** 32 - 1.
        part: ``train`` or ``test``, the side of the set's split to train on; None takes all volumes. By default the
            former, and all volumes of a folder, which has no split.
        device: ``auto``, ``cpu`` or ``cuda``.
        method: ``extended`` or ``faithful``.
        check: whether the scans have to look like chest CT.

    Raises:
        DatasetError: the set is not there, or has no split although one side was asked for.
        SettingsError: there is no such profile, method, device or seed, or ``folder`` lies in that of the data.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2 ** 32:
        raise SettingsError(f"{seed!r} is no seed", remedy="Give a whole number from 0 to 2 ** 32 - 1")
    if folder is None:
        name = f"{Path(named(data)).name}-{profile}-{method}-seed{seed}"
        folder = Path(os.environ.get("COVIDSEG_RUNS", "runs")) / name
    torch.set_float32_matmul_precision("high")
    if part == "default":
        part = "train" if data in split_names() else None
    found = replace(open_data(data, part), check=check)
    place, root = (Path(os.path.realpath(path)) for path in (folder, found.root))
    if place == root or any(place.is_relative_to(root / part) for part in ("im", "lung", "mask")):
        raise SettingsError("the run would lie among its data", path=folder,
                            remedy="Name a folder outside of the data's for the run")
    if silent := [case.id for case in found.cases if not case.labels]:
        log(f"without a label, and so without a part in training: {', '.join(silent)}")
    return Run(found, profile_named(profile, method), int(seed), Path(folder), device, log)


def write_run(run: Run, command: str) -> Path:
    """Writes ``run.json``, which makes a folder of stages a run that ``covidseg predict`` can use.

    Of several processes all have to call it, since the first asks the others about stages that it has to read.

    The report of another run in that folder, with another seed, set, profile or version, is kept under a number.

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
        "stages": {stage: run.store.path(stage, run.key(stage)).name for stage in stages},
    }
    if is_first():
        with run.store.alone(path):  # report and checksum have to be of the same program
            if path.exists() and not same_run(path, content):
                run.log(f"the run that was there is another, and its report is kept as {set_aside(path).name}")
            write_with_hash(path, json.dumps(content, indent=2) + "\n")
    return path


def _notes(run: Run, stage: str) -> dict[str, Any]:
    """The notes of a stage; empty if its file is gone or cannot be read."""
    try:
        return run.store.notes(stage, run.key(stage))
    except ArtifactError:
        return {}
