"""rice-eval: the evaluation harness for dense vision encoders.

Importing this package is light: names that need torch are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RiceEvalError", "__version__", "evaluate", "load_encoder"]

from rice_eval.errors import RiceEvalError

if TYPE_CHECKING:
    from rice_eval.adapters import load_encoder
    from rice_eval.run import evaluate


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        from rice_eval.run import evaluate

        return evaluate
    if name == "load_encoder":
        from rice_eval.adapters import load_encoder

        return load_encoder
    raise AttributeError(f"module 'rice_eval' has no attribute {name!r}")
