"""Lung masks: threshold against lungmask's U-Net, and a whole volume through the command line."""

from __future__ import annotations

from typing import Any

import torch

from bench.command import covidseg
from bench.measure import Setup, alternating, comparison, limited
from bench.volumes import volume, write_volume
from covidseg.lungs import threshold_lungs


def lungmask_net() -> torch.nn.Module:
    """The net of lungmask's model R231, with random weights: the time does not depend on them."""
    from lungmask.resunet import UNet

    return UNet(n_classes=3, padding=True, depth=5, up_mode="upsample", batch_norm=True, residual=False).eval()


def run(setup: Setup) -> dict[str, Any]:
    from lungmask.utils import preprocess

    count = setup.size(24, 2)
    pixels = volume(count, setup.size(512, 256))
    net = lungmask_net().to(setup.device)
    few = pixels[len(pixels) // 2:][:setup.size(4, 1)]

    @torch.inference_mode()
    def theirs() -> None:
        small, _ = preprocess(few, resolution=[256, 256])
        inputs = torch.from_numpy(small)[:, None].float().to(setup.device)
        net((inputs + 600) / 1624).argmax(dim=1).cpu()

    ours, other = alternating([lambda: threshold_lungs(pixels, volume=True), theirs], max(1, setup.rounds - 2),
                              setup.device)
    slices = setup.size(600, 12)
    path = write_volume(setup.folder / "lungs.nii.gz", slices, setup.size(512, 128))
    seconds, peak = covidseg(setup.folder, "lungs", path, "-o", setup.folder / "lungs-out.nii.gz",
                            "--overwrite")
    whole = f"`covidseg lungs` on a volume of 512 x 512 x {slices}, start to end"
    return {
        "comparisons": [comparison(
            "lung mask of a slice", "lungmask 0.2.22 (U-Net)", "ms a slice", 1e3 * ours / len(pixels),
            1e3 * other / len(few), goal=50,
            note="lungmask: preprocessing and forward pass with random weights, without its post-processing; "
                 f"net on {setup.device.type}, threshold on one core")],
        "limits": [limited(whole, "s", seconds, 20), limited(whole + ", peak memory", "MB", peak, 1000)]}
