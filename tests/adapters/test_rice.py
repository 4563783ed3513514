"""RICE: every layout of one model, against transformers' own loading, and everything that must be refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.rice import from_blocks
from rice_eval.errors import CheckpointError, PlanError

transformers = pytest.importorskip("transformers")
import rice_layouts as layouts  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import images, randomise  # noqa: E402

NAME = "rice-vit-l-14-560"
SIZES = [(42, 42), (28, 70), (84, 56)]


@pytest.fixture(scope="module")
def model() -> Any:
    return randomise(transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**layouts.TINY)))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rice")
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def state(model: Any) -> dict[str, Tensor]:
    return layouts.canonical(model)


def _put(state: dict[str, Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("size", SIZES)
def test_tokens_equal_transformers_at_every_block(folder: Path, size: tuple[int, int]) -> None:
    reference = transformers.MLCDVisionModel.from_pretrained(folder).eval()
    encoder = load_encoder(NAME, weights=folder)
    x = images(*size)
    with torch.no_grad():
        out = reference(pixel_values=encoder.normalise(x), output_hidden_states=True)  # type: ignore[attr-defined]
        norm = getattr(reference, "vision_model", reference).post_layernorm
    tokens = encoder.encode(x, layers=(1, 2, -1), norm=False)
    assert tokens.grids[3] == (size[0] // 14, size[1] // 14)
    for n in (1, 2, 3):
        assert torch.equal(tokens.patches[n], out.hidden_states[n][:, 1:])
    assert torch.equal(tokens.cls, out.hidden_states[3][:, 0])
    assert tokens.registers is None
    normed = encoder.encode(x, layers=(2, 3), norm=True)
    with torch.no_grad():
        for n in (2, 3):
            assert torch.equal(normed.patches[n], norm(out.hidden_states[n])[:, 1:])
        torch.testing.assert_close(normed.cls, out.pooler_output, atol=1e-6, rtol=0)


def _layouts(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    training = layouts.deepglint(state)
    return {
        "hub4": layouts.hub4(state),
        "hub5": layouts.hub5(state),
        "deepglint": training,
        "deepglint-ddp-compiled": {f"module._orig_mod.{k}": v for k, v in training.items()},
        "deepglint-mha": {k.replace("in_proj.", "in_proj_"): v for k, v in training.items()},
        "onevision": layouts.onevision(state),
        "onevision-no-merger": layouts.onevision(state, merger=False, prefix="model.visual."),
        "llava-next": layouts.llava_next(state),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_all_layouts_give_the_same_tokens_bit_for_bit(
    folder: Path, state: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    x = images(28, 56)
    own = load_encoder(NAME, weights=folder)
    expected = own.encode(x, layers=(1, 3), norm=False)
    for name, written in _layouts(state).items():
        encoder = load_encoder(NAME, weights=_put(written, tmp_path / f"{name}{suffix}"))
        tokens = encoder.encode(x, layers=(1, 3), norm=False)
        for n in (1, 3):
            assert torch.equal(tokens.patches[n], expected.patches[n]), name
        assert torch.equal(tokens.cls, expected.cls)
        bare = name.startswith("onevision")
        assert (encoder.fingerprint == own.fingerprint) != bare, name
        if bare:
            assert encoder.facts.params == own.facts.params - 2 * 32
            with pytest.raises(PlanError, match="no final norm"):
                encoder.encode(x, norm=True)


def test_onevision_tokens_in_blocks_are_ours_in_raster_order(folder: Path, state: dict[str, Tensor]) -> None:
    """The tower's own way, written from its description: patches in 2x2 blocks, rotary angles of their rows and columns."""
    grid, width, heads, patch = (4, 6), 32, 4, 14
    w = layouts.onevision(state, merger=False, prefix="")
    x = images(grid[0] * patch, grid[1] * patch, count=1)
    encoder = load_encoder(NAME, weights=folder)
    pixels = encoder.normalise(x)[0]  # type: ignore[attr-defined]
    order = [(2 * i + a, 2 * j + b) for i in range(2) for j in range(3) for a in range(2) for b in range(2)]
    flat = w["patch_embed.proj.weight"].flatten(1)
    rows = [flat @ pixels[:, r * patch : (r + 1) * patch, c * patch : (c + 1) * patch].reshape(-1) for r, c in order]
    h = torch.cat((w["class_embedding"][None], torch.stack(rows)))
    h = torch.nn.functional.layer_norm(h, (width,), w["pre_layernorm.weight"], w["pre_layernorm.bias"])
    size = width // heads
    freq = 1 / 10000 ** (torch.arange(0, size // 2, 2) / (size // 2))
    angles = torch.cat((w["class_pos_emb"], torch.stack([torch.cat((r * freq, c * freq)) for r, c in order])))
    cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    def turn(t: Tensor) -> Tensor:
        half = torch.cat((-t[..., size // 2 :], t[..., : size // 2]), -1)
        return t * cos + half * sin

    for n in range(3):
        b = f"blocks.{n}."
        y = torch.nn.functional.layer_norm(h, (width,), w[b + "norm1.weight"], w[b + "norm1.bias"])
        q, k, v = (
            (y @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]).reshape(-1, 3, heads, size).permute(1, 2, 0, 3)
        )
        mixed = torch.softmax(turn(q) @ turn(k).transpose(-1, -2) / math.sqrt(size), -1) @ v
        h = h + mixed.transpose(0, 1).reshape(-1, width) @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]
        y = torch.nn.functional.layer_norm(h, (width,), w[b + "norm2.weight"], w[b + "norm2.bias"])
        y = torch.nn.functional.gelu(y @ w[b + "mlp.fc1.weight"].T + w[b + "mlp.fc1.bias"])
        h = h + y @ w[b + "mlp.fc2.weight"].T + w[b + "mlp.fc2.bias"]
    ours = encoder.encode(x, norm=False)
    torch.testing.assert_close(from_blocks(h[None, 1:], grid), ours.last, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(h[None, 0], ours.cls, atol=2e-5, rtol=1e-4)


def test_half_precision_is_run_as_float32_and_said(state: dict[str, Tensor], tmp_path: Path) -> None:
    path = _put({k: v.bfloat16() for k, v in layouts.hub4(state).items()}, tmp_path / "b.safetensors")
    encoder = load_encoder(NAME, weights=path)
    assert encoder.encode(images(28, 28)).last.dtype == torch.float32
    assert "stored as bfloat16, run as float32" in encoder.facts.notes


def test_tokens_do_not_depend_on_the_batch(folder: Path) -> None:
    encoder = load_encoder(NAME, weights=folder)
    x = images(42, 42, count=4)
    torch.testing.assert_close(encoder.encode(x).last[2:3], encoder.encode(x[2:3]).last, atol=1e-6, rtol=0)


def test_encoding_leaves_no_hook_and_no_state(folder: Path) -> None:
    encoder = load_encoder(NAME, weights=folder)
    x = images(28, 28)
    first = encoder.encode(x, layers=(1,), norm=False).last
    encoder.encode(x, layers=(1, 2, 3))
    assert torch.equal(encoder.encode(x, layers=(1,), norm=False).last, first)
    assert not any(m._forward_hooks for m in encoder._model.modules())  # type: ignore[attr-defined]


def test_sides_the_patch_does_not_divide_are_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="multiples of 14"):
        load_encoder(NAME, weights=folder).encode(images(42, 43))


def _drop_block(s: dict[str, Tensor]) -> None:
    for k in [k for k in s if k.startswith("encoder.layers.1.")]:
        s.pop(k)


def _extra_head(s: dict[str, Tensor]) -> None:
    for q in "qkv":
        for part in ("weight", "bias"):
            t = s[f"encoder.layers.2.self_attn.{q}_proj.{part}"]
            s[f"encoder.layers.2.self_attn.{q}_proj.{part}"] = torch.cat((t, t[:8]))


def _transpose(s: dict[str, Tensor]) -> None:
    s["encoder.layers.0.mlp.fc2.weight"] = s["encoder.layers.0.mlp.fc2.weight"].T.contiguous()


def _transpose_fc1(s: dict[str, Tensor]) -> None:
    s["encoder.layers.0.mlp.fc1.weight"] = s["encoder.layers.0.mlp.fc1.weight"].T.contiguous()


BREAKS = {
    "missing block": (_drop_block, ["16 keys missing", "layers.1."]),
    "extra head": (_extra_head, ["6 shapes differ", "layers.2.self_attn.k_proj.weight is [40, 32], not [32, 32]"]),
    "transposed": (_transpose, ["layers.0.mlp.fc2.weight is [80, 32], not [32, 80]", "transposed"]),
    "transposed first": (_transpose_fc1, ["layers.0.mlp.fc1.weight is [32, 80], not [80, 32]", "transposed"]),
    "stranger": (lambda s: s.update({"encoder.layers.0.gate": torch.zeros(1)}), ["unexpected", "layers.0.gate"]),
    "odd angles": (lambda s: s.update({"class_pos_emb": torch.zeros(1, 5)}), ["class_pos_emb", "no multiple"]),
    "no norm": (lambda s: [s.pop("post_layernorm.weight"), s.pop("post_layernorm.bias")], ["post_layernorm.weight"]),
}


@pytest.mark.parametrize("name", BREAKS)
@pytest.mark.parametrize("layout", [layouts.hub4, layouts.hub5])
def test_broken_files_are_refused_with_their_keys(
    state: dict[str, Tensor], tmp_path: Path, name: str, layout: Any
) -> None:
    damaged = dict(state)
    BREAKS[name][0](damaged)  # type: ignore[operator]
    with pytest.raises(CheckpointError) as caught:
        load_encoder(NAME, weights=_put(layout(damaged), tmp_path / "m.safetensors"))
    for words in BREAKS[name][1]:
        assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_block_is_named_as_the_training_file_names_it(state: dict[str, Tensor], tmp_path: Path) -> None:
    written = {k: v for k, v in layouts.deepglint(state).items() if not k.startswith("transformer.resblocks.1.")}
    with pytest.raises(CheckpointError, match=r"transformer\.resblocks\.1\."):
        load_encoder(NAME, weights=_put(written, tmp_path / "step.pt"))


def test_config_that_disagrees_is_refused(folder: Path, state: dict[str, Tensor], tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    _put(layouts.hub5(state), tmp_path / "model.safetensors")
    for key, value, said in (
        ("num_attention_heads", 8, "num_attention_heads = 8, the tensors say 4"),
        ("num_hidden_layers", 4, "encoder.layers.3.layer_norm1.weight"),
        ("num_hidden_layers", 2, "the tensors say 3"),
        ("hidden_size", 64, "hidden_size = 64"),
        ("patch_size", 16, "patch_size = 16"),
        ("model_type", "clip_vision_model", "class_pos_emb"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(CheckpointError) as caught:
            load_encoder(NAME, weights=tmp_path)
        assert said in str(caught.value)
        assert "config.json" in str(caught.value)


def test_the_card_catches_a_last_block_cut_off(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Without a config.json nothing else can; the card's width is RICE's own, so it is tried on the meta device's shapes."""
    from rice_eval.adapters.base import LoadRequest
    from rice_eval.adapters.checkpoints import open_checkpoint
    from rice_eval.adapters.rice import config_for, find
    from rice_eval.cards import catalogue

    family, card = catalogue().encoder(NAME)
    path = _put(layouts.deepglint(state), tmp_path / "step.pt")
    found = find(open_checkpoint(path))
    assert found is not None
    found.numbers.update(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23)
    with pytest.raises(
        CheckpointError, match=r"23 blocks where ViT-L/14 has 24 .*transformer\.resblocks\.23\.ln_1\.weight"
    ):
        config_for(found, LoadRequest(card, family, path))


def test_rice_as_clip_and_clip_as_rice_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_encoder("clip-vit-l-14-336-openai", weights=folder)
    assert "class_pos_emb" in str(caught.value)
    assert "position_embedding.weight" in str(caught.value)
    vision = {k: v for k, v in layouts.TINY.items() if k != "image_size"}
    clip = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**vision, image_size=42))
    clip.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"position_embedding\.weight"):
        load_encoder(NAME, weights=tmp_path)
    # The MLCD checkpoints that are CLIP towers have cards that say so, and load as such.
    assert "CLIPVisionModel" in load_encoder("mlcd-vit-l-14-336", weights=tmp_path).facts.arch


def test_lab_checkpoints_by_glob_slot_and_averaged_copy(state: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    live, averaged = layouts.deepglint(state), {k: v * 2 for k, v in layouts.deepglint(state).items()}
    torch.save({"model": live, "model_ema": averaged, "step": 7}, tmp_path / "step_000010.pt")
    with pytest.raises(CheckpointError, match=r"2 state dicts \(model, model_ema\)"):
        load_encoder(NAME, weights=tmp_path / "step_*.pt")
    one = load_encoder(NAME, weights=f"{tmp_path}/step_*.pt::model")
    two = load_encoder(NAME, weights=f"{tmp_path}/step_000010.pt::model_ema")
    assert one.fingerprint == load_encoder(NAME, weights=folder).fingerprint != two.fingerprint
    (tmp_path / "step_000020.pt").write_bytes((tmp_path / "step_000010.pt").read_bytes())
    with pytest.raises(CheckpointError, match="matches 2 paths"):
        load_encoder(NAME, weights=f"{tmp_path}/step_*.pt")


def test_conversion_round_trip_is_bit_for_bit(state: dict[str, Tensor], folder: Path, tmp_path: Path) -> None:
    from rice_eval.adapters.conversion import convert

    x = images(28, 42)
    expected = load_encoder(NAME, weights=folder).encode(x, norm=False).last
    for name, written in _layouts(state).items():
        out = tmp_path / name
        convert(_put(written, tmp_path / f"{name}.safetensors"), out)
        back = load_file(out / "model.safetensors")
        for key, tensor in back.items():
            assert torch.equal(tensor, state[key.removeprefix("vision_model.")])
        encoder = load_encoder(NAME, weights=out)
        assert torch.equal(encoder.encode(x, norm=False).last, expected)
        own = transformers.AutoModel.from_pretrained(out).eval()  # both major versions read the folder
        with torch.no_grad():
            theirs = own(pixel_values=encoder.normalise(x)).last_hidden_state  # type: ignore[attr-defined]
        assert torch.equal(theirs[:, 1:], expected), name
