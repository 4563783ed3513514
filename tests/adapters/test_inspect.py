"""``rice-eval encoders inspect`` and ``convert``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

T = pytest.importorskip("transformers")
import rice_layouts as layouts  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_models import TEXT, VISION, randomise  # noqa: E402

from rice_eval.adapters import load_encoder  # noqa: E402
from rice_eval.adapters.inspect import inspect  # noqa: E402
from rice_eval.cli.encoders import app  # noqa: E402
from rice_eval.errors import CheckpointError, UsageError  # noqa: E402


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return layouts.canonical(randomise(T.MLCDVisionModel(T.MLCDVisionConfig(**layouts.TINY))))


def _save(state: dict[str, torch.Tensor], path: Path) -> Path:
    save_file({k: v.contiguous().clone() for k, v in state.items()}, path)
    return path


def test_every_rice_layout_is_known(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    for write, word, prefix in (
        (layouts.hub4, "4.x", "vision_model."),
        (layouts.hub5, "5.x", ""),
        (layouts.deepglint, "DeepGlint", ""),
        (layouts.onevision, "LLaVA-OneVision-1.5", "visual."),
        (layouts.llava_next, "LLaVA-NeXT", "model.vision_tower.vision_tower.vision_model."),
    ):
        found = inspect(_save(write(state), tmp_path / "m.safetensors"))
        assert (found.family, found.depth, found.width, found.heads, found.mlp, found.patch) == (
            "rice",
            3,
            32,
            4,
            80,
            14,
        )
        assert word in found.layout
        assert found.prefix == prefix
        assert found.loads
        assert found.dtypes == ("float32",)
        assert found.position is not None
        assert found.position.startswith("2D RoPE")
        assert found.params == load_encoder("rice-vit-l-14-560", weights=tmp_path / "m.safetensors").facts.params


def test_no_tensor_is_read(state: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _save(layouts.hub5(state), tmp_path / "m.safetensors")

    def never(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr("rice_eval.adapters.checkpoints.Checkpoint.read", never)
    monkeypatch.setattr("safetensors.safe_open", never)
    assert inspect(path).loads


def test_missing_and_unexpected_are_in_the_files_own_names(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    written = layouts.deepglint(state)
    written.pop("transformer.resblocks.2.ln_2.bias")
    written["head.weight"] = torch.zeros(2)
    written["transformer.resblocks.0.mlp.c_fc.weight"] = torch.zeros(81, 32)
    found = inspect(_save(written, tmp_path / "m.safetensors"))
    assert not found.loads
    assert found.missing == ("transformer.resblocks.2.ln_2.bias",)
    assert found.unexpected == ("head.weight",)
    assert "transformer.resblocks.0.mlp.c_fc.bias" in (found.shapes or ())


def test_other_families(tmp_path: Path) -> None:
    vision = {**VISION, "image_size": 32, "patch_size": 8}
    made = {
        "clip": T.CLIPModel(T.CLIPConfig(text_config=TEXT, vision_config=vision, projection_dim=20)),
        "siglip": T.SiglipModel(T.SiglipConfig(text_config={**TEXT, "projection_size": 32}, vision_config=vision)),
        "siglip2": T.Siglip2VisionModel(T.Siglip2VisionConfig(**VISION, num_patches=16, patch_size=8)),
        "dinov2": T.Dinov2Model(
            T.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=28, patch_size=14)
        ),
    }
    for family, model in made.items():
        model.save_pretrained(tmp_path / family)
        found = inspect(tmp_path / family)
        assert found.family == family
        assert (found.width, found.heads) == (32, 4)
        assert found.text == (family in ("clip", "siglip"))
        if family == "dinov2":
            assert found.missing is None
        else:
            assert found.loads, found
            assert found.params == load_encoder(str(found.encoder), weights=tmp_path / family).facts.params
    config = json.loads((tmp_path / "clip" / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = 5
    (tmp_path / "clip" / "config.json").write_text(json.dumps(config))
    found = inspect(tmp_path / "clip")
    assert "num_hidden_layers = 5" in found.problems[0]
    assert not found.loads
    _save(
        {
            "patch_embed.proj.weight": torch.zeros(8, 3, 4, 4),
            "blocks.0.attn.qkv.weight": torch.zeros(24, 8),
            "pos_embed": torch.zeros(1, 5, 8),
        },
        tmp_path / "t.safetensors",
    )
    assert inspect(tmp_path / "t.safetensors").family == "timm"
    _save({"something.else": torch.zeros(1)}, tmp_path / "u.safetensors")
    assert inspect(tmp_path / "u.safetensors").family == "unknown"


def test_cloc(tmp_path: Path) -> None:
    from test_cloc import TINY

    from rice_eval.adapters.cloc import save
    from rice_eval.adapters.cloc_model import ClocModel

    save(ClocModel(TINY), tmp_path)
    found = inspect(tmp_path)
    assert (found.family, found.depth, found.heads, found.resolution, found.loads) == ("cloc", 2, 2, 32, True)
    assert found.params == load_encoder("cloc-vit-b-16-224", weights=tmp_path).facts.params


def test_command_line(state: dict[str, torch.Tensor], tmp_path: Path) -> None:
    runner = CliRunner()
    path = _save(layouts.onevision(state), tmp_path / "m.safetensors")
    shown = runner.invoke(app, ["inspect", str(path)])
    assert shown.exit_code == 0
    assert "LLaVA-OneVision-1.5" in shown.output
    assert "missing     0" in shown.output
    as_json = runner.invoke(app, ["inspect", str(path), "--json"])
    assert json.loads(as_json.output)["family"] == "rice"
    done = runner.invoke(
        app, ["convert", str(path), "--to", "hf", "--out", str(tmp_path / "out"), "--set", "image_size=42"]
    )
    assert done.exit_code == 0, done.exception
    assert json.loads((tmp_path / "out" / "config.json").read_text())["image_size"] == 42
    assert "vision_model.class_pos_emb" in load_file(tmp_path / "out" / "model.safetensors")
    again = runner.invoke(app, ["convert", str(path), "--out", str(tmp_path / "out")])
    assert isinstance(again.exception, UsageError)
    wrong = runner.invoke(app, ["convert", str(path), "--to", "onnx", "--out", str(tmp_path / "x")])
    assert isinstance(wrong.exception, UsageError)
    gone = runner.invoke(app, ["inspect", str(tmp_path / "none.pt")])
    assert isinstance(gone.exception, CheckpointError)
    bad = runner.invoke(app, ["convert", str(path), "--out", str(tmp_path / "x"), "--set", "image_size"])
    assert isinstance(bad.exception, UsageError)


def test_command_line_converts_cloc(tmp_path: Path) -> None:
    from test_cloc import TINY

    from rice_eval.adapters.cloc_model import ClocModel

    model = ClocModel(TINY)
    torch.save({k.replace("image.", "tower."): v for k, v in model.state_dict().items()}, tmp_path / "lab.pt")
    (tmp_path / "names.json").write_text(json.dumps({r"^tower\.": "image."}))
    arguments = ["--to", "cloc", "--out", str(tmp_path / "out"), "--names", str(tmp_path / "names.json")]
    done = CliRunner().invoke(
        app, ["convert", str(tmp_path / "lab.pt"), *arguments, "--set", "heads=2", "--set", "text_heads=2"]
    )
    assert done.exit_code == 0, done.exception
    assert inspect(tmp_path / "out").loads
