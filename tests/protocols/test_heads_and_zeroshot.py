"""``head-import`` reads what ``dinov2-linear`` trains; ``zero-shot-seg`` finds colours by name."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from segmentation_fakes import COLOURS, FakeDataset, FakeEncoder, context_of
from torch.nn import functional as F

from rice_eval.errors import CheckpointError, PlanError, UsageError
from rice_eval.protocols.base import configure
from rice_eval.protocols.heads import HeadImport
from rice_eval.protocols.online_recipes import Dinov2Linear
from rice_eval.protocols.zeroshot import ZeroShotSeg, class_embeddings
from rice_eval.registry import protocols

VIEW = "short=28,slide=14,crop=21,pad=patch,interp=plain"


def datasets():
    return FakeDataset("train", 6, 0, sizes=((28, 42),)), FakeDataset("test", 3, 1, sizes=((31, 44),))


def trained():
    train, test = datasets()
    recipe = Dinov2Linear(view=VIEW, steps=30, batch=4, warmup=1, lr=3e-2, side="28", crop="24")
    context = context_of(recipe, train, test, keep_predictions=True)
    return recipe.fit(context)[0], recipe.run(context).predictions


@pytest.mark.parametrize("form", ["dinov2", "dinov3", "safetensors"])
def test_an_imported_head_gives_the_numbers_it_was_saved_with(tmp_path: Path, form: str):
    assert protocols.get("head-import") is HeadImport
    head, expected = trained()
    norm = head.norm.state_dict()
    conv = head.conv.state_dict()
    path = tmp_path / ("head.safetensors" if form == "safetensors" else "head.pth")
    if form == "dinov3":
        saved = {f"segmentation_model.1.batchnorm_layer.{k}": v for k, v in norm.items()}
        saved |= {f"segmentation_model.1.conv.{k}": v for k, v in conv.items()}
        torch.save({"model": saved, "optimizer": {}}, path)
    else:
        saved = {f"decode_head.bn.{k}": v for k, v in norm.items()}
        saved |= {f"decode_head.conv_seg.{k}": v for k, v in conv.items()}
        if form == "dinov2":
            torch.save({"state_dict": saved, "meta": {"epoch": 1}}, path)
        else:
            save_file(saved, path)
    protocol = configure(HeadImport, {"view": VIEW, "head": str(path)})
    outcome = protocol.run(context_of(protocol, *datasets(), keep_predictions=True))
    for name, labels in expected.items():
        np.testing.assert_array_equal(outcome.predictions[name], labels)
    assert outcome.forwards > 0
    moved = tmp_path / f"moved{path.suffix}"
    moved.write_bytes(path.read_bytes())
    assert configure(HeadImport, {"view": VIEW, "head": str(moved)}).hash == protocol.hash
    assert str(tmp_path) not in str(protocol.settings())


def test_what_is_no_such_head_is_one_line(tmp_path: Path):
    path = tmp_path / "head.pth"

    def run(**saved):
        torch.save(saved, path)
        protocol = HeadImport(view=VIEW, head=str(path))
        protocol.run(context_of(protocol, *datasets()))

    with pytest.raises(CheckpointError, match="no such file|can't be read"):
        HeadImport(view=VIEW, head=str(tmp_path / "none.pth"))
    with pytest.raises(UsageError, match="head is the path"):
        configure(HeadImport, {"view": VIEW})
    with pytest.raises(CheckpointError, match="a head from 8 features to 4 classes, here 9 features and 4"):
        run(**{"conv.weight": torch.zeros(4, 8, 1, 1), "conv.bias": torch.zeros(4)})
    with pytest.raises(CheckpointError, match="keys: extra"):
        run(**{"conv.weight": torch.zeros(4, 9), "conv.bias": torch.zeros(4), "extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="more than one head"):
        run(**{"a.conv.weight": torch.zeros(4, 9), "conv.bias": torch.zeros(4), "conv.weight": torch.zeros(4, 9)})
    with pytest.raises(CheckpointError, match="no batch norm"):
        run(**{"conv.weight": torch.zeros(4, 9)})
    path.write_bytes(b"nonsense")
    protocol = HeadImport(view=VIEW, head=str(path))
    with pytest.raises(CheckpointError, match="can't be read"):
        protocol.run(context_of(protocol, *datasets()))


class Speaking(FakeEncoder):
    """Its "text tower" knows the fake data set's colours, its patches are their mean colour."""

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        rows = [COLOURS[int(text.rstrip(".").split()[-1])] for text in texts]
        return F.normalize(torch.from_numpy(np.stack(rows)).float() - 128, dim=1)

    def embed_patches(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        means = F.avg_pool2d(images, 7) * 255 - 128
        return means.flatten(2).transpose(1, 2), (means.shape[2], means.shape[3])


def test_zero_shot_finds_classes_by_name():
    protocol = ZeroShotSeg(view="short=28,slide=14,crop=21", templates=("a photo of {}.", "{}"))
    outcome = protocol.run(context_of(protocol, *datasets(), Speaking()))
    assert outcome.statistics.point()["miou"] > 40
    assert outcome.forwards == 3 * 6
    with pytest.raises(PlanError, match="text space"):
        protocol.run(context_of(protocol, *datasets()))
    with pytest.raises(PlanError, match="no text tower"):
        class_embeddings(FakeEncoder(), ["a"], ["{}"])
    with pytest.raises(UsageError, match="templates"):
        configure(ZeroShotSeg, {"view": "square=28", "templates": "a photo"})
    texts = class_embeddings(Speaking(), ["class 0", "class 1"], protocol.templates)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert ZeroShotSeg(view="square=28").hash != ZeroShotSeg(view="square=28", templates=("{}",)).hash


def saved_head(path: Path, width: int, seed: int) -> Path:
    generator = torch.Generator().manual_seed(seed)
    torch.save({"conv.weight": torch.randn(4, width, 1, 1, generator=generator), "conv.bias": torch.zeros(4)}, path)
    return path


def test_every_field_of_head_import_is_in_the_hash_and_read(tmp_path: Path):
    """``tokens`` has one value, and nothing here is random, so ``seed`` changes the hash alone."""
    padded = "short=28,slide=14,crop=24,pad=patch,interp=plain"  # 24 px are no multiple of the patch: squeeze has something to do
    base = HeadImport(view=padded, head=str(saved_head(tmp_path / "a.pt", 9, 0)))
    changes = {
        "view": "square=28", "norm": False, "head": str(saved_head(tmp_path / "b.pt", 9, 1)),
        "layer_set": "last4", "squeeze": False, "scales": (1.0, 1.5), "mirror": True,
    }  # fmt: skip
    fields = {f.name for f in dataclasses.fields(HeadImport) if f.init}
    assert fields == set(changes) | {"tokens", "seed"}

    def logits_of(protocol: HeadImport) -> list[np.ndarray]:
        outcome = protocol.run(context_of(protocol, *datasets(), keep_predictions=True))
        return [outcome.predictions[name] for name in sorted(outcome.predictions)]

    before = logits_of(base)
    for name, value in changes.items():
        settings = {f: getattr(base, f) for f in fields} | {name: value}
        if name == "layer_set":  # two layers ask for a wider head: 6 + 9 features
            settings["head"] = str(saved_head(tmp_path / "c.pt", 15, 0))
        changed = HeadImport(**settings)
        assert changed.hash != base.hash, name
        assert any(not np.array_equal(a, b) for a, b in zip(before, logits_of(changed))), name
    only = dataclasses.replace(base, seed=3)
    assert only.hash != base.hash
    assert all(np.array_equal(a, b) for a, b in zip(before, logits_of(only)))
    with pytest.raises(UsageError, match="tokens"):
        configure(HeadImport, {"head": base.head, "tokens": "fp16"})


class Wordy(Speaking):
    """Its text embeddings hear the template too."""

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        plain = super().embed_text(texts)
        return F.normalize(
            plain + torch.tensor([[len(t) % 5 - 2.0] for t in texts]) * torch.tensor([0.9, -0.4, 0.2]), dim=1
        )


def test_every_field_of_zero_shot_seg_is_in_the_hash_and_read():
    """``tokens`` and ``norm`` have one value, and nothing is random, so ``seed`` changes the hash alone."""
    base = ZeroShotSeg(view="short=28,slide=14,crop=21", templates=("a photo of {}.",))
    changes = {"view": "square=28", "templates": ("{}", "my own photograph of {}")}
    assert {f.name for f in dataclasses.fields(ZeroShotSeg)} == set(changes) | {"tokens", "seed", "norm"}

    def found(protocol: ZeroShotSeg) -> list[np.ndarray]:
        outcome = protocol.run(context_of(protocol, *datasets(), Wordy(), keep_predictions=True))
        return [outcome.predictions[name] for name in sorted(outcome.predictions)]

    before = found(base)
    for name, value in changes.items():
        changed = dataclasses.replace(base, **{name: value})
        assert changed.hash != base.hash, name
        assert any(not np.array_equal(a, b) for a, b in zip(before, found(changed))), name
    for name, value in {"seed": 4}.items():
        assert dataclasses.replace(base, **{name: value}).hash != base.hash
    with pytest.raises(UsageError, match="norm"):
        configure(ZeroShotSeg, {"view": "square=28", "norm": False})
    with pytest.raises(UsageError, match="tokens"):
        configure(ZeroShotSeg, {"view": "square=28", "tokens": "fp16"})
