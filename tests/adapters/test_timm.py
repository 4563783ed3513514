"""timm's models through the adapter against timm's own forward, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import LoadRequest
from rice_eval.adapters.blocks import WithoutDraws
from rice_eval.adapters.timm import TimmTokens, adapter
from rice_eval.cards import EncoderCard, FamilyCard, SourceCard, catalogue
from rice_eval.errors import CardError, CheckpointError, NotFoundError, PlanError, UsageError

timm = pytest.importorskip("timm")

# Each a way of its own: plain, registers + LayerScale, RoPE (EVA), RoPE + registers, class-free with RMS norm, pooled norm, hybrid.
VITS = [
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "eva02_tiny_patch14_224",
    "vit_tiny_patch16_dinov3_qkvb",
    "test_vit3",
    "vit_tiny_r_s16_p8_224",
    "deit_tiny_distilled_patch16_224",
    "vit_pe_spatial_tiny_patch16_512",
    pytest.param("naflexvit_base_patch16_gap", marks=pytest.mark.slow),
]
CNNS = [
    "test_resnet",
    "test_convnext",
    "test_efficientnet",
    "resnet18",
    "regnetx_002",
    pytest.param("swin_tiny_patch4_window7_224", marks=pytest.mark.slow),
]


def _random(name: str, **kwargs: Any) -> Any:
    """A model with weights far from their initial values, so that no branch is silent."""
    torch.manual_seed(0)
    with WithoutDraws():
        model = timm.create_model(name, num_classes=0, **kwargs).eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            about = 1.0 if p.ndim == 1 and not key.endswith("bias") else 0.0
            p.uniform_(about - 0.08, about + 0.08)
        for key, buffer in model.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_(std=0.2)
            elif key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return model


def _save(model: Any, folder: Path, **extra: Tensor) -> Path:
    path = folder / "w.safetensors"
    save_file({**{k: v.contiguous() for k, v in model.state_dict().items()}, **extra}, path)
    return path


def _sizes(encoder: Any) -> list[tuple[int, int]]:
    p, native = encoder.multiple, encoder.facts.resolution
    square = (native, native) if native <= 256 else (7 * p, 7 * p)
    return [square, (3 * p, 5 * p), (6 * p, 4 * p)]


@pytest.mark.parametrize("name", VITS)
@torch.inference_mode()
def test_every_block_equals_timms_own_forward(name: str, tmp_path: Path) -> None:
    flexible = {} if name.startswith("naflex") else {"dynamic_img_size": True}
    model = _random(name, **flexible)
    encoder = load_encoder(f"timm:{name}", weights=_save(model, tmp_path))
    assert isinstance(encoder, TimmTokens)
    depth = len(model.blocks)
    assert encoder.facts.layers == depth
    outputs: dict[int, Tensor] = {}
    for number, block in enumerate(model.blocks, start=1):
        block.register_forward_hook(lambda _m, _i, out, number=number: outputs.__setitem__(number, out))
    n_prefix = model.num_prefix_tokens
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    for height, width in _sizes(encoder):
        images = torch.rand(1, 3, height, width)
        final = model.forward_features((images - mean) / std)
        if isinstance(final, dict):
            final = final["patches"]
        for norm in (False, True):
            tokens = encoder.encode(images, range(1, depth + 1), norm=norm)
            grid = (height // encoder.multiple, width // encoder.multiple)
            for layer in range(1, depth + 1):
                expected = model.norm(outputs[layer]) if norm else outputs[layer]
                assert tokens.grids[layer] == grid
                assert torch.equal(tokens.patches[layer], expected[:, n_prefix:])
            if norm:
                assert torch.equal(tokens.last, final[:, n_prefix:])
            n_cls = int(getattr(model, "cls_token", None) is not None)
            if n_cls:
                assert tokens.cls is not None
                assert torch.equal(tokens.cls, expected[:, 0])
            else:
                assert tokens.cls is None
            if n_prefix > n_cls:
                assert tokens.registers is not None
                assert torch.equal(tokens.registers, expected[:, n_cls:n_prefix])
            else:
                assert tokens.registers is None


@pytest.mark.parametrize("name", CNNS)
def test_every_stage_equals_timms_features_only(name: str, tmp_path: Path) -> None:
    model = _random(name)
    encoder = load_encoder(f"timm:{name}", weights=_save(model, tmp_path))
    side = 224 if "swin" in name else 128
    reference = timm.create_model(name, features_only=True).eval()
    weights = model.state_dict()
    flat = {
        k.replace(".", "_", 1) if k.replace(".", "_", 1) in reference.state_dict() else k: v for k, v in weights.items()
    }
    # features_only flattens the first level of names for some families; give it every form it may want.
    loaded = reference.load_state_dict({**weights, **flat}, strict=False)
    assert not [k for k in loaded.missing_keys if "mask" not in k and "index" not in k]
    images = torch.rand(2, 3, side, side)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    with torch.inference_mode():
        maps = reference((images - mean) / std)
    tokens = encoder.encode(
        images, range(1, encoder.facts.layers + 1), norm=False
    )  # Swin has a norm after its last stage
    by_stride = {encoder.facts.strides[layer - 1]: layer for layer in tokens.patches}
    assert [s for s in by_stride if s >= 4] == [4, 8, 16, 32]
    for x, stride in zip(maps, reference.feature_info.reduction()):
        if "swin" in name:
            x = x.permute(0, 3, 1, 2)
        got = tokens.patches[by_stride[stride]]
        assert tokens.grids[by_stride[stride]] == (side // stride, side // stride)
        assert got.shape[2] == encoder.facts.widths[by_stride[stride] - 1]
        expected = x.flatten(2).transpose(1, 2)  # laid out otherwise, so other kernels: equal to rounding
        assert (got - expected).abs().max() / expected.abs().max() < 1e-5


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_dinov3_qkvb", "test_convnext"])
def test_tokens_do_not_depend_on_the_batch(name: str, tmp_path: Path) -> None:
    encoder = load_encoder(f"timm:{name}", weights=_save(_random(name), tmp_path))
    images = torch.rand(5, 3, 96, 160)
    together = encoder.encode(images, [1, -1])
    for i in range(5):
        alone = encoder.encode(images[i : i + 1], [1, -1])
        for layer, patches in together.patches.items():
            scale = patches.abs().max().clamp(min=1)
            assert (patches[i] - alone.patches[layer][0]).abs().max() / scale < 1e-6


def test_positions_of_dinov2_are_its_own(tmp_path: Path) -> None:
    """Against the repository's ``interpolate_pos_encoding`` written out, with rows before columns."""
    name = "vit_small_patch14_dinov2"
    model = _random(name)
    card = EncoderCard(
        name="d", source=SourceCard(timm=name), arch="x", patch=14, resolution=518, options={"positions": "dinov2"}
    )
    family = FamilyCard(family="t", title="t", adapter="timm", encoders=(card,))
    encoder = adapter(LoadRequest(card, family, _save(model, tmp_path)))
    plain = load_encoder(f"timm:{name}", weights=tmp_path / "w.safetensors")
    assert encoder.fingerprint != plain.fingerprint
    native = torch.rand(1, 3, 518, 518)
    assert torch.equal(encoder.encode(native, [1]).last, plain.encode(native, [1]).last)
    h, w = 4, 6
    cls, square = model.pos_embed[:, :1], model.pos_embed[:, 1:].reshape(1, 37, 37, -1).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(square, scale_factor=((h + 0.1) / 37, (w + 0.1) / 37), mode="bicubic")
    assert resized.shape[2:] == (h, w)
    small = _random(name, img_size=(h * 14, w * 14))
    state = {**model.state_dict(), "pos_embed": torch.cat([cls, resized.flatten(2).transpose(1, 2)], dim=1)}
    small.load_state_dict(state)
    images = torch.rand(1, 3, h * 14, w * 14)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (encoder.facts.mean, encoder.facts.std))
    with torch.inference_mode():
        expected = small.forward_features((images - mean) / std)
    torch.testing.assert_close(encoder.encode(images).last, expected[:, 1:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(plain.encode(images).last, expected[:, 1:], atol=1e-3)


def test_a_stored_position_grid_is_kept(tmp_path: Path) -> None:
    model = _random("vit_tiny_patch16_224", img_size=96)
    encoder = load_encoder("timm:vit_tiny_patch16_224", weights=_save(model, tmp_path))
    assert encoder.facts.resolution == 96
    assert encoder.facts.notes == ("position grid 6 x 6 as stored",)
    images = torch.rand(1, 3, 96, 96)
    x = (images - torch.tensor(encoder.facts.mean).view(3, 1, 1)) / torch.tensor(encoder.facts.std).view(3, 1, 1)
    with torch.inference_mode():
        assert torch.equal(encoder.encode(images).last, model.forward_features(x)[:, 1:])


def test_a_classifier_is_left_out_and_said(tmp_path: Path) -> None:
    model = _random("test_vit")
    path = _save(model, tmp_path, **{"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)})
    assert load_encoder("timm:test_vit", weights=path).facts.notes == ("classifier left out",)


def test_original_names_go_through_timms_converter(tmp_path: Path) -> None:
    """DINOv2's own file calls LayerScale's vector as timm does but carries a mask token."""
    model = _random("vit_small_patch14_dinov2")
    path = _save(model, tmp_path, mask_token=torch.zeros(1, 384))
    encoder = load_encoder("timm:vit_small_patch14_dinov2", weights=path)
    assert "names converted by timm" in encoder.facts.notes


@pytest.mark.parametrize("change", ["missing", "extra", "transposed", "other"])
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, change: str) -> None:
    state = _random("vit_tiny_patch16_224").state_dict()
    if change == "missing":
        state = {k: v for k, v in state.items() if not k.startswith("blocks.7.")}
    elif change == "extra":
        state["blocks.12.norm1.weight"] = torch.zeros(192)
    elif change == "transposed":
        state["blocks.0.mlp.fc1.weight"] = state["blocks.0.mlp.fc1.weight"].t().contiguous()
    else:
        state = _random("test_resnet").state_dict()
    path = tmp_path / "w.safetensors"
    save_file(state, path)
    words = {"missing": r"blocks\.7\.", "extra": r"blocks\.12\.norm1", "transposed": "fc1", "other": "keys missing"}
    with pytest.raises(CheckpointError, match=words[change]) as caught:
        load_encoder("timm:vit_tiny_patch16_224", weights=path)
    assert "\n" not in str(caught.value)


def test_names_that_do_not_exist() -> None:
    with pytest.raises(NotFoundError, match="has no model 'vit_tinny_patch16_224'"):
        load_encoder("timm:vit_tinny_patch16_224.augreg_in21k")
    with pytest.raises(NotFoundError, match=r"no weights 'vit_tiny_patch16_224\.none'"):
        load_encoder("timm:vit_tiny_patch16_224.none")
    with pytest.raises(UsageError, match="needs weights"):
        load_encoder("timm:vit_tiny_patch16_224")


def test_offline_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="from 'timm/test_vit.*they are not in the cache") as caught:
        load_encoder("timm:test_vit.r160_in1k")
    assert "\n" not in str(caught.value)
    assert "--weights" in caught.value.fix


@pytest.mark.slow
def test_a_model_of_fixed_size_says_so(tmp_path: Path) -> None:
    name = "beit_base_patch16_224"
    encoder = load_encoder(f"timm:{name}", weights=_save(_random(name), tmp_path))
    with pytest.raises(PlanError, match="224 x 224 px only"):
        encoder.check_size(448, 448)
    assert encoder.encode(torch.rand(1, 3, 224, 224), [1]).last.shape == (1, 196, 768)


def test_a_card_that_lies_about_the_patch_is_refused(tmp_path: Path) -> None:
    card = EncoderCard(name="x", source=SourceCard(timm="test_vit"), arch="x", patch=14, resolution=160)
    family = FamilyCard(family="t", title="t", adapter="timm", encoders=(card,))
    with pytest.raises(CardError, match="the card says patch 14, the model has 16"):
        adapter(LoadRequest(card, family, _save(_random("test_vit"), tmp_path)))


CARDED = sorted((f.family, c.name) for f, c in catalogue().encoders.values() if (c.adapter or f.adapter) == "timm")
FIRST = dict(reversed(CARDED))
_BY_FAMILY = [pytest.param(n, marks=() if FIRST[f] == n else pytest.mark.slow) for f, n in CARDED]


@pytest.mark.parametrize("name", _BY_FAMILY)
def test_every_card_agrees_with_timm(name: str) -> None:
    _, card = catalogue().encoder(name)
    assert card.source.timm is not None
    config = timm.get_pretrained_cfg(card.source.timm)
    assert config is not None, "timm does not know these weights"
    assert card.mean == tuple(config.mean)
    assert card.std == tuple(config.std)
    assert card.license
    with torch.device("meta"):
        model = timm.create_model(card.source.timm, num_classes=0)
    assert card.params == sum(p.numel() for p in model.parameters())
    assert card.patch == max(stage["reduction"] for stage in model.feature_info)
    assert card.resolution == config.input_size[-1]
