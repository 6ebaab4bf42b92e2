"""The unit that measures one model, or the plain average of several, on a list of texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import state_of
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.memory import memory_to_load
from aidocks.evaluate.perplexity import PerplexityResult
from aidocks.evaluate.texts import Domain, Split
from aidocks.plan import Unit, UnitContext

if TYPE_CHECKING:
    import torch

    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.evaluate.causal_lm import CausalLM


class DomainResults(BaseModel):
    """Losses of one model on several texts, in the order in which they were asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    results: tuple[PerplexityResult, ...]


class MeasureDomains(Unit[DomainResults]):
    """Perplexity on every domain of one model, which is loaded once.

    Several models stand for the plain average of their weights: what one gets without any router, at the cost of one
    model. It is computed tensor by tensor in float32 from the memory-mapped checkpoints, rounded once to the first
    one's stored type, and never written to disk.
    """

    result_type: ClassVar[type[BaseModel]] = DomainResults

    models: tuple[Path, ...] = Field(
        min_length=1, description="Checkpoint directories; of one form if several."
    )
    domains: tuple[Domain, ...] = Field(min_length=1)
    split: Split = "held_out"
    seq_length: int = Field(128, ge=2, description="Tokens of a chunk.")
    seed: int = 0
    dtype: str | None = Field(
        None, description="Computation type; None lets the worker choose what it does well."
    )
    tokenizer: Path | None = Field(
        None,
        description="Checkpoint directory whose tokenizer reads the texts: models with further tokens of their own "
        "are compared on equal ones. None for the first model's.",
    )
    subject: str = Field("", description="What is measured, for people.")

    @property
    def label(self) -> str:
        names = " + ".join(dict.fromkeys(path.name for path in self.models))
        texts = f"{len(self.domains)} texts" if len(self.domains) > 1 else self.domains[0].name
        return f"{self.subject or names} on {texts} ({self.split.replace('_', '-')})"

    @property
    def memory(self) -> int | None:
        return memory_to_load(*self.models)

    @property
    def weight(self) -> float:
        return float(self.seq_length * sum(domain.chunks for domain in self.domains))

    def run(self, context: UnitContext) -> DomainResults:
        model = self._load(context)
        return DomainResults(
            results=tuple(
                model.measure(domain.text, self.split, self.seq_length, domain.chunks, self.seed)
                for domain in self.domains
            )
        )

    def _load(self, context: UnitContext) -> CausalLM:
        from aidocks.evaluate.causal_lm import load_cached

        if len(self.models) == 1:
            return load_cached(self.models[0], self.dtype, context, self.tokenizer)
        states = ":".join(f"{path}:{state_of(path)}" for path in self.models)
        model: CausalLM = context.cache.get(
            f"average:{self.dtype}:{self.tokenizer}:{context.device}:{states}",
            lambda: load_average(self.models, self.dtype, context.device, self.tokenizer),
            large=True,
        )
        return model


def load_average(
    paths: Sequence[Path], dtype: str | None, device: str, tokenizer: Path | None = None
) -> CausalLM:
    """Load the plain average of several models of one form; a model that is named twice counts twice.

    Of a vocabulary that some of them extend, each row is the average of the models that have it, up to the
    rows of the first.

    Args:
        paths: Checkpoint directories. The first gives the configuration.
        dtype, device, tokenizer: As for :func:`aidocks.evaluate.causal_lm.load`.

    Raises:
        IncompatibleModels: Naming the tensor that one lacks, or that has another shape or is tied differently.
        As :func:`aidocks.evaluate.causal_lm.load`.
    """
    import torch

    from aidocks.checkpoints.reader import Checkpoint
    from aidocks.evaluate.causal_lm import load

    model = load(paths[0], dtype, device, tokenizer)
    checkpoints = [Checkpoint(path) for path in paths]
    network = model.network
    embeddings = {id(part.weight) for part in _embeddings(network)}
    aliases: dict[int, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    with torch.inference_mode():
        # A tied parameter comes once, with all of its names.
        for parameter in network.parameters():
            names = [
                spelling
                for name in aliases[id(parameter)]
                for spelling in (name, name.removeprefix(f"{network.base_model_prefix}."))
            ]
            stored = [_stored(checkpoint, names) for checkpoint in checkpoints]
            parameter.copy_(_average(stored, names[0], paths, may_grow=id(parameter) in embeddings))
    return model


def _embeddings(network: Any) -> list[Any]:
    ends = (network.get_input_embeddings(), network.get_output_embeddings())
    return [part for part in ends if part is not None]


def _stored(checkpoint: Checkpoint, names: Sequence[str]) -> torch.Tensor:
    """Return a checkpoint's values of a parameter that has several names where it is tied."""
    import torch

    found = [checkpoint.tensor(name) for name in dict.fromkeys(names) if name in checkpoint.entries]
    if not found:
        raise IncompatibleModels(
            f"{checkpoint.path.name} has no tensor {names[0]!r}, so that no average can be computed.",
            value=checkpoint.path.name,
        )
    for other in found[1:]:
        if not torch.equal(other, found[0]):
            raise IncompatibleModels(
                f"{checkpoint.path.name} has an output matrix of its own, but the first model's is its input "
                f"embedding ({names[0]}): no average has the form of both.",
                value=checkpoint.path.name,
            )
    return found[0]


def _average(
    tensors: Sequence[torch.Tensor], name: str, paths: Sequence[Path], *, may_grow: bool
) -> torch.Tensor:
    """Return the mean in the first one's shape and type, accumulated in float32."""
    import torch

    first = tensors[0]
    total = torch.zeros(first.shape, dtype=torch.float32)
    counts = torch.zeros(len(first), *[1] * (first.ndim - 1)) if first.ndim else torch.zeros(())
    for tensor, path in zip(tensors, paths, strict=True):
        if tensor.shape != first.shape and not (may_grow and tensor.shape[1:] == first.shape[1:]):
            raise IncompatibleModels(
                f"{name} is {list(tensor.shape)} in {path.name}, but {list(first.shape)} in {paths[0].name}.",
                value=path.name,
            )
        rows = slice(min(len(tensor), len(first))) if first.ndim else ...
        total[rows] += tensor[rows]
        counts[rows] += 1
    return (total / counts).to(first.dtype)
