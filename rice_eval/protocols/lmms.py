"""Protocol ``lmms-eval``: a whole multimodal model, judged and not trained; it runs through ``rice-eval mllm --model``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from rice_eval.errors import PlanError
from rice_eval.protocols.base import Context, Outcome, Protocol

__all__ = ["LmmsEval"]


@dataclass(frozen=True)
class LmmsEval(Protocol):
    """The name under which benchmarks of lmms-eval stand in the lists; what a record's hash covers is set by the judge."""

    id: ClassVar[str] = "lmms-eval"
    kind: ClassVar[str] = "mllm"
    metric: ClassVar[str] = "accuracy"

    def run(self, context: Context) -> Outcome:
        """Refuses: a bare encoder can't answer questions.

        Raises:
            PlanError: always.
        """
        raise PlanError(
            f"encoder '{context.facts.name}' alone answers no questions",
            "put it into a model: rice-eval mllm --model MODEL --task TASK",
        )
