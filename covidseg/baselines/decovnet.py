"""DeCoVNet: a 3D classifier whose class activation map shows lesions (Wang X. et al., IEEE TMI 39(8), 2020, 2615-2625).

Layers and the published schedule follow the paper and its public code; everything here was written anew. What differs:

- ``masked`` and ``weights`` of the default settings, without which the map shows nothing on the data of this book;
- slabs and the 2D port (:mod:`covidseg.baselines.slabs`), and the schedule of the default settings;
- the normalisation of the picture (theirs is a window of -1200 to 600 HU);
- a mask is empty outside the lung, and where the net finds no lesion;
- no component of the map is chosen by where the lung mask breaks into pieces: the lungs here are completed.

The paper counts a hit when the middle of a component lies in a lesion's box; an outline is more than it claims.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from covidseg.augment import NO_PAINT
from covidseg.baselines.maps import parts
from covidseg.baselines.slabs import SlabSettings
from covidseg.baselines.training import Baseline, BaselineSettings
from covidseg.baselines.trunk import GridPool, Size, Trunk, convolution, initialise
from covidseg.errors import SettingsError, one_of

GRIDS: tuple[Size, ...] = ((16, 24, 36), (4, 12, 18), (1, 6, 9))  # before each convolution of the head
WEIGHTS = ("gradient", "chain")


@dataclass(frozen=True)
class DeCoVNetSettings(BaselineSettings):
    """Settings of DeCoVNet, besides those of :class:`~covidseg.baselines.training.BaselineSettings`.

    Attributes:
        dropout: Dropout in the head; the public code has the layer, at 0.
        top: Share of the pixels (of a volume, or of an unrelated slice) that the published mask may hold.
        bright: That mask leaves out what is darker; 0 is air, 1 soft tissue. The published 75 of 255 grey levels are
            -671 HU, 0.24 of the way from lung's air (about -900 HU) to soft tissue (about 40 HU).
        masked: Whether the picture outside the lung is set to air. The publication leaves it; trained on slices of
            nine volumes the net then learns the surroundings, and tells other slices apart no better than by chance.
        weights: What each feature is worth in the map. ``chain`` is published; it takes the head for linear, without
            its ReLUs and max pooling. ``gradient`` asks the net itself (Selvaraju et al., ICCV 2017, eq. 1).
    """

    dropout: float = 0.0
    top: float = 0.05
    bright: float = 0.24
    masked: bool = True
    weights: str = "gradient"
    steps: int = 720
    rate: float = 3e-4  # faster, it is a matter of the seed whether the map shows lesions
    outline: float = 0.15

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.weights, WEIGHTS, "way to weigh features")
        if not 0 < self.top <= 1:
            raise SettingsError(f"a mask cannot hold a share of {self.top}", remedy="Choose top above 0 and up to 1")


# On volumes resampled to 1 mm and cropped to 224 x 336; about 100 epochs of about 500 volumes, each a batch.
PUBLISHED = DeCoVNetSettings(dims=3, slab=SlabSettings(depth=128, size=224, step=128), steps=50_000, batch=1,
                             rate=1e-5, weight_decay=0.0, schedule="constant", paint=NO_PAINT, masked=False,
                             weights="chain")


class DeCoVNet(Baseline):
    """Trunk, head of three convolutions between adaptive max pools, and two linear layers with nothing between.

    ``forward`` returns ``(B, 2)`` logits of *no lesion* and *lesion*.
    """

    def __init__(self, settings: DeCoVNetSettings = DeCoVNetSettings()) -> None:
        super().__init__()
        d = settings.dims
        self.settings: DeCoVNetSettings = settings
        self.trunk = Trunk(2, d)                                                         # (B, 128, T/2, S/8, S/8)
        three = (3, 3, 3)
        drop = nn.Dropout3d if d == 3 else nn.Dropout2d
        self.head = nn.Sequential(
            GridPool(d, GRIDS[0]), convolution(d, 128, 64, three, bias=True), nn.ReLU(),
            GridPool(d, GRIDS[1]), convolution(d, 64, 32, three, bias=True), nn.ReLU(),
            GridPool(d, GRIDS[2]), drop(settings.dropout), convolution(d, 32, 32, three, bias=True), nn.ReLU(),
            GridPool(d, (1, 1, 1)))                                                      # (B, 32, 1, 1, 1)
        self.hidden, self.classes = nn.Linear(32, 32), nn.Linear(32, 2)  # nothing between them
        initialise(self)

    def classify(self, features: Tensor) -> Tensor:
        """Logits ``(B, 2)`` from the trunk's features."""
        return self.classes(self.hidden(self.head(features).flatten(1)))

    def features(self, maps: Tensor) -> Tensor:
        """The trunk's features, ``(B, 128, T/2, S/8, S/8)``; in 2D without the third axis."""
        picture, lung = maps[:, :1], maps[:, 1:]
        return self.trunk(torch.cat([picture * lung if self.settings.masked else picture, lung], dim=1))

    def forward(self, maps: Tensor) -> Tensor:
        return self.classify(self.features(maps))

    def loss(self, maps: Tensor, target: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(self(maps), target.long())

    def cam_weights(self) -> Tensor:
        """What each feature of the trunk is worth for *lesion*, ``(128,)``.

        The head is no plain average, as class activation maps (Zhou et al., CVPR 2016) want it: each kernel is averaged
        over its places to a matrix; their product with the linear layers leads from features to classes.
        """
        chain = self.classes.weight[1] @ self.hidden.weight                              # (32,)
        for layer in reversed([m for m in self.head if isinstance(m, nn.Conv2d | nn.Conv3d)]):
            chain = chain @ layer.weight.flatten(2).mean(dim=2)                          # (out,) to (in,)
        return chain

    def gradient_weights(self, features: Tensor) -> Tensor:
        """Mean gradient of the difference of both logits, ``(B, 128)``: Grad-CAM on the trunk's last block."""
        with torch.enable_grad():
            start = features.detach().requires_grad_(True)
            healthy, lesion = self.classify(start).unbind(dim=1)
            gradient, = torch.autograd.grad((lesion - healthy).sum(), start)
        return gradient.flatten(2).mean(dim=2)

    def judge(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        """Probability ``(B,)`` and class activation map ``(B, 1, T/2, S/8, S/8)`` of *lesion*, of either sign."""
        features = self.features(maps)
        chained = self.settings.weights == "chain"
        weights = self.cam_weights().expand(len(maps), -1) if chained else self.gradient_weights(features)
        cam = torch.einsum("bc...,bc->b...", features, weights)
        return self.classify(features).softmax(dim=1)[:, 1], cam[:, None]

    def outlines(self, maps: np.ndarray, images: np.ndarray, joint: bool) -> list[np.ndarray]:
        """The published mask, 0 or 1: the top share of the map where the picture is bright enough; and the map."""
        mask = keep_top(maps, self.settings.top, joint) & (images > self.settings.bright)
        return [mask.astype(np.float32), maps]


def keep_top(maps: np.ndarray, share: float, joint: bool) -> np.ndarray:
    """The highest ``share`` of the values of a volume or of each slice, but nothing that is 0: ``(N, S, S)`` bool."""
    keep = np.zeros(maps.shape, bool)
    for part in parts(maps, joint):
        keep[part] = (maps[part] > 0) & (maps[part] >= np.quantile(maps[part], 1 - share))
    return keep
