"""Tiles and their packing, against transformers' own functions and processors at every size that hypothesis thinks of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

pytest.importorskip("transformers")

from tiny_mllm import CLIP_MEAN, image_processor, picture
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next import modeling_llava_next as next_code
from transformers.models.llava_onevision import modeling_llava_onevision as onevision_code
from transformers.models.qwen2_vl.image_processing_qwen2_vl import smart_resize

from rice_eval.errors import DataError, UsageError
from rice_eval.mllm.scaling import smart_size
from rice_eval.mllm.tiling import (
    NEXT_SHAPES,
    Tiling,
    best_pinpoint,
    open_image,
    pack,
    read_image,
    scaled_size,
    unpadded,
)

SIDE = 28
NEXT = tuple((r * SIDE, c * SIDE) for r, c in NEXT_SHAPES)
SQUARES = tuple((r * SIDE, c * SIDE) for r in range(1, 7) for c in range(1, 7))
sizes = st.tuples(st.integers(1, 3000), st.integers(1, 3000)).filter(lambda s: max(s) <= 200 * min(s))
# From 4 px: below, the reference takes a side for the channels.
small = st.tuples(st.integers(4, 160), st.integers(4, 160))


@given(
    size=sizes, pinpoints=st.sampled_from([NEXT, SQUARES, ((84, 28), (28, 28)), ((336, 672), (672, 336), (672, 672))])
)
def test_best_pinpoint_and_scaled_size(size, pinpoints):
    best = best_pinpoint(size, pinpoints)
    assert best == select_best_resolution(size, [list(p) for p in pinpoints])
    blank = np.zeros((3, *size), dtype=np.uint8)
    assert scaled_size(size, best) == get_patch_output_size(blank, best, ChannelDimension.FIRST)


@given(size=sizes, grid=st.tuples(st.integers(1, 96), st.integers(1, 96)))
def test_unpadding(size, grid):
    tokens = torch.arange(grid[0] * grid[1]).reshape(1, *grid)
    rows, cols = unpadded(grid, size)
    assert torch.equal(tokens[:, rows, cols], next_code.unpad_image(tokens, size))


@given(size=small, scaler=st.sampled_from(["pil", "torchvision"]), seed=st.integers(0, 3))
def test_tiles_are_the_processors(size, scaler, seed):
    image = picture(size[1], size[0], seed=seed)
    reference = image_processor("LlavaNextImageProcessor", scaler == "pil")(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[list(p) for p in NEXT],
        do_normalize=False,
    )
    want = torch.as_tensor(np.asarray(reference(image, return_tensors="pt").pixel_values[0]))
    tiling = Tiling("anyres", SIDE, pinpoints=NEXT, scaler=scaler)
    got = tiling.cut(image, 7, (0.5, 0.5, 0.5))
    assert got.size == size
    torch.testing.assert_close(got.pixels, want.float(), atol=1e-6, rtol=0)


@given(size=small, scaler=st.sampled_from(["pil", "torchvision"]), mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1"]))
def test_centre_crops_are_the_processors(size, scaler, mode):
    image = picture(size[1], size[0], mode=mode)
    reference = image_processor("CLIPImageProcessor", scaler == "pil")(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_normalize=False
    )
    want = torch.as_tensor(np.asarray(reference(image, return_tensors="pt").pixel_values[0])).float()
    got = Tiling("single", SIDE, "crop", scaler=scaler).cut(image, 7, (0.5, 0.5, 0.5)).pixels[0]
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


class _Model:
    """What transformers' packing reads of a model."""

    def __init__(self, pinpoints, patch):
        vision = type("V", (), {"image_size": SIDE, "patch_size": patch})
        self.config = type("C", (), {"vision_config": vision, "image_grid_pinpoints": [list(p) for p in pinpoints]})


@given(size=sizes, newline=st.booleans(), patch=st.sampled_from([4, 7, 14]))
def test_packing_of_llava_next(size, newline, patch):
    h = SIDE // patch
    count = next_code.image_size_to_num_patches(size, [list(p) for p in NEXT], SIDE)
    tokens = torch.randn(count, h * h, 5, generator=torch.Generator().manual_seed(0))
    line = torch.ones(5) if newline else None
    want, _ = next_code.LlavaNextModel.pack_image_features(_Model(NEXT, patch), [tokens], [size], "default", line)
    assert torch.equal(pack(tokens, (h, h), Tiling.anyres(SIDE), size, line), want[0])


@given(size=sizes, max_tiles=st.sampled_from([1, 2, 4, 9]))
def test_packing_of_onevision(size, max_tiles):
    count = next_code.image_size_to_num_patches(size, [list(p) for p in SQUARES], SIDE)
    tokens = torch.randn(count, 16, 5, generator=torch.Generator().manual_seed(0))
    want, _ = onevision_code.LlavaOnevisionModel.pack_image_features(
        _Model(SQUARES, 7), [tokens], [size], torch.ones(5), f"anyres_max_{max_tiles}"
    )
    got = pack(tokens, (4, 4), Tiling.anyres(SIDE, SQUARES, max_tiles), size, torch.ones(5))
    torch.testing.assert_close(got, want[0], atol=1e-6, rtol=0)


@given(size=sizes)
def test_smart_sizes_are_qwens(size):
    for most in (12845056, 28 * 28 * 1280, 28 * 28 * 16):
        assert smart_size(size, 28, (3136, most)) == tuple(smart_resize(*size, 28, 3136, most))


def test_the_default_pinpoints_are_llava_nexts():
    # llava-v1.6's config.json, and unicom's finetune_mlcd.sh at 448 px
    assert set(Tiling.anyres(336).pinpoints) == {(336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)}
    assert set(Tiling.anyres(448).pinpoints) == {(448, 896), (896, 448), (896, 896), (1344, 448), (448, 1344)}


def test_single_views_are_the_banks():
    from rice_eval.views import View

    image = picture(90, 61)
    for text in ("square=56", "letterbox=56", "native,pad=14", "short=42,pad=14"):
        frame, _ = View.parse(text).apply(np.asarray(image), fill=tuple(round(255 * m) for m in CLIP_MEAN))[0]
        got = Tiling.single(text).cut(image, 14, tuple(CLIP_MEAN)).pixels
        assert torch.equal(got, torch.from_numpy(frame).permute(2, 0, 1)[None].float() / 255)


def test_facts_tell_all_that_differs():
    ways = [
        Tiling.single("square=56"),
        Tiling.single("square=28"),
        Tiling.anyres(28),
        Tiling.anyres(28, max_tiles=9),
        Tiling.anyres(28, ((28, 28),)),
        Tiling("single", 28, "crop"),
        Tiling("single", 28, "crop", scaler="torchvision"),
        Tiling("single", 28, "pad"),
        Tiling("single", 28, "squash"),
        Tiling("single", 28, "smart", pixel_range=(1, 9000)),
        Tiling("single", 28, "smart", pixel_range=(1, 90000)),
    ]
    assert len({str(w.facts()) for w in ways}) == len(ways)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Tiling.single("slide=3,short=9"),
        lambda: Tiling.single("nonsense"),
        lambda: Tiling.anyres(28, ()),
        lambda: Tiling.anyres(28, ((28, 30),)),
        lambda: Tiling.anyres(28, ((0, 28),)),
    ],
)
def test_tilings_that_can_not_be(make):
    with pytest.raises(UsageError):
        make()


def test_images_the_tiler_can_not_open_are_one_line(tmp_path):
    picture(200, 200).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "words.png").write_text("words")
    lazy = Image.open(tmp_path / "cut.jpg")
    for make, name in (
        (lambda: open_image(tmp_path / "cut.jpg"), "cut.jpg"),
        (lambda: open_image(tmp_path / "words.png"), "words.png"),
        (lambda: open_image(tmp_path / "none.png"), "none.png"),
        (lambda: read_image(lazy), "cut.jpg"),
        (lambda: read_image(Image.new("RGB", (2000, 3))), "2000 x 3"),
        (lambda: read_image(Image.new("RGB", (0, 3))), "0 x 3"),
    ):
        with pytest.raises(DataError, match=name) as caught:
            make()
        assert "\n" not in str(caught.value)
        assert caught.value.fix


def test_tokens_of_another_tiling_are_refused():
    tokens = torch.zeros(3, 16, 5)
    with pytest.raises(UsageError, match="3 tiles"):
        pack(tokens, (4, 4), Tiling.anyres(28), (100, 100), None)
    with pytest.raises(UsageError, match="3 tiles"):
        pack(tokens, (4, 4), Tiling.single("square=28"), (100, 100), None)
    with pytest.raises(UsageError, match="size"):
        pack(tokens, (4, 4), Tiling.anyres(28), None, None)
