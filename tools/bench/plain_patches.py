"""The plain way to score patches: cut a window out of the slice for each of them and send it through the net.

This is what :class:`covidseg.patches.PatchNet` spares, and what it is measured against. A window holds all that the net
sees of its patch, so the scores are those of the whole slice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from scipy import ndimage as ndi
from torch import Tensor

from covidseg.patches import PatchNet

STRIDE = 4  # of the net's coarsest level: windows start and end at multiples, so that their cells are the slice's
# Around the cells of a patch: 1 cell for enlarging, 3 + 1 + 1 for the convolutions of the coarsest level, 4 pixels for
# those of the middle one and 2 for the finest, 30 pixels in all, rounded up to cells.
REACH = 32
Window = tuple[slice, slice]


def windows_of(ids: Tensor) -> list[Window]:
    """Rows and columns of the window of each patch, of those of ``(S, S)`` patch numbers from 1 on.

    A window ends at the border of the slice: the zeros that the net puts around it then lie where they lie around the
    slice. Elsewhere they are too far from the patch to be seen.
    """
    def widened(part: slice, side: int) -> slice:
        return slice(max(0, part.start // STRIDE * STRIDE - REACH),
                     min(side, ((part.stop - 1) // STRIDE + 1) * STRIDE + REACH))

    return [(widened(rows, ids.shape[0]), widened(columns, ids.shape[1]))
            for rows, columns in ndi.find_objects(ids.cpu().numpy())]


@torch.inference_mode()
def by_windows(net: PatchNet, inputs: Tensor, ids: Tensor, numbers: Sequence[int],
               batch: int = 32) -> tuple[Tensor, Tensor]:
    """Scores and attention logits of some patches of a slice, by windows of the same size in batches.

    Args:
        net: in evaluation mode.
        inputs: ``(1, 2, S, S)``.
        ids: ``(S, S)`` int64 patch numbers.
        numbers: the patches.
        batch: windows at a time.

    Returns:
        Two of ``(len(numbers),)``.
    """
    windows, of_size = windows_of(ids), dict[tuple[int, ...], list[int]]()
    for place, number in enumerate(numbers):
        of_size.setdefault(tuple(part.stop - part.start for part in windows[number - 1]), []).append(place)
    result = torch.zeros(2, len(numbers), device=inputs.device)
    for of_one_size in of_size.values():
        for start in range(0, len(of_one_size), batch):
            places = of_one_size[start:start + batch]
            chosen = [(numbers[place], windows[numbers[place] - 1]) for place in places]
            pictures = torch.cat([inputs[..., *window] for _, window in chosen])           # (B, 2, h, w)
            own = torch.stack([ids[window] == number for number, window in chosen]).long()
            scores, attention = net(pictures, own, 1)                                      # (B, 2) each
            result[:, places] = torch.stack([scores[:, 1], attention[:, 1]])
    return result[0], result[1]
