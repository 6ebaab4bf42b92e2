"""The unit that loads the finished MoE as users will, runs text through it, and draws where tokens went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, write_bytes, write_text
from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.texts import Split, TextSource, choose_chunks
from aidocks.moe.gating import Gates
from aidocks.moe.mixtral import router_name
from aidocks.plan import Unit, UnitContext

if TYPE_CHECKING:
    import torch


class Routing(BaseModel):
    """Where the tokens of a text went, and the pictures of it.

    Attributes:
        load: Layer x expert: share of the layer's choices that fell on the expert; a layer's shares sum to 1.
        weight: Layer x expert: share of the layer's mixture that the expert supplied; sums to 1 likewise.
        tokens: Tokens that were routed.
        files: The report's files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: tuple[tuple[float, ...], ...]
    weight: tuple[tuple[float, ...], ...]
    tokens: int
    files: tuple[OutputFile, ...]


class CheckMoE(Unit[Routing]):
    """Loads the staged MoE with transformers, requires finite logits, and reports the routing."""

    result_type: ClassVar[type[BaseModel]] = Routing

    model: Path = Field(description="Directory in which the result is staged.")
    expert_names: tuple[str, ...]
    gates: Gates
    parameters: int = Field(description="Parameters that the model must have once it is loaded.")
    text: TextSource
    split: Split = "held_out"
    seq_length: int
    chunks: int
    seed: int

    @property
    def label(self) -> str:
        return "load, run and picture the MoE"

    def run(self, context: UnitContext) -> Routing:
        from aidocks.evaluate.causal_lm import load_cached

        model = load_cached(self.model, None, context)
        loaded = sum(parameter.numel() for parameter in model.network.parameters())
        if loaded != self.parameters:
            raise CorruptCheckpoint(
                f"The MoE has {loaded} parameters when loaded, not {self.parameters} as planned."
            )
        tokens = model.chunks(self.text, self.seq_length)
        chosen = tokens[choose_chunks(len(tokens), self.split, self.chunks, self.seed)]
        load_LE, weight_LE = route(model.network, chosen)
        files = self._write_report(load_LE, weight_LE, chosen.numel())
        return Routing(
            load=_rows(load_LE), weight=_rows(weight_LE), tokens=chosen.numel(), files=tuple(files)
        )

    def outputs(self, result: Routing) -> Sequence[OutputFile]:
        return result.files

    def _write_report(
        self, load_LE: torch.Tensor, weight_LE: torch.Tensor, tokens: int
    ) -> Iterator[OutputFile]:
        from aidocks.moe import figures

        cosines_LEE = self._cosines()
        folder = self.model / "report"
        folder.mkdir(exist_ok=True)
        pictures = {
            "routing.png": figures.draw_routing(weight_LE.numpy(), self.expert_names),
            "gates.png": figures.draw_gates(cosines_LEE.numpy(), self.gates.condition, self.expert_names),
        }
        for name, content in pictures.items():
            yield write_bytes(folder / name, content)
        report = {
            "experts": self.expert_names,
            "tokens": tokens,
            "load": _rows(load_LE),
            "weight": _rows(weight_LE),
            "gate_condition": self.gates.condition,
            "gate_cosines": [_rows(layer) for layer in cosines_LEE],
        }
        yield write_text(folder / "routing.json", json.dumps(report) + "\n")

    def _cosines(self) -> torch.Tensor:
        """Return how parallel the router rows are, float64 [L, E, E]."""
        import torch
        from torch.nn import functional

        from aidocks.checkpoints.reader import Checkpoint

        stored = Checkpoint(self.model)
        rows = [stored.tensor(router_name(layer)) for layer in range(len(self.gates.condition))]
        unit_LEH = functional.normalize(torch.stack(rows).double(), dim=-1)
        return unit_LEH @ unit_LEH.transpose(1, 2)


def route(network: Any, tokens_CT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Run chunks through a Mixtral network and return what its routers did.

    Args:
        network: A loaded ``MixtralForCausalLM``.
        tokens_CT: Token ids, [chunks, tokens].

    Returns:
        Shares of choices and shares of the mixture, each float64 [layers, experts] with rows that sum to 1.

    Raises:
        CorruptCheckpoint: When a logit is not finite.
    """
    import torch

    layers, experts = network.config.num_hidden_layers, network.config.num_local_experts
    choices_LE = torch.zeros(layers, experts, dtype=torch.float64)
    weights_LE = torch.zeros(layers, experts, dtype=torch.float64)
    with _watched_routers(network, choices_LE, weights_LE), torch.inference_mode():
        for ids_T in tokens_CT:
            logits = network(input_ids=ids_T[None].to(network.device), use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                raise CorruptCheckpoint(
                    "The MoE's logits are not finite.", hint="Use bfloat16 or float32 as dtype."
                )
    return choices_LE / choices_LE.sum(1, keepdim=True), weights_LE / weights_LE.sum(1, keepdim=True)


@contextmanager
def _watched_routers(network: Any, choices_LE: torch.Tensor, weights_LE: torch.Tensor) -> Iterator[None]:
    def watch(layer: int) -> Any:
        def add(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            _, scores_NK, chosen_NK = output
            chosen = chosen_NK.flatten().cpu()
            scores = scores_NK.flatten().double().cpu()
            choices_LE[layer].index_add_(0, chosen, scores.new_ones(scores.shape))
            weights_LE[layer].index_add_(0, chosen, scores)

        return add

    handles = [
        block.mlp.gate.register_forward_hook(watch(layer)) for layer, block in enumerate(network.model.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    # Six digits: enough to read, and small in the journal.
    return tuple(tuple(round(float(value), 6) for value in row) for row in matrix)
