"""Whether the files of a trained model are that model: loaded by sentence-transformers alone, they say the same.

The training leaves a probe, some texts and what the model in memory made of them. A head that was not saved, a prompt
that was lost or weights that were rounded too much show in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import write_bytes, write_text
from aidocks.errors import CorruptCheckpoint
from aidocks.plan import Unit, UnitContext
from aidocks.training.retriever import Retriever, RetrieverKind

if TYPE_CHECKING:
    import numpy as np

#: Beside the story of a training.
PROBE_FILE, PROBE_VALUES_FILE = "probe.json", "probe.safetensors"
#: Largest difference of a component, or of a logit, that rounding explains; of weights in 16 bits.
_TOLERANCE, _TOLERANCE_16 = 1e-3, 0.05
_VALUES = "values"


class Probe(BaseModel):
    """Texts of which it is known what the trained model makes of them.

    Attributes:
        kind: What the model is. An embedding model has read queries and passages by themselves, in this order; a
            reranker pairs of them.
        queries: With the query's prompt before them.
        passages: With the passage's.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: RetrieverKind
    queries: tuple[str, ...]
    passages: tuple[str, ...]


class Verified(BaseModel):
    """Files that are the model that was trained.

    Attributes:
        error: Largest difference of a component of a vector, or of a logit, in float32.
        tolerance: How large it may be.
        texts: How many texts, or pairs, were compared.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    error: float
    tolerance: float
    texts: int


class VerifyFiles(Unit[Verified]):
    """Loads what a training has written, and compares it with what was in memory.

    A whole model is loaded as anybody would, with sentence-transformers and nothing of this package; an adapter needs
    its base and is loaded as it will be used.
    """

    result_type: ClassVar[type[BaseModel]] = Verified

    retriever: Retriever = Field(
        description="The result: a whole model, or the base with `adapter`, which is then looked at."
    )
    probe: Path = Field(description="Directory of the probe: that of the training's story.")

    @property
    def label(self) -> str:
        return f"{self.retriever.name}, files loaded again"

    def run(self, context: UnitContext) -> Verified:
        """Compare.

        Raises:
            CorruptCheckpoint: They differ by more than rounding explains.
        """
        import numpy as np

        probe, before = read_probe(self.probe)
        after = self._values(probe)
        directory = self.retriever.adapter or self.retriever.model
        if after.shape != before.shape or not (np.isfinite(after).all() and np.isfinite(before).all()):
            raise self._differ(directory, "what they make of texts has another shape, or is no number")
        # Logits may be large, and rounding of weights shows in proportion.
        scale = max(1.0, float(np.abs(before).max(initial=0.0)))
        tolerance = scale * (_TOLERANCE_16 if _is_16_bits(self.retriever.model) else _TOLERANCE)
        error = float(np.abs(after - before).max(initial=0.0))
        if error > tolerance:
            raise self._differ(directory, f"they differ by up to {error:.3g}")
        return Verified(error=error, tolerance=tolerance, texts=len(before))

    def _values(self, probe: Probe) -> np.ndarray:
        import torch
        from sentence_transformers import CrossEncoder, SentenceTransformer

        retriever = self.retriever
        model: Any
        if retriever.adapter is not None:
            from aidocks.retrieval.loading import load_cross_encoder, load_embedding_model

            load = load_embedding_model if probe.kind == "embedding" else load_cross_encoder
            model = load(retriever, "cpu", torch.float32)
        else:
            plain = SentenceTransformer if probe.kind == "embedding" else CrossEncoder
            model = plain(
                str(retriever.model),
                device="cpu",
                local_files_only=True,
                trust_remote_code=retriever.remote_code,
                model_kwargs={"dtype": torch.float32},
            )
        return values_of(model, probe)

    def _differ(self, directory: Path, how: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"The files that were written are not the model that was trained: {how}.",
            field="base_model",
            value=directory.name,
            hint="Some part of this kind of model is not saved by sentence-transformers; ask for a whole model "
            "(merge_adapter: true), or train another base.",
        )


def make_probe(
    model: Any, kind: RetrieverKind, queries: Sequence[str], passages: Sequence[str]
) -> tuple[Probe, np.ndarray]:
    """Return texts, and what a model in memory makes of them.

    Args:
        model: A SentenceTransformer or a CrossEncoder, float32.
        kind: Which of them.
        queries: Some.
        passages: As many.
    """
    probe = Probe(kind=kind, queries=tuple(queries), passages=tuple(passages))
    return probe, values_of(model, probe)


def values_of(model: Any, probe: Probe) -> np.ndarray:
    """Return what a model makes of a probe's texts, as sentence-transformers itself does it, float32.

    An embedding model's vectors of the queries and then of the passages ``[2 N, D]``, with the prompts that it knows
    by name; a reranker's logits ``[N]``.
    """
    import numpy as np
    import torch

    if probe.kind == "reranker":
        pairs = list(zip(probe.queries, probe.passages, strict=True))
        named = {"prompt_name": "query"} if model.prompts.get("query") else {}
        scores = model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False, **named)
        return np.asarray(scores, dtype=np.float32)
    parts = [
        model.encode(
            list(texts), prompt_name=name if name in model.prompts else None, show_progress_bar=False
        )
        for name, texts in (("query", probe.queries), ("passage", probe.passages))
    ]
    return np.concatenate(parts).astype(np.float32)


def write_probe(made: tuple[Probe, np.ndarray], directory: Path) -> None:
    """Write a probe and its values."""
    from safetensors.numpy import save

    probe, values = made
    write_bytes(directory / PROBE_VALUES_FILE, save({_VALUES: values}))
    write_text(directory / PROBE_FILE, probe.model_dump_json())


def read_probe(directory: Path) -> tuple[Probe, np.ndarray]:
    """Return a probe and its values."""
    from safetensors.numpy import load

    probe = Probe.model_validate_json((directory / PROBE_FILE).read_bytes())
    return probe, load((directory / PROBE_VALUES_FILE).read_bytes())[_VALUES]


def _is_16_bits(directory: Path) -> bool:
    from aidocks.retrieval.architecture import architecture_of
    from aidocks.retrieval.loading import stored_dtype

    return stored_dtype(directory / architecture_of(directory).transformer).itemsize < 4
