"""What a run notices about itself: versions, the warnings that were given, and the most memory that it needed."""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from covidseg import __version__

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-image", "nibabel", "monai", "grad-cam")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and kind of machine; nothing that names it or its user."""
    return {
        "covidseg": __version__, "python": platform.python_version(), "system": platform.system(),
        "packages": {name: version(name) for name in PACKAGES}, "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(), "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@contextmanager
def noted_warnings() -> Iterator[list[str]]:
    """Notes the warnings given inside the ``with`` block, each once; they are shown as ever.

    One thread at a time can do so, as of :class:`warnings.catch_warnings`: what shows warnings serves all threads.

    Yields:
        A list that grows: ``UserWarning: text`` each, without the name of the file that warned.
    """
    noted: list[str] = []
    show = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *where: Any) -> None:
        text = f"{category.__name__}: {message}"
        if text not in noted:
            noted.append(text)
        show(message, category, *where)

    warnings.showwarning = note  # type: ignore[assignment]
    try:
        yield noted
    finally:
        warnings.showwarning = show


def peak_memory() -> dict[str, float]:
    """The most memory that this process has held so far, in MB (10**6 bytes): ``process`` and, on a GPU, ``gpu``.

    Without ``process`` where the system does not tell (Windows).
    """
    peak = {}
    if sys.platform == "linux":  # getrusage gives no less than what the program held that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        peak["process"] = round(int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6, 1)
    elif sys.platform != "win32":
        import resource

        peak["process"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 1)  # bytes on macOS
    if torch.cuda.is_available():
        peak["gpu"] = round(torch.cuda.max_memory_allocated() / 1e6, 1)
    return peak
