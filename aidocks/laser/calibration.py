"""Second moments of what flows into the linear layers of a model, over the calibration parts of objectives.

They tell :func:`aidocks.laser.truncation.activation_basis` which inputs matter. Layers that read the same tensor
(query, key and value; gate and up) share one matrix. Only modules that are linear layers have such inputs: fused
experts and transposed convolutions do not, and are truncated by their weights.

A model of 70 billion parameters has 330 GB of them, so :func:`calibration_groups` divides its matrices into groups,
each with a pass of its own.

Shapes: x_TI the inputs of one layer at T tokens, c_II the sum of x xᵀ.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile
from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.laser.matrices import Matrix
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    import torch

#: Columns of a block of the outer product. Blocks below the diagonal are mirrored instead of computed.
_BLOCK = 256
_INPUTS, _TOKENS = "inputs", "tokens"
#: Linear layers of one module that read the same tensor, by the names that models give them.
_SHARED = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
#: The matrix of one expert among several: nearly always transformers keeps those of all in one parameter, not in linear
#: layers.
_EXPERT = re.compile(r".+\.experts\.\d+\..+")


def calibration_groups(matrices: Sequence[Matrix], limit_bytes: int = 8 << 30) -> tuple[tuple[str, ...], ...]:
    """Divide matrices into groups whose second moments take less than a limit each, in the memory and on the disk.

    Whole layers stay together as long as one fits. Experts are in groups of their own: a unit none of whose matrices
    belongs to a linear layer runs no pass.

    Args:
        matrices: Those whose inputs are wanted. Slices of fused tensors are left out: of their inputs nothing is known.
        limit_bytes: The limit. A single input that is larger has a group of its own.

    Returns:
        Addresses, layer by layer.
    """
    ordered = sorted((m for m in matrices if m.expert is None), key=lambda matrix: matrix.order)
    groups: list[tuple[str, ...]] = []
    for expert in (False, True):
        chosen = [m for m in ordered if bool(_EXPERT.fullmatch(m.name)) == expert]
        pieces: list[list[Matrix]] = []
        for _, layer in groupby(chosen, key=lambda matrix: matrix.layer):
            pieces += _pieces(list(layer), limit_bytes)
        groups += _packed(pieces, limit_bytes)
    return tuple(groups)


def _pieces(layer: list[Matrix], limit_bytes: int) -> list[list[Matrix]]:
    """Return a layer whole if it fits, else the readers of each of its inputs."""
    if _bytes_of_inputs(layer) <= limit_bytes:
        return [layer]
    readers: dict[str, list[Matrix]] = {}
    for matrix in layer:
        readers.setdefault(_input_of(matrix), []).append(matrix)
    return list(readers.values())


def _packed(pieces: Sequence[Sequence[Matrix]], limit_bytes: int) -> list[tuple[str, ...]]:
    groups: list[list[str]] = []
    room = 0
    for piece in pieces:
        size = _bytes_of_inputs(piece)
        if not groups or size > room:
            groups.append([])
            room = limit_bytes
        groups[-1] += [matrix.address for matrix in piece]
        room -= size
    return [tuple(group) for group in groups]


def moments_bytes(matrices: Iterable[Matrix]) -> int:
    """Return how much room the files of all groups take for one share: an upper bound.

    Matrices that share an input by their names count once, and experts not at all: hardly any model has them as linear
    layers.
    """
    return _bytes_of_inputs(m for m in matrices if m.expert is None and not _EXPERT.fullmatch(m.name))


def _bytes_of_inputs(matrices: Iterable[Matrix]) -> int:
    return sum({_input_of(matrix): 4 * matrix.shape[1] ** 2 for matrix in matrices}.values())


def _input_of(matrix: Matrix) -> str:
    """Name what a matrix reads; matrices with the same name read the same."""
    module, _, name = matrix.name.removesuffix(".weight").rpartition(".")
    return f"{module}.{next((names[0] for names in _SHARED if name in names), name)}"


class CollectCovariances(WritingUnit):
    """The sum of x xᵀ for every distinct input of the linear layers, over one share of the calibration parts.

    The file holds a float32 matrix [I, I] per distinct input, under the address of the first layer that reads it. Its
    metadata say which input each address reads, and how many tokens were summed.
    """

    checkpoint: Path = Field(description="Checkpoint directory.")
    objectives: tuple[ObjectiveSource, ...] = Field(
        min_length=1, description="They are summed, so each counts by its tokens."
    )
    matrices: tuple[str, ...] = Field(
        min_length=1, description="Addresses of the matrices whose inputs are wanted."
    )
    directory: Path = Field(description="Directory for the file.")
    shard: int = Field(0, ge=0)
    shards: int = Field(1, ge=1, description="Into how many shares the batches of each are dealt.")
    dtype: str | None = Field(None, description="Computation type; None lets the worker choose.")

    @property
    def label(self) -> str:
        first, count = self.matrices[0], len(self.matrices)
        of = first if count == 1 else f"{count} matrices from {first} on"
        return f"inputs of {of}, share {self.shard + 1} of {self.shards}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.checkpoint)

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.evaluate.causal_lm import load_cached
        from aidocks.evaluate.scoring import context_length, load_task

        model = load_cached(self.checkpoint, self.dtype, context)
        longest = context_length(model.network)
        batches = [
            batch
            for objective in self.objectives
            for batch in load_task(objective, "calibration", model.tokenizer, longest=longest).batches[
                self.shard :: self.shards
            ]
        ]
        moments = collect_moments(model.network, self.matrices, batches)
        return WrittenFiles(
            files=(moments.write(self.directory / f"covariances-{self.unit_id}.safetensors"),)
        )


class Moments:
    """Sums of x xᵀ in the making: what the hooks of one pass fill.

    Attributes:
        sums: c_II by the address of the first layer that read that input.
        tokens: How many x are in each sum.
        inputs: For every address that was seen, the key of its input.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.tokens: dict[str, int] = {}
        self.inputs: dict[str, str] = {}
        self.mask_BT: torch.Tensor | None = None
        self._last: tuple[torch.Tensor, str] | None = None

    def hook(self, address: str) -> Callable[[Any, tuple[Any, ...]], None]:
        """Return what is to be called with the inputs of the layer at ``address``."""

        def note(module: Any, arguments: tuple[Any, ...]) -> None:
            x = arguments[0]
            if address not in self.inputs:
                # Layers that share an input are called one after another with the very same tensor.
                shared = self._last is not None and self._last[0] is x
                self.inputs[address] = self.inputs[self._last[1]] if self._last and shared else address
            self._last = (x, address)
            if self.inputs[address] == address:
                self._add(address, x)

        return note

    def start_batch(self, mask_BT: torch.Tensor) -> None:
        """Say which tokens of the next forward pass are not padding."""
        self.mask_BT, self._last = mask_BT, None

    def _add(self, key: str, x: torch.Tensor) -> None:
        import torch

        width = x.shape[-1]
        mask = self.mask_BT
        if mask is not None and x.shape[:-1].numel() == mask.numel():
            x_TI = x.reshape(-1, width)
            if not bool(mask.all()):
                x_TI = x_TI[mask.reshape(-1).to(x.device)]
        else:  # a layer that picks its tokens
            x_TI = x.reshape(-1, width)
        if key not in self.sums:
            self.sums[key] = torch.zeros(width, width, dtype=torch.float32, device=x.device)
            self.tokens[key] = 0
        add_outer(self.sums[key], x_TI.float())
        self.tokens[key] += len(x_TI)

    def write(self, path: Path) -> OutputFile:
        """Write all sums, whole, as one safetensors file.

        Raises:
            InsufficientDisk: When it does not fit.
        """
        from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan

        plans = tuple(
            TensorPlan(name=key, dtype="F32", shape=tuple(c_II.shape)) for key, c_II in self.sums.items()
        )
        metadata = {
            _INPUTS: json.dumps(self.inputs, sort_keys=True),
            _TOKENS: json.dumps(self.tokens, sort_keys=True),
        }
        with ShardWriter(path.parent, ShardPlan(file_name=path.name, tensors=plans), metadata) as writer:
            for key, c_II in self.sums.items():
                mirror(c_II)
                writer.write(key, c_II)
        return writer.output


def collect_moments(network: Any, addresses: Iterable[str], batches: Sequence[Any]) -> Moments:
    """Run batches through a model and sum the outer products of what enters its linear layers.

    Args:
        network: A transformers model.
        addresses: Of matrices; those that are not the whole weight of a linear layer are passed over.
        batches: See :class:`aidocks.evaluate.scoring.Batch`.
    """
    import torch

    layers = linear_layers(network, addresses)
    inner = set(network.base_model.modules())
    # Without the head, whose logits nobody reads, unless its own input is wanted.
    body = network.base_model if all(layer in inner for layer in layers.values()) else network
    moments = Moments()
    # Not inference mode: what a model keeps between calls must serve the pass for gradients, too.
    with ExitStack() as hooks, torch.no_grad():
        for address, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(moments.hook(address)))
        for batch in batches if layers else ():
            moments.start_batch(batch.mask_BT)
            mask = None if bool(batch.mask_BT.all()) else batch.mask_BT.to(network.device, torch.int64)
            body(input_ids=batch.ids_BT.to(network.device), attention_mask=mask, use_cache=False)
    return moments


def linear_layers(network: Any, addresses: Iterable[str]) -> dict[str, Any]:
    """Return address -> torch.nn.Linear for those matrices that are the whole weight of one, and of it alone."""
    import torch

    from aidocks.laser.workbench import locate_all

    users: dict[int, list[Any]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    found: dict[str, Any] = {}
    for address, slot in locate_all(network, addresses).items():
        modules = users.get(id(slot.parameter), [])
        # A head that is tied to the embeddings has two users, and its input says nothing of the other use.
        if len(modules) == 1 and type(modules[0]) is torch.nn.Linear:
            found[address] = modules[0]
    return found


def add_outer(c_II: torch.Tensor, x_TI: torch.Tensor) -> None:
    """Add xᵀ x to the upper blocks of a sum, in place: about half of the multiplications of the whole product."""
    width = len(c_II)
    for begin in range(0, width, _BLOCK):
        end = min(begin + _BLOCK, width)
        c_II[begin:end, begin:].addmm_(x_TI[:, begin:end].mT, x_TI[:, begin:])


def mirror(c_II: torch.Tensor) -> None:
    """Make a matrix symmetric of which :func:`add_outer` filled the upper blocks, in place: it may be gigabytes."""
    for begin in range(0, len(c_II), _BLOCK):
        end = begin + _BLOCK
        upper = c_II[begin:end, begin:end].triu()
        c_II[begin:end, begin:end] = upper + upper.triu(1).mT
        c_II[end:, begin:end] = c_II[begin:end, end:].mT


def load_covariance(files: Sequence[OutputFile], address: str) -> torch.Tensor | None:
    """Return the mean of x xᵀ over the tokens of all shares, float64 [I, I]; None where none of them saw any.

    Args:
        files: What all :class:`CollectCovariances` wrote, in order of their shares, whatever their groups.
        address: Of the matrix that reads x.
    """
    import torch
    from safetensors import safe_open

    total: torch.Tensor | None = None
    tokens = 0
    for file in files:
        with safe_open(file.path, framework="pt") as opened:
            metadata = opened.metadata()
            key = json.loads(metadata[_INPUTS]).get(address)
            if key is None:
                continue
            part_II = opened.get_tensor(key)
            total = part_II.to(torch.float64) if total is None else total.add_(part_II)
            tokens += json.loads(metadata[_TOKENS])[key]
    return None if total is None or tokens == 0 else total.div_(tokens)
