"""Matrices of one shape decomposed as one batch, where the workers have GPUs.

One decomposition of some hundred or thousand rows leaves a GPU mostly idle; a core of a CPU gains nothing from several
at once. So a plan first asks a worker what it has. Without a GPU every matrix stays a unit of its own; with one, units
of equal matrices are put together, as many as its memory holds. The results are the same up to rounding, and depend on
the kind of device, not on the number of workers.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field

from aidocks.laser.matrices import Matrix
from aidocks.plan import Stage, Unit, UnitContext

#: Matrices of a batch, at most: more leave other workers without any.
_MOST_MATRICES = 16
#: Share of a GPU's memory that one batch may take.
_SHARE = 0.25
_FLOAT64_BYTES = 8


class Device(BaseModel):
    """What the workers compute on.

    Attributes:
        gpu_bytes: Memory of a worker's GPU; 0 where it has none.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_bytes: int = Field(0, ge=0)


class LookAtDevice(Unit[Device]):
    """What the worker that runs it has. All workers of a pool are alike."""

    result_type: ClassVar[type[BaseModel]] = Device

    @property
    def label(self) -> str:
        return "what the workers compute on"

    def run(self, context: UnitContext) -> Device:
        if not context.device.startswith("cuda"):
            return Device()
        import torch

        return Device(gpu_bytes=torch.cuda.get_device_properties(context.device).total_memory)


class OfMatrix(Protocol):
    """A unit about one matrix."""

    @property
    def matrix(self) -> Matrix: ...


class Batch(Protocol):
    """The result of a unit that does the work of several."""

    @property
    def results(self) -> Sequence[Any]: ...


def look_at_device() -> Generator[Stage, list[Any], Device]:
    """Yield the stage that asks a worker; return what it says."""
    (device,) = yield Stage("device", (LookAtDevice(),))
    assert isinstance(device, Device)
    return device


def run_in_batches(
    name: str, units: Sequence[Any], device: Device, together: Callable[[tuple[Any, ...]], Unit[Any]]
) -> Generator[Stage, list[Any], list[Any]]:
    """Yield the stage of units about one matrix each; return their results in their order.

    Args:
        name: Of the stage.
        units: In the order in which they are to begin.
        device: What they run on.
        together: Makes the unit that does the work of several, whose result is a :class:`Batch`.
    """
    groups = group(units, device)
    members = [tuple(units[place] for place in places) for places in groups]
    if not members:
        return []
    answers = yield Stage(name, tuple(one[0] if len(one) == 1 else together(one) for one in members))
    found: dict[int, Any] = {}
    for places, answer in zip(groups, answers, strict=True):
        found.update(zip(places, [answer] if len(places) == 1 else answer.results, strict=True))
    return [found[place] for place in range(len(units))]


def group(units: Sequence[OfMatrix], device: Device) -> list[list[int]]:
    """Return the places of the units that are run together: each alone without a GPU, else those of equal shape.

    Groups are in the order of their first members.
    """
    groups: list[list[int]] = []
    open_groups: dict[tuple[int, int], list[int]] = {}
    for place, unit in enumerate(units):
        shape = unit.matrix.shape
        members = open_groups.get(shape)
        if members is None or len(members) >= _most(shape, device):
            members = open_groups[shape] = []
            groups.append(members)
        members.append(place)
    return groups


def label_of(units: Sequence[OfMatrix]) -> str:
    """Name a batch for people."""
    first = units[0].matrix
    rows, columns = first.shape
    return f"{first.address} and {len(units) - 1} more of {rows} x {columns}"


def _most(shape: tuple[int, int], device: Device) -> int:
    """Return how many matrices of a shape are decomposed at once."""
    rows, columns = shape
    side = min(shape)
    # The matrix and its images; second moments and their factor; Gram matrix, eigenvectors, and twice as much to work.
    needed = _FLOAT64_BYTES * (2 * rows * columns + 2 * columns**2 + 4 * side**2)
    return max(1, min(_MOST_MATRICES, int(_SHARE * device.gpu_bytes) // needed))
