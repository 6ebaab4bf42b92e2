"""The unit that computes the router rows of all layers from prompts, or at random."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.memory import memory_to_load
from aidocks.moe.gate_files import write_gates
from aidocks.plan import Unit, UnitContext
from aidocks.specs.moe import RANDOM_MODES, GateMode

if TYPE_CHECKING:
    from aidocks.evaluate.causal_lm import CausalLM
    from aidocks.moe.gates import Floats


class Prompts(BaseModel):
    """What one router row is made from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    positive: tuple[str, ...] = ()
    negative: tuple[str, ...] = ()


class Gates(BaseModel):
    """The router rows: a small safetensors file.

    Attributes:
        file: Rows of every layer in float32, named as in the result.
        condition: Condition number of each layer's rows; None where they are linearly dependent.
        cut_prompts: Prompts that were longer than the base's context; their ends were used.
        bits: Bits per weight that the base was loaded with, where fewer than stored.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    condition: tuple[float | None, ...]
    cut_prompts: int = 0
    bits: int | None = None


class ComputeGates(Unit[Gates]):
    """Router rows of all layers, written to one small file in the workspace."""

    result_type: ClassVar[type[BaseModel]] = Gates

    base: Path = Field(description="Checkpoint directory of the base.")
    directory: Path = Field(description="Directory for the file.")
    mode: GateMode
    experts: tuple[Prompts, ...] = Field(description="In the order of the router's rows.")
    shared: Prompts | None = Field(None, description="Of the gate of the shared experts, where there is one.")
    routers: tuple[str, ...] = Field(description="Name of each layer's router.")
    shared_gates: tuple[str, ...] = Field((), description="Name of each layer's gate of the shared experts.")
    hidden_size: int
    bits: int | None = Field(None, description="Load the base in so many bits per weight, on a CUDA GPU.")
    seed: int

    @property
    def label(self) -> str:
        return f"{self.mode} gates of {len(self.routers)} layers"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.base) if self.mode in ("hidden", "hidden_avg") else None

    @property
    def computes(self) -> bool:
        return self.mode not in RANDOM_MODES

    @property
    def weight(self) -> float:
        """In bytes, as of the weight files beside it: hidden states need all of the base, the other modes little."""
        if self.mode not in ("hidden", "hidden_avg"):
            return 1e6
        return float(sum(path.stat().st_size for path in self.base.glob("*.safetensors")))

    def run(self, context: UnitContext) -> Gates:
        import numpy as np

        from aidocks.moe import gates

        cut, bits = 0, None
        if self.mode in RANDOM_MODES:
            rows_LEH = self._random_rows()
        else:
            vectors, cut, bits = self._prompt_vectors(context)
            rows_LEH = self._rows(vectors)
        if not np.isfinite(rows_LEH).all():
            raise CorruptCheckpoint(
                "The base's hidden states of the prompts are not finite.",
                field="base_model",
                value=self.base.name,
            )
        count = len(self.experts)
        named = {name: rows_EH[:count] for name, rows_EH in zip(self.routers, rows_LEH, strict=True)}
        if self.shared_gates:
            named |= {name: rows[count:] for name, rows in zip(self.shared_gates, rows_LEH, strict=True)}
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"{self.mode}-{self.unit_id}.safetensors"
        condition = tuple(gates.condition_numbers(rows_LEH[:, :count]))
        return Gates(file=write_gates(path, named), condition=condition, cut_prompts=cut, bits=bits)

    def outputs(self, result: Gates) -> Sequence[OutputFile]:
        return (result.file,)

    @property
    def _all(self) -> tuple[Prompts, ...]:
        """Every row's prompts: the experts', then the shared gate's where there is one."""
        return (*self.experts, self.shared or Prompts()) if self.shared_gates else self.experts

    def _random_rows(self) -> Floats:
        from aidocks.moe import gates

        make = gates.random_gates if self.mode == "random" else gates.uniform_gates
        return make(len(self.routers), len(self._all), self.hidden_size, self.seed)

    def _prompt_vectors(self, context: UnitContext) -> tuple[dict[str, Floats], int, int | None]:
        """Return prompt -> [H], or [L, H] where layers differ; how many prompts were cut; the base's bits."""
        from aidocks.checkpoints.reader import Checkpoint
        from aidocks.moe import gates

        prompts = sorted({prompt for row in self._all for prompt in (*row.positive, *row.negative)})
        if self.mode == "cheap_embed":
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(
                self.base, local_files_only=True, trust_remote_code=False
            )
            embedding_VH = Checkpoint(self.base).tensor("model.embed_tokens.weight")
            return gates.embed_prompts(prompts, tokenizer, embedding_VH), 0, None
        base, bits = self._load(context)
        tokens, cut = gates.tokenize(prompts, base.tokenizer, base.network.config.max_position_embeddings)
        over_all = self.mode == "hidden_avg"
        return gates.hidden_states(tokens, base.network, over_all=over_all), cut, bits

    def _load(self, context: UnitContext) -> tuple[CausalLM, int | None]:
        from aidocks.evaluate.causal_lm import load_cached, load_quantized

        # Kernels for few bits exist for CUDA only; elsewhere the base is loaded as it is stored.
        if self.bits is None or not context.device.startswith("cuda"):
            return load_cached(self.base, None, context), None
        bits = self.bits
        model: Any = context.keep(
            f"causal-lm:{bits}-bit",
            self.base,
            lambda: load_quantized(self.base, bits, context.device),
            large=True,
        )
        return model, bits

    def _rows(self, vectors: dict[str, Floats]) -> Floats:
        import numpy as np

        from aidocks.moe import gates

        rows = []
        for prompts in self._all:
            if prompts.positive:
                positive = [vectors[prompt] for prompt in prompts.positive]
                rows.append(gates.contrast(positive, [vectors[prompt] for prompt in prompts.negative]))
            else:
                rows.append(np.zeros_like(rows[0]))
        if rows[0].ndim == 1:
            return np.broadcast_to(np.stack(rows), (len(self.routers), len(rows), self.hidden_size))
        return np.stack(rows, axis=1)
