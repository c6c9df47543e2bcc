"""The systems of Table 1, side by side: what each is taught with, how it outlines lesions, and what it costs.

All of them get the same crops, lungs and labels of one :class:`~covidseg.pipeline.Run` and are measured by the same
code. Each draws its outline at a level that is fixed in its settings; the levels of the two earlier systems were chosen
on the same slices as this project's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from covidseg.baselines.ad3d_mil import Ad3dMil, Ad3dMilSettings
from covidseg.baselines.decovnet import DeCoVNet, DeCoVNetSettings
from covidseg.baselines.maps import lesion_maps
from covidseg.baselines.training import BaselineSettings, Net, train_baseline
from covidseg.classifier import slice_probabilities
from covidseg.errors import ArtifactError, one_of
from covidseg.evaluation.evaluate import (
    Maps,
    Method,
    believed_maps,
    otsu_method,
    stage_method,
    supervised_method,
    training_truth,
)
from covidseg.gradcam import CamSettings
from covidseg.pipeline import Run
from covidseg.preprocess import Crops
from covidseg.profiles import Profile, faithful
from covidseg.store import fingerprint, net_form


@dataclass(frozen=True)
class BaselineProfile:
    """Settings of the earlier systems: ported to single slices, and their 3D nets on slabs (``_3d``).

    ``grad_cam`` is the map of the classifiers as it is drawn without any later stage: last block, one scale.
    """

    grad_cam: CamSettings = field(default_factory=lambda: CamSettings(layer_share=0.0, outline=0.2))
    decovnet: DeCoVNetSettings = field(default_factory=DeCoVNetSettings)
    ad3d_mil: Ad3dMilSettings = field(default_factory=lambda: Ad3dMilSettings(outline=0.35))
    decovnet_3d: DeCoVNetSettings = field(default_factory=lambda: DeCoVNetSettings(
        dims=3, batch=6, steps=240, rate=1e-3, outline=0.25))
    ad3d_mil_3d: Ad3dMilSettings = field(default_factory=lambda: Ad3dMilSettings(
        dims=3, batch=6, steps=240, rate=1e-3, outline=0.05))


BASELINE_PROFILES = {
    "quick": BaselineProfile(
        CamSettings(layer_share=0.0), DeCoVNetSettings(steps=200, rate=1e-3), Ad3dMilSettings(steps=240),
        DeCoVNetSettings(dims=3, batch=4, steps=100, rate=1e-3, outline=0.25),
        Ad3dMilSettings(dims=3, batch=4, steps=100, outline=0.05)),
    "full": BaselineProfile(),
}


@dataclass(frozen=True)
class Trained:
    """A trained system.

    Attributes:
        method: Makes its maps. The last row is the system's answer.
        run: The run that its stages belong to.
        stages: Name and key of the stored stages that training went through.
        nets: All that the answer needs.
    """

    method: Method
    run: Run
    stages: dict[str, str]
    nets: list[nn.Module]

    def parameters(self) -> int:
        """Numbers that were learned."""
        return sum(p.numel() for net in self.nets for p in net.parameters())

    def seconds(self) -> float | None:
        """What training took, all earlier stages included; None if the file of one was deleted since."""
        try:
            return round(sum(self.run.store.seconds(stage, key) for stage, key in self.stages.items()), 2)
        except ArtifactError:
            return None

    def history(self) -> list[dict[str, float]]:
        """Losses along the system's own training; empty if none was kept."""
        stage, key = list(self.stages.items())[-1]
        found: list[dict[str, float]] = self.run.store.notes(stage, key).get("history", [])
        return found


def _on_lungs(run: Run, method: Method, stages: dict[str, str], nets: Iterable[nn.Module]) -> Trained:
    """A system that needs the lungs and some stages and nets of its own."""
    run.weak()
    net = run.lung_net()
    names, lungs = (["threshold", "weak"], []) if net is None else (["threshold", "lung_net", "weak"], [net])
    return Trained(method, run, {name: run.key(name) for name in names} | stages, [*lungs, *nets])


def _otsu(run: Run, baselines: BaselineProfile) -> Trained:
    return _on_lungs(run, otsu_method(), {}, [])


def _grad_cam(run: Run, baselines: BaselineProfile) -> Trained:
    """Plain Grad-CAM of the classifiers before any exchange."""
    net, plain = run.ensemble(), baselines.grad_cam

    def maps(crops: Crops, volume: bool) -> Maps:
        probability = slice_probabilities(net, crops)
        return probability, [believed_maps(net, crops, probability >= 0.5, plain)]
    return _on_lungs(run, Method([("plain Grad-CAM", "slice labels", plain.outline)], maps),
                     {"classifier1": run.key("classifier1")}, [net])


def _baseline(run: Run, name: str, make: Callable[[], Net], settings: BaselineSettings,
              *published: tuple[str, str, float]) -> Trained:
    """An earlier system: its net, trained once and stored under a name; its map at a level answers.

    A slice in which the net finds no lesion stays empty (our choice): a map that is scaled by itself is as strong in a
    healthy slice. ``published`` are the rows of the outlines that the net has besides.
    """
    key = fingerprint(run.key("weak"), settings, run.seed)
    form = net_form(make, run.device)
    net = form.unpack(*run.store.get(name, key, lambda: form.pack(train_baseline(
        make, run.weak(), settings, seed=run.seed, device=run.device, log=run.log, name=name))))

    def maps(crops: Crops, volume: bool) -> Maps:
        probability, found = lesion_maps(net, crops, volume=volume)
        for each in found:
            each[probability < 0.5] = 0
        return probability, found
    rows = [*published, ("map at a level", "slice labels", settings.outline)]
    return _on_lungs(run, Method(rows, maps), {name: key}, [net])


def _decovnet(run: Run, baselines: BaselineProfile, dims: int = 2) -> Trained:
    settings = baselines.decovnet if dims == 2 else baselines.decovnet_3d
    return _baseline(run, f"decovnet{dims}d", partial(DeCoVNet, settings), settings,
                     (f"top {settings.top:.0%} of the map, where bright", "slice labels", 0.5))


def _ad3d_mil(run: Run, baselines: BaselineProfile, dims: int = 2) -> Trained:
    settings = baselines.ad3d_mil if dims == 2 else baselines.ad3d_mil_3d
    return _baseline(run, f"ad3dmil{dims}d", partial(Ad3dMil, settings), settings)


def _ours(run: Run, baselines: BaselineProfile,
          change: Callable[[Profile], Profile] = lambda profile: profile) -> Trained:
    run = Run(run.data, change(run.profile), run.seed, run.folder, run.device.type, run.log)
    method = stage_method(run)
    # Classifier and patches have done their work once the segmenter is trained: its answer needs neither.
    return _on_lungs(run, method, {stage: run.key(stage) for stage in run.stages()}, [run.segmenter()])


def _masks(run: Run, baselines: BaselineProfile) -> Trained:
    truth = training_truth(run)
    net = run.supervised(truth)
    return _on_lungs(run, supervised_method(run, net), {"supervised": run.masks_key(truth)}, [net])


@dataclass(frozen=True)
class System:
    """One of the systems that are compared.

    Attributes:
        title: Short, for figures.
        train: Trains what is missing of it in a run.
        published: Its row in :data:`PUBLISHED`; empty if it has none.
        ours: Of an earlier system, what is not as its authors published it.
        rule: Whether its first outline is the one that its authors' code draws; the last one is always its answer.
    """

    title: str
    train: Callable[[Run, BaselineProfile], Trained]
    published: str = ""
    ours: str = ""
    rule: bool = False

    @property
    def full_title(self) -> str:
        """For a table: the title, and what differs from the publication."""
        return f"{self.title} (our {self.ours})" if self.ours else self.title


# Dice, IoU, PPV, sensitivity, specificity on the 100 slices of MedSeg's first set, quoted from the abstract.
PUBLISHED = {"DeCoVNet": (0.72, 0.56, 0.73, 0.70, 0.98), "AD3D-MIL": (0.68, 0.51, 0.56, 0.85, 0.99),
             "dual-task mutual learning": (0.74, 0.57, 0.65, 0.85, 0.97)}

SYSTEMS = {
    "otsu": System("Otsu in the lung, no learning", _otsu),
    "grad-cam": System("plain Grad-CAM", _grad_cam),
    "decovnet": System("DeCoVNet on slices", _decovnet, "DeCoVNet",
                       "2D port, lungs, map, threshold and training", True),
    "decovnet-3d": System("DeCoVNet on slabs", partial(_decovnet, dims=3), "DeCoVNet",
                          "lungs, map, threshold and training", True),
    "ad3d-mil": System("AD3D-MIL on slices", _ad3d_mil, "AD3D-MIL", "2D port, lungs, map, threshold and training"),
    "ad3d-mil-3d": System("AD3D-MIL on slabs", partial(_ad3d_mil, dims=3), "AD3D-MIL",
                          "lungs, map, threshold and training"),
    "faithful": System("ours, faithful", partial(_ours, change=faithful), "dual-task mutual learning"),
    "extended": System("ours, extended", _ours, "dual-task mutual learning"),
    "masks": System("U-Net, true masks", _masks),
}


def system_names(names: list[str] | None) -> list[str]:
    """Keys of systems, all of them by default, in the order of the table.

    Raises:
        SettingsError: there is no such system.
    """
    for name in names or []:
        one_of(name, SYSTEMS, "system")
    return [name for name in SYSTEMS if names is None or name in names]
