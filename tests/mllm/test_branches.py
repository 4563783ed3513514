"""Questions as branches behind one image: each is learned from as if it had been asked alone."""

from __future__ import annotations

import pytest
import torch

from rice_eval import load_encoder
from rice_eval.errors import PlanError, UsageError
from rice_eval.mllm.branches import Branches
from rice_eval.mllm.bundle import assemble
from rice_eval.mllm.conversation import Encoded, Example, Turn
from rice_eval.mllm.lm import LanguageModel, tiny_random
from rice_eval.mllm.probe import PooledProjector
from rice_eval.mllm.vqa import TEMPLATE

SIDE = 3


def _model(template: str = TEMPLATE):
    encoder = load_encoder("rgb-moments")
    lm = tiny_random()
    projector = PooledProjector(encoder.facts.widths[0], lm.width, SIDE, 16, 4, seed=1)
    tokens = [torch.randn(SIDE * SIDE, encoder.facts.widths[0]) for _ in range(3)]
    projector.start(tokens, lm.word_size(), lm.words([5, 6]))
    return assemble(encoder, lm, projector, (1,), False, "square=224", template), tokens


def _visit(tokens: torch.Tensor, *said: tuple[str, str]) -> list[Example]:
    image = Encoded(tokens, (SIDE, SIDE))
    return [Example((Turn("user", q), Turn("assistant", a)), (image,)) for q, a in said]


def _visits(tokens: list[torch.Tensor]) -> list[list[Example]]:
    return [
        _visit(tokens[0], ("Is there a dog?", "Yes"), ("What does the sign say?", "a rather long answer"), ("2?", "2")),
        _visit(tokens[1], ("What colour is the bird?", "Red")),
        _visit(tokens[2], ("Is there a cat?", "No"), ("How many?", "3")),
    ]


def test_loss_and_gradients_are_those_of_questions_asked_alone():
    mllm, tokens = _model()
    visits = _visits(tokens)
    questions = [example for visit in visits for example in visit]

    def gradients(loss: torch.Tensor) -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss, list(mllm.projector.parameters())))

    alone = torch.stack([mllm.loss([example]) for example in questions]).mean()
    branches = Branches(mllm)
    together = branches.loss(visits)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    for a, b in zip(gradients(together), gradients(alone)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    # What stands before the image is read once and not changed by use.
    torch.testing.assert_close(branches.loss(visits), alone, rtol=1e-5, atol=1e-6)


def test_images_without_words_before_them():
    plain = "{% for m in messages %}{{ m['content'] + '\\n' }}{% endfor %}"
    mllm, tokens = _model(plain)
    visits = _visits(tokens)
    alone = torch.stack([mllm.loss([example]) for visit in visits for example in visit]).mean()
    torch.testing.assert_close(Branches(mllm).loss(visits), alone, rtol=1e-5, atol=1e-6)


def test_different_words_before_the_image_are_refused():
    mllm, tokens = _model()
    visit = _visit(tokens[0], ("Look: <image> Is there a dog?", "Yes"), ("See: <image> Is there a cat?", "No"))
    with pytest.raises(UsageError, match="same words before the image"):
        Branches(mllm).loss([visit])


def test_what_is_longer_than_the_context_is_refused():
    mllm, tokens = _model()
    with pytest.raises(PlanError, match="has room for"):
        Branches(mllm).loss([_visit(tokens[0], ("x" * 20_000, "Yes"))])


def _other(kind: str, **changes: object) -> LanguageModel:
    """A tiny random language model of another class, with the tests' own tokenizer."""
    import transformers

    small = tiny_random()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(small.tokenizer), **{**sizes, **changes})
    torch.manual_seed(0)
    return LanguageModel(kind, transformers.AutoModelForCausalLM.from_config(config).float(), small.tokenizer, "drawn")


def _probe(lm: LanguageModel):
    encoder = load_encoder("rgb-moments")
    projector = PooledProjector(encoder.facts.widths[0], lm.width, SIDE, 16, 4, seed=1)
    tokens = torch.randn(SIDE * SIDE, encoder.facts.widths[0])
    projector.start([tokens], lm.word_size(), lm.words([5, 6]))
    mllm = assemble(encoder, lm, projector, (1,), False, "square=224")
    return mllm, _visit(tokens, ("Is there a dog?", "Yes"), ("What does the sign say?", "open"), ("How many?", "2"))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma"])
def test_language_models_with_positions_and_a_cache_pass(kind: str):
    mllm, visit = _probe(_other(kind, num_key_value_heads=2, **({"head_dim": 16} if kind == "Gemma" else {})))
    Branches(mllm).check(visit)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 300}, "sees 300 positions back"),
        ("Mamba", {}, "takes no position_ids"),
    ],
)
def test_language_models_that_can_not_read_branches_are_refused(kind: str, changes: dict[str, object], match: str):
    mllm, visit = _probe(_other(kind, **changes))
    with pytest.raises(PlanError, match=match):
        Branches(mllm).check(visit)


def test_words_are_as_large_as_the_language_model_reads_them():
    """Gemma scales its embeddings after the look-up."""
    for kind, factor in (("Llama", 1.0), ("Gemma", 8.0)):
        lm = _other(kind, num_key_value_heads=2, **({"head_dim": 16} if kind == "Gemma" else {}))
        table = lm.model.get_input_embeddings().weight
        torch.testing.assert_close(lm.word_size(), factor * table.square().mean().sqrt(), rtol=1e-2, atol=0)
        torch.testing.assert_close(lm.words([3, 4]), factor * table[[3, 4]], rtol=1e-2, atol=1e-6)
