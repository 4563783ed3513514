"""Where output goes: whole files, through links, and into what is no file without replacing it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest
from test_outputs import put, run

from rice_eval.errors import RecordError
from rice_eval.results.files import write_atomic, write_output, writing


def test_a_regular_file_is_replaced_whole_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    path.chmod(0o600)
    other = tmp_path / "hard"
    os.link(path, other)
    write_atomic(path, b"new")
    assert (path.read_bytes(), other.read_bytes()) == (b"new", b"old")  # a new file took the name
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hard", "x"]


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed_and_stay_links(tmp_path: Path, there: bool) -> None:
    (tmp_path / "real").mkdir()
    file = tmp_path / "real" / "file"
    if there:
        file.write_bytes(b"old")
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to(file)
    write_atomic(tmp_path / "a", b"new")
    assert file.read_bytes() == b"new"
    assert not file.is_symlink()
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "b").is_symlink()
    assert [p.name for p in file.parent.iterdir()] == ["file"]


def test_links_in_a_circle_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(RecordError, match="can't be written"), writing(tmp_path / "a"):
        write_atomic(tmp_path / "a", b"x")


@pytest.fixture
def pipe(tmp_path: Path) -> tuple[Path, list[bytes], threading.Thread]:
    """A named pipe, what came out of it, and the thread that reads it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    found: list[bytes] = []
    reader = threading.Thread(target=lambda: found.append(path.read_bytes()), daemon=True)
    reader.start()
    return path, found, reader


@pytest.mark.parametrize("linked", [True, False])
def test_a_pipe_is_written_to_and_stays_a_pipe(
    tmp_path: Path, pipe: tuple[Path, list[bytes], threading.Thread], linked: bool
) -> None:
    path, found, reader = pipe
    name = path
    if linked:
        name = tmp_path / "link"
        name.symlink_to(path)
    write_atomic(name, b"data")
    reader.join(10)
    assert found == [b"data"]
    assert stat.S_ISFIFO(path.stat().st_mode)
    assert name.is_symlink() == linked


def test_the_commands_write_into_a_pipe(tmp_path: Path, pipe: tuple[Path, list[bytes], threading.Thread]) -> None:
    path, found, reader = pipe
    put(tmp_path / "r")
    assert run("leaderboard", tmp_path / "r", "-f", "csv", "-o", path) == 0
    reader.join(10)
    assert found[0].startswith(b"encoder,")
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc")
def test_an_open_file_of_the_process_keeps_its_inode(tmp_path: Path) -> None:
    """What a shell makes of ``-o /dev/stdout >> file``: a link under /proc to a file that the shell holds open."""
    with open(tmp_path / "log", "w+b") as file:
        file.write(b"first ")
        file.flush()
        (tmp_path / "out").symlink_to(f"/proc/self/fd/{file.fileno()}")
        write_atomic(tmp_path / "out", b"second")
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "log").stat().st_ino
    assert (tmp_path / "log").read_bytes() == b"first second"


def test_a_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="can't be written"), writing(tmp_path):
        write_atomic(tmp_path, b"x")


def test_folders_of_outputs_are_made(tmp_path: Path) -> None:
    write_output(tmp_path / "a" / "b" / "c", b"x")
    assert (tmp_path / "a" / "b" / "c").read_bytes() == b"x"


def test_a_results_folder_may_be_a_link(tmp_path: Path) -> None:
    put(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert run("results", "validate", tmp_path / "link") == 0
