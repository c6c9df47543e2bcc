"""A small web server on this computer that can misbehave in the ways real ones do."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import threading
import zipfile
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nibabel as nib
import numpy as np

from covidseg.data.registry import RemoteFile


@dataclass
class Page:
    """A file on the server and how it is served.

    Attributes:
        body: its bytes.
        etag: version mark, empty for none.
        ranges: whether ``Range`` is honoured.
        drops: byte counts after which the next answers break off, one for each answer.
        statuses: status codes of the next answers, before the file itself is served.
        redirect: address to send everybody to.
        length: whether the length is announced.
        shift: how many bytes too early an answer to ``Range`` starts.
    """

    body: bytes
    etag: str = '"one"'
    ranges: bool = True
    drops: list[int] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    redirect: str = ""
    length: bool = True
    shift: int = 0


class Server:
    """Serves pages by name; ``asked`` keeps (name, Range header, status) of every request."""

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str, int]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.root = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def add(self, name: str, body: bytes, **how: object) -> Page:
        self.pages[name] = page = Page(body, **how)  # type: ignore[arg-type]
        return page

    def remote(self, name: str, checksum: str = "", size: int = 0, role: str = "image") -> RemoteFile:
        return RemoteFile(name, f"{self.root}/{name}", checksum, size, role)

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name, wanted = request.path.lstrip("/"), request.headers.get("Range", "")
        page = self.pages.get(name)
        status, start = 200, 0
        if page is None:
            status = 404
        elif page.statuses:
            status = page.statuses.pop(0)
        elif page.redirect:
            status = 302
        elif wanted and page.ranges and request.headers.get("If-Range", page.etag) == page.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            status = 206 if start < len(page.body) else 416
            start -= page.shift
        self.asked.append((name, wanted, status))
        request.send_response(status)
        request.send_header("Connection", "close")
        if page is None or status not in (200, 206):
            if status == 302 and page is not None:
                request.send_header("Location", page.redirect)
            if status == 416 and page is not None:
                request.send_header("Content-Range", f"bytes */{len(page.body)}")
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        if page.etag:
            request.send_header("ETag", page.etag)
        if page.length:
            request.send_header("Content-Length", str(len(page.body) - start))
        if status == 206:
            request.send_header("Content-Range", f"bytes {start}-{len(page.body) - 1}/{len(page.body)}")
        request.end_headers()
        end = start + page.drops.pop(0) if page.drops else len(page.body)
        request.wfile.write(page.body[start:end])


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
