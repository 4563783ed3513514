from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bank_fakes import Collect, FakeDataset, files, source
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from typer.testing import CliRunner

from rice_eval.bank.manifest import Manifest
from rice_eval.bank.shard import pack, unpack
from rice_eval.bank.source import ImageTokens
from rice_eval.bank.store import Bank, default_bank_root, folder_bytes
from rice_eval.cli import bank as commands
from rice_eval.errors import BankError, NotFoundError, UsageError


def test_shards_are_plain_safetensors(tmp_path: Path):
    made = source(tmp_path, FakeDataset(6), dtype="int8")
    made.extract()
    entry, manifest = Bank(tmp_path).entries()[0]
    with safe_open(entry.shard(1), framework="pt") as shard:
        assert set(shard.keys()) == {
            "images", "sizes", "cls", "grid.1", "grid.3", "scale.1", "scale.3", "tokens.1", "tokens.3",
        }  # fmt: skip
        assert shard.get_tensor("images").tolist() == [4, 5]
        assert shard.get_tensor("tokens.1").dtype == torch.int8
        assert shard.get_tensor("cls").dtype == torch.float16
        values = unpack(shard.get_tensor("tokens.3"), shard.get_tensor("scale.3"))
    assert torch.equal(values[:16], made.reader()[4].patches[3][0])
    raw = entry.shard(1).read_bytes()
    assert struct.unpack("<Q", raw[:8])[0] % 8 == 0
    assert manifest.shards[1].bytes == len(raw)


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    st.sampled_from([0.0, 1e-6, 1.0, 3e3]),
)
def test_int8_is_off_by_half_a_scale_at_most(row: list[float], size: float):
    tokens = torch.tensor([row, [size] * 4], dtype=torch.float32)
    values, scale = pack(tokens, "int8")
    assert scale is not None
    assert torch.all((unpack(values, scale) - tokens).abs() <= scale[:, None] * 0.5 * (1 + 1e-5))


def test_a_token_of_zeros_stays_zeros():
    values, scale = pack(torch.zeros(2, 4), "int8")
    assert torch.equal(unpack(values, scale), torch.zeros(2, 4))


def test_manifest_says_everything_in_clear_text(tmp_path: Path):
    made = source(tmp_path)
    made.extract()
    plain = json.loads((tmp_path / made.key[:2] / made.key / "manifest.json").read_text())
    assert plain["about"] == {"encoder": "fake", "dataset": "fake", "split": "train"}
    assert plain["facts"]["view"] == "square=16"
    assert len(plain["shards"]) == 5
    assert Manifest.from_json(json.dumps(plain)).complete


@pytest.mark.parametrize(
    "change",
    [
        {"key": "0" * 64},
        {"shards": {"00009": {"sha256": "", "bytes": 1, "images": 1}}},
        {"shards": {"00000": {}}},
        {"shard_images": 0},
        {"facts": {}},
        {"shards": 3},
        {"images": 21},
        {"shard_images": 5},
        {"images": float("inf")},
        {"about": {"encoder": "another"}},
        {"sum": "0" * 64},
    ],
)
def test_a_manifest_that_contradicts_itself_counts_as_none(tmp_path: Path, change: dict[str, object]):
    made = source(tmp_path)
    made.extract()
    path = tmp_path / made.key[:2] / made.key / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert Bank(tmp_path).entries() == []


def test_a_manifest_of_a_version_without_sums_counts(tmp_path: Path):
    made = source(tmp_path)
    made.extract()
    path = tmp_path / made.key[:2] / made.key / "manifest.json"
    plain = json.loads(path.read_text())
    del plain["sum"]
    path.write_text(json.dumps(plain))
    assert source(tmp_path).complete
    # Without a sum, a count that is wrong is seen by the split's.
    path.write_text(json.dumps({**plain, "images": 21}))
    again = source(tmp_path)
    assert [t.index for t in again.reader()] == list(range(20))
    assert again.forwards == 20


@pytest.mark.parametrize("text", ["[" * 100_000, "[]", "7", "null", "\x00", '{"images": 1e999}'])
def test_a_manifest_that_is_anything_counts_as_none(tmp_path: Path, text: str):
    made = source(tmp_path)
    made.extract()
    (tmp_path / made.key[:2] / made.key / "manifest.json").write_text(text)
    assert Bank(tmp_path).entries() == []
    again = source(tmp_path)
    again.extract()
    assert again.forwards == 20


def test_an_entry_under_another_key_counts_as_none(tmp_path: Path):
    made = source(tmp_path, view="square=32")
    made.extract()
    wanted = source(tmp_path)
    shutil.copytree(tmp_path / made.key[:2] / made.key, tmp_path / wanted.key[:2] / wanted.key)
    again = source(tmp_path)
    again.extract()
    assert again.forwards == 20
    assert again.reader()[0].grids[1] == ((4, 4),)


def test_default_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RICE_EVAL_BANK", str(tmp_path))
    assert default_bank_root() == tmp_path
    monkeypatch.delenv("RICE_EVAL_BANK")
    assert default_bank_root().name == "bank"


def _three(root: Path) -> list[str]:
    keys = []
    for k, view in enumerate(("square=16", "square=32", "square=48")):
        made = source(root, view=view)
        made.extract()
        keys.append(str(made.key))
        os.utime(root / made.key[:2] / made.key / "manifest.json", (1000.0 + k, 1000.0 + k))
    return keys


def test_prune_takes_the_least_recently_used_first(tmp_path: Path):
    keys = _three(tmp_path)
    bank = Bank(tmp_path)
    sizes = {m.key.digest: folder_bytes(e.folder) for e, m in bank.entries()}
    before = files(tmp_path)
    would = bank.prune(sizes[keys[2]], dry_run=True)
    assert [each.key for each in would] == keys[:2]
    assert files(tmp_path) == before
    source(tmp_path, view="square=16")  # opening it is using it
    gone = bank.prune(sizes[keys[0]] + sizes[keys[2]])
    assert [each.key for each in gone] == [keys[1]]
    assert {m.key.digest for _, m in bank.entries()} == {keys[0], keys[2]}
    bank.prune(0)
    assert files(tmp_path) == {}


def test_an_entry_that_is_being_written_is_not_removed(tmp_path: Path):
    made = source(tmp_path)
    made.extract()
    entry, _ = Bank(tmp_path).find(str(made.key)[:8])
    lock = entry.claim(0)
    assert lock is not None
    assert Bank(tmp_path).prune(0) == []
    with pytest.raises(BankError, match="another process"):
        Bank(tmp_path).remove(entry)
    lock.release()
    assert len(Bank(tmp_path).prune(0)) == 1


def test_a_reader_outlives_the_removal_of_its_entry(tmp_path: Path):
    made = source(tmp_path)
    reader = made.reader()
    before = reader[0].patches[1][0].clone()
    kept = reader[0].patches[1][0]
    Bank(tmp_path).prune(0)
    assert torch.equal(kept, before)


def test_an_entry_with_more_layers_that_is_pruned_while_it_is_read_is_made_again_as_it_was(tmp_path: Path):
    source(tmp_path, layers=(1, 2, 3)).extract()
    before = files(tmp_path)
    some = source(tmp_path, layers=(1, 3))
    reader = some.reader()
    Bank(tmp_path).prune(0)
    assert [t.index for t in reader] == list(range(20))
    assert files(tmp_path) == before
    every = source(tmp_path, layers=(1, 2, 3))
    assert [t.index for t in every.reader()] == list(range(20))
    assert every.forwards == 0


def test_no_image_is_left_out_where_the_entry_is_pruned_while_it_is_consumed(tmp_path: Path):
    source(tmp_path).extract()
    entry, _ = Bank(tmp_path).entries()[0]
    entry.shard(0).unlink()

    class Pruning(Collect):
        def consume(self, tokens: ImageTokens) -> None:
            super().consume(tokens)
            while tokens.index == 3 and not Bank(tmp_path).prune(0):
                time.sleep(0.01)  # shard 0 is being written

    consumer = Pruning()
    source(tmp_path).consume(consumer)
    assert [t.index for t in consumer.seen] == list(range(20))


def test_prune_removes_entries_with_a_damaged_manifest_first(tmp_path: Path):
    keys = _three(tmp_path)
    wreck = tmp_path / keys[2][:2] / keys[2]
    (wreck / "manifest.json").write_text("{")
    (tmp_path / "ab").mkdir()
    (tmp_path / "ab" / "of the user").mkdir()
    bank = Bank(tmp_path)
    room = sum(folder_bytes(e.folder) for e, _ in bank.entries())
    assert [each.key for each in bank.prune(room, dry_run=True)] == [keys[2]]
    assert "damaged" in _run("prune", "--max-size", str(room), root=tmp_path)[1]
    assert not wreck.exists()
    assert {m.key.digest for _, m in bank.entries()} == set(keys[:2])
    bank.prune(0)
    assert (tmp_path / "ab" / "of the user").is_dir()


def test_prune_leaves_links_to_other_disks_alone(tmp_path: Path):
    keys = _three(tmp_path / "bank")
    linked = tmp_path / "bank" / keys[0][:2] / keys[0]
    linked.rename(tmp_path / "elsewhere")
    linked.symlink_to(tmp_path / "elsewhere")
    assert {each.key for each in Bank(tmp_path / "bank").prune(0)} == set(keys[1:])
    assert not list((tmp_path / "bank").glob(".removed-*"))
    again = source(tmp_path / "bank", view="square=16")
    again.extract()
    assert again.forwards == 0


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A bank on a disk that can only be read, with a lock and a damaged shard that a dead process left."""
    root = tmp_path / "bank"
    source(root).extract()
    entry, _ = Bank(root).entries()[0]
    (entry.folder / "locks").mkdir()
    (entry.folder / "locks" / "00000.lock").touch()
    os.truncate(entry.shard(2), 100)
    for step in (["mount", "--bind", str(root), str(root)], ["mount", "-o", "remount,ro,bind", str(root)]):
        if sys.platform != "linux" or subprocess.run(step, capture_output=True).returncode != 0:
            pytest.skip("a folder can't be mounted read-only here")
    yield root
    subprocess.run(["umount", "--lazy", str(root)], check=True)  # a shard may still be mapped


def test_a_bank_that_can_only_be_read(read_only: Path):
    made = source(read_only)
    assert made.missing == (2,)
    assert len(made.mapped(0).indices) == 4
    with pytest.raises(BankError, match=r"shard 2 of bank entry .*: it has 100 bytes .*Read-only file system"):
        made.extract()
    code, text = _run("verify", root=read_only)
    assert code == 2
    assert "00002: it has 100 bytes" in text
    with pytest.raises(BankError, match="Read-only"):
        _run("prune", "--max-size", "0", root=read_only)
    assert "1 entries would be removed" in _run("prune", "--max-size", "0", "--dry-run", root=read_only)[1]


def test_looking_at_a_request_leaves_a_damaged_shard_as_it_is(tmp_path: Path):
    source(tmp_path).extract()
    entry, _ = Bank(tmp_path).entries()[0]
    os.truncate(entry.shard(2), 100)
    before = files(tmp_path)
    assert source(tmp_path).describe().present == 16
    assert files(tmp_path) == before


@pytest.mark.parametrize("command", [["ls"], ["verify"], ["info", "a"], ["prune", "--max-size", "1"]])
def test_a_folder_that_is_none_is_no_empty_bank(tmp_path: Path, command: list[str], monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").touch()
    for name in ("missing", "file"):
        with pytest.raises(UsageError, match=f"{name}.*check"):
            _run(*command, root=tmp_path / name)
    monkeypatch.setenv("RICE_EVAL_BANK", str(tmp_path / "later"))
    if command[0] != "info":
        assert CliRunner().invoke(commands.app, command).exit_code == 0


def test_find_wants_one_entry(tmp_path: Path):
    _three(tmp_path)
    with pytest.raises(NotFoundError, match="no entry"):
        Bank(tmp_path).find("zz")
    with pytest.raises(NotFoundError, match="3 entries"):
        Bank(tmp_path).find("")


@pytest.mark.parametrize(
    ("text", "count"), [("20GB", 20 * 10**9), ("1.5 GiB", 3 * 2**29), ("7", 7), ("0", 0), ("2 kb", 2000)]
)
def test_sizes_in_words(text: str, count: int):
    assert commands.parse_bytes(text) == count


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (999_999, "1 MB"), (4e12, "4 TB"), (4e15, "4e+03 TB")],
)
def test_bytes_for_people(count: float, text: str):
    assert commands.human_bytes(count) == text


@pytest.mark.parametrize("text", ["", "GB", "-3GB", "3 XB", "1e9", "9" * 400, "99999999TB"])
def test_no_sizes(text: str):
    with pytest.raises(UsageError, match="is no size|larger than any disk"):
        commands.parse_bytes(text)


def _run(*arguments: str, root: Path) -> tuple[int, str]:
    done = CliRunner().invoke(commands.app, [*arguments, "--bank", str(root)])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stdout


def test_the_commands(tmp_path: Path):
    (tmp_path / "none").mkdir()
    assert _run("ls", root=tmp_path / "none")[1].startswith("0 entries")
    keys = _three(tmp_path)
    code, text = _run("ls", root=tmp_path)
    assert code == 0
    assert "3 entries" in text
    assert all(key[:12] in text for key in keys)
    rows = json.loads(_run("ls", "--json", root=tmp_path)[1])
    assert {row["key"] for row in rows} == set(keys)
    assert "square=32" in _run("info", keys[1][:10], root=tmp_path)[1]
    assert json.loads(_run("info", keys[1][:10], "--json", root=tmp_path)[1])["facts"]["layers"] == [1, 3]
    assert _run("verify", root=tmp_path) == (0, "15 shards of 3 entries checked: all sound\n")
    entry, _ = Bank(tmp_path).find(keys[0])
    with entry.shard(2).open("r+b") as handle:
        handle.seek(-1, os.SEEK_END)
        handle.write(b"\xaa")
    os.utime(entry.shard(2), (time.time() + 5,) * 2)
    entry.shard(3).unlink()
    (entry.folder / "00001-x.tmp").write_bytes(b"")
    code, text = _run("verify", "--json", root=tmp_path)
    assert code == 2
    problems = {(p["shard"], p["problem"]) for p in json.loads(text)["problems"]}
    assert problems == {
        ("00002", "its checksum differs"),
        ("00003", "it is missing"),
        ("", "00001-x.tmp is left over"),
    }
    code, text = _run("prune", "--max-size", "0", "--dry-run", root=tmp_path)
    assert "3 entries would be removed" in text
    code, text = _run("prune", "--max-size", "0", root=tmp_path)
    assert "3 entries removed" in text
    assert Bank(tmp_path).entries() == []


def test_collecting_from_an_empty_split(tmp_path: Path):
    made = source(tmp_path, FakeDataset(0))
    consumer = Collect()
    made.consume(consumer)
    assert consumer.seen == []
    assert made.indices == ()
