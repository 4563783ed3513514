"""Region protocols: pooling equal to torchvision's, odd boxes, choices, and texts against a direct computation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from segmentation_fakes import FakeEncoder, context_of
from test_detection import Odd, Squares
from torch.nn import functional as F
from torchvision.ops import roi_align

from rice_eval.adapters.base import Tokens
from rice_eval.datasets.base import Instances
from rice_eval.errors import DataError, PlanError, UsageError
from rice_eval.metrics.regions import RegionStatistics
from rice_eval.metrics.statistics import RatioStatistics
from rice_eval.protocols.base import configure
from rice_eval.protocols.regions import regions_of
from rice_eval.protocols.regions_probe import RegionKnn, RegionLinear
from rice_eval.protocols.regions_text import ClocRegion, RegionRetrieval, recall_hits
from rice_eval.views import View


class TextEncoder(FakeEncoder):
    """A fake with every ability: texts are hashed to directions, regions are their mean tokens through a fixed map."""

    def __init__(self) -> None:
        super().__init__()
        self.facts = replace(self.facts, abilities=("text", "image", "regions"))
        self.map = torch.randn(9, 5, generator=torch.Generator().manual_seed(1))
        self.cropped = 0

    def project_tokens(self, tokens):
        return tokens @ self.map

    def embed_text(self, texts):
        rows = [torch.randn(5, generator=torch.Generator().manual_seed(sum(map(ord, t)))) for t in texts]
        return F.normalize(torch.stack(rows), dim=1)

    def embed_image(self, images):
        self.cropped += len(images)
        return F.normalize(self.encode(images).last.mean(dim=1) @ self.map, dim=1)

    def region_features(self, tokens: Tokens, boxes):
        out = []
        for patches, mine in zip(tokens.last, boxes):
            out.append(torch.stack([patches.mean(dim=0) * (1 + b.sum()) for b in mine]) @ self.map)
        return out


@pytest.mark.parametrize("view", ["square=112", "letterbox=84", "short=56,slide=28", "long=84,pad=14,flip"])
def test_pooled_features_equal_torchvisions_on_the_token_grid(view):
    protocol = RegionKnn(view=view, ks=(1,))
    data = Squares("train", 4)
    context = context_of(protocol, data, data)
    found = protocol.collect(context, "train", (2,)).found
    reader = context.tokens("train", view).reader()
    x = found.features("roialign", 2)
    row = 0
    for index in range(4):
        tokens = reader[index]
        region = regions_of(data, index, tokens.frames, False, 0)
        for k, box in zip(region.frame, region.boxes):
            h, w = tokens.grids[2][k]
            grid = tokens.patches[2][k].float().T.reshape(1, -1, h, w)
            # In cells: RoIAlign takes one sample a cell that a box spans, rounded up, so that a rounding error would count.
            cells = torch.from_numpy(box[None]).float() * torch.tensor([w, h, w, h])
            want = roi_align(grid, [cells], 1, spatial_scale=1.0, sampling_ratio=0, aligned=True)
            torch.testing.assert_close(x[row], want.flatten(), atol=1e-4, rtol=1e-4)
            row += 1
    assert row == len(x)


@pytest.mark.parametrize("view", ["square=112", "letterbox=84", "native", "square=112,flip"])
def test_whole_views_map_boxes_to_1e_minus_4(view):
    data = Squares("train", 3)
    for index in range(3):
        frames = View.parse(view).frames(*data.size(index))
        region = regions_of(data, index, frames, False, 0)
        height, width = frames[0].size
        back = frames[0].boxes_back(region.boxes * (width, height, width, height))
        np.testing.assert_allclose(back, data.instances(index).boxes, atol=1e-4)


def test_boxes_without_area_or_outside_are_left_out_and_said_so():
    data = Odd("train", 2)
    protocol = RegionKnn(view="square=112", ks=(1,))
    outcome = protocol.run(context_of(protocol, data, data))
    assert any("4 of 8 test regions have no area" in w for w in outcome.warnings)
    region = regions_of(data, 0, View.parse("square=112").frames(*data.size(0)), False, 0)
    assert region.which.tolist() == [2, 3]  # the single pixel stays: RoIAlign samples it
    assert region.dropped == 2


def test_a_split_without_regions_is_refused():
    class Crowds(Squares):
        def instances(self, index: int) -> Instances:
            full = super().instances(index)
            return replace(full, crowd=np.ones(len(full.labels), bool))

    protocol = RegionKnn(view="square=112")
    with pytest.raises(DataError, match="no region to score"):
        protocol.run(context_of(protocol, Crowds("train", 2), Squares("test", 2)))


@pytest.mark.parametrize("kind", [RegionLinear, RegionKnn])
@pytest.mark.parametrize("control", [False, True])
def test_colours_are_recognised(kind, control):
    protocol = kind(view="square=112", layer_set="all", control=control)
    encoder = FakeEncoder()
    context = context_of(protocol, Squares("train", 24), Squares("test", 12), encoder)
    outcome = protocol.run(context)
    assert isinstance(outcome.statistics, RegionStatistics)
    point = outcome.statistics.point()
    assert point["macc"] > 90
    assert ("macc_crop" in point) == control
    if control:
        assert point["macc_crop"] > 90
        assert outcome.forwards == sum(
            len(d.instances(i).labels) for d in (context.train, context.test) for i in range(len(d))
        )
    best = [h for h in outcome.heads if h.settings["features"] == "roialign"]
    assert max(h.score for h in best) == next(
        h.score for h in best if all(outcome.chosen[k] == v for k, v in h.settings.items() if k != "features")
    )


def test_masks_pool_what_boxes_do_where_they_fill_them():
    coco_mask = pytest.importorskip("pycocotools.mask")

    class Masked(Squares):
        def instances(self, index: int) -> Instances:
            full = super().instances(index)
            masks = []
            for x1, y1, x2, y2 in full.boxes.astype(int):
                drawn = np.zeros(self._size, np.uint8, order="F")
                drawn[y1:y2, x1:x2] = 1
                masks.append(coco_mask.encode(drawn))
            return replace(full, masks=tuple(masks))

    protocol = RegionKnn(view="square=112", how="mask", ks=(1, 3))
    outcome = protocol.run(context_of(protocol, Masked("train", 24), Masked("test", 10)))
    assert outcome.statistics.point()["macc"] > 90
    with pytest.raises(DataError, match="no masks"):
        protocol.run(context_of(protocol, Squares("train", 4), Squares("test", 2)))


@pytest.mark.parametrize("how", ["prompter", "roialign"])
def test_cloc_region_equals_a_direct_computation(how):
    data = Squares("test", 9)
    encoder = TextEncoder()
    protocol = ClocRegion(view="square=112", how=how, control=True)
    context = context_of(protocol, data, data, encoder)
    outcome = protocol.run(context)
    texts = encoder.embed_text(list(data.things))
    reader = context.tokens("test", "square=112").reader()
    hits, totals = np.zeros(3), np.zeros(3)
    for index in range(9):
        tokens, truth = reader[index], data.instances(index)
        h, w = data.size(index)
        for box, label in zip(truth.boxes, truth.labels):
            unit = torch.from_numpy(box / (w, h, w, h)).float()[None]
            here = Tokens({2: tokens.patches[2][0].float()[None]}, {2: tokens.grids[2][0]})
            if how == "prompter":
                z = encoder.region_features(here, [unit])[0]
            else:
                grid = here.last[0].T.reshape(1, 9, *here.grids[2])
                scale = torch.tensor([grid.shape[3], grid.shape[2]] * 2)
                z = encoder.project_tokens(roi_align(grid, [unit * scale], 1, aligned=True).flatten(1))
            hits[label] += int((F.normalize(z, dim=1) @ texts.T).argmax()) == label
            totals[label] += 1
    want = 100 * np.mean(hits[totals > 0] / totals[totals > 0])
    assert outcome.statistics.point()["macc"] == pytest.approx(want)
    assert encoder.cropped == outcome.forwards == int(totals.sum())


def test_zero_shot_needs_a_way_into_the_text_space():
    protocol = ClocRegion(view="square=112", how="roialign")
    encoder = FakeEncoder()
    with pytest.raises(PlanError, match="no linear map"):
        protocol.run(context_of(protocol, Squares("train", 1), Squares("test", 1), encoder))
    probe = RegionKnn(view="square=112", how="prompter")
    with pytest.raises(PlanError, match="no region head"):
        probe.run(context_of(probe, Squares("train", 1), Squares("test", 1), encoder))
    with pytest.raises(UsageError, match="norm is true"):
        configure(ClocRegion, {"view": "square=112", "norm": "false"})
    with pytest.raises(UsageError, match="how 'boxes' is not one of"):
        configure(RegionKnn, {"view": "square=112", "how": "boxes"})


class Named(Squares):
    """Phrases: the class, so that several regions share one."""

    def instances(self, index: int) -> Instances:
        full = super().instances(index)
        return replace(full, names=tuple(f"a {self.things[k]} square" for k in full.labels))


def test_retrieval_counts_any_partner_both_ways():
    protocol = RegionRetrieval(view="square=112", how="prompter")
    data = Named("test", 12)
    outcome = protocol.run(context_of(protocol, data, data, TextEncoder()))
    assert isinstance(outcome.statistics, RatioStatistics)
    point = outcome.statistics.point()
    assert outcome.chosen["texts"] <= 3
    assert point["region_to_text_r5"] == 100  # there are three texts
    assert point["text_to_region_r1"] <= point["text_to_region_r5"] <= point["text_to_region_r10"]
    with pytest.raises(DataError, match="no phrases"):
        protocol.run(context_of(protocol, Squares("test", 2), Squares("test", 2), TextEncoder()))


def test_recall_equals_sorting_by_hand():
    rng = np.random.default_rng(0)
    queries = F.normalize(torch.from_numpy(rng.normal(size=(30, 6))).float(), dim=1)
    gallery = F.normalize(torch.from_numpy(rng.normal(size=(50, 6))).float(), dim=1)
    pairs = np.unique(np.stack([rng.integers(0, 30, 60), rng.integers(0, 50, 60)], 1), axis=0)
    pairs = np.concatenate([pairs, np.stack([np.arange(30), np.arange(30)], 1)])
    found = recall_hits(queries, gallery, pairs)
    ranked = (queries @ gallery.T).argsort(dim=1, descending=True).numpy()
    for k in (1, 5, 10):
        want = [bool(set(ranked[q, :k]) & set(pairs[pairs[:, 0] == q, 1])) for q in range(30)]
        assert found[k].tolist() == want
