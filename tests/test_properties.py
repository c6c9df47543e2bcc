"""Readers, writers and lung masks on files and pictures of every kind: what has to hold for all of them."""

from __future__ import annotations

import gzip
import itertools
import tempfile
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from data_server import ORIENTATIONS, oriented
from hypothesis import example, given, settings
from hypothesis import strategies as st

from covidseg.data.grey import Picture, clean
from covidseg.data.scan import Scan, read_scan, write_like
from covidseg.lungs import LungSettings, enlarge, regions, threshold_lungs, to_grid

TYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64)
WRITTEN = (np.uint8, np.float32)


@dataclass(frozen=True)
class Stored:
    """A file to be written, and what it has to be read as."""

    name: str
    pixels: np.ndarray  # (S, H, W) upright, in the stored type
    codes: str  # orientation in which it is stored
    scaling: tuple[float, float] | None  # slope and intercept, if the file has them
    flat: bool  # whether the file has two axes only

    def save(self, folder: Path) -> Path:
        """Writes the file; slope and intercept by hand, since nibabel would choose its own."""
        array, affine = oriented(self.pixels, self.codes)
        raw = bytearray(nib.Nifti1Image(array[..., 0] if self.flat else array, affine).to_bytes())
        if self.scaling is not None:
            raw[112:120] = np.array(self.scaling, "<f4").tobytes()
        path = folder / self.name
        path.write_bytes(gzip.compress(raw, 1) if self.name.endswith(".gz") else raw)
        return path

    def values(self) -> np.ndarray:
        """What a reader has to find."""
        if self.scaling is None:
            return self.pixels.astype(np.float32) if self.pixels.dtype.kind == "f" else self.pixels
        slope, inter = (float(np.float32(v)) for v in self.scaling)
        return (self.pixels * slope + inter).astype(np.float32)


@st.composite
def files(draw: st.DrawFn) -> Stored:
    """Every orientation, type, ending and scaling, with random voxels; every fourth file is a single flat slice."""
    rng, dtype = np.random.default_rng(draw(st.integers(0, 10**6))), draw(st.sampled_from(TYPES))
    codes = draw(st.sampled_from(ORIENTATIONS))
    flat = codes[2] in "IS" and draw(st.booleans())
    shape = (1 if flat else draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    if np.dtype(dtype).kind == "f":
        pixels = rng.normal(0, 1000, shape).astype(dtype)
    else:
        limits = np.iinfo(dtype)
        pixels = rng.integers(limits.min, limits.max, shape, dtype, endpoint=True)
    scaling = draw(st.none() | st.sampled_from([(2.0, -1024.0), (0.1, 3.0), (1.0, -1000.0), (-1.0, 0.0)]))
    return Stored(draw(st.sampled_from(["scan.nii", "scan.nii.gz"])), pixels, codes, scaling, flat)


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Shape, type and every value."""
    return a.shape == b.shape and a.dtype == b.dtype and np.array_equal(a, b)


def faults_of_reading(scan: Scan, stored: Stored) -> list[str]:
    """What differs between a scan and the file that it was read from, and after it was written and read again."""
    folder = scan.path.parent
    faults = {"voxels": not same(scan.pixels, stored.values()),
              "spacing": not np.allclose(scan.spacing, (5.0, 0.8, 0.7)),
              "affine": not np.allclose(scan.grid.affine, nib.load(scan.path).affine)}
    for dtype, name in itertools.product(WRITTEN, ("nii", "nii.gz")):
        result = np.random.default_rng(1).integers(0, 100, scan.pixels.shape).astype(dtype)
        back = read_scan(write_like(result, scan.grid, folder / f"whole.{name}"))
        faults[f"round trip {np.dtype(dtype)} .{name}"] = (
            not same(back.pixels, result) or back.grid.shape != scan.grid.shape
            or back.grid.two_dimensional != stored.flat or not np.allclose(back.grid.affine, scan.grid.affine))
    again = read_scan(write_like(scan.pixels, scan.grid, folder / "again.nii"))
    return [fault for fault, there in (faults | {"itself": not same(again.pixels, scan.pixels)}).items() if there]


@given(files())
def test_any_file_is_read_as_it_is_and_written_back(stored: Stored) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert faults_of_reading(read_scan(stored.save(Path(folder))), stored) == []


def test_the_comparison_of_readers_fires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    stored = Stored("scan.nii", pixels, "LPI", None, False)
    scan = read_scan(stored.save(tmp_path))
    assert faults_of_reading(scan, stored) == []
    assert faults_of_reading(scan, Stored("scan.nii", pixels[:, ::-1], "LPI", None, False)) == ["voxels"]
    plain = write_like
    monkeypatch.setattr(f"{__name__}.write_like", lambda array, grid, path: plain(array[::-1], grid, path))
    assert set(faults_of_reading(scan, stored)) >= {"round trip uint8 .nii", "itself"}


# --- lung masks -------------------------------------------------------------------------------------------------

@st.composite
def pictures(draw: st.DrawFn) -> np.ndarray:
    """Slices ``(S, H, W)`` of what no CT looks like: noise, constants, ramps, stripes, discs; one pixel and more."""
    rng, dtype = np.random.default_rng(draw(st.integers(0, 10**6))), draw(st.sampled_from(TYPES))
    large = draw(st.integers(0, 9)) == 0
    height, width = (draw(st.integers(200, 300) if large else st.integers(1, 70)) for _ in range(2))
    rows, columns = np.mgrid[:height, :width]
    disc = np.hypot((rows - height / 2) / max(1, height / 2.5), (columns - width / 2) / max(1, width / 2.5)) < 1
    hole = np.hypot((rows - height / 2) / max(1, height / 6), (columns - width / 3) / max(1, width / 9)) < 1
    kinds = {"noise": rng.random((height, width)), "constant": np.full((height, width), 0.5),
             "ramp": columns / width, "stripes": (columns // 3 % 2).astype(float), "disc": disc.astype(float),
             "body": disc * 0.9 - 0.8 * hole + 0.03 * rng.random((height, width))}
    chosen = [kinds[draw(st.sampled_from(sorted(kinds)))] for _ in range(draw(st.integers(1, 2 if large else 3)))]
    low, high = draw(st.sampled_from([(0, 100), (0, 255), (-1024, 1000), (-30000, 30000)]))
    limits = (-1e9, 1e9) if np.dtype(dtype).kind == "f" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
    return np.clip(low + (high - low) * np.stack(chosen), *limits).astype(dtype)


def _body(picture: Picture) -> np.ndarray:
    settings = LungSettings()
    beyond = None if picture.beyond is None else to_grid(picture.beyond, settings.grid) > 0.5
    return regions(to_grid(picture.values, settings.grid), settings, beyond).body


def faults_of_masks(masks: np.ndarray, pixels: np.ndarray) -> list[str]:
    """What keeps these from being lung masks of pictures: they may not reach beyond the body that was found."""
    bodies = np.stack([enlarge(_body(clean(image)), image.shape) for image in pixels])
    faults = {"another shape": masks.shape != pixels.shape, "not bool": masks.dtype != bool,
              "outside the body": masks.shape == pixels.shape and (masks.astype(bool) & ~bodies).any(),
              "lung in a constant": any(mask.any() for mask, image in zip(masks, pixels, strict=True)
                                        if image.min() == image.max())}
    return [fault for fault, there in faults.items() if there]


@pytest.mark.filterwarnings("error")
@given(pictures(), st.sampled_from([None, True, False]))
@example(np.zeros((1, 1, 1), np.uint8), None)
@settings(max_examples=60)
def test_lung_masks_of_any_picture_lie_in_its_body(pixels: np.ndarray, volume: bool | None) -> None:
    assert faults_of_masks(threshold_lungs(pixels, volume=volume), pixels) == []


def test_check_of_lung_masks_fires() -> None:
    rows, columns = np.mgrid[:90, :120]
    body = np.hypot((rows - 45) / 38, (columns - 60) / 52) < 1
    lung = (np.hypot((rows - 45) / 20, (columns - 38) / 13) < 1) | (np.hypot((rows - 45) / 20, (columns - 82) / 13) < 1)
    pixels = np.stack([np.where(lung, -850, np.where(body, 40, -1000)), np.full((90, 120), -1000)]).astype(np.int16)
    masks = threshold_lungs(pixels, volume=False)
    assert masks[0].sum() > 0.8 * lung.sum()
    assert faults_of_masks(masks, pixels) == []
    assert faults_of_masks(masks[..., 1:], pixels) == ["another shape"]
    assert faults_of_masks(masks.astype(np.uint8), pixels) == ["not bool"]
    wide = np.stack([masks[0] | (columns < 3), masks[0]])
    assert faults_of_masks(wide, pixels) == ["outside the body", "lung in a constant"]
