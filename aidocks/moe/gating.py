"""The unit that computes the router rows of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.writer import TensorPlan, plan_shards
from aidocks.errors import CorruptCheckpoint
from aidocks.moe.mixtral import STORED, router_name
from aidocks.plan import Unit, UnitContext
from aidocks.specs.moe import DType, GateMode

if TYPE_CHECKING:
    import torch

#: Rows whose condition number is above this hardly tell experts apart.
WORST_CONDITION = 5.0
_LARGEST_FILE = 1 << 40


class Prompts(BaseModel):
    """What the router row of one expert is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


class Gates(BaseModel):
    """The router rows: a small safetensors file, and how well they tell the experts apart.

    Attributes:
        file: Rows of every layer, named and typed as in the result, so that they can be copied.
        condition: Condition number of each layer's rows; None where they are linearly dependent.
        cut_prompts: Prompts that were longer than the base's context; their ends were used.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    condition: tuple[float | None, ...]
    cut_prompts: int = 0

    @property
    def worst_condition(self) -> float | None:
        finite = [number for number in self.condition if number is not None]
        return max(finite) if len(finite) == len(self.condition) else None

    @property
    def warning(self) -> str | None:
        """What to tell people when the rows are nearly parallel in some layers."""
        bad = [i for i, number in enumerate(self.condition) if number is None or number > WORST_CONDITION]
        if not bad:
            return None
        worst = "infinite" if self.worst_condition is None else f"{self.worst_condition:.1f}"
        return (
            f"The router rows of {len(bad)} of {len(self.condition)} layers are nearly parallel (condition "
            f"number up to {worst}; above {WORST_CONDITION:g} the router hardly tells experts apart). More "
            "and more different prompts, and negative ones, help."
        )


class ComputeGates(Unit[Gates]):
    """Router rows of all layers, written to one small file in the workspace."""

    result_type: ClassVar[type[BaseModel]] = Gates

    base: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory for the file.")
    mode: GateMode
    experts: tuple[Prompts, ...] = Field(description="In the order of the router's rows.")
    num_layers: int
    hidden_size: int
    dtype: DType
    seed: int

    @property
    def label(self) -> str:
        return f"{self.mode} gates of {self.num_layers} layers"

    def run(self, context: UnitContext) -> Gates:
        import torch

        from aidocks.checkpoints.writer import ShardWriter
        from aidocks.moe.gates import condition_numbers, random_gates

        cut = 0
        if self.mode == "random":
            gates_LEH = random_gates(self.num_layers, len(self.experts), self.hidden_size, self.seed)
        else:
            vectors, cut = self._prompt_vectors(context)
            gates_LEH = self._rows(vectors)
        if not bool(torch.isfinite(gates_LEH).all()):
            raise CorruptCheckpoint(
                "The base's hidden states of the prompts are not finite.",
                field="base_model",
                value=self.base.name,
            )
        shape = (len(self.experts), self.hidden_size)
        tensors = [
            TensorPlan(name=router_name(layer), dtype=STORED[self.dtype], shape=shape)
            for layer in range(self.num_layers)
        ]
        (plan,) = plan_shards(tensors, _LARGEST_FILE)
        stored_LEH = gates_LEH.to(getattr(torch, self.dtype))
        self.directory.mkdir(parents=True, exist_ok=True)
        with ShardWriter(self.directory, plan) as writer:
            for layer, rows_EH in enumerate(stored_LEH):
                writer.write(router_name(layer), rows_EH)
        condition = condition_numbers(stored_LEH)
        return Gates(file=writer.output, condition=tuple(condition), cut_prompts=cut)

    def outputs(self, result: Gates) -> Sequence[OutputFile]:
        return (result.file,)

    def _prompt_vectors(self, context: UnitContext) -> tuple[dict[str, torch.Tensor], int]:
        """Return prompt -> [H], or [L, H] where layers differ; and how many prompts were cut."""
        from aidocks.checkpoints.reader import Checkpoint
        from aidocks.evaluate.causal_lm import load_cached
        from aidocks.moe import gates

        prompts = sorted(
            {prompt for expert in self.experts for prompt in (*expert.positive, *expert.negative)}
        )
        if self.mode == "cheap_embed":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                self.base, local_files_only=True, trust_remote_code=False
            )
            embedding_VH = Checkpoint(self.base).tensor("model.embed_tokens.weight")
            return gates.embed_prompts(prompts, tokenizer, embedding_VH), 0
        base = load_cached(self.base, None, context)
        tokens, cut = gates.tokenize(prompts, base.tokenizer, base.network.config.max_position_embeddings)
        return gates.hidden_states(tokens, base.network), cut

    def _rows(self, vectors: dict[str, torch.Tensor]) -> torch.Tensor:
        import torch

        from aidocks.moe.gates import contrast

        rows = [
            contrast([vectors[p] for p in expert.positive], [vectors[n] for n in expert.negative])
            for expert in self.experts
        ]
        if rows[0].ndim == 1:
            return torch.stack(rows).expand(self.num_layers, -1, -1)
        return torch.stack(rows, dim=1)
