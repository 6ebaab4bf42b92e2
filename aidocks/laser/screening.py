"""What a gradient says of reductions before any of them is tried: all candidates of all matrices in one backward pass.

To first order, replacing W by W_k changes the loss of an item by d_k = <dL/dW, W_k - W>. With W_k = U_k U_kᵀ W this is
-(g_k + ... + g_N), where g_i = u_iᵀ (dL/dW) Wᵀ u_i, so one set of directions answers for every rank (as the derivative
by singular values does in arXiv 2510.20800). Of a linear layer y = W x the gradient need not even exist: with
δ = dL/dy, g_i is the sum over tokens of (u_i · δ)(u_i · W x), known item by item while the backward pass goes on.

The second order, ½ <W_k - W, H (W_k - W)>, is estimated with the empirical Fisher matrix in place of H: for the mean of
T losses, whose gradients vary independently, T times the variance of d over items, plus its squared mean.

Shapes: B rows and T tokens of a batch, C its items, w_OI a matrix, N = min(O, I), u_ON its directions, K cuts: pairs of
a rank and whether values are shrunk; dropped_NK the share of each direction that a cut takes away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.plan import Unit, UnitContext
from aidocks.specs.laser import Truncation

if TYPE_CHECKING:
    import torch

    from aidocks.evaluate.scoring import Batch, Task

#: Stands for the z of a change that is the same for every item.
_LARGEST_Z = 1e9


class ScreenCandidate(BaseModel):
    """One basis of one matrix, and the cuts that are asked about.

    Attributes:
        basis: File of the directions, as ``truncation.save_basis`` writes it.
        sha256: Of that file.
        ranks: Directions to keep.
        shrunken_ranks: The same, of cuts that shrink the kept values.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    truncation: Truncation
    basis: Path
    sha256: str
    ranks: tuple[int, ...]
    shrunken_ranks: tuple[int, ...] = ()

    @property
    def cuts(self) -> tuple[tuple[int, bool], ...]:
        """All (rank, shrink), in the order of the sums of a :class:`Screened`."""
        return (*((rank, False) for rank in self.ranks), *((rank, True) for rank in self.shrunken_ranks))


class CutSums(BaseModel):
    """Sums over samples of predicted changes d, each sample the mean of so many items.

    Attributes:
        samples: How many. An item each, or a batch where items cannot be told apart.
        totals: Of items * d, for every cut.
        squares: Of items * d², for every cut.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: int
    totals: tuple[float, ...]
    squares: tuple[float, ...]


class Screened(BaseModel):
    """What one share of the calibration part says of all candidates.

    Attributes:
        items: Chunks, questions or preferences of the share.
        losses_per_item: How many losses an item's loss is the mean of: the predicted tokens of a chunk, else one.
        sums: Of each candidate, in order; None where a gradient was not finite.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    items: int
    losses_per_item: int
    sums: tuple[CutSums | None, ...]


class Prediction(BaseModel):
    """The change of the loss that is to be expected of one reduction.

    Attributes:
        mean: First order, in the loss's unit per item; negative is better.
        standard_error: Of the mean, over samples.
        fisher: Second order, never negative.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    address: str
    truncation: Truncation
    rank: int
    shrink: bool
    mean: float
    standard_error: float
    fisher: float

    @property
    def z(self) -> float:
        """The first order in standard errors: finds what helps."""
        if self.mean == 0:
            return 0.0
        ratio = self.mean / self.standard_error if self.standard_error else math.copysign(math.inf, self.mean)
        return max(-_LARGEST_Z, min(_LARGEST_Z, ratio))

    @property
    def change(self) -> float:
        """First and second order together: finds what does no harm, and what helps most."""
        return self.mean + self.fisher


class ScreenCandidates(Unit[Screened]):
    """One forward and backward pass over one share of the calibration part, for all candidates at once."""

    result_type: ClassVar[type[BaseModel]] = Screened

    checkpoint: Path = Field(description="Checkpoint directory.")
    objective: ObjectiveSource
    group: int = Field(0, ge=0)
    groups: int = Field(1, ge=1, description="Into how many shares the batches are dealt.")
    candidates: tuple[ScreenCandidate, ...]
    dtype: str | None = Field(None, description="Computation type; None lets the worker choose.")

    @property
    def label(self) -> str:
        return f"gradients of {self.objective.label}, share {self.group + 1} of {self.groups}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.checkpoint)

    def run(self, context: UnitContext) -> Screened:
        from aidocks.evaluate.causal_lm import load_cached
        from aidocks.evaluate.scoring import context_length, load_task

        # In the type that evaluation uses. On a CPU with bfloat16 instructions that is 2.7 times as fast as float32
        # and ranks 1500 cuts of SmolLM2-135M alike: Spearman's correlation is 0.9986 for z, 0.9994 for the change.
        model = load_cached(self.checkpoint, self.dtype, context)
        task = load_task(
            self.objective, "calibration", model.tokenizer, longest=context_length(model.network)
        )
        return screen(model.network, task, task.batches[self.group :: self.groups], self.candidates)


def combine(candidates: Sequence[ScreenCandidate], groups: Sequence[Screened]) -> list[Prediction]:
    """Return the prediction of every cut of every candidate.

    Args:
        candidates: As all units were given them.
        groups: What the units returned.

    Returns:
        In order of the candidates and their cuts. Cuts of a matrix with a gradient that is not finite are missing.
    """
    found: list[Prediction] = []
    items = sum(group.items for group in groups)
    losses = max((group.losses_per_item for group in groups), default=1)
    for index, candidate in enumerate(candidates):
        sums = [each for group in groups if (each := group.sums[index]) is not None]
        if items == 0 or len(sums) < len(groups):
            continue
        samples = sum(each.samples for each in sums)
        for place, (rank, shrink) in enumerate(candidate.cuts):
            mean = math.fsum(each.totals[place] for each in sums) / items
            spread = math.fsum(each.squares[place] for each in sums) - items * mean * mean
            # A batch is the mean of its items, so its weighted square counts for one item's variance, as an item's.
            variance = max(0.0, spread) / (samples - 1) if samples > 1 else 0.0
            found.append(
                Prediction(
                    address=candidate.address,
                    truncation=candidate.truncation,
                    rank=rank,
                    shrink=shrink,
                    mean=mean,
                    standard_error=math.sqrt(variance / items),
                    fisher=(losses * variance + mean * mean) / 2,
                )
            )
    return found


def screen(
    network: Any, task: Task, batches: Sequence[Batch], candidates: Sequence[ScreenCandidate]
) -> Screened:
    """Run batches forward and backward and sum what every cut would change, to first order.

    No gradient of a weight is ever held, but of those matrices that are not the weight of a linear layer: of these one
    at a time.

    Args:
        network: A transformers model. Its parameters and their gradients are as before afterwards.
        task: Tells the loss.
        batches: Of the task.
        candidates: What is asked about.
    """
    from aidocks.evaluate.scoring import plain_forward

    tape = _Tape(network, candidates)
    forward = plain_forward(network)
    with tape.attached():
        for batch in batches:
            tape.start_batch(batch)
            total: Any = task.surrogate(batch, forward).sum()
            total.backward()
    items = sum(len(batch.items) for batch in batches)
    whole_text = task.metric == "perplexity"
    losses = [len(span.targets_S) for batch in batches for item in batch.items for span in item.spans]
    return Screened(
        items=items,
        losses_per_item=max(losses, default=1) if whole_text else 1,
        sums=tuple(sums.result() for sums in tape.sums),
    )


class _Sums:
    """:class:`CutSums` in the making."""

    def __init__(self, cuts: int) -> None:
        import torch

        self.samples = 0
        self.totals_K = torch.zeros(cuts, dtype=torch.float64)
        self.squares_K = torch.zeros(cuts, dtype=torch.float64)

    def add(self, changes_SK: torch.Tensor, items_per_sample: int) -> None:
        """Add samples, each the *sum* of the changes of so many items."""
        changes_SK = changes_SK.double().cpu()
        self.samples += len(changes_SK)
        self.totals_K += changes_SK.sum(0)
        self.squares_K += changes_SK.square().sum(0) / items_per_sample

    def result(self) -> CutSums | None:
        if not bool(self.totals_K.isfinite().all() and self.squares_K.isfinite().all()):
            return None
        return CutSums(
            samples=self.samples,
            totals=tuple(self.totals_K.tolist()),
            squares=tuple(self.squares_K.tolist()),
        )


class _Tape:
    """Hooks on one model that turn a backward pass into the sums of every candidate."""

    def __init__(self, network: Any, candidates: Sequence[ScreenCandidate]) -> None:
        import torch

        from aidocks.laser.calibration import linear_layers
        from aidocks.laser.directions import directions_of

        self.sums = [_Sums(len(candidate.cuts)) for candidate in candidates]
        self._network = network
        self._by_address: dict[str, list[int]] = {}
        for index, candidate in enumerate(candidates):
            self._by_address.setdefault(candidate.address, []).append(index)
        self._layers = linear_layers(network, self._by_address)
        self._directions = directions_of(network, candidates)
        self._items = 0
        self._rows = 0
        self._tokens = 0
        self._owners_CB = torch.zeros(0, 0)

    def start_batch(self, batch: Batch) -> None:
        """Say which rows of the next forward pass belong to which item."""
        import torch

        self._rows, self._tokens, self._items = len(batch.ids_BT), batch.ids_BT.numel(), len(batch.items)
        self._owners_CB = torch.zeros(self._items, self._rows)
        for place, item in enumerate(batch.items):
            for span in item.spans:
                self._owners_CB[place, span.row] = 1

    def attached(self) -> ExitStack:
        """Return the context in which passes are recorded; it leaves the model as it was."""
        from aidocks.laser.workbench import locate_all

        stack = ExitStack()
        for parameter in self._network.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        # Nothing that is learned asks for a gradient, so the first hidden states must.
        embeddings = self._network.get_input_embeddings()
        stack.enter_context(
            embeddings.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
        )
        for address, layer in self._layers.items():
            stack.enter_context(layer.register_forward_hook(self._watch_output(address)))
        others: dict[int, tuple[Any, list[tuple[str, Any]]]] = {}
        elsewhere = [address for address in self._by_address if address not in self._layers]
        for address, slot in locate_all(self._network, elsewhere).items():
            others.setdefault(id(slot.parameter), (slot.parameter, []))[1].append((address, slot))
        for parameter, slots in others.values():
            parameter.requires_grad_()
            stack.enter_context(
                parameter.register_post_accumulate_grad_hook(self._watch_gradient(sorted(slots)))
            )
        return stack

    def _watch_output(self, address: str) -> Any:
        def watch(layer: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if output.requires_grad:
                y = output.detach() if layer.bias is None else output.detach() - layer.bias
                shape = tuple(layer.weight.shape)
                output.register_hook(lambda gradient: self._record_output(address, shape, y, gradient))

        return watch

    def _record_output(
        self, address: str, shape: tuple[int, ...], y: torch.Tensor, gradient: torch.Tensor
    ) -> None:
        width = y.shape[-1]
        known = len(y) == (self._rows if y.ndim > 2 else self._tokens)
        rows = self._rows if known else 1  # a layer that picks its tokens: whose they are is not known
        y_BTO, d_BTO = y.reshape(rows, -1, width), gradient.reshape(rows, -1, width)
        for index in self._by_address[address]:
            u_ON, dropped_NK = self._directions.of(index, shape, y)
            g_BN = ((d_BTO @ u_ON).float() * (y_BTO @ u_ON).float()).sum(1)
            changes_BK = -(g_BN @ dropped_NK)
            if known:
                self.sums[index].add(self._owners_CB.to(changes_BK) @ changes_BK, 1)
            else:
                self.sums[index].add(changes_BK.sum(0, keepdim=True), self._items)

    def _watch_gradient(self, slots: Sequence[tuple[str, Any]]) -> Any:
        def watch(parameter: torch.Tensor) -> None:
            assert parameter.grad is not None, "the hook runs after the gradient is there"
            for address, slot in slots:
                g_OI, w_OI = slot.view(parameter.grad), slot.view(parameter.detach())
                for index in self._by_address[address]:
                    u_ON, dropped_NK = self._directions.of(index, tuple(w_OI.shape), w_OI)
                    g_N = ((u_ON.mT @ g_OI).float() * (u_ON.mT @ w_OI).float()).sum(1)
                    self.sums[index].add(-(g_N @ dropped_NK)[None], self._items)
            parameter.grad = None

        return watch
