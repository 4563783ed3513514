"""Records in the forms other tools read: model-card metadata, lmms-eval's result JSON, flat scalars."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from rice_eval.errors import MissingExtraError
from rice_eval.results.runs import encoder_labels
from rice_eval.results.store import StoredRecord

__all__ = ["lmms_eval", "log_mlflow", "log_tensorboard", "log_wandb", "model_index", "scalars"]

_HUB_TASKS = {
    "segmentation": "image-segmentation",
    "detection": "object-detection",
    "regions": "zero-shot-image-classification",
    "ocr": "image-to-text",
    "mllm": "image-text-to-text",
}
"""Kind of task -> task id of the Hugging Face hub's model cards."""


def model_index(stored: Sequence[StoredRecord]) -> str:
    """Model-card metadata (``model-index``) of one encoder: YAML to paste between the ``---`` of a README.

    Results are sorted by task, protocol and seeds; every metric of a record is listed, its headline first.

    Raises:
        ValueError: records of several encoders, or of several weights of one: a card is of one model, and the hub's reader gives
            all results to the last name.
    """
    _one_encoder(stored, "a model card")
    results = []
    for entry in sorted(stored, key=_order):
        record = entry.record
        names = [record.metric, *sorted(m for m in record.metrics if m != record.metric)]
        results.append(
            {
                "task": {"type": _HUB_TASKS.get(record.task.kind, record.task.kind), "name": record.task.name},
                "dataset": {
                    "name": record.task.dataset,
                    "type": record.task.dataset,
                    "split": record.task.test_split,
                    "revision": record.task.test_fingerprint,
                },
                "metrics": [
                    {
                        "type": metric,
                        "name": f"{metric} ({record.protocol.id} {record.protocol.hash}, record {record.sha256[:12]})",
                        "value": round(record.metrics[metric].value, 4),
                    }
                    for metric in names
                ],
            }
        )
    models = [{"name": stored[0].record.encoder.name, "results": results}]
    text: str = yaml.safe_dump({"model-index": models}, sort_keys=False, allow_unicode=True, width=110)
    return text


def _one_encoder(stored: Sequence[StoredRecord], what: str) -> None:
    labels = encoder_labels((e.record.encoder.name, e.record.encoder.sha256) for e in stored)
    if len(labels) != 1:
        raise ValueError(f"{what} is of one encoder, and these records are of {', '.join(sorted(labels.values())[:6])}")


def _order(entry: StoredRecord) -> tuple[str, str, tuple[int, ...], str]:
    r = entry.record
    return (r.task.name, r.protocol.id, r.seeds, r.identity)


def lmms_eval(stored: Sequence[StoredRecord]) -> str:
    """The ``results`` / ``configs`` / ``versions`` / ``n-samples`` layout that lmms-eval writes, one file for one encoder.

    Keys of ``results`` are ``task/protocol`` with the seed appended where there are several; values carry lmms-eval's
    ``metric,filter`` names, with the standard error from the interval's width. Rates are fractions there, percent here.

    Raises:
        ValueError: records of several encoders.
    """
    _one_encoder(stored, "a file of lmms-eval's layout")
    results: dict[str, Any] = {}
    configs: dict[str, Any] = {}
    versions: dict[str, int] = {}
    samples: dict[str, Any] = {}
    for entry in sorted(stored, key=_order):
        record = entry.record
        key = f"{record.task.name}/{record.protocol.id}"
        if key in results:
            key += f"/{record.identity[:8]}"
        values: dict[str, Any] = {"alias": key}
        for name, metric in sorted(record.metrics.items()):
            scale = 100.0 if metric.unit == "%" else 1.0
            values[f"{name},none"] = metric.value / scale
            known = metric.low is not None and metric.high is not None
            values[f"{name}_stderr,none"] = (
                ((metric.high or 0.0) - (metric.low or 0.0)) / (2 * 1.959963984540054 * scale) if known else "N/A"
            )
        results[key] = values
        configs[key] = {"task": record.task.name, "protocol": record.protocol.id, **record.protocol.settings}
        versions[key] = record.protocol.version
        samples[key] = {"original": record.task.n_test, "effective": record.task.n_test - len(record.skipped)}
    first = min(stored, key=_order).record
    content = {
        "results": results,
        "configs": configs,
        "versions": versions,
        "n-samples": samples,
        "model_source": "rice_eval",
        "model_name": first.encoder.name,
        "model_sha256": first.encoder.sha256,
        "date": first.created,
    }
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def scalars(stored: Sequence[StoredRecord]) -> dict[str, float]:
    """Flat names to numbers: ``task/protocol/metric`` and ``…_low``, ``…_high``; encoders and seeds apart where there are several."""
    out: dict[str, float] = {}
    labels = encoder_labels((e.record.encoder.name, e.record.encoder.sha256) for e in stored)
    encoders = [labels[e.record.encoder.name, e.record.encoder.sha256] for e in stored]
    keys = [(label, e.record.task.name, e.record.protocol.id) for label, e in zip(encoders, stored)]
    several = len({k[0] for k in keys}) > 1
    for entry, key in zip(stored, keys):
        record = entry.record
        prefix = "/".join(key if several else key[1:])
        if keys.count(key) > 1:
            prefix += f"/seed-{'-'.join(map(str, record.seeds))}-{record.identity[:8]}"
        for name, metric in record.metrics.items():
            out[f"{prefix}/{name}"] = metric.value
            if metric.low is not None and metric.high is not None:
                out[f"{prefix}/{name}_low"] = metric.low
                out[f"{prefix}/{name}_high"] = metric.high
    return dict(sorted(out.items()))


def log_tensorboard(stored: Sequence[StoredRecord], folder: Path, step: int = 0) -> None:
    """Write ``scalars`` as one step of a TensorBoard run; MissingExtraError where tensorboard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError.of("tensorboard", "tracking", "writing TensorBoard scalars") from error
    with SummaryWriter(str(folder)) as writer:
        for name, value in scalars(stored).items():
            writer.add_scalar(name, value, step)


def log_wandb(stored: Sequence[StoredRecord], project: str, step: int = 0) -> None:
    """Log ``scalars`` to a Weights & Biases run; MissingExtraError where wandb is not installed."""
    try:
        import wandb
    except ImportError as error:
        raise MissingExtraError.of("wandb", "tracking", "logging to Weights & Biases") from error
    config = {"encoders": sorted({e.record.encoder.name for e in stored})}
    run = wandb.init(project=project, config=config)
    try:
        run.log(scalars(stored), step=step)
    finally:
        run.finish()


def log_mlflow(stored: Sequence[StoredRecord], experiment: str, step: int = 0) -> None:
    """Log ``scalars`` to an MLflow run; MissingExtraError where mlflow is not installed."""
    try:
        import mlflow
    except ImportError as error:
        raise MissingExtraError.of("mlflow", "tracking", "logging to MLflow") from error
    mlflow.set_experiment(experiment)
    with mlflow.start_run():
        mlflow.log_metrics(scalars(stored), step=step)
