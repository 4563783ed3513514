"""Questions as branches behind one image: each is learned from as if it had been asked alone."""

from __future__ import annotations

import pytest
import torch

from rice_eval import load_encoder
from rice_eval.errors import PlanError, UsageError
from rice_eval.mllm.branches import Branches
from rice_eval.mllm.bundle import assemble
from rice_eval.mllm.conversation import Encoded, Example, Turn
from rice_eval.mllm.lm import tiny_random
from rice_eval.mllm.probe import PooledProjector
from rice_eval.mllm.vqa import TEMPLATE

SIDE = 3


def _model(template: str = TEMPLATE):
    encoder = load_encoder("rgb-moments")
    lm = tiny_random()
    projector = PooledProjector(encoder.facts.widths[0], lm.width, SIDE, 16, 4, seed=1)
    tokens = [torch.randn(SIDE * SIDE, encoder.facts.widths[0]) for _ in range(3)]
    projector.start(tokens, lm.model.get_input_embeddings().weight, [5, 6])
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
