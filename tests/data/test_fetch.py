"""Downloads from a server that breaks off, ignores ranges, lies and changes its files; archives that are traps."""

from __future__ import annotations

import errno
import io
import stat
import zipfile
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from data_server import md5, sha256, zipped
from faults.server import Server

from covidseg.data.fetch import DownloadSettings, UnpackSettings, fetch, unpack
from covidseg.data.registry import RemoteFile, check_address
from covidseg.errors import DownloadError, OutputError

QUICK = DownloadSettings(retries=3, backoff=0, timeout=5, chunk=1000, spare=0)
BODY = bytes(range(256)) * 100  # 25600 bytes


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server()
    yield running
    running.close()


def test_complete_download_leaves_the_file_alone_and_is_not_repeated(server: Server, tmp_path: Path) -> None:
    server.add("a.bin", BODY)
    remote = server.remote("a.bin", sha256(BODY), len(BODY))
    done = fetch(remote, tmp_path / "new", QUICK)
    assert done.path.read_bytes() == BODY
    assert (done.checked, done.new) == ("published sha256", True)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.bin"]
    assert not fetch(remote, tmp_path / "new", QUICK).new
    assert len(server.asked) == 1
    done.path.write_bytes(damaged := BODY[:-1] + b"x")
    with pytest.raises(DownloadError, match="expected"):
        fetch(remote, tmp_path / "new", QUICK)
    assert done.path.read_bytes() == damaged, "a file of somebody's is not deleted"


@pytest.mark.parametrize(("how", "checksum", "asked"), [
    ({"drops": [10_000, 5_000]}, True, [("", 200), ("bytes=10000-", 206), ("bytes=15000-", 206)]),
    ({"drops": [10_000], "ranges": False}, True, [("", 200), ("bytes=10000-", 200)]),
    ({"drops": [10_000], "etag": ""}, True, [("", 200), ("bytes=10000-", 206)]),
    ({"drops": [10_000], "etag": ""}, False, [("", 200), ("", 200)]),  # nothing would notice two halves
    ({"drops": [10_000], "etag": 'W/"one"'}, False, [("", 200), ("", 200)]),
    ({"drops": [10_000], "shift": 5}, True, [("", 200), ("bytes=10000-", 206), ("", 200)]),
    ({"statuses": [503, 429, 408]}, True, [("", 503), ("", 429), ("", 408), ("", 200)])],
    ids=["twice", "no ranges", "checksum only", "no version", "weak version", "other range", "busy"])
def test_broken_line(how: dict[str, Any], checksum: bool, asked: list[tuple[str, int]], server: Server,
                     tmp_path: Path) -> None:
    server.add("a.bin", BODY, **deepcopy(how))
    remote = server.remote("a.bin", sha256(BODY) if checksum else "")
    assert fetch(remote, tmp_path, replace(QUICK, retries=4)).path.read_bytes() == BODY
    assert [(r, s) for _, r, s in server.asked] == asked


def test_broken_line_is_resumed_by_a_later_call(server: Server, tmp_path: Path) -> None:
    page = server.add("a.bin", BODY, drops=[10_000, 0, 0, 0, 0])
    remote = server.remote("a.bin", sha256(BODY))
    with pytest.raises(DownloadError, match=r"after 10000 bytes and 3 attempts.*again"):
        fetch(remote, tmp_path, QUICK)
    assert (tmp_path / "a.bin.part").read_bytes() == BODY[:10_000]
    assert not (tmp_path / "a.bin").exists()
    page.drops, server.asked = [], []
    assert fetch(remote, tmp_path, QUICK).path.read_bytes() == BODY
    assert server.asked == [("a.bin", "bytes=10000-", 206)]


def test_file_changed_between_two_calls_is_not_spliced(server: Server, tmp_path: Path) -> None:
    page = server.add("a.bin", BODY, drops=[10_000, 0, 0, 0])
    remote = server.remote("a.bin")  # no checksum that would notice
    with pytest.raises(DownloadError):
        fetch(remote, tmp_path, QUICK)
    page.body, page.etag, page.drops = BODY[::-1], '"two"', []
    assert fetch(remote, tmp_path, QUICK).path.read_bytes() == BODY[::-1]


def test_server_that_ignores_range_and_always_drops_comes_to_an_end(server: Server, tmp_path: Path) -> None:
    server.add("a.bin", BODY, drops=[10_000] * 20, ranges=False)
    with pytest.raises(DownloadError, match="broke off"):
        fetch(server.remote("a.bin", sha256(BODY)), tmp_path, QUICK)
    assert len(server.asked) == 4  # one that brought something new, then three that did not


@pytest.mark.parametrize(("part", "notes", "asked"), [
    (b"who knows what", "{", [200]), (BODY, '{"url": "URL", "mark": ""}', [416, 200]),
    (BODY + b"too much", '{"url": "URL", "mark": ""}', [416, 200]), (BODY[:9], '{"url": "other", "mark": "x"}', [200])])
def test_part_file_that_cannot_be_continued(part: bytes, notes: str, asked: list[int], server: Server,
                                            tmp_path: Path) -> None:
    server.add("a.bin", BODY)
    remote = server.remote("a.bin", sha256(BODY))
    (tmp_path / "a.bin.part").write_bytes(part)
    (tmp_path / "a.bin.part.json").write_text(notes.replace("URL", remote.url))
    assert fetch(remote, tmp_path, QUICK).path.read_bytes() == BODY
    assert [s for _, _, s in server.asked] == asked


def test_body_that_ends_early_in_silence(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("a.bin", BODY)
    monkeypatch.setattr(requests.Response, "iter_content", lambda self, size: iter([]))
    with pytest.raises(DownloadError, match="the line broke after 0 of 25600 bytes"):
        fetch(server.remote("a.bin", sha256(BODY)), tmp_path, replace(QUICK, retries=1))


def test_wrong_checksum_names_file_expected_and_found(server: Server, tmp_path: Path) -> None:
    server.add("a.bin", BODY)
    wrong = sha256(b"something else")
    found, expected = (text.removeprefix("sha256:") for text in (sha256(BODY), wrong))
    with pytest.raises(DownloadError, match=f"a.bin has the sha256 {found}, expected {expected}"):
        fetch(server.remote("a.bin", wrong), tmp_path, QUICK)
    assert list(tmp_path.iterdir()) == []  # a wrong file is not continued either


@pytest.mark.parametrize(("length", "size", "most", "complaint"), [
    (True, 99, 1 << 20, "25600 bytes at its source, expected 99"),  # before the body is sent
    (False, 20_000, 1 << 20, "goes on after 20000 bytes"),
    (False, 30_000, 1 << 20, "has 25600 bytes, expected 30000"),
    (False, 0, 2000, "goes on after 2000 bytes")])  # an unknown length cannot fill the disk
def test_sizes(length: bool, size: int, most: int, complaint: str, server: Server, tmp_path: Path) -> None:
    server.add("a.bin", BODY, length=length)
    with pytest.raises(DownloadError, match=complaint):
        fetch(server.remote("a.bin", sha256(BODY), size), tmp_path, replace(QUICK, max_bytes=most))
    assert not (tmp_path / "a.bin").exists()
    assert length is False or list(tmp_path.iterdir()) == []


def test_what_cannot_be_helped_is_not_tried_again(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="404"):
        fetch(server.remote("gone.bin"), tmp_path, QUICK)
    server.add("a.bin", BODY)
    with pytest.raises(DownloadError, match="MB free"):
        fetch(server.remote("a.bin"), tmp_path, replace(QUICK, spare=1 << 60))
    assert len(server.asked) == 2
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        fetch(server.remote("a.bin"), tmp_path / "file", QUICK)


def test_waiting_doubles_between_attempts(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("a.bin", BODY, statuses=[503] * 9)
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    with pytest.raises(DownloadError, match="503"):
        fetch(server.remote("a.bin"), tmp_path, replace(QUICK, retries=5, backoff=1, longest_wait=6))
    assert waits == [2, 4, 6, 6]


def test_no_server_is_a_download_error(tmp_path: Path) -> None:
    server = Server()
    remote = server.remote("a.bin")
    server.close()
    with pytest.raises(DownloadError, match="broke off after 0 bytes"):
        fetch(remote, tmp_path, QUICK)


@pytest.mark.parametrize("url", ["http://example.org/a", "ftp://example.org/a", "file:///etc/passwd", "a.bin",
                                 "http://127.0.0.1.example.org/a", "https:///a"])
def test_addresses_without_encryption_are_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="https"):
        check_address(url)
    with pytest.raises(DownloadError, match="https"):
        fetch(RemoteFile("a.bin", url, "", 0, "image"), tmp_path, QUICK)
    assert list(tmp_path.iterdir()) == []


def test_redirects_are_followed_but_not_out_of_encryption_nor_in_circles(server: Server, tmp_path: Path) -> None:
    server.add("real.bin", BODY)
    server.add("moved.bin", b"", redirect="/real.bin")
    server.add("trap.bin", b"", redirect="http://example.org/real.bin")
    server.add("circle.bin", b"", redirect="/circle.bin")
    assert fetch(server.remote("moved.bin", md5(BODY)), tmp_path, QUICK).path.read_bytes() == BODY
    with pytest.raises(DownloadError, match=r"http://example.org.*https"):
        fetch(server.remote("trap.bin"), tmp_path, QUICK)
    with pytest.raises(DownloadError, match="30 redirects"):
        fetch(server.remote("circle.bin"), tmp_path, QUICK)


def test_bad_certificate_is_not_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*args: object, **more: object) -> None:
        calls.append(args)
        raise requests.exceptions.SSLError("certificate verify failed")

    monkeypatch.setattr(requests.Session, "send", refuse)
    with pytest.raises(DownloadError, match="who it is"):
        fetch(RemoteFile("a.bin", "https://example.org/a", "", 0, "image"), tmp_path, QUICK)
    assert len(calls) == 1


class Small(io.FileIO):
    """A file on a disk with room for ten thousand bytes."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.tell() + len(data) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(data)


@pytest.mark.parametrize(("kind", "kept"), [(DownloadError, 10_000), (KeyboardInterrupt, 3000)])
def test_full_disk_and_interrupt_keep_what_arrived(kind: type[BaseException], kept: int, server: Server, tmp_path: Path,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("a.bin", BODY)
    remote = server.remote("a.bin", sha256(BODY))
    real_open, real_content = Path.open, requests.Response.iter_content

    def interrupted(self: requests.Response, size: int) -> Iterator[bytes]:
        yield from list(real_content(self, size))[:3]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if kind is KeyboardInterrupt:
            patch.setattr(requests.Response, "iter_content", interrupted)
        else:
            patch.setattr(Path, "open", lambda self, mode="r", *a, **k:
                          Small(self, "w") if mode == "wb" else real_open(self, mode, *a, **k))
        with pytest.raises(kind, match=None if kind is KeyboardInterrupt else "disk is full"):
            fetch(remote, tmp_path, QUICK)
    assert (tmp_path / "a.bin.part").stat().st_size == kept
    assert fetch(remote, tmp_path, QUICK).path.read_bytes() == BODY
    assert server.asked[-1] == ("a.bin", f"bytes={kept}-", 206)


def test_trust_on_first_use(server: Server, tmp_path: Path) -> None:
    first, second = zipped({"1.txt": b"one"}), zipped({"1.txt": b"two"})
    page = server.add("a.zip", first)
    remote = server.remote("a.zip")
    assert fetch(remote, tmp_path, QUICK).checked == "nothing: this is the first download"
    record = tmp_path / "a.zip.sha256"
    assert record.read_text() == f"{sha256(first).split(':')[1]}  a.zip\n"
    assert fetch(remote, tmp_path, QUICK).checked == "first download"
    (tmp_path / "a.zip").unlink()
    page.body, page.etag = second, '"two"'
    with pytest.raises(DownloadError, match="first download") as caught:
        fetch(remote, tmp_path, QUICK)
    assert sha256(first).split(":")[1] in str(caught.value)
    assert not (tmp_path / "a.zip").exists()


# --- archives -------------------------------------------------------------------------------------------------------

def damaged() -> bytes:
    body = bytearray(zipped({"1.txt": b"lesion" * 100}, zipfile.ZIP_STORED))
    body[100] ^= 1
    return bytes(body)


def claiming(name: str, size: int, mode: int = 0) -> bytes:
    """An archive whose directory, which limits go by, states another size or that it is no ordinary file."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        member = zipfile.ZipInfo(name)
        member.create_system, member.external_attr = 3, mode << 16
        archive.writestr(member, b"abc")
        member.file_size = size
    return stream.getvalue()


@pytest.mark.parametrize(("body", "complaint"), [
    (damaged(), "wrong CRC"), (b"<html>please log in</html>", "zip archive"), (claiming("a.txt", 20 << 30), "zip bomb"),
    (claiming("../a.txt", 3), "leaves its folder")])
def test_damaged_archives_and_traps_are_never_trusted_nor_kept(body: bytes, complaint: str, server: Server,
                                                               tmp_path: Path) -> None:
    server.add("a.zip", body)
    with pytest.raises(DownloadError, match=complaint):
        fetch(server.remote("a.zip"), tmp_path / "in", QUICK)
    assert list((tmp_path / "in").iterdir()) == []


def archive(folder: Path, body: bytes) -> Path:
    (folder / "a.zip").write_bytes(body)
    return folder / "a.zip"


def test_unpack_keeps_folders(tmp_path: Path) -> None:
    found = unpack(archive(tmp_path, zipped({"in/": b"", "in/1.txt": b"one", "2.txt": b"two"})), tmp_path / "out")
    assert [p.relative_to(tmp_path / "out").as_posix() for p in found] == ["in/1.txt", "2.txt"]
    assert found[0].read_bytes() == b"one"


@pytest.mark.parametrize(("body", "complaint"), [
    *((zipped({"fine.txt": b"fine", name: b"evil"}), "leaves its folder")
      for name in ("../out.txt", "a/../../out.txt", "/etc/out.txt", "a\\..\\out.txt", "C:/out.txt")),
    *((claiming("a.txt", 3, mode | 0o777), f"holds a {kind}")
      for mode, kind in ((stat.S_IFLNK, "link"), (stat.S_IFCHR, "device"), (stat.S_IFIFO, "device"))),
    (zipped({"a.txt": b"one", "A.txt": b"two"}), "twice"), (zipped({"a.txt": bytes(3 << 20)}), "zip bomb"),
    (zipped({f"{i}.txt": b"" for i in range(4)}), "4 files, more than 3"), (damaged(), "cannot be unpacked")])
def test_archives_that_are_not_unpacked(body: bytes, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=complaint):
        unpack(archive(tmp_path, body), tmp_path / "in" / "out", UnpackSettings(max_bytes=1 << 20, max_members=3))
    traps = complaint != "cannot be unpacked"  # of a trap not even a harmless member is written
    assert not (traps and (tmp_path / "in").exists())


def test_a_full_disk_leaves_no_half_checksum(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty .sha256 would call every later download a changed file."""
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    server.add("a.bin", BODY)
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"a\.bin.*sha256.*No space left"):
            fetch(server.remote("a.bin"), tmp_path, QUICK)
    assert not list(tmp_path.glob("*.sha256*"))
    assert fetch(server.remote("a.bin"), tmp_path, QUICK).path.read_bytes() == BODY


def test_archive_that_lies_about_its_sizes(tmp_path: Path) -> None:
    honest, lie = (number.to_bytes(4, "little") for number in (1 << 16, 10))
    with pytest.raises(DownloadError):
        unpack(archive(tmp_path, zipped({"a.txt": bytes(1 << 16)}).replace(honest, lie)), tmp_path / "out")
    written = tmp_path / "out" / "a.txt"
    assert not written.exists() or written.stat().st_size <= 10


def test_folder_that_cannot_be_unpacked_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        unpack(archive(tmp_path, zipped({"1.txt": b"one"})), tmp_path / "file")
