"""Folders, zips and tars behind one interface; damaged archives; processes and threads."""

from __future__ import annotations

import io
import multiprocessing
import pickle
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.datasets import archives
from rice_eval.datasets.storage import Storage, clean, open_storage, sums
from rice_eval.errors import DataError

FILES = {f"top/in/{i:03d}.bin": bytes([i]) * (1000 + i) for i in range(40)} | {"top/a.txt": b"a", "z": b""}


def fill(root: Path) -> Path:
    for name, data in FILES.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def zipped(path: Path, kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    return path


def tarred(path: Path, mode: str) -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in FILES.items():
            info = tarfile.TarInfo(f"./{name}")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def every_kind(root: Path) -> list[Path]:
    return [
        fill(root / "folder"), zipped(root / "a.zip"), zipped(root / "b.ZIP", zipfile.ZIP_STORED), tarred(root / "c.tar", "w:"),
        tarred(root / "d.tar.gz", "w:gz"), tarred(root / "e.tar.bz2", "w:bz2"), tarred(root / "f.tar.xz", "w:xz"),
    ]  # fmt: skip


def test_every_kind_answers_alike(tmp_path: Path) -> None:
    answers = []
    for path in every_kind(tmp_path):
        storage = open_storage(path, "x", "x")
        assert storage.files() == ("z",)
        assert storage.folders() == ("top",)
        assert storage.files("top", ".txt") == ("a.txt",)
        assert storage.walk("top") == ("a.txt", *(f"in/{i:03d}.bin" for i in range(40)))
        assert storage.exists("top/in/003.bin")
        assert not storage.exists("top/in")
        assert storage.is_folder("top/in")
        assert not storage.is_folder("top/a.txt")
        assert storage.enter("top").enter("in").read("007.bin") == FILES["top/in/007.bin"]
        assert {name: storage.read(name) for name in FILES} == FILES
        answers.append(sums(storage, sorted(FILES), by_content=True))
        with pytest.raises(DataError, match="no such file"):
            storage.read("top/none")
        with pytest.raises(DataError, match="lies outside"):
            storage.read("../secret")
    assert all(answer == answers[0] for answer in answers)


def _read_all(storage: Storage) -> bool:
    return all(storage.read(name) == data for name, data in FILES.items())


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_processes_open_their_own_handles(tmp_path: Path, start: str) -> None:
    for path in every_kind(tmp_path)[1:4]:
        storage = open_storage(path, "x", "x")
        assert _read_all(storage)
        with multiprocessing.get_context(start).Pool(2) as pool:
            assert all(pool.map(_read_all, [storage] * 4))
        assert _read_all(pickle.loads(pickle.dumps(storage)))


def test_threads_share_a_storage(tmp_path: Path) -> None:
    for path in every_kind(tmp_path):
        storage = open_storage(path, "x", "x")
        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(lambda name, s=storage: s.read(name) == FILES[name], list(FILES) * 5))


def test_damaged_archives_are_one_line(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "a.zip").read_bytes()
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut.zip: can't be read as a zip"):
        open_storage(tmp_path / "cut.zip", "x", "x")
    stored = bytearray(zipped(tmp_path / "b.zip", zipfile.ZIP_STORED).read_bytes())
    stored[stored.index(FILES["top/in/009.bin"]) + 5] ^= 255
    (tmp_path / "flip.zip").write_bytes(stored)
    with pytest.raises(DataError, match=r"flip.zip:top/in/009.bin: can't be read \(Bad CRC"):
        open_storage(tmp_path / "flip.zip", "x", "x").read("top/in/009.bin")
    tar = tarred(tmp_path / "c.tar", "w:").read_bytes()
    ends = tar.rindex(FILES["top/in/039.bin"])
    for cut in (20000, 20480, ends, ends + 100, ends + 2048):
        (tmp_path / "cut.tar").write_bytes(tar[:cut])
        with pytest.raises(DataError, match=r"cut.tar: (cut off|truncated|can't be read)"):
            open_storage(tmp_path / "cut.tar", "x", "x")
    gz = tarred(tmp_path / "d.tgz", "w:gz").read_bytes()
    for name, data in (("cut.tgz", gz[: len(gz) // 2]), ("text.tar", b"hello" * 300), ("empty.tgz", b"")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=f"{name}: can't be read as a tar"):
            open_storage(tmp_path / name, "x", "x")


def test_a_zip_that_shrinks_under_the_reader(tmp_path: Path) -> None:
    path = tarred(tmp_path / "a.tar", "w:")
    storage = open_storage(path, "x", "x")
    with path.open("r+b") as handle:
        handle.truncate(3000)
    with pytest.raises(DataError, match=r"039.bin: can't be read \(truncated\)"):
        storage.read("top/in/039.bin")


def test_large_compressed_archives_are_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "IN_MEMORY", 100)
    with pytest.raises(DataError, match="decompress it once to a plain .tar"):
        open_storage(tarred(tmp_path / "a.tgz", "w:gz"), "x", "x")
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", zipfile.ZIP_DEFLATED) as outer:
        outer.write(zipped(tmp_path / "a.zip"), "inner.zip")
    with pytest.raises(DataError, match="take it out of the outer archive"):
        open_storage(tmp_path / "outer.zip", "x", "x").mount_archive("inner.zip")


@pytest.mark.parametrize("kind", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zips_inside_zips(tmp_path: Path, kind: int) -> None:
    with zipfile.ZipFile(tmp_path / "outer.zip", "w", kind) as outer:
        outer.writestr("before", b"x" * 777)
        outer.write(zipped(tmp_path / "a.zip"), "deep/inner.zip")
    storage = open_storage(tmp_path / "outer.zip", "x", "x")
    assert not storage.mount_archive("none.zip")
    assert storage.mount_archive("deep/inner.zip", "deep/files")
    assert storage.folders("deep") == ("files",)
    inside = pickle.loads(pickle.dumps(storage.enter("deep/files")))
    assert _read_all(inside)


def test_the_folder_that_is_meant_is_found(tmp_path: Path) -> None:
    fill(tmp_path / "one" / "two")
    for path in (tmp_path, tmp_path / "one", tmp_path / "one" / "two"):
        assert (
            open_storage(path, "x", "x").rooted(["top/in", ("nothing", "top/a.txt")], "x", "L").read("top/a.txt")
            == b"a"
        )
    with pytest.raises(DataError, match="two: x needs nothing or none, which is not there; expected layout: L"):
        open_storage(tmp_path, "x", "L").rooted(["top/in", ("nothing", "none")], "x", "L")


@given(st.text("ab./\\", max_size=12))
def test_clean_names_never_leave_the_root(name: str) -> None:
    try:
        flat = clean(name)
    except DataError:
        return
    assert not flat.startswith("/")
    assert ".." not in flat.split("/")
    assert "\\" not in flat
    assert clean(flat) == flat
