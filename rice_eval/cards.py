"""Cards: data files that say what to load, which protocol to run and which reference to cite.

``encoders/*.yaml`` holds one family a file, ``tasks/**/*.yaml`` one benchmark a file. Cards are found in the built-in
folders, in every ``--include DIR`` (``DIR/encoders``, ``DIR/tasks``), and in packages that register the entry-point group
``rice_eval.cards`` (the value names a module; its folder is searched the same way). Unknown fields are errors.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rice_eval.errors import CardError, NotFoundError, RiceEvalError
from rice_eval.registry import did_you_mean

__all__ = [
    "Catalogue",
    "EncoderCard",
    "FamilyCard",
    "LmmsCard",
    "LmmsMetric",
    "SourceCard",
    "TaskCard",
    "catalogue",
    "data_root",
    "first_problem",
    "load_yaml",
]

Kind = Literal["segmentation", "detection", "regions", "ocr", "mllm"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceCard(_Strict):
    """Where the weights come from; exactly one of ``hub``, ``package``, ``timm``, ``open_clip`` or ``none``."""

    hub: str | None = Field(None, description="repository id on the Hugging Face hub")
    revision: str | None = Field(None, description="commit of the hub repository, where known")
    subfolder: str | None = Field(None, description="folder inside the hub repository")
    package: str | None = Field(None, description="installed package that carries the weights")
    file: str | None = Field(None, description="path of the weights inside the package or the hub repository")
    timm: str | None = Field(None, description="model name in timm, with its pretrained tag")
    open_clip: str | None = Field(None, description="MODEL/PRETRAINED pair of open_clip")
    none: Literal[True] | None = Field(None, description="there are no weights: seeded or computed")


class EncoderCard(_Strict):
    """One checkpoint."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.\-]*$")
    title: str | None = None
    source: SourceCard
    arch: str = Field(description="architecture in words, e.g. ViT-L/14")
    patch: int = Field(gt=0, description="pixels a patch token covers; for a CNN the largest stride")
    resolution: int = Field(gt=0, description="native side in pixels")
    params: int | None = Field(None, description="parameters of the image tower, where known")
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    text: bool = Field(False, description="whether the checkpoint has a text tower")
    public: bool = Field(True, description="whether the weights can be had by anyone")
    license: str | None = None
    adapter: str | None = Field(None, description="overrides the family's adapter")
    options: dict[str, Any] = Field(default_factory=dict, description="read and checked by the adapter")
    note: str | None = None


class FamilyCard(_Strict):
    """A family of checkpoints that one adapter reads."""

    family: str
    title: str
    adapter: str
    paper: str | None = None
    license: str | None = None
    note: str | None = None
    encoders: tuple[EncoderCard, ...] = Field(min_length=1)


class LmmsMetric(_Strict):
    """A metric of a benchmark that lmms-eval judges."""

    name: str = Field(description="what a record calls it")
    key: str = Field(description="what lmms-eval calls it")
    scale: float = Field(100.0, description="what its value is multiplied by")
    percent: bool = Field(True, description="whether it is then 0 to 100")


class LmmsCard(_Strict):
    """How lmms-eval runs a benchmark."""

    task: str | None = Field(description="its task's id; None where it has no such task")
    metrics: tuple[LmmsMetric, ...] = ()
    network: bool = Field(True, description="whether its data come from the hub")
    api: str | None = Field(None, description="a model behind a service that scores the answers")


class TaskCard(_Strict):
    """One benchmark: a dataset, its splits, a view, the protocols that apply and the headline metric."""

    name: str = Field(pattern=r"^[a-z0-9]+/[a-z0-9][a-z0-9.\-]*$", description="kind/benchmark")
    title: str
    kind: Kind
    dataset: str = Field(description="name in the dataset registry")
    options: dict[str, Any] = Field(default_factory=dict, description="read and checked by the dataset's reader")
    train: str = "train"
    test: str = "val"
    view: str = Field(description="named view, e.g. square=224")
    protocol: str = Field(description="the protocol that runs when none is asked for")
    metric: str = Field(description="headline metric")
    settings: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="protocol -> fields of it that differ here; --set goes over them"
    )
    license: str | None = None
    paper: str | None = None
    note: str | None = None
    lmms: LmmsCard | None = Field(
        None, description="of benchmarks that lmms-eval judges; None where the data are read here"
    )


_Card = TypeVar("_Card", bound=_Strict)

# libyaml's safe loader reads the cards about ten times as fast; PyYAML built without it has only its own.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def data_root() -> Path:
    """The folder that holds ``encoders/``, ``tasks/`` and ``results/``: inside the wheel, else the repository's root."""
    packaged = Path(__file__).parent / "_data"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent


def first_problem(error: ValidationError) -> str:
    """The first problem of a pydantic error, in words a reader of the file understands."""
    problem = error.errors()[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole file"
    if problem["type"] == "extra_forbidden":
        return f"unknown field '{where}'"
    if problem["type"] == "missing":
        return f"missing field '{where}'"
    return f"field '{where}': {problem['msg']} (got {str(problem.get('input'))[:60]!r})"


def load_yaml(path: Path, schema: type[_Card]) -> _Card:
    """Read one card.

    Raises:
        CardError: the file can't be read, is not YAML, or does not fit ``schema``.
    """
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except OSError as error:
        raise CardError(f"{path}: can't be read ({error.strerror})", "check the path and its permissions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise CardError(f"{path}: not valid YAML ({error})", "mend the file") from error
    if not isinstance(data, dict):
        raise CardError(f"{path}: a card is a mapping of fields", "see docs/cards.md for an example")
    try:
        return schema.model_validate(data)
    except ValidationError as error:
        known = ", ".join(schema.model_fields)
        raise CardError(f"{path}: {first_problem(error)}", f"fields of a card: {known}") from error


@dataclass
class Catalogue:
    """Every card on the search path, by name."""

    roots: tuple[Path, ...]
    families: dict[str, FamilyCard] = field(default_factory=dict)
    encoders: dict[str, tuple[FamilyCard, EncoderCard]] = field(default_factory=dict)
    tasks: dict[str, TaskCard] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for root in self.roots:
            for path in sorted((root / "encoders").glob("*.yaml")):
                family = load_yaml(path, FamilyCard)
                self._claim(f"family {family.family}", path)
                self.families[family.family] = family
                for card in family.encoders:
                    self._claim(f"encoder {card.name}", path)
                    self.encoders[card.name] = (family, card)
            for path in sorted((root / "tasks").rglob("*.yaml")):
                task = load_yaml(path, TaskCard)
                if task.name.split("/")[0] != task.kind:
                    raise CardError(
                        f"{path}: the name '{task.name}' does not start with its kind", f"name it '{task.kind}/…'"
                    )
                self._claim(f"task {task.name}", path)
                self.tasks[task.name] = task

    def _claim(self, key: str, path: Path) -> None:
        if key in self.files:
            raise CardError(f"{path}: {key} is already defined in {self.files[key]}", "rename one of the two")
        self.files[key] = path

    def encoder(self, name: str) -> tuple[FamilyCard, EncoderCard]:
        """The family and card of the encoder ``name``; NotFoundError with close names otherwise."""
        if name not in self.encoders:
            hint = did_you_mean(name, self.encoders)
            raise NotFoundError(f"no encoder is named '{name}'", f"{hint} (rice-eval list encoders shows all)")
        return self.encoders[name]

    def task(self, name: str) -> TaskCard:
        """The card of the task ``name``; NotFoundError with close names otherwise."""
        if name not in self.tasks:
            hint = did_you_mean(name, self.tasks)
            raise NotFoundError(f"no task is named '{name}'", f"{hint} (rice-eval list tasks shows all)")
        return self.tasks[name]


def _entry_point_roots() -> list[Path]:
    roots = []
    for entry in importlib.metadata.entry_points(group="rice_eval.cards"):
        spec = importlib.util.find_spec(entry.value)
        if spec is None or spec.origin is None:
            raise CardError(
                f"entry point '{entry.name}' of rice_eval.cards names no module: {entry.value}",
                "reinstall that package",
            )
        roots.append(Path(spec.origin).parent)
    return roots


def _run_modules(root: Path) -> None:
    """Import ``root/*.py`` so that they can register adapters, datasets and protocols.

    Raises:
        CardError: a module that fails, with its own message.
    """
    for path in sorted(root.glob("*.py")):
        name = f"rice_eval_include_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
        if name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(name, path)
        if spec is None or spec.loader is None:
            raise CardError(f"{path}: can't be imported", "rename it to NAME.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except RiceEvalError:
            raise
        except Exception as error:
            del sys.modules[name]
            raise CardError(
                f"{path}: {type(error).__name__}: {error}", "mend the module, or leave --include out"
            ) from error


@lru_cache(maxsize=8)
def catalogue(include: tuple[Path, ...] = ()) -> Catalogue:
    """All cards: built in, from entry points, and from the folders in ``include``.

    Raises:
        CardError: a card that can't be read, or a folder that holds none.
    """
    for root in include:
        if not root.is_dir():
            raise CardError(f"--include {root}: no such folder", "check the path")
        if not (root / "encoders").is_dir() and not (root / "tasks").is_dir() and not any(root.glob("*.py")):
            raise CardError(
                f"--include {root}: holds no encoders/ or tasks/ folder and no *.py module",
                "point it at a folder of cards",
            )
        _run_modules(root)
    return Catalogue((data_root(), *_entry_point_roots(), *include))
