"""Commands that evaluate: ``demo``, ``segmentation``, ``detection``, ``regions``, ``ocr``, ``run``, ``plan``."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rice_eval.cli.engine import ENGINE, THEIRS, other_engine
from rice_eval.cli.shown import show_results
from rice_eval.environment import launched
from rice_eval.errors import UsageError

if TYPE_CHECKING:
    from rice_eval.run import Result

__all__ = ["folders", "pairs", "refuse_given", "register"]

Encoders = Annotated[
    list[str], typer.Option("--encoder", "-e", help="Encoder: NAME, NAME@WEIGHTS, or ADAPTER:REFERENCE. Repeatable.")
]
Weights = Annotated[
    Path | None, typer.Option("--weights", help="Checkpoint that replaces the source of the one --encoder given.")
]
Data = Annotated[
    list[str] | None, typer.Option("--data", help="Folder (or zip) of the data; DATASET=DIR where tasks need several.")
]
DatasetName = Annotated[str, typer.Option("--dataset", "-d", help="Dataset, see rice-eval list datasets.")]
ReaderOptions = Annotated[
    list[str] | None, typer.Option("--option", help="NAME=VALUE for the dataset's reader. Repeatable.")
]
Protocols = Annotated[
    list[str] | None, typer.Option("--protocol", "-p", help="Protocol id; the task's own by default. Repeatable.")
]
ViewOption = Annotated[str | None, typer.Option("--view", help="View instead of the task's, e.g. square=448.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="FIELD=VALUE of the protocol; part of its hash. Repeatable.")
]
Results = Annotated[Path, typer.Option("--results", help="Folder that records go to.")]
BankRoot = Annotated[
    Path | None, typer.Option("--bank", help="Folder of the bank of tokens; your cache folder by default.")
]
NoStore = Annotated[bool, typer.Option("--no-store", help="Keep no tokens: protocols ride on the pass.")]
Device = Annotated[str, typer.Option("--device", help="Torch device: cpu, cuda, cuda:1 …")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Images a forward.")]
Workers = Annotated[int | None, typer.Option("--workers", min=0, help="Decoding workers; chosen by itself by default.")]
Autocast = Annotated[str | None, typer.Option("--autocast", help="bf16 or fp16 forward; the weights' own by default.")]
Compile = Annotated[bool, typer.Option("--compile", help="Run the encoder's blocks through torch.compile.")]
BadImage = Annotated[
    str, typer.Option("--on-bad-image", help="stop at an unreadable image, or skip it, count it and list it.")
]
Include = Annotated[list[Path] | None, typer.Option("--include", help="Folder with more cards or code. Repeatable.")]
LimitTrain = Annotated[int | None, typer.Option("--limit-train", min=1, help="Use only this many training images.")]
LimitTest = Annotated[int | None, typer.Option("--limit-test", min=1, help="Use only this many test images.")]
Predictions = Annotated[
    Path | None,
    typer.Option("--save-predictions", help="Folder for every test image's prediction: PNG, or COCO's JSON."),
]
Panels = Annotated[
    int, typer.Option("--panels", min=0, help="Test images kept as pictures, spread evenly over the set.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines instead of a table.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let code shipped with a checkpoint run on this machine.")
]
Page = Annotated[bool, typer.Option("--report/--no-report", help="Write leaderboards and the HTML page when done.")]
ExecutorName = Annotated[str, typer.Option("--executor", help="local, or ray: shards and jobs as tasks of a cluster.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster (auto, HOST:PORT); starts one on this machine by default.")
]


def register(app: typer.Typer) -> None:
    """Add this module's commands to ``app``."""
    app.command("demo")(demo)
    app.command("segmentation")(segmentation)
    app.command("detection")(detection)
    app.command("regions")(regions)
    app.command("ocr")(ocr)
    app.command("run")(run)
    app.command("plan")(plan)


def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for records, leaderboard and page.")] = Path(
        "rice-eval-demo"
    ),
    bank: BankRoot = None,
    n_train: Annotated[int | None, typer.Option("--n-train", min=20, help="Training scenes; the task's own.")] = None,
    n_val: Annotated[int | None, typer.Option("--n-val", min=10, help="Test scenes; the task's own.")] = None,
    as_json: AsJson = False,
) -> None:
    """Evaluate five real encoders on the embedded scenes: no GPU, no hub, no dataset, a few minutes."""
    from rice_eval.demo import run_demo

    results, files = run_demo(out, bank=bank or out / "bank", n_train=n_train, n_val=n_val)
    show_results(results, as_json)
    if not as_json:
        for label, path in files.items():
            typer.echo(f"{label}: {path}")


_SHARED: dict[str, tuple[Any, Any]] = {
    "data": (Data, None),
    "option": (ReaderOptions, None),
    "protocol": (Protocols, None),
    "view": (ViewOption, None),
    "setting": (Settings, None),
    "weights": (Weights, None),
    "results": (Results, Path("results")),
    "bank": (BankRoot, None),
    "no_store": (NoStore, False),
    "device": (Device, "cpu"),
    "batch_size": (BatchSize, 16),
    "workers": (Workers, None),
    "autocast": (Autocast, None),
    "compile": (Compile, False),
    "on_bad_image": (BadImage, "stop"),
    "limit_train": (LimitTrain, None),
    "limit_test": (LimitTest, None),
    "save_predictions": (Predictions, None),
    "panels": (Panels, 8),
    "include": (Include, None),
    "trust_remote_code": (Trust, False),
    "executor": (ExecutorName, "local"),
    "address": (Address, None),
    "report": (Page, True),
    "as_json": (AsJson, False),
}
"""Parameters of every command that evaluates: annotation and default. ``option`` is one of those on one dataset."""


def _on_dataset(kind: str, text: str, reader: dict[str, Any], dataset: str = "scenes") -> Callable[..., None]:
    """A command that evaluates encoders on one dataset.

    Args:
        kind: kind of task.
        text: its help.
        reader: further flags that are options of the dataset's reader, by the option's name: their annotations.
        dataset: what is evaluated on where none is given.
    """

    def command(**given: Any) -> None:
        if "engine" in given:
            values = pairs("--set", given["setting"])
            other = other_engine(kind, given, values, {name: default for name, (_, default) in _SHARED.items()})
            if other is not None:
                _tell([other], given["results"], given["as_json"], given["report"])
                return
        options = pairs("--option", given.pop("option"))
        flagged = {name: given.pop(name) for name in reader}
        options |= {name: value for name, value in flagged.items() if value is not None}
        # A benchmark of a hundred sets: without a set, all of them.
        suite = kind == "detection" and given["dataset"] == "roboflow100" and "set" not in options
        (_evaluate_suite if suite else _evaluate)(kind=kind, options=options, **_arguments(given))

    flags: dict[str, tuple[Any, Any]] = {
        "encoder": (Encoders, inspect.Parameter.empty),
        "dataset": (DatasetName, dataset),
    }
    if kind in THEIRS:
        flags |= ENGINE
    flags |= {name: (annotation, None) for name, annotation in reader.items()}
    flags |= _SHARED
    return _with_flags(command, text, flags)


def _with_flags(command: Callable[..., None], text: str, flags: dict[str, tuple[Any, Any]]) -> Callable[..., None]:
    """``command`` with these flags and this help: Typer reads a command's flags from its signature."""
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, keyword, default=default, annotation=a) for name, (a, default) in flags.items()]
    )
    command.__annotations__ = {name: annotation for name, (annotation, _) in flags.items()}
    command.__doc__ = text
    return command


def _arguments(given: dict[str, Any]) -> dict[str, Any]:
    """Flags under the names that ``rice_eval.evaluate`` has for them."""
    encoders, weights = given.pop("encoder"), given.pop("weights")
    if weights is not None and len(encoders) != 1:
        raise UsageError("--weights goes with exactly one --encoder", "for several write --encoder NAME@WEIGHTS")
    renamed = {
        "encoders": encoders,
        "weights": {encoders[0]: weights} if weights is not None else None,
        "executor": _executor(given.pop("executor"), given.pop("address")),
        "data": folders(given.pop("data")),
        "protocols": given.pop("protocol") or (),
        "settings": pairs("--set", given.pop("setting")),
        "include": given.pop("include") or (),
        "store": not given.pop("no_store"),
        "predictions": given.pop("save_predictions"),
    }
    return {**renamed, **given}


segmentation = _on_dataset(
    "segmentation",
    "Semantic segmentation from frozen tokens.",
    {"classes": Annotated[str | None, typer.Option(help="Class set, where the dataset has several (e.g. super).")]},
)
_JSON = {
    "train_json": Annotated[str | None, typer.Option(help="coco-format: annotations of the training split.")],
    "val_json": Annotated[str | None, typer.Option(help="coco-format: annotations of the test split.")],
    "images": Annotated[str | None, typer.Option(help="coco-format: folder of the images, {split} for the split.")],
}
detection = _on_dataset("detection", "Object detection from frozen tokens.", _JSON)
regions = _on_dataset("regions", "Recognition and retrieval of given regions.", _JSON)
ocr = _on_dataset(
    "ocr",
    "Finding and reading text from frozen tokens.",
    {"level": Annotated[str | None, typer.Option(help="funsd: words or entities.")]},
    "scenes-text",
)


def _matrix(**given: Any) -> None:
    _evaluate(tasks=given.pop("task"), **_arguments(given))


run = _with_flags(
    _matrix,
    "A matrix: every encoder on every task, each image through each encoder once.",
    {
        "encoder": (Encoders, inspect.Parameter.empty),
        "task": (
            Annotated[list[str], typer.Option("--task", "-t", help="Task, see rice-eval list tasks. Repeatable.")],
            inspect.Parameter.empty,
        ),
        **{name: flag for name, flag in _SHARED.items() if name != "option"},
    },
)


def _evaluate(results: Path, as_json: bool, report: bool, **arguments: Any) -> None:
    from rice_eval.run import evaluate

    done = evaluate(results=results, **arguments)
    if launched()[0] > 0:
        return  # the first process of torchrun has the records and tells of them
    _tell(done, results, as_json, report)


def _tell(done: list[Result], results: Path, as_json: bool, report: bool) -> None:
    """Print results, and write leaderboards and the page where asked for."""
    from rice_eval.publish import publish

    show_results(done, as_json)
    if report:
        files = publish(results)
        if not as_json:
            for label, path in files.items():
                typer.echo(f"{label}: {path}")


def _executor(name: str, address: str | None) -> Any:
    """How a plan is run: here, or on Ray."""
    if name not in ("local", "ray"):
        raise UsageError(f"--executor {name} is not known", "choose local or ray")
    if address is not None and name != "ray":
        raise UsageError("--address names a Ray cluster", "add --executor ray")
    if launched()[1] > 1 and name == "ray":
        raise UsageError("torchrun and --executor ray both start processes", "use one of them")
    if name == "ray":
        from functools import partial

        from rice_eval.cluster import RayOptions, execute_on_ray

        return partial(execute_on_ray, ray_options=RayOptions(address=address))
    from rice_eval.run import execute

    return execute


def _evaluate_suite(results: Path, as_json: bool, report: bool, **arguments: Any) -> None:
    """All sets of Roboflow 100: category means, and the broken sets by name on stderr."""
    from rice_eval.cli.tables import print_table
    from rice_eval.publish import publish
    from rice_eval.suite import run_roboflow100

    for name in ("kind", "dataset"):
        arguments.pop(name)
    data = arguments.pop("data")
    if isinstance(data, dict):
        data = data.get("roboflow100")
    suite = run_roboflow100(
        arguments.pop("encoders"),
        data=data,
        said=lambda line: typer.echo(line, err=True),
        results=results,
        **arguments,
    )
    path = suite.save(results / "roboflow100.json")
    if as_json:
        for row in suite.rows():
            typer.echo(json.dumps({**row, "broken": sorted(suite.broken), "summary": str(path)}, sort_keys=True))
    else:
        print_table([{k: f"{v:.2f}" if isinstance(v, float) else v for k, v in row.items()} for row in suite.rows()])
        typer.echo(f"{len(suite.broken)} broken sets, {len(suite.absent)} not in the copy; all scores: {path}")
    if report:
        publish(results)


def plan(
    encoder: Encoders,
    task: Annotated[list[str], typer.Option("--task", "-t", help="Task. Repeatable.")],
    data: Data = None,
    protocol: Protocols = None,
    view: ViewOption = None,
    setting: Settings = None,
    bank: BankRoot = None,
    include: Include = None,
    limit_train: LimitTrain = None,
    limit_test: LimitTest = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Time each encoder on blank frames and say how long its passes take.")
    ] = False,
    device: Device = "cpu",
    batch_size: BatchSize = 16,
    autocast: Autocast = None,
    compile: Compile = False,
    as_json: AsJson = False,
) -> None:
    """What a run would do: passes, images, bytes, what is already in the bank. Does no work."""
    from rice_eval.preview import preview, sizing

    rows = preview(
        encoder,
        task,
        data=folders(data),
        protocols=protocol or (),
        view=view,
        settings=pairs("--set", setting),
        bank=bank,
        include=include or (),
        limit_train=limit_train,
        limit_test=limit_test,
        estimate=estimate,
        device=device,
        batch_size=batch_size,
        autocast=autocast,
        compile=compile,
    )
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
        return
    from rice_eval.cli.tables import print_table

    print_table(rows)
    table = sizing(rows) if estimate else []
    if table:
        typer.echo("\nOne pass over train and val at 1024 tokens an image, four layers, on devices like this one:\n")
        print_table(table)


def refuse_given(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse options that were given and would do nothing.

    Raises:
        UsageError: one of ``names`` is on the command line.
    """
    for parameter in context.command.params:
        if parameter.name in names and str(context.get_parameter_source(parameter.name)).endswith("COMMANDLINE"):
            raise UsageError(f"{parameter.opts[0]} {why}", "leave it out")


def pairs(flag: str, items: list[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` items of a flag as a mapping; UsageError where one is not."""
    out = {}
    for item in items or []:
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise UsageError(f"{flag} '{item}' is not NAME=VALUE", f"write it like {flag} seed=1")
        out[name] = value
    return out


def folders(items: list[str] | None) -> Path | dict[str, Path] | None:
    """One folder for all, or a mapping from dataset to folder."""
    if not items:
        return None
    # A bare path may contain '='; a mapping's left side never looks like a path.
    named = [item for item in items if "=" in item and "/" not in item.partition("=")[0] and not Path(item).exists()]
    if not named and len(items) == 1:
        return Path(items[0])
    if len(named) != len(items):
        raise UsageError("--data is given several times without names", "write --data DATASET=DIR for each")
    return {item.partition("=")[0]: Path(item.partition("=")[2]) for item in items}
