"""Reading checkpoints: every form they come in, and every way they can be damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.checkpoints import TensorInfo, compare, expand, open_checkpoint, strip_wrappers
from rice_eval.adapters.hub import locate
from rice_eval.cards import EncoderCard, FamilyCard, SourceCard
from rice_eval.errors import CheckpointError

STATE = {
    "a.weight": torch.arange(6.0).reshape(2, 3),
    "b.bias": torch.ones(2, dtype=torch.float16),
    "n": torch.tensor(3),
}


def _same(path: Path | str) -> None:
    checkpoint = open_checkpoint(path)
    assert checkpoint.tensors["a.weight"] == TensorInfo((2, 3), torch.float32)
    assert checkpoint.tensors["b.bias"].dtype == torch.float16
    for name, tensor in checkpoint.read(list(STATE)).items():
        assert torch.equal(tensor, STATE[name])


def test_every_form_reads_the_same(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "m.safetensors")
    torch.save(STATE, tmp_path / "m.pt")
    torch.save(STATE, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": STATE, "epoch": 3}, tmp_path / "wrapped.bin")
    torch.save({**STATE, "epoch": 3}, tmp_path / "flat.pt")
    for name in ("m.safetensors", "m.pt", "old.pth", "wrapped.bin", "flat.pt", "m.sa*"):
        _same(tmp_path / name)
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"a.weight": STATE["a.weight"]}, folder / "model-00001-of-00002.safetensors")
    save_file({"b.bias": STATE["b.bias"], "n": STATE["n"]}, folder / "model-00002-of-00002.safetensors")
    index = {
        "weight_map": {
            "a.weight": "model-00001-of-00002.safetensors",
            "b.bias": "model-00002-of-00002.safetensors",
            "n": "model-00002-of-00002.safetensors",
        }
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    _same(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"shards are missing \(model-00002-of-00002"):
        open_checkpoint(folder)
    save_file({"b.bias": STATE["b.bias"]}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks keys its index promises \(n\)"):
        open_checkpoint(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"n": "../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="outside its folder"):
        open_checkpoint(folder)


@given(st.integers(0, 400))
def test_a_safetensors_file_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, keep: int) -> None:
    path = tmp_path_factory.mktemp("cut") / "m.safetensors"
    save_file(STATE, path)
    data = path.read_bytes()
    if keep >= len(data):
        return
    path.write_bytes(data[:keep])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_a_torch_file_cut_anywhere_is_refused(tmp_path: Path, share: float, new_format: bool) -> None:
    path = tmp_path / "m.pt"
    torch.save(STATE, path, _use_new_zipfile_serialization=new_format)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch pickle-was-run",)


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a.weight": STATE["a.weight"], "x": _Evil()}, "evil.pt")
    with pytest.raises(
        CheckpointError, match=r"holds code or objects beside tensors \((posix|nt)\.system\); it was not run"
    ):
        open_checkpoint("evil.pt")
    assert not Path("pickle-was-run").exists()


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("m.safetensors", b"", "is empty"),
        ("m.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-lfs pointer"),
        ("m.safetensors", b"<html>Access denied, please log in to see this</html>", "truncated|not a safetensors"),
        ("m.pt", b"<html>Access denied</html>", "damaged|not a readable"),
        ("m.safetensors.incomplete", b"x" * 100, "partial download"),
    ],
)
def test_what_is_no_checkpoint(tmp_path: Path, name: str, data: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_folders_and_globs_that_do_not_decide(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        open_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="matches nothing"):
        open_checkpoint(tmp_path / "*.pt")
    with pytest.raises(CheckpointError, match="holds no"):
        open_checkpoint(tmp_path)
    (tmp_path / "model.safetensors.incomplete").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="partial download"):
        open_checkpoint(tmp_path)
    for name in ("a.safetensors", "b.safetensors"):
        save_file(STATE, tmp_path / name)
    with pytest.raises(CheckpointError, match="2 checkpoints"):
        open_checkpoint(tmp_path)
    (tmp_path / "a.safetensors.part").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="partial download"):
        open_checkpoint(tmp_path / "a.safetensors")
    assert expand(f"{tmp_path}/b*::model")[1] == "model"


def test_wrappers_come_off_only_where_every_name_carries_them(tmp_path: Path) -> None:
    def stripped(names: list[str]) -> tuple[list[str], str]:
        torch.save({n: torch.zeros(1) for n in names}, tmp_path / "m.pt")
        out = strip_wrappers(open_checkpoint(tmp_path / "m.pt"))
        assert all(torch.equal(t, torch.zeros(1)) for t in out.read(list(out.tensors)).values())
        return list(out.tensors), out.stripped

    assert stripped(["module.a", "module.b"]) == (["a", "b"], "module.")
    assert stripped(["module._orig_mod.a", "module._orig_mod.b"]) == (["a", "b"], "module._orig_mod.")
    assert stripped(["a", "_orig_mod.b"]) == (["a", "b"], "_orig_mod.")
    assert stripped(["ema.a", "ema.b"]) == (["a", "b"], "ema.")
    assert stripped(["module.a", "b"]) == (["module.a", "b"], "")
    with pytest.raises(CheckpointError, match="averaged copy"):
        stripped(["a", "ema.a"])
    with pytest.raises(CheckpointError, match="collide"):
        stripped(["a", "_orig_mod.a"])


def test_compare_names_the_first_few() -> None:
    have = {"a": TensorInfo((2, 3), torch.float32), "z": TensorInfo((1,), torch.float32)}
    want = {"a": (3, 2), **{f"b{i}": (1,) for i in range(5)}}
    with pytest.raises(CheckpointError) as caught:
        compare(have, want, "f")
    text = str(caught.value)
    assert "5 keys missing (b0, b1, b2 and 2 more)" in text
    assert "1 keys unexpected (z)" in text
    assert "a is [2, 3], not [3, 2]: transposed" in text
    compare({"z": have["z"]}, {}, "f", ignore=["z"])


def _request(hub: str, revision: str | None = None) -> LoadRequest:
    card = EncoderCard(name="x", source=SourceCard(hub=hub, revision=revision), arch="x", patch=1, resolution=1)
    return LoadRequest(card, FamilyCard(family="x", title="x", adapter="clip", encoders=(card,)))


def test_the_hub_says_no_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub import errors

    def failing(error: Exception) -> None:
        def snapshot_download(*_args: object, **_kwargs: object) -> str:
            raise error

        monkeypatch.setattr(hub, "snapshot_download", snapshot_download)

    def made(cls: type[Exception]) -> Exception:
        error = cls.__new__(cls)
        error.args = ("401 Client Error\nlong text",)
        return error

    for cls, said in (
        (errors.GatedRepoError, "is gated"),
        (errors.RepositoryNotFoundError, "does not exist, or is private"),
        (errors.RevisionNotFoundError, "no revision 'abc'"),
        (errors.LocalEntryNotFoundError, "not in the cache"),
        (errors.OfflineModeIsEnabled, "not in the cache"),
        (OSError, "can't be downloaded"),
    ):
        failing(made(cls))
        with pytest.raises(CheckpointError, match=said) as caught:
            locate(_request("someone/something", "abc"))
        assert "someone/something" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_offline_reads_only_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        locate(_request("someone/never-downloaded"))
