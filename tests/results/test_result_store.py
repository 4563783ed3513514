"""The store: strictness, names, atomic writes."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from result_factory import make_record, make_statistics

from rice_eval.errors import RecordError
from rice_eval.results import store as store_module
from rice_eval.results.record import Record, differences, seal
from rice_eval.results.store import ResultStore, iter_records, load_record, slug


def edit(path: Path, change: Any, *, reseal: bool = False) -> None:
    content = json.loads(path.read_text())
    change(content)
    if reseal:
        digests, digest = seal(content)
        content |= {"digests": digests, "sha256": digest}
    path.write_text(json.dumps(content))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return ResultStore(tmp_path).save(make_record(), make_statistics())


def test_round_trip(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    record, statistics = make_record(), make_statistics()
    path = store.save(record, statistics)
    assert path.relative_to(tmp_path).parts[:4] == ("records", "segmentation", "toy", "toy-vit")
    loaded = store.load(path)
    assert loaded.statistics is not None
    assert loaded.statistics.images == 50
    assert loaded.model_dump(exclude={"statistics", "digests", "sha256"}) == record.model_dump(
        exclude={"statistics", "digests", "sha256"}
    )
    again = store.load_statistics(loaded, path)
    assert again.point() == statistics.point()
    assert again.image_ids == statistics.image_ids
    assert [s.path for s in store] == [path]


def test_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    contents = []
    for name in "ab":
        path = ResultStore(tmp_path / name).save(make_record(), make_statistics())
        files = sorted(p for p in path.parent.iterdir())
        contents.append([(p.name, p.read_bytes()) for p in files])
    assert contents[0] == contents[1]
    assert len(contents[0]) == 2


def test_names_do_not_collide(tmp_path: Path) -> None:
    store = ResultStore(tmp_path)
    variants = [
        make_record(),
        make_record(seed=1),
        make_record(weights="b" * 64),
        make_record(settings={"layers": 4}),
        make_record(encoder="toy vit"),
        make_record(encoder="toy/vit"),
        make_record(encoder="toy_vit"),
        make_record(task="segmentation/other"),
    ]
    paths = {store.save(r, None) for r in variants}
    assert len(paths) == len(variants) == len(list(iter_records([tmp_path])))


@pytest.mark.parametrize("name", ["../../etc/passwd", "..", "", "a\nb", "<script>", "ünïcode", "x" * 300, "con\0trol"])
def test_hostile_encoder_names_stay_inside(tmp_path: Path, name: str) -> None:
    path = ResultStore(tmp_path).save(make_record(encoder=name), None)
    assert path.resolve().is_relative_to((tmp_path / "records" / "segmentation" / "toy").resolve())
    assert load_record(path).encoder.name == name
    assert slug(name) not in ("", ".", "..")


def test_same_run_replaces_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = ResultStore(tmp_path)
    first = store.save(make_record(), make_statistics(seed=0))
    with caplog.at_level(logging.WARNING, "rice_eval"):
        store.save(make_record(), make_statistics(seed=0))
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "rice_eval"):
        second = store.save(make_record(value=71.0), make_statistics(seed=1))
    assert "gave accuracy = 70 before and 71 now" in caplog.text
    assert first == second
    assert len(list(first.parent.iterdir())) == 2  # the stale statistics are gone
    assert store.load_statistics(load_record(second), second).point() == make_statistics(seed=1).point()


def test_another_run_under_the_same_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(tmp_path)
    monkeypatch.setattr(Record, "identity", property(lambda self: "00000000" + self.encoder.sha256[:8]))
    store.save(make_record(), None)
    with pytest.raises(RecordError, match="another run"):
        store.save(make_record(weights="b" * 64), None)


EDITS: list[tuple[str, Any, str]] = [
    ("metric", lambda c: c["metrics"]["accuracy"].update(value=71.0), "metrics.accuracy"),
    ("interval", lambda c: c["metrics"]["accuracy"].update(low=1.0), "metrics.accuracy"),
    (
        "a metric more",
        lambda c: c["metrics"].update(
            x={"value": 1.0, "low": None, "high": None, "unit": "%", "higher_is_better": True}
        ),
        "metrics.x",
    ),
    ("hash", lambda c: c.update(sha256="0" * 64), "sha256"),
    ("protocol hash", lambda c: c["protocol"].update(hash="0" * 16), "protocol"),
    ("encoder hash", lambda c: c["encoder"].update(sha256="0" * 64), "encoder"),
    ("fingerprint", lambda c: c["task"].update(test_fingerprint="0"), "task"),
    ("seeds", lambda c: c.update(seeds=[3]), "seeds"),
    ("per class", lambda c: c["per_class"]["accuracy"].update(sky=99.0), "per_class"),
    ("digest", lambda c: c["digests"].update(bank="0"), "digests.bank"),
    ("digest less", lambda c: c["digests"].pop("bank"), "digests.bank"),
    ("digest and field", lambda c: (c["digests"].update(bank="0"), c.update(seeds=[3])), "seeds"),
    ("no digests", lambda c: c.pop("digests"), "digests."),
    ("no hash", lambda c: c.pop("sha256"), "sha256"),
    ("no version", lambda c: c.pop("schema_version"), "schema_version"),
    ("version with a point", lambda c: c.update(schema_version=1.0), "schema_version"),
    ("NaN", lambda c: c["metrics"]["accuracy"].update(value=float("nan")), "metrics.accuracy.value"),
    ("infinity", lambda c: c.update(losses=[[1.0, float("inf")]]), "losses.0.1"),
    ("unknown field", lambda c: c.update(bonus=1), "bonus"),
    ("nested unknown field", lambda c: c["task"].update(bonus=1), "task.bonus"),
    ("newer version", lambda c: c.update(schema_version=2), "schema_version"),
    ("version as text", lambda c: c.update(schema_version="1"), "schema_version"),
    ("older version", lambda c: c.update(schema_version=0), "schema_version"),
    ("missing field", lambda c: c.pop("seconds"), "seconds"),
    ("number as text", lambda c: c["metrics"]["accuracy"].update(value="70.0"), "metrics.accuracy.value"),
]


@pytest.mark.parametrize(("change", "field"), [e[1:] for e in EDITS], ids=[e[0] for e in EDITS])
def test_an_edited_record_is_refused_by_name(saved: Path, change: Any, field: str) -> None:
    edit(saved, change)
    with pytest.raises(RecordError) as caught:
        load_record(saved)
    assert str(saved) in str(caught.value)
    quoted = f"'{field}" if field.endswith(".") else f"'{field}'"
    assert quoted in str(caught.value) or f"field {field}" in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_version_with_a_point_is_called_what_it_is(saved: Path) -> None:
    edit(saved, lambda c: c.update(schema_version=1.0))
    with pytest.raises(RecordError, match="is 1.0, not a whole number"):
        load_record(saved)


@pytest.mark.parametrize("line", [' "metric": "accuracy",', ' "created": "2020-01-01T00:00:00Z",', ' "seeds": [3],'])
def test_a_field_that_is_there_twice_is_refused(saved: Path, line: str) -> None:
    """JSON readers keep the last of two, so that the first could say anything."""
    text = saved.read_text()
    name = line.split('"')[1]
    for changed in (text.replace("{\n", "{\n" + line + "\n", 1), text.replace(f' "{name}"', line + f'\n "{name}"', 1)):
        assert changed != text
        saved.write_text(changed)
        with pytest.raises(RecordError, match=f"field '{name}' is there twice"):
            load_record(saved)


def test_a_pipe_among_records_does_not_hang(saved: Path, tmp_path: Path) -> None:
    pipe = saved.with_name("a.json")
    os.mkfifo(pipe)
    with pytest.raises(RecordError, match=r"a\.json: is no regular file"):
        list(iter_records([tmp_path]))
    with pytest.raises(RecordError, match="is no regular file"):
        list(iter_records([pipe]))


def test_a_resealed_record_still_needs_the_right_protocol_hash(saved: Path) -> None:
    edit(saved, lambda c: c["protocol"]["settings"].update(view="square=512"), reseal=True)
    with pytest.raises(RecordError, match=r"protocol\.hash"):
        load_record(saved)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"schema_version": 1}',
        '{"schema_version": NaN}',
        "\x00\xff",
        '{"schema_version": 1e400}',
    ],
)
def test_no_record_at_all(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RecordError, match=r"x\.json"):
        load_record(path)


def test_every_truncation_is_refused(saved: Path) -> None:
    data = saved.read_bytes()
    for cut in range(0, len(data) - 2, 97):
        saved.write_bytes(data[:cut])
        with pytest.raises(RecordError):
            load_record(saved)


def test_statistics_are_checked(saved: Path, tmp_path: Path) -> None:
    record = load_record(saved)
    assert record.statistics is not None
    file = saved.with_name(record.statistics.file)
    data = file.read_bytes()
    file.write_bytes(data[:-1] + b"x")
    with pytest.raises(RecordError, match="changed or damaged"):
        store_module.load_statistics(record, saved)
    file.unlink()
    with pytest.raises(RecordError, match="can't be read"):
        store_module.load_statistics(record, saved)
    with pytest.raises(RecordError, match="no per-image statistics"):
        store_module.load_statistics(make_record(), saved)


def test_unknown_kind_of_statistics(saved: Path) -> None:
    edit(saved, lambda c: c["statistics"].update(kind="tea-leaves"), reseal=True)
    with pytest.raises(RecordError, match=r"statistics\.kind.*tea-leaves"):
        store_module.load_statistics(load_record(saved), saved)


def test_nan_is_refused_when_writing(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="JSON"):
        ResultStore(tmp_path).save(make_record().model_copy(update={"chosen": {"lr": float("nan")}}), None)
    assert not list(tmp_path.rglob("*.json"))


def test_killed_between_statistics_and_record(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = load_record(saved)
    real = store_module.write_atomic

    def die(path: Path, data: bytes) -> None:
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(store_module, "write_atomic", die)
    with pytest.raises(KeyboardInterrupt):
        ResultStore(tmp_path).save(make_record(value=1.0), make_statistics(seed=9))
    assert load_record(saved) == before
    assert store_module.load_statistics(before, saved).point() == make_statistics().point()
    monkeypatch.undo()
    ResultStore(tmp_path).save(make_record(value=1.0), make_statistics(seed=9))
    assert len(list(saved.parent.iterdir())) == 2


def test_migration(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def to_old(content: dict[str, Any]) -> None:
        content["schema_version"] = 0
        content["millis"] = {k: v * 1000 for k, v in content.pop("seconds").items()}

    def upgrade(content: dict[str, Any]) -> dict[str, Any]:
        return {
            **{k: v for k, v in content.items() if k != "millis"},
            "seconds": {k: v / 1000 for k, v in content["millis"].items()},
        }

    expected = load_record(saved)
    edit(saved, to_old, reseal=True)
    monkeypatch.setitem(store_module.MIGRATIONS, 0, upgrade)
    assert load_record(saved) == expected
    edit(saved, lambda c: c["metrics"]["accuracy"].update(value=99.0))
    with pytest.raises(RecordError, match=r"metrics\.accuracy"):
        load_record(saved)


def test_roots(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")  # outside records/: not looked at
    assert len(list(iter_records([tmp_path, saved, saved.parent]))) == 1
    with pytest.raises(RecordError, match="does not exist"):
        list(iter_records([tmp_path / "nowhere"]))
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecordError, match="holds no records"):
        list(iter_records([tmp_path / "empty"]))


def test_differences_name_the_field() -> None:
    assert differences(make_record(), make_record(seed=3, weights="b" * 64)) == []
    assert differences(make_record(), make_record(settings={"view": "square=512"})) == [
        "protocol setting 'view': 'square=64' against 'square=512'"
    ]
    assert differences(make_record(), make_record(task="segmentation/b"))[0].startswith("task: ")
    assert make_record().comparability_key == make_record(seed=3).comparability_key
    assert make_record().comparability_key != make_record(settings={"view": "square=512"}).comparability_key
