"""The online engine on small made-up encoders: fields, resuming, several processes, inference."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from segmentation_fakes import FakeDataset, FakeEncoder, context_of
from torch import nn
from torch.nn import functional as F

from rice_eval.datasets.base import IGNORE
from rice_eval.errors import CheckpointError, UsageError
from rice_eval.protocols.base import configure
from rice_eval.protocols.online import OnlineLinear
from rice_eval.protocols.online_head import PixelHead, pixel_loss
from rice_eval.protocols.online_infer import averaged_views, segment
from rice_eval.protocols.online_recipes import Dinov2Linear, Dinov2LinearMs, Dinov3Linear, RadioLinear, VfmSsLinear
from rice_eval.registry import protocols
from rice_eval.views import View

RECIPES = [Dinov2Linear, Dinov2LinearMs, Dinov3Linear, RadioLinear, VfmSsLinear]
SMALL = {
    "view": "short=28,slide=14,crop=21,pad=patch,interp=plain", "steps": 3, "batch": 4, "warmup": 1, "lr": 1e-2,
    "side": "28", "crop": "24", "cat_max_ratio": 0.5,
}  # fmt: skip


def datasets(count: int = 6):
    return FakeDataset("train", count, 0, sizes=((28, 42), (35, 21))), FakeDataset("test", 3, 1, sizes=((31, 44),))


def small(kind=Dinov2Linear, **more) -> OnlineLinear:
    return kind(**{**SMALL, **more})


def state_of(protocol: OnlineLinear, **options) -> dict[str, torch.Tensor]:
    train, test = datasets()
    head, _ = protocol.fit(context_of(protocol, train, test, **options))
    return {k: v.clone() for k, v in head.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(x.shape == b[k].shape and torch.equal(x, b[k]) for k, x in a.items())


@pytest.mark.parametrize("kind", RECIPES)
def test_each_recipe_learns_something(kind):
    train, test = datasets()
    protocol = small(kind, steps=60, lr=3e-2, scales=kind.scales[:2])
    assert protocols.get(kind.id) is kind
    outcome = protocol.run(context_of(protocol, train, test, keep_predictions=True))
    assert outcome.statistics.point()["miou"] > 25  # chance is about 12
    assert outcome.predictions is not None
    assert outcome.predictions["test001"].shape == (31, 44)
    windows = len(averaged_views(protocol.view, 7, protocol.scales, protocol.mirror))
    assert outcome.forwards >= 60 * 4 + 3 * windows
    again = protocol.run(context_of(protocol, train, test))
    np.testing.assert_array_equal(again.statistics.areas, outcome.statistics.areas)


TRAINING = {
    "norm": False, "seed": 5, "layer_set": "last4", "head_norm": False, "dropout": 0.4, "init": "uniform", "lr": 1e-3,
    "wd": 0.5, "betas": (0.5, 0.5), "steps": 4, "batch": 3, "schedule": "cosine", "warmup": 3, "warmup_ratio": 0.5,
    "power": 3.0, "augment": "vfm", "side": "35", "ratios": (1.0, 1.1), "crop": "28", "cat_max_ratio": 0.3, "flip": 0.0,
    "brightness": 3.0, "contrast": 0.01, "saturation": 0.01, "hue": 0.4, "average_ignored": False, "precision": "bf16",
    "squeeze": False,
}  # fmt: skip
TESTING = {
    "view": "square=28", "norm": False, "layer_set": "last4", "precision": "bf16", "squeeze": False,
    "scales": (1.0, 1.5), "mirror": True,
}  # fmt: skip


def test_every_field_is_in_the_hash_and_read():
    base = small(flip=0.5, steps=3)
    names = {f.name for f in dataclasses.fields(base)}
    assert names == set(TRAINING) | set(TESTING) | {"tokens"}
    before = state_of(base)
    assert same(before, state_of(base))
    for name, value in TRAINING.items():
        changed = dataclasses.replace(base, **{name: value})
        assert changed.hash != base.hash, name
        assert not same(before, state_of(changed)), name
    train, test = datasets()
    first = base.run(context_of(base, train, test, keep_predictions=True))
    for name in ("view", "scales", "mirror"):
        changed = dataclasses.replace(base, **{name: TESTING[name]})
        assert changed.hash != base.hash, name
        other = changed.run(context_of(changed, train, test, keep_predictions=True))
        assert any(not np.array_equal(first.predictions[k], other.predictions[k]) for k in first.predictions), name


@pytest.mark.parametrize(
    "settings",
    [
        {"tokens": "fp16"}, {"schedule": "step"}, {"side": "x"}, {"betas": "0.9"}, {"warmup": "9"}, {"dropout": 1.0},
        {"lr": "nan"}, {"lr": -1}, {"wd": -1}, {"betas": "1,1"}, {"scales": "nan"}, {"scales": "inf"}, {"scales": "1e30"},
        {"brightness": "nan"}, {"contrast": -1}, {"saturation": "inf"}, {"hue": "nan"}, {"hue": 1e30}, {"ratios": "2,1"},
        {"power": "nan"}, {"warmup_ratio": -1}, {"cat_max_ratio": -1},
    ],
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UsageError, match="dinov2-linear|view"):
        configure(Dinov2Linear, {"steps": 5, "warmup": 0, **settings})


def test_resuming_gives_the_same_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    protocol = small(steps=6, dropout=0.3)
    whole = state_of(protocol)
    train, test = datasets()
    monkeypatch.setattr("rice_eval.probes.training_state.SAVE_EVERY_S", 0.0)

    def dying(label: str, total: int):
        done = []

        def advance(n: int) -> None:
            done.append(n)
            if len(done) == 5:  # the first call tells where it starts
                raise KeyboardInterrupt

        return advance

    context = context_of(protocol, train, test, scratch=tmp_path)
    context.progress = dying
    with pytest.raises(KeyboardInterrupt):
        protocol.fit(context)
    (kept,) = tmp_path.iterdir()
    context = context_of(protocol, train, test, scratch=tmp_path)
    outcome = protocol.run(context)
    assert outcome.warnings[0].startswith("training went on from step 3")
    assert same(whole, torch.load(kept, weights_only=True)["head"])
    done = protocol.run(context_of(protocol, train, test, scratch=tmp_path))
    assert done.warnings == ()
    assert done.forwards < outcome.forwards
    state_of(dataclasses.replace(protocol, lr=0.5), scratch=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another hash never reads this file
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="can't be read"):
        protocol.fit(context_of(protocol, train, test, scratch=tmp_path))


SCRIPT = """
import json, sys
sys.path.insert(0, {here!r})
import torch
from test_online import datasets, small
from segmentation_fakes import context_of
from rice_eval.protocols.online_head import world
protocol = small(steps=4, dropout=0.3)
train, test = datasets()
context = context_of(protocol, train, test, keep_predictions=True)
outcome = protocol.run(context)
if world()[0] == 0:
    print(json.dumps({{"areas": outcome.statistics.areas.tolist(), "processes": world()[1],
                      "ids": outcome.statistics.image_ids, "panels": [p.index for p in outcome.panels]}}))
"""


def test_two_processes_equal_one():
    script = SCRIPT.format(here=str(Path(__file__).parent))
    found = {}
    for processes in (1, 2):
        with_torchrun = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node=2",
            "--standalone",
            "--no-python",
        ]
        command = [*(with_torchrun if processes == 2 else []), sys.executable, "-c", script]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found[processes] = json.loads(done.stdout.strip().splitlines()[-1])
    assert found[2].pop("processes") == 2
    assert found[1].pop("processes") == 1
    a, b = (np.array(found[n].pop("areas"), dtype=float) for n in (1, 2))
    assert found[1] == found[2]
    assert np.abs(a - b).sum() <= 0.01 * a.sum()  # sums in another order


def test_a_batch_must_split(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("rice_eval.protocols.online.world", lambda: (0, 3))
    with pytest.raises(UsageError, match="does not split over 3"):
        state_of(small())


def test_pixel_loss_in_pieces_equals_torchs(monkeypatch: pytest.MonkeyPatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 4, 6, generator=generator, requires_grad=True)
    labels = torch.randint(-1, 3, (5, 16, 24), generator=generator)
    assert IGNORE == -1
    for average_ignored in (True, False):
        grown = F.interpolate(logits, size=(16, 24), mode="bilinear", align_corners=False)
        expected = F.cross_entropy(grown, labels, ignore_index=IGNORE, reduction="sum")
        expected = expected / (labels.numel() if average_ignored else (labels != IGNORE).sum())
        (gradient,) = torch.autograd.grad(expected, logits)
        for pieces in (1, 1 << 26):
            monkeypatch.setattr("rice_eval.protocols.online_head._PIXELS", pieces)
            logits.grad = None
            found = pixel_loss(logits, labels, average_ignored)
            torch.testing.assert_close(found, expected.detach(), atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(logits.grad, gradient, atol=1e-8, rtol=1e-5)
    assert pixel_loss(logits, torch.full((5, 16, 24), IGNORE), False) == 0


def test_dropout_drops_whole_channels():
    head = PixelHead(200, 2, norm=False, dropout=0.25, init="normal", seed=0)
    seen = {}
    head.conv.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    head.train()(torch.ones(2, 200, 3, 3), [1, 2])
    assert seen["x"].unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert (seen["x"].flatten(2).std(dim=2) == 0).all()
    assert 0.15 < (seen["x"][:, :, 0, 0] == 0).float().mean() < 0.35
    head.eval()(torch.ones(2, 200, 3, 3))
    assert (seen["x"] == 1).all()


def test_heads_start_as_stated():
    normal = PixelHead(4000, 8, norm=True, dropout=0.0, init="normal", seed=0)
    assert isinstance(normal.norm, nn.BatchNorm2d)
    assert normal.conv.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert not normal.conv.bias.any()
    uniform = PixelHead(4000, 8, norm=False, dropout=0.0, init="uniform", seed=0)
    assert uniform.norm is None
    assert uniform.conv.weight.abs().max() <= 4000**-0.5
    assert uniform.conv.weight.std().item() == pytest.approx(4000**-0.5 / 3**0.5, rel=0.03)


def test_windows_are_batched_across_images_and_come_back_in_order():
    dataset = FakeDataset("test", 6, 3, sizes=((28, 42), (31, 21)))
    batches = []

    def logits_of(images: torch.Tensor) -> torch.Tensor:
        batches.append(len(images))
        return F.avg_pool2d(images, 7)  # three "classes": the brightest colour wins

    views = (View.parse("native,slide=7,crop=14"), View.parse("native,slide=7,crop=14,flip"))
    found = dict(segment(dataset, range(6), views, (0, 0, 0), logits_of, False, lambda n: None))
    assert list(found) == list(range(6))
    assert max(batches) == 16
    for index in range(6):
        image = torch.from_numpy(dataset.image(index)).permute(2, 0, 1)[None].float() / 255
        alone = dict(segment(dataset, [index], views[:1], (0, 0, 0), logits_of, False, lambda n: None))[index]
        assert found[index].shape == image.shape[-2:]
        assert (found[index] == alone).mean() > 0.9  # averaged with its mirror image


def test_published_numbers():
    """The table of the published protocols, cell by cell."""
    facts = FakeEncoder().facts
    d2, ms, d3, radio, vfm = (kind() for kind in RECIPES)
    assert (d2.lr, d2.wd, d2.betas, d2.steps, d2.batch, d2.warmup, d2.warmup_ratio, d2.power) == (
        1e-3, 1e-4, (0.9, 0.999), 40_000, 16, 1500, 1e-6, 1.0,
    )  # fmt: skip
    assert (d2.ratios, d2.crop, d2.cat_max_ratio, d2.flip, d2.dropout) == ((0.5, 2.0), "512", 0.75, 0.5, 0.0)
    assert str(View.parse(d2.view).resolve(14)) == "short=512,slide=341,pad=14,interp=plain"
    assert (ms.layer_set, ms.crop, ms.mirror, len(ms.scales)) == ("last4", "640", True, 5)
    assert (d3.dropout, d3.lr, d3.wd, d3.steps, d3.warmup, d3.schedule) == (0.1, 1e-3, 1e-3, 40_000, 1500, "one-cycle")
    assert d3.augmentation(16, (0, 0, 0)).crop == 512
    assert d3.augmentation(14, (0, 0, 0)).crop == 448
    assert str(View.parse(d3.view).resolve(16)).startswith("short=512,slide=341")
    assert (radio.wd, radio.steps, radio.schedule, radio.view.split(",")[1]) == (
        0.0,
        80_000,
        "poly-after-warmup",
        "pad=patch",
    )
    assert (vfm.head_norm, vfm.lr, vfm.wd, vfm.power, vfm.steps, vfm.crop) == (False, 1e-4, 0.05, 0.9, 40_000, "512")
    assert d2.layers(facts) == (2,)
