"""The embedded benchmark: deterministic to the byte, exact in every annotation, fair between splits, no colour short cut."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import subprocess
import sys
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image, ImageDraw
from pycocotools import mask as coco_mask

from rice_eval.datasets import load_dataset, scenes_rle
from rice_eval.datasets.base import IGNORE
from rice_eval.datasets.scenes import Scenes
from rice_eval.datasets.scenes_facts import classes, things
from rice_eval.datasets.scenes_layout import BACKDROP, content, layout
from rice_eval.datasets.scenes_pack import ASSETS, pack
from rice_eval.datasets.scenes_questions import CLASS_WORDS, KINDS
from rice_eval.datasets.scenes_raster import Draws, Pose, hue_matrix, recolour, resize, sample
from rice_eval.datasets.scenes_render import Scene, matches, render
from rice_eval.datasets.scenes_text import _WORDS, line
from rice_eval.errors import UsageError

GOLDEN = {
    ("train", 0, 96): "bef73910503213e7937762e4a5745586621c16f59c8fd5ab9f319060f4a470f7",
    ("val", 7, 112): "70c3ebf9f85ca9efa158a896f0f2585c77c9e33fe952efe96a656a00a6c7e69f",
}
"""sha256 of image and owner bytes; a change of these is a new ``GENERATOR`` version."""


def digest(scene: Scene) -> str:
    return hashlib.sha256(scene.image.tobytes() + scene.owner.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def val() -> Scenes:
    return Scenes("val", 30, size=112)


def test_bytes_are_pinned() -> None:
    for (split, index, size), expected in GOLDEN.items():
        assert digest(render(0, split, index, size)) == expected


def test_bytes_do_not_depend_on_order_threads_or_number() -> None:
    straight = [digest(render(3, "train", i, 80)) for i in range(12)]
    with ThreadPoolExecutor(4) as pool:
        shuffled = dict(pool.map(lambda i: (i, digest(render(3, "train", i, 80))), reversed(range(12))))
    assert [shuffled[i] for i in range(12)] == straight
    few, many = Scenes("train", 2, 80, 3), Scenes("train", 5000, 80, 3)
    np.testing.assert_array_equal(few.image(1), many.image(1))
    assert digest(many.scene(11)) == straight[11]
    assert len(set(straight)) == 12


def test_draws_follow_numpys_guaranteed_stream() -> None:
    bits = np.random.PCG64(np.random.SeedSequence([5, 6]))
    words = bits.random_raw(4)
    draws = Draws(5, 6)
    assert [draws.below(1000) for _ in range(4)] == [(int(w) >> 32) * 1000 >> 32 for w in words]


def test_seeds_splits_and_sizes_give_other_fingerprints() -> None:
    sets = [
        Scenes("train", 5),
        Scenes("train", 6),
        Scenes("val", 5),
        Scenes("train", 5, 96),
        Scenes("train", 5, seed=1),
    ]
    prints = [s.fingerprint for s in sets]
    assert len(set(prints)) == len(prints)
    assert Scenes("train", 5).fingerprint == prints[0]
    assert digest(render(0, "train", 0, 64)) != digest(render(1, "train", 0, 64))


def test_layout_is_the_same_at_every_size() -> None:
    small, large = render(0, "val", 3, 112), render(0, "val", 3, 224)
    assert [(o.index, o.label, o.distance) for o in small.objects] == [
        (o.index, o.label, o.distance) for o in large.objects
    ]
    for a, b in zip(small.objects, large.objects):
        np.testing.assert_allclose(np.array(a.box) * 2, b.box, atol=3)


def test_boxes_masks_labels_and_depth_agree(val: Scenes) -> None:
    for index in range(len(val)):
        found, semantic, depth = val.instances(index), val.semantic(index), val.depth(index)
        assert found.masks is not None
        assert found.names is not None
        masks = coco_mask.decode(list(found.masks)).transpose(2, 0, 1).astype(bool)
        assert masks.sum(0).max() <= 1  # disjoint
        expected = np.zeros_like(semantic)
        for mask, box, label, area in zip(masks, found.boxes, found.labels, found.area):
            rows, columns = np.nonzero(mask)
            assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert area == mask.sum() > 0
            expected[mask] = label + 1
            assert len(np.unique(depth[mask])) == 1
        np.testing.assert_array_equal(semantic, expected)
        assert (semantic != IGNORE).all()
        assert (depth[~masks.any(0)] == np.float32(BACKDROP)).all()
        distances = [depth[mask][0] for mask in masks]
        assert distances == sorted(distances, reverse=True)  # from the farthest to the nearest
        assert max(distances) < BACKDROP
        assert semantic.max() < len(val.classes) == len(val.palette)
        assert len(set(found.ids.tolist())) == len(found.ids)
        assert 3 <= sum(label < len(things()) - 1 for label in found.labels) <= 7


def test_painted_pixels_match_masks_of_an_independent_rasteriser() -> None:
    # The nearest object of a scene is covered by nothing: Pillow's own affine warp of its sprite gives its whole mask.
    checked = 0
    for index in range(25):
        items = content(0, "train", index)
        nearest = layout(items, 0, "train", index, 0).placed[-1]
        if nearest.index >= len(items.sprites):
            continue
        scene = render(0, "train", index, 224)
        pose = scene.poses[-1]
        angle = np.deg2rad(pose.degrees)
        scale = pose.scale / 65536
        a, b, c, d = np.cos(angle) / scale, np.sin(angle) / scale, -np.sin(angle) / scale, np.cos(angle) / scale
        if pose.mirror:
            a, b = -a, -b
        cx, cy = pose.cx / 65536, pose.cy / 65536
        sprite = Image.fromarray(pack().pyramid(items.sprites[nearest.index].file)[0][..., 3])
        middle = sprite.width / 2
        coefficients = (a, b, middle - a * cx - b * cy, c, d, middle - c * cx - d * cy)
        warped = sprite.transform((224, 224), Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR)
        theirs = np.asarray(warped) >= 128
        ours = scene.owner == len(scene.poses)
        assert (theirs & ours).sum() / (theirs | ours).sum() > 0.9
        checked += 1
    assert checked >= 10


def test_objects_change_only_their_pixels_and_shadows(monkeypatch: pytest.MonkeyPatch) -> None:
    import dataclasses

    from rice_eval.datasets import scenes_render

    full = render(0, "val", 2, 160)
    plan = layout(content(0, "val", 2), 0, "val", 2, 0)
    monkeypatch.setattr(scenes_render, "layout", lambda *_: dataclasses.replace(plan, placed=plan.placed[:-1]))
    less = render(0, "val", 2, 160)
    owned = full.owner == len(plan.placed)
    changed = (full.image != less.image).any(-1)
    assert changed[owned].mean() > 0.97
    lighter = full.image.astype(int).sum(-1) > less.image.astype(int).sum(-1)
    rows, columns = np.nonzero(owned)
    reach = slice(max(rows.min() - 2, 0), rows.max() + 3), slice(max(columns.min() - 2, 0), columns.max() + 3)
    outside = np.ones_like(owned)
    outside[reach] = False
    assert not (lighter & outside).any()  # off the object only its shadow falls


def test_text_lies_in_its_polygon(val: Scenes) -> None:
    legible = 0
    for index in range(len(val)):
        scene = val.scene(index)
        for sign, entry in zip([o for o in scene.objects if o.text is not None], val.text(index)):
            assert entry.text == sign.text
            assert entry.ignore != sign.legible
            assert entry.polygon.shape == (4, 2)
            (ax, ay), (bx, by), (cx, cy), _ = entry.polygon
            assert (bx - ax) * (cy - by) - (by - ay) * (cx - bx) > 0  # clockwise with y down
            if sign.legible:
                legible += 1
                x0, y0, x1, y1 = sign.box
                assert (entry.polygon.min(0) >= (x0 - 1, y0 - 1)).all()
                assert (entry.polygon.max(0) <= (x1 + 1, y1 + 1)).all()
                drawn = Image.new("1", (val.side, val.side))
                ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in entry.polygon], fill=1)
                inside = scene.image.astype(int).sum(-1)[np.asarray(drawn)]
                assert np.ptp(inside) > 200  # plate and ink
    assert legible >= 20


def test_points_are_the_same_points_of_the_same_objects() -> None:
    ours, theirs = [], []
    for index in range(20):
        a, b = render(0, "val", index, 160), render(0, "val", index, 160, view=1)
        here, there, which = matches(a, b, 0, "val", index)
        assert len(here) == len(there) == len(which) > 0
        for (x, y), (u, v), number in zip(here, there, which):
            one = next(o for o in a.objects if o.index == number)
            two = next(o for o in b.objects if o.index == number)
            assert a.owner[int(y), int(x)] == one.owner
            assert b.owner[int(v), int(u)] == two.owner
            back = a.poses[one.owner - 1].forward(*b.poses[two.owner - 1].backward(np.array([u]), np.array([v])))
            assert np.hypot(back[0] - x, back[1] - y)[0] < 0.2  # 1/64 px of view b, seen at view a's scale
            ours.append(a.image[int(y), int(x)].mean())
            theirs.append(b.image[int(v), int(u)].mean())
    # An object is lit and painted alike in both views (up to the light's tint).
    assert np.corrcoef(ours, theirs)[0, 1] > 0.9
    points = Scenes("val", 3, 160).points(2)
    np.testing.assert_array_equal(points.other, render(0, "val", 2, 160, view=1).image)


def answer(question: str, kind: str, data: Scenes, index: int) -> set[str]:
    """Right answers, found again from masks, boxes and the wording alone."""
    found, names = data.instances(index), data.things
    one = {words[0].split(" ", 1)[1]: kind for kind, words in CLASS_WORDS.items()}
    many = {words[1]: kind for kind, words in CLASS_WORDS.items()}
    labels = [names[k] for k in found.labels]
    scene = data.scene(index)

    def one_of(phrase: str) -> int:
        said = re.fullmatch(r"sign that says '(.+)'", phrase)
        hits = [
            k for k, o in enumerate(scene.objects) if (o.text == said.group(1) if said else labels[k] == one[phrase])
        ]
        assert len(hits) == 1, (question, hits)
        return hits[0]

    if kind == "presence":
        asked = re.match(r"Is there an? (.+) in the image\?", question)
        return {"yes" if one[asked.group(1)] in labels else "no"}
    if kind == "counting":
        return {str(labels.count(many[re.match(r"How many (.+) are in the image\?", question).group(1)]))}
    if kind == "colour":
        return {str(scene.objects[one_of(re.match(r"What colour is the (.+)\? Answer", question).group(1))].colour)}
    if kind == "position":
        parts = re.match(r"Is the (.+) (?:to the left or to the right of|above or below) the (.+)\? Answer", question)
        a, b = (found.boxes[one_of(part)] for part in parts.groups())
        if "left" in question:
            return {"left" if a[0] + a[2] < b[0] + b[2] else "right"}
        return {"above" if a[1] + a[3] < b[1] + b[3] else "below"}
    if kind == "reading":
        colour = re.match(r"What does the (?:(\w+) )?sign say\?", question).group(1)
        return {o.text for o in scene.objects if o.text is not None and colour in (None, o.colour)}
    corners = [float(v) * data.side for v in re.search(r"\[(.+)\]", question).group(1).split(",")]
    near = [labels[k] for k, box in enumerate(found.boxes) if np.abs(box - corners).max() <= 0.001 * data.side]
    return set(near)


def test_answers_follow_from_the_truth() -> None:
    data, seen = Scenes("val", 80, 112), Counter()
    for index in range(len(data)):
        asked = data.questions(index)
        assert [q.kind for q in asked] == [k for k in KINDS if k in {q.kind for q in asked}]
        for question in asked:
            assert answer(question.question, question.kind, data, index) == {question.answer}
            assert (question.box is not None) == (question.kind == "box")
            if question.box is not None:
                assert list(question.box) in data.instances(index).boxes.tolist()
            seen[question.kind] += 1
    assert min(seen[kind] for kind in KINDS) > 50


def test_a_blind_guess_is_near_chance() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    data = Scenes("train", 400, 64)
    for index in range(len(data)):
        for question in data.questions(index):
            form = question.question if question.kind == "position" else ""
            answers[question.kind + (" across" if "left" in form else "")][question.answer] += 1
    share = {kind: max(counts.values()) / sum(counts.values()) for kind, counts in answers.items()}
    assert share["presence"] < 0.57
    assert share["counting"] < 0.43
    assert share["colour"] < 0.22
    assert share["position"] < 0.6
    assert share["position across"] < 0.6
    assert share["reading"] < 0.04
    assert share["box"] < 0.12


def test_splits_share_nothing() -> None:
    assets = pack()
    for kind in (
        {s: {v.code_point for group in assets.sprites[s] for v in group} for s in ("train", "val")},
        {s: {v.name for group in assets.sprites[s] for v in group} for s in ("train", "val")},
        {s: set(assets.backgrounds[s]) for s in ("train", "val")},
        {s: {font.name for font in assets.fonts[s]} for s in ("train", "val")},
        {s: set(_WORDS[s]) for s in ("train", "val")},
    ):
        assert not kind["train"] & kind["val"]
        assert min(len(kind["train"]), len(kind["val"])) >= 3
    pixels = {}
    for split in ("train", "val"):
        files = (sprite.file for group in assets.sprites[split] for sprite in group)
        pixels[split] = {hashlib.sha256(assets.pyramid(file)[0].tobytes()).hexdigest() for file in files}
    assert not pixels["train"] & pixels["val"]
    for group in itertools.chain(assets.sprites["train"], assets.sprites["val"]):
        assert len(group) >= 4
    used = {s.code_point for i in range(60) for s in content(0, "val", i).sprites}
    assert used <= {v.code_point for group in assets.sprites["val"] for v in group}


def test_every_asset_has_a_licence_and_a_credit() -> None:
    manifest = json.loads((ASSETS / "manifest.json").read_text())
    entries = [*manifest["sprites"], *manifest["backgrounds"], *manifest["fonts"]]
    with zipfile.ZipFile(ASSETS / "assets.zip") as archive:
        assert {e["file"] for e in entries} == set(archive.namelist())
    texts = {"MIT": "fluent-emoji", "CC0-1.0": "cc0", "Bitstream Vera (DejaVu)": "dejavu", "public domain (NASA)": None}
    for entry in entries:
        name = texts[entry["licence"]]
        assert name is None or len((ASSETS / f"LICENSE-{name}.txt").read_text()) > 500
    assert sum(path.stat().st_size for path in ASSETS.iterdir()) < 8e6
    notice = (Path(__file__).parents[2] / "NOTICE").read_text()
    for credit in (
        "Microsoft",
        "LobeHub",
        "emoji-datasource",
        "Poly Haven",
        "scikit-image",
        "DejaVu",
        "Hubble",
        "Cal Henderson",
    ):
        assert credit in notice
    assert len(manifest["classes"]) == 15 == len(CLASS_WORDS)
    assert classes() == ("background", *manifest["classes"], "sign")


def test_colour_does_not_give_the_class_away() -> None:
    means: dict[str, list[np.ndarray]] = {"train": [], "val": []}
    labels: dict[str, list[int]] = {"train": [], "val": []}
    for split in means:
        data = Scenes(split, 250, 64)
        for index in range(len(data)):
            scene = data.scene(index)
            for thing in scene.objects:
                if thing.text is None:
                    means[split].append(scene.image[scene.owner == thing.owner].mean(0))
                    labels[split].append(thing.label)
    x, y = np.stack(means["train"]), np.array(labels["train"])
    centres = np.stack([x[y == k].mean(0) for k in range(15)])
    guess = np.argmin(((np.stack(means["val"])[:, None] - centres) ** 2).sum(-1), 1)
    assert (guess == np.array(labels["val"])).mean() < 0.12  # chance is 0.067
    assert np.bincount(y, minlength=15).min() > 0.6 * len(y) / 15


@given(arrays(bool, st.tuples(st.integers(1, 40), st.integers(1, 40))))
@settings(max_examples=60, deadline=None)
def test_run_lengths_equal_pycocotools(mask: np.ndarray) -> None:
    assert scenes_rle.encode(mask) == coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


@given(
    st.integers(-180, 180), st.integers(10_000, 200_000), st.booleans(),
    st.floats(-50, 50, allow_nan=False), st.floats(-50, 50, allow_nan=False),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_poses_invert(degrees: int, scale: int, mirror: bool, u: float, v: float) -> None:
    pose = Pose(40 << 16, 50 << 16, scale, degrees, mirror)
    back = pose.backward(*pose.forward(np.array([u]), np.array([v])))
    np.testing.assert_allclose([back[0][0], back[1][0]], [u, v], atol=1e-6)


def test_rasteriser_is_the_identity_where_it_should_be() -> None:
    texture = np.random.default_rng(0).integers(0, 256, (32, 32, 4), dtype=np.uint8)
    same = sample(texture, (32, 32), Pose(16 << 16, 16 << 16, 1 << 16, 0), (0, 0, 32, 32))
    np.testing.assert_array_equal(same, texture)
    turned = sample(texture, (32, 32), Pose(16 << 16, 16 << 16, 1 << 16, 90), (0, 0, 32, 32))
    np.testing.assert_array_equal(turned, np.rot90(texture, -1))
    mirrored = sample(texture, (32, 32), Pose(16 << 16, 16 << 16, 1 << 16, 0, True), (0, 0, 32, 32))
    np.testing.assert_array_equal(mirrored, texture[:, ::-1])
    np.testing.assert_array_equal(resize(texture[..., :3], (0, 0, 32 << 16, 32 << 16), 32), texture[..., :3])
    plain = recolour(texture, hue_matrix(0, 256, 256))
    assert np.abs(plain.astype(int) - texture).max() <= 2
    grey = np.full((2, 2, 3), 90, np.uint8)
    for degrees in range(0, 360, 45):
        assert np.abs(recolour(grey, hue_matrix(degrees, 256, 256)).astype(int) - 90).max() <= 1  # grey has no hue


def test_every_font_draws_every_character() -> None:
    for split in ("train", "val"):
        for font in pack().fonts[split]:
            for char in "ABCXYZabcxyz0123456789!&-":
                cover, (x0, y0, x1, y1) = line(char, font)
                assert cover.max() > 200
                assert 0 < (x1 - x0) * (y1 - y0) < cover.size


def test_factory_and_refusals() -> None:
    data = load_dataset("scenes", "val", options={"n_val": 3, "size": 64})
    assert (len(data), data.size(0), data.image_id(2)) == (3, (64, 64), "000002")
    assert data.image(0).dtype == np.uint8
    data.image(0)[:] = 0
    assert data.image(0).any()  # a caller's changes do not reach the cache
    with pytest.raises(UsageError, match="no split 'test'"):
        load_dataset("scenes", "test")
    with pytest.raises(UsageError, match="n_vall"):
        load_dataset("scenes", "val", options={"n_vall": 3})
    for bad in ({"size": 10}, {"n_val": 0}, {"seed": -1}):
        with pytest.raises(UsageError):
            load_dataset("scenes", "val", options=bad)
    with pytest.raises(UsageError, match="64 to 1024"):
        Scenes("val", 1, size=2000)
    with pytest.raises(IndexError):
        data.image(3)


def test_import_is_light() -> None:
    code = "import sys, rice_eval.datasets.scenes_write; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_kept_renderings_are_the_rendering_and_a_full_disk_only_costs_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from rice_eval.datasets import scenes
    from rice_eval.datasets.scenes_render import render

    cache = scenes._Cache(limit=20_000)
    held = []
    for index in (0, 1, 2, 0, 1, 2):  # 64 px: 16 KB a scene, so that the file is begun anew on the way
        scene, fresh = cache.get(0, "train", index, 64), render(0, "train", index, 64)
        held.append((scene, fresh))
    for scene, fresh in held:
        np.testing.assert_array_equal(scene.image, fresh.image)
        np.testing.assert_array_equal(scene.owner, fresh.owner)

    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    many = scenes._Cache(limit=1 << 20)
    kept = [many.get(0, "train", index, 64) for index in range(20)]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # not one a scene
    assert len(kept) == 20

    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scenes.tempfile, "TemporaryFile", full)
    bare = scenes._Cache(limit=60_000)
    np.testing.assert_array_equal(bare.get(0, "train", 3, 64).image, render(0, "train", 3, 64).image)
