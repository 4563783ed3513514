"""What the adapters cost: time of ``encoder.encode`` over time of the library's own forward, both in one run.

    python benchmarks/encoders.py [--device cuda] [--batch 2] [--repeats 12] [--only timm] [--out FILE.json]

Random weights of the real shapes (ViT-B/16 and ViT-L/14), saved and loaded through the adapter, so that the very model is
timed that a user gets. ``encode`` also normalises the images, which the library's forward is spared. Each repeat runs the
two one after the other, in turns about which goes first; the figure is the ratio of the medians, and 1.03 is the limit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import Encoder
from rice_eval.adapters.blocks import WithoutDraws

LIMIT = 1.03
SIDES = {"ViT-B/16": 224, "ViT-L/14": 224}
Case = tuple[str, str, Encoder, Callable[[torch.Tensor], Any], int]


def _fill(model: Any) -> Any:
    """Small weights, so that no value overflows or becomes a denormal, which would time another thing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((torch.rand(p.shape, generator=generator) - 0.5) * 0.05 + (1.0 if p.ndim == 1 else 0.0))
    return model.eval().requires_grad_(False)


def _saved(model: Any, folder: Path) -> Path:
    path = folder / "weights.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return path


def _timm(folder: Path) -> Iterator[Case]:
    import timm

    for shape, name in (
        ("ViT-B/16", "vit_base_patch16_224"),
        ("ViT-L/14", "vit_large_patch14_reg4_dinov2"),
        ("ViT-B/16", "vit_base_patch16_dinov3"),
    ):
        with WithoutDraws():
            model = timm.create_model(name, num_classes=0, dynamic_img_size=True)
        encoder = load_encoder(f"timm:{name}", weights=_saved(_fill(model), folder))
        yield f"timm {name}", shape, encoder, model.forward_features, SIDES[shape]


def _open_clip(folder: Path) -> Iterator[Case]:
    import open_clip

    for shape, name in (("ViT-B/16", "ViT-B-16"), ("ViT-L/14", "ViT-L-14")):
        model = _fill(open_clip.create_model(name, pretrained=None))
        encoder = load_encoder(f"open_clip:{name}", weights=_saved(model, folder))
        yield f"open_clip {name}", shape, encoder, model.visual, SIDES[shape]


def _transformers(folder: Path) -> Iterator[Case]:
    import transformers

    base = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    for shape, encoder_name, family, config, patch in (
        ("ViT-B/16", "clip-vit-b-16-openai", "CLIPVision", base, 16),
        ("ViT-L/14", "clip-vit-l-14-openai", "CLIPVision", large, 14),
        ("ViT-B/16", "siglip-vit-b-16-224", "SiglipVision", base, 16),
        ("ViT-L/14", "rice-vit-l-14-560", "MLCDVision", large, 14),
    ):
        numbers = {**config, "patch_size": patch, "image_size": 224}
        model = _fill(getattr(transformers, f"{family}Model")(getattr(transformers, f"{family}Config")(**numbers)))
        place = folder / encoder_name
        model.save_pretrained(place)
        encoder = load_encoder(encoder_name, weights=place)
        yield f"transformers {family}Model", shape, encoder, model, SIDES[shape]


FAMILIES: dict[str, Callable[[Path], Iterator[Case]]] = {
    "timm": _timm,
    "open_clip": _open_clip,
    "transformers": _transformers,
}


def measure(encoder: Encoder, reference: Callable[[Any], Any], side: int, batch: int, repeats: int) -> dict[str, Any]:
    """Median seconds of both (of processor time on a CPU), and their ratio; the first two rounds warm up."""
    device = encoder.device
    images = torch.rand(batch, 3, side, side, device=device)
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    inputs = (images - mean) / std

    def ours() -> None:
        encoder.encode(images)

    @torch.inference_mode()
    def theirs() -> None:
        reference(inputs)

    # On a CPU the process's own time: a neighbour on the same cores then weighs far less on the ratio.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    seconds: dict[Callable[[], None], list[float]] = {ours: [], theirs: []}
    for repeat in range(repeats + 2):
        for run in (ours, theirs) if repeat % 2 else (theirs, ours):
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[run].append(clock() - start)
    a, b = float(np.median(seconds[ours])), float(np.median(seconds[theirs]))
    return {
        "ours_s": round(a, 5),
        "library_s": round(b, 5),
        "ratio": round(a / b, 4),
        "ratio_of_minima": round(min(seconds[ours]) / min(seconds[theirs]), 4),
    }


def main() -> int:
    """Print one line a case and say at the end whether any went over the limit; the exit status is 1 if so."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--only", choices=sorted(FAMILIES), help="one library")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    args = parser.parse_args()
    device = torch.device(args.device)
    rows = []
    for family in [args.only] if args.only else FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            for label, shape, encoder, reference, side in FAMILIES[family](Path(folder)):
                encoder.to(device)
                if isinstance(reference, torch.nn.Module):
                    reference.to(device)
                elif device.type != "cpu":
                    reference.__self__.to(device)  # type: ignore[attr-defined]
                row = {"case": label, "shape": shape, **measure(encoder, reference, side, args.batch, args.repeats)}
                rows.append(row)
                print(
                    f"{label:45s} {shape}  {row['ours_s']:.4f} s / {row['library_s']:.4f} s = {row['ratio']:.3f}",
                    flush=True,
                )
                del encoder, reference
    worst = max(row["ratio"] for row in rows)
    print(f"worst ratio {worst:.3f}, limit {LIMIT}")
    if args.out:
        machine = {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "batch": args.batch,
            "repeats": args.repeats,
        }
        args.out.write_text(json.dumps({"machine": machine, "limit": LIMIT, "rows": rows}, indent=2) + "\n")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
