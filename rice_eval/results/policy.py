"""A gate's policy: what drop is let through, at which level, and what holds for single tasks; read from YAML."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rice_eval.errors import UsageError
from rice_eval.registry import did_you_mean

__all__ = ["Policy", "TaskPolicy", "load_policy", "unused_patterns"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name != "required":
            raise ValueError(f"{str(value).lower()} is not a number")
        return value


class TaskPolicy(_Strict):
    """What holds for tasks whose name matches; fields left out keep the policy's own."""

    margin: float | None = Field(None, ge=0, description="drop that is let through, in the metric's unit")
    detect: float | None = Field(None, gt=0, description="warn where the smallest detectable drop is larger than this")
    required: bool | None = Field(None, description="whether a missing candidate result makes the gate unusable")


class Policy(_Strict):
    """A gate's policy."""

    margin: float = Field(0.0, ge=0, description="drop that is let through, in the metric's unit (points of percent)")
    detect: float | None = Field(
        None, gt=0, description="warn where the smallest detectable drop is larger than this; None: never"
    )
    required: bool = True
    alpha: float = Field(
        0.05, ge=1e-6, le=0.5, description="false alarms that are let through, over all tasks together"
    )
    power: float = Field(
        0.8, ge=0.5, le=0.999, description="probability that the smallest detectable drop is seen with"
    )
    resamples: int = Field(2000, ge=100)
    permutations: int = Field(5000, ge=100, description="swaps; more are drawn where alpha over all tasks asks for it")
    seed: int = Field(0, ge=0)
    tasks: dict[str, TaskPolicy] = Field(
        default_factory=dict, description="task name or pattern (detection/*) -> its own values; the last match wins"
    )

    def of(self, task: str) -> TaskPolicy:
        """The values that hold for a task."""
        margin, detect, required = self.margin, self.detect, self.required
        for pattern, own in self.tasks.items():
            if fnmatch.fnmatchcase(task, pattern):
                margin = own.margin if own.margin is not None else margin
                detect = own.detect if own.detect is not None else detect
                required = own.required if own.required is not None else required
        return TaskPolicy(margin=margin, detect=detect, required=required)


def unused_patterns(policy: Policy, tasks: Iterable[str]) -> list[str]:
    """A sentence for each of the policy's task names and patterns that no task matches."""
    names = sorted(set(tasks))
    lines = []
    for pattern in policy.tasks:
        if not any(fnmatch.fnmatchcase(task, pattern) for task in names):
            lines.append(f"policy: tasks '{pattern}' matches none of the tasks ({did_you_mean(pattern, names)})")
    return lines


def load_policy(path: Path) -> Policy:
    """Read a policy.

    Raises:
        UsageError: names the file and the field that does not fit, or that stands there twice.
    """
    import yaml
    from pydantic import ValidationError

    from rice_eval.cards import first_problem

    class Loader(yaml.SafeLoader):
        """Refuses a key that stands twice in one mapping: YAML itself would let the last one win."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                name = str(key.value)
                if name in seen:
                    line = key.start_mark.line + 1
                    raise UsageError(f"{path}, line {line}: '{name}' stands there twice", "keep one of them")
                seen.add(name)
            return super().construct_mapping(node, deep)

    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise UsageError(f"{path}: can't be read ({error.strerror})", "check the path given to --policy") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: is not YAML ({error})", "check the indentation") from error
    try:
        return Policy.model_validate({} if data is None else data)
    except ValidationError as error:
        fields = ", ".join(Policy.model_fields)
        raise UsageError(f"{path}: {first_problem(error)}", f"fields of a policy: {fields}") from error
