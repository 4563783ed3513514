"""``rice-eval bank``: what is stored, whether it is sound, and how to make room."""

from __future__ import annotations

import datetime
import json
import os
import re
from pathlib import Path
from typing import Any

import typer

from rice_eval.bank.manifest import Manifest
from rice_eval.bank.store import BANK_VARIABLE, Bank, Entry, default_bank_root, folder_bytes
from rice_eval.errors import UsageError

__all__ = ["app", "human_bytes", "parse_bytes"]

app = typer.Typer(no_args_is_help=True)

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

_ROOT = typer.Option(None, "--bank", help=f"Folder of the bank; ${BANK_VARIABLE} or the user's cache by default.")
_JSON = typer.Option(False, "--json", help="Print JSON.")


def parse_bytes(text: str) -> int:
    """``20GB``, ``1.5 TiB`` or ``1000000`` in bytes.

    Raises:
        UsageError: no such size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"'{text}' is no size", "write it like 20GB, 500MiB or 1000000")
    count = float(match[1]) * _UNITS[match[2].upper()]
    if count > 2**63:
        raise UsageError(f"'{text[:20]}…' is larger than any disk", "write it like 20GB, 500MiB or 1000000")
    return int(count)


def human_bytes(count: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # from there on three digits would round to 1000
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _open(root: Path | None) -> Bank:
    """The bank; UsageError where a folder that was named is none, which must not look like a bank that is empty and sound."""
    bank = Bank(root if root is not None else default_bank_root())
    try:
        with os.scandir(bank.root):
            pass
    except FileNotFoundError as error:
        if root is not None:
            raise UsageError(f"--bank {bank.root}: no such folder", "check the path") from error
    except OSError as error:
        raise UsageError(f"the bank at {bank.root} can't be listed ({error.strerror})", "check --bank") from error
    return bank


def _plain(entry: Entry, manifest: Manifest) -> dict[str, Any]:
    used = datetime.datetime.fromtimestamp(entry.used(), datetime.timezone.utc)
    return {
        "key": manifest.key.digest,
        **manifest.about,
        "view": manifest.key.view,
        "layers": list(manifest.key.layers),
        "norm": manifest.key.norm,
        "dtype": manifest.key.dtype,
        "compute": manifest.key.compute,
        "images": manifest.images,
        "shards": len(manifest.shards),
        "of": manifest.count,
        "complete": manifest.complete,
        "skipped": sum(len(s.skipped) for s in manifest.shards.values()),
        "bytes": folder_bytes(entry.folder),
        "used": used.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _name(manifest: Manifest | None) -> str:
    """What an entry holds, in a line for people."""
    if manifest is None:
        return "(manifest missing or damaged)"
    about = manifest.about
    return f"{about.get('encoder')} {about.get('dataset')}/{about.get('split')} {manifest.key.view}"


@app.command("ls")
def list_entries(root: Path | None = _ROOT, as_json: bool = _JSON) -> None:
    """List the entries: encoder, dataset, view, layers, type, size, last use."""
    bank = _open(root)
    rows = [_plain(entry, manifest) for entry, manifest in bank.entries()]
    if as_json:
        typer.echo(json.dumps(rows, indent=1))
        return
    table = [
        {
            "key": row["key"][:12],
            "encoder": row.get("encoder"),
            "dataset": f"{row.get('dataset', '')}/{row.get('split', '')}",
            "view": row["view"],
            "layers": ",".join(map(str, row["layers"])),
            "type": row["dtype"],
            "shards": f"{row['shards']} of {row['of']}",
            "size": human_bytes(row["bytes"]),
            "last use": row["used"][:16].replace("T", " "),
        }
        for row in rows
    ]
    if table:
        from rice_eval.cli.tables import print_table

        print_table(table)
    typer.echo(f"{len(rows)} entries, {human_bytes(sum(r['bytes'] for r in rows))} in {bank.root}")


@app.command()
def info(
    key: str = typer.Argument(help="The key, or its first digits."),
    root: Path | None = _ROOT,
    as_json: bool = _JSON,
) -> None:
    """Show everything an entry's key is made of, and what was left out of it."""
    entry, manifest = _open(root).find(key)
    plain = {**_plain(entry, manifest), "facts": manifest.key.facts(), "folder": str(entry.folder)}
    plain["left out"] = [list(s) for n in sorted(manifest.shards) for s in manifest.shards[n].skipped]
    if as_json:
        typer.echo(json.dumps(plain, indent=1))
        return
    for name, value in plain.items():
        shown = json.dumps(value) if isinstance(value, (dict, list)) else value
        typer.echo(f"{name:<9} {shown}")


@app.command()
def verify(
    key: str | None = typer.Argument(None, help="One entry; all by default."),
    root: Path | None = _ROOT,
    as_json: bool = _JSON,
) -> None:
    """Read every shard and compare its checksum. Damaged shards are made anew by the next run that needs them."""
    bank = _open(root)
    problems: list[dict[str, str]] = []
    entries = [bank.find(key)] if key is not None else bank.entries()
    checked = 0
    for entry, manifest in entries:
        for number, facts in sorted(manifest.shards.items()):
            checked += 1
            wrong = entry.check(number, facts)
            if wrong is not None:
                problems.append({"key": manifest.key.digest, "shard": f"{number:05d}", "problem": wrong})
    if key is None:
        problems += [{"key": name, "shard": "", "problem": why} for name, why in bank.strays()]
    if as_json:
        typer.echo(json.dumps({"entries": len(entries), "shards": checked, "problems": problems}, indent=1))
    else:
        for problem in problems:
            where = f"{problem['key'][:12]} {problem['shard']}".strip()
            typer.echo(f"{where}: {problem['problem']}")
        state = "all sound" if not problems else f"{len(problems)} with problems"
        typer.echo(f"{checked} shards of {len(entries)} entries checked: {state}")
    if problems:
        raise typer.Exit(2)


@app.command()
def prune(
    max_size: str = typer.Option(..., "--max-size", help="What may stay, such as 20GB; 0 empties the bank."),
    dry_run: bool = typer.Option(False, "--dry-run", help="Say what would go, delete nothing."),
    root: Path | None = _ROOT,
    as_json: bool = _JSON,
) -> None:
    """Delete damaged entries, then the least recently used, until the rest fits; entries being written are passed over."""
    bank = _open(root)
    gone = bank.prune(parse_bytes(max_size), dry_run=dry_run)
    keys = {each.key for each in gone}
    left = sum(folder_bytes(e.folder) for e in bank.folders() if e.folder.name not in keys)
    if as_json:
        rows = [{"key": each.key, "bytes": each.bytes} for each in gone]
        typer.echo(json.dumps({"removed": rows, "left": left, "dry_run": dry_run}, indent=1))
        return
    for each in gone:
        typer.echo(f"{each.key[:12]} {_name(each.manifest)} {human_bytes(each.bytes)}")
    verb = "would be removed" if dry_run else "removed"
    freed = human_bytes(sum(each.bytes for each in gone))
    typer.echo(f"{len(gone)} entries {verb} ({freed}), {human_bytes(left)} left in {bank.root}")
