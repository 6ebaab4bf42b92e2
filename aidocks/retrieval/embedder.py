"""Vectors of texts: an embedding model at work, for measuring and serving alike.

Texts are read once, put in the order of their lengths and computed in batches of about equal numbers of tokens, so
that little is spent on filling up short ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from aidocks.plan import UnitContext
from aidocks.retrieval.libraries import require_libraries
from aidocks.training.retriever import Retriever

if TYPE_CHECKING:
    import torch

    from aidocks.retrieval.batching import Read

Role = Literal["query", "passage"]


class Embedder:
    """A loaded embedding model. Not for several threads at once.

    Args:
        retriever: What it is.
        device: Of torch.
        dtype: Floating-point type of its weights; None: the stored one where the device is good at it.

    Attributes:
        dimensions: Length of its vectors.
        max_length: Tokens of a text that it reads; what is longer is cut.
        model: Of sentence-transformers.

    Raises:
        MissingExtra: A library is not installed.
        IncompatibleModels, CorruptCheckpoint: As :func:`aidocks.retrieval.loading.load_embedding_model`.
    """

    def __init__(self, retriever: Retriever, device: str, dtype: torch.dtype | None = None) -> None:
        require_libraries()
        from aidocks.evaluate.causal_lm import evaluation_dtype
        from aidocks.retrieval.loading import load_embedding_model, stored_dtype

        dtype = dtype or evaluation_dtype(stored_dtype(retriever.model), device)
        self.retriever = retriever
        self.device = device
        self.max_length = retriever.max_length
        model = load_embedding_model(retriever, device, dtype)
        self.model: Any = model
        self.dimensions: int = model.truncate_dim or model.get_embedding_dimension() or 0
        self._last: tuple[Any, Read] | None = None

    def embed(
        self, texts: Sequence[str], role: Role | None = None, *, prompt: str | None = None
    ) -> NDArray[np.float32]:
        """Return the vectors of texts: float32 [N, D].

        Args:
            texts: Any number.
            role: Which of the model's prompts is put before each; None: none.
            prompt: Is put before each instead.
        """
        import torch

        from aidocks.retrieval.batching import features, in_batches

        read = self._read(texts, role, prompt)
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        self._take_side(role)

        def compute(chosen: list[int]) -> None:
            inputs = features(read, chosen, self.model.tokenizer, self.device)
            found = self.model(inputs)["sentence_embedding"][:, : self.dimensions]
            vectors[chosen] = found.float().cpu().numpy()

        with torch.inference_mode():
            in_batches(read.lengths, self.device, compute)
        return vectors

    def count_tokens(
        self, texts: Sequence[str], role: Role | None = None, *, prompt: str | None = None
    ) -> list[int]:
        """Return how many tokens the model reads of each text, prompt and special tokens included."""
        return self._read(texts, role, prompt).lengths

    def _read(self, texts: Sequence[str], role: Role | None, prompt: str | None) -> Read:
        """Return texts as tokens; what was read last is remembered, since counting follows computing."""
        from aidocks.retrieval.batching import Read, read_messages

        before = self._prompt(role) if prompt is None else prompt
        key = (before, list(texts))
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if "message" in self.model[0].modality_config:
            read = read_messages(self.model, texts, before or None)
        elif not texts:
            read = Read([])
        else:
            found = self.model.tokenizer(
                [before + text for text in texts],
                truncation=True,
                max_length=self.max_length,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            read = Read(found["input_ids"], prompt=self._prompt_tokens(before))
        self._last = (key, read)
        return read

    def _prompt(self, role: Role | None) -> str:
        if role is None:
            return ""
        return self.retriever.prompts.query if role == "query" else self.retriever.prompts.passage

    def _prompt_tokens(self, prompt: str) -> int | None:
        """Return the length of a prompt where the pooling leaves it out; None where it does not."""
        pooling = next((one for one in self.model if hasattr(one, "include_prompt")), None)
        if not prompt or pooling is None or pooling.include_prompt:
            return None
        length: int | None = self.model[0]._get_prompt_length(prompt)
        return length

    def _take_side(self, role: Role | None) -> None:
        """Of a model with an adapter for queries and one for passages, use the right one."""
        from aidocks.retrieval.adding import activate

        activate(self.model[0].model, self.retriever, role)


def open_embedder(retriever: Retriever, context: UnitContext) -> Embedder:
    """Return the model from the worker's cache, loading it at most once.

    Args:
        retriever: An embedding model.
        context: Of the unit.

    Raises:
        AIDocksError: As :class:`Embedder`.
    """
    found: Embedder = context.keep(
        f"embedder:{key_of(retriever)}",
        retriever.model,
        lambda: Embedder(retriever, context.device),
        large=True,
    )
    return found


def key_of(retriever: Retriever) -> str:
    """Return what a loaded model depends on, beside the files of its directory."""
    from aidocks.checkpoints.files import state_of

    adapter = state_of(retriever.adapter) if retriever.adapter is not None else ""
    return f"{retriever.model_dump_json()}:{adapter}"
