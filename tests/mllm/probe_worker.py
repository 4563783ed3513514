"""Trains a tiny probe in a process of its own, so that a test can kill it: ``probe_worker.py RESULTS BANK [kill STEP]``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from rice_eval.probes import training_state
from rice_eval.run import evaluate

SETTINGS = {"lm": "tiny-random", "side": 3, "hidden": 16, "train_dtype": "float32", "batch": 2, "epochs": 2.0}


def main(results: str, bank: str, kill_at: int | None) -> None:
    save = training_state.TrainingState.save
    training_state.SAVE_EVERY_S = 0.0

    def saving(self, state, force=False):  # type: ignore[no-untyped-def]
        save(self, state, force)
        if kill_at is not None and state["step"] >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    training_state.TrainingState.save = saving  # type: ignore[method-assign]
    done = evaluate(
        ["rgb-moments"],
        ["mllm/scenes-vqa"],
        settings=SETTINGS,
        results=results,
        bank=Path(bank),
        limit_train=8,
        limit_test=2,
        resamples=50,
    )
    record = done[0].record
    print(record.chosen["projector_sha256"], record.losses, record.warnings)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[4]) if len(sys.argv) > 3 else None)
