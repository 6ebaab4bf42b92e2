"""A loaded model whose tensors are overwritten by merged ones, for as long as these are measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.causal_lm import CausalLM, load
from aidocks.evaluate.measurements import finite_losses
from aidocks.evaluate.objectives import ObjectiveSource, Part
from aidocks.evaluate.scoring import context_length, load_task, plain_forward
from aidocks.laser.workbench import locate_all
from aidocks.merge.evolve.measuring import Losses, is_hopeless
from aidocks.merge.recipe import Source, TensorMerge
from aidocks.merge.rows import as_matrix
from aidocks.merge.shard import OpenedSources, merge_tensor
from aidocks.plan import UnitContext


class Made(NamedTuple):
    """Everything that the values of a merged tensor depend on."""

    tensor: TensorMerge
    sources: tuple[Source, ...]
    seed: int
    compute_dtype: str


class MergeBench:
    """One model on one worker: the merge that it was loaded from, with some tensors made otherwise.

    A tensor's values depend on its recipe alone, and what is put back is read from the checkpoint again: so a state
    never depends on the states before it.
    """

    def __init__(self, model: CausalLM, host: Checkpoint) -> None:
        self.model = model
        self._host = host
        self._slots: dict[str, torch.Tensor] = {}
        #: None where an attempt to make it was interrupted.
        self._made: dict[str, Made | None] = {}
        self._opened_as: tuple[tuple[Source, ...], str] = ((), "float32")
        self._opened = OpenedSources(())

    @torch.no_grad()
    def apply(
        self,
        tensors: Sequence[TensorMerge],
        sources: tuple[Source, ...],
        *,
        threads: int = 1,
        seed: int = 0,
        compute_dtype: str = "float32",
    ) -> None:
        """Bring the model to the state in which exactly these tensors are not those of its checkpoint.

        Args:
            tensors: How they are made.
            sources: Of the merge.
            threads: That compute.
            seed, compute_dtype: As for :func:`~aidocks.merge.shard.merge_tensor`.

        Raises:
            IncompatibleModels: When transformers keeps one of them in a form that is not known here.
            AIDocksError: As :func:`~aidocks.merge.shard.merge_tensor`.
        """
        if self._opened_as != (sources, compute_dtype):
            self._opened = OpenedSources(sources, compute_dtype)
            self._opened_as = sources, compute_dtype
        known = [tensor for tensor in tensors if tensor.name not in self.model.unused]
        wanted = {t.name: Made(t, sources, seed, compute_dtype) for t in known}
        self._locate(wanted)
        for name in [name for name in self._made if name not in wanted]:
            self._slots[name].copy_(self._host.tensor(name))
            del self._made[name]
        for name, made in wanted.items():
            if self._made.get(name) == made:
                continue
            self._made[name] = None
            self._fill(made, threads)
            self._made[name] = made

    @torch.inference_mode()
    def measure(
        self, source: ObjectiveSource, part: Part, *, start: Sequence[float | None] | None = None
    ) -> Losses:
        """Measure the model as it is now.

        Args:
            source: With sizes.
            part: Of its data.
            start: Losses of what it has to beat, on all items in their order: a measurement ends early when it is
                hopeless, see :func:`~aidocks.merge.evolve.measuring.is_hopeless`; None for never. It always ends at the
                first loss that is not finite.

        Raises:
            InvalidSpec: As :func:`~aidocks.evaluate.scoring.load_task`.
        """
        network = self.model.network
        task = load_task(source, part, self.model.tokenizer, longest=context_length(network))
        forward = plain_forward(network)
        positions: list[int] = []
        losses: list[float | None] = []
        tokens = 0

        def so_far(values: Sequence[float | None]) -> Losses:
            return Losses(
                metric=task.metric,
                positions=tuple(positions),
                losses=tuple(values),
                tokens=tokens,
                dtype=str(self.model.dtype).removeprefix("torch."),
            )

        for batches in task.segments:
            for batch in batches:
                positions += [item.position for item in batch.items]
                losses += finite_losses(task.losses(batch, forward).tolist())
                tokens += batch.tokens
                if None in losses:
                    return so_far(losses)
            if start is not None and is_hopeless(so_far(start[: len(losses)]), so_far(losses)):
                break
        return so_far(losses)

    def _fill(self, made: Made, threads: int) -> None:
        """Write a merged tensor over the loaded one, block by block."""
        slot = self._slots[made.tensor.name]
        rows_RC = slot.view(as_matrix(tuple(slot.shape)))
        blocks = merge_tensor(
            made.tensor,
            self._opened,
            device=str(slot.device),
            threads=threads,
            seed=made.seed,
            compute_dtype=made.compute_dtype,
        )
        begin = 0
        for block in blocks:
            rows_RC[begin : begin + len(block)].copy_(block)
            begin += len(block)

    def _locate(self, names: Iterable[str]) -> None:
        """Find where the network keeps tensors, and make sure that it keeps them as they are stored."""
        fresh = {name: self._host.tensor(name) for name in names if name not in self._slots}
        found = _find(self.model.network, {name: tuple(stored.shape) for name, stored in fresh.items()})
        for name, stored in fresh.items():
            slot = found.get(name)
            # Some models transpose or merge theirs while loading.
            if slot is None or not torch.equal(slot.cpu(), stored.to(slot.dtype)):
                raise IncompatibleModels(
                    f"transformers does not keep the tensor {name} in a form that can be overwritten, so that "
                    "merges of it can only be measured once they are written.",
                    field="models",
                    value=name,
                    hint="Write merges of chosen parameters with /merge, and compare those.",
                )
            self._slots[name] = slot


def _find(network: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Return where a network keeps stored tensors of these names and shapes, as views; without those not found."""
    parameters = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    prefix = f"{network.base_model_prefix}."
    found: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        for spelling in (name, f"{prefix}{name}", name.removeprefix(prefix)):
            parameter = parameters.get(spelling)
            if parameter is not None and tuple(parameter.shape) == shape:
                found[name] = parameter.data
                break
    # Matrices of experts, which are loaded as parts of larger tensors.
    missing = [name for name, shape in shapes.items() if name not in found and len(shape) == 2]
    return found | {name: slot.values for name, slot in locate_all(network, missing).items()}


def merge_bench(host: Path, dtype: str | None, context: UnitContext) -> MergeBench:
    """Return the worker's bench for a written merge; the model is loaded once."""

    def make() -> MergeBench:
        return MergeBench(load(host, dtype, context.device), Checkpoint(host))

    bench: MergeBench = context.keep(f"merge-bench:{dtype}", host, make, large=True)
    return bench
