"""Compare, gate and watch: verdicts, exit codes, outputs, and checkpoints that arrive, change and fail."""

from __future__ import annotations

import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from result_factory import make_record, make_statistics

from rice_eval.cli.main import main
from rice_eval.errors import CheckpointError, RecordError, UsageError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.results.compare import Resampling, compare, match, sides
from rice_eval.results.gate import Policy, load_policy, run_gate
from rice_eval.results.gate_output import gate_json, gate_junit, gate_markdown
from rice_eval.results.store import ResultStore, StoredRecord, load_record, read_records
from rice_eval.results.watch import CURVE, STATE, Watch, watch, worst

QUICK = Policy(resamples=300, permutations=400)


def shifted(drop: float, n: int = 200, noise: float = 0.0, seed: int = 0) -> RatioStatistics:
    """Accuracy of images that lose ``drop`` points each, on average."""
    rng = np.random.default_rng(0)
    base = rng.uniform(3, 9, n)
    change = np.random.default_rng(seed + 1).normal(0, noise, n) if noise else 0.0
    return RatioStatistics(
        tuple(f"i{k}" for k in range(n)), (base - drop / 10 + change)[:, None], np.full((n, 1), 10.0), ("accuracy",)
    )


def put(root: Path, statistics: RatioStatistics | None, **changes: Any) -> StoredRecord:
    value = statistics.point()["accuracy"] if statistics is not None else 70.0
    path = ResultStore(root).save(make_record(value=value, low=value - 3, high=value + 3, **changes), statistics)
    return StoredRecord(path, load_record(path))


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def test_same_model_passes_and_a_worse_one_fails(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0))]
    same = [put(tmp_path / "b", shifted(0), weights="b" * 64)]
    worse = [put(tmp_path / "c", shifted(3, noise=0.3), weights="c" * 64)]
    assert run_gate(base, base, QUICK).exit_code == 0
    assert run_gate(base, same, QUICK).exit_code == 0
    report = run_gate(base, worse, QUICK)
    assert report.exit_code == 1
    assert "worse" in report.verdicts[0].reason
    assert run_gate(worse, base, QUICK).exit_code == 0  # getting better is no regression


def test_the_margin_lets_a_significant_drop_through(tmp_path: Path) -> None:
    base, worse = [put(tmp_path / "a", shifted(0))], [put(tmp_path / "b", shifted(0.5, noise=0.05))]
    assert run_gate(base, worse, QUICK).exit_code == 1
    assert run_gate(base, worse, QUICK.model_copy(update={"margin": 1.0})).exit_code == 0


def test_too_small_a_set_is_warned_of(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0, n=12, noise=2, seed=1))]
    worse = [put(tmp_path / "b", shifted(4, n=12, noise=2, seed=2))]
    report = run_gate(base, worse, QUICK.model_copy(update={"margin": 1.0}))
    assert (report.exit_code, report.verdicts[0].status) == (0, "warn")
    assert "can't tell it from chance" in report.verdicts[0].reason
    report = run_gate(base, base[:1] and worse, QUICK.model_copy(update={"detect": 0.5, "margin": 50.0}))
    assert report.verdicts[0].status == "warn"
    assert "smallest drop this set can see" in report.verdicts[0].reason


def test_missing_results_are_unusable_unless_optional(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0)), put(tmp_path / "a", shifted(0), task="segmentation/b")]
    report = run_gate(base, base[:1], QUICK)
    assert report.exit_code == 2
    assert [v.status for v in report.verdicts] == ["unusable", "pass"]
    assert "has no record of this task" in report.verdicts[0].reason
    optional = Policy.model_validate({"tasks": {"segmentation/*": {"required": False}}, "resamples": 300})
    assert run_gate(base, base[:1], optional).exit_code == 0
    extra = run_gate(base[:1], base, QUICK)
    assert extra.exit_code == 0
    assert "not in the baseline" in extra.verdicts[0].reason


def test_a_regression_outranks_what_is_missing(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0)), put(tmp_path / "a", shifted(0), task="segmentation/b")]
    worse = [put(tmp_path / "b", shifted(5, noise=0.3))]
    assert run_gate(base, worse, QUICK).exit_code == 1


def test_incomparable_results_name_the_field(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0))]
    other = [put(tmp_path / "b", shifted(0), settings={"view": "square=512"})]
    report = run_gate(base, other, QUICK)
    assert report.exit_code == 2
    assert "protocol setting 'view': 'square=64' against 'square=512'" in report.verdicts[0].reason
    task = base[0].record.task.model_copy(update={"test_fingerprint": "other"})
    report = run_gate(base, [put(tmp_path / "c", shifted(0), task="x")], QUICK)
    assert report.exit_code == 2
    fresh = StoredRecord(base[0].path, base[0].record.model_copy(update={"task": task}))
    assert "test fingerprint" in run_gate(base, [fresh], QUICK).verdicts[0].reason


def test_no_statistics_and_other_images_are_unusable(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0))]
    assert "no per-image statistics" in run_gate(base, [put(tmp_path / "b", None)], QUICK).verdicts[0].reason
    report = run_gate(base, [put(tmp_path / "c", shifted(0, n=199))], QUICK)
    assert report.exit_code == 2
    assert "same images" in report.verdicts[0].reason


def test_several_encoders_are_paired_by_name(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0), encoder=n) for n in ("x", "y")]
    mixed = [put(tmp_path / "b", shifted(0), encoder="x"), put(tmp_path / "b", shifted(5, noise=0.2), encoder="y")]
    report = run_gate(base, mixed, QUICK)
    assert {v.encoder: v.status for v in report.verdicts} == {"x": "pass", "y": "fail"}
    gone = run_gate(base, mixed[:1] * 1 + [put(tmp_path / "c", shifted(0), encoder="z")], QUICK)
    assert gone.exit_code == 2
    twice = [*base, put(tmp_path / "d", shifted(0), encoder="x", weights="b" * 64)]
    with pytest.raises(RecordError, match="several sets of weights of encoder 'x'"):
        run_gate(base, twice, QUICK)


def test_holm_over_tasks(tmp_path: Path) -> None:
    names = [f"segmentation/t{k}" for k in range(6)]
    base = [put(tmp_path / "a", shifted(0, n=60, noise=0.6, seed=k), task=n) for k, n in enumerate(names)]
    new = [put(tmp_path / "b", shifted(0, n=60, noise=0.6, seed=50 + k), task=n) for k, n in enumerate(names)]
    for v in run_gate(base, new, QUICK).verdicts:
        assert v.test is not None
        assert v.p_adjusted is not None
        assert v.p_adjusted >= v.test.p_worse


def test_outputs_are_read_by_standard_parsers(tmp_path: Path) -> None:
    hostile = 'x"<&>\x00\x1b\ud800]]>'.replace("\ud800", "\uffff")
    base = [
        put(tmp_path / "a", shifted(0), encoder=hostile),
        put(tmp_path / "a", shifted(0), encoder=hostile, task="s/b|c"),
    ]
    worse = [put(tmp_path / "b", shifted(5, noise=0.2), encoder=hostile)]
    report = run_gate(base, worse, QUICK)
    suite = ElementTree.fromstring(gate_junit(report)).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("2", "1", "1")
    assert len(suite.findall("testcase/failure")) == len(suite.findall("testcase/error")) == 1
    content = json.loads(gate_json(report))
    assert content["exit_code"] == 1
    assert content["verdicts"][0]["task"]
    rows = [line for line in gate_markdown(report).split("\n") if line.startswith("|")]
    assert len(rows) == 4
    assert all(line.replace("\\|", "").count("|") == 10 for line in rows)


def test_policy_files(tmp_path: Path) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text("margin: 0.3\ntasks:\n  segmentation/*: {margin: 1}\n  segmentation/toy: {detect: 2}\n")
    policy = load_policy(path)
    assert (policy.of("segmentation/toy").margin, policy.of("segmentation/toy").detect) == (1, 2)
    assert policy.of("detection/x").margin == 0.3
    path.write_text("")
    assert load_policy(path) == Policy()
    for text, field in (
        ("margn: 1", "margn"),
        ("margin: -1", "margin"),
        ("alpha: 2", "alpha"),
        ("tasks: {x: {mar: 1}}", "tasks.x.mar"),
        ("[", "YAML"),
        ("- 1", "whole file"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=field):
            load_policy(path)
    with pytest.raises(UsageError, match="can't be read"):
        load_policy(tmp_path / "none.yaml")


def test_command_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a", shifted(0))
    put(tmp_path / "b", shifted(4, noise=0.3))
    a, b = tmp_path / "a", tmp_path / "b"
    step = tmp_path / "step.md"
    step.write_text("earlier step\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(step))
    assert run("gate", "--baseline", a, "--candidate", a) == 0
    out = ["--junit", tmp_path / "o" / "gate.xml", "--summary", step, "--output", tmp_path / "gate.json"]
    assert run("gate", "--baseline", a, "--candidate", b, *out) == 1
    assert "REGRESSION" in capsys.readouterr().out
    assert step.read_text().startswith("earlier step\n### rice-eval gate: regression")
    assert ElementTree.parse(tmp_path / "o" / "gate.xml").getroot().tag == "testsuites"
    assert json.loads((tmp_path / "gate.json").read_text())["result"] == "regression"
    assert run("gate", "--baseline", a, "--candidate", tmp_path / "none") == 2
    assert "does not exist" in capsys.readouterr().err
    next(b.rglob("*.json")).write_text("{}")
    assert run("gate", "--baseline", a, "--candidate", b) == 2
    error = capsys.readouterr().err
    assert "schema_version" in error
    assert error.count("\n") == 1


def test_compare_names_what_moved(tmp_path: Path) -> None:
    a = put(tmp_path / "a", shifted(0))
    statistics = shifted(0)
    statistics.numerators[7] -= 2.5
    b = put(tmp_path / "b", statistics, per_class={"accuracy": {"sky": 10.0, "<b>grass</b>": None}})
    (side_a,), (side_b,) = sides([a]), sides([b])
    (row,) = compare(side_a, side_b, Resampling(300, 300))
    assert row.images[0].name == "i7"
    assert row.images[0].difference == pytest.approx(-25)
    assert row.classes[0].name == "sky"
    assert len(row.classes) == 1
    assert row.outcome() == "tie"
    (worse,) = compare(side_a, sides([put(tmp_path / "c", shifted(3, noise=0.3))])[0], Resampling(300, 300))
    assert worse.outcome() == "loss"
    assert worse.test is not None
    assert worse.test.low < worse.difference < worse.test.high


def test_compare_refuses_other_keys_by_field(tmp_path: Path) -> None:
    (a,) = sides([put(tmp_path / "a", shifted(0))])
    (b,) = sides([put(tmp_path / "b", shifted(0), settings={"epochs": 3})])
    with pytest.raises(RecordError, match="protocol setting 'epochs': None against 3"):
        compare(a, b)
    (c,) = sides([put(tmp_path / "c", shifted(0), task="segmentation/other")])
    with pytest.raises(RecordError, match="no task in common"):
        compare(a, c)


def test_match_puts_seeds_together(tmp_path: Path) -> None:
    both = [
        sides([put(tmp_path / name, shifted(0, noise=0.1, seed=s), seed=s) for s in (1, 0)])[0] for name in ("a", "b")
    ]
    (pair,) = match(*both)
    assert [e.record.seeds for e in pair.a] == [(0,), (1,)]
    (row,) = compare(*both, Resampling(200, 200))
    assert row.test is not None
    assert row.test.test == "bootstrap"


def test_command_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "r", shifted(0), encoder="x")
    put(tmp_path / "r", shifted(4, noise=0.3), encoder="y")
    put(tmp_path / "s", shifted(0), encoder="z")
    r, s = tmp_path / "r", tmp_path / "s"
    assert run("compare", "x", "y", s, "--results", r, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["run"], row["outcome"]) for row in rows] == [("y", "loss"), ("z", "tie")]
    assert run("compare", f"{r}:x", f"{r}:y") == 0
    assert "1 loss" in capsys.readouterr().out
    assert run("compare", r, s) == 2
    assert "holds several encoders: x, y" in capsys.readouterr().err
    assert run("compare", "x", "yy", "--results", r) == 2
    assert "did you mean 'y'" in capsys.readouterr().err
    assert run("compare", "x") == 2


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
                results, shifted(drop, noise=0.2, seed=int(drop * 10)), weights=f"{hash(checkpoint.name) % 16**16:064x}"
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
    assert calls == ["1.pt", "2.pt"]  # nothing changed: nothing is done again
    (runs / "2.pt").write_text("good")
    os.utime(runs / "2.pt", ns=(1, 1))
    steps = watch(settings, evaluate)
    assert calls == ["1.pt", "2.pt", "2.pt"]
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
    evaluate = evaluator(results, {"0.pt": 0, "1.pt": 4.0, "2.pt": 0.0}, [])
    baseline = str(tmp_path / "good") if against == "folder" else against
    steps = watch(Watch(str(runs / "*.pt"), results, QUICK, baseline, once=True), evaluate)
    assert [k for k, s in enumerate(steps) if s.exit_code == 1] == failing
    with pytest.raises(UsageError, match="neither|no folder"):
        watch(Watch("x", results, QUICK, "yesterday", once=True), evaluate)


def test_records_of_the_gate_are_read_once_and_whole(tmp_path: Path) -> None:
    put(tmp_path / "a", make_statistics())
    assert len(read_records([tmp_path / "a"])) == 1
