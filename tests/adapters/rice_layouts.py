"""Writes one random MLCD model in every layout its weights travel in: the inverse of what the adapter reads, done by hand."""

from __future__ import annotations

import re

import torch
from torch import Tensor

TINY = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 42,
    "patch_size": 14,
}


def canonical(model: torch.nn.Module) -> dict[str, Tensor]:
    """Names without the ``vision_model.`` that transformers 4.x writes."""
    return {k.removeprefix("vision_model."): v.clone() for k, v in model.state_dict().items()}


def _fuse(state: dict[str, Tensor], block: int, part: str) -> Tensor:
    return torch.cat([state[f"encoder.layers.{block}.self_attn.{q}_proj.{part}"] for q in "qkv"])


def hub4(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"vision_model.{k}": v for k, v in state.items()}


def hub5(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return dict(state)


def llava_next(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in state.items()}
    out["model.layers.0.mlp.gate_proj.weight"] = torch.randn(4, 4)
    out["lm_head.weight"] = torch.randn(4, 4)
    return out


def deepglint(state: dict[str, Tensor], stale: bool = True) -> dict[str, Tensor]:
    out = {
        "conv1.weight": state["embeddings.patch_embedding.weight"],
        "class_embedding": state["embeddings.class_embedding"],
        "class_pos_emb": state["class_pos_emb"],
    }
    for part in ("weight", "bias"):
        out[f"ln_pre.{part}"] = state[f"pre_layrnorm.{part}"]
        out[f"ln_post.{part}"] = state[f"post_layernorm.{part}"]
        for n in range(_depth(state)):
            a, b = f"transformer.resblocks.{n}.", f"encoder.layers.{n}."
            out[f"{a}ln_1.{part}"] = state[f"{b}layer_norm1.{part}"]
            out[f"{a}ln_2.{part}"] = state[f"{b}layer_norm2.{part}"]
            out[f"{a}attn.in_proj.{part}"] = _fuse(state, n, part)
            out[f"{a}attn.out_proj.{part}"] = state[f"{b}self_attn.out_proj.{part}"]
            out[f"{a}mlp.c_fc.{part}"] = state[f"{b}mlp.fc1.{part}"]
            out[f"{a}mlp.c_proj.{part}"] = state[f"{b}mlp.fc2.{part}"]
    if stale:
        out["positional_embedding"] = torch.randn(10, 32)
        out["proj"] = torch.randn(32, 16)
    return out


def onevision(state: dict[str, Tensor], merger: bool = True, prefix: str = "visual.") -> dict[str, Tensor]:
    out = {
        "patch_embed.proj.weight": state["embeddings.patch_embedding.weight"],
        "class_embedding": state["embeddings.class_embedding"],
        "class_pos_emb": state["class_pos_emb"],
    }
    for part in ("weight", "bias"):
        out[f"pre_layernorm.{part}"] = state[f"pre_layrnorm.{part}"]
        for n in range(_depth(state)):
            a, b = f"blocks.{n}.", f"encoder.layers.{n}."
            out[f"{a}norm1.{part}"] = state[f"{b}layer_norm1.{part}"]
            out[f"{a}norm2.{part}"] = state[f"{b}layer_norm2.{part}"]
            out[f"{a}attn.qkv.{part}"] = _fuse(state, n, part)
            out[f"{a}attn.proj.{part}"] = state[f"{b}self_attn.out_proj.{part}"]
            out[f"{a}mlp.fc1.{part}"] = state[f"{b}mlp.fc1.{part}"]
            out[f"{a}mlp.fc2.{part}"] = state[f"{b}mlp.fc2.{part}"]
    if merger:
        out["merger.ln_q.weight"] = torch.randn(32)
        out["merger.mlp.0.weight"] = torch.randn(128, 128)
    out = {prefix + k: v for k, v in out.items()}
    out["language_model.embed_tokens.weight" if prefix == "visual." else "model.language_model.norm.weight"] = (
        torch.randn(8)
    )
    return out


def _depth(state: dict[str, Tensor]) -> int:
    return 1 + max(int(m.group(1)) for m in (re.match(r"encoder\.layers\.(\d+)\.", k) for k in state) if m)
