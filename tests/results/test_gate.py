"""Compare and gate: verdicts, exit codes, outputs."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from result_factory import QUICK, make_record, make_statistics, put, shifted

from rice_eval.cli.main import main
from rice_eval.errors import RecordError, UsageError
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.results.compare import Resampling, compare, match, sides
from rice_eval.results.gate import run_gate
from rice_eval.results.gate_output import gate_json, gate_junit, gate_markdown
from rice_eval.results.policy import Policy, load_policy
from rice_eval.results.record import ProtocolEntry, settings_hash
from rice_eval.results.store import ResultStore, StoredRecord, load_record, read_records


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


def test_a_policy_that_names_no_task_is_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a", shifted(0))
    (tmp_path / "gate.yaml").write_text("tasks:\n  segmentaton/toy: {margin: 1}\n  segmentation/*: {margin: 0.1}\n")
    arguments = ["--baseline", tmp_path / "a", "--candidate", tmp_path / "a", "--policy", tmp_path / "gate.yaml"]
    assert run("gate", *arguments, "--output", tmp_path / "gate.json", "--summary", tmp_path / "gate.md") == 0
    (warning,) = json.loads((tmp_path / "gate.json").read_text())["warnings"]
    assert "'segmentaton/toy' matches none of the tasks (did you mean 'segmentation/toy'?)" in warning
    assert "segmentaton" in (tmp_path / "gate.md").read_text()
    assert "segmentaton" in capsys.readouterr().err


def test_a_gate_that_can_not_fail_says_so(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0, n=4))]
    worse = [put(tmp_path / "b", shifted(30, n=4, noise=0.01))]
    report = run_gate(base, worse, QUICK)
    (verdict,) = report.verdicts
    assert (report.exit_code, verdict.status) == (0, "warn")
    assert "no drop can fail this task" in verdict.reason
    assert "more images" in verdict.reason
    assert verdict.detectable == math.inf
    assert json.loads(gate_json(report))["verdicts"][0]["detectable"] is None
    assert "| none |" in gate_markdown(report)
    assert run_gate(base, base, QUICK).verdicts[0].status == "warn"  # whatever came out
    assert run_gate(base, worse, QUICK.model_copy(update={"alpha": 0.1})).exit_code == 1


def test_a_strict_policy_draws_the_swaps_it_needs(tmp_path: Path) -> None:
    base, worse = [put(tmp_path / "a", shifted(0))], [put(tmp_path / "b", shifted(5, noise=0.2))]
    strict = QUICK.model_copy(update={"alpha": 0.001, "permutations": 100})
    report = run_gate(base, worse, strict)
    assert report.exit_code == 1
    assert report.verdicts[0].test is not None
    assert report.verdicts[0].test.p_floor < 0.001
    stricter = run_gate(base, worse, strict.model_copy(update={"alpha": 5e-6}))
    assert "permutations: 2000000 or a larger alpha" in stricter.verdicts[0].reason


def test_two_contents_of_one_run_are_refused_and_a_copy_is_no_seed(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0))]
    good, bad = put(tmp_path / "b", shifted(0)), put(tmp_path / "c", shifted(6, noise=0.2))
    with pytest.raises(RecordError, match="two records of the same run"):
        run_gate(base, [good, bad], QUICK)
    report = run_gate(base, [bad, StoredRecord(tmp_path / "copy.json", bad.record)], QUICK)
    assert report.exit_code == 1
    assert report.verdicts[0].test is not None
    assert report.verdicts[0].test.test == "permutation"
    with pytest.raises(RecordError, match="two records of the same run"):
        sides([good, bad])


def test_seeds_against_one_seed_borrow_their_spread(tmp_path: Path) -> None:
    base = [put(tmp_path / "a", shifted(0, noise=0.1, seed=s), seed=s) for s in range(3)]
    report = run_gate(base, [put(tmp_path / "b", shifted(0), seed=0)], QUICK)
    assert (
        "the candidate has one seed: the spread of the baseline's 3 seeds is taken for both"
        in report.verdicts[0].reason
    )
    assert json.loads(gate_json(report))["verdicts"][0]["notes"]


def test_the_direction_of_a_metric_nobody_knows_is_the_records_own(tmp_path: Path) -> None:
    def loss(root: Path, value: float) -> StoredRecord:
        base = shifted((50 - value) if value else 0)
        statistics = RatioStatistics(base.image_ids, base.numerators, base.denominators, ("loss",))
        mean = statistics.point()["loss"]
        record = make_record(value=mean, low=None, high=None, metric="loss", higher_is_better=False)
        path = ResultStore(root).save(record, statistics)
        return StoredRecord(path, load_record(path))

    low, high = loss(tmp_path / "a", 30), loss(tmp_path / "b", 50)
    assert run_gate([low], [high], QUICK).exit_code == 1
    assert run_gate([high], [low], QUICK).exit_code == 0


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
        ("alpha: 1e-300", "alpha"),
        ("margin: .inf", "margin"),
        ("margin: true", "true is not a number"),
        ("tasks: {x: {detect: no}}", "detect"),
        ("seed: -1", "seed"),
        ("alpha: 0.1\nmargin: 1\nalpha: 0.2", "line 3: 'alpha' stands there twice"),
        ("tasks:\n  x: {margin: 1}\n  x: {margin: 2}", "line 3: 'x' stands there twice"),
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
    for bad in ("none", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        assert run("gate", "--baseline", a, "--candidate", tmp_path / bad, *out) == 2
        errors = ElementTree.parse(tmp_path / "o" / "gate.xml").getroot().findall("testsuite/testcase/error")
        assert bad in (errors[0].get("message") or "")
        assert json.loads((tmp_path / "gate.json").read_text())["exit_code"] == 2
        assert bad in step.read_text()
    capsys.readouterr()
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


def test_compare_names_the_protocol_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = put(tmp_path / "a", shifted(0))
    settings = {"view": "square=64", "norm": True, "seed": 0}
    knn = ProtocolEntry(id="knn", hash=settings_hash("knn", 1, settings), settings=settings)
    b = put(tmp_path / "b", shifted(0), protocol=knn)
    assert run("compare", a.path, b.path) == 2
    error = capsys.readouterr().err
    assert "protocol: linear against knn" in error
    assert f"({a.path})" in error  # the same encoder on both sides: the files tell them apart
    assert "(1)" not in error


def test_compare_says_what_it_leaves_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a", shifted(0))
    put(tmp_path / "a", shifted(0), task="segmentation/other")
    put(tmp_path / "b", shifted(0), encoder="b")
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("compare", a, b) == 0
    assert "left out: segmentation/other linear accuracy: b has no record of this task" in capsys.readouterr().out
    assert run("compare", a, b, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["outcome"] for row in rows] == ["tie", "left out"]


def test_compare_of_one_image_knows_no_interval(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path / "a", shifted(0, n=1))
    put(tmp_path / "b", shifted(3, n=1), encoder="b")
    a, b = tmp_path / "a", tmp_path / "b"
    assert run("compare", a, b, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert row["low"] is row["high"] is None
    assert run("compare", a, b) == 0
    assert "nan" not in capsys.readouterr().out
    assert "one image" in run_gate(read_records([a]), read_records([b]), QUICK).verdicts[0].reason


def test_a_printed_label_is_taken_back(tmp_path: Path) -> None:
    put(tmp_path / "a", shifted(0), encoder="x", weights="1" * 64)
    put(tmp_path / "a", shifted(0), encoder="x", weights="2" * 64)
    assert run("compare", "x@11111111", "x@22222222", "--results", tmp_path / "a") == 0
    put(tmp_path / "b", shifted(0), encoder="x", weights="1" * 64)
    assert run("compare", f"{tmp_path / 'b'}:x@11111111", "x@22222222", "--results", tmp_path / "a") == 0


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


def test_records_of_the_gate_are_read_once_and_whole(tmp_path: Path) -> None:
    put(tmp_path / "a", make_statistics())
    assert len(read_records([tmp_path / "a"])) == 1
