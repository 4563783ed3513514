"""LLaVA's data and the two stages: what is tuned, what a killed run goes on to, what several processes agree on."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from tiny_mllm import picture, write

from rice_eval.errors import CheckpointError, DataError, MissingExtraError, UsageError
from rice_eval.mllm.checkpoints import load
from rice_eval.mllm.conversation import Request, Turn
from rice_eval.mllm.llava_data import LlavaData, batches
from rice_eval.mllm.llava_recipe import STAGE1, STAGE2, STAGE2_LORA, Recipe
from rice_eval.mllm.llava_train import train
from rice_eval.mllm.trained import load_trained


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write(folder, "llava_next")
    return folder


@pytest.fixture(scope="module")
def talks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("talks")
    entries = []
    for n in range(10):
        colour = ["red", "blue", "green"][n % 3]
        entry = {"id": n, "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": colour}]}
        if n % 4 != 3:
            picture(40 + 9 * n, 60, seed=n).save(folder / f"{n}.png")
            entry["image"] = f"{n}.png"
            entry["conversations"][0]["value"] = "What?\n<image>"
        entries.append(entry)
    (folder / "talks.json").write_text(json.dumps(entries))
    return folder


def tiny_of(recipe: Recipe, **changes) -> Recipe:
    return replace(recipe, **{"batch": 3, "bf16": False, "lr": 5e-3, "epochs": 2, "warmup": 0.2, **changes})


def read(talks: Path, recipe: Recipe) -> LlavaData:
    return LlavaData(talks / "talks.json", talks, plain=recipe.plain)


def weights(mllm) -> dict[str, dict[str, torch.Tensor]]:
    return {
        "tower": {n: t.clone() for n, t in mllm.encoder.tunable().state_dict().items()},
        "projector": {n: t.clone() for n, t in mllm.projector.state_dict().items()},
        "newline": {"n": mllm.newline.detach().clone()},
        "lm": {n: t.clone() for n, t in mllm.lm.model.state_dict().items()},
    }


def changed(before, after) -> set[str]:
    return {part for part in before if any(not torch.equal(t, after[part][n]) for n, t in before[part].items())}


def test_the_published_numbers():
    # unicom, mlcd_vl/scripts: 8 GPUs x 16 and 8 x 2 x 8.
    assert (STAGE1.lr, STAGE1.batch, STAGE1.tuned) == (1e-3, 128, ("projector",))
    assert (STAGE2.lr, STAGE2.tower_lr, STAGE2.batch) == (1e-5, 2e-6, 128)
    assert {"tower", "projector", "lm"} < set(STAGE2.tuned)
    assert "tower" not in STAGE2_LORA.tuned
    assert len({r.hash() for r in (STAGE1, STAGE2, STAGE2_LORA)}) == 3
    assert replace(STAGE1, name="another").hash() == STAGE1.hash()
    assert replace(STAGE1, seed=1).hash() != STAGE1.hash()
    assert replace(STAGE1, lora_rank=1).hash() == STAGE1.hash()  # nothing reads it there


def test_the_schedule_is_transformers():
    from transformers import get_cosine_schedule_with_warmup

    for steps in (7, 40):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        schedule = get_cosine_schedule_with_warmup(optimizer, -(-3 * steps // 100), steps)
        for step in range(steps):
            assert STAGE1.rate(step, steps) == pytest.approx(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()


@pytest.mark.parametrize(
    ("recipe", "parts", "own"),
    [
        (STAGE1, {"projector"}, {"projector.safetensors"}),
        (
            STAGE2,
            {"tower", "projector", "newline", "lm"},
            {"projector.safetensors", "tower.safetensors", "newline.safetensors", "lm.safetensors"},
        ),
        (
            STAGE2_LORA,
            {"projector", "newline", "lm"},
            {"projector.safetensors", "newline.safetensors", "lm.safetensors"},
        ),
    ],
    ids=lambda v: v.name if isinstance(v, Recipe) else "",
)
def test_a_stage_tunes_its_parts_and_no_other(tiny, talks, tmp_path, recipe, parts, own):
    if "lm-lora" in recipe.tuned:
        pytest.importorskip("peft")
    recipe = tiny_of(recipe, lora_rank=2, lora_alpha=4)
    mllm = load(tiny)
    before, fingerprint = weights(mllm), mllm.fingerprint()
    done = train(mllm, recipe, read(talks, recipe), tmp_path / "out", portion=2)
    after = weights(mllm)
    assert changed(before, after) == parts
    assert mllm.fingerprint() != fingerprint
    assert done.losses[-1] < done.losses[0]
    assert not any(p.requires_grad for p in mllm.lm.model.parameters())
    assert {p.name for p in (tmp_path / "out").iterdir()} == own | {"trained.json"}
    told = mllm.facts()["training"][0]
    assert told["tuned"] == list(recipe.tuned)
    assert told["hash"] == recipe.hash()

    again = load(tiny)
    assert load_trained(again, tmp_path / "out")["losses"] == done.losses
    assert not changed(after, weights(again))
    assert again.fingerprint() == mllm.fingerprint()
    request = Request("What?", (picture(80, 50),))
    assert torch.equal(again.logits(request), mllm.logits(request))


def test_portions_do_not_change_the_result(tiny, talks, tmp_path):
    recipe = tiny_of(STAGE2, epochs=1)
    ends = []
    for portion in (1, 3):
        mllm = load(tiny)
        losses = train(mllm, recipe, read(talks, recipe), tmp_path / str(portion), portion=portion).losses
        ends.append((losses, mllm.projector.state_dict()))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-4)
    for name, tensor in ends[0][1].items():
        torch.testing.assert_close(tensor, ends[1][1][name], atol=2e-3, rtol=0)


def train_and_die(tiny: Path, talks: Path, recipe: Recipe, folder: Path, threads: int) -> None:
    """Train, saving every other step, and be killed at the fifth."""

    def killed(step: int, steps: int, loss: float) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(threads)
    train(load(tiny), recipe, read(talks, recipe), folder, save_every=2, on_step=killed)


@pytest.mark.parametrize("recipe", [STAGE1, STAGE2, STAGE2_LORA], ids=lambda r: r.name)
def test_a_killed_run_goes_on_to_the_same_end(tiny, talks, tmp_path, recipe):
    if "lm-lora" in recipe.tuned:
        pytest.importorskip("peft")
    recipe = tiny_of(recipe, lora_rank=2)
    whole = load(tiny)
    want = train(whole, recipe, read(talks, recipe), tmp_path / "whole", save_every=2)

    # A process of its own, not a fork: torch's threads do not survive one.
    child = multiprocessing.get_context("spawn").Process(
        target=train_and_die, args=(tiny, talks, recipe, tmp_path / "cut", torch.get_num_threads())
    )
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["state-000000004"]
    with pytest.raises(CheckpointError, match="no finished training"):
        load_trained(load(tiny), tmp_path / "cut")

    seen = []
    mllm = load(tiny)
    got = train(
        mllm, recipe, read(talks, recipe), tmp_path / "cut", save_every=2, on_step=lambda s, n, loss: seen.append(s)
    )
    assert seen[0] == 5
    assert got.losses == want.losses
    assert not changed(weights(whole), weights(mllm))
    for name in ("projector.safetensors", "lm.safetensors", "trained.json"):
        if (tmp_path / "whole" / name).exists():
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_state_of_another_training_is_refused(tiny, talks, tmp_path):
    recipe = tiny_of(STAGE1)

    class Stop(Exception):
        pass

    def stop(step, steps, loss):
        if step == 3:
            raise Stop

    with pytest.raises(Stop):
        train(load(tiny), recipe, read(talks, recipe), tmp_path, save_every=2, on_step=stop)
    with pytest.raises(UsageError, match="another recipe"):
        train(load(tiny), replace(recipe, lr=1.0), read(talks, recipe), tmp_path)
    state = next(tmp_path.glob("state-*"))
    for file in state.glob("model*"):
        file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="can't be read"):
        train(load(tiny), recipe, read(talks, recipe), tmp_path)
    (state / "facts.json").write_text("{")
    with pytest.raises(CheckpointError, match="no whole state"):
        train(load(tiny), recipe, read(talks, recipe), tmp_path)


def test_without_peft_one_line(tiny, talks, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    recipe = tiny_of(STAGE2_LORA)
    with pytest.raises(MissingExtraError, match="peft"):
        train(load(tiny), recipe, read(talks, recipe), tmp_path)


@pytest.mark.slow
def test_two_processes_agree_with_one(tiny, talks, tmp_path):
    recipe = tiny_of(STAGE2, epochs=1)
    mllm = load(tiny)
    want = train(mllm, recipe, read(talks, recipe), tmp_path / "one").losses
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_llava_recipe import *\n"
        "if __name__ == '__main__':\n"
        "    tiny, talks, out = map(Path, sys.argv[1:4]); recipe = tiny_of(STAGE2, epochs=1)\n"
        "    train(load(tiny), recipe, read(talks, recipe), out)\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tiny), str(talks), str(tmp_path / "two")],
        capture_output=True,
        text=True,
        timeout=560,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    got = json.loads((tmp_path / "two" / "trained.json").read_text())["losses"]
    assert got == pytest.approx(want, rel=1e-4)


def test_marks_and_roles(talks):
    data = read(talks, STAGE2)
    assert len(data) == 10
    example = data[0]
    assert example.turns == (Turn("user", "<image>\nWhat?"), Turn("assistant", "red"))
    assert example.images[0].size == (40, 60)
    assert data[3].images == ()
    assert data.words(3) < 0 < data.words(0)


def test_batches_hold_one_kind_and_depend_on_the_seed_alone(talks):
    data = read(talks, STAGE2)
    for grouped in (False, True):
        plan = batches(data, 2, grouped=grouped, seed=1, epoch=0)
        assert plan == batches(data, 2, grouped=grouped, seed=1, epoch=0)
        assert plan != batches(data, 2, grouped=grouped, seed=1, epoch=1)
        assert sorted(n for b in plan for n in b) == list(range(10))
        assert not grouped or all(len({data.words(n) > 0 for n in b}) == 1 for b in plan)
    assert sum(map(len, batches(data, 4, grouped=True, seed=0, epoch=0))) == 8
    assert [len(b) for b in batches(data, 64, grouped=True, seed=0, epoch=0)] == [10]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[", "no JSON"),
        ("{}", "no list"),
        ("[]", "no list"),
        ('[{"id": 1}]', "entry 0: has no list"),
        ('[{"conversations": [{"from": "cat", "value": "x"}]}]', "from"),
        ('[{"conversations": [{"from": "human", "value": "x"}]}]', "does not end with an answer"),
        (
            '[{"conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}]',
            "1 <image> marks and 0",
        ),
        ('[{"image": 3, "conversations": [{"from": "gpt", "value": "x"}]}]', "'image'"),
    ],
)
def test_bad_data_is_one_line(tmp_path, text, match):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(DataError, match=match) as caught:
        LlavaData(tmp_path / "data.json", tmp_path)
    assert "\n" not in str(caught.value)


def test_images_that_can_not_be_opened_are_named(tmp_path):
    entry = {"image": "cut.png", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    data = LlavaData(tmp_path / "data.jsonl", tmp_path)
    with pytest.raises(DataError, match=r"cut\.png"):
        data[0]
    picture(64, 64).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:300])
    with pytest.raises(DataError, match=r"cut\.png"):
        data[0]
    with pytest.raises(DataError, match="folder of the images"):
        LlavaData(tmp_path / "data.jsonl", None)


@pytest.mark.parametrize(
    "change",
    [
        {"tuned": ()},
        {"tuned": ("lm", "lm-lora")},
        {"tuned": ("head",)},
        {"lr": 0.0},
        {"lr": float("nan")},
        {"lr": float("inf")},
        {"tower_lr": -1.0},
        {"projector_lr": 0.0},
        {"weight_decay": -1.0},
        {"betas": (0.9,)},
        {"betas": (2.0, 3.0)},
        {"seed": -1},
        {"clip": float("nan")},
    ],
    ids=str,
)
def test_recipes_that_can_not_be(change):
    with pytest.raises(UsageError):
        replace(STAGE1, **change)


def test_both_stages_from_the_command_line(talks, tmp_path, capsys):
    from rice_eval.cli.main import main
    from rice_eval.mllm.parts import load_model

    def run(*arguments: str) -> int:
        with pytest.raises(SystemExit) as end:
            main(["mllm", "llava", "--data", str(talks / "talks.json"), "--images", str(talks), *arguments])
        return int(end.value.code or 0)

    small = ["--set", "bf16=false", "--set", "batch=4"]
    parts = ["--encoder", "random-vit-s-14", "--lm", "tiny-random", "--side", "28"]
    first, second = tmp_path / "one", tmp_path / "two"
    assert run("--stage", "1", *parts, "--out", str(first), *small) == 0
    assert run("--stage", "2", "--start", str(first), "--out", str(second), *small, "--set", "lr=0.001") == 0
    assert "step 2 of 2" in capsys.readouterr().out
    mllm = load_model(second)
    assert [r.name for r in mllm.tuned] == ["llava-next-stage1", "llava-next-stage2"]
    assert mllm.tuned[1].lr == 0.001
    assert mllm.tiling.kind == "anyres"
    assert load_model(first).tiling.kind == "single"
    assert mllm.fingerprint() == load_model(second).fingerprint()
    assert mllm.encoder.fingerprint != load_model(first).encoder.fingerprint
    assert mllm.generate([Request("What?", (picture(50, 70),))], 3)

    capsys.readouterr()
    for wrong, match in (
        (["--stage", "3", *parts], "no such stage"),
        (["--stage", "1"], "no model is given"),
        (["--stage", "2", "--start", str(tmp_path)], "no finished training"),
        (["--stage", "2", "--start", str(first), "--projector", "linear"], "--projector says what a model is made of"),
        (["--stage", "2", "--start", str(first), *parts], "--start is a whole one"),
        (["--stage", "1", *parts, "--set", "rate=3"], "no such field"),
        (["--stage", "1", *parts, "--set", "batch=many"], "does not fit"),
    ):
        assert run("--out", str(tmp_path / "three"), *wrong) == 2
        said = capsys.readouterr().err
        assert match in said
        assert said.strip().count("\n") == 0
