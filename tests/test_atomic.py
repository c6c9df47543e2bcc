"""Files in one piece: what a killed program left is removed, what is being written is not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tiny import WARM

from covidseg import atomic
from covidseg.atomic import HOST, MARK, alone, whole_file, work_folder, write_whole
from covidseg.errors import OutputError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def die(folder: Path) -> None:
    """Is killed while it writes a file and fills a folder."""
    with work_folder(folder) as work, whole_file(folder / "a.txt", suffix=".nii") as temporary:
        (work / "unpacked").write_text("half")
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_program_left_is_gone_after_the_next_file(tmp_path: Path) -> None:
    process = WARM.Process(target=die, args=(tmp_path,))
    process.start()
    process.join()
    left = names(tmp_path)
    assert len(left) == 2
    assert all(name.startswith(MARK) for name in left)
    assert sum(name.endswith(".nii") for name in left) == 1
    write_whole(tmp_path / "b.txt", lambda path: path.write_text("whole"))
    assert names(tmp_path) == ["b.txt"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    (tmp_path / ".notes-0123abcd").write_text("somebody's own")
    with work_folder(tmp_path) as work, whole_file(tmp_path / "a.txt") as temporary:
        (work / "unpacked").write_text("half")
        temporary.write_text("first")
        write_whole(tmp_path / "b.txt", lambda path: path.write_text("second"))
        assert (work / "unpacked").exists()
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        ".notes-0123abcd": "somebody's own", "a.txt": "first", "b.txt": "second"}


@pytest.mark.parametrize("host", ["node2", f"{HOST}_2", ""])
def test_what_another_host_writes_stays(host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ExitStack() as stack:
        with monkeypatch.context() as there:
            there.setattr(atomic, "HOST", host)
            work = stack.enter_context(work_folder(tmp_path))
            temporary = stack.enter_context(whole_file(tmp_path / "a.txt"))
        monkeypatch.setattr(atomic.fcntl, "flock", lambda *_: None)  # sees none of their locks, as Lustre's localflock
        (work / "unpacked").write_text("half")
        temporary.write_text("theirs")
        write_whole(tmp_path / "b.txt", lambda path: path.write_text("ours"))
        assert (work / "unpacked").exists()
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {"a.txt": "theirs", "b.txt": "ours"}


@pytest.mark.parametrize(("hours", "stays"), [(23, True), (25, False)])
@pytest.mark.parametrize("name", ["node2-17-0123abcd.nii", "0123abcd"])
def test_what_another_host_left_is_gone_after_a_day(name: str, hours: int, stays: bool, tmp_path: Path) -> None:
    left = tmp_path / f"{MARK}{name}"
    left.touch()
    os.utime(left, 2 * (time.time() - hours * 3600,))
    write_whole(tmp_path / "b.txt", lambda path: path.write_text("whole"))
    assert left.exists() == stays


def test_what_is_locked_stays_however_old_it_is(tmp_path: Path) -> None:
    with whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("first")
        os.utime(temporary, (0, 0))
        write_whole(tmp_path / "b.txt", lambda path: path.write_text("second"))
    assert names(tmp_path) == ["a.txt", "b.txt"]


def test_a_temporary_name_says_who_writes(tmp_path: Path) -> None:
    with work_folder(tmp_path) as work:
        assert work.name.startswith(f"{MARK}{HOST}-{os.getpid()}-")
    assert "-" not in HOST


def test_a_folder_that_is_taken_for_a_leftover_before_it_is_locked_is_made_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really, taken = os.open, list[Path]()

    def take_first(path: Any, *rest: int) -> int:
        if Path(path).parent == tmp_path and not taken:
            taken.append(Path(path))
            os.rmdir(path)
        return really(path, *rest)

    monkeypatch.setattr(os, "open", take_first)
    with work_folder(tmp_path) as work:
        assert taken == [work]
        assert work.is_dir()
    with pytest.raises(FileNotFoundError), work_folder(tmp_path / "missing"):
        pass


def test_a_system_without_these_locks_is_told_what_to_do() -> None:
    code = "import sys\nsys.modules['fcntl'] = None  # as on Windows\nimport covidseg\ncovidseg.read_scan"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "covidseg.errors.CovidsegError: covidseg runs on Linux and macOS; this system has no file locks of their kind "
        "(module fcntl). On Windows install WSL (wsl --install), and covidseg inside it.")


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    path = tmp_path / f"{'x' * 248}.nii.gz"
    write_whole(path, lambda temporary: temporary.write_text("whole"), suffix=".nii.gz")
    assert names(tmp_path) == [path.name]


def hold(folder: Path, log: Path) -> None:
    with alone(folder), log.open("a") as stream:
        stream.write("second")


def test_one_waits_for_the_other_who_works_in_a_folder(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with alone(tmp_path / "new"):
        process = WARM.Process(target=hold, args=(tmp_path / "new", log))
        process.start()
        process.join(0.5)
        log.write_text("first ")
    process.join()
    assert log.read_text() == "first second"


def test_a_folder_that_cannot_be_made_is_complained_of_when_it_is_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with alone(tmp_path / "file" / "folder"), pytest.raises(OutputError, match="cannot be written"):
        write_whole(tmp_path / "file" / "folder" / "a", lambda path: path.touch())
