"""What the training of an embedding model or a reranker will need; see `aidocks.training.estimate` for the rest."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from aidocks.retrieval.architecture import Architecture
from aidocks.retrieval.hyper import Loss, passages_of
from aidocks.training.estimate import Setup, Stage, largest_batch
from aidocks.training.retriever import IN_BATCH_LOSSES, RetrieverHyperparameters, RetrieverKind
from aidocks.training.shapes import ModelShape

#: Tokens of an English word, with the marks between words (WordPiece, BPE: 1.2 to 1.4), and those that frame a text.
_PER_WORD, _FRAME = 1.4, 3
#: Tokens of a query, with its prompt: no data set says.
QUERY_TOKENS = 32
#: What BERT and its like put between the last layer and a head.
_POOLER = "pooler"


@dataclass(frozen=True, kw_only=True)
class RetrieverSetup(Setup):
    """One way to train what finds texts.

    Attributes:
        kind: What is trained.
        loss: By which.
        decoder: Whether a token looks at those before it alone.
        negatives: Wrong passages of a query, as the rows have them; None: as many as a step takes at most.
        head: Parameters that are trained whole beside an adapter; see :func:`head_of`.
        new_head: How many of them the shape does not have.
    """

    kind: RetrieverKind
    loss: Loss
    hyper: RetrieverHyperparameters
    decoder: bool
    negatives: int | None
    head: int
    new_head: int

    @property
    def trained(self) -> int:
        return super().trained + (self.new_head if self.adapter.kind == "full" else self.head)

    @property
    def passages(self) -> int:
        """Passages of an example."""
        most = self.hyper.negatives
        return passages_of(self.loss, most if self.negatives is None else min(most, self.negatives))

    @property
    def sequences(self) -> int:
        return self.hyper.per_device_train_batch_size * (self.passages + (self.kind == "embedding"))

    @property
    def tokens(self) -> int:
        if self.kind == "reranker":
            return self.sequences * self.length
        if self.loss == "cached_mnrl":  # a few texts at a time are computed with gradients
            return min(self.hyper.chunk, self.sequences) * self.length
        query = min(QUERY_TOKENS, self.length)
        return self.hyper.per_device_train_batch_size * (query + self.passages * self.length)

    @property
    def multiplied(self) -> int:
        return max(0, self.shape.parameters - self.shape.embedding)

    @property
    def attended(self) -> float:
        return self.length / 2 if self.decoder else float(self.length)

    @property
    def passes_beside(self) -> float:
        return 1.0 if self.loss == "cached_mnrl" else 0.0  # all vectors first, without gradients

    @property
    def stages(self) -> tuple[Stage, ...]:
        # DeepSpeed takes what goes backward in parts for several steps.
        return () if self.loss == "cached_mnrl" else (1, 2)

    @property
    def instead(self) -> str:
        if self.loss == "cached_mnrl":
            return "a smaller `chunk_size` needs less memory with the same batch"
        if self.kind == "embedding" and self.loss in IN_BATCH_LOSSES:
            return "`loss: cached_mnrl` takes large batches in little memory"
        return super().instead


def shape_in_training(found: Architecture) -> ModelShape:
    """Return the sizes of a base; its matrices are those that get factors: not the pooler's, nor the head's."""
    kinds = set(found.linear)
    linear = (one for one in found.shape.linear if one.layer is not None and one.kind in kinds)
    return replace(found.shape, linear=tuple(linear))


def head_of(found: Architecture, kind: RetrieverKind) -> tuple[int, int]:
    """Return the parameters of a reranker's head, which is trained whole, and how many of them are not stored.

    Stored is what stands beside the layers' own module, and the pooler within that. A plain encoder gets a dense layer
    and a score, as transformers makes them of nearly all encoders; an embedding model and a decoder that says yes or no
    have no head.

    Args:
        found: The base.
        kind: What is trained.
    """
    if kind == "embedding" or (found.family == "decoder" and found.labels is None):
        return 0, 0
    if found.kind is None:
        made = found.shape.hidden * (found.shape.hidden + 2) + 1
        return made, made
    sizes: Counter[str] = Counter()
    for name, entry in found.shape.entries.items():
        sizes[_POOLER if _POOLER in name.split(".") else name.partition(".")[0]] += entry.numel
    pooled = sizes.pop(_POOLER, 0)
    return pooled + sum(sizes.values()) - max(sizes.values(), default=0), 0


def tokens_of(words: int, kind: RetrieverKind) -> int:
    """Return about how many tokens a passage of so many words is; for a reranker, with its query."""
    return int(_PER_WORD * words) + _FRAME + (QUERY_TOKENS if kind == "reranker" else 0)


def fitted(setup: RetrieverSetup, available: int, *, batch: bool, checkpointing: bool) -> RetrieverSetup:
    """Return a setup that fits, as far as the request leaves that open.

    Args:
        setup: As it would be with enough memory.
        available: Bytes that one process may plan with.
        batch: Whether a smaller batch may be taken.
        checkpointing: Whether activations may be computed twice.
    """
    wanted = setup.hyper.per_device_train_batch_size
    found = largest_batch(setup, available)
    if found >= wanted:
        return setup
    if checkpointing:
        twice = replace(setup, hyper=setup.hyper.model_copy(update={"gradient_checkpointing": True}))
        if not batch or largest_batch(twice, available) > found:
            setup, found = twice, largest_batch(twice, available)
    if not batch or not found:
        return setup
    smaller = {"per_device_train_batch_size": found, "per_device_eval_batch_size": found}
    return replace(setup, hyper=setup.hyper.model_copy(update=smaller))
