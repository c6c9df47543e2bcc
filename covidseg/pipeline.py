"""All stages in order, each computed once and stored: what the command line and the chapters call.

``Run`` is a folder plus a recipe. Asking it for a stage computes whatever is missing before that stage; asking
again, from another chapter or after a break, reads what is stored.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from covidseg.artifacts import Store, fingerprint, load_net, net_arrays
from covidseg.cam import CamSettings, coarse_labels, grad_cam
from covidseg.classify import Classifier, ClassifierSettings, train_classifier
from covidseg.dataset import Dataset, load_dataset
from covidseg.errors import SettingsError
from covidseg.fine import FineLabels, FineSettings, fine_labels
from covidseg.lungs import LungSettings
from covidseg.mil import MilSettings, PatchNet, Phase, patch_probabilities, train_mil
from covidseg.paint import PaintSettings
from covidseg.prepare import Crops, PrepareSettings, WeakSet, weak_set
from covidseg.refine import SegmenterSettings, make_segmenter, train_segmenter
from covidseg.registry import resolve
from covidseg.splits import apply_split, read_split
from covidseg.train import Log, pick_device


@dataclass(frozen=True)
class Profile:
    """Settings of every stage.

    Attributes:
        name: ``quick`` or ``full``.
    """

    name: str
    lungs: LungSettings = field(default_factory=LungSettings)
    prepare: PrepareSettings = field(default_factory=PrepareSettings)
    classifier: ClassifierSettings = field(default_factory=ClassifierSettings)
    cam: CamSettings = field(default_factory=CamSettings)
    mil: MilSettings = field(default_factory=MilSettings)
    fine: FineSettings = field(default_factory=FineSettings)
    segmenter: SegmenterSettings = field(default_factory=SegmenterSettings)


STAGES = ("weak", "classifier", "cam", "mil", "fine", "segmenter")
PROFILES = {
    # A few minutes on two CPU cores, no step above one minute: for lessons and tests.
    "quick": Profile("quick"),
    # Finer crops, wider nets, longer training: for real scans, on a GPU if there is one.
    "full": Profile(
        "full", prepare=PrepareSettings(size=240), classifier=ClassifierSettings(width=32, steps=600),
        mil=MilSettings(width=16, steps=900), segmenter=SegmenterSettings(channels=(24, 48, 96, 192), steps=800)),
}


def profile_named(name: str) -> Profile:
    """The profile ``quick`` or ``full``.

    Raises:
        SettingsError: there is no such profile.
    """
    if name not in PROFILES:
        raise SettingsError(f"there is no profile {name!r}", remedy=f"Choose one of {', '.join(PROFILES)}")
    return PROFILES[name]


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
        self.store = Store(folder / "stages")
        self._memory: dict[str, Any] = {}

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """Keeps a result in memory for the life of this object."""
        if name not in self._memory:
            self._memory[name] = make()
        return self._memory[name]

    def key(self, stage: str) -> str:
        """Hash of everything the result of a stage depends on; each stage builds on the one before."""
        p = self.profile
        if stage == "weak":
            return self._once("key", lambda: fingerprint(
                p.lungs, p.prepare, *(part for case in self.data.cases for part in (
                    case.image, case.patient, sorted(case.labels.items())))))
        before, settings = {"classifier": ("weak", p.classifier), "cam": ("classifier", p.cam), "mil": ("cam", p.mil),
                            "fine": ("mil", p.fine), "segmenter": ("fine", p.segmenter)}[stage]
        return fingerprint(self.key(before), settings, self.seed)

    def weak(self) -> WeakSet:
        """Stage 1: lungs, crops and slice labels."""
        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            data = weak_set(self.data, self.profile.prepare, self.profile.lungs)
            return ({"images": data.crops.images.astype(np.float16), "lungs": data.crops.lungs,
                     "boxes": data.crops.boxes, "labels": data.labels},
                    {"patients": data.patients.tolist(), "names": data.names.tolist()})

        def load() -> WeakSet:
            arrays, notes = self.store.get("weak", self.key("weak"), make)
            # Stored and used in half precision's steps, so that a stored set trains to the same weights.
            crops = Crops(arrays["images"].astype(np.float32), arrays["lungs"], arrays["boxes"])
            return WeakSet(crops, arrays["labels"], np.array(notes["patients"]), np.array(notes["names"]))
        return self._once("weak", load)

    def _net(self, stage: str, empty: Callable[[], nn.Module], train: Callable[[], nn.Module]) -> nn.Module:
        """A trained net: stored weights put into an empty net, or the result of training."""
        def load() -> nn.Module:
            arrays, _ = self.store.get(stage, self.key(stage), lambda: (net_arrays(train()), {}))
            return load_net(empty(), arrays).to(self.device)
        return self._once(stage, load)

    def classifier(self) -> Classifier:
        """Stage 2: the slice classifier."""
        settings = self.profile.classifier
        return self._net("classifier", lambda: Classifier(settings),  # type: ignore[return-value]
                         lambda: train_classifier(self.weak(), settings, seed=self.seed, device=self.device,
                                                  log=self.log))

    def cam(self) -> np.ndarray:
        """Stage 3: Grad-CAM of all training slices, ``(N, S, S)`` in [0, 1]."""
        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            return {"cam": grad_cam(self.classifier(), self.weak().crops, self.profile.cam)}, {}
        return self._once("cam", lambda: self.store.get("cam", self.key("cam"), make)[0]["cam"])

    def coarse(self) -> np.ndarray:
        """Stage 3: coarse labels, ``(N, S, S)`` uint8: 1 lesion, 0 lung, 255 unknown."""
        return coarse_labels(self.cam(), self.weak().labels, self.profile.cam)

    def mil(self) -> tuple[PatchNet, list[Phase]]:
        """Stage 4: the patch net, and what each phase of its curriculum admitted."""
        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            net, phases = train_mil(self.weak(), self.cam(), self.profile.mil, seed=self.seed, device=self.device,
                                    log=self.log)
            arrays = {f"net.{name}": value for name, value in net_arrays(net).items()}
            for k, phase in enumerate(phases):
                arrays |= {f"phase{k}.{part}": getattr(phase, part) for part in ("target", "difficulty", "admitted")}
            return arrays, {"paces": [phase.pace for phase in phases]}

        def load() -> tuple[PatchNet, list[Phase]]:
            arrays, notes = self.store.get("mil", self.key("mil"), make)
            weights = {name.removeprefix("net."): value for name, value in arrays.items() if name.startswith("net.")}
            net = load_net(PatchNet(self.profile.mil), weights).to(self.device)
            phases = [Phase(pace, *(arrays[f"phase{k}.{part}"] for part in ("target", "difficulty", "admitted")))
                      for k, pace in enumerate(notes["paces"])]
            return net, phases  # type: ignore[return-value]
        return self._once("mil", load)

    def patches(self) -> np.ndarray:
        """Stage 4: patch probabilities of all training slices on pixels, ``(N, S, S)``."""
        return self._once("patches", lambda: patch_probabilities(self.mil()[0], self.weak().crops))

    def fine(self) -> FineLabels:
        """Stage 5: fine labels of all training slices."""
        def make() -> tuple[dict[str, np.ndarray], dict[str, Any]]:
            fine = fine_labels(self.weak(), self.cam(), self.patches(), self.profile.fine)
            return {"labels": fine.labels, "weights": fine.weights, "probabilities": fine.probabilities}, {}
        return self._once("fine", lambda: FineLabels(**self.store.get("fine", self.key("fine"), make)[0]))

    def segmenter(self) -> nn.Module:
        """Stage 6: the segmenter trained on the fine labels."""
        settings = self.profile.segmenter
        return self._net("segmenter", lambda: make_segmenter(settings),
                         lambda: train_segmenter(self.weak(), self.fine().labels, self.fine().weights, settings,
                                                 seed=self.seed, device=self.device, log=self.log))

    def supervised(self, masks: np.ndarray) -> nn.Module:
        """The upper bound: the same segmenter and loop taught with true masks of the training slices.

        Args:
            masks: ``(N, S, S)`` bool, from :func:`covidseg.evaluate.training_truth`.
        """
        # Masks are trusted: nearly plain cross entropy, and nothing painted.
        settings = replace(self.profile.segmenter, robustness=0.1, paint=PaintSettings(share=0))
        masks_hash = hashlib.sha256(np.packbits(masks).tobytes()).hexdigest()
        key = fingerprint(self.key("weak"), settings, self.seed, masks_hash)

        def load() -> nn.Module:
            arrays, _ = self.store.get("supervised", key, lambda: (net_arrays(train_segmenter(
                self.weak(), masks, np.ones(masks.shape, np.float32), settings, seed=self.seed, device=self.device,
                log=self.log)), {}))
            return load_net(make_segmenter(settings), arrays).to(self.device)
        return self._once("supervised", load)


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
             part: str | None = "train", device: str = "auto", log: Log = print) -> Run:
    """The run of a data set, profile and seed; made if it does not exist.

    Args:
        data: a folder, or a name from ``covidseg data list``.
        profile: ``quick`` or ``full``.
        folder: where to store it; default ``$COVIDSEG_RUNS`` (or ``runs``) ``/DATA-PROFILE-seedN``.
        part: the side of the set's split to train on; None takes all volumes.
        device: ``auto``, ``cpu`` or ``cuda``.
    """
    if folder is None:
        folder = Path(os.environ.get("COVIDSEG_RUNS", "runs")) / f"{Path(data).name}-{profile}-seed{seed}"
    torch.set_float32_matmul_precision("high")
    return Run(open_data(data, part), profile_named(profile), seed, Path(folder), device, log)
