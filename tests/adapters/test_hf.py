"""``hf:FOLDER`` for ViT-like models of transformers, against the library's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rice_eval.adapters import load_encoder
from rice_eval.errors import CheckpointError, PlanError

T = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import TEXT, VISION, images, randomise  # noqa: E402

SQUARE = {"image_size": 32, "patch_size": 8}
DINO = {k: v for k, v in VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
KINDS: dict[str, tuple[str, str, dict[str, Any], tuple[int, int]]] = {
    "dinov2": ("Dinov2Model", "Dinov2Config", {**DINO, **SQUARE}, (1, 0)),
    "dinov2-registers": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**DINO, **SQUARE, "num_register_tokens": 3},
        (1, 3),
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**VISION, **SQUARE, "num_register_tokens": 2}, (1, 2)),
    "vit": ("ViTModel", "ViTConfig", {**VISION, **SQUARE}, (1, 0)),
    "deit": ("DeiTModel", "DeiTConfig", {**VISION, **SQUARE}, (1, 1)),
    "ijepa": ("IJepaModel", "IJepaConfig", {**VISION, **SQUARE}, (0, 0)),
    "beit": ("BeitModel", "BeitConfig", {**VISION, **SQUARE}, (1, 0)),
    "mae": ("ViTMAEModel", "ViTMAEConfig", {**VISION, **SQUARE, "mask_ratio": 0.0}, (1, 0)),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", {**VISION, **SQUARE}, (0, 0)),
}


def _make(kind: str, folder: Path) -> Any:
    cls, config, numbers, _ = KINDS[kind]
    if not hasattr(T, cls):
        pytest.skip(f"this transformers has no {cls}")
    model = randomise(getattr(T, cls)(getattr(T, config)(**numbers)))
    model.save_pretrained(folder)  # type: ignore[operator]
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_equal_transformers_at_every_block(kind: str, tmp_path: Path) -> None:
    import inspect

    model = _make(kind, tmp_path)
    encoder = load_encoder(f"hf:{tmp_path}")
    n_cls, registers = KINDS[kind][3]
    for size in [(32, 32)] if kind == "aimv2" else [(32, 32), (24, 40), (48, 48)]:
        x = images(*size)
        more: dict[str, Any] = {}
        if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
            more["interpolate_pos_encoding"] = True
        if kind == "mae":
            more["noise"] = torch.arange(size[0] * size[1] // 64).float().expand(2, -1)
        with torch.no_grad():
            out = model(pixel_values=encoder.normalise(x), output_hidden_states=True, **more)  # type: ignore[attr-defined]
        off, on = encoder.encode(x, layers=(1, 2), norm=False), encoder.encode(x, layers=(-1,), norm=True)
        first = n_cls + registers
        for n in (1, 2):
            torch.testing.assert_close(off.patches[n], out.hidden_states[n][:, first:], atol=1e-6, rtol=0)
        torch.testing.assert_close(on.last, out.last_hidden_state[:, first:], atol=1e-6, rtol=0)
        assert (on.cls is not None) == bool(n_cls)
        assert (0 if on.registers is None else on.registers.shape[1]) == registers
        if on.registers is not None:
            torch.testing.assert_close(on.registers, out.last_hidden_state[:, n_cls:first], atol=1e-6, rtol=0)
        torch.testing.assert_close(encoder.encode(x[1:]).last, on.last[1:], atol=1e-6, rtol=0)


def test_aimv2_at_another_size_is_refused_in_one_line(tmp_path: Path) -> None:
    """Its learned positions are not interpolated upstream."""
    _make("aimv2", tmp_path)
    with pytest.raises(PlanError, match="can't take 24 x 40"):
        load_encoder(f"hf:{tmp_path}").encode(images(24, 40))


def test_a_classifier_gives_its_backbone_and_says_what_it_left(tmp_path: Path) -> None:
    model = randomise(T.ViTForImageClassification(T.ViTConfig(**VISION, **SQUARE)))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    encoder = load_encoder(f"hf:{tmp_path}")
    x = images(32, 32)
    with torch.no_grad():
        out = model.vit(pixel_values=encoder.normalise(x))  # type: ignore[operator, union-attr, attr-defined]
    torch.testing.assert_close(encoder.encode(x).last, out.last_hidden_state[:, 1:], atol=1e-6, rtol=0)
    assert any("classifier" in note for note in encoder.facts.notes)


def test_families_with_their_own_reader_are_read_by_it(tmp_path: Path) -> None:
    T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config={**VISION, **SQUARE})).save_pretrained(tmp_path / "clip")
    T.SiglipVisionModel(T.SiglipVisionConfig(**VISION, **SQUARE)).save_pretrained(tmp_path / "siglip")
    T.MLCDVisionModel(T.MLCDVisionConfig(**VISION, **SQUARE)).save_pretrained(tmp_path / "mlcd")
    for name, word in (("clip", "CLIPModel"), ("siglip", "SiglipVisionModel"), ("mlcd", "MLCDVisionModel")):
        encoder = load_encoder(f"hf:{tmp_path / name}")
        assert word in encoder.facts.arch
        assert (encoder.facts.patch, encoder.facts.resolution) == (8, 32)


def test_weights_in_a_file_of_their_own(tmp_path: Path) -> None:
    _make("dinov2", tmp_path / "base")
    state = {k: v + 1 for k, v in load_file(tmp_path / "base" / "model.safetensors").items()}
    save_file(state, tmp_path / "step.safetensors")
    base, step = (
        load_encoder(f"hf:{tmp_path / 'base'}"),
        load_encoder(f"hf:{tmp_path / 'base'}", weights=tmp_path / "step.safetensors"),
    )
    assert base.fingerprint != step.fingerprint
    assert not torch.equal(base.encode(images(32, 32)).last, step.encode(images(32, 32)).last)


def test_broken_folders_are_refused(tmp_path: Path) -> None:
    _make("dinov2", tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)

    def refused(damaged: dict[str, torch.Tensor], said: str) -> None:
        save_file(damaged, file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=said) as caught:
            load_encoder(f"hf:{tmp_path}")
        assert "\n" not in str(caught.value)

    refused({k: v for k, v in state.items() if ".layer.1." not in k}, r"keys missing \(encoder\.layer\.1\.")
    refused({**state, "encoder.layer.0.extra": torch.zeros(1)}, r"keys unexpected \(encoder\.layer\.0\.extra\)")
    key = "encoder.layer.0.mlp.fc1.weight"
    refused({**state, key: state[key].T.contiguous()}, "can't be loaded|shapes differ")
    save_file(state, file, metadata={"format": "pt"})
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="truncated"):
        load_encoder(f"hf:{tmp_path}")
    (tmp_path / "config.json").unlink()
    save_file(state, file)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_encoder(f"hf:{tmp_path}")


def test_code_shipped_with_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "model.safetensors")
    config = {"model_type": "no_such_thing", "auto_map": {"AutoConfig": "code.Config", "AutoModel": "code.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "code.py").write_text("raise SystemExit('this code was run')\n")
    with pytest.raises(CheckpointError, match="trust-remote-code"):
        load_encoder(f"hf:{tmp_path}")


@pytest.mark.parametrize("kind", ["swin", "convnext", "bert"])
def test_models_that_are_no_vits_are_refused(kind: str, tmp_path: Path) -> None:
    made: dict[str, Any] = {
        "swin": lambda: T.SwinModel(T.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)),
        "convnext": lambda: T.ConvNextModel(T.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1])),
        "bert": lambda: T.BertModel(T.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)),
    }  # fmt: skip
    made[kind]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        load_encoder(f"hf:{tmp_path}")
    assert "\n" not in str(caught.value)
