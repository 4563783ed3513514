"""CLOC against a reference written here from the paper's equations, in plain matrix products, one box at a time."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.base import EmbedsImage, HasRegionFeatures
from rice_eval.adapters.cloc import ClocEncoder, convert, save
from rice_eval.adapters.cloc_model import ClocConfig, ClocModel
from rice_eval.errors import CheckpointError, PlanError, UsageError

TINY = ClocConfig(
    image_size=32, patch_size=8, width=16, depth=2, heads=2, mlp=40, embed_dim=12, text_width=8, text_depth=2, text_heads=2,
    text_mlp=24, vocab_size=50, prompter_mlp=28, grounding_hidden=20, context=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def model() -> ClocModel:
    torch.manual_seed(3)
    model = ClocModel(TINY)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def folder(model: ClocModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cloc")
    save(model, out)
    return out


@pytest.fixture(scope="module")
def encoder(folder: Path) -> ClocEncoder:
    loaded = load_encoder("cloc-vit-b-16-224", weights=folder)
    assert isinstance(loaded, ClocEncoder)
    return loaded


class Reference:
    """The equations, over the names of the file and nothing of the package."""

    def __init__(self, state: dict[str, Tensor], c: ClocConfig) -> None:
        self.w, self.c = {k: v.double() for k, v in state.items()}, c

    def linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.w[f"{name}.weight"].T
        return y + self.w[f"{name}.bias"] if f"{name}.bias" in self.w else y

    def norm(self, x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / torch.sqrt(var + self.c.eps) * self.w[f"{name}.weight"] + self.w[f"{name}.bias"]

    @staticmethod
    def gelu(x: Tensor) -> Tensor:
        return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
        size = q.shape[-1] // heads
        out = []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = q[:, part] @ k[:, part].T / math.sqrt(size)
            if mask is not None:
                scores = scores + mask
            out.append(torch.softmax(scores, -1) @ v[:, part])
        return torch.cat(out, -1)

    def block(self, x: Tensor, name: str, heads: int, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.linear(self.norm(x, f"{name}.norm1"), f"{name}.attn.qkv").chunk(3, -1)
        x = x + self.linear(self.attend(q, k, v, heads, mask), f"{name}.attn.out")
        return x + self.linear(self.gelu(self.linear(self.norm(x, f"{name}.norm2"), f"{name}.fc1")), f"{name}.fc2")

    def tokens(self, pixels: Tensor) -> list[Tensor]:
        p = self.c.patch_size
        h, w = pixels.shape[1] // p, pixels.shape[2] // p
        flat = self.w["image.patch_embedding.weight"].flatten(1)
        rows = [flat @ pixels[:, i * p : i * p + p, j * p : j * p + p].reshape(-1) for i in range(h) for j in range(w)]
        side = self.c.image_size // p
        pos = self.w["image.position_embedding"]
        if (h, w) != (side, side):
            grid = pos.reshape(1, side, side, -1).permute(0, 3, 1, 2)
            pos = torch.nn.functional.interpolate(grid, (h, w), mode="bicubic").flatten(2)[0].T
        x = self.norm(torch.stack(rows) + pos, "image.pre_norm")
        out = []
        for n in range(self.c.depth):
            x = self.block(x, f"image.blocks.{n}", self.c.heads)
            out.append(x)
        return out

    def image(self, tokens: Tensor) -> Tensor:
        k, v = self.linear(tokens, "image.pool.kv").chunk(2, -1)
        pooled = self.attend(self.w["image.pool.query"][None], k, v, self.c.heads)
        return self.linear(self.linear(pooled, "image.pool.out"), "image.projection")[0]

    def text(self, ids: Tensor) -> Tensor:
        x = self.w["text.token_embedding.weight"][ids] + self.w["text.position_embedding"][: len(ids)]
        mask = torch.full((len(ids), len(ids)), -math.inf, dtype=torch.float64).triu(1)
        for n in range(self.c.text_depth):
            x = self.block(x, f"text.blocks.{n}", self.c.text_heads, mask)
        end = ids.tolist().index(self.c.eos_id)
        return self.linear(self.norm(x, "text.norm")[end], "text.projection")

    def corner(self, x: float, y: float) -> list[float]:
        quarter = self.c.width // 4
        waves = [self.c.temperature ** (-k / quarter) for k in range(quarter)]
        return [f(2 * math.pi * v * w) for v in (x, y) for f in (math.sin, math.cos) for w in waves]

    def prompter(self, prompt: Tensor, tokens: Tensor) -> Tensor:
        seq = self.block(torch.cat((prompt, tokens)), "prompter.block", 1)
        return self.linear(seq.mean(0), "prompter.projection")

    def box(self, box: list[float], tokens: Tensor) -> Tensor:
        corners = torch.tensor([self.corner(*box[:2]), self.corner(*box[2:])], dtype=torch.float64)
        return self.prompter(corners + self.w["prompter.corner_embedding"], tokens)

    def ground(self, text: Tensor, tokens: Tensor) -> Tensor:
        z = self.prompter(self.linear(text / text.norm(), "prompter.text_in")[None], tokens)
        return self.linear(self.gelu(self.linear(z, "grounding.fc1")), "grounding.fc2")


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (48, 48)])
def test_whole_model_follows_the_equations(model: ClocModel, encoder: ClocEncoder, size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    images = torch.rand(2, 3, *size)
    mean, std = torch.tensor(encoder.facts.mean).view(3, 1, 1), torch.tensor(encoder.facts.std).view(3, 1, 1)
    reference = Reference(model.state_dict(), TINY)
    boxes = torch.tensor([[0.1, 0.2, 0.6, 0.9], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.5, 0.5]])
    ids = torch.tensor([[7, 9, 1, 0, 0], [4, 1, 0, 0, 0]])
    tokens = encoder.encode(images, layers=(1, 2), norm=False)
    normed = encoder.encode(images, layers=(2,), norm=True)
    regions = encoder.region_features(normed, [boxes, boxes[:1]])
    texts = encoder.embed_ids(ids)
    grounded = encoder.ground_embeddings(normed, [texts, texts[:1]])
    pooled = encoder.embed_image(images)
    for i in range(2):
        blocks = reference.tokens(((images[i] - mean) / std).double())
        last = reference.norm(blocks[-1], "image.norm")
        for n in (1, 2):
            torch.testing.assert_close(tokens.patches[n][i].double(), blocks[n - 1], atol=2e-5, rtol=1e-4)
        z = reference.image(last)
        torch.testing.assert_close(pooled[i].double(), z / z.norm(), atol=1e-5, rtol=1e-4)
        for j, row in enumerate(regions[i]):
            z = reference.box([float(v) for v in boxes[j]], last)
            torch.testing.assert_close(row.double(), z / z.norm(), atol=1e-5, rtol=1e-4)
        for j, row in enumerate(grounded[i]):
            torch.testing.assert_close(
                row.double(), reference.ground(reference.text(ids[j]), last), atol=2e-5, rtol=1e-4
            )
    for j in range(2):
        t = reference.text(ids[j])
        torch.testing.assert_close(texts[j].double(), t / t.norm(), atol=1e-5, rtol=1e-4)


def test_abilities_and_protocols(encoder: ClocEncoder) -> None:
    assert isinstance(encoder, HasRegionFeatures)
    assert isinstance(encoder, EmbedsImage)
    assert encoder.facts.abilities == ("image", "regions")  # no tokenizer beside the weights: no text
    assert encoder.facts.layers == 2
    assert encoder.facts.widths == (16, 16)
    assert encoder.facts.params == sum(
        p.numel() for n, p in encoder._model.named_parameters() if n.startswith("image.")
    )


def test_boxes_do_not_depend_on_the_unit_the_view_was_measured_in(encoder: ClocEncoder) -> None:
    """The same image region, told in pixels of two views, is one box: 0 to 1 of the encoded image's sides."""
    torch.manual_seed(2)
    images = torch.rand(1, 3, 32, 48)
    tokens = encoder.encode(images)
    pixels = torch.tensor([[6.0, 4.0, 30.0, 28.0]])
    scale = torch.tensor([48.0, 32.0, 48.0, 32.0])
    twice = (pixels * 2) / (scale * 2)
    torch.testing.assert_close(
        encoder.region_features(tokens, [pixels / scale])[0],
        encoder.region_features(tokens, [twice])[0],
        atol=0,
        rtol=0,
    )
    # A letterbox only moves the box: its content keeps its coordinates relative to the padded image.
    padded = torch.nn.functional.pad(images, (0, 0, 0, 16))
    moved = pixels / torch.tensor([48.0, 48.0, 48.0, 48.0])
    assert encoder.region_features(encoder.encode(padded), [moved])[0].shape == (1, 12)


def test_boxes_do_not_see_each_other_nor_other_images(encoder: ClocEncoder) -> None:
    torch.manual_seed(4)
    images = torch.rand(3, 3, 32, 32)
    boxes = torch.rand(70, 2, 2).sort(dim=1).values.reshape(70, 4)
    together = encoder.region_features(encoder.encode(images), [boxes, boxes[:3], boxes[:0]])
    assert together[2].shape == (0, 12)
    alone = encoder.region_features(encoder.encode(images[:1]), [boxes[41:42]])[0]
    torch.testing.assert_close(together[0][41:42], alone, atol=1e-6, rtol=0)


def test_save_load_fingerprint_round_trip(model: ClocModel, encoder: ClocEncoder, tmp_path: Path) -> None:
    save(encoder._model, tmp_path / "again")
    again = load_encoder("cloc-vit-b-16-224", weights=tmp_path / "again" / "model.safetensors")
    assert again.fingerprint == encoder.fingerprint
    assert (tmp_path / "again" / "model.safetensors").read_bytes()  # written whole
    with torch.no_grad():
        changed = ClocModel(TINY)
        changed.load_state_dict(model.state_dict())
        changed.logit_scale += 1
    save(changed, tmp_path / "changed")
    assert load_encoder("cloc-vit-b-16-224", weights=tmp_path / "changed").fingerprint != encoder.fingerprint


def test_conversion_from_a_plain_state_dict(model: ClocModel, encoder: ClocEncoder, tmp_path: Path) -> None:
    foreign = {f"module.{k.replace('image.', 'tower.')}": v for k, v in model.state_dict().items()}
    torch.save({"state_dict": foreign}, tmp_path / "lab.pt")
    settings = {"heads": 2, "text_heads": 2}
    convert(tmp_path / "lab.pt", tmp_path / "out", settings=settings, names={r"^tower\.": "image."})
    assert load_encoder("cloc-vit-b-16-224", weights=tmp_path / "out").fingerprint == encoder.fingerprint
    with pytest.raises(CheckpointError, match=r"image\.patch_embedding\.weight"):
        convert(tmp_path / "lab.pt", tmp_path / "no", settings=settings)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (lambda d: d.pop("prompter.projection.weight"), r"prompter\.projection\.weight"),
        (lambda d: d.update({"prompter.extra": torch.zeros(1)}), r"unexpected \(prompter\.extra\)"),
        (lambda d: d.update({"text.projection.weight": d["text.projection.weight"].T.contiguous()}), "transposed"),
        (lambda d: [d.pop(k) for k in list(d) if k.startswith("image.blocks.1.")], r"image\.blocks\.1\.norm1\.weight"),
    ],
)
def test_refusals(model: ClocModel, tmp_path: Path, break_it: object, said: str) -> None:
    from safetensors.torch import save_file

    state = {k: v.clone() for k, v in model.state_dict().items()}
    break_it(state)  # type: ignore[operator]
    save_file(state, tmp_path / "m.safetensors", metadata={"cloc": json.dumps(asdict(TINY))})
    with pytest.raises(CheckpointError, match=said) as caught:
        load_encoder("cloc-vit-b-16-224", weights=tmp_path / "m.safetensors")
    assert "\n" not in str(caught.value)


def test_refuses_without_weights_bad_boxes_and_other_layers(encoder: ClocEncoder) -> None:
    with pytest.raises(CheckpointError, match="not public"):
        load_encoder("cloc-vit-l-14-336")
    tokens = encoder.encode(torch.rand(1, 3, 32, 32))
    with pytest.raises(UsageError, match="0 to 1"):
        encoder.region_features(tokens, [torch.tensor([[0.0, 0.0, 32.0, 32.0]])])
    with pytest.raises(UsageError, match="1 images, prompts of 2"):
        encoder.region_features(tokens, [torch.zeros(1, 4)] * 2)
    with pytest.raises(PlanError, match="layer 2"):
        encoder.region_features(encoder.encode(torch.rand(1, 3, 32, 32), layers=(1,)), [torch.zeros(1, 4)])
    with pytest.raises(CheckpointError, match="end-of-text"):
        encoder.embed_ids(torch.tensor([[3, 4]]))


def test_config_that_disagrees(folder: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(folder, tmp_path / "c")
    config = json.loads((tmp_path / "c" / "config.json").read_text())
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "heads": 4}))
    with pytest.raises(CheckpointError, match="disagree on heads"):
        load_encoder("cloc-vit-b-16-224", weights=tmp_path / "c")
    (tmp_path / "c" / "config.json").write_text(json.dumps({**config, "colour": 4}))
    with pytest.raises(CheckpointError, match="unknown field 'colour'"):
        load_encoder("cloc-vit-b-16-224", weights=tmp_path / "c")


def test_texts_through_a_tokenizer_beside_the_weights(model: ClocModel, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from dataclasses import replace

    from tiny_models import TEXTS, save_tokenizer

    other = ClocModel(replace(TINY, eos_id=2)).eval()
    other.load_state_dict(model.state_dict())
    save(other, tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_encoder("cloc-vit-b-16-224", weights=tmp_path)
    assert isinstance(encoder, ClocEncoder)
    assert "text" in encoder.facts.abilities
    texts = encoder.embed_text(TEXTS)
    ids = torch.tensor([[1, 9, 10, 2]])  # <bos> red car <eos>
    torch.testing.assert_close(texts[2:3], encoder.embed_ids(ids), atol=1e-6, rtol=0)
    tokens = encoder.encode(torch.rand(1, 3, 32, 32))
    assert encoder.ground(tokens, [TEXTS])[0].shape == (4, 4)
    assert encoder.embed_text([]).shape == (0, 12)
