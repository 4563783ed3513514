from __future__ import annotations

from pathlib import Path

import pytest

from rice_eval.cards import catalogue
from rice_eval.errors import UsageError
from rice_eval.plan import EncoderRef, Plan, TaskRef, make_plan, task_for_dataset


def plan(weights: Path) -> Plan:
    card = task_for_dataset(catalogue(()), "segmentation", "scenes", {})
    return make_plan([EncoderRef("rice-vit-l-14-560", weights)], [TaskRef(card, None, 8, 4)])


@pytest.mark.parametrize("name", ["step[1].pt", "a*b?.pt", "folder"])
def test_a_checkpoint_may_have_any_name(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    assert plan(tmp_path / name).jobs[0].encoder.weights == tmp_path / name


def test_a_pattern_stands_for_the_parts_of_a_checkpoint(tmp_path: Path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"")
    assert len(plan(tmp_path / "model-*.safetensors").jobs) == 1


@pytest.mark.parametrize("name", ["none.pt", "none-*.pt", "none/.."])
def test_a_checkpoint_that_is_not_there(tmp_path: Path, name: str):
    with pytest.raises(UsageError, match="no such file or folder"):
        plan(tmp_path / name)


def test_a_path_without_a_name_is_not_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    # The folder is there; what is in it is for the loader to say.
    assert len(plan(Path(".")).jobs) == 1
