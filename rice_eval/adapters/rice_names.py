"""What RICE's tensors are called in the files they travel in. The tables are read in both directions by ``layouts``."""

from __future__ import annotations

from rice_eval.adapters.layouts import Layout, Rule, block_rules

__all__ = ["DEEPGLINT", "DEEPGLINT_MHA", "HUB", "LLAVA_ONEVISION"]

HUB = Layout("transformers")
DEEPGLINT = Layout(
    "DeepGlint training file",
    (
        Rule("conv1.weight", "embeddings.patch_embedding.weight"),
        Rule("class_embedding", "embeddings.class_embedding"),
        Rule("class_pos_emb", "class_pos_emb"),
        Rule("ln_pre.{p}", "pre_layrnorm.{p}"),
        Rule("ln_post.{p}", "post_layernorm.{p}"),
        *block_rules(
            "transformer.resblocks.{n}.",
            "encoder.layers.{n}.",
            {
                "ln_1": "layer_norm1",
                "ln_2": "layer_norm2",
                "attn.out_proj": "self_attn.out_proj",
                "mlp.c_fc": "mlp.fc1",
                "mlp.c_proj": "mlp.fc2",
            },
            "attn.in_proj.{p}",
        ),
    ),
    ignore=(r".*\binv_freq", r"positional_embedding", r"proj"),
)
#: The same file where attention is torch's MultiheadAttention, whose fused tensor has an underscore.
DEEPGLINT_MHA = Layout(
    DEEPGLINT.name,
    tuple(Rule(r.source.replace("in_proj.{p}", "in_proj_{p}"), r.target, r.part) for r in DEEPGLINT.rules),
    DEEPGLINT.ignore,
)
LLAVA_ONEVISION = Layout(
    "tower of LLaVA-OneVision-1.5",
    (
        Rule("patch_embed.proj.weight", "embeddings.patch_embedding.weight"),
        Rule("class_embedding", "embeddings.class_embedding"),
        Rule("class_pos_emb", "class_pos_emb"),
        Rule("pre_layernorm.{p}", "pre_layrnorm.{p}"),
        Rule("post_layernorm.{p}", "post_layernorm.{p}"),
        *block_rules(
            "blocks.{n}.",
            "encoder.layers.{n}.",
            {
                "norm1": "layer_norm1",
                "norm2": "layer_norm2",
                "attn.proj": "self_attn.out_proj",
                "mlp.fc1": "mlp.fc1",
                "mlp.fc2": "mlp.fc2",
            },
            "attn.qkv.{p}",
        ),
    ),
    ignore=(r".*\binv_freq", r"merger\..*"),
)
