from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from bank_fakes import Collect, FakeDataset, FakeEncoder, facts, files, source
from torch import Tensor

from rice_eval.bank.extract import open_source
from rice_eval.bank.prefetch import ordered_map
from rice_eval.bank.shard import CAST
from rice_eval.bank.store import Bank
from rice_eval.errors import BankError, DataError, PlanError, UsageError
from rice_eval.views import View

MIXED = ((16, 16), (20, 24), (12, 40))
VIEWS = ("square=16", "native", "short=16,slide=8", "long=20,pad=patch,flip", "letterbox=16")


def by_hand(data: FakeDataset, view: str, index: int, layer: int) -> list[Tensor]:
    """The tokens of one image straight from the encoder, one frame at a time."""
    encoder = FakeEncoder()
    out = []
    for pixels, _ in View.parse(view).resolve(4).apply(data.image(index), (128, 128, 128)):
        image = torch.from_numpy(pixels.transpose(2, 0, 1).copy())[None].float() / 255
        out.append(encoder.encode(image, (layer,)).patches[layer][0])
    return out


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32", "int8"])
@pytest.mark.parametrize("view", VIEWS)
def test_bank_pass_and_direct_forward_agree(tmp_path: Path, view: str, dtype: str):
    data = FakeDataset(10, MIXED)
    cold, warm, ride = Collect(), Collect(), Collect()
    first = source(tmp_path, data, view=view, dtype=dtype)
    first.consume(cold)
    again = source(tmp_path, data, view=view, dtype=dtype)
    again.consume(warm)
    source(None, data, view=view, dtype=dtype).consume(ride)
    reader = again.reader()
    assert (first.forwards, again.forwards) == (10, 0)
    assert [t.index for t in cold.seen] == list(range(10))
    for a, b, c in zip(cold.seen, warm.seen, ride.seen):
        for other in (b, c, reader[a.index]):
            assert a.index == other.index
            assert a.frames == other.frames
            assert a.grids == other.grids
            for layer in (1, 3):
                for x, y in zip(a.patches[layer], other.patches[layer]):
                    assert torch.equal(x, y)
            assert torch.equal(a.cls, other.cls)
        assert a.target == b.target == c.target == (f"img-{a.index}", len(a.frames))
        for layer in (1, 3):
            for stored, exact, grid in zip(a.patches[layer], by_hand(data, view, a.index, layer), a.grids[layer]):
                assert stored.shape[0] == grid[0] * grid[1]
                if dtype == "int8":
                    scale = exact.abs().amax(dim=1, keepdim=True) / 127
                    assert torch.all((stored - exact).abs() <= 0.5001 * scale + 1e-6)
                else:
                    assert stored.dtype == CAST[dtype]
                    eps = torch.finfo(CAST[dtype]).eps
                    assert torch.allclose(stored.float(), exact, rtol=eps, atol=1e-6)


def test_bytes_do_not_depend_on_workers_or_batches(tmp_path: Path):
    data = FakeDataset(11, MIXED)
    banks = []
    for k, (workers, batch) in enumerate([(0, 3), (1, 3), (4, 3), (2, 1), (2, 64)]):
        root = tmp_path / str(k)
        source(root, data, view="native", workers=workers, batch_size=batch).extract()
        banks.append(files(root))
    assert all(bank == banks[0] for bank in banks)


def test_batches_do_not_cross_shards_and_group_equal_frames(tmp_path: Path):
    encoder = FakeEncoder()
    source(tmp_path, FakeDataset(9, ((16, 16), (20, 24))), encoder, view="native", batch_size=3).extract()
    # Shards of 4, 4 and 1 images: two of each size, then one.
    assert encoder.batches == [2, 2, 2, 2, 1]


def test_a_warm_bank_never_loads_the_encoder(tmp_path: Path):
    source(tmp_path).extract()

    def refuse() -> FakeEncoder:
        raise AssertionError("loaded")

    warm = open_source(refuse, facts(), FakeDataset(), "square=16", (1, 3), True, "fp16", Bank(tmp_path))
    warm.consume(Collect())
    assert warm.complete
    assert len(warm.reader()) == 20
    assert warm.forwards == 0
    assert warm.seconds == 0
    assert warm.images_per_second is None


def test_opening_a_source_touches_nothing(tmp_path: Path):
    source(tmp_path)
    assert files(tmp_path) == {}


def test_fewer_layers_come_from_the_entry_that_has_more(tmp_path: Path):
    full = source(tmp_path, layers=(1, 2, 3))
    full.extract()
    part = source(tmp_path, layers=(1, 2))
    consumer = Collect()
    part.consume(consumer)
    assert part.forwards == 0
    assert part.key == full.key
    assert set(consumer.seen[0].patches) == {1, 2}
    # The class token stored is layer 3's: handing it out as layer 2's would be wrong.
    assert consumer.seen[0].cls is None
    last = source(tmp_path, layers=(-1,))
    assert last.reader()[0].cls is not None
    assert source(tmp_path, layers=(1,), dtype="int8").key != full.key


def test_a_request_goes_on_with_an_unfinished_entry_that_has_more_layers(tmp_path: Path):
    source(tmp_path, layers=(1, 2, 3)).extract((0, 1))
    part = source(tmp_path, layers=(3,))
    part.extract()
    assert part.forwards == 12
    assert len(Bank(tmp_path).entries()) == 1


def test_more_layers_are_another_entry(tmp_path: Path):
    source(tmp_path, layers=(3,)).extract()
    more = source(tmp_path, layers=(1, 3))
    more.extract()
    assert more.forwards == 20
    assert len(Bank(tmp_path).entries()) == 2


def test_select_shows_some_layers(tmp_path: Path):
    made = source(tmp_path, layers=(1, 2, 3))
    some, consumer = made.select((2,)), Collect()
    some.consume(consumer)
    assert set(consumer.seen[0].patches) == set(some.reader()[3].patches) == {2}
    assert some.forwards == made.forwards == 20
    assert some.indices == made.indices
    with pytest.raises(PlanError):
        source(tmp_path, layers=(1,)).select((2,))


def test_several_consumers_share_one_pass(tmp_path: Path):
    encoder = FakeEncoder()
    one, two = Collect(), Collect()
    made = source(None, encoder=encoder)
    made.consume(one, two)
    assert sum(encoder.batches) == 20
    assert len(one.seen) == len(two.seen) == 20
    assert made.key is None
    assert made.bytes == 0


def test_without_storing_nothing_is_written(tmp_path: Path):
    made = source(tmp_path, store=False)
    made.consume(Collect())
    assert files(tmp_path) == {}
    with pytest.raises(BankError, match="not stored"):
        made.reader()
    source(tmp_path).extract()
    before = files(tmp_path)
    warm = source(tmp_path, store=False)
    warm.consume(Collect())
    assert warm.forwards == 0
    assert files(tmp_path) == before


def test_a_resumed_pass_shows_every_image_once_and_in_order(tmp_path: Path):
    source(tmp_path).extract((1, 3))
    consumer = Collect()
    rest = source(tmp_path)
    rest.consume(consumer)
    assert rest.forwards == 12
    assert [t.index for t in consumer.seen] == list(range(20))


def test_a_consumer_that_fails_leaves_a_bank_that_goes_on(tmp_path: Path):
    class Fails(Collect):
        def consume(self, tokens) -> None:
            super().consume(tokens)
            if len(self.seen) == 9:
                raise RuntimeError("stop")

    broken = source(tmp_path)
    with pytest.raises(RuntimeError, match="stop"):
        broken.consume(Fails())
    rest = source(tmp_path)
    rest.extract()
    assert rest.forwards <= 12
    source(tmp_path / "plain").extract()
    assert files(tmp_path / "plain") == {k: v for k, v in files(tmp_path).items() if not k.startswith("plain")}


def test_facts_for_the_record(tmp_path: Path):
    made = source(tmp_path, FakeDataset(8, MIXED), view="native")
    made.extract()
    assert made.frame_size == (16, 16)
    assert made.tokens_per_image == np.mean([16, 30, 30, 16, 30, 30, 16, 30])
    assert made.bytes == sum(len(v) for k, v in files(tmp_path).items() if k.endswith(".safetensors"))
    assert made.images_per_second is not None
    assert made.notes == ()


def test_progress_counts_images(tmp_path: Path):
    bars: list[list[int]] = []

    def progress(label: str, total: int):
        bars.append([total, 0])

        def advance(n: int) -> None:
            bars[-1][1] += n

        return advance

    source(tmp_path, progress=progress).extract()
    assert bars == [[20, 20]]


def test_facts_of_another_encoder_are_refused(tmp_path: Path):
    wrong = open_source(
        FakeEncoder, facts(sha256="f" * 64), FakeDataset(), "square=16", (1,), True, "fp16", Bank(tmp_path)
    )
    with pytest.raises(BankError, match="fingerprint"):
        wrong.extract()


def test_flags_that_do_not_exist(tmp_path: Path):
    with pytest.raises(UsageError, match="stop or skip"):
        source(tmp_path, on_bad_image="ignore")


def test_a_reader_refuses_what_is_not_there(tmp_path: Path):
    reader = source(tmp_path, FakeDataset(6, bad=(2,)), on_bad_image="skip").reader()
    for index in (2, -1):
        with pytest.raises(UsageError, match="no tokens"):
            reader[index]


def test_ordered_map_keeps_order_and_stays_close():
    taken: list[int] = []

    def items():
        for k in range(50):
            taken.append(k)
            yield k

    for place, value in enumerate(ordered_map(lambda k: k * k, items(), 3, 5)):
        assert value == place * place
        assert len(taken) <= place + 5
    assert list(ordered_map(lambda k: -k, range(3), 0, 1)) == [0, -1, -2]

    def fail(k: int) -> int:
        if k == 4:
            raise DataError("four")
        return k

    with pytest.raises(DataError, match="four"):
        list(ordered_map(fail, range(9), 2, 3))
