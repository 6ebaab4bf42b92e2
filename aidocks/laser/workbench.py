"""A loaded model whose matrices are swapped for reduced ones and put back, bit for bit, and measured in between."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.causal_lm import CausalLM, load
from aidocks.evaluate.measurements import Pairs, decide, finite_losses
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.evaluate.scoring import Batch, Forward, Task, context_length, load_task
from aidocks.laser.matrices import Reduction, find_matrices, parse_address, stored_matrix
from aidocks.laser.suffix import LEAST_LIMIT, SuffixForward, cache_limit
from aidocks.laser.truncation import load_basis, reduce
from aidocks.plan import UnitContext, WorkerCache

# transformers 5 keeps the experts of a layer in two three-dimensional parameters, whose first half along
# the middle axis is the gate; checkpoints name each expert's matrices, as Mixtral (w1, w2, w3) or as its
# successors do.
_EXPERT = re.compile(r"(?P<prefix>.+\.experts)\.(?P<expert>\d+)\.(?P<kind>\w+)\.weight")
_FUSED_KINDS = {
    "w1": ("gate_up_proj", 0),
    "gate_proj": ("gate_up_proj", 0),
    "w3": ("gate_up_proj", 1),
    "up_proj": ("gate_up_proj", 1),
    "w2": ("down_proj", None),
    "down_proj": ("down_proj", None),
}
State = dict[str, Reduction]
#: States whose losses on one part of an objective a worker remembers; those of the latest are needed again.
_KEPT_MEASUREMENTS = 1024


class _Known(NamedTuple):
    """Losses of one state on one task, as far as they were measured: those of its items, by the number of a batch."""

    task: str
    state: State
    losses: dict[int, list[float]]


class Slot(NamedTuple):
    """Where a loaded network keeps a matrix of its checkpoint.

    Attributes:
        parameter: The whole parameter.
        expert: Which slice of it along the first axis; None for all of it.
        half: Which half of that along the next axis (gate 0, up 1); None for all of it.
    """

    parameter: torch.Tensor
    expert: int | None = None
    half: int | None = None

    def view(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the matrix's part of a tensor of the parameter's shape (itself, its gradient), as a 2-D view."""
        part = tensor if self.expert is None else tensor[self.expert]
        return part if self.half is None else part.chunk(2)[self.half]

    @property
    def values(self) -> torch.Tensor:
        """The loaded values, as a view that can be written to."""
        return self.view(self.parameter.data)


class Workbench:
    """One model on one worker, in a known state: the base reductions, and for a moment others on top of them.

    A reduced matrix is always computed from the stored one, as the writer of the result does, and a matrix
    that is put back comes from a copy taken when it was first replaced: so a state never depends on the
    states before it. Therefore its losses are measured once: a change that is accepted brings those of the next base
    along, and the figures of the result cost nothing more.
    """

    def __init__(self, model: CausalLM, checkpoint: Checkpoint, *, limit: int = LEAST_LIMIT) -> None:
        self.model = model
        self.suffix = SuffixForward(model.network, limit=limit)
        self.applied: State = {}
        self.base: State = {}
        self._checkpoint = checkpoint
        self._matrices = {m.address: m for m in find_matrices(checkpoint.entries, all_weights=True)}
        self._slots: dict[str, Slot] = {}
        self._originals: dict[str, torch.Tensor] = {}
        self._reduced: dict[Reduction, torch.Tensor] = {}
        self._part: Part | None = None
        self._tasks: dict[str, Task] = {}
        self._measured = WorkerCache(_KEPT_MEASUREMENTS)

    def apply(self, reductions: Sequence[Reduction]) -> None:
        """Bring the model to the state in which exactly these matrices are reduced; of one matrix the last counts.

        Raises:
            IncompatibleModels: When transformers keeps one of them in a form that is not known here.
        """
        state = {reduction.address: reduction for reduction in reductions}
        for address in [address for address in self.applied if address not in state]:
            self._slot(address).values.copy_(self._originals.pop(address))
            del self.applied[address]
        for address, reduction in state.items():
            if self.applied.get(address) == reduction:
                continue
            slot = self._slot(address)
            reduced = self._reduce(reduction, slot)
            if address not in self._originals:
                self._originals[address] = slot.values.clone()
            # Noted before the copy: if that is interrupted, the next call still puts the original back.
            self.applied[address] = reduction
            slot.values.copy_(reduced)

    def set_base(self, reductions: Sequence[Reduction]) -> None:
        """Choose the state that changes are compared with; what was kept of the layers below the change stays."""
        base = {reduction.address: reduction for reduction in reductions}
        changed = [
            address
            for address in base.keys() | self.base.keys()
            if base.get(address) != self.base.get(address)
        ]
        if changed:
            # Forgotten first: when the new base turns out to be impossible, nothing stale is left.
            self.suffix.forget(self._start(changed))
            self.base = base

    def expect(self, sources: Sequence[ObjectiveSource], part: Part) -> None:
        """Get ready to measure on a part of all these objectives, among which the memory for outputs is then divided.

        Raises:
            InvalidSpec: As :func:`~aidocks.evaluate.scoring.load_task`.
        """
        if part != self._part:
            # The units of one stage are of one part: what was kept of another is not needed any more.
            self._part = part
            self._tasks.clear()
            self.suffix.forget()
        fresh = {key: source for source in sources if (key := source.model_dump_json()) not in self._tasks}
        longest = context_length(self.model.network)
        for key, source in fresh.items():
            self._tasks[key] = load_task(source, part, self.model.tokenizer, longest=longest)
        if fresh:
            batches = [batch for task in self._tasks.values() for batch in task.batches]
            self.suffix.expect(sum(batch.ids_BT.numel() for batch in batches))

    def measure(
        self,
        source: ObjectiveSource,
        part: Part,
        added: Sequence[Reduction] = (),
        *,
        z_threshold: float | None = None,
        share: float = 1.0,
    ) -> Pairs:
        """Measure the base and the base with further reductions on the same items.

        Args:
            source: With sizes.
            part: Of its data.
            added: On top of the base.
            z_threshold: Stop at a look as soon as :func:`~aidocks.evaluate.measurements.decide` has decided; None
                to measure all items. It always stops at the first loss of a changed model that is not finite.
            share: Stop, decided or not, at the first look that has this share of the items.

        Returns:
            The items measured so far, and their losses.
        """
        self.expect([source], part)
        task = self._tasks[source.model_dump_json()]
        state = self.base | {reduction.address: reduction for reduction in added}
        self._reduced = {r: reduced for r, reduced in self._reduced.items() if r in state.values()}
        of_base, of_state = self._known(source, part, self.base), self._known(source, part, state)
        positions: list[int] = []
        before: list[float] = []
        after: list[float] = []
        tokens = 0
        for batches in task.segments:
            # All of the base first: the changed matrices are put in once for a segment.
            for batch in batches:
                self._complete(of_base, task, batch)
            for batch in batches:
                self._complete(of_state, task, batch)
                positions += [item.position for item in batch.items]
                before += of_base.losses[batch.number]
                after += of_state.losses[batch.number]
                tokens += batch.tokens
                if None in finite_losses(of_state.losses[batch.number]):
                    return self._pairs(task, positions, before, after, tokens)
            pairs = self._pairs(task, positions, before, after, tokens)
            decided = z_threshold is not None and decide(pairs, task.size, z_threshold) != "continue"
            if decided or len(positions) >= share * task.size:
                break
        return pairs

    def _known(self, source: ObjectiveSource, part: Part, state: State) -> _Known:
        """Return what was measured of a state on a part of an objective; whatever is measured next is added to it."""
        task = source.model_dump_json()
        reductions = sorted(reduction.model_dump_json() for reduction in state.values())
        losses = self._measured.get("\n".join((part, task, *reductions)), dict)
        return _Known(task, state, losses)

    def _complete(self, known: _Known, task: Task, batch: Batch) -> None:
        """Measure a batch in a state, unless that was done before."""
        if batch.number in known.losses:
            return
        self.apply(list(known.state.values()))
        start = self._start([a for a, reduction in known.state.items() if reduction != self.base.get(a)])
        forward: Forward = partial(self.suffix.forward, (known.task, batch.number), start=start)
        with torch.inference_mode():
            known.losses[batch.number] = task.losses(batch, forward).tolist()

    def _pairs(
        self, task: Task, positions: list[int], before: list[float], after: list[float], tokens: int
    ) -> Pairs:
        return Pairs(
            metric=task.metric,
            positions=tuple(positions),
            before=finite_losses(before),
            after=finite_losses(after),
            tokens=tokens,
            dtype=str(self.model.dtype).removeprefix("torch."),
        )

    def _start(self, addresses: Sequence[str]) -> int:
        """Return the first layer that a change of these matrices touches."""
        starts = [self.suffix.start_of(self._slot(address).parameter) for address in addresses]
        return min(starts, default=self.suffix.depth)

    def _slot(self, address: str) -> Slot:
        if address not in self._slots:
            self._slots[address] = locate(self.model.network, address)
        return self._slots[address]

    def _reduce(self, reduction: Reduction, slot: Slot) -> torch.Tensor:
        """Return what the writer of the result writes for a reduction, before the network's type rounds it."""
        if reduction not in self._reduced:
            matrix = self._matrices.get(reduction.address)
            if matrix is None:
                raise _not_addressable(reduction.address)
            stored = stored_matrix(self._checkpoint, matrix).to(slot.values.device)
            if reduction.address not in self._originals and not _same(slot.values, stored):
                raise _not_addressable(reduction.address)
            basis = load_basis(reduction.basis, str(stored.device))
            self._reduced[reduction] = reduce(stored, basis, reduction.rank, shrink=reduction.shrink)
        return self._reduced[reduction]


def _same(loaded: torch.Tensor, stored: torch.Tensor) -> bool:
    """Say whether a matrix is kept as it is stored; some models transpose or merge theirs while loading."""
    return loaded.shape == stored.shape and torch.equal(loaded, stored.to(loaded.dtype))


def locate(network: Any, address: str) -> Slot:
    """Return where a loaded network keeps a matrix of its checkpoint; see :func:`locate_all`."""
    return locate_all(network, (address,))[address]


def locate_all(network: Any, addresses: Iterable[str]) -> dict[str, Slot]:
    """Return where a network keeps matrices, in order; its parameters are looked up once for all of them.

    Raises:
        IncompatibleModels: When transformers keeps a matrix in a form that is not known here.
    """
    parameters = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {address: _find(parameters, network.base_model_prefix, address) for address in addresses}


def _find(parameters: Mapping[str, torch.Tensor], prefix: str, address: str) -> Slot:
    name, expert = parse_address(address)
    for spelling in (
        name,
        f"{prefix}.{name}",
        name.replace(".block_sparse_moe.", ".mlp."),
    ):
        found = parameters.get(spelling)
        if found is None:
            continue
        if found.ndim == (2 if expert is None else 3) and (expert is None or expert < len(found)):
            return Slot(found, expert)
    match = _EXPERT.fullmatch(address.replace(".block_sparse_moe.", ".mlp."))
    if match and match["kind"] in _FUSED_KINDS:
        parameter, half = _FUSED_KINDS[match["kind"]]
        fused = parameters.get(f"{match['prefix']}.{parameter}")
        if fused is not None and int(match["expert"]) < fused.shape[0]:
            return Slot(fused, int(match["expert"]), half)
    raise _not_addressable(address)


def _not_addressable(address: str) -> IncompatibleModels:
    return IncompatibleModels(
        f"transformers does not keep the matrix {address} in a form that can be replaced.",
        field="base_model_name",
        hint="Leave its kind out of `kinds`.",
    )


def workbench(path: Path, dtype: str | None, context: UnitContext) -> Workbench:
    """Return the worker's workbench for a checkpoint; the model is loaded once."""

    def make() -> Workbench:
        model = load(path, dtype, context.device)
        share = min(1.0, context.threads / (os.cpu_count() or 1))
        return Workbench(model, Checkpoint(path), limit=cache_limit(model.network.device, share))

    bench: Workbench = context.keep(f"workbench:{dtype}", path, make, large=True)
    return bench
