"""What a hostile or careless user hands over: odd types, odd numbers, odd places. One line each, or the right weights."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rice_eval.adapters import load_encoder
from rice_eval.adapters.checkpoints import open_checkpoint
from rice_eval.errors import CheckpointError, PlanError, RiceEvalError

T = pytest.importorskip("transformers")
import rice_layouts as layouts  # noqa: E402
from tiny_models import TEXT, VISION, images, randomise  # noqa: E402

from rice_eval.adapters.conversion import convert  # noqa: E402
from rice_eval.adapters.inspect import inspect  # noqa: E402

NAME = "rice-vit-l-14-560"
FC1 = "encoder.layers.0.mlp.fc1.weight"
NATIVE = {"image_size": 32, "patch_size": 8}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {
        "rice": T.MLCDVisionModel(T.MLCDVisionConfig(**layouts.TINY)),
        "clip": T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config={**VISION, **NATIVE}, projection_dim=20)),
        "siglip": T.SiglipVisionModel(T.SiglipVisionConfig(**VISION, **NATIVE)),
        "dinov2": T.Dinov2Model(
            T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
        ),
    }
    for name, model in made.items():
        randomise(model).save_pretrained(root / name)  # type: ignore[operator]
    return {name: root / name for name in made}


ENCODERS = {"rice": NAME, "clip": "clip-vit-b-16-openai", "siglip": "siglip-vit-b-16-224"}


def _load(kind: str, place: Path) -> Any:
    return load_encoder(f"hf:{place}") if kind == "dinov2" else load_encoder(ENCODERS[kind], weights=place)


def _state(folders: dict[str, Path]) -> dict[str, Tensor]:
    return {k.removeprefix("vision_model."): v for k, v in load_file(folders["rice"] / "model.safetensors").items()}


def _one_line(caught: pytest.ExceptionInfo[RiceEvalError]) -> str:
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHANGES: dict[str, tuple[str, Callable[[Tensor], Tensor], str]] = {
    "int8": (FC1, lambda t: (t * 10).to(torch.int8), f"{FC1} is int8"),
    "fp8": (FC1, lambda t: t.to(torch.float8_e4m3fn), f"{FC1} is float8_e4m3fn"),
    "complex": (FC1, lambda t: t.to(torch.complex64), f"{FC1} is complex64"),
    "integers": (FC1, lambda t: t.long(), "int64, no weights"),
    "nan": (FC1, lambda t: t * float("nan"), rf"NaN or Inf in 1 tensors \({FC1}\)"),
    "one inf": (FC1, lambda t: t.index_put((torch.tensor(0), torch.tensor(1)), torch.tensor(torch.inf)), "NaN or Inf"),
    "sparse": (FC1, lambda t: t.to_sparse(), "1 tensors are sparse"),
    "no data": (FC1, lambda t: t.to("meta"), "without data"),
    "4 channels": ("embeddings.patch_embedding.weight", lambda t: torch.zeros(32, 4, 14, 14), "takes 4 channels"),
    "flat angles": ("class_pos_emb", lambda t: t[0], "class_pos_emb|without a usable"),
    "far block": ("encoder.layers.99999999.mlp.fc1.weight", lambda t: t, "block of this number among 4 blocks"),
    "endless block": ("encoder.layers.9999999999999999.x", lambda t: t, "unexpected"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_what_is_no_weight_is_refused(folders: dict[str, Path], tmp_path: Path, name: str, suffix: str) -> None:
    key, change, said = CHANGES[name]
    state = _state(folders)
    state[key] = change(state.get(key, torch.zeros(1)))
    if suffix == ".pt":
        torch.save(state, tmp_path / "m.pt")
    elif name in ("sparse", "no data"):
        pytest.skip("the format has none")
    else:
        save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "m.safetensors")
    for act in (
        lambda: load_encoder(NAME, weights=tmp_path / f"m{suffix}"),
        lambda: convert(tmp_path / f"m{suffix}", tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            act()
        _one_line(caught)
    if name in ("int8", "fp8"):
        assert said in inspect(tmp_path / f"m{suffix}").problems[0]


def test_a_header_that_lies_is_refused(tmp_path: Path) -> None:
    for entry, said in (
        ({"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 8]}, "in 8 bytes"),
        ({"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}, "in 8 bytes"),
        ({"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}, "of type F4"),
    ):
        header = json.dumps({"a": entry}).encode()
        (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 8)
        with pytest.raises(CheckpointError, match=said) as caught:
            open_checkpoint(tmp_path / "m.safetensors")
        _one_line(caught)
    torch.save({"a": torch.zeros(2)}, tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="not a safetensors file; name it after"):
        open_checkpoint(tmp_path / "pickle.safetensors")
    with pytest.raises(CheckpointError, match="can't be a path"):
        open_checkpoint("x" * 5000)


def test_deeper_slots_and_their_hints(folders: dict[str, Path], tmp_path: Path) -> None:
    state = layouts.deepglint(_state(folders))
    model = T.MLCDVisionModel(T.MLCDVisionConfig(**layouts.TINY))
    optimizer = torch.optim.AdamW(model.parameters())
    model(pixel_values=torch.zeros(1, 3, 28, 28)).last_hidden_state.sum().backward()
    optimizer.step()
    torch.save({"app": {"model": state, "optim": optimizer.state_dict()}, "step": 3}, tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"last\.ckpt::app::KEY"):
        load_encoder(NAME, weights=tmp_path / "last.ckpt")
    with pytest.raises(CheckpointError, match=r"under 'app'; it holds model, optim; go deeper"):
        load_encoder(NAME, weights=f"{tmp_path}/last.ckpt::app")
    deep = load_encoder(NAME, weights=f"{tmp_path}/last.ckpt::app::model")
    assert deep.fingerprint == load_encoder(NAME, weights=folders["rice"]).fingerprint
    torch.save({"model": state, "optimizer": optimizer.state_dict(), "step": 3}, tmp_path / "a.ckpt")
    (tmp_path / "last.ckpt").unlink()
    assert load_encoder(NAME, weights=tmp_path).fingerprint == deep.fingerprint


VALUES: list[Any] = [None, 0, -1, "x", [], {}, [32, 32], True, 10**9, float("nan")]
FIELDS = {
    "rice": [
        "hidden_act",
        "layer_norm_eps",
        "rope_parameters",
        "rope_theta",
        "image_size",
        "num_attention_heads",
        "vision_config",
    ],
    "clip": [
        "vision_config.hidden_act",
        "vision_config.num_attention_heads",
        "vision_config",
        "text_config.vocab_size",
    ],
    "siglip": ["layer_norm_eps", "patch_size", "num_attention_heads"],
    "dinov2": ["hidden_act", "patch_size", "num_attention_heads"],
}


@pytest.mark.parametrize("kind", FIELDS)
def test_no_config_ends_in_a_stack_trace(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    place = tmp_path / kind
    shutil.copytree(folders[kind], place)
    config = json.loads((place / "config.json").read_text())
    said = []
    for field in FIELDS[kind]:
        outer, _, inner = field.rpartition(".")
        for value in VALUES:
            changed = json.loads(json.dumps(config))
            (changed[outer] if outer else changed)[inner] = value
            (place / "config.json").write_text(json.dumps(changed))
            for act in (_load, lambda _kind, where: inspect(where)):
                try:
                    act(kind, place)
                except RiceEvalError as error:
                    said.append(str(error))
    assert said
    assert not any("\n" in line for line in said)


MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


@pytest.mark.parametrize(
    ("name", "told", "mean", "std"),
    [
        ("preprocessor_config.json", {"image_mean": MEAN, "image_std": STD}, MEAN, STD),
        ("processor_config.json", {"image_processor": {"image_mean": MEAN, "image_std": STD}}, MEAN, STD),
        ("preprocessor_config.json", {"do_normalize": False, "image_mean": MEAN}, [0, 0, 0], [1, 1, 1]),
        (
            "preprocessor_config.json",
            {"do_rescale": False, "image_mean": [51] * 3, "image_std": [102] * 3},
            [0.2] * 3,
            [0.4] * 3,
        ),
        (
            "preprocessor_config.json",
            {"rescale_factor": 2 / 255, "image_mean": [1] * 3, "image_std": [1] * 3},
            [0.5] * 3,
            [0.5] * 3,
        ),
    ],
)
def test_every_way_a_processor_says_mean_and_std(
    folders: dict[str, Path], tmp_path: Path, name: str, told: dict[str, Any], mean: list[float], std: list[float]
) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folders["clip"] / file, tmp_path)
    (tmp_path / name).write_text(json.dumps(told))
    encoder = load_encoder(ENCODERS["clip"], weights=tmp_path)
    assert encoder.facts.mean == pytest.approx(mean)
    assert encoder.facts.std == pytest.approx(std)
    assert any(name in note for note in encoder.facts.notes)
    pixels = images(32, 32)
    processor = T.CLIPImageProcessor(**told.get("image_processor", told), do_resize=False, do_center_crop=False)
    theirs = processor(pixels * 255, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(encoder.normalise(pixels), theirs, atol=1e-4, rtol=1e-4)  # type: ignore[attr-defined]


@pytest.mark.parametrize("std", [[0.0] * 3, [float("nan")] * 3, [0.5], 0.5, None])
def test_impossible_preprocessors_are_refused(folders: dict[str, Path], tmp_path: Path, std: Any) -> None:
    for file in ("config.json", "model.safetensors"):
        shutil.copy(folders["clip"] / file, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": std}))
    with pytest.raises(CheckpointError, match="image_mean and image_std") as caught:
        load_encoder(ENCODERS["clip"], weights=tmp_path)
    _one_line(caught)


def test_the_hubs_cache(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots are links to blobs named by their hash."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--DeepGlint-AI--rice-vit-large-patch14-560"
    snapshot = repository / "snapshots" / "abc"
    for part in (snapshot, repository / "blobs", repository / "refs"):
        part.mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    for number, name in enumerate(("config.json", "model.safetensors")):
        shutil.copy(folders["rice"] / name, repository / "blobs" / str(number))
        os.symlink(f"../../blobs/{number}", snapshot / name)
    own = load_encoder(NAME, weights=folders["rice"]).fingerprint
    assert load_encoder(NAME).fingerprint == own
    assert load_encoder(NAME, weights=snapshot).fingerprint == own
    assert load_encoder(NAME, weights=repository / "blobs" / "1").fingerprint == own
    with pytest.raises(CheckpointError, match="snapshots/REVISION"):
        load_encoder(NAME, weights=repository)
    (repository / "blobs" / "1").rename(repository / "blobs" / "1.incomplete")
    for weights in (None, snapshot):
        with pytest.raises(CheckpointError, match="links to a file that is not there"):
            load_encoder(NAME, weights=weights)


@pytest.mark.parametrize("kind", ["rice", "clip"])
def test_shards_of_the_library(folders: dict[str, Path], tmp_path: Path, kind: str) -> None:
    loader = T.MLCDVisionModel if kind == "rice" else T.CLIPModel
    loader.from_pretrained(folders[kind]).save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    one, many = _load(kind, folders[kind]), _load(kind, tmp_path)
    x = images(4 * one.multiple, 6 * one.multiple)
    assert one.fingerprint == many.fingerprint
    assert torch.equal(one.encode(x).last, many.encode(x).last)
    assert inspect(tmp_path).loads
    extra = load_file(files[1])
    save_file({**extra, next(iter(load_file(files[0]))): torch.zeros(1)}, files[1])
    with pytest.raises(CheckpointError, match="holds as well"):
        _load(kind, tmp_path)


def test_hf_reads_training_prefixes_and_names_what_is_wrong(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copy(folders["dinov2"] / "config.json", tmp_path)
    state = load_file(folders["dinov2"] / "model.safetensors")
    x = images(28, 42)

    def written(change: Callable[[str, Tensor], Tensor], at: str = "") -> Any:
        save_file({at + k: change(k, v).contiguous() for k, v in state.items()}, tmp_path / "model.safetensors")
        return load_encoder(f"hf:{tmp_path}")

    wrapped = written(lambda _k, v: v, "module.")
    assert torch.equal(wrapped.encode(x).last, load_encoder(f"hf:{folders['dinov2']}").encode(x).last)
    assert "prefix 'module.' taken off every key" in wrapped.facts.notes
    assert "stored as bfloat16, run as float32" in written(lambda _k, v: v.bfloat16()).facts.notes
    for change, said in (
        (
            lambda k, v: v.T if "layer.1.mlp.fc1.weight" in k else v,
            r"1 shapes differ \(encoder\.layer\.1\.mlp\.fc1\.weight",
        ),
        (lambda k, v: v * torch.nan if "layer.1.mlp.fc1.weight" in k else v, r"NaN or Inf in 1 tensors"),
        (lambda k, v: v.to(torch.int8) if "layer.1.mlp.fc1.weight" in k else v, "is int8"),
    ):
        with pytest.raises(CheckpointError, match=said) as caught:
            written(change)
        _one_line(caught)


def test_a_text_tower_cut_short_is_caught_by_the_card() -> None:
    from rice_eval.adapters.base import LoadRequest
    from rice_eval.adapters.checkpoints import Checkpoint
    from rice_eval.adapters.clip import OPENAI, SPEC
    from rice_eval.adapters.dual_config import Found, settings_of
    from rice_eval.cards import catalogue

    family, card = catalogue().encoder("clip-vit-b-16-openai")
    vision = {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "patch_size": 16,
        "image_size": 224,
        "intermediate_size": 3072,
    }
    text = {
        "vocab_size": 49408,
        "hidden_size": 512,
        "max_position_embeddings": 77,
        "num_hidden_layers": 11,
        "intermediate_size": 2048,
    }
    found = Found(Checkpoint(Path("m.pt"), Path("nowhere"), {}), OPENAI, "", "vision_model.", vision, text, 512)
    with pytest.raises(
        CheckpointError, match=r"11 blocks .* has 12 \(first missing key transformer\.resblocks\.11\.ln_1"
    ):
        settings_of(found, SPEC, LoadRequest(card, family, Path("m.pt")), T)


def test_tokens_say_whether_the_norm_was_asked_for(tmp_path: Path) -> None:
    from test_cloc import TINY

    from rice_eval.adapters.cloc import save
    from rice_eval.adapters.cloc_model import ClocModel

    save(ClocModel(TINY), tmp_path)
    encoder: Any = load_encoder("cloc-vit-b-16-224", weights=tmp_path)
    x, boxes = images(32, 32), [torch.tensor([[0.1, 0.2, 0.5, 0.6]])] * 2
    raw, normed = encoder.encode(x, norm=False), encoder.encode(x)
    assert (raw.norm, normed.norm) == (False, True)
    with pytest.raises(PlanError, match="after the final norm"):
        encoder.region_features(raw, boxes)
    with pytest.raises(PlanError, match="after the final norm"):
        encoder.ground_embeddings(raw, [torch.zeros(1, TINY.embed_dim)] * 2)
    same = encoder.region_features(replace(normed, norm=None), boxes)
    assert torch.equal(same[0], encoder.region_features(normed, boxes)[0])
