"""Small scans and archives, and a register of them, for a server that can misbehave in the ways real ones do."""

from __future__ import annotations

import gzip
import hashlib
import io
import itertools
import json
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
from faults.server import Server


def md5(body: bytes) -> str:
    return f"md5:{hashlib.md5(body).hexdigest()}"


def sha256(body: bytes) -> str:
    return f"sha256:{hashlib.sha256(body).hexdigest()}"


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, body in members.items():
            archive.writestr(name, body)
    return stream.getvalue()


# Stored as most published files are: x towards the patient's left, y towards the back, slices towards the head.
PUBLISHED = np.diag((-0.7, -0.7, 5.0, 1.0))


def nifti(upright: np.ndarray, affine: np.ndarray = PUBLISHED) -> bytes:
    """``(S, H, W)`` upright -> bytes of a ``.nii.gz`` in the published order of axes, for any diagonal affine."""
    stored = upright.transpose(2, 1, 0)
    for axis, expected in enumerate((-1, -1, 1)):
        if np.sign(affine[axis, axis]) != expected:
            stored = np.flip(stored, axis)
    return gzip.compress(nib.Nifti1Image(np.ascontiguousarray(stored), affine).to_bytes(), mtime=0)


# One letter of each pair, in every order: the 48 ways to lay a volume out along its axes.
ORIENTATIONS = ["".join(letters) for order in itertools.permutations(("RL", "AP", "IS"))
                for letters in itertools.product(*order)]
MM = {"R": 0.7, "L": 0.7, "A": 0.8, "P": 0.8, "I": 5.0, "S": 5.0}


def oriented(upright: np.ndarray, codes: str) -> tuple[np.ndarray, np.ndarray]:
    """An upright volume as a file of that orientation holds it, and its affine: by indexing alone, no nibabel.

    A letter names the direction in which an axis counts upwards; NIfTI's world axes point to L->R, P->A, I->S.
    """
    array = upright.transpose(["ISAPRL".index(c) // 2 for c in codes])
    array = array[tuple(slice(None, None, 1 if c in "SPL" else -1) for c in codes)]
    affine = np.zeros((4, 4))
    affine[:, 3] = (-10, 20, 30, 1)
    for axis, c in enumerate(codes):
        affine["RLAPIS".index(c) // 2, axis] = MM[c] * (1 if c in "RAS" else -1)
    return array, affine


def volume(seed: int, lesion_slices: tuple[int, ...], slices: int = 4, size: int = 64,
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """CT (int16 HU), lung and lesion mask (uint8, lesion label 2), ``(S, H, W)`` upright; the lesion is 4 x 4."""
    rng = np.random.default_rng(seed)
    image = rng.integers(-900, -800, (slices, size, size)).astype(np.int16)
    lung = np.zeros_like(image, dtype=np.uint8)
    lung[:, 10:50, 10:50] = 1
    mask = np.zeros_like(lung)
    for index in lesion_slices:
        image[index, 20:24, 30:34] = -300
        mask[index, 20:24, 30:34] = 2
    return image, lung, mask


def fill_mosmed(root: Path) -> Path:
    """A small publication as MosMedData is laid out: two normal studies and two others, of which 3 has an outline."""
    image, _, mask = volume(1, (1,))
    for name in ("studies/CT-0/study_0001", "studies/CT-0/study_0002", "studies/CT-1/study_0003",
                 "studies/CT-1/study_0004", "masks/study_0003_mask"):
        path = root / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(nifti(mask if "mask" in name else image))
    return root


def fill_registry(server: Server, path: Path) -> None:
    """A register of small sets in the layout of the real ones, served by ``server``; writes it as TOML."""
    volumes = {"1": volume(1, (1, 2)), "2": volume(2, (0,)), "3": volume(3, (3,))}
    image, _, mask = volume(7, (0, 2, 3, 4), slices=5)
    stack = {("tr_im.nii.gz", "image"): nifti(image), ("tr_mask.nii.gz", "mask"): nifti(mask),
             ("val_im.nii.gz", "extra"): nifti(image[:1])}
    archives = {}
    for index, (stem, role) in enumerate((("rp_im", "image"), ("rp_lung_msk", "lung"), ("rp_msk", "mask"))):
        members = {f"{stem}/{v}.nii.gz": nifti(arrays[index]) for v, arrays in volumes.items()}
        archives[f"{stem}.zip", role] = zipped({f"{stem}/": b"", f"__MACOSX/{stem}/._1.nii.gz": b"side file"} | members)
    text = ""
    for name, kind, layout, files in (("medseg2", "download", "volumes", archives),
                                      ("medseg1", "download", "stacks", stack),
                                      ("mosmed", "by-hand", "mosmed", {}), ("phantom", "generated", "volumes", {})):
        text += f"[{name}]\n" + _lines(
            title="Fake", kind=kind, layout=layout, doi="10.0/x", page="https://example.org", licence="CC0 1.0",
            licence_file="cc-by-nc-nd-3.0.txt" if name == "mosmed" else "cc0-1.0.txt", megabytes=1,
            citation="Somebody, 2021.", note="Fake.", same_patient=[["2", "3"]] if name == "medseg2" else [])
        for (file, role), body in files.items():
            server.add(file, body)
            published = {"checksum": md5(body), "size": len(body)} if files is stack else {"checksum": "", "size": 0}
            text += f"[[{name}.files]]\n" + _lines(name=file, url=f"{server.root}/{file}", role=role,
                                                   optional=role == "extra", **published)
    path.write_text(text, encoding="utf-8")


def _lines(**table: object) -> str:
    """A table of TOML; strings, numbers and lists are written as in JSON."""
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in table.items())
