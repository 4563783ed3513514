"""Reading protocols on a random convolution whose tokens hold all of their pixels."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from segmentation_fakes import FakeSource, no_progress
from torch.nn import functional as F

from rice_eval.adapters.base import Encoder, EncoderFacts, Tokens
from rice_eval.bank.source import ImageTokens
from rice_eval.datasets.base import IGNORE, Dataset, TextLine
from rice_eval.datasets.scenes_text_set import ScenesText
from rice_eval.datasets.subset import Subset
from rice_eval.datasets.text_crops import TextCrops
from rice_eval.errors import DataError, UsageError
from rice_eval.probes.linear import LinearMap
from rice_eval.protocols.base import Context, configure
from rice_eval.protocols.ocr import CtcLinear
from rice_eval.protocols.ocr_attention import AttnProbe
from rice_eval.protocols.ocr_lines import Charset, group_names, unspellable
from rice_eval.protocols.ocr_mask import TextMask, _rows, boxes_of, probability_map, text_labels
from rice_eval.protocols.ocr_pages import PageScorer, ReadPage, reading_order
from rice_eval.registry import protocols
from rice_eval.views import View


class Strokes(Encoder):
    """Tokens of 8 x 8 pixels: random non-linear features, enough of them to tell strokes apart."""

    def __init__(self, dim: int = 160) -> None:
        generator = torch.Generator().manual_seed(3)
        self.kernel = torch.randn(dim, 3, 8, 8, generator=generator) / 12
        self.shift = torch.randn(dim, 1, 1, generator=generator)
        self.images_seen = 0
        self.facts = EncoderFacts(
            name="strokes", family="fake", arch="fake", params=0, patch=8, resolution=64, layers=1, widths=(dim,),
            strides=(8,), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25),
        )  # fmt: skip

    def _encode(self, images: torch.Tensor, layers: tuple[int, ...], norm: bool) -> Tokens:
        self.images_seen += len(images)
        out = torch.relu(torch.nn.functional.conv2d((images - 0.5) / 0.25, self.kernel, stride=8) + self.shift)
        return Tokens({1: out.flatten(2).transpose(1, 2)}, {1: (out.shape[2], out.shape[3])})

    def to(self, device: torch.device) -> Strokes:
        return self


class Lines(Dataset):
    """The first legible lines of a page set, as one page each is too much for a test."""

    name, split, provides = "lines", "train", frozenset({"text"})

    def __init__(self, base: Dataset, indices: Sequence[int], extra: Sequence[TextLine] = ()) -> None:
        self.base, self.indices, self.extra = base, tuple(indices), tuple(extra)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def fingerprint(self) -> str:
        return f"{self.base.fingerprint}/{self.indices}"

    def image_id(self, index: int) -> str:
        return self.base.image_id(self.indices[index])

    def image(self, index: int) -> Any:
        return self.base.image(self.indices[index])

    def text(self, index: int) -> tuple[TextLine, ...]:
        facts = self.base.line_facts(self.indices[index])
        lines = self.base.text(self.indices[index])
        return (*(line for line, fact in zip(lines, facts) if fact.height_px >= 16 and not fact.clutter), *self.extra)


def context_of(protocol: Any, train: Dataset, test: Dataset, **options: Any) -> Context:
    encoder = Strokes()
    made: dict[tuple[str, str], FakeSource] = {}

    def tokens(split: str, view: str) -> FakeSource:
        if (split, view) not in made:
            base, _, name = split.partition("/")
            dataset = {"train": train, "test": test}[base]
            dataset = protocol.part(name, dataset) if name else dataset
            resolved = view.replace("pad=patch", "pad=8")
            made[split, view] = FakeSource(encoder, dataset, resolved, (1,), protocol.norm)
        return made[split, view]

    return Context(
        facts=encoder.facts, encoder=lambda: encoder, train=train, test=test, tokens=tokens,
        device=torch.device("cpu"), progress=no_progress, **options,
    )  # fmt: skip


class Stripes(Dataset):
    """Dark lines of text 6 px high, 10 px apart, on a light page; where they begin varies."""

    name, split, provides = "stripes", "train", frozenset({"text"})

    def __init__(self, seed: int, count: int) -> None:
        self.starts = np.random.default_rng(seed).integers(0, 8, count)

    @property
    def fingerprint(self) -> str:
        return str(self.starts.tolist())

    def __len__(self) -> int:
        return len(self.starts)

    def image_id(self, index: int) -> str:
        return str(index)

    def size(self, index: int) -> tuple[int, int]:
        return 64, 64

    def image(self, index: int) -> Any:
        image = np.full((64, 64, 3), 230, np.uint8)
        for line in self.text(index):
            (x0, y0), (x1, y1) = line.polygon[0].astype(int), line.polygon[2].astype(int)
            image[y0:y1, x0:x1] = np.random.default_rng(y0).integers(0, 90, (y1 - y0, x1 - x0, 3))
        return image

    def text(self, index: int) -> tuple[TextLine, ...]:
        tops = range(int(self.starts[index]), 58, 10)
        return tuple(TextLine(np.array([(4, y), (60, y), (60, y + 6), (4, y + 6)], float), "a") for y in tops)


@pytest.fixture(scope="module")
def pages() -> Lines:
    return Lines(ScenesText("train", 30, size=256), range(21))


def test_a_head_overfits_32_crops(pages: Lines):
    few = Subset(pages, len(pages))
    protocol = CtcLinear(
        lrs=(1e-2,), wds=(0.0,), steps=500, batch=16, pool="stack", charset="train", height=48, frame=3.0
    )
    found = protocol.run(context_of(protocol, few, few, panels=2, keep_predictions=True))
    total = len(protocol.part("crops", few))
    assert total >= 32
    point = found.statistics.point()
    assert point["word_accuracy"] > 95
    assert point["cer"] < 3
    assert len(found.statistics) <= len(few)
    assert len(found.panels) == 2
    assert set(found.predictions) == {few.image_id(i) for i in range(len(few)) if few.text(i)}
    assert any(name.startswith("height") for name in found.statistics.per_class()["cer"])


def test_charsets_count_what_they_lack(pages: Lines):
    odd = TextLine(np.array([(5, 5), (40, 5), (40, 20), (5, 20)], float), "Ünïque!")
    blank = TextLine(np.array([(5, 5), (40, 5), (40, 20), (5, 20)], float), "", ignore=True)
    train = Lines(pages.base, range(3), (odd, blank))
    protocol = CtcLinear(lrs=(1e-2,), steps=2, batch=4, charset="alnum")
    found = protocol.run(context_of(protocol, train, train, panels=0))
    text = "\n".join(found.warnings)
    assert "3 of" in text
    assert "'ü'" in text
    assert "train: 3 lines are don't-care" in text
    assert "test: 3 of" in text
    charset = Charset.of("alnum", [])
    assert charset.encode("aB-9") == ([11, 12, 10], ["-"])
    assert charset.decode([11, 12, 10]) == "ab9"


def test_sweeps_and_charsets_read_one_pass(pages: Lines):
    train = Lines(pages.base, range(4))
    protocol = CtcLinear(lrs=(1e-3, 1e-2), steps=3, batch=4)
    context = context_of(protocol, train, train, panels=0)
    found = protocol.run(context)
    seen = context.encoder().images_seen
    assert len(found.heads) == 2
    other = dataclasses.replace(protocol, charset="alnum", beam=4)
    other.run(dataclasses.replace(context))
    assert context.encoder().images_seen == seen == 2 * len(protocol.part("crops", train))
    assert protocol.hash != other.hash
    assert protocol.part("crops", train) is other.part("crops", train)


@pytest.mark.parametrize("name", ["ctc-linear", "text-mask", "read-page"])
def test_settings_are_checked(name: str):
    kind = protocols.get(name)
    protocol = configure(kind, {"view": "square=64"})
    assert protocol.hash == configure(kind, {"view": "square=64"}).hash
    assert protocol.hash != configure(kind, {"view": "square=64", "steps": 7}).hash
    if name != "text-mask":
        with pytest.raises(Exception, match="charset"):
            configure(kind, {"view": "square=64", "charset": "klingon"})


def test_labels_of_lines():
    box = np.array([(2, 2), (12, 2), (12, 8), (2, 8)], float)
    labels = text_labels([TextLine(box, "a"), TextLine(box + 10, "", ignore=True)], (30, 30))
    assert (labels == 1).sum() == 60
    assert labels[3, 3] == 1
    assert labels[2, 2] == 1
    assert labels[8, 3] == 0
    assert labels[15, 15] == IGNORE
    thin = text_labels([TextLine(box, "a")], (30, 30), shrink=0.25)
    assert (thin == 1).sum() == 30
    assert (thin == 0).sum() == 870


def test_boxes_of_a_map():
    probability = np.zeros((40, 60), np.float32)
    probability[5:11, 10:40] = 0.9
    probability[20:26, 10:30] = 0.7
    probability[35, 35] = 1
    polygons, scores = boxes_of(probability, 0.5, 4, 0.0)
    assert scores == pytest.approx([0.9, 0.7])
    assert np.allclose(polygons[0], [(10, 5), (40, 5), (40, 11), (10, 11)])
    grown, _ = boxes_of(probability, 0.5, 4, 0.5)
    assert np.allclose(grown[0], [(7, 2), (43, 2), (43, 14), (7, 14)])


@pytest.mark.parametrize(("join", "grow"), [(0.7, 0.25), (2.0, 0.0), (0.3, 1.0)])
def test_rows_of_many_parts_are_those_of_all_pairs(join: float, grow: float):
    rng = np.random.default_rng(7)
    corners = rng.integers(0, 90, (120, 2))
    boxes = [(int(x), int(y), int(x + w), int(y + h)) for (x, y), (w, h) in zip(corners, rng.integers(1, 9, (120, 2)))]
    near = np.eye(len(boxes), dtype=np.bool_)
    for i, (_, top, right, bottom) in enumerate(boxes):
        for j, (left, other_top, _, other_bottom) in enumerate(boxes):
            heights = (bottom - top, other_bottom - other_top)
            shared = min(bottom, other_bottom) - max(top, other_top)
            gap = left - right - grow * sum(heights)
            alike = shared > 0.5 * min(heights) and max(heights) < 2 * min(heights)
            if boxes[i][0] <= left and alike and gap <= join * min(heights) * (1 + 2 * grow):
                near[i, j] = near[j, i] = True
    for _ in range(7):  # Reaches the whole of a chain of 128.
        near = near @ near
    expected = {tuple(np.flatnonzero(row)) for row in near}
    assert {tuple(sorted(row)) for row in _rows(boxes, join, grow)} == expected
    assert 1 < len(expected) < len(boxes)
    assert _rows([], join, grow) == []


def test_a_map_full_of_specks_is_joined_in_seconds():
    corners = np.random.default_rng(0).integers(0, 1400, (20_000, 2))
    boxes = [(int(x), int(y), int(x) + 2, int(y) + 2) for x, y in corners]
    start = time.process_time()
    rows = _rows(boxes, 0.7, 0.25)
    assert time.process_time() - start < 20  # All pairs in Python take minutes.
    assert sorted(k for row in rows for k in row) == list(range(len(boxes)))


def test_words_of_a_row_are_joined_into_a_line():
    probability = np.zeros((60, 120), np.float32)
    probability[5:11, 4:20] = 0.9  # three words of a line, 5 px apart, one of them a pixel lower
    probability[6:12, 25:40] = 0.6
    probability[5:11, 45:60] = 0.9
    probability[5:11, 80:90] = 0.9  # the next column, 20 px on
    probability[13:19, 4:60] = 0.9  # the next line, 1 px below
    probability[30:50, 62:80] = 0.9  # a large word, and small print beside its foot
    probability[44:50, 84:95] = 0.9
    apart, _ = boxes_of(probability, 0.5, 4, 0.0)
    assert len(apart) == 7
    polygons, scores = boxes_of(probability, 0.5, 4, 0.0, join=1.0)
    boxes = {(*p.min(axis=0).astype(int).tolist(), *p.max(axis=0).astype(int).tolist()) for p in polygons}
    assert boxes == {(4, 5, 60, 12), (80, 5, 90, 11), (4, 13, 60, 19), (62, 30, 80, 50), (84, 44, 95, 50)}
    assert min(scores) == pytest.approx((16 * 0.9 + 15 * 0.6 + 15 * 0.9) / 46)


def test_cells_of_a_token_have_a_map_of_their_own():
    """The map of a head with cells equals a transposed convolution of the tokens with its weights."""
    rng = np.random.default_rng(0)
    head = LinearMap(torch.randn(5, 3 * 3 * 2), torch.randn(18))
    frame = View.parse("square=36").apply(rng.integers(0, 255, (36, 48, 3), dtype=np.uint8), (0, 0, 0))[0][1]
    tokens = ImageTokens(0, (frame,), {1: (torch.randn(12, 5),)}, {1: ((3, 4),)}, None)
    got, area = probability_map(head, tokens, 1, 0.0)
    patches = tokens.patches[1][0].T.reshape(1, 5, 3, 4)
    kernel = head.weight.reshape(5, 3, 3, 2).permute(0, 3, 1, 2)
    both = F.conv_transpose2d(patches, kernel, stride=3) + head.bias.reshape(3, 3, 2).permute(2, 0, 1).repeat(1, 3, 4)
    one = F.interpolate((both[:, 1:] - both[:, :1]), size=frame.size, mode="bilinear")
    want = F.interpolate(one, size=frame.image_size, mode="bilinear").sigmoid()[0, 0]
    assert np.allclose(got, want.numpy(), atol=1e-5)
    assert area == pytest.approx((36 / 9) ** 2 / (frame.scale[0] * frame.scale[1]))


def test_labels_finer_than_tokens_separate_close_lines():
    """Lines 10 px apart on tokens of 8: one value a token sees one region, cells see every line."""
    found = []
    for cell in (0.0, 2.0):
        settings = {
            "cell": cell,
            "smooth": 0,
            "min_tokens": 1,
            "lrs": (1e-2,),
            "wds": (0.0,),
            "thin": True,
            "grow": 0.5,
        }
        protocol = configure(TextMask, {"view": "square=64", **settings})
        outcome = protocol.run(context_of(protocol, Stripes(0, 24), Stripes(1, 8), panels=0))
        found.append(outcome.statistics.point()["hmean"])
    assert found[0] < 50 < 90 < found[1]


def test_reading_order_and_page_scores():
    def box(x: float, y: float) -> np.ndarray:
        return np.array([(x, y), (x + 20, y), (x + 20, y + 8), (x, y + 8)], float)

    assert reading_order([box(50, 1), box(0, 20), box(0, 0), box(30, 22)]) == [2, 0, 1, 3]
    data = Lines(ScenesText("val", 1, size=128), [0])
    scorer = PageScorer(data, 1, True)
    truth = [TextLine(box(0, 0), "Hello"), TextLine(box(50, 1), "big"), TextLine(box(0, 40), "", ignore=True)]
    scorer.add(0, truth, [box(50, 1), box(0, 1), box(0, 40)], ["bag", "hello", "junk"])
    statistics, panels = scorer.finish()
    point = statistics.point()
    assert point["cer"] == pytest.approx(100 / len("Hello big"))
    assert point["wer"] == pytest.approx(50)
    assert point["spotting"] == pytest.approx(50)
    assert point["hmean"] == pytest.approx(100)
    assert len(panels) == 1


def test_text_mask_finds_and_read_page_reads(pages: Lines):
    train, test = Lines(pages.base, range(8)), Lines(pages.base, range(6, 10))
    mask = TextMask(view="square=256", lrs=(1e-2,), wds=(1e-2,), steps=80, batch=4)
    found = mask.run(context_of(mask, train, test, panels=2))
    point = found.statistics.point()
    assert point["text_iou"] > 2  # half of what is drawn is not labelled
    assert 0 <= point["hmean"] <= 100
    assert len(found.panels) == 2
    page = ReadPage(view="square=256", mask_lrs=(1e-2,), lrs=(1e-2,), mask_steps=40, steps=5, batch=4)
    context = context_of(page, train, test, panels=1, keep_predictions=True)
    read = page.run(context)
    assert set(read.statistics.point()) == {"cer", "wer", "spotting", "hmean", "precision", "recall"}
    assert read.forwards == sum(len(p.polygons) for p in read.predictions.values())


def test_groups_are_in_order():
    names = ["height 10 px", "height 5 px", "turn <2 deg", "turn 7-15 deg", "height >=48 px", "on photo", "length 1-3"]
    assert group_names(names)[:3] == ["height 5 px", "height 10 px", "height >=48 px"]


def test_attention_learns_what_it_is_shown(pages: Lines):
    train = Lines(pages.base, range(8))
    protocol = AttnProbe(lrs=(3e-3,), steps=150, batch=16, length=8, charset="train", width=64, height=48)
    found = protocol.run(context_of(protocol, train, train, panels=0))
    assert found.statistics.point()["one_minus_ned"] > 60
    assert not found.panels


def test_fine_tokens_are_averaged():
    """A line that shows as dots of single fine tokens is one region after averaging, several before."""
    (frame,) = View.parse("native").frames(56, 112)
    patches = torch.full((28 * 56, 1), -1.0)
    patches.view(28, 56)[10:14, 8:48:3] = 4.0
    tokens = ImageTokens(0, (frame,), {1: (patches,)}, {1: ((28, 56),)})
    head = LinearMap(torch.tensor([[0.0, 1.0]]), torch.zeros(2))
    fine, area = probability_map(head, tokens, 1, 0.0)
    assert area == pytest.approx(4)
    assert len(boxes_of(fine, 0.5, area / 2, 0.0)[0]) > 5
    assert np.isfinite(probability_map(head, tokens, 1, 1e30)[0]).all()  # as wide as the map at most
    smooth, area = probability_map(head, tokens, 1, 6.0)
    assert area == pytest.approx(36)
    assert len(boxes_of(smooth, 0.4, area / 2, 0.0)[0]) == 1


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("ctc-linear", "seed", "-1"), ("text-mask", "seed", "-1"), ("region-tokens", "seed", "-1"), ("ctc-linear", "frame", "nan"), ("ctc-linear", "frame", "inf"), ("ctc-linear", "margin", "nan"),
        ("ctc-linear", "max_aspect", "inf"), ("ctc-linear", "lrs", "0.1,-1"), ("ctc-linear", "lrs", "nan"),
        ("ctc-linear", "wds", "-1"), ("ctc-linear", "betas", "1,1"), ("ctc-linear", "norm_eps", "nan"),
        ("attn-probe", "lrs", "0"), ("attn-probe", "wd", "nan"), ("attn-probe", "margin", "inf"),
        ("text-mask", "smooth", "inf"), ("text-mask", "min_tokens", "nan"), ("text-mask", "lrs", "nan"),
        ("read-page", "mask_lrs", "-1"), ("read-page", "frame", "nan"),
        ("region-tokens", "ridges", "1,nan"), ("zero-shot-words", "margin", "nan"),
        ("zero-shot-words", "prompt", "{} {0"), ("zero-shot-words", "prompt", "{{}}"), ("zero-shot-words", "prompt", "{word} {}"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_usage_errors(name: str, field: str, value: str):
    with pytest.raises(UsageError, match=f"protocol '{name}'"):
        configure(protocols.get(name), {"view": "square=64", field: value})


class Written(Dataset):
    """One blank image with the lines given."""

    name, split, provides, fingerprint = "written", "val", frozenset({"text"}), "0"

    def __init__(self, *lines: TextLine) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return 1

    def image_id(self, index: int) -> str:
        return "page"

    def image(self, index: int) -> Any:
        return np.zeros((30, 60, 3), np.uint8)

    def text(self, index: int) -> tuple[TextLine, ...]:
        return self.lines


def box(width: float, height: float) -> np.ndarray:
    return np.array([[1, 1], [1 + width, 1], [1 + width, 1 + height], [1, 1 + height]], dtype=np.float64)


def test_capitals_that_a_charset_never_writes_are_counted():
    crops = TextCrops(Written(TextLine(box(40, 9), "Abc"), TextLine(box(40, 9), "abc"), TextLine(box(9, 9), "a-b")), 32)
    assert unspellable(crops, Charset.of("alnum-case", [])) == (
        "test: 1 of 3 lines have characters outside the charset 'alnum-case'",
    )
    outside, capitals = unspellable(crops, Charset.of("alnum", []))
    assert "1 of 3 lines have characters outside" in outside
    assert "1 of 3 lines have capitals" in capitals


@pytest.mark.parametrize("kind", [CtcLinear, AttnProbe])
def test_no_legible_line_is_one_sentence(kind: Any, pages: Lines):
    blank = Written(TextLine(box(40, 9), "", True))
    for train, test, what in ((pages, blank, "test"), (blank, pages, "training")):
        with pytest.raises(DataError, match=rf"split 'val': no {what} image has a legible line \(1 are don't-care"):
            kind(steps=1).run(context_of(kind(), train, test))


def test_a_polygon_far_larger_than_its_image_is_named():
    crops = TextCrops(Written(TextLine(box(40, 9), "fine"), TextLine(box(3e6, 9e6), "broken")), 32)
    assert crops.image(0).shape[0] == 32
    with pytest.raises(
        DataError, match=r"page-0001: the polygon of 'broken' is 3000000 x 9000000 pixels, its image 60 x 30"
    ):
        crops.image(1)
