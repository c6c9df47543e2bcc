"""The picture of the README is drawn by the nets that come with the package."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from readme_picture import PICTURE, TITLES, draw, nets_hash, typical
from skimage.io import imread

from covidseg.book.figures import COLORS
from covidseg.book.lesson import SHIPPED
from covidseg.data.folder import load_dataset
from covidseg.evaluation.evaluate import unseen_slices
from covidseg.pipeline import Run


def source_of(picture: bytes) -> str:
    return picture.split(b"Source\0", 1)[1][:len(nets_hash())].decode("ascii")


def test_picture_is_that_of_the_nets_that_come_along() -> None:
    assert source_of(PICTURE.read_bytes()) == nets_hash(), "draw it again: python tools/readme_picture.py"
    assert "](chapters/images/stages.png)" in (PICTURE.parents[2] / "README.md").read_text(encoding="utf-8")


def test_other_nets_have_another_hash(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path / "nets")
    assert nets_hash(tmp_path / "nets") == nets_hash()
    (tmp_path / "nets" / "mil1.safetensors").write_bytes(b"other")
    assert nets_hash(tmp_path / "nets") != nets_hash()


def test_every_stage_is_drawn(tiny_run: Run, tiny_phantom: Path, tmp_path: Path) -> None:
    look = unseen_slices(tiny_run, load_dataset(tiny_phantom))
    figure = draw(tiny_run, look)
    assert tuple(panel.get_title() for panel in figure.axes[:5]) == TITLES
    figure.savefig(tmp_path / "picture.png")
    shown = imread(tmp_path / "picture.png")[..., :3].astype(int)
    for name in ("lung", "truth"):
        near = np.abs(shown - np.round(255 * np.array(to_rgb(COLORS[name])))).max(axis=2) < 30
        assert near.sum() > 50, name
    perfect = typical(look.truth, look)
    assert look.truth[perfect].sum() >= np.median(look.truth.sum(axis=(1, 2))[look.labels == 1])
