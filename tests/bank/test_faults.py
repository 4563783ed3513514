"""Disks that fill up, bits that flip, images that can't be read, tokens that are no numbers, memory that runs out."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from bank_fakes import Collect, FakeDataset, FakeEncoder, files, source
from torch import Tensor

from rice_eval.bank.store import Bank, Entry
from rice_eval.errors import BankError, DataError


def entry_of(root: Path) -> Entry:
    (entry, _manifest), *rest = Bank(root).entries()
    assert not rest
    return entry


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, Callable[[Entry], None]] = {
    "a flipped byte of tokens": lambda e: flip(e.shard(2), -1),
    "a flipped byte of the header": lambda e: flip(e.shard(2), 20),
    "a flipped byte of the length": lambda e: flip(e.shard(2), 0),
    "a truncated shard": lambda e: os.truncate(e.shard(2), 100),
    "an empty shard": lambda e: os.truncate(e.shard(2), 0),
    "a missing shard": lambda e: e.shard(2).unlink(),
    "two missing shards": lambda e: (e.shard(2).unlink(), e.shard(4).unlink()),
    "a shard in another's place": lambda e: e.shard(2).write_bytes(e.shard(3).read_bytes()),
}


@pytest.mark.parametrize("how", ["consume", "reader"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_redone(tmp_path: Path, name: str, how: str):
    source(tmp_path).extract()
    sound = files(tmp_path)
    DAMAGE[name](entry_of(tmp_path))
    again = source(tmp_path)
    if how == "consume":
        consumer = Collect()
        again.consume(consumer)
        assert [t.index for t in consumer.seen] == list(range(20))
    else:
        assert [t.index for t in again.reader()] == list(range(20))
    assert again.forwards == (8 if name == "two missing shards" else 4)
    assert any("shard 2 of bank entry" in note and "was redone" in note for note in again.notes)
    assert files(tmp_path) == sound


def test_damage_while_it_is_read_is_found_when_the_shard_is_opened(tmp_path: Path):
    source(tmp_path).extract()
    sound = files(tmp_path)
    again = source(tmp_path)
    reader = again.reader()
    before = reader[0].patches[1][0].clone()
    flip(entry_of(tmp_path).shard(3), -2)
    assert torch.equal(reader[0].patches[1][0], before)
    assert [t.index for t in reader] == list(range(20))
    assert again.forwards == 4
    assert files(tmp_path) == sound


def test_a_damaged_manifest_means_all_over_again(tmp_path: Path):
    source(tmp_path).extract()
    sound = files(tmp_path)
    path = entry_of(tmp_path).folder / "manifest.json"
    path.write_text(path.read_text()[:-40])
    again = source(tmp_path)
    again.extract()
    assert again.forwards == 20
    assert any("manifest" in note for note in again.notes)
    assert files(tmp_path) == sound


def test_damage_in_a_run_that_may_not_write(tmp_path: Path):
    source(tmp_path).extract()
    reader = source(tmp_path, store=False)
    flip(entry_of(tmp_path).shard(1), -1)
    with pytest.raises(BankError, match="checksum differs; run with storing on"):
        reader.consume(Collect())


def test_left_over_temporary_files_are_removed(tmp_path: Path):
    source(tmp_path).extract((0,))
    folder = entry_of(tmp_path).folder
    for number in (0, 2):
        (folder / f"{number:05d}-host-1-dead.tmp").write_bytes(b"half")
    (folder / "manifest.json.tmp").write_bytes(b"half")
    source(tmp_path).extract()
    source(tmp_path / "plain").extract()
    assert files(tmp_path / "plain") == {k: v for k, v in files(tmp_path).items() if not k.startswith("plain")}


def test_what_a_process_left_that_died_after_its_last_shard_is_removed(tmp_path: Path):
    source(tmp_path).extract()
    sound = files(tmp_path)
    folder = entry_of(tmp_path).folder
    (folder / "locks").mkdir()
    (folder / "locks" / "00004.lock").touch()
    (folder / "00004-host-1-dead.tmp").write_bytes(b"half")
    (folder / "manifest.json.tmp").write_bytes(b"half")
    source(tmp_path, store=False).consume(Collect())
    assert (folder / "locks").exists()
    source(tmp_path).consume(Collect())
    assert files(tmp_path) == sound
    assert not (folder / "locks").exists()


def test_an_unreadable_image_stops_the_pass_by_name(tmp_path: Path):
    made = source(tmp_path, FakeDataset(bad=(6,)))
    with pytest.raises(DataError, match="img-6"):
        made.consume(Collect())
    # The shard before it is whole and stays.
    mended = source(tmp_path)
    mended.extract()
    assert mended.forwards == 16


@pytest.mark.parametrize("bad", [(6,), (0, 19), (4, 5, 6, 7), tuple(range(20))])
def test_unreadable_images_are_skipped_and_listed(tmp_path: Path, bad: tuple[int, ...]):
    good = tuple(i for i in range(20) if i not in bad)
    names = tuple(f"img-{i}" for i in bad)
    consumer = Collect()
    made = source(tmp_path, FakeDataset(bad=bad), on_bad_image="skip")
    assert made.indices == good
    made.consume(consumer)
    assert tuple(t.index for t in consumer.seen) == good
    assert made.skipped == names
    assert made.forwards == len(good)
    assert tuple(t.index for t in made.reader()) == good
    warm = source(tmp_path, FakeDataset(bad=bad), on_bad_image="skip")
    assert (warm.indices, warm.skipped, warm.forwards) == (good, names, 0)
    ride = source(None, FakeDataset(bad=bad), on_bad_image="skip")
    ride.consume(Collect())
    assert (ride.indices, ride.skipped) == (good, names)
    # A run that is to stop at bad images does not take the thinned shards.
    strict = source(tmp_path, FakeDataset(bad=bad))
    with pytest.raises(DataError, match=f"img-{bad[0]}"):
        strict.extract()
    mended = source(tmp_path)
    mended.extract()
    assert mended.skipped == ()
    assert len(mended.reader()) == 20
    source(tmp_path / "plain").extract()
    assert files(tmp_path / "plain") == {k: v for k, v in files(tmp_path).items() if not k.startswith("plain")}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "int8"])
@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "Inf"), (float("-inf"), "Inf")])
def test_tokens_that_are_no_numbers_stop_with_encoder_image_and_layer(
    tmp_path: Path, value: float, word: str, dtype: str
):
    target = torch.from_numpy(FakeDataset().image(9)).float().sum()

    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        for row in range(len(images)):
            if abs(float(images[row].sum() * 255 - target)) < 0.5:
                patches[3][row, 5, 2] = value

    made = source(tmp_path, encoder=FakeEncoder(spoil), dtype=dtype)
    with pytest.raises(BankError, match=f"encoder 'fake', image 'img-9', layer 3: the tokens are {word}"):
        made.extract()
    # Nothing of its shard counts; the shards before it do.
    mended = source(tmp_path, dtype=dtype)
    assert mended.missing == (2, 3, 4)
    mended.extract()
    assert mended.forwards == 12


@pytest.mark.parametrize("dtype", ["fp16", "int8"])
def test_tokens_that_are_nan_only_in_a_batch_are_not_stored(tmp_path: Path, dtype: str):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        if len(images) > 1:
            patches[3][1, 5, 2] = float("nan")

    made = source(tmp_path, encoder=FakeEncoder(spoil), dtype=dtype)
    with pytest.raises(
        BankError, match="encoder 'fake', image 'img-1', layer 3: the tokens are NaN or Inf in a batch of 3"
    ):
        made.extract()
    assert made.missing == (0, 1, 2, 3, 4)


def test_a_token_too_large_for_fp16_says_so(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        patches[1][0, 0, 0] = 1e6

    with pytest.raises(BankError, match="img-0', layer 1: a token of 1e\\+06 does not fit fp16; store tokens as bf16"):
        source(tmp_path, encoder=FakeEncoder(spoil)).extract()
    source(tmp_path, encoder=FakeEncoder(spoil), dtype="bf16").extract()


def test_large_tokens_that_cancel_in_fp32_are_no_false_alarm(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        patches[1][:] = 2e38

    made = source(tmp_path, encoder=FakeEncoder(spoil), dtype="fp32", layers=(1, 3))
    made.extract()
    assert float(made.reader()[0].patches[1][0].max()) == pytest.approx(2e38)


def test_running_out_of_memory_halves_the_batch_and_goes_on(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        if len(images) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    encoder = FakeEncoder(spoil)
    made = source(tmp_path, encoder=encoder, batch_size=4)
    made.extract()
    assert encoder.batches[:7] == [4, 2, 1, 1, 2, 1, 1] or set(encoder.batches[3:]) <= {1, 2}
    assert len([b for b in encoder.batches if b > 1]) <= 4
    assert made.notes == (
        "memory ran out on cpu at 4 images a batch; went on with 2",
        "memory ran out on cpu at 2 images a batch; went on with 1",
    )
    plain = source(tmp_path / "plain")
    plain.extract()
    for one, other in zip(made.reader(), plain.reader()):
        assert torch.allclose(one.patches[3][0].float(), other.patches[3][0].float(), atol=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError("CUDA out of memory."),
    ],
)
def test_no_memory_for_one_image(tmp_path: Path, error: BaseException):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        raise error

    with pytest.raises(BankError, match="no memory on cpu for one image"):
        source(tmp_path, encoder=FakeEncoder(spoil)).extract()


def test_other_errors_of_the_encoder_pass_through(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        source(tmp_path, encoder=FakeEncoder(spoil)).extract()
    assert not list(tmp_path.rglob("*.tmp"))


def test_tokens_that_do_not_fit_their_grid(tmp_path: Path):
    def spoil(images: Tensor, patches: dict[int, Tensor]) -> None:
        patches[1] = patches[1][:, 1:]

    with pytest.raises(BankError, match="for a grid of 4 x 4"):
        source(tmp_path, encoder=FakeEncoder(spoil)).extract()


@pytest.fixture
def small_files() -> Iterator[Callable[[int], None]]:
    """Limits the size of files this process may write: the kernel refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_may_not_grow_stops_with_one_line_and_resumes(tmp_path: Path, small_files: Callable[[int], None]):
    made = source(tmp_path, FakeDataset(20, ((16, 16),) * 8 + ((64, 64),) * 12), view="native")
    small_files(4096)
    with pytest.raises(BankError, match="no room for the bank at .*finished shards stay"):
        made.extract()
    small_files(resource.RLIM_INFINITY)
    assert not list(tmp_path.rglob("*.tmp"))
    rest = source(tmp_path, FakeDataset(20, ((16, 16),) * 8 + ((64, 64),) * 12), view="native")
    rest.extract()
    assert rest.forwards == 12


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("a disk can't be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_stops_with_one_line_and_resumes(small_disk: Path):
    data = FakeDataset(40, ((32, 32),))
    with pytest.raises(BankError, match="No space left on device.*prune"):
        source(small_disk, data, view="native").extract()
    names = [p.name for p in small_disk.rglob("*") if p.is_file()]
    assert not [n for n in names if n.endswith(".tmp")]
    done = sum(n.endswith(".safetensors") for n in names)
    assert 0 < done < 10
    subprocess.run(["mount", "-o", "remount,size=1m", str(small_disk)], check=True)
    rest = source(small_disk, data, view="native")
    rest.extract()
    # A shard whose manifest found no room is made again; everything that counted is kept.
    assert 40 - 4 * done <= rest.forwards <= 40 - 4 * (done - 1)
    assert len(rest.reader()) == 40


def test_a_folder_that_can_not_be_written(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(BankError, match="can't be written"):
        source(tmp_path / "file" / "bank").extract()
