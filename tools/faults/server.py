"""A publisher on this computer, who misbehaves as real ones do, and a register that names one file of his."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

from covidseg.data import registry
from covidseg.data.fetch import DownloadSettings

COMMAND = "covidseg data get medseg2 --yes --to set"
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


@dataclass(frozen=True)
class Answer:
    """What the server sends.

    Attributes:
        body: the file.
        status: other than 200 for a refusal.
        stop: bytes after which every answer breaks off; None never.
        redirect: address to send everybody to.
    """

    body: bytes = b""
    status: int = 200
    stop: int | None = None
    redirect: str = ""


class _Handler(BaseHTTPRequestHandler):
    """Sends one answer, whatever is asked for; goes on where a range begins."""

    answer: Answer

    def do_GET(self) -> None:
        answer = self.answer
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and answer.status == 200 else 0
        self.send_response(302 if answer.redirect else 206 if start else answer.status)
        self.send_header("Connection", "close")
        if answer.redirect:
            self.send_header("Location", answer.redirect)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(answer.body) - start))
        self.send_header("Content-Range", f"bytes {start}-{len(answer.body) - 1}/{len(answer.body)}")
        self.end_headers()
        self.wfile.write(answer.body[start:answer.stop])

    def log_message(self, *args: object) -> None:
        """Requests are not printed."""


@contextmanager
def publisher(answer: Answer, folder: Path, checksum: str = "", size: int = 0) -> Iterator[str]:
    """Serves a file while the command runs, by a register that names it.

    Args:
        answer: what the server sends.
        folder: for the register.
        checksum, size: what the register says of the file; nothing by default.

    Yields:
        The server's address.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"answer": answer}))
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    impatient = partial(DownloadSettings, retries=2, backoff=0.0)
    data = folder / "register"
    data.mkdir(exist_ok=True)
    (data / "licences").mkdir(exist_ok=True)
    (data / "licences" / "cc0-1.0.txt").write_text("Public domain.\n")
    (data / "registry.toml").write_text(ENTRY.format(url=f"{address}/rp_im.zip", checksum=checksum, size=size))
    with ExitStack() as stack:
        stack.callback(server.server_close)
        stack.callback(server.shutdown)
        stack.enter_context(patch.object(registry, "data_root", lambda: data))
        stack.enter_context(patch("covidseg.data.fetch.DownloadSettings", impatient))
        yield address
