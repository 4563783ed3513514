"""Patches in the text space, against transformers' own blocks with every other token masked out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import EmbedsPatches

transformers = pytest.importorskip("transformers")
from tiny_models import TEXT, VISION, images, randomise, save_tokenizer  # noqa: E402


def test_clip_is_its_last_block_with_each_token_alone(tmp_path: Path):
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    model = randomise(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=16))
    ).eval()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_encoder("clip-vit-b-16-openai", weights=tmp_path)
    assert isinstance(encoder, EmbedsPatches)
    pixels = images(32, 32)
    found, grid = encoder.embed_patches(pixels)
    assert grid == (4, 4)
    assert found.shape == (2, 16, 16)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    with torch.no_grad():
        tower = model.vision_model
        states = tower(pixel_values=(pixels - mean) / std, output_hidden_states=True).hidden_states
        alone = torch.full((17, 17), float("-inf")).fill_diagonal_(0)[None, None]
        out = tower.encoder.layers[-1](states[-2], attention_mask=alone)
        out = out[0] if isinstance(out, tuple) else out
        expected = F.normalize(model.visual_projection(tower.post_layernorm(out[:, 1:])), dim=-1)
    torch.testing.assert_close(found.clone(), expected, atol=1e-5, rtol=1e-4)


def test_siglip_of_one_patch_is_the_image(tmp_path: Path):
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    randomise(
        transformers.SiglipModel(
            transformers.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=vision)
        )
    ).save_pretrained(tmp_path)
    save_tokenizer(tmp_path, pooled_last=True)
    encoder = load_encoder("siglip-vit-b-16-224", weights=tmp_path)
    one = images(8, 8)
    found, grid = encoder.embed_patches(one)
    assert grid == (1, 1)
    torch.testing.assert_close(found[:, 0].clone(), encoder.embed_image(one).clone(), atol=1e-5, rtol=1e-4)


def test_cloc_of_one_patch_is_the_image(tmp_path: Path):
    from rice_eval.adapters.cloc import ClocEncoder, save
    from rice_eval.adapters.cloc_model import ClocConfig, ClocModel

    config = ClocConfig(
        image_size=32, patch_size=8, width=16, depth=2, heads=2, mlp=32, embed_dim=12, text_width=16, text_depth=1,
        text_heads=2, text_mlp=32, vocab_size=20, prompter_mlp=16, grounding_hidden=16, eos_id=2,
    )  # fmt: skip
    model = randomise(ClocModel(config)).eval()
    save(model, tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_encoder("cloc-vit-b-16-224", weights=tmp_path)
    assert isinstance(encoder, ClocEncoder)
    assert isinstance(encoder, EmbedsPatches)
    one = images(8, 8)
    found, grid = encoder.embed_patches(one)
    assert grid == (1, 1)
    torch.testing.assert_close(found[:, 0].clone(), encoder.embed_image(one).clone(), atol=1e-5, rtol=1e-4)
    found, grid = encoder.embed_patches(images(32, 16))
    assert grid == (4, 2)
    tokens = encoder.encode(images(32, 16), (2,)).last
    with torch.no_grad():
        alone = [model.image.projection(model.image.pool(tokens[:, k : k + 1])) for k in range(8)]
    torch.testing.assert_close(found.clone(), F.normalize(torch.stack(alone, 1), dim=-1), atol=1e-5, rtol=1e-4)
