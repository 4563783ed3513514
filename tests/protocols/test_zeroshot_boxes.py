"""Boxes against texts: equal to a direct computation with tiny random CLIP and SigLIP, files of proposals, odd boxes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from segmentation_fakes import context_of
from test_detection import Odd, Squares
from test_region_protocols import Named, TextEncoder
from torch.nn import functional as F
from torchvision.ops import batched_nms, roi_align

from rice_eval.datasets.base import Instances
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.metrics.coco import Found, ap_statistics
from rice_eval.protocols.base import configure
from rice_eval.protocols.detection import image_truth
from rice_eval.protocols.proposals import candidates_of, read_proposals
from rice_eval.protocols.zeroshot_boxes import ReferBoxes, ZeroShotBoxes

sys.path.insert(0, str(Path(__file__).parent.parent / "adapters"))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny random CLIP with its tokenizer, as the library saves it, through our adapter."""
    transformers = pytest.importorskip("transformers")
    from tiny_models import TEXT, VISION, randomise, save_tokenizer

    from rice_eval.adapters import load_encoder

    folder = tmp_path_factory.mktemp("clip")
    config = transformers.CLIPConfig(
        text_config=TEXT, vision_config={**VISION, "patch_size": 7, "image_size": 28, "projection_dim": 16},
        projection_dim=16,
    )  # fmt: skip
    randomise(transformers.CLIPModel(config)).save_pretrained(folder)
    save_tokenizer(folder)
    return load_encoder("clip-vit-b-16-openai", weights=folder)


def named_scores(x, texts):
    return (100.0 * (F.normalize(x, dim=1) @ texts.T).double()).softmax(dim=1)


def direct(encoder, data, tokens, how):
    """AP of annotated boxes, box by box, from the encoder's own parts."""
    texts = torch.cat([encoder.embed_text([name]) for name in data.things])
    truth, found = [], []
    for index in range(len(data)):
        t = image_truth(data, index)
        height, width = data.size(index)
        rows = []
        for x1, y1, x2, y2 in t.boxes:
            if how == "crop":
                side = encoder.facts.resolution
                part = Image.fromarray(data.image(index)[int(y1) : int(y2), int(x1) : int(x2)])
                pixels = np.asarray(part.resize((side, side), Image.Resampling.BICUBIC))
                rows.append(encoder.embed_image(torch.tensor(pixels).permute(2, 0, 1)[None].float() / 255)[0])
            else:
                layer = encoder.facts.layers
                h, w = tokens[index].grids[layer][0]
                grid = tokens[index].patches[layer][0].float().T.reshape(1, -1, h, w)
                box = torch.tensor([[x1 / width * w, y1 / height * h, x2 / width * w, y2 / height * h]]).float()
                rows.append(encoder.project_tokens(roi_align(grid, [box], 1, aligned=True).flatten(1))[0])
        scores = named_scores(torch.stack(rows), texts).numpy()
        n, c = scores.shape
        boxes, labels = np.repeat(t.boxes, c, axis=0), np.tile(np.arange(c), n)
        truth.append(t)
        found.append(Found(boxes, scores.reshape(-1), labels))
    return ap_statistics([data.image_id(i) for i in range(len(data))], truth, found, data.things).point()


@pytest.mark.parametrize("how", ["roialign", "crop"])
def test_a_tiny_clip_equals_a_direct_computation(clip, how):
    data = Squares("test", 8)
    protocol = ZeroShotBoxes(view="square=56", how=how)
    context = context_of(protocol, data, data, clip, panels=3)
    outcome = protocol.run(context)
    reader = None if how == "crop" else context.tokens("test", "square=56").reader()
    assert outcome.statistics.point() == pytest.approx(direct(clip, data, reader, how), abs=1e-6, nan_ok=True)
    boxes = sum(len(data.instances(i).labels) for i in range(8))
    assert outcome.forwards == (boxes if how == "crop" else 0)
    assert len(outcome.panels) == 3
    assert set(protocol.views()) == (set() if how == "crop" else {"test"})


def test_a_siglip_names_cut_outs_and_says_what_it_lacks(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tiny_models import TEXT, VISION, randomise, save_tokenizer

    from rice_eval.adapters import load_encoder

    config = transformers.SiglipConfig(
        text_config={**TEXT, "projection_size": 32}, vision_config={**VISION, "patch_size": 7, "image_size": 28}
    )
    randomise(transformers.SiglipModel(config)).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    encoder = load_encoder("siglip-vit-b-16-224", weights=tmp_path)
    data = Squares("test", 4)
    protocol = ZeroShotBoxes(view="square=56", how="crop")
    outcome = protocol.run(context_of(protocol, data, data, encoder))
    assert outcome.statistics.point() == pytest.approx(direct(encoder, data, None, "crop"), abs=1e-6, nan_ok=True)
    pooled = ZeroShotBoxes(view="square=56")
    with pytest.raises(PlanError, match="no linear map"):
        pooled.run(context_of(pooled, data, data, encoder))


def test_a_region_head_names_boxes():
    data = Squares("test", 6)
    encoder = TextEncoder()
    protocol = ZeroShotBoxes(view="square=112", how="prompter")
    outcome = protocol.run(context_of(protocol, data, data, encoder))
    assert np.isfinite(outcome.statistics.point()["ap"])


def proposals(path: Path, data: Squares) -> None:
    rng = np.random.default_rng(0)
    rows = []
    for index in range(len(data)):
        for box in data.instances(index).boxes:
            for _ in range(3):
                x1, y1, x2, y2 = box + rng.normal(0, 2, 4)
                entry = {"image_id": data.image_id(index), "bbox": [x1, y1, x2 - x1, y2 - y1], "category_id": 1}
                rows.append({**entry, "score": float(rng.uniform(0.1, 1))})
    rows.append({**rows[0], "score": 0.01})  # equal boxes are one
    rows.append({**rows[0], "image_id": "elsewhere"})
    path.write_text(json.dumps(rows))


def test_proposals_of_a_file_are_suppressed_and_weighed(clip, tmp_path):
    data, file = Squares("test", 5), tmp_path / "proposals.json"
    proposals(file, data)
    protocol = ZeroShotBoxes(view="square=56", proposals=str(file))
    context = context_of(protocol, data, data, clip, keep_predictions=True)
    outcome = protocol.run(context)
    texts = clip.embed_text(list(data.things))
    given = read_proposals(str(file), data, 300)
    assert [len(given[data.image_id(i)].boxes) for i in range(5)] == [
        3 * len(data.instances(i).labels) for i in range(5)
    ]
    reader = context.tokens("test", "square=56").reader()
    for index in range(5):
        name = data.image_id(index)
        boxes, own = given[name].boxes, given[name].scores
        height, width = data.size(index)
        layer = clip.facts.layers
        h, w = reader[index].grids[layer][0]
        grid = reader[index].patches[layer][0].float().T.reshape(1, -1, h, w)
        cut = boxes.clip(0, [width, height, width, height]) / [width, height, width, height]
        scaled = torch.from_numpy(cut).float() * torch.tensor([w, h, w, h])
        x = clip.project_tokens(roi_align(grid, [scaled], 1, aligned=True).flatten(1))
        scores = (named_scores(x, texts) * torch.from_numpy(own)[:, None]).sqrt()
        flat, label = scores.flatten(), torch.arange(3).repeat(len(boxes))
        repeated = torch.from_numpy(boxes).repeat_interleave(3, 0)
        keep = batched_nms(repeated.float(), flat.float(), label, 0.5)
        assert outcome.predictions[name].scores == pytest.approx(flat[keep].numpy(), abs=1e-6)
        assert outcome.predictions[name].boxes == pytest.approx(repeated[keep].numpy())


def test_the_hash_holds_what_the_file_holds(tmp_path):
    data = Squares("test", 2)
    a, b, c = tmp_path / "a.json", tmp_path / "b.json", tmp_path / "c.json"
    proposals(a, data)
    b.write_bytes(a.read_bytes())
    proposals(c, Squares("test", 3))
    hashes = [ZeroShotBoxes(view="square=56", proposals=str(p)).hash for p in (a, b, c)]
    assert hashes[0] == hashes[1] != hashes[2]
    assert ZeroShotBoxes(view="square=56").hash not in hashes
    assert str(a) not in json.dumps(ZeroShotBoxes(view="square=56", proposals=str(a)).settings())


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[1]",
        "[" * 99999,
        '[{"image_id": "test000", "bbox": [5, 5, -1, 1]}]',
        '[{"image_id": "x"}]',
        "no",
        '[{"image_id": "test000", "bbox": [0, 0, 1, 1], "score": 7}]',
    ],
    ids=["object", "number", "deep", "negative", "no box", "no json", "score"],
)
def test_a_broken_file_is_named(tmp_path, text):
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(DataError, match=r"bad\.json: (not a file of proposals|no proposal)"):
        read_proposals(str(file), Squares("test", 2), 10)
    with pytest.raises(UsageError, match="none.json: can't be read"):
        configure(ZeroShotBoxes, {"view": "square=56", "proposals": str(tmp_path / "none.json")})


def test_boxes_without_area_are_left_out_and_said_so():
    data = Odd("test", 2)
    protocol = ZeroShotBoxes(view="square=112", how="prompter")
    outcome = protocol.run(context_of(protocol, data, data, TextEncoder()))
    assert any("4 of 8 boxes have no area" in w for w in outcome.warnings)


class Spoken(Named):
    """Two sentences of the first object and none of the others."""

    def instances(self, index: int) -> Instances:
        full = super().instances(index)
        rows = np.zeros(2, np.int64)
        return Instances(
            full.boxes[rows], full.labels[rows], None, full.crowd[rows], full.area[rows], np.array([7, 8]),
            ("red", "the red one"),
        )  # fmt: skip


@pytest.mark.parametrize("how", ["roialign", "crop", "prompter"])
def test_sentences_pick_the_nearest_box(how, tmp_path):
    data, encoder = Spoken("test", 10), TextEncoder()
    file = tmp_path / "p.json"
    proposals(file, Squares("test", 10))
    protocol = ReferBoxes(view="square=112", how=how, proposals=str(file))
    context = context_of(protocol, data, data, encoder)
    outcome = protocol.run(context)
    given = read_proposals(str(file), data, 300)
    hits = 0
    sentences = encoder.embed_text(["red", "the red one"])
    for index in range(10):
        boxes = given[data.image_id(index)].boxes
        own = replace_boxes(data, index, boxes)
        x = features(encoder, context, data, own, index, how)
        for sentence, box in zip(sentences, data.instances(index).boxes):
            best = boxes[int((F.normalize(x, dim=1) @ sentence).argmax())]
            inside = np.prod((np.minimum(best[2:], box[2:]) - np.maximum(best[:2], box[:2])).clip(0))
            union = np.prod(best[2:] - best[:2]) + np.prod(box[2:] - box[:2]) - inside
            hits += inside / union >= 0.5
    assert outcome.statistics.point()["accuracy"] == pytest.approx(100 * hits / 20)
    assert outcome.chosen["expressions"] == 20
    assert 0 < outcome.chosen["chance"] <= 100


def replace_boxes(data, index, boxes):
    n = len(boxes)
    return replace(
        data.instances(index), boxes=boxes, labels=np.zeros(n, int), crowd=np.zeros(n, bool), area=np.ones(n),
        ids=np.arange(n), names=None,
    )  # fmt: skip


def features(encoder, context, data, own, index, how):
    from rice_eval.protocols.regions import regions_of
    from rice_eval.views import View

    frames = View.parse("native" if how == "crop" else "square=112").frames(*data.size(index))
    region = regions_of(data, index, frames, False, encoder.facts.resolution if how == "crop" else 0, own)
    if how == "crop":
        return encoder.embed_image(torch.from_numpy(region.crops).permute(0, 3, 1, 2).float() / 255)
    tokens = context.tokens("test", "square=112").reader()[index]
    grid = tokens.patches[2][0].float().T.reshape(1, -1, *tokens.grids[2][0])
    unit = torch.from_numpy(region.boxes).float()
    if how == "prompter":
        from rice_eval.adapters.base import Tokens

        here = Tokens({2: tokens.patches[2][0].float()[None]}, {2: tokens.grids[2][0]})
        return encoder.region_features(here, [unit])[0]
    scale = torch.tensor([grid.shape[3], grid.shape[2]] * 2)
    return encoder.project_tokens(roi_align(grid, [unit * scale], 1, aligned=True).flatten(1))


def test_candidates_are_the_annotated_objects_once_each():
    data = Spoken("test", 1)
    assert len(candidates_of(data, 0).boxes) == 1
    assert len(candidates_of(Squares("test", 3), 1).boxes) == len(Squares("test", 3).instances(1).boxes)


def test_sets_without_sentences_and_encoders_without_a_way_are_refused():
    data = Squares("test", 2)
    protocol = ReferBoxes(view="square=112", how="prompter")
    with pytest.raises(DataError, match="no sentences"):
        protocol.run(context_of(protocol, data, data, TextEncoder()))
    with pytest.raises(UsageError, match="how 'mask' is not one of"):
        configure(ReferBoxes, {"view": "square=112", "how": "mask"})
    with pytest.raises(UsageError, match="templates"):
        configure(ZeroShotBoxes, {"view": "square=112", "templates": "a photo"})
