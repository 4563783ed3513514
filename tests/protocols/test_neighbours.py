"""``capi-knn``, ``capi-logreg``, ``hummingbird-knn`` and ``visbench-linear`` against direct small implementations."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from segmentation_fakes import FakeDataset, FakeEncoder, context_of
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import jaccard_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler
from torch.nn import functional as F

from rice_eval.datasets.base import IGNORE
from rice_eval.errors import PlanError
from rice_eval.protocols.base import Protocol
from rice_eval.protocols.knn import CapiKnn, HummingbirdKnn
from rice_eval.protocols.linear_visbench import VisbenchLinear
from rice_eval.protocols.logreg import CapiLogreg
from rice_eval.protocols.segmentation import held_out
from rice_eval.protocols.segmentation_rows import from_patches, majority, patches_of
from rice_eval.registry import protocols

VIEW = "square=28"
SMALL: dict[type[Protocol], dict] = {
    CapiKnn: {"ks": (1, 3, 10)},
    CapiLogreg: {"cs": (1e-2, 1.0), "max_iter": 60},
    HummingbirdKnn: {"memory": 60, "k": 7},
    VisbenchLinear: {"epochs": 4, "warmup_epochs": 1.0, "batch": 4, "lr": 5e-2},
}


def datasets(train: int = 10):
    return FakeDataset("train", train, 0, sizes=((28, 42), (35, 21))), FakeDataset("test", 4, 1, sizes=((31, 44),))


def rows_of(context, split: str, layer: int):
    """Tokens and the patches' pixel labels of each image, straight from the source."""
    source, dataset = context.tokens(split, VIEW), getattr(context, split)
    out = []
    for index in source.indices:
        item = source[index]
        frame = item.frames[0]
        labels = patches_of(frame.mask(dataset.semantic(index), IGNORE), item.grids[layer][0])
        out.append((item.patches[layer][0].float().numpy(), labels.numpy()))
    return out


def frame_miou(found, truth) -> float:
    flat = np.concatenate([t.ravel() for t in truth])
    keep = flat != IGNORE
    return 100 * jaccard_score(flat[keep], np.concatenate([f.ravel() for f in found])[keep], average="macro")


@pytest.mark.parametrize("kind", SMALL)
def test_learns_and_repeats(kind):
    assert protocols.get(kind.id) is kind
    train, test = datasets()
    protocol = kind(view=VIEW, **SMALL[kind])
    first = protocol.run(context_of(protocol, train, test, keep_predictions=True))
    assert first.statistics.point()["miou"] > 30  # chance is about 12
    assert all(p.shape == (28, 28) for p in first.predictions.values())
    assert first.panels[0].truth.shape == first.panels[0].prediction.shape == (28, 28)
    again = protocol.run(context_of(protocol, train, test))
    np.testing.assert_array_equal(first.statistics.areas, again.statistics.areas)


CHANGES: dict[type[Protocol], dict] = {
    CapiKnn: {"view": "square=42", "norm": False, "seed": 9, "ks": (2,), "metrics": ("l2",), "holdout": 0.5},
    CapiLogreg: {
        "view": "square=42", "norm": False, "seed": 9, "cs": (1e-5,), "max_iter": 2, "tol": 0.1, "history": 1,
        "holdout": 0.5,
    },
    HummingbirdKnn: {"view": "square=42", "norm": False, "seed": 9, "memory": 500, "k": 1, "temperature": 5.0},
    VisbenchLinear: {
        "view": "square=42", "norm": False, "seed": 9, "layer_set": "last4", "lr": 1e-2, "wd": 50.0, "betas": (0.1, 0.5),
        "epochs": 2, "batch": 2, "warmup_epochs": 0.0, "loss": "token",
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", SMALL)
def test_every_field_is_in_the_hash_and_read(kind):
    train, test = datasets()
    base = kind(view=VIEW, **SMALL[kind])
    if kind is CapiLogreg:
        base = dataclasses.replace(base, max_iter=4)  # stopped early, or every path ends in the same optimum
    elsewhere = {"tokens", "linesearch"}  # the bank reads the one, test_knn.py has a function that needs the other
    assert set(CHANGES[kind]) | elsewhere == {f.name for f in dataclasses.fields(kind)} | {"linesearch"}
    before = base.run(context_of(base, train, test))
    for name, value in CHANGES[kind].items():
        changed = dataclasses.replace(base, **{name: value})
        assert changed.hash != base.hash, name
        after = changed.run(context_of(changed, train, test))
        same = after.heads == before.heads and np.array_equal(after.statistics.areas, before.statistics.areas)
        assert not same, name


def test_capi_knn_equals_a_direct_implementation():
    train, test = datasets()
    protocol = CapiKnn(view=VIEW, ks=(1, 3, 10))
    context = context_of(protocol, train, test, keep_predictions=True)
    outcome = protocol.run(context)
    images, queries = rows_of(context, "train", 2), rows_of(context, "test", 2)
    fit, held = held_out(range(len(images)), 0.1, 0)
    scaler = StandardScaler().fit(np.concatenate([images[i][0] for i in fit]))

    def predict(members, asked, k, metric):
        x, y = (np.concatenate([images[i][part] for i in members]) for part in (0, 1))
        keep = majority(torch.from_numpy(y), 4).numpy() != IGNORE
        index = NearestNeighbors(n_neighbors=k, metric={"l2": "euclidean"}.get(metric, metric), algorithm="brute")
        index.fit(scaler.transform(x)[keep])
        out = []
        for tokens, _ in asked:
            near = y[keep][index.kneighbors(scaler.transform(tokens), return_distance=False)]
            votes = np.stack([(near == c).sum(axis=1) for c in range(4)], axis=-1)
            out.append(votes.argmax(axis=-1))
        return out

    held_images = [images[i] for i in held]
    for head in outcome.heads:
        found = predict(fit, held_images, head.settings["k"], head.settings["metric"])
        assert head.score == pytest.approx(frame_miou(found, [y for _, y in held_images]), abs=0.3)
    best = max(h.score for h in outcome.heads)
    assert outcome.chosen in [h.settings for h in outcome.heads if h.score == best]
    found = predict(range(len(images)), queries, outcome.chosen["k"], outcome.chosen["metric"])
    assert outcome.statistics.point()["miou"] == pytest.approx(frame_miou(found, [y for _, y in queries]), abs=0.3)


def test_capi_logreg_equals_scikit_learn():
    train, test = datasets()
    protocol = CapiLogreg(view=VIEW, cs=(1e-2, 1.0), max_iter=500)
    context = context_of(protocol, train, test, keep_predictions=True)
    outcome = protocol.run(context)
    images, queries = rows_of(context, "train", 2), rows_of(context, "test", 2)
    fit, _ = held_out(range(len(images)), 0.1, 0)
    scaler = StandardScaler().fit(np.concatenate([images[i][0] for i in fit]))
    x, y = (np.concatenate([image[part] for image in images]) for part in (0, 1))
    patch = majority(torch.from_numpy(y), 4).numpy()
    oracle = LogisticRegression(C=outcome.chosen["C"], max_iter=5000, tol=1e-8)
    oracle.fit(scaler.transform(x)[patch != IGNORE], patch[patch != IGNORE])
    found = [np.repeat(oracle.predict(scaler.transform(t))[:, None], 49, axis=1) for t, _ in queries]
    assert outcome.statistics.point()["miou"] == pytest.approx(frame_miou(found, [q for _, q in queries]), abs=0.3)
    assert outcome.warnings == ()
    short = dataclasses.replace(protocol, max_iter=3)
    assert "not converged after 3 steps" in short.run(context_of(short, train, test)).warnings[0]


def test_hummingbird_equals_a_direct_implementation():
    train, test = datasets()
    protocol = HummingbirdKnn(view=VIEW, memory=10_000, k=5)
    context = context_of(protocol, train, test, keep_predictions=True)
    outcome = protocol.run(context)
    images = rows_of(context, "train", 2)
    x = torch.from_numpy(np.concatenate([i[0] for i in images]))
    y = torch.from_numpy(np.concatenate([i[1] for i in images]))
    shares = torch.stack([(y == c).sum(dim=1) for c in range(4)], dim=1).float()
    keep = shares.sum(dim=1) > 0
    keys, shares = F.normalize(x[keep], dim=1), shares[keep] / shares[keep].sum(dim=1, keepdim=True)
    for index, (tokens, _) in enumerate(rows_of(context, "test", 2)):
        similarity = F.normalize(torch.from_numpy(tokens), dim=1) @ keys.T
        top = similarity.topk(5, dim=1)
        weights = (top.values / 0.02).softmax(dim=1)
        soft = (weights[:, :, None] * shares[top.indices]).sum(dim=1).T.view(1, 4, 4, 4)
        expected = F.interpolate(soft, size=(28, 28), mode="bilinear", align_corners=False)[0].argmax(0)
        assert (outcome.predictions[test.image_id(index)] == expected.numpy()).mean() > 0.97  # keys are half floats


def test_hummingbird_prefers_patches_with_rare_classes():
    train, test = datasets()
    for item in train._items:
        item[1][:] = 0
        item[1][:7, :7] = 3
    protocol = HummingbirdKnn(view="square=28", memory=20)
    outcome = protocol.run(context_of(protocol, train, test))
    assert outcome.chosen["memory"] == 20  # two of sixteen patches an image, the rare one always among them
    assert outcome.statistics.matrix[:, 3].sum() > 0


@pytest.mark.parametrize("loss", ["pixel", "token"])
def test_visbench_equals_a_plain_loop(loss):
    train, test = datasets(6)
    protocol = VisbenchLinear(view=VIEW, epochs=2, warmup_epochs=1.0, batch=4, loss=loss)
    context = context_of(protocol, train, test, keep_predictions=True)
    outcome = protocol.run(context)
    from rice_eval.protocols.online_head import PixelHead

    head = PixelHead(9, 4, False, 0.0, "uniform", 0)
    optimiser = torch.optim.AdamW(head.parameters(), lr=5e-4, weight_decay=1e-4)
    images = rows_of(context, "train", 2)
    step = 0
    for epoch in range(2):
        order = np.random.default_rng((0, epoch)).permutation(6)
        for batch in (order[:4], order[4:]):
            rate = (1 + step) / 2 if step < 2 else 0.5 * (1 + np.cos(np.pi * (step - 2) / 2))
            optimiser.param_groups[0]["lr"] = 5e-4 * rate
            x = torch.stack([torch.from_numpy(images[i][0]).T.reshape(9, 4, 4) for i in batch])
            mode = {"mode": "bilinear", "align_corners": False} if loss == "pixel" else {"mode": "nearest"}
            grown = F.interpolate(head(x), size=(28, 28), **mode)
            frames = [context.tokens("train", VIEW)[int(i)].frames[0] for i in batch]
            y = np.stack([f.mask(train.semantic(int(i)), IGNORE) for f, i in zip(frames, batch)])
            optimiser.zero_grad()
            F.cross_entropy(grown, torch.from_numpy(y), ignore_index=IGNORE).backward()
            optimiser.step()
            step += 1
    for index, (tokens, _) in enumerate(rows_of(context, "test", 2)):
        with torch.no_grad():
            logits = head(torch.from_numpy(tokens).T.reshape(1, 9, 4, 4))
        expected = F.interpolate(logits, size=(28, 28), mode="bilinear", align_corners=False)[0].argmax(0).numpy()
        assert (outcome.predictions[test.image_id(index)] == expected).mean() > 0.99


def test_patches_go_there_and_back():
    context = context_of(CapiKnn(view=VIEW), *datasets())
    item = context.tokens("test", VIEW)[0]
    mask = item.frames[0].mask(context.test.semantic(0), IGNORE)
    again = from_patches(patches_of(mask, (4, 4)), (4, 4), item.frames[0])
    assert np.array_equal(mask, again)
    with pytest.raises(PlanError, match="do not divide"):
        patches_of(mask, (5, 4))


@pytest.mark.parametrize("kind", [CapiKnn, CapiLogreg, VisbenchLinear])
def test_sliding_views_are_refused(kind):
    train, test = datasets()
    protocol = kind(view="native,slide=7,crop=14", **SMALL[kind])
    with pytest.raises(PlanError, match="one window an image"):
        protocol.run(context_of(protocol, train, test, FakeEncoder()))


@pytest.mark.parametrize("few", [{"k": 10**20}, {"ks": (10**20,), "metrics": ("l2",)}])
def test_more_neighbours_than_keys_are_all_of_them(few):
    kind = HummingbirdKnn if "k" in few else CapiKnn
    protocol = kind(view=VIEW, **few)
    train, test = FakeDataset("train", 4, 0), FakeDataset("test", 2, 1)
    assert protocol.run(context_of(protocol, train, test)).statistics.point()["miou"] >= 0
