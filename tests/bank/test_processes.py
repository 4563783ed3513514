"""Several processes fill one bank; some die in the middle of it."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bank_fakes import Collect, FakeDataset, files, source
from bank_worker import IMAGES, dataset, fill, forwarded, peak

from rice_eval.bank.store import Bank

SHARD = 4  # images a shard, as bank_fakes has it


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Processes forked from a server that has imported everything: they start in no time."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["bank_worker"])
    return made


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("plain")
    source(root, dataset(), view="native", batch_size=2).extract()
    return files(root)


def start(context: Any, root: Path, log: Path, seconds: float) -> Any:
    process = context.Process(target=fill, args=(str(root), str(log), seconds))
    process.start()
    return process


def test_two_processes_share_the_work(tmp_path: Path, context: Any, undisturbed: dict[str, bytes]):
    root, log = tmp_path / "bank", tmp_path / "log"
    processes = [start(context, root, log, 0.01) for _ in range(2)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert files(root) == undisturbed
    assert forwarded(log) == dict.fromkeys(range(IMAGES), 1)


def test_a_consumer_rides_beside_another_process(tmp_path: Path, context: Any, undisturbed: dict[str, bytes]):
    root, log = tmp_path / "bank", tmp_path / "log"
    other = start(context, root, log, 0.01)
    consumer = Collect()
    mine = source(root, dataset(), view="native", batch_size=2)
    mine.consume(consumer)
    other.join(60)
    assert other.exitcode == 0
    assert [t.index for t in consumer.seen] == list(range(IMAGES))
    assert mine.forwards + sum(forwarded(log).values()) == IMAGES
    assert files(root) == undisturbed


def test_a_shard_is_taken_over_from_the_dead(tmp_path: Path, context: Any, undisturbed: dict[str, bytes]):
    root, log = tmp_path / "bank", tmp_path / "log"
    slow = start(context, root, log, 5.0)
    while not log.exists() or not log.read_text():
        time.sleep(0.01)
    slow.kill()
    slow.join()
    assert slow.exitcode == -signal.SIGKILL
    rest = source(root, dataset(), view="native", batch_size=2)
    rest.extract()
    assert rest.forwards == IMAGES
    assert files(root) == undisturbed


@pytest.mark.parametrize("kills", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_random_kills(tmp_path: Path, context: Any, undisturbed: dict[str, bytes], kills: int):
    chance = random.Random(kills)
    done = rounds = 0
    while done < kills:
        rounds += 1
        root, log = tmp_path / f"bank{rounds}", tmp_path / f"log{rounds}"
        pair = [start(context, root, log, 0.004) for _ in range(2)]
        killed = 0
        while done < kills:
            time.sleep(chance.uniform(0.0, 0.25))
            place = chance.randrange(2)
            if not pair[place].is_alive():
                break
            pair[place].kill()
            pair[place].join()
            if pair[place].exitcode == -signal.SIGKILL:
                done, killed = done + 1, killed + 1
            pair[place] = start(context, root, log, 0.004)
        for process in pair:
            process.join(60)
            assert process.exitcode == 0
        # One more run tidies up after a process that died when everything was there already.
        source(root, dataset(), view="native", batch_size=2).extract()
        assert files(root) == undisturbed
        counts = forwarded(log)
        assert set(counts) == set(range(IMAGES))
        # In flight of one process: the shard in the forward and the one being written.
        assert sum(counts.values()) - IMAGES <= killed * 2 * SHARD
    assert Bank(root).strays() == []


def test_a_lock_that_is_held_is_respected_and_does_not_block_others(tmp_path: Path):
    data = FakeDataset(12)
    source(tmp_path, data).extract((0,))
    entry, _ = Bank(tmp_path).entries()[0]
    lock = entry.claim(1)
    assert lock is not None
    made = source(tmp_path, data)
    made.extract(wait=False)
    assert made.missing == (1,)
    assert entry.claim(1) is None
    lock.release()
    made.extract()
    assert made.missing == ()
    assert made.forwards == 8


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_stays_flat(tmp_path: Path, context: Any):
    peaks = []
    for images in (100, 800):  # 150 MB and 1.2 GB of tokens
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=peak, args=(str(tmp_path / str(images)), images, there))
        process.start()
        assert here.poll(300)
        peaks.append(here.recv())
        process.join(60)
    assert peaks[1] < 1.05 * peaks[0]
