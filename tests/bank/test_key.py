from __future__ import annotations

from dataclasses import replace

import pytest
from bank_fakes import FakeDataset, facts

from rice_eval.bank.key import BankKey, check_dtype
from rice_eval.bank.request import bank_key, shard_length, tokens_bytes
from rice_eval.errors import BankError, PlanError, UsageError

KEY = BankKey("e" * 64, "d" * 64, "square=448", (3, 12), True, "fp16")

OTHERS = {
    "encoder": "f" * 64,
    "dataset": "f" * 64,
    "view": "square=224",
    "layers": (12,),
    "norm": False,
    "dtype": "int8",
    "compute": "bf16",
    "fill": (0, 0, 0),
    "format": 99,
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_field_is_in_the_digest(name: str):
    assert replace(KEY, **{name: OTHERS[name]}).digest != KEY.digest


def test_every_field_is_tried_above():
    assert set(OTHERS) == set(KEY.facts())


def test_facts_come_back_whole():
    assert BankKey.from_facts(KEY.facts()) == KEY
    for broken in ({}, {**KEY.facts(), "more": 1}, {**KEY.facts(), "layers": "x"}):
        with pytest.raises(BankError, match="facts can't be read"):
            BankKey.from_facts(broken)


@pytest.mark.parametrize("name", OTHERS)
def test_an_entry_serves_a_subset_of_its_layers_and_nothing_else(name: str):
    other = replace(KEY, **{name: OTHERS[name]})
    assert KEY.serves(other) == (name == "layers")
    assert not other.serves(KEY)


def test_requests_that_mean_the_same_have_one_key():
    data = FakeDataset()
    one = bank_key(facts(), data, "square=16", (-1, 1), True, "fp16")
    two = bank_key(facts(), data, " square=16,interp=bicubic", (1, 3, 3), True, "fp16")
    assert one == two
    assert one.layers == (1, 3)
    assert bank_key(facts(), data, "long=16,pad=patch", (3,), True, "fp16").view == "long=16,pad=4"


def test_how_the_forward_ran_tells_entries_apart():
    data = FakeDataset()
    ways = [{"autocast": a, "compiled": c} for a in (None, "bf16", "fp16") for c in (False, True)]
    keys = [bank_key(facts(), data, "square=16", (1,), True, "fp16", **way) for way in ways]
    assert len({key.digest for key in keys}) == len(ways)
    assert [key.compute for key in keys[:3]] == ["weights", "weights+compile", "bf16"]


def test_what_can_not_be_asked_for():
    data = FakeDataset()
    with pytest.raises(PlanError, match="layers 1 to 3"):
        bank_key(facts(), data, "square=16", (4,), True, "fp16")
    with pytest.raises(PlanError):
        bank_key(facts(), data, "square=16", (), True, "fp16")
    with pytest.raises(UsageError, match="choose one of fp16"):
        bank_key(facts(), data, "square=16", (1,), True, "fp8")
    with pytest.raises(UsageError, match="autocast"):
        bank_key(facts(), data, "square=16", (1,), True, "fp16", autocast="fp8")
    assert check_dtype("bf16") == "bf16"


def test_sizes_of_shards():
    key = bank_key(facts(), FakeDataset(), "square=448", (1, 3), True, "fp16")
    assert tokens_bytes(facts(), key, (480, 640)) == 2 * 112 * 112 * 8 * 2
    int8 = replace(key, dtype="int8")
    assert tokens_bytes(facts(), int8, (480, 640)) == 2 * 112 * 112 * (8 + 4)
    assert shard_length(facts(), key, 10) == 8
    assert shard_length(facts(), key, 300) == 32
    assert shard_length(facts(), key, 100_000) == 64
    wide = facts(width=4096)
    assert shard_length(wide, key, 100_000) == 16
