"""A leaderboard of 500 encoders x 40 tasks x 3 seeds, from 60,000 record files on disk.

    python benchmarks/leaderboard.py FOLDER

writes the records into FOLDER (once) and times reading, ranking and writing.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path

import numpy as np

from rice_eval.results.leaderboard import build
from rice_eval.results.record import (
    Cost,
    EncoderEntry,
    Environment,
    Metric,
    ProtocolEntry,
    Record,
    TaskEntry,
    record_text,
    settings_hash,
)
from rice_eval.results.store import ResultStore, paused_collector, read_records
from rice_eval.results.tables import latex, long_csv, markdown, wide_csv


def write_records(root: Path, encoders: int, tasks: int, seeds: int) -> None:
    """Synthetic records of encoders whose skill differs, with 40 classes each and no statistics."""
    rng = np.random.default_rng(0)
    store = ResultStore(root)
    skill = rng.uniform(30, 70, encoders)
    names = [f"class {c}" for c in range(40)]
    where = Environment(rice_eval="0", git=None, python="3", platform="", packages={}, device="cpu", threads=1)
    for e in range(encoders):
        encoder = EncoderEntry(
            name=f"encoder-{e:03d}", family="synthetic", arch="ViT", params=1_000_000 * (e + 1), patch=14, resolution=224, layers=12,
            widths=(384,) * 12, strides=(14,) * 12, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), abilities=(), license=None,
            source="synthetic", sha256=f"{e:064x}", notes=(),
        )  # fmt: skip
        for t in range(tasks):
            task = TaskEntry(
                name=f"segmentation/task-{t:02d}", kind="segmentation", dataset=f"task-{t:02d}", options={}, train_split="train",
                test_split="val", train_fingerprint=f"{t:016x}", test_fingerprint=f"{t:016x}", n_train=1000, n_test=500,
                classes=tuple(names),
            )  # fmt: skip
            centre = skill[e] + rng.normal(0, 3)
            for seed in range(seeds):
                value = float(centre + rng.normal(0, 0.3))
                settings = {"view": "square=224", "norm": True, "tokens": "fp16", "seed": seed}
                table = dict(zip(names, (value + rng.normal(0, 10, 40)).tolist()))
                record = Record(
                    created="2026-01-01T00:00:00Z", encoder=encoder, task=task,
                    protocol=ProtocolEntry(id="linear", hash=settings_hash("linear", 1, settings), settings=settings),
                    metric="miou", metrics={"miou": Metric(value=value, low=value - 1, high=value + 1)},
                    per_class={"iou": table}, view="square=224", layers=(12,), norm=True, seeds=(seed,), chosen={"lr": 0.001},
                    heads=(), cost=Cost(params=encoder.params, flops=None, tokens_per_image=256.0, forwards=0), bank=None,
                    seconds={"fit": 1.0}, peak_memory_mb=1.0, environment=where, statistics=None,
                ).sealed()  # fmt: skip
                path = store.path_of(record)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(
                    record_text(record.model_dump(mode="json")), encoding="utf-8"
                )  # 60,000 syncs take minutes


def main() -> None:
    """Write the records if they are not there, then time each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    if not (options.folder / "records").is_dir():
        write_records(options.folder, 500, 40, 3)
    marks = [("start", time.perf_counter(), time.process_time())]
    with paused_collector():
        stored = read_records([options.folder])
        marks.append(("read", time.perf_counter(), time.process_time()))
        found = build(stored)
        marks.append(("rank", time.perf_counter(), time.process_time()))
        sizes = [len(w(found)) for w in (wide_csv, long_csv, markdown, latex)]
        marks.append(("write", time.perf_counter(), time.process_time()))
    for (_, wall, cpu), (name, now, spent) in itertools.pairwise(marks):
        print(f"{name}: {now - wall:.2f} s ({spent - cpu:.2f} s of processor)")
    print(
        f"{len(stored)} records: {marks[-1][1] - marks[0][1]:.2f} s ({marks[-1][2] - marks[0][2]:.2f} s of processor), {sizes} bytes"
    )


if __name__ == "__main__":
    main()
