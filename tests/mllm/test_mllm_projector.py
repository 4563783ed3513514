"""Projectors: shapes, blocks, and files that come back as they were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rice_eval.errors import CheckpointError, UsageError
from rice_eval.mllm.projector import KINDS, Projector


@given(kind=st.sampled_from(KINDS), h=st.integers(1, 7), w=st.integers(1, 7), tiles=st.integers(1, 3))
def test_shapes(kind, h, w, tiles):
    module = Projector.new(kind, 6, 10)
    rows, cols = module.grid_out((h, w))
    assert module(torch.randn(tiles, h * w, 6), (h, w)).shape == (tiles, rows * cols, 10)
    assert (rows, cols) == ((h + 1) // 2, (w + 1) // 2) if module.merges else (h, w)


def test_a_merged_block_sees_its_four_tokens_and_no_other():
    for kind in ("pixel-shuffle", "2x2-merge"):
        module = Projector.new(kind, 4, 8)
        tokens = torch.randn(1, 24, 4, requires_grad=True)  # 4 x 6
        module(tokens, (4, 6))[0, 4].sum().backward()  # second row of blocks, second column
        seen = tokens.grad[0].abs().sum(-1).reshape(4, 6).nonzero().tolist()
        assert seen == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_the_merger_is_llava_onevision_15s():
    # ln_q of every token, the four of a block one after the other, linear, exact gelu, linear
    module = Projector.new("2x2-merge", 4, 8)
    tokens = torch.randn(1, 16, 4)
    maps = torch.nn.functional.layer_norm(tokens, (4,), module.norm.weight, module.norm.bias).reshape(4, 4, 4)
    block = torch.cat([maps[2, 0], maps[2, 1], maps[3, 0], maps[3, 1]])
    first, _, second = module.layers
    want = second(torch.nn.functional.gelu(first(block)))
    torch.testing.assert_close(module(tokens, (4, 4))[0, 2], want)


def test_pixel_shuffle_puts_channels_as_torch_does():
    module = Projector.new("pixel-shuffle", 4, 8)
    tokens = torch.randn(2, 16, 4)
    packed = torch.nn.functional.pixel_unshuffle(tokens.reshape(2, 4, 4, 4).permute(0, 3, 1, 2), 2)
    want = module.layers(module.norm(packed.flatten(2).transpose(1, 2)))
    torch.testing.assert_close(module(tokens, (4, 4)), want)


def test_seeds_and_the_global_generator():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b, c = (Projector.new("mlp2x_gelu", 4, 8, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(a.layers[0].weight, b.layers[0].weight)
    assert not torch.equal(a.layers[0].weight, c.layers[0].weight)


@pytest.mark.parametrize("kind", KINDS)
def test_files_come_back(kind, tmp_path):
    module = Projector.new(kind, 6, 10, seed=4)
    module.save(tmp_path / "a" / "p.safetensors")
    again = Projector.load(tmp_path / "a" / "p.safetensors", 6, 10)
    tokens = torch.randn(2, 9, 6)
    assert torch.equal(again(tokens, (3, 3)), module(tokens, (3, 3)))
    again.save(tmp_path / "q.safetensors")
    assert (tmp_path / "q.safetensors").read_bytes() == (tmp_path / "a" / "p.safetensors").read_bytes()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["p.safetensors"]


def test_another_width_names_both(tmp_path):
    path = tmp_path / "p.safetensors"
    Projector.new("linear", 6, 10).save(path)
    with pytest.raises(CheckpointError, match=r"takes tokens of width 6, the encoder's have 7"):
        Projector.load(path, 7, 10)
    with pytest.raises(CheckpointError, match=r"gives embeddings of width 10, the language model's have 12"):
        Projector.load(path, 6, 12)
    with pytest.raises(UsageError, match="width 5 for a projector that takes 6"):
        Projector.load(path)(torch.zeros(1, 4, 5), (2, 2))
    with pytest.raises(UsageError, match="no grid"):
        Projector.load(path)(torch.zeros(1, 4, 6), (3, 2))


def test_files_that_are_none(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "p.safetensors"
    with pytest.raises(CheckpointError, match="can't be read"):
        Projector.load(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no projector"):
        Projector.load(path)
    Projector.new("linear", 6, 10).save(path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(CheckpointError, match="can't be read"):
        Projector.load(path)
    with pytest.raises(UsageError, match="no projector is called"):
        Projector.new("resampler", 6, 10)
