"""Scores of queries and passages: a reranker at work, for measuring and serving alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from aidocks.plan import UnitContext
from aidocks.retrieval.embedder import key_of
from aidocks.retrieval.libraries import require_libraries
from aidocks.training.retriever import Retriever

if TYPE_CHECKING:
    import torch

    from aidocks.retrieval.batching import Read


class Reranker:
    """A loaded reranker. Not for several threads at once.

    Args:
        retriever: What it is.
        device: Of torch.
        dtype: Floating-point type of its weights; None: the stored one where the device is good at it.

    Attributes:
        max_length: Tokens of query and passage that it reads; the longer of the two is cut.
        model: Of sentence-transformers.

    Raises:
        MissingExtra: A library is not installed.
        IncompatibleModels, CorruptCheckpoint: As :func:`aidocks.retrieval.loading.load_cross_encoder`.
    """

    def __init__(self, retriever: Retriever, device: str, dtype: torch.dtype | None = None) -> None:
        require_libraries()
        from aidocks.evaluate.causal_lm import evaluation_dtype
        from aidocks.retrieval.loading import load_cross_encoder, stored_dtype

        dtype = dtype or evaluation_dtype(stored_dtype(retriever.model), device)
        self.retriever = retriever
        self.device = device
        self.max_length = retriever.max_length
        self.model: Any = load_cross_encoder(retriever, device, dtype)
        self._last: tuple[Any, Read] | None = None

    def scores(self, pairs: Sequence[tuple[str, str]]) -> NDArray[np.float32]:
        """Return how well each passage answers its query, as the model makes it (a logit): float32 [N].

        Args:
            pairs: Query and passage; the model's prompts are put before them.
        """
        import torch

        from aidocks.retrieval.batching import features, in_batches

        read = self._read(pairs)
        scores = np.empty(len(pairs), np.float32)

        def compute(chosen: list[int]) -> None:
            inputs = features(read, chosen, self.model.tokenizer, self.device)
            if self.model[0].transformer_task == "text-generation":
                inputs["logits_to_keep"] = 1
            found = self.model(inputs)["scores"].float()
            scores[chosen] = found.reshape(len(chosen), -1)[:, 0].cpu().numpy()

        with torch.inference_mode():
            in_batches(read.lengths, self.device, compute)
        return scores

    def count_tokens(self, pairs: Sequence[tuple[str, str]]) -> list[int]:
        """Return how many tokens the model reads of each pair, prompts and special tokens included."""
        return self._read(pairs).lengths

    def _read(self, pairs: Sequence[tuple[str, str]]) -> Read:
        """Return pairs as tokens; what was read last is remembered, since counting follows computing."""
        from aidocks.retrieval.batching import Read, read_messages

        key = list(pairs)
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        prompts = self.retriever.prompts
        if "message" in self.model[0].modality_config:
            passages = [(query, prompts.passage + passage) for query, passage in pairs]
            read = read_messages(self.model, passages, prompts.query or None)
        elif not pairs:
            read = Read([])
        else:
            found = self.model.tokenizer(
                [prompts.query + query for query, _ in pairs],
                [prompts.passage + passage for _, passage in pairs],
                truncation="longest_first",
                max_length=self.max_length,
                return_attention_mask=False,
                verbose=False,
            )
            read = Read(found["input_ids"], found.get("token_type_ids"))
        self._last = (key, read)
        return read


def open_reranker(retriever: Retriever, context: UnitContext) -> Reranker:
    """Return the model from the worker's cache, loading it at most once.

    Args:
        retriever: A reranker.
        context: Of the unit.

    Raises:
        AIDocksError: As :class:`Reranker`.
    """
    found: Reranker = context.keep(
        f"reranker:{key_of(retriever)}",
        retriever.model,
        lambda: Reranker(retriever, context.device),
        large=True,
    )
    return found
