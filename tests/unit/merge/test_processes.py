"""A weight file that several processes compute: the same bytes, the same errors, and nobody left behind."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from aidocks.checkpoints.writer import SINGLE_FILE, ShardPlan, TensorPlan
from aidocks.errors import CorruptCheckpoint, ValueTooLarge, WorkerLost
from aidocks.executor import InProcessPool
from aidocks.merge.recipe import Operand, Source, TensorMerge
from aidocks.merge.shard import MergeShard
from aidocks.plan import UnitContext
from aidocks.processes import SLOT_BYTES, ComputeProcesses, PartMaker

#: Two sizes that one slot holds, one that it does not, one of several blocks, and one without values.
SHAPES = {"a": (40, 30), "b": (7,), "c": (700, 1100), "d": (300, 2000), "e": (0, 3), "f": (11, 5)}
LINEAR = {"weight": (0.3, 0.7), "normalize": True}
TIES = {"weight": (1.0,), "density": (0.5,), "lambda": 1.0, "normalize": True, "rescale": False}


@pytest.fixture
def processes() -> Iterator[ComputeProcesses]:
    begun = ComputeProcesses(2, ["aidocks.merge.shard"])
    yield begun
    begun.close()


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> Iterator[ComputeProcesses]:
    """Processes with a slot each: they cannot finish `c` and `d` before those are put together."""
    monkeypatch.setattr("aidocks.processes.AHEAD_BYTES", 2 * SLOT_BYTES)
    begun = ComputeProcesses(2, ["aidocks.merge.shard"])
    yield begun
    begun.close()


def sources(
    directory: Path, change: Callable[[dict[str, torch.Tensor]], Any] | None = None
) -> tuple[Source, ...]:
    """Save two models; ``change`` may change the tensors of the second."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(2):
        place = directory / f"model-{number}"
        place.mkdir(parents=True)
        tensors = {n: torch.randn(shape, generator=generator).bfloat16() for n, shape in SHAPES.items()}
        tensors["count"] = torch.arange(9)
        if number == 1 and change:
            change(tensors)
        save_file(tensors, place / "model.safetensors")
        (place / "config.json").write_text("{}")
        made.append(Source(reference=f"org/model-{number}", checkpoint=place))
    return tuple(made)


def unit(models: tuple[Source, ...], target: Path, dtype: str = "BF16") -> MergeShard:
    """Return what merges them: linearly, by TIES, and `f` and `count` as they are in the first."""
    both = (Operand(source=0, tensor=""), Operand(source=1, tensor=""))
    recipes = []
    for name, shape in {**SHAPES, "count": (9,)}.items():
        operands = tuple(operand.model_copy(update={"tensor": name}) for operand in both)
        fields: dict[str, Any] = {"name": name, "dtype": dtype, "shape": shape, "operands": operands}
        if name in ("f", "count"):
            how = {"operands": operands[:1], "dtype": "I64" if name == "count" else "BF16"}
        else:
            how = (
                {"method": "ties", "base": 0, "values": TIES}
                if name in ("a", "d")
                else {"method": "linear", "values": LINEAR}
            )
        recipes.append(TensorMerge.model_validate(fields | how))
    plans = tuple(TensorPlan(name=each.name, dtype=each.dtype, shape=each.shape) for each in recipes)
    shard = ShardPlan(file_name=SINGLE_FILE, tensors=plans)
    return MergeShard(directory=target, shard=shard, sources=models, tensors=tuple(recipes))


def test_processes_write_the_bytes_that_one_writes(tmp_path: Path, processes: ComputeProcesses) -> None:
    models = sources(tmp_path / "models")
    alone = unit(models, tmp_path / "alone").run(UnitContext(tmp_path)).files[0]
    assert processes.device == "cpu"
    for turn in range(2):  # they wait for the next unit, whatever was left of the one before
        (file,) = processes.run(unit(models, tmp_path / f"shared-{turn}"), tmp_path).files  # type: ignore[attr-defined]
        assert file.path.read_bytes() == alone.path.read_bytes()
        assert (file.sha256, file.bytes) == (alone.sha256, alone.bytes)
    assert load_file(alone.path)["d"].numel() * 2 > SLOT_BYTES


def test_the_pool_gives_divisible_units_to_them(tmp_path: Path, processes: ComputeProcesses) -> None:
    models = sources(tmp_path / "models")
    pool, said = InProcessPool(processes), list[str]()
    outcome = asyncio.run(pool.run(unit(models, tmp_path / "out"), tmp_path, said.append))
    assert (outcome.worker, said) == ("local", ["local"])
    assert processes.device == "cpu"
    asyncio.run(pool.close())
    assert processes.device is None
    # Without them it computes by itself.
    again = asyncio.run(pool.run(unit(models, tmp_path / "again"), tmp_path, said.append))
    assert again.result.files[0].sha256 == outcome.result.files[0].sha256


def spoil(tensors: dict[str, torch.Tensor]) -> None:
    tensors["c"][650, 3] = torch.nan
    tensors["d"][1, 1] = torch.nan


def test_an_error_names_the_first_tensor_as_it_does_in_one_process(
    tmp_path: Path, processes: ComputeProcesses
) -> None:
    broken = unit(sources(tmp_path / "models", spoil), tmp_path / "out")
    with pytest.raises(CorruptCheckpoint) as alone:
        broken.run(UnitContext(tmp_path))
    assert processes.device == "cpu"
    with pytest.raises(CorruptCheckpoint, match="c of org/model-1") as shared:
        processes.run(broken, tmp_path)
    assert (str(shared.value), shared.value.value) == (str(alone.value), alone.value.value)
    assert list((tmp_path / "out").iterdir()) == []
    assert processes.device is None


def test_a_field_that_is_to_blame_is_still_named(tmp_path: Path, processes: ComputeProcesses) -> None:
    models = sources(tmp_path / "models", lambda tensors: tensors["c"].fill_(3e38))
    assert processes.device == "cpu"
    with pytest.raises(ValueTooLarge) as refused:
        processes.run(unit(models, tmp_path / "out", "F16"), tmp_path)
    assert refused.value.field == "out_dtype"


class Halting:
    """A unit that stops, as it is put together, at its second part, until something is done to the processes.

    Args:
        within: The unit that it stands for.
        then: Done with the ids of the processes.
    """

    def __init__(self, within: MergeShard, then: Callable[[], Any]) -> None:
        self._within = within
        self._then = then
        self.label = within.label
        self.parts = within.parts

    def __reduce__(self) -> tuple[Any, ...]:
        return MergeShard.model_validate, (self._within.model_dump(),)

    def part_maker(self, context: UnitContext) -> PartMaker:
        return self._within.part_maker(context)

    def assemble(self, make: PartMaker) -> Any:
        def halting(name: str) -> Any:
            if name == self.parts[1]:
                self._then()
            return make(name)

        return self._within.assemble(halting)


def ids(processes: ComputeProcesses) -> list[int]:
    """Return the ids of the first process and of those that it became."""
    first = processes._process.pid  # type: ignore[union-attr]
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    return [first, *map(int, children)]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.parametrize("which", [0, 1])
def test_a_process_that_is_killed_ends_the_unit_and_leaves_nothing(
    tmp_path: Path, narrow: ComputeProcesses, which: int
) -> None:
    models = sources(tmp_path / "models")
    assert narrow.device == "cpu"
    pids = ids(narrow)
    assert len(pids) == 2
    halting = Halting(unit(models, tmp_path / "out"), lambda: os.kill(pids[which], signal.SIGKILL))
    with pytest.raises(WorkerLost, match=SINGLE_FILE):
        narrow.run(halting, tmp_path)
    assert list((tmp_path / "out").iterdir()) == []
    assert narrow.device is None


def test_a_cancelled_unit_ends_at_once(tmp_path: Path, narrow: ComputeProcesses) -> None:
    assert narrow.device == "cpu"
    reached, goes_on = Event(), Event()

    def halt() -> None:
        reached.set()
        goes_on.wait()

    halting = Halting(unit(sources(tmp_path / "models"), tmp_path / "out"), halt)
    raised: list[BaseException] = []

    def work() -> None:
        try:
            narrow.run(halting, tmp_path)
        except BaseException as error:
            raised.append(error)

    thread = Thread(target=work)
    thread.start()
    reached.wait()
    narrow.close()
    goes_on.set()
    thread.join()
    assert [type(error) for error in raised] == [WorkerLost]
    assert list((tmp_path / "out").iterdir()) == []


PARENT = """
import sys
from aidocks.processes import ComputeProcesses
begun = ComputeProcesses(2)
assert begun.device == "cpu"
first = begun._process.pid
print(first, open(f"/proc/{first}/task/{first}/children").read(), flush=True)
sys.stdin.read()
"""


def test_they_end_with_the_process_that_began_them() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        descriptors = [os.pidfd_open(pid) for pid in pids]
        parent.kill()
    for descriptor in descriptors:
        # Waits until the process has ended; the test's limit of time ends a test that waits in vain.
        ended = select.poll()
        ended.register(descriptor, select.POLLIN)
        ended.poll()
        os.close(descriptor)
    assert all(is_gone(pid) for pid in pids)
