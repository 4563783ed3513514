"""What a run would do, before any work: its passes, their tokens and bytes, and what is in the bank already."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rice_eval.bank.estimate import estimate_pass, flop_rate, measure_rate, sizing_table
from rice_eval.bank.store import Bank, default_bank_root
from rice_eval.progress import silent
from rice_eval.run import RunOptions, check_loaded, load, open_sources, plan_of

__all__ = ["preview", "sizing"]


def preview(
    encoders: Sequence[str],
    tasks: Sequence[str],
    *,
    bank: Path | None = None,
    estimate: bool = False,
    device: str = "cpu",
    batch_size: int = 16,
    autocast: str | None = None,
    compile: bool = False,
    **arguments: Any,
) -> list[dict[str, Any]]:
    """One row a pass, in the order they would run. No image is decoded or pushed through an encoder.

    Args:
        encoders, tasks: as for ``rice_eval.evaluate``, whose plan arguments go into ``arguments``.
        bank: the bank that the run would use.
        estimate: measure each encoder on blank frames for some seconds, and say how long its passes keep it busy; decoding
            and storing go on beside it, and are not counted. ``TFLOP/s`` is the rate in operations, None where they can't be
            counted.
        device, batch_size, autocast, compile: how the run would forward.

    Raises:
        RiceEvalError: what the run itself would refuse.
    """
    plan = plan_of(encoders, tasks, **arguments)
    root = bank or default_bank_root()
    options = RunOptions(
        results=Path("."), bank=root, device=device, batch_size=batch_size, autocast=autocast, compile=compile
    )
    rows = []
    for ref, group in groupby(plan.jobs, key=lambda job: job.encoder):
        jobs = list(group)
        loaded = load(ref, plan, options)
        for job in jobs:
            check_loaded(job, loaded.encoder, plan)
        open_sources(loaded, jobs, plan, Bank(root), options, silent)
        speeds: dict[tuple[int, int], tuple[float, float | None]] = {}  # frames and operations a second
        for source in loaded.sources.values():
            rate, operations = None, None
            if estimate:
                frame = source.frame_size
                if frame not in speeds:
                    flops = loaded.encoder.flops(*frame)  # before the encoder moves to its device
                    speed = measure_rate(loaded.encoder, frame, batch_size=batch_size, device=device, autocast=autocast)
                    speeds[frame] = speed, flop_rate(speed, flops) if flops else None
                speed, operations = speeds[frame]
                rate = speed / source.frames_per_image
            cost = estimate_pass(source, rate)
            row = {
                "encoder": cost.encoder,
                "dataset": f"{cost.dataset}/{cost.split}",
                "view": cost.view,
                "layers": ",".join(map(str, cost.layers)),
                "dtype": cost.dtype,
                "images": cost.images,
                "in bank": cost.present,
                "tokens": cost.tokens,
                "MB": round(cost.bytes / 1e6, 1),
                "MB in bank": round(cost.present_bytes / 1e6, 1),
            }
            if estimate:
                row["seconds"] = round(cost.seconds, 1) if cost.seconds is not None else None
                row["TFLOP/s"] = float(f"{operations / 1e12:.3g}") if operations else None
            rows.append(row)
    return rows


def sizing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Passes of ViT-B, L and H over ADE20K, COCO and LVIS on 1, 8 and 64 devices like this one, at the highest rate of an
    estimate; none where no encoder's operations could be counted.

    Args:
        rows: of ``preview(estimate=True)``.
    """
    rate = max((row["TFLOP/s"] for row in rows if row.get("TFLOP/s")), default=None)
    if rate is None:
        return []
    return [
        {
            "encoder": row.encoder,
            "dataset": row.dataset,
            "images": row.images,
            "Mtokens": round(row.tokens / 1e6, 1),
            "GB fp16": round(row.bytes_fp16 / 1e9),
            "GB int8": round(row.bytes_int8 / 1e9),
            **{f"hours on {n}": float(f"{hours:.3g}") for n, hours in row.hours.items()},
        }
        for row in sizing_table(rate * 1e12)
    ]
