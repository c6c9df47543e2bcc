"""``covidseg predict`` on volumes of growing length, against a sliding-window U-Net of equal size (MONAI)."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from bench.command import covidseg
from bench.measure import Setup, comparison, in_fresh_process, limited
from bench.volumes import write_volume
from covidseg.predict import load_predictor
from covidseg.unet import make_fine_unet

WINDOW = 160  # side of the crops that our segmenter sees


def sliding_window(path: Path, device: str) -> float:
    """The usual recipe: the whole volume as float32, windows of 160 pixels that overlap by a quarter, no flips."""
    from monai.inferers import sliding_window_inference

    channels = load_predictor().profile.segmenter.channels
    net = make_fine_unet(1, channels).eval().to(device)
    pixels = np.moveaxis(nib.load(path).get_fdata(dtype=np.float32), 2, 0)  # type: ignore[attr-defined]
    slices = torch.from_numpy(np.clip((pixels + 1000) / 1600, 0, 1))[:, None]               # (N, 1, H, W)
    with torch.inference_mode():
        maps = sliding_window_inference(slices, (WINDOW, WINDOW), sw_batch_size=16, predictor=net, overlap=0.25,
                                        sw_device=device, device="cpu")
    return float((maps.sigmoid() > 0.5).float().mean())  # type: ignore[union-attr]


def run(setup: Setup) -> dict[str, Any]:
    side = setup.size(512, 192)
    lengths = [40, 80, 160, 600] if not setup.small else [4, 8]
    rows = []
    for slices in lengths:
        path = write_volume(setup.folder / f"predict-{slices}.nii.gz", slices, side)
        seconds, peak = covidseg(setup.folder, "predict", path, "-o", setup.folder / f"mask-{slices}.nii.gz",
                                 "--overwrite", "--device", setup.device.type)
        rows.append({"slices": slices, "seconds": round(seconds, 2), "peak_mb": round(peak, 1)})
    first, last = rows[0], rows[-1]
    more = last["slices"] - first["slices"]
    ours = (last["seconds"] - first["seconds"]) / more     # what Python and its imports take is left out
    short = setup.folder / f"predict-{lengths[0]}.nii.gz"
    _, theirs, memory = in_fresh_process(partial, sliding_window, short, setup.device.type)
    return {
        "comparisons": [comparison(
            "predict, from file to file", "MONAI sliding window, U-Net of equal size", "ms a slice",
            1e3 * max(ours, 1e-9), 1e3 * theirs / lengths[0],
            note="ours: lungs, lung net (2 views) and segmenter (4 views) on one crop, writing included; there: one "
                 "view of each window of the slice, nothing written")],
        "limits": [limited(f"`covidseg predict` on a volume of {side} x {side} x {last['slices']}, peak memory", "MB",
                           last["peak_mb"], 2000),
                   limited("predict: slices per second", "1/s", round(1 / max(ours, 1e-9), 2)),
                   limited(f"sliding window: memory for {lengths[0]} slices", "MB", round(memory, 1))],
        "lengths": rows}
