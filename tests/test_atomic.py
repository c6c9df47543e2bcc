"""Files in one piece: what a killed program left is removed, what is being written is not."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from tiny import WARM

from covidseg.atomic import MARK, alone, whole_file, work_folder, write_whole
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
