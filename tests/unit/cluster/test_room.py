"""What workers take of nodes, how many there may be, and what no node could hold."""

from __future__ import annotations

import pytest
from ray.exceptions import ActorDiedError, OutOfMemoryError

from aidocks.errors import InvalidSpec
from aidocks.specs.resources import Resources
from cluster.deaths import DEATHS, reason
from cluster.room import Kind, count_workers, default_kind, kind_of, require_room, threads_of
from cluster.view import view_of

HEAD = {"CPU": 0.0, "memory": 4e9}
SMALL = {"CPU": 4.0, "memory": 16e9}
LARGE = {"CPU": 16.0, "memory": 64e9}
GPUS = {"CPU": 16.0, "GPU": 4.0, "memory": 64e9}
CORE = Kind(cpus=1)


@pytest.mark.parametrize(
    ("nodes", "workers", "reserved", "count", "kind"),
    [
        ([SMALL, LARGE], None, 0, 20, CORE),
        ([HEAD, SMALL], None, 0, 4, CORE),
        ([HEAD], None, 0, 1, CORE),
        ([SMALL], 8, 0, 8, CORE),
        ([GPUS, GPUS], None, 0, 8, Kind(gpus=1)),
        ([GPUS, LARGE], None, 0, 4, Kind(gpus=1)),
        # Three workers on two GPUs take halves: thirds of both would lie on none.
        ([{"CPU": 8.0, "GPU": 2.0}], 3, 0, 3, Kind(gpus=0.5)),
        ([GPUS], 2, 0, 2, Kind(gpus=1)),
        # Who serves takes a part of every GPU, or whole ones.
        ([GPUS], None, 0.25, 4, Kind(gpus=0.75)),
        ([GPUS], None, 2, 2, Kind(gpus=1)),
        ([GPUS], None, 4, 1, Kind(gpus=1)),
    ],
)
def test_one_worker_for_each_gpu_or_else_for_each_core(
    nodes: list[dict[str, float]], workers: int | None, reserved: float, count: int, kind: Kind
) -> None:
    assert count_workers(nodes, workers, reserved) == count
    assert default_kind(nodes, workers, reserved) == kind


def test_what_waits_asks_an_autoscaler_for_more_but_not_for_everything() -> None:
    assert count_workers([HEAD], None, demand=100, growth=8) == 8
    assert count_workers([SMALL], None, demand=6, growth=8) == 6
    assert count_workers([SMALL], None, demand=100, growth=8) == 12
    assert count_workers([SMALL], None, demand=2, growth=8) == 4
    assert count_workers([SMALL], None, demand=100) == 4
    assert count_workers([SMALL], 3, demand=100, growth=8) == 3


def test_a_request_says_what_its_workers_take() -> None:
    gpu = Kind(gpus=1)
    nodes = [SMALL, LARGE]
    assert kind_of(CORE, None, None, nodes) == CORE
    assert kind_of(CORE, Resources(cpus=4), None, nodes) == Kind(cpus=4)
    assert kind_of(CORE, Resources(memory_gb=8), None, nodes) == Kind(cpus=1, memory=8 * 10**9)
    assert kind_of(gpu, Resources(gpus=0.5), None, nodes) == Kind(gpus=0.5)
    assert kind_of(gpu, Resources(gpus=0), None, nodes) == Kind(cpus=1)
    assert kind_of(gpu, Resources(cpus=2), None, nodes) == Kind(cpus=2, gpus=1)


def test_what_a_unit_is_known_to_need_is_reserved_as_far_as_a_node_goes() -> None:
    def memory(known: int, nodes: list[dict[str, float]], **asked: float) -> float:
        return kind_of(CORE, Resources(**asked), known, nodes).memory / 1e9

    assert memory(int(14.2e9), [SMALL, LARGE]) == 15
    assert memory(int(90e9), [SMALL, LARGE]) == 64
    assert memory(int(90e9), [SMALL, LARGE], cpus=4, memory_gb=100) == 100
    assert memory(int(5e9), [SMALL, LARGE], memory_gb=8) == 8
    assert memory(int(90e9), []) == 90, "nobody knows what an autoscaler brings"
    # Two of these do not meet on a node of 16 GB.
    assert 2 * memory(int(14.2e9), [SMALL]) > 16


def test_a_worker_with_more_memory_serves_whoever_needs_less() -> None:
    assert Kind(1, 0, 8).serves(Kind(1, 0, 4))
    assert not Kind(1, 0, 4).serves(Kind(1, 0, 8))
    assert not Kind(2, 0, 8).serves(Kind(1, 0, 4))
    assert [kind.worth(CORE) for kind in (CORE, Kind(cpus=4), Kind(cpus=0.5), Kind(cpus=2.5))] == [1, 4, 1, 3]
    assert Kind(gpus=1).worth(Kind(gpus=0.5)) == 2


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (Kind(cpus=32), "resources.cpus", 32),
        (Kind(cpus=1, gpus=1), "resources.gpus", 1),
        (Kind(cpus=1, memory=100 * 10**9), "resources.memory_gb", 100),
    ],
)
def test_what_no_node_could_hold_is_refused(kind: Kind, field: str, value: float) -> None:
    with pytest.raises(InvalidSpec, match="No node of the cluster can hold") as caught:
        require_room(kind, [SMALL, LARGE])
    assert (caught.value.field, caught.value.value) == (field, value)
    assert "2 nodes: 4 CPU, 16 GB of memory; 16 CPU, 64 GB of memory" in str(caught.value)
    require_room(Kind(cpus=16, memory=60 * 10**9), [SMALL, LARGE])


def test_threads_are_a_workers_cores_or_its_share() -> None:
    assert threads_of(Kind(cpus=3), Resources(cpus=3), 16, 2) == 3
    assert threads_of(CORE, None, 16, 4) == 4
    assert threads_of(CORE, None, 2, 4) == 1


def test_the_view_counts_what_is_alive_and_real_cores() -> None:
    rows = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 8.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 3.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"CPU": 64.0}},
        {"NodeID": "d", "Alive": True, "Resources": {"memory": 1e9}},
    ]
    view = view_of(rows, here="a", cores_here=4)
    assert (len(view.nodes), view.ids, view.cores) == (3, {"a", "b", "d"}, 7.0)


def test_a_death_for_want_of_memory_says_so() -> None:
    killed = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory. Details.")
    assert isinstance(killed, DEATHS)
    assert reason(killed).startswith("Its node ran out of memory.")
    assert not reason(ActorDiedError()).startswith("Its node ran out of memory.")
    assert reason(ActorDiedError()) == "The actor died unexpectedly before finishing this task."
