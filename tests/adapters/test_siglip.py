"""SigLIP and SigLIP 2 against transformers: tokens, NaFlex, embeddings, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.siglip import patches_of
from rice_eval.errors import CheckpointError

transformers = pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import TEXT, TEXTS, VISION, images, randomise, save_tokenizer  # noqa: E402

FIXED, NAFLEX = "siglip-vit-b-16-224", "siglip2-vit-b-16-naflex"
SIZES = [(32, 32), (48, 48), (24, 40)]


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("siglip")
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    randomise(
        transformers.SiglipModel(
            transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
        )
    ).save_pretrained(out)  # type: ignore[operator]
    save_tokenizer(out, pooled_last=True)
    return out


@pytest.fixture(scope="module")
def naflex(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("siglip2")
    vision = {**VISION, "num_patches": 16, "patch_size": 8}
    randomise(
        transformers.Siglip2Model(
            transformers.Siglip2Config(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
        )
    ).save_pretrained(out)  # type: ignore[operator]
    save_tokenizer(out, pooled_last=True)
    return out


def _reference(cls: Any, folder: Path, *inputs: Any, **more: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    model = cls.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(*inputs, output_hidden_states=True, **more)
        norm = getattr(model, "vision_model", model).post_layernorm
        return list(out.hidden_states), [norm(h) for h in out.hidden_states], out.last_hidden_state


@pytest.mark.parametrize("size", SIZES)
def test_fixed_tokens_equal_transformers_at_every_block(fixed: Path, size: tuple[int, int]) -> None:
    encoder = load_encoder(FIXED, weights=fixed)
    x = images(*size)
    pixels = encoder.normalise(x)  # type: ignore[attr-defined]
    raw, normed, last = _reference(
        transformers.SiglipVisionModel, fixed, pixel_values=pixels, interpolate_pos_encoding=True
    )
    off, on = encoder.encode(x, layers=(1, 2, 3), norm=False), encoder.encode(x, layers=(1, 2, 3), norm=True)
    for n in (1, 2):
        assert torch.equal(off.patches[n], raw[n])
        assert torch.equal(on.patches[n], normed[n])
    assert torch.equal(on.patches[3], last)
    assert on.cls is None
    assert encoder.facts.abilities == ("image", "text")


@pytest.mark.parametrize("size", SIZES)
def test_naflex_tokens_equal_transformers_at_every_block(naflex: Path, size: tuple[int, int]) -> None:
    encoder = load_encoder(NAFLEX, weights=naflex)
    x = images(*size)
    pixels = encoder.normalise(x)  # type: ignore[attr-defined]
    h, w = size[0] // 8, size[1] // 8
    # As the processor cuts patches: rows of the image, then pixels, channels last.
    flat = np.stack([i.numpy().reshape(3, h, 8, w, 8).transpose(1, 3, 2, 4, 0).reshape(h * w, -1) for i in pixels])
    inputs = (torch.from_numpy(flat), torch.ones(2, h * w, dtype=torch.long), torch.tensor([[h, w]] * 2))
    raw, normed, last = _reference(transformers.Siglip2VisionModel, naflex, *inputs)
    off, on = encoder.encode(x, layers=(1, 2, 3), norm=False), encoder.encode(x, layers=(1, 2, 3), norm=True)
    for n in (1, 2):
        torch.testing.assert_close(off.patches[n], raw[n], atol=1e-6, rtol=0)
        torch.testing.assert_close(on.patches[n], normed[n], atol=1e-6, rtol=0)
    torch.testing.assert_close(on.patches[3], last, atol=1e-6, rtol=0)
    assert torch.equal(patches_of(pixels, 8)["pixel_values"], inputs[0])


@pytest.mark.parametrize("kind", ["fixed", "naflex"])
def test_embeddings_and_scores_equal_transformers(kind: str, fixed: Path, naflex: Path) -> None:
    folder, name = (fixed, FIXED) if kind == "fixed" else (naflex, NAFLEX)
    encoder = load_encoder(name, weights=folder)
    model = (transformers.SiglipModel if kind == "fixed" else transformers.Siglip2Model).from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    x = images(32, 32)
    pixels = encoder.normalise(x)  # type: ignore[attr-defined]
    lowered = [t.lower() for t in TEXTS]
    ids = tokenizer(lowered, padding="max_length", truncation=True, max_length=12, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model(input_ids=ids, **({"pixel_values": pixels} if kind == "fixed" else patches_of(pixels, 8)))
    ours, theirs = encoder.embed_image(x), encoder.embed_text(TEXTS)  # type: ignore[attr-defined]
    torch.testing.assert_close(ours, out.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs, out.text_embeds, atol=1e-6, rtol=0)
    scores = ours @ theirs.T * model.logit_scale.exp() + model.logit_bias
    torch.testing.assert_close(scores, out.logits_per_image, atol=1e-5, rtol=0)


def test_vision_models_alone_and_without_head(tmp_path: Path) -> None:
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    for name, use_head in (("head", True), ("bare", False)):
        config = transformers.SiglipVisionConfig(**vision, vision_use_head=use_head)
        randomise(transformers.SiglipVisionModel(config)).save_pretrained(tmp_path / name)  # type: ignore[operator]
    x = images(32, 32)
    with_head, bare = load_encoder(FIXED, weights=tmp_path / "head"), load_encoder(FIXED, weights=tmp_path / "bare")
    assert with_head.facts.abilities == ("image",)
    assert bare.facts.abilities == ()
    assert with_head.encode(x).last.shape == bare.encode(x).last.shape
    with pytest.raises(CheckpointError, match="no head"):
        bare.embed_image(x)  # type: ignore[attr-defined]
    config = transformers.Siglip2VisionConfig(**VISION, num_patches=16, patch_size=8)
    randomise(transformers.Siglip2VisionModel(config)).save_pretrained(tmp_path / "flex")  # type: ignore[operator]
    flexible = load_encoder(NAFLEX, weights=tmp_path / "flex")
    assert (flexible.facts.resolution, flexible.facts.patch) == (32, 8)


def test_a_published_size_that_the_patch_does_not_divide(tmp_path: Path) -> None:
    """so400m at 384 with patches of 14 has 27 x 27 positions: its native side is 378 px, and 384 is refused, not cut."""
    from rice_eval.errors import PlanError

    config = transformers.SiglipVisionConfig(**VISION, image_size=34, patch_size=8)
    randomise(transformers.SiglipVisionModel(config)).save_pretrained(tmp_path)  # type: ignore[operator]
    encoder = load_encoder(FIXED, weights=tmp_path)
    assert encoder.facts.resolution == 32
    x = images(34, 34)
    with torch.no_grad():
        cut = transformers.SiglipVisionModel.from_pretrained(tmp_path).eval()(pixel_values=encoder.normalise(x))  # type: ignore[attr-defined]
    assert torch.equal(encoder.encode(x[..., :32, :32]).last, cut.last_hidden_state)
    with pytest.raises(PlanError, match="multiples of 8"):
        encoder.encode(x)


def test_broken_files_are_refused(fixed: Path, tmp_path: Path) -> None:
    state = load_file(fixed / "model.safetensors")
    (tmp_path / "config.json").write_bytes((fixed / "config.json").read_bytes())

    def refused(damaged: dict[str, Tensor], said: str) -> None:
        save_file(damaged, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=said) as caught:
            load_encoder(FIXED, weights=tmp_path)
        assert "\n" not in str(caught.value)

    block = "vision_model.encoder.layers.1."
    refused(
        {k: v for k, v in state.items() if not k.startswith(block)},
        r"16 keys missing \(vision_model\.encoder\.layers\.1\.",
    )
    key = "vision_model.head.mlp.fc1.weight"
    refused({**state, key: state[key].T.contiguous()}, "transposed")
    refused({**state, "vision_model.extra": torch.zeros(1)}, "unexpected")
    refused({k: v for k, v in state.items() if not k.startswith("text_model.head")}, r"text_model\.head\.weight")
    config = json.loads((fixed / "config.json").read_text())
    config["vision_config"]["patch_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(state, "patch_size = 16, the tensors say 8")


def test_fixed_and_naflex_are_told_apart_and_clip_is_refused(fixed: Path, naflex: Path, tmp_path: Path) -> None:
    assert "NaFlex" in load_encoder(FIXED, weights=naflex).facts.arch
    assert "NaFlex" not in load_encoder(NAFLEX, weights=fixed).facts.arch
    config = transformers.CLIPVisionConfig(**VISION, image_size=32, patch_size=8)
    transformers.CLIPVisionModel(config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="not SigLIP"):
        load_encoder(FIXED, weights=tmp_path)
    with pytest.raises(CheckpointError, match="not CLIP"):
        load_encoder("clip-vit-b-16-openai", weights=fixed)


def test_tokens_do_not_depend_on_the_batch(fixed: Path, naflex: Path) -> None:
    for name, folder in ((FIXED, fixed), (NAFLEX, naflex)):
        encoder = load_encoder(name, weights=folder)
        x = images(24, 40, count=4)
        torch.testing.assert_close(encoder.encode(x).last[2:3], encoder.encode(x[2:3]).last, atol=1e-6, rtol=0)
