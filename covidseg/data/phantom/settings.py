"""What a phantom is made like: how many patients, how large, and how hard."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from covidseg.errors import SettingsError


@dataclass(frozen=True)
class PhantomSettings:
    """What to make. From ``involved`` on, the settings say how hard the phantom is; ranges are (lowest, highest).

    The defaults are set so that the stages rank about as on real CT: Otsu's threshold last, then Grad-CAM, then patches
    and segmenter, then full supervision (``results/table1-phantom-quick.json`` has the figures; the segmenter adds
    little to the patches in so short a training). Otsu inside the true lungs reaches a Dice of .45 to .57 on positive
    slices, and the mean intensity of the lungs tells positive from lesion-free slices with an area under the curve
    below .85; the tests hold both.

    Attributes:
        patients: Number of patients, one volume each.
        slices: Slices in each volume, at least 8.
        size: Rows and columns of a slice, at least 64.
        seed: Any whole number from 0.
        healthy_share: Share of patients without any lesion, 0..1; they are spread evenly over the indices.
        involved: Share of a diseased patient's slices among which lesions are strewn; the rest is lesion-free.
        lesion_share: Share of the lungs in those slices that lesions fill. Higher: easier.
        dense_share: Share of lesions that are crazy paving or consolidation, 0..1, half of each; the rest is ground
            glass. Higher: threshold lungs lose more, since consolidation at the pleura looks like chest wall.
        core_share: Share of larger ground-glass lesions with a consolidated core. Higher: the same.
        ground_glass_hu: Mean density of a ground-glass lesion, HU. Higher: easier, for thresholds above all.
        faint_share: Share of ground-glass lesions that are faint. Higher: thresholds and weak labels miss more.
        faint_hu: Mean density of those, HU.
        crazy_paving_hu: Mean density between the lines of crazy paving, HU.
        consolidation_hu: Mean density of consolidation, HU.
        edge_mm: Width of the soft edge of ground glass, mm. Wider: every method loses Dice.
        reader_wobble: How far the true outline strays from half density (standard deviation of the level at which
            it is drawn, 0..0.3). Higher: a lower ceiling, even for full supervision.
        lookalike_rate: Chance of each kind of look-alike in a patient, 0..1. Higher: more false alarms of
            thresholds and class activation maps.
        dependent_hu: Density added at the back by the look-alike "dependent_density", HU.
        vessel_targets: Branches of each lung's vessel tree. More: more false alarms of thresholds.
        noise_hu: Standard deviation of the noise, HU. Higher: harder for small patches above all.
        tissue_hu: Mean density of healthy lung tissue from full inspiration to expiration, HU. Wider: mean
            intensity tells less about the slice.
        drift_hu: Standard deviation of that density along one volume, HU. Higher: the same.
    """

    patients: int = 12
    slices: int = 24
    size: int = 256
    seed: int = 0
    healthy_share: float = 1 / 3
    involved: tuple[float, float] = (0.4, 0.75)
    lesion_share: tuple[float, float] = (0.1, 0.24)
    dense_share: float = 0.15
    core_share: float = 0.06
    ground_glass_hu: tuple[float, float] = (-680, -460)
    faint_share: float = 0.1
    faint_hu: tuple[float, float] = (-740, -700)
    crazy_paving_hu: tuple[float, float] = (-650, -540)
    consolidation_hu: tuple[float, float] = (-300, 0)
    edge_mm: tuple[float, float] = (2.0, 6.0)
    reader_wobble: float = 0.05
    lookalike_rate: float = 0.7
    dependent_hu: tuple[float, float] = (110, 210)
    vessel_targets: int = 650
    noise_hu: tuple[float, float] = (23, 40)
    tissue_hu: tuple[float, float] = (-885, -765)
    drift_hu: float = 40

    def __post_init__(self) -> None:
        if self.patients < 1 or self.slices < 8 or self.size < 64 or self.seed < 0 or self.vessel_targets < 1:
            raise SettingsError(f"a phantom of {self.patients} patients, {self.slices} slices, size {self.size}, "
                                f"seed {self.seed} and {self.vessel_targets} vessels cannot be made",
                                remedy="Take at least 1 patient, 8 slices, size 64, seed 0 and 1 vessel")
        for name in ("healthy_share", "dense_share", "core_share", "faint_share", "lookalike_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)}", remedy="It is a share: give 0 to 1")
        for name, value in asdict(self).items():
            if isinstance(value, tuple) and not (len(value) == 2 and value[0] <= value[1]):
                raise SettingsError(f"{name} is {value}", remedy="Give the lowest value, then the highest")
        for name in ("involved", "lesion_share"):
            if not 0 < getattr(self, name)[0] <= getattr(self, name)[1] < 0.95:
                raise SettingsError(f"{name} is {getattr(self, name)}", remedy="Give shares above 0 and below 0.95")
