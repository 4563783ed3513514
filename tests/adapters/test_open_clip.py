"""open_clip models through the adapter against open_clip's own forward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import EmbedsImage, EmbedsPatches, EmbedsText
from rice_eval.adapters.blocks import WithoutDraws
from rice_eval.adapters.open_clip import OpenClipEncoder
from rice_eval.cards import catalogue
from rice_eval.errors import CheckpointError, NotFoundError, PlanError, UsageError

open_clip = pytest.importorskip("open_clip")

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
VIT = {"image_size": 64, "layers": 3, "width": 64, "head_width": 32, "patch_size": 16}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny-vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-vit-quickgelu": {"embed_dim": 32, "quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "tiny-vit-gap": {
        "embed_dim": 32,
        "vision_cfg": {**VIT, "pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True, "ls_init_value": 0.5},
        "text_cfg": TEXT,
    },
    "tiny-pooled": {"embed_dim": 32, "vision_cfg": {**VIT, "attentional_pool": True}, "text_cfg": TEXT},
    "tiny-resnet": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None},
        "text_cfg": TEXT,
    },
    "tiny-timm": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
    "tiny-timm-map": {
        "embed_dim": 64,
        "custom_text": True,
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_model_pretrained": False, "timm_pool": "map", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
    "tiny-timm-cnn": {
        "embed_dim": 64,
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _configs(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in CONFIGS.items():
        (folder / f"{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def _random(name: str, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None, **kwargs).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 0:
                p.add_(torch.randn_like(p) * 0.05)
        for key, b in model.named_buffers():
            if key.endswith("running_var"):
                b.uniform_(0.5, 2)
    return model


def _loaded(name: str, folder: Path) -> tuple[Any, OpenClipEncoder]:
    model = _random(name)
    path = folder / "w.safetensors"
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    encoder = load_encoder(f"open_clip:{name}", weights=path)
    assert isinstance(encoder, OpenClipEncoder)
    return model, encoder


def _blocks(model: Any) -> Any:
    visual = model.visual
    return visual.trunk.blocks if hasattr(visual, "trunk") else visual.transformer.resblocks


def _normalised(encoder: Any, images: Tensor) -> Tensor:
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    return (images - mean) / std


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-vit-quickgelu", "tiny-vit-gap", "tiny-pooled", "tiny-timm"])
@torch.inference_mode()
def test_every_block_equals_open_clips_own_forward(name: str, tmp_path: Path) -> None:
    model, encoder = _loaded(name, tmp_path)
    outputs: dict[int, Tensor] = {}
    depth = len(_blocks(model))
    for number, block in enumerate(_blocks(model), start=1):
        block.register_forward_hook(lambda _m, _i, out, number=number: outputs.__setitem__(number, out))
    images = torch.rand(2, 3, encoder.facts.resolution, encoder.facts.resolution)
    embedding = model.encode_image(_normalised(encoder, images), normalize=True)
    assert torch.equal(encoder.embed_image(images), embedding)
    final = model.visual.trunk.norm if name == "tiny-timm" else model.visual.ln_post
    for norm in (False, True):
        tokens = encoder.encode(images, range(1, depth + 1), norm=norm)
        for layer in range(1, depth + 1):
            expected = final(outputs[layer]) if norm and name != "tiny-pooled" else outputs[layer]
            assert torch.equal(tokens.patches[layer], expected[:, 1:])
        assert tokens.cls is not None
        assert torch.equal(tokens.cls, expected[:, 0])


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-vit-gap"])
@pytest.mark.parametrize("size", [(96, 96), (48, 112)])
@torch.inference_mode()
def test_other_sizes_equal_open_clips_own_resizing(name: str, size: tuple[int, int], tmp_path: Path) -> None:
    _, encoder = _loaded(name, tmp_path)
    other = open_clip.create_model(name, pretrained=str(tmp_path / "w.safetensors"), force_image_size=size).eval()
    images = torch.rand(2, 3, *size)
    expected = other.visual.forward_intermediates(
        _normalised(encoder, images), normalize_intermediates=True, output_fmt="NLC", output_extra_tokens=True
    )
    tokens = encoder.encode(images, [1, 2, 3])
    assert tokens.grids[3] == (size[0] // 16, size[1] // 16)
    for layer in (1, 2, 3):
        assert torch.equal(tokens.patches[layer], expected["image_intermediates"][layer - 1])
    assert torch.equal(encoder.embed_image(images), torch.nn.functional.normalize(expected["image_features"], dim=-1))
    native = torch.rand(1, 3, 64, 64)  # the swap of positions must not stick
    before = load_encoder(f"open_clip:{name}", weights=tmp_path / "w.safetensors").encode(native)
    assert torch.equal(encoder.encode(native).last, before.last)


@torch.inference_mode()
def test_a_timm_trunk_takes_other_sizes(tmp_path: Path) -> None:
    import timm

    model, encoder = _loaded("tiny-timm", tmp_path)
    trunk = timm.create_model("test_vit", num_classes=0, dynamic_img_size=True).eval()
    trunk.load_state_dict(model.visual.trunk.state_dict())
    images = torch.rand(1, 3, 96, 192)
    assert torch.equal(encoder.encode(images).last, trunk.forward_features(_normalised(encoder, images))[:, 1:])


@pytest.mark.parametrize("name", ["tiny-resnet", "tiny-timm-cnn"])
@torch.inference_mode()
def test_maps_of_convolutional_towers(name: str, tmp_path: Path) -> None:
    model, encoder = _loaded(name, tmp_path)
    images = torch.rand(2, 3, 96, 160)
    out = model.visual.forward_intermediates(_normalised(encoder, images), intermediates_only=True)
    tokens = encoder.encode(images, range(1, encoder.facts.layers + 1))
    for layer, x in enumerate(out["image_intermediates"], start=1):
        stride = encoder.facts.strides[layer - 1]
        assert tuple(x.shape[1:]) == (encoder.facts.widths[layer - 1], 96 // stride, 160 // stride)
        torch.testing.assert_close(tokens.patches[layer], x.flatten(2).transpose(1, 2), atol=1e-5, rtol=1e-5)
    native = torch.rand(1, 3, encoder.facts.resolution, encoder.facts.resolution)
    expected = model.encode_image(_normalised(encoder, native), normalize=True)
    torch.testing.assert_close(encoder.embed_image(native), expected, atol=1e-6, rtol=1e-5)
    if name == "tiny-resnet":
        with pytest.raises(PlanError, match="64 x 64 px only"):
            encoder.embed_image(images)


@torch.inference_mode()
def test_zero_shot_scores_equal_open_clips(tmp_path: Path) -> None:
    model, encoder = _loaded("tiny-vit", tmp_path)
    assert isinstance(encoder, EmbedsText)
    assert isinstance(encoder, EmbedsImage)
    texts = ["a photo of a cat", "a photo of a dog", "un chien", ""]
    images = torch.rand(3, 3, 64, 64)
    tokens = open_clip.get_tokenizer("tiny-vit")(texts)
    expected = (
        model.encode_image(_normalised(encoder, images), normalize=True) @ model.encode_text(tokens, normalize=True).T
    )
    got = encoder.embed_image(images) @ encoder.embed_text(texts).T
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


def test_tokens_do_not_depend_on_the_batch(tmp_path: Path) -> None:
    _, encoder = _loaded("tiny-vit", tmp_path)
    images = torch.rand(5, 3, 96, 64)
    together = encoder.encode(images, [1, -1])
    for i in range(5):
        alone = encoder.encode(images[i : i + 1], [1, -1])
        for layer in together.patches:
            torch.testing.assert_close(together.patches[layer][i], alone.patches[layer][0], atol=1e-6, rtol=1e-6)


def test_an_image_tower_alone_has_no_text(tmp_path: Path) -> None:
    model = _random("tiny-vit")
    path = tmp_path / "v.safetensors"
    save_file({f"visual.{k}": v.contiguous() for k, v in model.visual.state_dict().items()}, path)
    encoder = load_encoder("open_clip:tiny-vit", weights=path)
    assert encoder.facts.abilities == ("image",)
    assert encoder.fingerprint == load_encoder("open_clip:tiny-vit", weights=path).fingerprint
    assert isinstance(encoder, OpenClipEncoder)
    with pytest.raises(PlanError, match="without a text tower"):
        encoder.embed_text(["x"])


def test_a_stored_position_grid_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_file({k: v.contiguous() for k, v in _random("tiny-vit", force_image_size=96).state_dict().items()}, path)
    encoder = load_encoder("open_clip:tiny-vit", weights=path)
    assert encoder.facts.resolution == 96
    assert encoder.facts.notes == ("position grid 6 x 6 as stored",)


@pytest.mark.parametrize("change", ["missing", "extra", "transposed"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    state = {k: v.contiguous() for k, v in _random("tiny-vit").state_dict().items()}
    if change == "missing":
        state = {k: v for k, v in state.items() if ".resblocks.1." not in k}
    elif change == "extra":
        state["head.weight"] = torch.zeros(2)
    else:
        state["visual.proj"] = state["visual.proj"].t().contiguous()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    words = {"missing": "resblocks", "extra": r"head\.weight", "transposed": r"visual\.proj"}
    with pytest.raises(CheckpointError, match=words[change]) as caught:
        load_encoder("open_clip:tiny-vit", weights=path)
    assert "\n" not in str(caught.value)


def test_names_and_pairs_that_do_not_exist() -> None:
    with pytest.raises(NotFoundError, match="has no model 'ViT-B-17'"):
        load_encoder("open_clip:ViT-B-17/openai")
    with pytest.raises(NotFoundError, match="no weights 'laion9b'"):
        load_encoder("open_clip:ViT-B-16/laion9b")
    with pytest.raises(UsageError, match="needs weights"):
        load_encoder("open_clip:ViT-B-16")
    with pytest.raises(UsageError, match="trained with QuickGELU") as caught:
        load_encoder("open_clip:ViT-B-16/dfn2b")
    assert caught.value.fix == "use open_clip:ViT-B-16-quickgelu/dfn2b"


@pytest.mark.slow
def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="they are not in the cache") as caught:
        load_encoder("open_clip:ViT-B-32/laion2b_s34b_b79k")
    assert "\n" not in str(caught.value)


CARDED = sorted(c.name for f, c in catalogue().encoders.values() if (c.adapter or f.adapter) == "open_clip")


@pytest.mark.parametrize("name", CARDED)
def test_every_card_agrees_with_open_clip(name: str) -> None:
    _, card = catalogue().encoder(name)
    model, _, tag = (card.source.open_clip or "").partition("/")
    config, pretrained = open_clip.get_model_config(model), open_clip.get_pretrained_cfg(model, tag)
    assert config, "open_clip does not know this model"
    assert pretrained, "open_clip does not know these weights"
    assert bool(pretrained.get("quick_gelu")) == bool(config.get("quick_gelu")), "activation of another training"
    assert card.mean == tuple(pretrained["mean"])
    assert card.std == tuple(pretrained["std"])
    assert card.license
    assert card.text
    size = config["vision_cfg"]["image_size"]
    assert card.resolution == (size[0] if isinstance(size, list) else size)
    with torch.device("meta"), WithoutDraws():
        visual = open_clip.model._build_vision_tower(
            config["embed_dim"], config["vision_cfg"], bool(config.get("quick_gelu"))
        )
    assert card.params == sum(p.numel() for p in visual.parameters())


@pytest.mark.parametrize("name", ["tiny-vit", "tiny-vit-quickgelu", "tiny-vit-gap", "tiny-pooled"])
@torch.inference_mode()
def test_patches_in_the_text_space_are_the_last_block_with_each_alone(name: str, tmp_path: Path) -> None:
    model, encoder = _loaded(name, tmp_path)
    assert isinstance(encoder, EmbedsPatches)
    images = torch.rand(2, 3, 64, 64)
    found, grid = encoder.embed_patches(images)
    assert grid == (4, 4)
    visual, x = model.visual, _normalised(encoder, images)
    out = visual.forward_intermediates(
        x, indices=[1], intermediates_only=True, output_fmt="NLC", output_extra_tokens=True
    )
    sequence = torch.cat([out["image_intermediates_prefix"][0], out["image_intermediates"][0]], dim=1)
    alone = torch.full((17, 17), float("-inf")).fill_diagonal_(0)
    patches = visual.transformer.resblocks[2](sequence, attn_mask=alone)[:, 1:]
    if visual.attn_pool is not None:
        pool = visual.attn_pool.attn
        keys = visual.attn_pool.ln_k(patches)
        weight, bias = (pool.v_proj_weight, pool.in_proj_bias.chunk(3)[2])
        weight = pool.in_proj_weight.chunk(3)[2] if weight is None else weight
        patches = pool.out_proj(torch.nn.functional.linear(keys, weight, bias))
    expected = visual.ln_post(patches) @ visual.proj
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_patches_of_a_trunk_that_pools_by_attention_and_of_a_resnet(tmp_path: Path) -> None:
    model, encoder = _loaded("tiny-timm-map", tmp_path)
    images = torch.rand(2, 3, 160, 160)
    found, grid = encoder.embed_patches(images)
    trunk = model.visual.trunk
    features = trunk.forward_features(_normalised(encoder, images))[:, trunk.num_prefix_tokens :]
    pool = trunk.attn_pool
    values = pool.kv(features).chunk(2, dim=-1)[1]
    pooled = pool.proj(values)
    pooled = pooled + pool.mlp(pool.norm(pooled))
    expected = model.visual.head(trunk.fc_norm(pooled))
    assert found.shape[1] == grid[0] * grid[1] == features.shape[1]
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)

    model, encoder = _loaded("tiny-resnet", tmp_path)
    images = torch.rand(1, 3, 64, 64)
    found, grid = encoder.embed_patches(images)
    pool = model.visual.attnpool
    last = encoder.encode(images, (5,)).patches[5]
    expected = pool.c_proj(pool.v_proj(last))
    torch.testing.assert_close(found, torch.nn.functional.normalize(expected, dim=-1), atol=1e-5, rtol=1e-4)
    _, encoder = _loaded("tiny-timm", tmp_path)
    with pytest.raises(PlanError, match="no last attention"):
        encoder.embed_patches(torch.rand(1, 3, 160, 160))
