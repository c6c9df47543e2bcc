"""AD3D-MIL: attention over the instances of a whole scan (Han Z. et al., IEEE TMI 39(8), 2020, 2584-2594).

A scan is a bag. The trunk's features, pooled to a coarse grid, are its instances; attention (Ilse et al., ICML 2018,
eq. 8) weighs them to one vector, which a logistic unit judges. Layers, loss and the published schedule follow the
paper and its public code; everything here was written anew. Two traps of that code are avoided: it comes with mean
pooling switched on, and it tests without switching batch normalisation to its running statistics.

The paper shows no lesion map: the one here multiplies how much attention an instance gets with how ill it looks by
itself. What differs besides: slabs and the 2D port, the schedule of the default settings, and the normalisation of the
picture (theirs is (HU + 1024) / 1624). Their stop at the first fall of the validation accuracy is left out, since no
label is held back here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import NO_PAINT
from covidseg.baselines.slabs import SlabSettings
from covidseg.baselines.training import Baseline, BaselineSettings
from covidseg.baselines.trunk import GridPool, Trunk, convolution, initialise
from covidseg.errors import SettingsError, one_of

POOLINGS = ("attention", "max", "mean")
CLAMP = 1e-5  # probabilities stay this far from 0 and 1


@dataclass(frozen=True)
class Ad3dMilSettings(BaselineSettings):
    """Settings of AD3D-MIL, besides those of :class:`~covidseg.baselines.training.BaselineSettings`.

    Attributes:
        pooling: ``attention``, or the paper's comparisons ``max`` and ``mean``.
        sides: Sides of the cubic grids before each convolution, and of the grid of instances: 8 means 512 instances of
            a large volume, and 64 of a slice.
    """

    pooling: str = "attention"
    sides: tuple[int, ...] = (32, 16, 8)
    steps: int = 720
    rate: float = 1e-3
    outline: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.pooling, POOLINGS, "pooling")
        if len(self.sides) != 3 or min(self.sides) < 1:
            raise SettingsError(f"grids of sides {self.sides} do not fit", remedy="Give three numbers above 0")


# On whole volumes of 256 x 256; 50 epochs of about 300 volumes, each a batch.
PUBLISHED = Ad3dMilSettings(dims=3, slab=SlabSettings(depth=128, size=256, step=128), steps=15_000, batch=1,
                            rate=1e-5, weight_decay=0.0, schedule="constant", paint=NO_PAINT)


class Ad3dMil(Baseline):
    """Trunk, two convolutions to instances of 32 numbers, pooling, a logistic unit.

    ``forward`` takes picture and lung, ``(B, 2, T, S, S)`` or ``(B, 2, S, S)``, and returns bag logits ``(B,)``.
    Outside the lung the picture is set to air, as published.
    """

    def __init__(self, settings: Ad3dMilSettings = Ad3dMilSettings()) -> None:
        super().__init__()
        d, (first, second, last) = settings.dims, settings.sides
        self.settings: Ad3dMilSettings = settings
        self.trunk = Trunk(1, d)                                                         # (B, 128, T/2, S/8, S/8)
        self.generator = nn.Sequential(
            GridPool(d, (first,) * 3), convolution(d, 128, 64, (3, 3, 3), bias=True), nn.ReLU(),
            GridPool(d, (second,) * 3), convolution(d, 64, 32, (3, 3, 3), bias=True), nn.ReLU(),
            GridPool(d, (last,) * 3))                                                    # (B, 32, z, y, x)
        self.attend_v, self.attend_w = nn.Linear(32, 32), nn.Linear(32, 1)
        self.score = nn.Linear(32, 1)
        initialise(self)

    def instances(self, maps: Tensor) -> Tensor:
        """Instances on their grid, ``(B, 32, z, y, x)``; ``(B, 32, y, x)`` in 2D."""
        return self.generator(self.trunk(maps[:, :1] * maps[:, 1:]))

    def attention(self, bag: Tensor) -> Tensor:
        """Weights ``(B, K)`` of ``(B, K, 32)``, ``softmax_k(w' tanh(V x_k))``; even for ``mean`` and ``max``."""
        if self.settings.pooling != "attention":
            return bag.new_full(bag.shape[:2], 1 / bag.shape[1])
        return self.attend_w(self.attend_v(bag).tanh())[..., 0].softmax(dim=1)

    def pool(self, bag: Tensor) -> Tensor:
        """One vector a bag, ``(B, 32)``, from its instances ``(B, K, 32)``."""
        if self.settings.pooling == "max":
            return bag.amax(dim=1)
        return torch.einsum("bk,bkc->bc", self.attention(bag), bag)

    def bag_logits(self, instances: Tensor) -> Tensor:
        """Bag logits ``(B,)`` from instances on their grid."""
        return self.score(self.pool(instances.flatten(2).transpose(1, 2)))[:, 0]

    def forward(self, maps: Tensor) -> Tensor:
        return self.bag_logits(self.instances(maps))

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """Negative log likelihood of a Bernoulli variable, its probability kept off 0 and 1."""
        return F.binary_cross_entropy(self(maps).sigmoid().clamp(CLAMP, 1 - CLAMP), target)

    def judge(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Probability ``(B,)`` and ``a_k * sigmoid(score(x_k))`` of the instances on their grid, ``(B, 1, ...)``."""
        instances = self.instances(maps)
        bag = instances.flatten(2).transpose(1, 2)                                       # (B, K, 32)
        lesion = self.attention(bag) * self.score(bag)[..., 0].sigmoid()                 # (B, K)
        return self.bag_logits(instances).sigmoid(), lesion.reshape(len(maps), 1, *instances.shape[2:])
