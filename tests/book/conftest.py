"""What the tests of pictures share."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

SIDE = 40


def square(first: int, last: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[first:last, first:last] = True
    return mask


@pytest.fixture
def lung() -> np.ndarray:
    return square(5, 35)


@pytest.fixture
def lesion() -> np.ndarray:
    return square(10, 20)


def edge_colors(axes: Axes) -> set[str]:
    """Colours of all contours in a panel."""
    return {to_hex(color).upper() for part in axes.collections for color in np.atleast_2d(part.get_edgecolor())}
