"""What a process of the tests does: fill a bank, and write down every image it pushes through the encoder."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bank_fakes import FakeDataset, FakeEncoder, source
from torch import Tensor

from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import Dataset
from rice_eval.views import Frame

SIZES = ((16, 16), (20, 24))
IMAGES = 64


def dataset() -> FakeDataset:
    return FakeDataset(IMAGES, SIZES)


def fill(root: str, log: str, seconds: float) -> None:
    """Fill the bank at ``root``; every image takes ``seconds`` more than it has to."""
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def slow(images: Tensor, patches: dict[int, Tensor]) -> None:
        for image in images:
            os.write(descriptor, f"{round(float(image.double().sum() * 255))}\n".encode())
            time.sleep(seconds)

    source(Path(root), dataset(), FakeEncoder(slow), view="native", batch_size=2).extract()


def forwarded(log: Path) -> Counter[int]:
    """Image -> how often it went through an encoder, from a log; a line that a kill cut short is left out."""
    data = dataset()
    index = {int(data.image(i).astype("int64").sum()): i for i in range(len(data))}
    assert len(index) == len(data)
    return Counter(index[int(line)] for line in log.read_text().split() if int(line) in index)


def peak(root: str, images: int, pipe: Connection) -> None:
    """Fill a bank with 1.5 MB of tokens an image, read it twice, and send the highest private memory in kB."""
    highest, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.005):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    highest[0] = max(highest[0], int(line.split()[1]))

    torch.set_num_threads(1)
    watcher = threading.Thread(target=watch)
    watcher.start()

    class Sum:
        total = 0.0

        def annotate(self, dataset: Dataset, index: int, frames: tuple[Frame, ...]) -> None:
            return None

        def consume(self, tokens: ImageTokens) -> None:
            self.total += float(tokens.patches[3][0].float().sum())

    made = source(
        Path(root), FakeDataset(images, ((128, 128),)), FakeEncoder(width=256), view="native", layers=(1, 2, 3)
    )
    cold, warm = Sum(), Sum()
    made.consume(cold)
    made.consume(warm)
    assert cold.total == warm.total
    for image in made.reader():
        image.patches[1][0].float().sum()
    over.set()
    watcher.join()
    pipe.send(highest[0])
