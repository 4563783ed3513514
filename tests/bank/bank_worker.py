"""What a process of the tests does: fill a bank, and write down every image it pushes through the encoder."""

from __future__ import annotations

import os
import time
from collections import Counter
from pathlib import Path

import torch
from bank_fakes import FakeDataset, FakeEncoder, source
from torch import Tensor

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
