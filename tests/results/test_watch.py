"""Watch: checkpoints that arrive, come late, change and fail."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from result_factory import QUICK, put, shifted

from rice_eval.cli.main import main
from rice_eval.errors import CheckpointError, RecordError, UsageError
from rice_eval.results.store import StoredRecord
from rice_eval.results.watch import CURVE, STATE, Watch, watch, worst


class Clock:
    """Time that passes only while sleeping, and things that happen meanwhile."""

    def __init__(self, *events: Any) -> None:
        self.now = 0.0
        self.events = list(events)

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        if self.events:
            self.events.pop(0)()


def evaluator(results: Path, drops: dict[str, float], calls: list[str]) -> Any:
    def evaluate(checkpoint: Path) -> list[StoredRecord]:
        calls.append(checkpoint.name)
        if checkpoint.read_text() == "broken":
            raise CheckpointError(f"{checkpoint}: is damaged", "write it again")
        drop = drops[checkpoint.name]
        return [
            put(
                results,
                shifted(drop, noise=0.2, seed=abs(int(drop * 10))),
                weights=f"{hash(checkpoint.name) % 16**16:064x}",
            )
        ]

    return evaluate


def test_watch_follows_a_run(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    calls: list[str] = []
    evaluate = evaluator(results, {"s-9.pt": 0, "s-10.pt": 4.0, "s-11.pt": 0.0}, calls)
    settings = Watch(str(runs / "*.pt"), results, QUICK, interval=1, idle=3)
    (runs / "s-10.pt").write_text("ok")
    (runs / "s-9.pt").write_text("ok")
    clock = Clock(
        lambda: None, lambda: (runs / "s-11.pt").write_text("half"), lambda: (runs / "s-11.pt").write_text("whole!")
    )
    steps = watch(settings, evaluate, clock=clock, sleep=clock.sleep)
    assert calls == ["s-9.pt", "s-10.pt", "s-11.pt"]
    assert [s.exit_code for s in steps] == [0, 1, 0]
    assert worst(steps) == 1
    curve = (results / CURVE).read_text().splitlines()
    assert len(curve) == 4
    assert ",start," in curve[1]
    assert ",fail," in curve[2]


def test_watch_goes_on_after_a_restart_and_a_bad_checkpoint(tmp_path: Path) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    calls: list[str] = []
    evaluate = evaluator(results, {"1.pt": 0, "2.pt": 0.0}, calls)
    settings = Watch(str(runs / "*.pt"), results, QUICK, once=True)
    (runs / "1.pt").write_text("ok")
    (runs / "2.pt").write_text("broken")
    steps = watch(settings, evaluate)
    assert [s.error != "" for s in steps] == [False, True]
    assert worst(steps) == 2
    assert "failed" in (results / CURVE).read_text()
    watch(settings, evaluate)
    assert calls == ["1.pt", "2.pt", "2.pt"]  # what failed is tried again, and nothing else
    (runs / "2.pt").write_text("good")
    os.utime(runs / "2.pt", ns=(1, 1))
    steps = watch(settings, evaluate)
    assert calls == ["1.pt", *["2.pt"] * 3]
    assert worst(steps) == 0
    (results / STATE).write_text("{")
    with pytest.raises(RecordError, match="line 1"):
        watch(settings, evaluate)


@pytest.mark.parametrize(
    ("against", "failing"), [("first", [1]), ("previous", [1]), ("best", [1]), ("folder", [0, 1, 2])]
)
def test_watch_against(tmp_path: Path, against: str, failing: list[int]) -> None:
    runs, results = tmp_path / "runs", tmp_path / "results"
    runs.mkdir()
    for k in range(3):
        (runs / f"{k}.pt").write_text("ok")
    put(tmp_path / "good", shifted(-5))
    put(tmp_path / "good", shifted(-5), encoder="another")
    evaluate = evaluator(results, {"0.pt": 0, "1.pt": 4.0, "2.pt": 0.0}, [])
    baseline = str(tmp_path / "good") if against == "folder" else against
    steps = watch(Watch(str(runs / "*.pt"), results, QUICK, baseline, once=True, encoder="toy-vit"), evaluate)
    assert [k for k, s in enumerate(steps) if s.exit_code == 1] == failing
    with pytest.raises(UsageError, match="neither|no folder"):
        watch(Watch("x", results, QUICK, "yesterday", once=True), evaluate)


def steps_of(runs: Path, *names: str) -> None:
    runs.mkdir(exist_ok=True)
    for name in names:
        (runs / name).write_text(name)


def test_another_run_in_the_same_folder_is_a_run_of_its_own(tmp_path: Path) -> None:
    runs, results, calls = tmp_path / "runs", tmp_path / "results", []
    steps_of(runs, "1.pt", "2.pt")

    def refuse(checkpoint: Path) -> list[StoredRecord]:
        raise UsageError("encoder 'tyop' is not known", "check the name")

    first = watch(Watch(str(runs / "*.pt"), results, QUICK, once=True, run="tyop on x"), refuse)
    assert [s.exit_code for s in first] == [2, 2]
    settings = Watch(str(runs / "*.pt"), results, QUICK, once=True, run="toy on x")
    steps = watch(settings, evaluator(results, {"1.pt": 0, "2.pt": 0.0}, calls))
    assert calls == ["1.pt", "2.pt"]
    assert worst(steps) == 0
    assert len((results / STATE).read_text().splitlines()) == 4
    assert len((results / CURVE).read_text().splitlines()) == 5


@pytest.mark.parametrize("against", ["first", "previous", "best"])
def test_a_late_checkpoint_is_judged_by_those_before_it(tmp_path: Path, against: str) -> None:
    runs, results, calls = tmp_path / "runs", tmp_path / "results", []
    steps_of(runs, "s-1.pt", "s-3.pt")
    drops = {"s-0.pt": -5.0, "s-1.pt": 0.0, "s-2.pt": 3.0, "s-3.pt": 1.0}
    settings = Watch(str(runs / "*.pt"), results, QUICK, against, once=True)
    assert [s.exit_code for s in watch(settings, evaluator(results, drops, calls))] == [0, 1]
    steps_of(runs, "s-2.pt")
    said: list[str] = []
    steps = watch(settings, evaluator(results, drops, calls), lambda s: said.append(Path(s.checkpoint).name))
    # s-3 is better than the s-2 that came after it: against the previous one it is a regression no more.
    assert [s.exit_code for s in steps] == {"previous": [0, 1, 0]}.get(against, [0, 1, 1])
    assert said == (["s-2.pt", "s-3.pt"] if against == "previous" else ["s-2.pt"])
    steps_of(runs, "s-0.pt")
    steps = watch(settings, evaluator(results, drops, calls))
    assert [s.verdicts == [] for s in steps] == [True, False, False, False]  # s-0 is what the others start from now
    assert steps[1].exit_code == 1
    assert calls == ["s-1.pt", "s-3.pt", "s-2.pt", "s-0.pt"]


def test_a_baseline_folder_is_checked_before_the_first_checkpoint(tmp_path: Path) -> None:
    runs, results, calls = tmp_path / "runs", tmp_path / "results", []
    steps_of(runs, "1.pt")
    put(tmp_path / "two", shifted(0), encoder="x")
    put(tmp_path / "two", shifted(0), encoder="y")
    (tmp_path / "none").mkdir()
    for folder, words in (("two", "several encoders: x, y"), ("none", "no record")):
        settings = Watch(str(runs / "*.pt"), results, QUICK, str(tmp_path / folder), once=True, encoder="z")
        with pytest.raises((UsageError, RecordError), match=words):
            watch(settings, evaluator(results, {"1.pt": 0}, calls))
    assert calls == []


def test_a_checkpoint_that_can_not_be_judged_is_noted(tmp_path: Path) -> None:
    runs, results, calls = tmp_path / "runs", tmp_path / "results", []
    steps_of(runs, "1.pt", "2.pt")
    settings = Watch(str(runs / "*.pt"), results, QUICK, once=True)
    first = watch(settings, evaluator(results, {"1.pt": 0, "2.pt": 0.0}, calls))
    (results / first[0].records[0]).write_text("{}")
    steps_of(runs, "3.pt")
    steps = watch(settings, evaluator(results, {"3.pt": 0.0}, calls))
    assert "schema_version" in steps[2].error
    assert steps[2].exit_code == 2
    assert "failed" in (results / CURVE).read_text()


def test_command_watch_checks_names_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps_of(tmp_path, "1.pt")
    for encoder, task, word in (("rgb-momnts", "segmentation/scenes", "rgb-momnts"), ("rgb-moments", "seg/x", "seg/x")):
        with pytest.raises(SystemExit) as caught:
            main(["watch", f"{tmp_path}/*.pt", "-e", encoder, "-t", task, "--results", f"{tmp_path}/r", "--once"])
        assert caught.value.code == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
