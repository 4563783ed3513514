"""CLIP against transformers: tokens, embeddings, OpenAI's names, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import EmbedsImage, EmbedsText
from rice_eval.errors import CheckpointError

transformers = pytest.importorskip("transformers")
from safetensors.torch import save_file  # noqa: E402
from tiny_models import TEXT, TEXTS, VISION, images, randomise, save_tokenizer  # noqa: E402

NAME = "clip-vit-b-16-openai"
SIZES = [(32, 32), (48, 48), (24, 40)]
NATIVE = {"image_size": 32, "patch_size": 8}


def _full() -> Any:
    text = {**TEXT, "hidden_act": "quick_gelu"}
    config = transformers.CLIPConfig(text_config=text, vision_config={**VISION, **NATIVE}, projection_dim=20)
    return transformers.CLIPModel(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clip")
    randomise(_full()).save_pretrained(out)  # type: ignore[operator]
    save_tokenizer(out)
    return out


def _reference(folder: Path, pixels: Tensor) -> Any:
    model = transformers.CLIPVisionModel.from_pretrained(folder).eval()
    with torch.no_grad():
        out = model(pixel_values=pixels, interpolate_pos_encoding=True, output_hidden_states=True)
        norm = getattr(model, "vision_model", model).post_layernorm
        return out.hidden_states, [norm(h) for h in out.hidden_states]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", ["full", "projected", "vision"])
def test_tokens_equal_transformers_at_every_block(
    folder: Path, tmp_path: Path, kind: str, size: tuple[int, int]
) -> None:
    if kind != "full":
        cls = transformers.CLIPVisionModel if kind == "vision" else transformers.CLIPVisionModelWithProjection
        randomise(cls(transformers.CLIPVisionConfig(**VISION, **NATIVE, projection_dim=20))).save_pretrained(tmp_path)  # type: ignore[operator]
        folder = tmp_path
    encoder = load_encoder(NAME, weights=folder)
    x = images(*size)
    raw, normed = _reference(folder, encoder.normalise(x))  # type: ignore[attr-defined]
    off, on = encoder.encode(x, layers=(1, 2, 3), norm=False), encoder.encode(x, layers=(1, 2, 3), norm=True)
    for n in (1, 2, 3):
        assert torch.equal(off.patches[n], raw[n][:, 1:])
        assert torch.equal(on.patches[n], normed[n][:, 1:])
    assert torch.equal(off.cls, raw[3][:, 0])
    expected = {"full": ("image", "text"), "projected": ("image",), "vision": ()}[kind]
    assert encoder.facts.abilities == expected


def test_embeddings_and_zero_shot_scores_equal_transformers(folder: Path) -> None:
    encoder = load_encoder(NAME, weights=folder)
    assert isinstance(encoder, EmbedsImage)
    assert isinstance(encoder, EmbedsText)
    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    x = images(32, 32)
    with torch.no_grad():
        inputs = tokenizer(TEXTS, padding=True, truncation=True, max_length=12, return_tensors="pt")
        out = model(
            pixel_values=encoder.normalise(x), input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        )  # type: ignore[attr-defined]
    ours, theirs = encoder.embed_image(x), encoder.embed_text(TEXTS)
    torch.testing.assert_close(ours, out.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(theirs, out.text_embeds, atol=1e-6, rtol=0)
    scores = ours @ theirs.T * model.logit_scale.exp().item()
    torch.testing.assert_close(scores, out.logits_per_image, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.norm(dim=-1), torch.ones(2))


def _openai(model: Any) -> dict[str, Tensor]:
    """OpenAI's names of a CLIPModel, by hand."""
    s = model.state_dict()
    out = {
        "visual.conv1.weight": s["vision_model.embeddings.patch_embedding.weight"],
        "visual.class_embedding": s["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": s["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": s["visual_projection.weight"].T,
        "text_projection": s["text_projection.weight"].T,
        "token_embedding.weight": s["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": s["text_model.embeddings.position_embedding.weight"],
        "logit_scale": s["logit_scale"],
        "input_resolution": torch.tensor(32),
        "context_length": torch.tensor(12),
        "vocab_size": torch.tensor(30),
    }
    for p in ("weight", "bias"):
        out[f"visual.ln_pre.{p}"] = s[f"vision_model.pre_layrnorm.{p}"]
        out[f"visual.ln_post.{p}"] = s[f"vision_model.post_layernorm.{p}"]
        out[f"ln_final.{p}"] = s[f"text_model.final_layer_norm.{p}"]
        for theirs, ours, depth in (
            ("visual.transformer.resblocks", "vision_model", 3),
            ("transformer.resblocks", "text_model", 2),
        ):
            for n in range(depth):
                a, b = f"{theirs}.{n}.", f"{ours}.encoder.layers.{n}."
                out[f"{a}attn.in_proj_{p}"] = torch.cat([s[f"{b}self_attn.{q}_proj.{p}"] for q in "qkv"])
                out[f"{a}attn.out_proj.{p}"] = s[f"{b}self_attn.out_proj.{p}"]
                out[f"{a}ln_1.{p}"], out[f"{a}ln_2.{p}"] = s[f"{b}layer_norm1.{p}"], s[f"{b}layer_norm2.{p}"]
                out[f"{a}mlp.c_fc.{p}"], out[f"{a}mlp.c_proj.{p}"] = s[f"{b}mlp.fc1.{p}"], s[f"{b}mlp.fc2.{p}"]
    return out


def test_openai_names_give_the_same_model(tmp_path: Path) -> None:
    """Heads are 64 wide where nothing else tells, so this model is as wide as two of them."""
    text = {**TEXT, "hidden_size": 64, "num_attention_heads": 1, "eos_token_id": 29, "hidden_act": "quick_gelu"}
    vision = {**VISION, **NATIVE, "hidden_size": 128, "num_attention_heads": 2, "hidden_act": "quick_gelu"}
    model = randomise(
        transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=20))
    )
    model.save_pretrained(tmp_path / "hub")  # type: ignore[operator]
    torch.save(_openai(model), tmp_path / "openai.pt")
    hub, openai = load_encoder(NAME, weights=tmp_path / "hub"), load_encoder(NAME, weights=tmp_path / "openai.pt")
    x = images(40, 24)
    assert torch.equal(hub.encode(x, layers=(1, 3)).patches[1], openai.encode(x, layers=(1, 3)).patches[1])
    assert torch.equal(hub.encode(x).last, openai.encode(x).last)
    assert torch.equal(hub.embed_image(x), openai.embed_image(x))  # type: ignore[attr-defined]
    ids = torch.tensor([[1, 5, 6, 29], [1, 7, 29, 0]])
    with torch.no_grad():
        a, b = (e.full.get_text_features(input_ids=ids) for e in (hub, openai))  # type: ignore[attr-defined]
    assert torch.equal(getattr(a, "pooler_output", a), getattr(b, "pooler_output", b))
    only = {k.removeprefix("visual."): v for k, v in _openai(model).items() if k.startswith("visual.")}
    torch.save(only, tmp_path / "visual.pt")
    tower = load_encoder(NAME, weights=tmp_path / "visual.pt")
    assert torch.equal(tower.embed_image(x), hub.embed_image(x))  # type: ignore[attr-defined]
    assert tower.facts.abilities == ("image",)


def test_openai_file_lacking_a_block_names_its_own_keys(tmp_path: Path) -> None:
    written = {k: v for k, v in _openai(randomise(_full())).items() if "visual.transformer.resblocks.1." not in k}
    torch.save(written, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"visual\.transformer\.resblocks\.1\."):
        load_encoder(NAME, weights=tmp_path / "m.pt")


def test_conversion_of_openai_names(tmp_path: Path) -> None:
    from rice_eval.adapters.conversion import convert
    from rice_eval.errors import UsageError

    model = randomise(_full())
    torch.save(_openai(model), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="activation"):
        convert(tmp_path / "m.pt", tmp_path / "out")
    with pytest.raises(UsageError, match="no such setting"):
        convert(tmp_path / "m.pt", tmp_path / "out", settings={"hats": 1})
    convert(tmp_path / "m.pt", tmp_path / "out", settings={"act": "quick_gelu", "heads": 4, "text_heads": 4})
    again = transformers.CLIPModel.from_pretrained(tmp_path / "out")
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    assert again.config.vision_config.num_attention_heads == 4
    with pytest.raises(UsageError, match="holds weights already"):
        convert(tmp_path / "m.pt", tmp_path / "out", settings={"act": "quick_gelu"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_config": {"num_hidden_layers": 4}}, r"vision_model\.encoder\.layers\.3\.layer_norm1\.weight"),
        ({"vision_config": {"image_size": 64}}, "image_size = 64, the tensors say 32"),
        ({"text_config": {"num_hidden_layers": 3}}, r"text_model\.encoder\.layers\.2\."),
        ({"projection_dim": 24}, "projection_dim = 24"),
        ({"model_type": "siglip"}, "model_type = siglip"),
    ],
)
def test_config_that_disagrees_is_refused(folder: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=said) as caught:
        load_encoder(NAME, weights=tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tower_inside_a_larger_model(tmp_path: Path) -> None:
    """LLaVA keeps a CLIP tower under a long prefix; without a config.json of its own the card tells the rest."""
    vision = {**VISION, **NATIVE, "hidden_size": 64, "num_attention_heads": 1}
    tower = randomise(transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision)))
    tower.save_pretrained(tmp_path / "own")  # type: ignore[operator]
    at = "model.vision_tower.vision_tower.vision_model."
    inside = {at + k.removeprefix("vision_model."): v.clone() for k, v in tower.state_dict().items()}
    save_file({**inside, "lm_head.weight": torch.zeros(2)}, tmp_path / "vlm.safetensors")
    x = images(32, 32)
    encoder = load_encoder(NAME, weights=tmp_path / "vlm.safetensors")
    assert torch.equal(encoder.encode(x).last, load_encoder(NAME, weights=tmp_path / "own").encode(x).last)
    assert any("1 keys of the surrounding model" in note for note in encoder.facts.notes)


def test_preprocessor_beside_the_weights_wins_over_the_card(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    encoder = load_encoder(NAME, weights=tmp_path)
    assert encoder.facts.mean == (0.5, 0.5, 0.5)
    assert encoder.fingerprint != load_encoder(NAME, weights=folder).fingerprint
    assert any("preprocessor_config.json" in note for note in encoder.facts.notes)


def test_no_tokenizer_is_one_line(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    encoder = load_encoder(NAME, weights=tmp_path)
    with pytest.raises(CheckpointError, match="not in the cache"):
        encoder.embed_text(["a cat"])  # type: ignore[attr-defined]


def test_tokens_do_not_depend_on_the_batch(folder: Path) -> None:
    encoder = load_encoder(NAME, weights=folder)
    x = images(32, 32, count=4)
    torch.testing.assert_close(encoder.encode(x).last[2:3], encoder.encode(x[2:3]).last, atol=1e-6, rtol=0)
