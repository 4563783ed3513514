"""Validation, schema, migration, exports, the commands, and what they must not import."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from result_factory import make_record, make_statistics

from rice_eval.cli.main import main
from rice_eval.results import exports
from rice_eval.results import store as store_module
from rice_eval.results.record import Record, seal
from rice_eval.results.store import ResultStore, StoredRecord, load_record
from rice_eval.results.validate import schema_text

ROOT = Path(__file__).parents[2]


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(a) for a in arguments])
    return int(caught.value.code or 0)


def put(root: Path, **changes: Any) -> Path:
    statistics = make_statistics()
    return ResultStore(root).save(make_record(value=statistics.point()["accuracy"], **changes), statistics)


def edit(path: Path, change: Any) -> None:
    content = json.loads(path.read_text())
    change(content)
    digests, digest = seal(content)
    path.write_text(json.dumps({**content, "digests": digests, "sha256": digest}))


def test_validate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [put(tmp_path, encoder=n) for n in ("a", "b", "c")]
    assert run("results", "validate", tmp_path) == 0
    assert "3 records, 0 bad" in capsys.readouterr().out
    # Sealed anew, so that only its own statistics can give the lie to it.
    edit(paths[0], lambda c: c["metrics"]["accuracy"].update(value=99.0))
    paths[1].write_text(paths[1].read_text().replace('"seeds": [\n  0', '"seeds": [\n  7'))
    assert run("results", "validate", tmp_path) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 2
    assert "metrics.accuracy.value" in error[0]
    assert "statistics give" in error[0]
    assert "'seeds'" in error[1]
    assert run("results", "validate", tmp_path, "--json") == 2
    assert [bool(r["problem"]) for r in json.loads(capsys.readouterr().out)] == [True, True, False]


def test_the_schema_in_the_docs_is_the_current_one() -> None:
    """Rewrite it with ``rice-eval results schema -o docs/record.schema.json``."""
    assert (ROOT / "docs" / "record.schema.json").read_text() == schema_text()


def test_records_fit_their_schema(tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(schema_text())
    content = json.loads(put(tmp_path).read_text())
    jsonschema.validate(content, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**content, "bonus": 1}, schema)
    for name in ("schema_version", "digests", "sha256", "seconds"):
        with pytest.raises(jsonschema.ValidationError, match=name):
            jsonschema.validate({k: v for k, v in content.items() if k != name}, schema)


def test_rebuild_of_nothing_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("results", "rebuild", tmp_path / "nope") == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "nope").exists()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="no /proc")
@pytest.mark.parametrize("flags", [["--junit"], ["--output"], ["--summary"]])
def test_outputs_where_nothing_can_be_made_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    """``/proc`` refuses new folders even to root, and says that they do not exist: ENOENT."""
    put(tmp_path)
    for command in (
        ["gate", "--baseline", tmp_path, "--candidate", tmp_path, *flags],
        ["leaderboard", tmp_path, "-f", "csv", "-o"],
    ):
        assert run(*command, "/proc/nothing/x/y") == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "/proc/nothing" in error


def test_migrate_rewrites_older_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = put(tmp_path)
    before = path.read_bytes()
    edit(path, lambda c: c.update(schema_version=0))
    monkeypatch.setitem(store_module.MIGRATIONS, 0, lambda content: content)
    assert run("results", "migrate", tmp_path) == 0
    assert "1 records migrated" in capsys.readouterr().out
    assert path.read_bytes() == before
    assert run("results", "migrate", tmp_path) == 0
    assert "0 records migrated" in capsys.readouterr().out


@pytest.mark.parametrize("format", ["table", "csv", "long-csv", "markdown", "latex", "json"])
def test_command_leaderboard(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str) -> None:
    for name in ("a", "b"):
        put(tmp_path, encoder=name)
    assert run("leaderboard", tmp_path, "--format", format) == 0
    first = capsys.readouterr().out
    assert "segmentation/toy" in first
    assert run("leaderboard", tmp_path, "-f", format, "-o", tmp_path / "out") == 0
    assert (tmp_path / "out").read_text() == first


def test_command_leaderboard_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, encoder="abc")
    put(tmp_path, encoder="other", task="segmentation/b")
    for arguments, words in (
        (["--format", "xls"], "xls"),
        (["--format", "parquet"], "--output"),
        (["--encoder", "abd"], "did you mean 'abc'"),
        (["--task", "x"], "no record has it"),
        (["--ranks", "coin"], "coin"),
    ):
        assert run("leaderboard", tmp_path, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert run("leaderboard", tmp_path, "--encoder", "abc", "-f", "csv", "--references") == 0
    assert "other" not in capsys.readouterr().out
    assert run("leaderboard", tmp_path / "none") == 2


def test_parquet(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    put(tmp_path)
    out = tmp_path / "new" / "folder" / "x.parquet"
    assert run("leaderboard", tmp_path, "-f", "parquet", "-o", out) == 0
    (row,) = parquet.read_table(out).to_pylist()
    assert row["encoder"] == "toy-vit"
    assert row["rank"] == 1


def test_commands_published_and_reproduce(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run("published", "--encoder", "dinov3", "--benchmark", "ADE20K", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["benchmark"] for r in rows} == {"ADE20K"}
    assert all(r["source"] for r in rows)
    assert run("reproduce", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert {r["verdict"] for r in rows} == {"not run"}
    assert run("reproduce", "--encoder", "nothing") == 2
    assert "no printed number" in capsys.readouterr().err


def stored(tmp_path: Path) -> list[StoredRecord]:
    paths = [put(tmp_path, seed=s) for s in (0, 1)] + [put(tmp_path, task="detection/x")]
    return [StoredRecord(p, load_record(p)) for p in paths]


def test_model_index_fits_the_hub(tmp_path: Path) -> None:
    content = yaml.safe_load(exports.model_index(stored(tmp_path)))["model-index"]
    assert [m["name"] for m in content] == ["toy-vit"]
    results = content[0]["results"]
    assert [r["task"]["type"] for r in results] == ["object-detection", "image-segmentation", "image-segmentation"]
    for result in results:
        assert result["dataset"]["name"]
        assert result["dataset"]["type"]
        assert isinstance(result["metrics"][0]["value"], float)
    hub = pytest.importorskip("huggingface_hub.repocard_data")
    name, parsed = hub.model_index_to_eval_results(content)
    assert name == "toy-vit"
    assert len(parsed) == 3


def test_lmms_eval_layout(tmp_path: Path) -> None:
    content = json.loads(exports.lmms_eval(stored(tmp_path)))
    assert set(content["results"]) == set(content["configs"]) == set(content["versions"]) == set(content["n-samples"])
    first = content["results"]["segmentation/toy/linear"]
    assert 0 < first["accuracy,none"] < 1
    assert first["accuracy_stderr,none"] == pytest.approx(0.1 / 3.92, rel=1e-3)
    with pytest.raises(ValueError, match="of one encoder, and these records are of other, toy-vit"):
        exports.lmms_eval([*stored(tmp_path), StoredRecord(Path("x"), make_record("other"))])


@pytest.mark.parametrize("other", [make_record("other"), make_record(weights="b" * 64)], ids=["name", "weights"])
def test_a_model_card_is_of_one_encoder(tmp_path: Path, other: Record) -> None:
    """The hub's reader would give every result to the last name."""
    with pytest.raises(ValueError, match="a model card is of one encoder"):
        exports.model_index([*stored(tmp_path), StoredRecord(Path("x"), other)])


@pytest.mark.parametrize(
    "command", [["leaderboard", "-f", "csv"], ["publish", "lmms-eval"], ["publish", "model-index"]]
)
def test_labels_that_are_shown_are_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    put(tmp_path, encoder="clip", weights="87654321" + "0" * 56)
    put(tmp_path, encoder="clip", weights="1234" * 16)
    put(tmp_path, encoder="odd@87654321")
    assert run("leaderboard", tmp_path, "-f", "csv") == 0
    assert "clip@87654321," in capsys.readouterr().out
    assert run(*command, tmp_path, "-e", "clip@87654321") == 0
    out = capsys.readouterr().out
    assert "1234123412341234" not in out
    assert "odd" not in out
    assert run(*command, tmp_path, "-e", "odd@87654321") == 0  # a name of its own comes first
    assert "odd@87654321" in capsys.readouterr().out
    assert run(*command, tmp_path, "-e", "clip@87654322") == 2
    assert "did you mean 'clip@87654321'" in capsys.readouterr().err
    if command[0] == "publish":
        capsys.readouterr()
        assert run(*command, tmp_path, "-e", "clip") == 2
        error = capsys.readouterr().err
        assert "clip@12341234, clip@87654321" in error
        assert "--encoder" in error


def test_scalars_of_two_weights_stay_apart(tmp_path: Path) -> None:
    paths = [put(tmp_path, weights=w * 64) for w in "ab"]
    found = exports.scalars([StoredRecord(p, load_record(p)) for p in paths])
    assert {name.split("/")[0] for name in found} == {"toy-vit@aaaaaaaa", "toy-vit@bbbbbbbb"}


def test_scalars_are_flat_and_apart(tmp_path: Path) -> None:
    found = exports.scalars(stored(tmp_path))
    assert len(found) == 9
    assert "detection/x/linear/accuracy_low" in found
    assert sum(name.startswith("segmentation/toy/linear/seed-") for name in found) == 6


def test_command_publish(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored(tmp_path)
    assert run("publish", "model-index", tmp_path) == 0
    assert "model-index:" in capsys.readouterr().out
    assert run("publish", "lmms-eval", tmp_path, "-o", tmp_path / "x.json") == 0
    assert json.loads((tmp_path / "x.json").read_text())["model_name"] == "toy-vit"
    put(tmp_path, encoder="other")
    assert run("publish", "lmms-eval", tmp_path) == 2
    assert "--encoder" in capsys.readouterr().err
    assert run("publish", "tensorboard", tmp_path) == 2
    assert run("publish", "excel", tmp_path) == 2
    capsys.readouterr()
    for target, package in (("wandb", "wandb"), ("mlflow", "mlflow")):
        if not _installed(package):
            assert run("publish", target, tmp_path) == 2
            assert "rice-eval[tracking]" in capsys.readouterr().err


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


def test_trackers_get_the_scalars(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[Any] = []

    class Run:
        def log(self, values: Any, step: int) -> None:
            logged.append((values, step))

        def finish(self) -> None:
            logged.append("finished")

    import types

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: Run()))
    entries = stored(tmp_path)
    exports.log_wandb(entries, "p", 3)
    assert logged == [(exports.scalars(entries), 3), "finished"]


@pytest.mark.parametrize(
    "command",
    [
        ["leaderboard", "{r}"],
        ["gate", "--baseline", "{r}", "--candidate", "{r}"],
        ["compare", "{r}", "{r}"],
        ["results", "validate", "{r}"],
    ],
)
def test_no_torch(tmp_path: Path, command: list[str]) -> None:
    put(tmp_path)
    code = (
        "import sys\nfrom rice_eval.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as e:\n    code = e.code\n"
        "bad = [m for m in ('torch', 'torchvision', 'pandas', 'pyarrow') if m in sys.modules]\n"
        "sys.exit(f'imported {bad}' if bad else code)"
    )
    arguments = [a.format(r=tmp_path) for a in command]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout


@pytest.mark.slow
def test_sixty_thousand_records(tmp_path: Path) -> None:
    """500 encoders, 40 tasks, 3 seeds: all are read, ranked and written; benchmarks/leaderboard.py has the time."""
    from rice_eval.results.leaderboard import build
    from rice_eval.results.tables import wide_csv

    sys.path.append(str(ROOT / "benchmarks"))
    from leaderboard import write_records  # type: ignore[import-not-found]

    write_records(tmp_path, encoders=500, tasks=40, seeds=3)
    found = build(store_module.read_records([tmp_path]))
    assert len(found.boards) == 40
    assert all(len(b.rows) == 500 for b in found.boards)
    rows = list(csv.reader(io.StringIO(wide_csv(found))))
    assert len(rows) == 501
