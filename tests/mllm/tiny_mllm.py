"""Tiny random multimodal checkpoints, written by transformers' own ``save_pretrained``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from rice_eval.mllm.lm import byte_tokenizer

CLIP_MEAN, CLIP_STD = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
SIDES = [[28 * a, 28 * b] for a in range(1, 7) for b in range(1, 7)]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "{{ '<image>' }}{{ '\n' }}{% else %}{{ c['text'] }}{% endif %}{% endfor %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth noise, so that scaling matters."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 5), max(2, width // 5), 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def image_processor(name: str, pil: bool) -> Any:
    """The class that scales by PIL or by torchvision: transformers 4 and 5 name them differently."""
    five = hasattr(transformers, f"{name}Pil")
    return getattr(transformers, name + (("Pil" if pil else "") if five else ("" if pil else "Fast")))


def processor_of(folder: Path, made: Any, pil: bool = False) -> Any:
    """The processor as transformers 5 reads it back; PIL's, and transformers 4's, as they were made."""
    if pil or transformers.__version__.startswith("4."):
        return made
    return transformers.AutoProcessor.from_pretrained(folder)


def vision(kind: str) -> Any:
    shared: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 7,
    }
    if kind == "clip":
        return transformers.CLIPVisionConfig(**shared, image_size=28, projection_dim=16)
    if kind == "mlcd":
        return transformers.MLCDVisionConfig(**shared, image_size=28)
    return transformers.SiglipVisionConfig(**shared, image_size=28, vision_use_head=False)


def text(kind: str, tokenizer: Any, tied: bool = False) -> Any:
    shared: dict[str, Any] = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 48,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "tie_word_embeddings": tied,
    }
    return {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "mistral": transformers.MistralConfig,
    }[kind](**shared)


def write(
    folder: Path, kind: str, *, tower: str = "clip", lm: str = "llama", layer: Any = -2, pil: bool = False, seed: int = 0,
    tied: bool = False, dtype: torch.dtype = torch.float32, **processor: Any,
) -> Any:  # fmt: skip
    """Write a checkpoint with its processor; returns the processor. ``processor`` overrides image processor settings."""
    tokenizer = byte_tokenizer(extra=("<image>",))
    tokenizer.chat_template = None
    tokenizer.image_token = "<image>"
    name = {"llava": "Llava", "llava_next": "LlavaNext", "llava_onevision": "LlavaOnevision"}[kind]
    stats = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3} if tower == "siglip" else {}
    stats = stats or {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    numbers: dict[str, Any] = {
        "vision_config": vision(tower),
        "text_config": text(lm, tokenizer, tied),
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": "full" if tower == "siglip" else "default",
        "image_token_index": tokenizer.convert_tokens_to_ids("<image>"),
        "tie_word_embeddings": tied,
    }
    if kind == "llava":
        images = image_processor("LlavaImageProcessor" if processor.get("do_pad") else "CLIPImageProcessor", pil)
        settings = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    else:
        images = image_processor(f"{name}ImageProcessor", pil)
        numbers["image_grid_pinpoints"] = SIDES if kind == "llava_onevision" else PINPOINTS
        settings = {"size": {"height": 28, "width": 28}, "image_grid_pinpoints": numbers["image_grid_pinpoints"]}
        if kind == "llava_next":
            settings |= {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(getattr(transformers, f"{name}Config")(**numbers))
    with torch.no_grad():  # biases and norms start at 0 and 1, which would hide a mistake
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    options: dict[str, Any] = {"tokenizer": tokenizer, "chat_template": TEMPLATE}
    if kind == "llava_onevision":
        options |= {"num_image_tokens": 16, "video_processor": transformers.LlavaOnevisionVideoProcessor()}
    else:
        options |= {"patch_size": 7, "num_additional_image_tokens": int(tower != "siglip")}
    made = getattr(transformers, f"{name}Processor")(
        image_processor=images(**{**settings, **stats, **processor}),
        vision_feature_select_strategy=numbers["vision_feature_select_strategy"],
        **options,
    )
    made.save_pretrained(folder)
    return made
