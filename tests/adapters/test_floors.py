"""The floors: what they compute, and that they are the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rice_eval.adapters import load_encoder
from rice_eval.adapters.vit import PlainViT
from rice_eval.errors import PlanError, UsageError


def test_moments_are_numpys() -> None:
    encoder = load_encoder("rgb-moments")
    images = torch.rand(2, 3, 28, 42, generator=torch.Generator().manual_seed(1))
    tokens = encoder.encode(images)
    assert tokens.grids == {1: (2, 3)}
    assert tokens.last.shape == (2, 6, 6)
    tile = images[1, :, 14:28, 28:42].numpy().reshape(3, -1)
    expected = np.concatenate([tile.mean(1), tile.std(1)])
    np.testing.assert_allclose(tokens.last[1, 5].numpy(), expected, atol=1e-6)


def test_random_vit_leaves_the_global_generator_alone_and_is_the_same_twice() -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    first, second = load_encoder("random-vit-s-14"), load_encoder("random-vit-s-14")
    assert torch.equal(torch.rand(4), expected)
    assert first.fingerprint == second.fingerprint
    images = torch.rand(1, 3, 56, 70)
    a, b = first.encode(images, range(1, 13)), second.encode(images, range(1, 13))
    assert all(torch.equal(a.patches[k], b.patches[k]) for k in range(1, 13))


def test_random_vit_fingerprint_is_pinned() -> None:
    # The draws are exact in floating point, so every machine and version must build these very weights.
    assert load_encoder("random-vit-s-14").fingerprint == (
        "5a7c422d65f5794fbff349698e390b87e0513b61d207ca2ab26d997381b4a2ec"
    )


def test_plain_vit_equals_timms() -> None:
    timm_vit = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    reference = timm_vit.VisionTransformer(
        img_size=56, patch_size=14, embed_dim=48, depth=3, num_heads=3, num_classes=0, init_values=1.0, qkv_bias=True
    ).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    plain = PlainViT(dim=48, depth=3, heads=3, patch=14, grid=4, layer_scale=True).eval()
    plain.load_state_dict(reference.state_dict(), strict=True)
    images = torch.randn(2, 3, 56, 56)
    with torch.inference_mode():
        for norm in (True, False):
            expected = reference.forward_intermediates(images, norm=norm, output_fmt="NLC", intermediates_only=True)
            got, grid = plain(images, (1, 2, 3), norm)
            assert grid == (4, 4)
            for k in (1, 2, 3):
                torch.testing.assert_close(got[k][:, 1:], expected[k - 1], atol=1e-6, rtol=0)


def test_early_layers_do_not_depend_on_the_depth_asked_for() -> None:
    encoder = load_encoder("random-vit-s-14")
    images = torch.rand(1, 3, 28, 56)
    assert torch.equal(encoder.encode(images, [3]).last, encoder.encode(images, [3, -1]).patches[3])


def test_refusals() -> None:
    with pytest.raises(UsageError, match="no weights to replace"):
        load_encoder("rgb-moments", weights="x.pt")
    with pytest.raises(PlanError, match="multiples of 14"):
        load_encoder("rgb-moments").encode(torch.rand(1, 3, 30, 28))
