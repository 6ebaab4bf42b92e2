"""Forwards that begin in the middle: what the layers below gave is kept, so a change in layer l re-runs l and above.

The model's own forward runs every time and computes masks, positions, final norm and head, so this works for any
decoder whose layers follow one another; only the layers below the start are replaced, for the moment of the call, by
something that returns what they returned before. The logits are, bit for bit, those of a whole forward.

Shapes: B rows, T tokens, K positions whose logits are needed, V the vocabulary; L layers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from aidocks.evaluate.scoring import plain_forward

#: Bytes of kept outputs for which there is always room.
LEAST_LIMIT = 1 << 30
#: Share of the memory that is left which kept outputs may take.
_SHARE = 0.25


class SuffixForward:
    """A network, and what its layers put out for batches in its present base state.

    Attributes:
        depth: Layers L; 0 for a network whose layers do not simply follow one another, which always runs whole.
        stride: Every stride-th output is kept.
        layers_run: Layers that were run in all, for whoever wants to know what was saved.
    """

    def __init__(self, network: Any, *, limit: int = LEAST_LIMIT) -> None:
        self._network = network
        self._forward = plain_forward(network)
        self._limit = limit
        self._layers = decoder_layers(network)
        # By batch: number of layers that have run -> the output of the last of them.
        self._kept: dict[Hashable, dict[int, Any]] = {}
        self._head = _plain_head(network)
        self._logits: torch.Tensor | None = None
        self.stride = 1
        self.layers_run = 0
        self._bytes_per_token = 0
        if not self._chained():
            self._layers = []
        self._first_layer = {
            id(parameter): number
            for number, layer in reversed(list(enumerate(self._layers)))
            for parameter in layer.parameters()
        }

    @property
    def depth(self) -> int:
        return len(self._layers)

    @property
    def kept_bytes(self) -> int:
        return sum(_hidden(output).nbytes for kept in self._kept.values() for output in kept.values())

    def start_of(self, parameter: torch.Tensor) -> int:
        """Return the first layer whose output can depend on a parameter, L for one of the head alone."""
        if id(parameter) in self._first_layer:
            return self._first_layer[id(parameter)]
        below, above = self._network.get_input_embeddings(), self._network.get_output_embeddings()
        ours = [id(p) for p in above.parameters()] if above is not None else []
        tied = below is None or {id(p) for p in below.parameters()} & set(ours)
        return self.depth if id(parameter) in ours and not tied else 0

    def expect(self, tokens: int) -> None:
        """Prepare for batches of so many tokens in all (with padding): keep so many outputs as the limit allows.

        What is kept already is thinned out.
        """
        affordable = self._limit // max(1, tokens * self._bytes_per_token)
        stride = math.ceil(self.depth / affordable) if affordable else self.depth + 1
        self.stride = max(1, stride)
        for kept in self._kept.values():
            for done in [done for done in kept if done % self.stride]:
                del kept[done]

    def forget(self, start: int = 0) -> None:
        """Forget what depends on layer ``start`` and those above."""
        if start == 0:
            self._kept.clear()
        for kept in self._kept.values():
            for done in [done for done in kept if done > start]:
                del kept[done]

    @torch.inference_mode()
    def forward(
        self,
        key: Hashable,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor | None,
        positions_K: torch.Tensor | None,
        *,
        start: int = 0,
    ) -> torch.Tensor:
        """Return the logits of a batch [B, K, V]; the next call may overwrite them.

        Whatever runs from the start on, outputs below it are the base state's, and are kept: no forward is spent on
        them alone, of a base whose losses are known.

        Args:
            key: Of the batch, the same whenever the ids and the mask are the same.
            ids_BT: As for :data:`aidocks.evaluate.scoring.Forward`, and so are mask and positions.
            mask_BT: See there.
            positions_K: See there.
            start: First layer that differs from the base state; L where the network is in it.
        """
        kept = self._kept.setdefault(key, {})
        begin = max((done for done in kept if done <= start), default=0)
        self.layers_run += self.depth - begin
        instead: list[tuple[Any, Any]] = [(layer, _returning(kept[begin])) for layer in self._layers[:begin]]
        if self._head is not None:
            instead.append((self._head, self._head_forward))
        with _replaced(instead), self._keeping(kept, begin, start):
            return self._forward(ids_BT, mask_BT, positions_K)

    def _head_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Compute logits as the head does, into memory that is used again.

        They are the largest activation. Fresh memory of that size comes page by page from the system, every time,
        which was a quarter of the head's time where measured.
        """
        assert self._head is not None, "stands in for the head"
        rows, weight_VH = hidden.reshape(-1, hidden.shape[-1]), self._head.weight
        if self._logits is None or len(self._logits) < len(rows):
            self._logits = rows.new_empty(len(rows), len(weight_VH))
        logits = torch.mm(rows, weight_VH.T, out=self._logits[: len(rows)])
        return logits.view(*hidden.shape[:-1], len(weight_VH))

    @contextmanager
    def _keeping(self, kept: dict[int, Any], begin: int, end: int) -> Iterator[None]:
        """Keep the outputs of the layers from one to another, as far as there is room for them."""
        handles = [
            self._layers[done - 1].register_forward_hook(_keep_in(kept, done))
            for done in range(begin + 1, end + 1)
            if done % self.stride == 0
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _chained(self) -> bool:
        """Try, on a few tokens, whether suffixes give what the whole gives: layers may have secret passages.

        Those of a model that shares keys and values between layers, for instance, or that runs a layer twice.
        """
        order: list[int] = []
        handles = [
            layer.register_forward_hook(lambda *_, number=number: order.append(number))
            for number, layer in enumerate(self._layers)
        ]
        depth, device = self.depth, self._network.device
        ids_BT = torch.arange(1, 9, device=device)[None] % max(1, _vocabulary(self._network))
        try:
            whole = self._forward(ids_BT, None, None)
            if not torch.equal(whole, self.forward("plain", ids_BT, None, None)):
                self._head = None
            order.clear()
            self.forward("probe", ids_BT, None, None, start=depth)
            if order != list(range(depth)):
                return False
            self._bytes_per_token = max(
                math.ceil(_hidden(output).nbytes / ids_BT.numel()) for output in self._kept["probe"].values()
            )
            return all(
                torch.equal(whole, self.forward("probe", ids_BT, None, None, start=start))
                for start in sorted({1, depth // 4, depth // 2, 3 * depth // 4, depth - 1, depth} - {0})
                for _ in range(2)  # the second time fails if the first wrote into what is kept
            )
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return False
        finally:
            for handle in handles:
                handle.remove()
            self._kept.clear()
            self.layers_run = 0


def cache_limit(device: torch.device, share: float) -> int:
    """Return the bytes of outputs that a worker may keep, from the memory that is left on its device.

    Args:
        device: Where the network is.
        share: Of the machine's processors, and so of its memory, that this worker may use.
    """
    if device.type == "cuda":
        return max(LEAST_LIMIT, int(_SHARE * torch.cuda.mem_get_info(device)[0]))
    return max(LEAST_LIMIT, int(_SHARE * share * _available_memory()))


def _available_memory() -> int:
    """Return the bytes that are left of the machine's memory, and of the container's; 0 where nothing tells."""
    left = []
    try:
        told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        left += [int(told[1]) * 1024] if told else []
        group = Path("/sys/fs/cgroup")
        left.append(int((group / "memory.max").read_text()) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):  # not Linux, no container, or one without a limit
        pass
    return max(0, min(left, default=0))


def decoder_layers(network: Any) -> list[torch.nn.Module]:
    """Return the layers of a decoder in order: of the lists of modules that are in no other list, the largest."""
    lists = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.ModuleList)}
    outermost = [
        found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)
    ]
    sizes = [sum(parameter.numel() for parameter in found.parameters()) for found in outermost]
    return list(outermost[sizes.index(max(sizes))]) if outermost else []


def _plain_head(network: Any) -> torch.nn.Linear | None:
    """Return the module that makes logits, if it is nothing but a matrix in the memory of a CPU."""
    head = network.get_output_embeddings()
    if type(head) is not torch.nn.Linear or "forward" in head.__dict__:
        return None
    return head if getattr(head, "bias", None) is None and head.weight.is_cpu else None


@contextmanager
def _replaced(modules: Sequence[tuple[Any, Callable[..., Any]]]) -> Iterator[None]:
    """Let modules compute something else for a moment."""
    covered: list[tuple[Any, Any]] = []
    try:
        for module, forward in modules:
            # Some libraries put a forward of their own on the instance.
            covered.append((module, module.__dict__.get("forward")))
            module.forward = forward
        yield
    finally:
        for module, own in covered:
            if own is None:
                del module.forward
            else:
                module.forward = own


def _returning(output: Any) -> Callable[..., Any]:
    return lambda *_, **__: output


def _keep_in(kept: dict[int, Any], done: int) -> Callable[..., None]:
    def keep(module: torch.nn.Module, inputs: Sequence[Any], output: Any) -> None:
        kept[done] = output

    return keep


def _hidden(output: Any) -> torch.Tensor:
    """Return the hidden states of a layer's output, which is these alone or a tuple that begins with them."""
    hidden: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return hidden


def _vocabulary(network: Any) -> int:
    embeddings = network.get_input_embeddings()
    return int(getattr(embeddings, "num_embeddings", 0)) or 1
