"""Files that tests of the command line write and read."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np


def strict(text: str) -> dict:
    """JSON as the standard has it: NaN and Infinity are faults."""
    def refuse(name: str) -> None:
        raise ValueError(name)
    return json.loads(text, parse_constant=refuse)


def save(array: np.ndarray, path: Path, *turn: float) -> Path:
    """Writes voxels as NIfTI; ``turn`` is the diagonal of their affine."""
    nib.save(nib.Nifti1Image(array, np.diag([*(turn or (1, 1, 1)), 1])), path)
    return path
