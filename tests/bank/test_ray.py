"""``--executor ray`` on this machine: one cluster of two simulated nodes, one of which is taken away."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bank_fakes import files

from rice_eval.cards import catalogue
from rice_eval.cluster import RayOptions, _Cluster, execute_on_ray
from rice_eval.errors import CheckpointError, DataError, PlanError, RiceEvalError, UsageError
from rice_eval.plan import EncoderRef, Plan, TaskRef, make_plan, task_for_dataset
from rice_eval.progress import silent
from rice_eval.results.record import Record
from rice_eval.run import RunOptions, execute

os.environ["RAY_AUTH_MODE"] = "disabled"
VOLATILE = {"created", "seconds", "peak_memory_mb", "digests", "sha256"}


def make(encoder: str = "rgb-moments", weights: Path | None = None, train: int = 48) -> Plan:
    card = task_for_dataset(catalogue(()), "segmentation", "scenes", {})
    return make_plan(
        [EncoderRef(encoder, weights)],
        [TaskRef(card, None, train, 16)],
        protocol_ids=("gram-lda", "gram-ridge"),
        view="square=224",
    )


def options(root: Path, **more: Any) -> RunOptions:
    return RunOptions(results=root / "results", bank=root / "bank", panels=0, resamples=200, **more)


def plain(record: Record) -> dict[str, Any]:
    """What two runs of the same plan must agree on: everything but time, memory and rates."""
    out = {k: v for k, v in record.model_dump().items() if k not in VOLATILE}
    out["cost"].pop("images_per_second")
    out["environment"].pop("git")  # a commit may come in between
    return out


def test_tokens_must_be_stored(tmp_path: Path):
    with pytest.raises(PlanError, match="--no-store"):
        execute_on_ray(make(), options(tmp_path, store=False), silent)


@pytest.fixture
def cluster() -> Iterator[Any]:
    utils = pytest.importorskip("ray.cluster_utils")
    made = utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.mark.slow
def test_two_nodes_one_of_which_goes_away(tmp_path: Path, cluster: Any):
    plan = make(train=120)
    local = execute(plan, options(tmp_path / "local"), silent)
    second = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    seen: list[tuple[str, int]] = []

    def report(label: str, total: int):
        def advance(n: int) -> None:
            seen.append((label, n))
            if len(seen) == 2:
                cluster.remove_node(second, allow_graceful=False)

        return advance

    done: list[Any] = []
    spread = execute_on_ray(
        plan, options(tmp_path / "ray"), report, done.append, RayOptions(address=cluster.address, memory_gb=0.1)
    )
    for one, other in zip(spread, local, strict=True):
        expected = plain(other.record)
        assert {k: v for k, v in plain(one.record).items() if v != expected[k]} == {}
    assert len(done) == 2
    assert sum(n for label, n in seen if label == "rgb-moments") == 136
    assert files(tmp_path / "ray" / "bank") == files(tmp_path / "local" / "bank")
    warm = execute_on_ray(plan, options(tmp_path / "ray"), silent, None, RayOptions(address=cluster.address))
    assert [r.record.cost.forwards for r in warm] == [0, 0]


@pytest.mark.slow
def test_errors_of_ours_cross_machines_in_one_line(tmp_path: Path, cluster: Any):
    bad = tmp_path / "weights.safetensors"
    bad.write_bytes(b"no weights")
    with pytest.raises((CheckpointError, UsageError, DataError)) as caught:
        execute_on_ray(make(weights=bad), options(tmp_path / "run"), silent, None, RayOptions(address=cluster.address))
    assert isinstance(caught.value, RiceEvalError)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", ":1", "foo"])
def test_no_cluster_at_the_address(tmp_path: Path, address: str):
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="no Ray cluster at"):
        execute_on_ray(make(), options(tmp_path), silent, None, RayOptions(address=address))


def test_an_empty_address_starts_no_cluster_here(tmp_path: Path):
    pytest.importorskip("ray")
    with pytest.raises(UsageError, match="--address is empty"):
        execute_on_ray(make(), options(tmp_path), silent, None, RayOptions(address=" "))


class FakeRay:
    """Of Ray, what is asked about tasks: one never ends, another ends with an error."""

    def __init__(self, *machines: dict[str, float], error: Exception | None = None) -> None:
        self.machines, self.error, self.looks, self.cancelled = machines, error, 0, 0
        self.exceptions = pytest.importorskip("ray").exceptions

    def wait(self, left: list[Any], num_returns: int, timeout: float) -> tuple[list[Any], list[Any]]:
        self.looks += 1
        return (left[:1], left[1:]) if self.error is not None or self.looks > 3 else ([], left)

    def get(self, reference: Any) -> Any:
        if self.error is not None:
            raise self.error
        return reference

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": m} for m in self.machines] + [{"Alive": False, "Resources": {"GPU": 8.0}}]

    def cancel(self, reference: Any, force: bool) -> None:
        self.cancelled += 1


def test_a_run_that_no_machine_can_take_ends_with_one_line():
    ray = FakeRay({"CPU": 2.0, "memory": 1e9}, {"CPU": 8.0})
    with pytest.raises(PlanError, match=r"none of the cluster's 2 machines has .*CPU 1, GPU 1.*use --device cpu"):
        _Cluster(ray, {"num_cpus": 1, "num_gpus": 1.0, "max_retries": 8}, 0.0).gather(["a", "b"])
    assert ray.cancelled == 2
    # A machine may still come up, and one that is busy is waited for.
    assert _Cluster(FakeRay({"CPU": 2.0}), {"num_gpus": 1.0}, 60.0).gather(["a", "b"]) == ["a", "b"]
    assert _Cluster(FakeRay({"CPU": 2.0}), {"num_cpus": 2}, 0.0).gather(["a", "b"]) == ["a", "b"]


def test_what_goes_wrong_on_a_cluster_ends_the_run_as_on_one_machine():
    errors = pytest.importorskip("ray").exceptions
    full = OSError(errno.ENOSPC, "No space left on device", "/results")
    failed = errors.RayTaskError("job", "trace", full).as_instanceof_cause()
    with pytest.raises(OSError, match="No space left on device: '/results'") as caught:
        _Cluster(FakeRay(error=failed), {}, 0.0).gather(["a"])
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(PlanError, match="Ray lost a task .*finished shards stay"):
        _Cluster(FakeRay(error=errors.RaySystemError("the head is gone")), {}, 0.0).gather(["a"])
