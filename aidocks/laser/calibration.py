"""Second moments of what flows into the linear layers of a model, over the calibration part of an objective.

They tell :func:`aidocks.laser.truncation.activation_basis` which inputs matter. Layers that read the same tensor
(query, key and value; gate and up) share one matrix. Only modules that are linear layers have such inputs: fused
experts and transposed convolutions do not, and are truncated by their weights.

Shapes: x_TI the inputs of one layer at T tokens, c_II the sum of x xᵀ.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile
from aidocks.evaluate.objectives import ObjectiveSource
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles

if TYPE_CHECKING:
    import torch

#: Columns of a block of the outer product. Blocks below the diagonal are mirrored instead of computed.
_BLOCK = 256
_INPUTS, _TOKENS = "inputs", "tokens"


class CollectCovariances(WritingUnit):
    """The sum of x xᵀ for every distinct input of the linear layers, over one share of the calibration part.

    The file holds a float32 matrix [I, I] per distinct input, under the address of the first layer that reads it. Its
    metadata say which input each address reads, and how many tokens were summed.
    """

    checkpoint: Path = Field(description="Checkpoint directory.")
    objective: ObjectiveSource
    matrices: tuple[str, ...] = Field(description="Addresses of the matrices whose inputs are wanted.")
    directory: Path = Field(description="Directory for the file.")
    shard: int = Field(0, ge=0)
    shards: int = Field(1, ge=1, description="Into how many shares the batches are dealt.")
    dtype: str | None = Field(None, description="Computation type; None lets the worker choose.")

    @property
    def label(self) -> str:
        return f"inputs of {len(self.matrices)} matrices, share {self.shard + 1} of {self.shards}"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.evaluate.causal_lm import load_cached
        from aidocks.evaluate.scoring import context_length, load_task

        model = load_cached(self.checkpoint, self.dtype, context)
        task = load_task(
            self.objective, "calibration", model.tokenizer, longest=context_length(model.network)
        )
        moments = collect_moments(model.network, self.matrices, task.batches[self.shard :: self.shards])
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
                writer.write(key, mirrored(c_II))
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

    from aidocks.laser.workbench import locate

    users: dict[int, list[Any]] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(module)
    found: dict[str, Any] = {}
    for address in addresses:
        slot = locate(network, address)
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


def mirrored(c_II: torch.Tensor) -> torch.Tensor:
    """Return the symmetric matrix of which :func:`add_outer` filled the upper blocks."""
    upper_II = c_II.triu()
    return upper_II + upper_II.triu(1).mT


def load_covariance(files: Sequence[OutputFile], address: str) -> torch.Tensor | None:
    """Return the mean of x xᵀ over the tokens of all shares, float64 [I, I]; None where none of them saw any.

    Args:
        files: What all :class:`CollectCovariances` wrote, in order of their shares; of several objectives, too, each
            of which then counts by its tokens.
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
            part_II = opened.get_tensor(key).to(torch.float64)
            total = part_II if total is None else total.add_(part_II)
            tokens += json.loads(metadata[_TOKENS])[key]
    return None if total is None or tokens == 0 else total / tokens
