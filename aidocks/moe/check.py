"""The unit that loads the finished MoE as users will, runs texts through it, and draws where tokens went."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, write_bytes, write_text
from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.texts import COMMON, Domain, Split
from aidocks.plan import Unit, UnitContext

if TYPE_CHECKING:
    import torch

    from aidocks.evaluate.causal_lm import CausalLM


class DomainRouting(BaseModel):
    """Where the tokens of one text went, mean over layers; shares sum to 1 over experts.

    Attributes:
        domain: Name of the domain.
        tokens: Tokens that were routed.
        load: By expert: share of the choices that fell on it.
        weight: By expert: share of the mixture that it supplied.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str
    tokens: int
    load: tuple[float, ...]
    weight: tuple[float, ...]


class Routing(BaseModel):
    """Where tokens went. All layers of all texts are in ``report/routing.json``; this is what is concluded from.

    Attributes:
        load: Layer x expert, over the experts' texts in equal parts (the common text, which may be for one of them
            alone, only where there are no others): share of the layer's choices that fell on the expert; a layer's
            shares sum to 1.
        weight: Likewise: share of the layer's mixture that the expert supplied.
        aux_loss: Load-balancing loss of each layer on that mix: experts * sum over them of f * p, f being the
            choices per token that fell on the expert and p the mean of its routing probability (Switch
            Transformer, equations 4 to 6, as transformers computes it). Even routing has experts_per_token.
        domains: Text by text.
        files: The report's files.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    load: tuple[tuple[float, ...], ...]
    weight: tuple[tuple[float, ...], ...]
    aux_loss: tuple[float, ...]
    domains: tuple[DomainRouting, ...]
    files: tuple[OutputFile, ...]


class CheckMoE(Unit[Routing]):
    """Loads the staged MoE with transformers, requires all weights and finite logits, and reports the routing."""

    result_type: ClassVar[type[BaseModel]] = Routing

    model: Path = Field(description="Directory in which the result is staged.")
    expert_names: tuple[str, ...] = Field(description="Their model references.")
    routers: tuple[str, ...] = Field(description="Name of each layer's router on disk.")
    condition: tuple[float | None, ...] = Field(
        (), description="Condition number of each layer's rows, to be drawn; empty where it means nothing."
    )
    parameters: int = Field(description="Parameters that the model must have once it is loaded.")
    domains: tuple[Domain, ...] = Field(min_length=1)
    split: Split = "held_out"
    seq_length: int
    seed: int
    tokenizer: Path | None = Field(None, description="As in MeasureDomains.")

    @property
    def label(self) -> str:
        return "load, run and picture the MoE"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.model)

    def run(self, context: UnitContext) -> Routing:
        from aidocks.evaluate.causal_lm import load_cached

        model = load_cached(self.model, None, context, self.tokenizer)
        self._require_all_weights(model)
        chosen = [
            model.chunks(domain.text, self.split, self.seq_length, domain.chunks, self.seed).tokens
            for domain in self.domains
        ]
        traffic = [route(model.network, tokens_CT) for tokens_CT in chosen]
        mixed = self._mixed(traffic)
        load_LE, aux_L = _mean([part.load for part in mixed]), aux_losses(mixed)
        files = tuple(self._write_report(traffic, load_LE, aux_L))
        return Routing(
            load=_rows(load_LE),
            weight=_rows(_mean([part.weight for part in mixed])),
            aux_loss=_row(aux_L),
            domains=tuple(
                DomainRouting(
                    domain=domain.name,
                    tokens=part.tokens,
                    load=_row(part.load.mean(0)),
                    weight=_row(part.weight.mean(0)),
                )
                for domain, part in zip(self.domains, traffic, strict=True)
            ),
            files=files,
        )

    def outputs(self, result: Routing) -> Sequence[OutputFile]:
        return result.files

    def _mixed(self, traffic: Sequence[Traffic]) -> list[Traffic]:
        """Return the traffic of the texts that load and balance are judged on."""
        own = [part for domain, part in zip(self.domains, traffic, strict=True) if domain.name != COMMON]
        return own or list(traffic)

    def _require_all_weights(self, model: CausalLM) -> None:
        if model.unused:
            raise CorruptCheckpoint(
                f"The MoE has {len(model.unused)} tensors that transformers does not know, the first of them "
                f"{model.unused[0]}."
            )
        loaded = sum(parameter.numel() for parameter in model.network.parameters())
        if loaded != self.parameters:
            raise CorruptCheckpoint(
                f"The MoE has {loaded} parameters when loaded, not {self.parameters} as planned."
            )

    def _write_report(
        self, traffic: Sequence[Traffic], load_LE: torch.Tensor, aux_L: torch.Tensor
    ) -> Iterator[OutputFile]:
        from aidocks.evaluate.comparison import shown
        from aidocks.moe import figures

        names = [shown(name) for name in self.expert_names]
        domains = [domain.name for domain in self.domains]
        cosines_EE = self._mean_cosines()
        folder = self.model / "report"
        folder.mkdir(exist_ok=True)
        weights = _stack([part.weight for part in traffic]).numpy()
        pictures = {
            "routing.png": figures.draw_routing(weights, domains, names),
            "balance.png": figures.draw_balance(load_LE.numpy(), aux_L.tolist(), traffic[0].per_token, names),
            "gates.png": figures.draw_gates(cosines_EE.numpy(), self.condition, names),
        }
        for name, content in pictures.items():
            yield write_bytes(folder / name, content)
        report = {
            "experts": names,
            "domains": {
                name: {"tokens": part.tokens, "load": _rows(part.load), "weight": _rows(part.weight)}
                for name, part in zip(domains, traffic, strict=True)
            },
            "load": _rows(load_LE),
            "aux_loss": _row(aux_L),
            "gate_condition": self.condition,
            "gate_cosines": _rows(cosines_EE),
        }
        yield write_text(folder / "routing.json", json.dumps(report) + "\n")

    def _mean_cosines(self) -> torch.Tensor:
        """Return how parallel the router rows are, mean over layers, float64 [E, E]."""
        from torch.nn import functional

        from aidocks.checkpoints.reader import Checkpoint

        stored = Checkpoint(self.model)
        # One layer at a time: a router of 256 experts is not small.
        units = (functional.normalize(stored.tensor(name).double(), dim=-1) for name in self.routers)
        return _mean([unit_EH @ unit_EH.T for unit_EH in units])


@dataclass(frozen=True)
class Traffic:
    """What the routers of a network did with some tokens; float64 sums, [layers, experts].

    Attributes:
        choices: How many tokens chose the expert.
        weights: What the expert contributed to their mixtures.
        probabilities: Sum of its routing probabilities, before the choice.
        tokens: How many tokens there were.
    """

    choices: torch.Tensor
    weights: torch.Tensor
    probabilities: torch.Tensor
    tokens: int

    @property
    def load(self) -> torch.Tensor:
        """Shares of the choices; rows sum to 1."""
        return self.choices / self.choices.sum(1, keepdim=True)

    @property
    def weight(self) -> torch.Tensor:
        """Shares of the mixture; rows sum to 1."""
        return self.weights / self.weights.sum(1, keepdim=True)

    @property
    def per_token(self) -> int:
        """Experts that every token is sent to."""
        return round(float(self.choices[0].sum()) / self.tokens)


def aux_losses(traffic: Sequence[Traffic]) -> torch.Tensor:
    """Return the load-balancing loss of each layer on a mix of texts in equal parts, float64 [L].

    See :class:`Routing` for its definition; ``experts_per_token`` is even.
    """
    choices_LE = _mean([part.choices / part.tokens for part in traffic])
    probabilities_LE = _mean([part.probabilities / part.tokens for part in traffic])
    return (choices_LE * probabilities_LE).sum(1) * choices_LE.shape[1]


def route(network: Any, tokens_CT: torch.Tensor) -> Traffic:
    """Run chunks through an MoE and return what its routers did.

    Args:
        network: A loaded Mixtral, Qwen2-MoE or Qwen3-MoE of transformers, with a router in every layer.
        tokens_CT: Token ids, [chunks, tokens].

    Raises:
        CorruptCheckpoint: When a logit is not finite, or a layer has no router.
    """
    import torch

    from aidocks.evaluate.causal_lm import batches

    layers = network.model.layers
    for number, layer in enumerate(layers):
        if not hasattr(layer.mlp, "gate"):
            raise CorruptCheckpoint(f"Layer {number} of the MoE has no router.")
    shape = (len(layers), layers[0].mlp.gate.weight.shape[0])
    choices_LE, weights_LE, probabilities_LE = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    watched = _watched_routers(layers, choices_LE, weights_LE, probabilities_LE)
    with watched, torch.inference_mode():
        for ids_BT in batches(tokens_CT):
            logits = network(input_ids=ids_BT.to(network.device), use_cache=False).logits
            if not bool(torch.isfinite(logits).all()):
                raise CorruptCheckpoint(
                    "The MoE's logits are not finite.", hint="Use bfloat16 or float32 as dtype."
                )
    return Traffic(choices_LE, weights_LE, probabilities_LE, tokens_CT.numel())


@contextmanager
def _watched_routers(
    layers: Sequence[Any],
    choices_LE: torch.Tensor,
    weights_LE: torch.Tensor,
    probabilities_LE: torch.Tensor,
) -> Iterator[None]:
    def watch(layer: int) -> Any:
        def add(module: Any, args: Any, output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
            logits_NE, scores_NK, chosen_NK = output
            chosen = chosen_NK.flatten().cpu()
            scores = scores_NK.flatten().double().cpu()
            choices_LE[layer].index_add_(0, chosen, scores.new_ones(scores.shape))
            weights_LE[layer].index_add_(0, chosen, scores)
            probabilities_LE[layer] += logits_NE.double().softmax(-1).sum(0).cpu()

        return add

    handles = [block.mlp.gate.register_forward_hook(watch(number)) for number, block in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _stack(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    import torch

    return torch.stack(list(parts))


def _mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(parts[1:], start=parts[0]) / len(parts)


def _rows(matrix: torch.Tensor) -> tuple[tuple[float, ...], ...]:
    return tuple(_row(row) for row in matrix)


def _row(values: torch.Tensor) -> tuple[float, ...]:
    # Six significant digits: enough to read, small in the journal, and never 0 for what is not 0.
    return tuple(float(f"{value:.6g}") for value in values.tolist())
