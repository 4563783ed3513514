"""LLaVA-OneVision-1.5: transformers holds no class of it, so its parts are put together here, from transformers' own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import transformers
from tiny_mllm import CLIP_MEAN, CLIP_STD, picture
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))
from rice_layouts import canonical, onevision

from rice_eval.errors import CheckpointError
from rice_eval.mllm.checkpoints import load
from rice_eval.mllm.conversation import Request
from rice_eval.mllm.lm import byte_tokenizer

PATCH, WIDTH, TEXT = 7, 32, 48
VISION = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "patch_size": PATCH,
}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}"
    "{{ c['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Parts:
    """The model's parts as transformers' classes and a merger written out."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.words = byte_tokenizer(extra=("<|vision_start|>", "<|vision_end|>", "<|image_pad|>"))
        self.words.chat_template = TEMPLATE
        self.tower = transformers.MLCDVisionModel(transformers.MLCDVisionConfig(**VISION, image_size=42)).eval()
        text = transformers.Qwen3Config(
            vocab_size=len(self.words), hidden_size=TEXT, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=4096,
            eos_token_id=self.words.eos_token_id, tie_word_embeddings=False,
        )  # fmt: skip
        self.lm = transformers.Qwen3ForCausalLM(text).eval()
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-5)
        self.first, self.second = torch.nn.Linear(4 * WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, TEXT)
        with torch.no_grad():
            for module in (self.tower, self.norm, self.lm):
                for parameter in module.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        tensors = onevision(canonical(self.tower), merger=False, prefix="model.visual.")
        for stem, module in (("ln_q", self.norm), ("mlp.0", self.first), ("mlp.2", self.second)):
            tensors |= {f"model.visual.merger.{stem}.{n}": t.detach() for n, t in module.state_dict().items()}
        for name, tensor in self.lm.state_dict().items():
            tensors[name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name] = tensor
        folder.mkdir(exist_ok=True)
        save_file({n: t.contiguous().clone() for n, t in tensors.items()}, folder / "model.safetensors")
        vision = {"depth": 3, "embed_dim": WIDTH, "hidden_size": WIDTH, "intermediate_size": 64, "num_heads": 4}
        vision |= {"patch_size": PATCH, "spatial_merge_size": 2, "text_hidden_size": TEXT, "layer_norm_eps": 1e-5}
        config = {
            "model_type": "llavaonevision1_5",
            "image_token_id": self.words.convert_tokens_to_ids("<|image_pad|>"),
            "vision_config": {**vision, "model_type": "rice_vit", "hidden_act": "gelu"},
            "text_config": {**text.to_dict(), "model_type": "LLaVAOneVision1_5_text"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        told = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "min_pixels": 14 * 14 * 4, "max_pixels": 14 * 14 * 30}
        (folder / "preprocessor_config.json").write_text(
            json.dumps({**told, "image_processor_type": "Qwen2VLImageProcessor"})
        )
        self.words.save_pretrained(folder)

    def logits(self, image, text: str) -> torch.Tensor:
        size = smart_resize(image.height, image.width, 2 * PATCH, 14 * 14 * 4, 14 * 14 * 30)
        planes = torch.from_numpy(np.asarray(image)).permute(2, 0, 1)
        from torchvision.transforms.v2 import InterpolationMode, functional

        scaled = functional.resize(planes, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
        pixels = (scaled / 255 - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None]
        seen = self.tower(pixel_values=pixels[None]).last_hidden_state[0, 1:]
        rows, cols = size[0] // PATCH, size[1] // PATCH
        order = [
            (2 * r + dr) * cols + 2 * c + dc
            for r in range(rows // 2)
            for c in range(cols // 2)
            for dr in (0, 1)
            for dc in (0, 1)
        ]
        merged = self.second(torch.nn.functional.gelu(self.first(self.norm(seen[order]).view(-1, 4 * WIDTH))))
        before, after = text.split("<|image_pad|>")
        table = self.lm.get_input_embeddings()
        pieces = [table(torch.tensor(self.words(t, add_special_tokens=False).input_ids)) for t in (before, after)]
        return self.lm(inputs_embeds=torch.cat([pieces[0], merged, pieces[1]])[None]).logits[0]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision15")
    return folder, Parts(folder)


@pytest.mark.parametrize("size", [(40, 40), (120, 33), (20, 97), (9, 9), (300, 280)])
def test_logits_are_those_of_the_parts(made, size):
    folder, parts = made
    ours = load(folder)
    image = picture(*size)
    with torch.no_grad():
        text = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What?<|im_end|>\n<|im_start|>assistant\n"
        want = parts.logits(image, text)
    for prompt in ("What?", "<image>What?"):
        torch.testing.assert_close(ours.logits(Request(prompt, (image,))), want, atol=1e-4, rtol=0)
    asked = [Request("What?", (image,)), Request("Who is it?", (picture(60, 30),))]
    assert ours.tokens(asked, 5, 2) == ours.tokens(asked, 5, 1)


def test_a_tower_without_its_last_block_or_merger_is_refused(made, tmp_path):
    folder, _ = made
    tensors = load_file(folder / "model.safetensors")
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    for match, gone in ((r"blocks\.2", "visual.blocks.2."), (r"merger\.mlp\.2\.bias", "merger.mlp.2.bias")):
        save_file({n: t for n, t in tensors.items() if gone not in n}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            load(tmp_path)
