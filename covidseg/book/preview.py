"""One page to look at: the slices of a scan with the outlines of lungs and lesions, and what was understood of it.

:func:`preview_page` fills ``preview.html``, which holds all style and script, with pictures, outlines and numbers as
JSON. The page needs no network, no library and no other file. Of the scan's header only size, spacing and orientation
get into it.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Mapping
from math import isqrt
from pathlib import Path

import nibabel as nib
import numpy as np
from PIL import Image
from skimage.measure import find_contours

from covidseg import DISCLAIMER, __version__
from covidseg.book.figures import COLORS, LUNG_WINDOW, NORMAL_RANGE
from covidseg.data.grey import clean
from covidseg.data.scan import Scan
from covidseg.errors import SettingsError
from covidseg.lungs import Lungs
from covidseg.preprocess import air_and_tissue

TEMPLATE = Path(__file__).with_suffix(".html")
SIDE = 512                  # pixels of a picture's longer side, at most
PIXELS = 300 * 384 ** 2     # of all pictures, at most; and their bytes, before base64 makes four of three
BYTES = 5_500_000
QUALITIES = (85, 75, 65, 55, 45, 35, 25)  # of JPEG; the best that keeps to the bytes is taken
SAMPLES = 8                 # slices that the window and the quality are found with, and that are printed
NO_HU = 300.0               # soft tissue is darker in Hounsfield units, contrast medium or not
WAYS = {"L": "left", "R": "right", "A": "front", "P": "back", "S": "head", "I": "feet"}


def preview_page(scan: Scan, lungs: Lungs, lesions: np.ndarray, *, name: str = "",
                 made: Mapping[str, str] | None = None) -> str:
    """A self-contained HTML page of a scan and what was found in it.

    A slice's share is that of lesion in lung and lesion together, so that it is 100 % at most.

    Args:
        scan: the scan.
        lungs: its lungs; a stack of unrelated slices has shares only, and no millilitres.
        lesions: ``(slices, rows, columns)`` bool.
        name: what the scan is called on the page.
        made: how the lesions were found, in words: ``{"nets": "...", "threshold": "..."}``.

    Raises:
        SettingsError: scan, lungs and lesions have not one shape.
    """
    if not scan.pixels.shape == lungs.masks.shape == lesions.shape:
        raise SettingsError(f"the scan has shape {scan.pixels.shape}, its lungs {lungs.masks.shape} and lesions "
                            f"{lesions.shape}", remedy="Give masks of this very scan, upright as read_mask reads them")
    lesion, lung, either = (np.array([np.count_nonzero(each) for each in masks], int) for masks in (
        lesions, lungs.masks, map(np.logical_or, lungs.masks, lesions)))
    ml = scan.grid.voxel_ml()
    share = lesion.sum() / max(1, either.sum())
    count = len(lesions)
    pictures, grey = _pictures(scan, lungs)
    places = np.flatnonzero(lesion if lesion.any() else lung if lung.any() else np.ones(count))
    _, down, across = scan.spacing
    content = {
        "slices": pictures,
        "outlines": {"lung": [outline(mask) for mask in lungs.masks], "lesion": [outline(mask) for mask in lesions]},
        "colors": {"lung": COLORS["lung"], "lesion": COLORS["prediction"]},
        "mm": [round(scan.pixels.shape[2] * across, 2), round(scan.pixels.shape[1] * down, 2)],
        "half": [round(across / 2, 5), round(down / 2, 5)],
        "volume": lungs.volume,
        "ml": [round(k * ml, 3) for k in lesion.tolist()] if lungs.volume else None,
        "share": [round(part / whole, 4) if whole else None
                  for part, whole in zip(lesion.tolist(), either.tolist(), strict=True)],
        "start": int((lesion if lesion.any() else lung).argmax()),
        "sheet": places[np.linspace(0, len(places) - 1, min(SAMPLES, len(places))).round().astype(int)].tolist(),
        "totals": [
            *([["lesion", f"{lesion.sum() * ml:.1f} ml"]] if lungs.volume else []),
            ["share of the lung", f"{share:.1%}".replace("%", " %")],
            *([["lung", f"{either.sum() * ml:.0f} ml"]] if lungs.volume else []),
            ["slices with lung", f"{lungs.slices()} of {count}"],
            ["slices with lesion", f"{np.count_nonzero(lesion)} of {count}"]],
        "warnings": [*getattr(scan, "warnings", ()), *lungs.warnings],
        "file": [
            ["voxels", " x ".join(map(str, scan.grid.shape))],
            ["axes as stored", "towards " + ", ".join(WAYS[way] for way in nib.aff2axcodes(scan.grid.affine))],
            ["spacing", f"{across:.3g} mm across, {down:.3g} mm down, {scan.spacing[0]:.3g} mm between slices"],
            ["slices", "of one body, in order" if lungs.volume else "unrelated, so without a volume in ml"],
            *grey],
        "made": [*(made or {}).items(), ("covidseg", __version__)]}
    title = f"{name}: lesions in chest CT" if name else "Lesions in chest CT"
    # A name may hold letters that no text file takes; and nothing in the JSON may end the script that holds it.
    page = TEMPLATE.read_text(encoding="utf-8").replace("{{disclaimer}}", html.escape(DISCLAIMER))
    first, last = page.split("{{data}}")
    first = first.replace("{{title}}", html.escape(title).encode("ascii", "xmlcharrefreplace").decode())
    return first + json.dumps(content, separators=(",", ":")).replace("<", "\\u003c") + last


# --- pictures -------------------------------------------------------------------------------------------------------

def _pictures(scan: Scan, lungs: Lungs) -> tuple[list[str], list[list[str]]]:
    """All slices as base64 JPEG, and what was understood of their grey values."""
    limits, unit, shown = _window(scan, lungs)
    count, rows, columns = scan.pixels.shape
    _, down, across = scan.spacing
    mm = max(min(down, across), max(rows * down, columns * across) / min(SIDE, isqrt(PIXELS // count)))
    size = max(1, round(columns * across / mm)), max(1, round(rows * down / mm))
    images, padded = [], 0
    for pixels, (low, high) in zip(scan.pixels, limits, strict=True):
        picture = clean(pixels)
        grey = np.clip((picture.values.astype(np.float32) - low) * (255 / max(high - low, 1e-3)), 0, 255)
        if picture.beyond is not None:
            grey[picture.beyond] = 0
            padded += 1
        images.append(Image.fromarray(grey.astype(np.uint8)).resize(size, Image.Resampling.BOX))
    some = images[::-(-count // SAMPLES)]
    quality = next((q for q in QUALITIES if sum(len(_jpeg(image, q)) for image in some) / len(some) * count <= BYTES),
                   QUALITIES[-1])
    return [base64.b64encode(_jpeg(image, quality)).decode() for image in images], [
        ["grey values", f"{unit}, {scan.value_range[0]:g} to {scan.value_range[1]:g}"],
        ["shown", shown],
        ["padding", f"found outside the field of view in {padded} of {count} slices, shown black" if padded else
                    "none found"]]


def _window(scan: Scan, lungs: Lungs) -> tuple[np.ndarray, str, str]:
    """Values that are black and white in each slice, ``(slices, 2)``, their unit, and the window in words.

    Hounsfield units have the usual lung window. All else is shown relative to the air and the soft tissue in it: the
    slices of a volume alike, unrelated ones each by itself.
    """
    numbers = np.flatnonzero(lungs.masks.any(axis=(1, 2)))
    if lungs.volume:
        numbers = numbers[::-(-len(numbers) // SAMPLES) or 1]
    levels = np.array([air_and_tissue(clean(scan.pixels[k]).values, lungs.masks[k]) for k in numbers]).reshape(-1, 2)
    air, tissue = np.median(levels, axis=0) if len(levels) else scan.value_range
    if scan.unit == "HU" and tissue < NO_HU:
        centre, width = LUNG_WINDOW
        low, high = centre - width / 2, centre + width / 2
        ends = np.tile([low, high], (len(scan.pixels), 1))
        return ends, "in Hounsfield units", f"centre {centre:g}, width {width:g} HU"
    ends = np.tile([air, tissue], (len(scan.pixels), 1))
    if not lungs.volume:
        ends[numbers] = levels
    ends = np.clip(ends[:, :1] + (ends[:, 1:] - ends[:, :1]) * NORMAL_RANGE, *scan.value_range)
    return ends, "not in Hounsfield units", (
        f"stored values from {ends[0, 0]:.0f} (black) to {ends[0, 1]:.0f} (white)" if lungs.volume else
        "brightness fitted to each slice")


def _jpeg(image: Image.Image, quality: int) -> bytes:
    raw = io.BytesIO()
    image.save(raw, "jpeg", quality=quality)
    return raw.getvalue()


def outline(mask: np.ndarray) -> str:
    """Outlines of ``(H, W)`` bool as the path of an SVG, in halves of a pixel from the slice's upper left corner."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return ""
    box = np.pad(mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1], 1).astype(np.float32)
    path = []
    for line in find_contours(box, 0.5):
        points = np.rint(2 * line).astype(int)[:, ::-1] + 2 * np.array([columns[0], rows[0]]) - 1   # (N, 2), x and y
        steps = np.diff(points, axis=0)
        ends = np.append((steps[1:] != steps[:-1]).any(axis=1), True)   # of straight runs, of which one step remains
        corners = np.concatenate([points[:1], points[1:][ends]])
        x, y = corners[0].tolist()
        path.append(f"M{x} {y}l" + " ".join(f"{dx} {dy}" for dx, dy in np.diff(corners, axis=0)[:-1].tolist()) + "z")
    return "".join(path)
