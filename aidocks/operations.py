"""The table of operations. One line here gives an operation its endpoint, command, client method and remote function.

Specs and operations are named by import string, so that listing them (for ``aidocks --help``) imports neither.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, cast

from aidocks.errors import NotFound

if TYPE_CHECKING:
    from aidocks.plan import Operation
    from aidocks.specs.base import Spec


@dataclass(frozen=True)
class Registration:
    """How one operation is named and found.

    Attributes:
        name: Command and HTTP path (``byo-moe`` is ``POST /byo-moe``); with underscores, the client's method.
        spec: Import string of the spec class.
        operation: Import string of the operation class.
        summary: One line for help texts and the API documentation.
        path: HTTP path without its first slash, where that is not the name (``laser/scan``).
    """

    name: str
    spec: str
    operation: str
    summary: str
    path: str | None = None

    @property
    def endpoint(self) -> str:
        """HTTP path, such as ``/laser/scan``."""
        return f"/{self.path or self.name}"

    @property
    def method(self) -> str:
        return self.name.replace("-", "_")

    def spec_type(self) -> type[Spec]:
        return cast("type[Spec]", _load(self.spec))

    def load(self) -> Operation[Any, Any]:
        return cast("Operation[Any, Any]", _load(self.operation)())


OPERATIONS = (
    Registration("laser", "aidocks.specs.laser:LaserSpec", "aidocks.laser.operation:Laser",
                 "Optimise a model: rank reduction guided by random matrix theory (LaserRMT)."),
    Registration("laser-scan", "aidocks.specs.laser_scan:LaserScanSpec", "aidocks.laser.scan_operation:LaserScan",
                 "Scan a model: singular values, noise and signal of every weight matrix; lists for training.",
                 path="laser/scan"),
    Registration("byo-moe", "aidocks.specs.moe:MoESpec", "aidocks.moe.operation:BuildMoE",
                 "Build a Mixture-of-Experts from a base model and fine-tunes of it."),
    Registration("merge", "aidocks.specs.merge:MergeSpec", "aidocks.merge.operation:Merge",
                 "Merge models of one shape: SLERP, TIES, DARE and all that mergekit's files can say."),
    Registration("merge-evolve", "aidocks.specs.merge_evolve:MergeEvolveSpec",
                 "aidocks.merge.evolve.operation:MergeEvolve",
                 "Search parameters of a merge by evolution, and keep what held-out data confirm.",
                 path="merge/evolve"),
    Registration("extract-lora", "aidocks.specs.extract_lora:ExtractLoraSpec",
                 "aidocks.merge.extraction.operation:ExtractLora",
                 "Extract the LoRA adapter that comes closest to making one model of another."),
    Registration("train-llm", "aidocks.specs.train_llm:LLMTrainSpec", "aidocks.training.operation:TrainLLM",
                 "Fine-tune a language model: supervised, by preferences, by rewards, or on plain text.",
                 path="train/llm"),
    Registration("train-emb", "aidocks.specs.train_emb:EmbeddingTrainSpec",
                 "aidocks.retrieval.operation:TrainEmbedding",
                 "Fine-tune an embedding model on queries and passages, and prove that it finds more of them.",
                 path="train/emb"),
    Registration("train-rerank", "aidocks.specs.train_rerank:RerankerTrainSpec",
                 "aidocks.retrieval.operation:TrainReranker",
                 "Fine-tune a reranker on queries with right and wrong passages, and prove that it orders them better.",
                 path="train/rerank"),
    Registration("mine-negatives", "aidocks.specs.mine_negatives:MineNegativesSpec",
                 "aidocks.retrieval.mine_operation:MineNegatives",
                 "Find hard negatives for queries: passages that look like an answer, and are none.",
                 path="train/negatives"),
    Registration("train", "aidocks.specs.train:OriginalTrainSpec", "aidocks.training.original:OriginalTrain",
                 "Fine-tune a model, asked for in the original project's words."),
)  # fmt: skip


def find_operation(name: str) -> Registration:
    """Return the registration called ``name`` (either spelling, ``byo-moe`` or ``byo_moe``).

    Raises:
        NotFound: Listing the operations that there are.
    """
    for registration in OPERATIONS:
        if name in (registration.name, registration.method):
            return registration
    known = ", ".join(registration.name for registration in OPERATIONS)
    raise NotFound(f"There is no operation {name!r}.", hint=f"Known: {known}.")


@cache
def _load(dotted: str) -> Any:
    module, _, name = dotted.partition(":")
    return getattr(import_module(module), name)
