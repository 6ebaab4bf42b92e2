"""A loaded model whose matrices are swapped for reduced ones and put back, bit for bit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.causal_lm import CausalLM, load
from aidocks.laser.spectrum import reduce_rank
from aidocks.plan import UnitContext

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


class Workbench:
    """One model on one worker, in a known state: the base with :attr:`applied` reductions.

    A reduced matrix is always computed from the stored one, as the writer of the result does, and a matrix
    that is put back comes from a copy taken when it was first replaced: so a state never depends on the
    states before it.
    """

    def __init__(self, model: CausalLM, checkpoint: Checkpoint) -> None:
        self.model = model
        self.applied: dict[str, int] = {}
        self._checkpoint = checkpoint
        self._originals: dict[str, torch.Tensor] = {}

    def apply(self, reductions: Mapping[str, int]) -> None:
        """Bring the model to the state in which exactly these matrices (name -> rank) are reduced."""
        for name in [name for name in self.applied if name not in reductions]:
            parameter_slot(self.model.network, name).copy_(self._originals.pop(name))
            del self.applied[name]
        for name, rank in reductions.items():
            if self.applied.get(name) == rank:
                continue
            slot = parameter_slot(self.model.network, name)
            stored = self._checkpoint.tensor(name).to(slot.device)
            if slot.shape != stored.shape:
                raise _not_addressable(name)
            reduced = reduce_rank(stored, rank)
            if name not in self._originals:
                self._originals[name] = slot.clone()
            # Noted before the copy: if that is interrupted, the next call still puts the original back.
            self.applied[name] = rank
            slot.copy_(reduced)


def parameter_slot(network: Any, name: str) -> torch.Tensor:
    """Return the loaded values of a checkpoint's matrix, as a view that can be written to.

    Raises:
        IncompatibleModels: When transformers keeps this matrix in a form that is not known here.
    """
    parameters = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for spelling in (
        name,
        f"{network.base_model_prefix}.{name}",
        name.replace(".block_sparse_moe.", ".mlp."),
    ):
        if spelling in parameters:
            found: torch.Tensor = parameters[spelling].data
            return found
    match = _EXPERT.fullmatch(name.replace(".block_sparse_moe.", ".mlp."))
    if match and match["kind"] in _FUSED_KINDS:
        parameter, half = _FUSED_KINDS[match["kind"]]
        fused = parameters.get(f"{match['prefix']}.{parameter}")
        if fused is not None and int(match["expert"]) < fused.shape[0]:
            expert: torch.Tensor = fused.data[int(match["expert"])]
            return expert if half is None else expert.chunk(2)[half]
    raise _not_addressable(name)


def _not_addressable(name: str) -> IncompatibleModels:
    return IncompatibleModels(
        f"transformers does not keep the matrix {name} in a form that can be replaced.",
        field="base_model_name",
        hint="Leave its kind out of `kinds`.",
    )


def workbench(path: Path, dtype: str | None, context: UnitContext) -> Workbench:
    """Return the worker's workbench for a checkpoint; the model is loaded once."""

    def make() -> Workbench:
        return Workbench(load(path, dtype, context.device), Checkpoint(path))

    bench: Workbench = context.keep(f"workbench:{dtype}", path, make, large=True)
    return bench
