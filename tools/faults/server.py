"""A publisher on this computer, who misbehaves as real ones do, and a register that names one file of theirs."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

from covidseg.data import registry
from covidseg.data.fetch import DownloadSettings
from covidseg.data.registry import RemoteFile

COMMAND = "covidseg data get medseg2 --yes --to set"
FILE = "rp_im.zip"
ENTRY = """[medseg2]
title = "volumes"
kind = "download"
layout = "volumes"
doi = "10.0/x"
page = "https://example.org"
licence = "CC0 1.0"
licence_file = "cc0-1.0.txt"
megabytes = 1
citation = "Somebody, 2021."
note = "Played."
[[medseg2.files]]
name = "rp_im.zip"
url = "{url}"
checksum = "{checksum}"
size = {size}
role = "image"
"""


@dataclass
class Page:
    """A file on the server and how it is served.

    Attributes:
        body: its bytes.
        etag: mark of its version, empty for none.
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
    """Serves pages by name.

    Attributes:
        pages: what there is.
        asked: name, ``Range`` header and status of every request.
        root: address.
    """

    def __init__(self) -> None:
        self.pages: dict[str, Page] = {}
        self.asked: list[tuple[str, str, int]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, *args: object) -> None:
                """Requests are not printed."""

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
        page = self.pages.get(name, Page(b"", statuses=[404]))
        status, start = 200, 0
        if page.statuses:
            status = page.statuses.pop(0)
        elif page.redirect:
            status = 302
        elif wanted and page.ranges and request.headers.get("If-Range", page.etag) == page.etag:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])  # type: ignore[index]
            status = 206 if start < len(page.body) else 416
            start -= page.shift
        self.asked.append((name, wanted, status))
        sent = status in (200, 206)
        headers = {"Connection": "close", "Location": page.redirect if status == 302 else "",
                   "ETag": page.etag if sent else "", "Content-Length": str(len(page.body) - start) if sent else "0",
                   "Content-Range": f"bytes {start}-{len(page.body) - 1}/{len(page.body)}" if status == 206 else ""}
        if sent and not page.length:
            del headers["Content-Length"]
        request.send_response(status)
        for header, value in headers.items():
            if value:
                request.send_header(header, value)
        request.end_headers()
        if sent:
            end = start + page.drops.pop(0) if page.drops else len(page.body)
            request.wfile.write(page.body[start:end])


@contextmanager
def publisher(page: Page | None, checksum: str = "", size: int = 0) -> Iterator[None]:
    """Serves a file while the command runs, by a register that names it.

    Args:
        page: what the server sends; None if it has no such file.
        checksum: what the register says of the file, nothing by default.
        size: the same.
    """
    impatient = partial(DownloadSettings, retries=2, backoff=0.0)
    with TemporaryDirectory() as folder, closing(Server()) as server:
        if page is not None:
            server.pages[FILE] = page
        data = Path(folder)
        (data / "licences").mkdir()
        (data / "licences" / "cc0-1.0.txt").write_text("Public domain.\n")
        (data / "registry.toml").write_text(ENTRY.format(url=f"{server.root}/{FILE}", checksum=checksum, size=size))
        with patch.object(registry, "data_root", lambda: data), \
                patch("covidseg.data.fetch.DownloadSettings", impatient):
            yield
