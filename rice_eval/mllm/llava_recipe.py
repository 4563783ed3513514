"""``llava-next``: the two stages RICE's group trained its multimodal models in, as data.

Numbers are those of the group's own scripts for LLaVA-NeXT (github.com/deepglint/unicom, ``mlcd_vl/scripts/pretrain_mlcd.sh``
and ``finetune_mlcd.sh``; batch = GPUs x entries a GPU x accumulation); what the scripts leave to their Trainer (AdamW's betas
and eps, gradient norm) are the defaults of transformers' ``TrainingArguments``. The paper (arXiv 2507.20025) prints none of it.
LoRA's are those of LLaVA-1.5 (github.com/haotian-liu/LLaVA, ``scripts/v1_5/finetune_lora.sh`` and ``llava/train/train.py``).
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from rice_eval.errors import UsageError

__all__ = ["PARTS", "STAGE1", "STAGE2", "STAGE2_LORA", "Recipe"]

Part = Literal["tower", "projector", "newline", "lm", "lm-lora"]
PARTS: tuple[Part, ...] = ("tower", "projector", "newline", "lm", "lm-lora")


_MOST_RATE = 1e3  # far above any that trains; beyond it float32 overflows


@dataclass(frozen=True)
class Recipe:
    """Everything of a training that changes its result, besides model and data.

    Attributes:
        name: for people.
        tuned: parts whose weights change; everything else is frozen. A tuned tower never ranks with a frozen one.
        lr: peak learning rate.
        tower_lr, projector_lr: of these parts; None for ``lr``.
        weight_decay: AdamW's.
        warmup: share of the steps with a rising rate; afterwards half a cosine down to 0.
        epochs: walks over the data.
        batch: entries a step, over all processes and portions.
        max_length: positions of an entry; what is longer is cut at its end.
        grouped: see ``llava_data.batches``.
        plain: see ``Example.plain``.
        betas, eps: AdamW's.
        clip: largest norm of all gradients together.
        bf16: whether products run in bfloat16 (weights stay in float32).
        seed: of the order of the data and of LoRA's first weights and dropout.
        lora_rank, lora_alpha, lora_dropout: on every linear map of the language model but its head.
    """

    name: str
    tuned: tuple[Part, ...]
    lr: float
    batch: int
    max_length: int
    tower_lr: float | None = None
    projector_lr: float | None = None
    weight_decay: float = 0.0
    warmup: float = 0.03
    epochs: int = 1
    grouped: bool = False
    plain: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clip: float = 1.0
    bf16: bool = True
    seed: int = 42
    lora_rank: int = 128
    lora_alpha: int = 256
    lora_dropout: float = 0.05

    def __post_init__(self) -> None:
        strange = [p for p in self.tuned if p not in PARTS]
        if strange or not self.tuned or len(set(self.tuned)) != len(self.tuned):
            raise UsageError(
                f"recipe '{self.name}' tunes {', '.join(self.tuned) or 'nothing'}", f"parts are {', '.join(PARTS)}"
            )
        if "lm" in self.tuned and "lm-lora" in self.tuned:
            raise UsageError(f"recipe '{self.name}' tunes the language model both in full and by LoRA", "choose one")
        rates = [rate for rate in (self.lr, self.tower_lr, self.projector_lr) if rate is not None]
        sizes = (self.batch, self.max_length, self.epochs, self.clip, self.eps, self.lora_rank, self.lora_alpha)
        fits = (
            all(0 < rate <= _MOST_RATE for rate in rates),
            all(0 < size < math.inf for size in sizes),
            0 <= self.weight_decay <= _MOST_RATE,
            all(0 <= share < 1 for share in (self.warmup, self.lora_dropout, *self.betas)),
            len(self.betas) == 2,
            0 <= self.seed < 1 << 63,
        )
        if not all(fits):
            raise UsageError(
                f"recipe '{self.name}' has a number that can't be",
                "rates, sizes and counts are above 0 and finite, weight_decay and the seed not below 0, betas two numbers below 1",
            )

    def rate(self, step: int, steps: int) -> float:
        """Factor on the learning rates at ``step`` (from 0) of ``steps``, as transformers' ``cosine`` schedule."""
        warm = math.ceil(self.warmup * steps)
        if step < warm:
            return step / max(1, warm)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))

    def facts(self) -> dict[str, Any]:
        """Every field as JSON values; LoRA's only where it is used."""
        told = json.loads(json.dumps(asdict(self)))
        if "lm-lora" not in self.tuned:
            told = {k: v for k, v in told.items() if not k.startswith("lora_")}
        return dict(told)

    def hash(self) -> str:
        """sha256 of ``facts`` without the name."""
        told = {k: v for k, v in self.facts().items() if k != "name"}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


#: blip_laion_cc_sbu_558k, one epoch: 8 GPUs x 16.
STAGE1 = Recipe("llava-next-stage1", ("projector",), lr=1e-3, batch=128, max_length=8192, plain=True)

#: LLaVA-NeXT 780k, one epoch: 8 GPUs x 2 x 8; ``mm_language_model`` there covers ``image_newline``.
STAGE2 = Recipe(
    "llava-next-stage2",
    ("tower", "projector", "newline", "lm"),
    lr=1e-5,
    tower_lr=2e-6,
    batch=128,
    max_length=32768,
    grouped=True,
)

#: The same data with a frozen tower and LoRA on the language model, for one GPU.
STAGE2_LORA = Recipe(
    "llava-next-stage2-lora",
    ("projector", "newline", "lm-lora"),
    lr=2e-4,
    projector_lr=2e-5,
    batch=128,
    max_length=32768,
    grouped=True,
)
