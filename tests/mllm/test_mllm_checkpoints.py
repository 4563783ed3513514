"""Published layouts: our parts against transformers' own class, on checkpoints it wrote itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_mllm import picture, processor_of, write  # noqa: E402

from rice_eval.errors import CheckpointError  # noqa: E402
from rice_eval.mllm.checkpoints import load  # noqa: E402
from rice_eval.mllm.conversation import Request  # noqa: E402

FOUR = transformers.__version__.startswith("4.")
five = pytest.mark.skipif(FOUR, reason="speaks of names and files as transformers 5 writes them")
SIZES = [(40, 40), (100, 30), (31, 97), (57, 91), (13, 9), (200, 190), (500, 17)]
PROMPT = "USER: <image>\nWhat is on the table? ASSISTANT:"
CASES = {
    "llava": {"kind": "llava"},
    "llava-pil": {"kind": "llava", "pil": True},
    "llava-padded": {"kind": "llava", "do_pad": True},
    "llava-two-layers": {"kind": "llava", "layer": [-2, 1]},
    "llava-mlcd": {"kind": "llava", "tower": "mlcd", "lm": "qwen2"},
    "llava-siglip": {"kind": "llava", "tower": "siglip", "layer": -1},
    "next": {"kind": "llava_next"},
    "next-pil": {"kind": "llava_next", "pil": True},
    "next-mistral": {"kind": "llava_next", "lm": "mistral", "layer": 2},
    "next-mlcd": {"kind": "llava_next", "tower": "mlcd", "lm": "qwen2", "tied": True},
    "onevision": {"kind": "llava_onevision", "tower": "siglip", "lm": "qwen2", "layer": -1, "tied": True},
    "onevision-pil": {"kind": "llava_onevision", "tower": "siglip", "lm": "qwen2", "layer": -2, "pil": True},
}


@pytest.fixture(scope="module", params=CASES, ids=list(CASES))
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    if FOUR and CASES[request.param].get("tower") == "mlcd":
        pytest.skip("transformers 4 can't read the MLCD configuration it wrote inside another")
    made = write(folder, **CASES[request.param])
    pil = CASES[request.param].get("pil", False)
    processor = processor_of(folder, made, pil)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(folder).eval()
    return load(folder, scaler="pil" if pil else "torchvision"), reference, processor


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_logits_are_those_of_transformers(pair, size):
    ours, reference, processor = pair
    image = picture(*size)
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        want = reference(**inputs).logits[0]
    got = ours.logits(Request(PROMPT, (image,), raw=True))
    assert got.shape == want.shape
    assert want.std() > 0.05  # a model that says nothing would agree with anything
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_greedy_answers_are_those_of_transformers_batched_and_not(pair):
    ours, reference, processor = pair
    images = [picture(*size, seed=n) for n, size in enumerate(SIZES)]
    prompts = [PROMPT.replace("table", "table" * (n % 3 + 1)) for n in range(len(images))]
    want = []
    for image, prompt in zip(images, prompts):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        inputs.pop("token_type_ids", None)
        said = reference.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs.input_ids.shape[1] :]
        want.append(said.tolist())
    requests = [Request(p, (i,), raw=True) for p, i in zip(prompts, images)]
    # A random model with tied embeddings repeats its last word for ever, and one of those that transformers 4 draws looks at no image.
    alike = FOUR or reference.config.text_config.tie_word_embeddings
    assert alike or len({tuple(w) for w in want}) > 1
    assert ours.tokens(requests, 12, 1) == want
    assert ours.tokens(requests, 12, 3) == want
    assert ours.tokens(requests, 12, len(requests)) == want


def test_the_processors_chat_template_is_used(pair):
    ours, _, processor = pair
    image = picture(60, 41)
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How many?"}]}]
    text = processor.apply_chat_template(talk, add_generation_prompt=True)
    want = ours.logits(Request(text, (image,), raw=True))
    for prompt in ("How many?", "<image>\nHow many?"):
        assert torch.equal(ours.logits(Request(prompt, (image,))), want)


def test_without_an_image_the_language_model_speaks_alone(pair):
    ours, reference, processor = pair
    inputs = processor.tokenizer("USER: Hello. ASSISTANT:", return_tensors="pt")
    with torch.no_grad():
        want = reference(**inputs).logits[0]
    torch.testing.assert_close(ours.logits(Request("USER: Hello. ASSISTANT:", raw=True)), want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("case", ["next", "onevision", "llava"])
def test_several_images_in_one_request(case, tmp_path):
    processor = processor_of(tmp_path, write(tmp_path, **CASES[case]))
    reference = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    images = [picture(90, 40), picture(33, 71, seed=1)]
    prompt = "USER: <image>\nand <image>\nare they alike? ASSISTANT:"
    inputs = processor(images=[images], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        want = reference(**inputs).logits[0]
    ours = load(tmp_path)
    torch.testing.assert_close(ours.logits(Request(prompt, tuple(images), raw=True)), want, atol=1e-4, rtol=0)
    # The same image alone is another matter (OneVision cuts it into tiles then): nothing may be mixed up in what is kept.
    alone = Request("USER: <image>\nWhat? ASSISTANT:", (images[0],), raw=True)
    inputs = processor(images=images[0], text=alone.prompt, return_tensors="pt")
    with torch.no_grad():
        want = reference(**inputs).logits[0]
    torch.testing.assert_close(ours.logits(alone), want, atol=1e-4, rtol=0)


def test_a_siglip_whose_patches_do_not_fill_its_side(tmp_path, monkeypatch):
    # SigLIP at 384 px with patches of 14: 27 of them, 6 px of every tile are seen by nobody.
    import tiny_mllm

    usual = tiny_mllm.vision("siglip")
    usual.image_size = 31
    monkeypatch.setattr(tiny_mllm, "vision", lambda kind: usual)
    pinpoints = [[31 * a, 31 * b] for a in range(1, 4) for b in range(1, 4)]
    monkeypatch.setattr(tiny_mllm, "SIDES", pinpoints)
    made = write(tmp_path, "llava_onevision", tower="siglip", lm="qwen2", layer=-1, size={"height": 31, "width": 31})
    processor = processor_of(tmp_path, made)
    reference = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    image = picture(83, 40)
    inputs = processor(images=image, text=PROMPT, return_tensors="pt")
    with torch.no_grad():
        want = reference(**inputs).logits[0]
    ours = load(tmp_path)
    assert ours.facts()["pixels_unseen"] == 3
    torch.testing.assert_close(ours.logits(Request(PROMPT, (image,), raw=True)), want, atol=1e-4, rtol=0)


@pytest.fixture
def next_folder(tmp_path) -> Path:
    write(tmp_path, "llava_next")
    return tmp_path


def _change(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@five
@pytest.mark.parametrize(
    "key",
    [
        "image_newline",
        "multi_modal_projector.linear_2.bias",
        "language_model.model.layers.1.mlp.up_proj.weight",
        "language_model.model.embed_tokens.weight",
        "vision_tower.encoder.layers.1.mlp.fc2.weight",
        "vision_tower.encoder.layers.2.mlp.fc2.weight",
    ],
)
def test_missing_keys_are_named(next_folder, key):
    _change(next_folder, lambda t: t.pop(key))
    with pytest.raises(CheckpointError) as caught:
        load(next_folder)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key", ["stranger.weight", "language_model.model.extra", "multi_modal_projector.linear_3.weight"]
)
def test_unexpected_keys_are_named(next_folder, key):
    _change(next_folder, lambda t: t.update({key: torch.zeros(3)}))
    with pytest.raises(CheckpointError, match=key.split(".", 1)[1].replace(".", r"\.")):
        load(next_folder)


def test_shapes_that_differ_are_named(next_folder):
    _change(next_folder, lambda t: t.update({"multi_modal_projector.linear_1.weight": torch.zeros(48, 31)}))
    with pytest.raises(CheckpointError, match=r"linear_1\.weight is \[48, 31\]"):
        load(next_folder)


def test_nan_is_refused(next_folder):
    def spoil(tensors):
        tensors["language_model.model.norm.weight"][3] = float("nan")

    _change(next_folder, spoil)
    with pytest.raises(CheckpointError, match="NaN"):
        load(next_folder)


@five
@pytest.mark.parametrize(
    ("file", "change", "match"),
    [
        ("config.json", {"model_type": "bert"}, "model_type = bert"),
        ("config.json", {"vision_feature_select_strategy": "full"}, "class token"),
        ("config.json", {"vision_feature_layer": 0}, "no block"),
        ("config.json", {"vision_feature_layer": -9}, "layers 1 to 3"),
        ("config.json", {"image_grid_pinpoints": [[28, 28]]}, "image_grid_pinpoints"),
        ("config.json", {"vision_config": {"model_type": "pixtral"}}, "pixtral"),
        ("processor_config.json", {"crop_size": {"height": 42, "width": 42}}, "several sides"),
        ("processor_config.json", {"resample": 0}, "method 0"),
        ("processor_config.json", {"do_normalize": False}, "do_normalize"),
    ],
)
def test_what_does_not_fit_is_one_line(next_folder, file, change, match):
    path = next_folder / file
    told = json.loads(path.read_text())
    (told["image_processor"] if file.startswith("processor") else told).update(change)
    path.write_text(json.dumps(told))
    with pytest.raises(Exception, match=match) as caught:
        load(next_folder)
    assert hasattr(caught.value, "fix")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError):
        load(tmp_path)
    with pytest.raises(CheckpointError):
        load(tmp_path / "nothing" / "here" / "at-all")


def test_weights_keep_their_type_unless_told(tmp_path):
    write(tmp_path, "llava_next", dtype=torch.bfloat16)
    ours = load(tmp_path)
    assert ours.facts()["lm"]["dtype"] == "bfloat16"
    assert load(tmp_path, dtype=torch.float32).facts()["lm"]["dtype"] == "float32"
    assert ours.generate([Request("What?", (picture(50, 70),))], 4)


@five
def test_names_of_transformers_4_and_of_the_module_itself_load_too(next_folder):
    want = load(next_folder)
    image = picture(77, 40)
    logits = want.logits(Request("What?", (image,)))
    stems = {"vision_tower.": "vision_tower.vision_model."}
    _change(next_folder, lambda t: _rename(t, stems))
    again = load(next_folder)
    assert torch.equal(again.logits(Request("What?", (image,))), logits)
    assert again.fingerprint() == want.fingerprint()
    stems = {
        "language_model.lm_head.": "lm_head.",
        "language_model.model.": "model.language_model.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "image_newline": "model.image_newline",
    }
    _change(next_folder, lambda t: _rename(t, stems))
    assert torch.equal(load(next_folder).logits(Request("What?", (image,))), logits)


def _rename(tensors, stems):
    for old in list(tensors):
        stem = next((s for s in stems if old.startswith(s)), None)
        if stem is not None:
            tensors[stems[stem] + old[len(stem) :]] = tensors.pop(old)
