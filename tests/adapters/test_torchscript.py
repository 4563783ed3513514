"""OpenAI's own files: TorchScript archives, read as state dicts without running what is in them."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rice_eval.adapters import load_encoder
from rice_eval.adapters.checkpoints import open_checkpoint
from rice_eval.errors import CheckpointError

WIDTH, PATCH = 64, 8


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, 1)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(WIDTH, 4 * WIDTH))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))  # type: ignore[no-any-return]


class _Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.Sequential(_Block(), _Block())

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)  # type: ignore[no-any-return]


class _Visual(nn.Module):
    """A tower with OpenAI's names, its large matrices in fp16 as OpenAI's files keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(17, WIDTH))
        self.ln_pre, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.transformer = _Transformer()
        self.proj = nn.Parameter(torch.randn(WIDTH, 20).half())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(x.shape[0], 1, -1)
        x = self.ln_pre(torch.cat([cls, x], dim=1) + self.positional_embedding)
        x = self.transformer(x.transpose(0, 1)).transpose(0, 1)
        return self.ln_post(x[:, 0]) @ self.proj.float()


class _Clip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = _Visual()
        self.register_buffer("input_resolution", torch.tensor(32))
        self.numbers = [1, 2]

    def forward(self, x: Tensor) -> Tensor:
        return self.visual(x)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("openai") / "clip.pt"
    torch.jit.save(torch.jit.trace(_Clip().eval(), torch.zeros(1, 3, 32, 32), check_trace=False), path)
    return path


def test_tensors_are_the_state_dict(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = torch.jit.load(archive).state_dict()

    def never(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("the archive was run")

    monkeypatch.setattr(torch.jit, "load", never)
    monkeypatch.setattr(torch, "load", never)
    checkpoint = open_checkpoint(archive)
    got = checkpoint.read(list(checkpoint.tensors))
    assert set(got) == set(want)
    for name, tensor in want.items():
        assert torch.equal(got[name], tensor)
        assert got[name].dtype == tensor.dtype
    assert got["visual.proj"].dtype == torch.float16
    torch.jit.save(torch.jit.script(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))), tmp_path / "s.pt")
    assert "1.num_batches_tracked" in open_checkpoint(tmp_path / "s.pt").tensors


def test_the_tower_runs_and_its_half_precision_is_said(archive: Path) -> None:
    pytest.importorskip("transformers")
    encoder = load_encoder("clip-vit-b-16-openai", weights=archive)
    assert "stored as float16, float32, run as float32" in encoder.facts.notes
    module = torch.jit.load(archive)
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():  # the module's own gelu is exact and CLIP's is quick: only what comes before it is compared
        visual = module.visual
        y = visual.conv1(encoder.normalise(x)).flatten(2).transpose(1, 2)  # type: ignore[attr-defined]
        y = visual.ln_pre(torch.cat([visual.class_embedding.expand(2, 1, -1), y], 1) + visual.positional_embedding)
    body = encoder._model.vision_model  # type: ignore[attr-defined]
    with torch.no_grad():
        ours = body.pre_layrnorm(body.embeddings(encoder.normalise(x)))  # type: ignore[attr-defined]
    torch.testing.assert_close(ours, y, atol=1e-6, rtol=0)
    assert encoder.encode(x).last.shape == (2, 16, WIDTH)


def _with_pickle(archive: Path, out: Path, data: bytes, *, compressed: bool = False) -> Path:
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(out, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
            new.writestr(name, data if name.endswith("/data.pkl") else old.read(name), kind)
    return out


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch archive-was-run",)


# A scripted class that is called; a class given a state; a known function given a state.
_CALLED = b"\x80\x02c__torch__\nM\n(X\x01\x00\x00\x00atR."
_CLASS = b"\x80\x02c__torch__\nM\n}X\x01\x00\x00\x00aK\x01sb."
_FUNCTION = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00__code__K\x01sb."


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (pickle.dumps(_Evil(), 2), r"names (posix|nt)\.system; it was not run"),
        (b"\x80\x02cbuiltins\neval\n(X\x03\x00\x00\x001+1tR.", r"names builtins\.eval"),
        (b"\x80\x02ctorch._utils\n_rebuild_qtensor\n.", r"names torch\._utils\._rebuild_qtensor"),
        (b"\x80\x02ctorch.jit\nload\n.", r"names torch\.jit\.load"),
        (_CALLED, "damaged"),
        (_CLASS, "damaged"),
        (_FUNCTION, "damaged"),
        (b"\x80\x02}.", "without tensors"),
        (b"\x80\x02", "damaged"),
        (b"", "damaged"),
    ],
)
def test_a_hostile_pickle_is_refused_and_not_run(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = _with_pickle(archive, tmp_path / "evil.pt", data)
    with pytest.raises(CheckpointError, match=said) as caught:
        open_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert not (tmp_path / "archive-was-run").exists()


def test_damaged_archives_are_refused(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    for share in (0.3, 0.9, 0.999):
        (tmp_path / "cut.pt").write_bytes(data[: int(len(data) * share)])
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / "cut.pt")
    with zipfile.ZipFile(archive) as old:
        tree = next(n for n in old.namelist() if n.endswith("/data.pkl"))
        pickled = old.read(tree)
    with pytest.raises(CheckpointError, match="compressed"):
        open_checkpoint(_with_pickle(archive, tmp_path / "zip.pt", pickled, compressed=True))
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(tmp_path / "short.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name)[:8] if "/data/" in name else old.read(name))
    with pytest.raises(CheckpointError, match="shorter than its tensor"):
        open_checkpoint(tmp_path / "short.pt")
    with pytest.raises(CheckpointError, match="leave out ::KEY"):
        open_checkpoint(f"{archive}::model")
