"""Small scans and archives, and a register of them, for a server that can misbehave in the ways real ones do."""

from __future__ import annotations

import gzip
import hashlib
import io
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
    """A register of three small sets in the layout of the real ones, served by ``server``; writes it as TOML."""
    volumes = {"1": volume(1, (1, 2)), "2": volume(2, (0,)), "3": volume(3, (3,))}
    for index, (name, folder) in enumerate((("rp_im.zip", "rp_im"), ("rp_lung_msk.zip", "rp_lung_msk"),
                                            ("rp_msk.zip", "rp_msk"))):
        members = {f"{folder}/{v}.nii.gz": nifti(arrays[index]) for v, arrays in volumes.items()}
        server.add(name, zipped({f"{folder}/": b"", f"__MACOSX/{folder}/._1.nii.gz": b"side file", **members}))
    image, _, mask = volume(7, (0, 2, 3, 4), slices=5)
    stack = {"tr_im.nii.gz": nifti(image), "tr_mask.nii.gz": nifti(mask), "val_im.nii.gz": nifti(image[:1])}
    for name, body in stack.items():
        server.add(name, body)
    common = 'doi = "10.0/x"\npage = "https://example.org"\nlicence = "CC0 1.0"\nlicence_file = "cc0-1.0.txt"\n' \
             'megabytes = 1\ncitation = "Somebody, 2021."\nnote = "Fake."\n'
    text = f'[medseg2]\ntitle = "fake volumes"\nkind = "download"\nlayout = "volumes"\n{common}' \
           'same_patient = [["2", "3"]]\n'
    for name, role in (("rp_im.zip", "image"), ("rp_lung_msk.zip", "lung"), ("rp_msk.zip", "mask")):
        text += f'[[medseg2.files]]\nname = "{name}"\nurl = "{server.root}/{name}"\nchecksum = ""\nsize = 0\n' \
                f'role = "{role}"\n'
    text += f'[medseg1]\ntitle = "fake stack"\nkind = "download"\nlayout = "stacks"\n{common}'
    for name, role in (("tr_im.nii.gz", "image"), ("tr_mask.nii.gz", "mask"), ("val_im.nii.gz", "extra")):
        text += f'[[medseg1.files]]\nname = "{name}"\nurl = "{server.root}/{name}"\n' \
                f'checksum = "{md5(stack[name])}"\nsize = {len(stack[name])}\nrole = "{role}"\n' \
                f'optional = {str(role == "extra").lower()}\n'
    by_hand = common.replace("cc0-1.0.txt", "cc-by-nc-nd-3.0.txt")
    text += f'[mosmed]\ntitle = "by hand"\nkind = "by-hand"\nlayout = "mosmed"\n{by_hand}'
    text += f'[phantom]\ntitle = "made here"\nkind = "generated"\nlayout = "volumes"\n{common}'
    path.write_text(text, encoding="utf-8")
