"""What a model makes of an objective's data: items, their batches, and the loss of each item.

Every item is one or more *spans*: tokens that follow others, whose log-probability is wanted. A chunk of a text is one
span, a question has one for each answer, a preference two. Spans whose tokens are read by the same input (answers of
one token) share a row of the batch.

Shapes: B rows, T tokens (of the longest row; others are padded on the right, which causal models do not see), K
positions whose logits are needed, V the vocabulary, S tokens of one span.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional

from aidocks.evaluate.causal_lm import TOKENS_PER_BATCH
from aidocks.evaluate.objectives import LEAST_ITEMS, ObjectiveSource, Part
from aidocks.evaluate.tokens import Encoded, encode_chunks, encode_records
from aidocks.plan import WorkerCache
from aidocks.specs.objective import Metric

# Logits in fp32 that a core's cache holds (2 MB).
_VALUES_AT_ONCE = 1 << 19
#: Shares of the items after which a sequential test looks; no batch goes beyond such a place.
LOOKS = (1 / 8, 1 / 4, 1 / 2, 1.0)

#: (ids_BT int64, mask_BT bool or None where nothing is padded, positions_K int64 or None for all) -> logits_BKV.
Forward = Callable[[torch.Tensor, torch.Tensor | None, torch.Tensor | None], torch.Tensor]


class Span(NamedTuple):
    """Tokens whose log-probability is wanted: in which row, where its first is predicted (along K), and which."""

    row: int
    first: int
    targets_S: torch.Tensor  # noqa: N815


class Item(NamedTuple):
    """One chunk, question or preference: its place in the data, its spans, and which of them is right."""

    position: int
    spans: tuple[Span, ...]
    gold: int


class Batch(NamedTuple):
    """Items that are read together.

    Attributes:
        number: Place of the batch in its task.
        ids_BT: Token ids, int64, on the CPU.
        mask_BT: True where there is a token and no padding.
        positions_K: Ascending positions whose logits are needed; None for all.
        items: In the order of their losses.
    """

    number: int
    ids_BT: torch.Tensor  # noqa: N815
    mask_BT: torch.Tensor  # noqa: N815
    positions_K: torch.Tensor | None  # noqa: N815
    items: tuple[Item, ...]

    @property
    def tokens(self) -> int:
        """Predicted tokens."""
        return sum(len(span.targets_S) for item in self.items for span in item.spans)


class Task:
    """One part of one objective, ready for one tokenizer.

    Attributes:
        metric: What is measured.
        batches: In an order that depends on the data alone: up to each of :attr:`looks` the items are the first ones
            in hashed order, so a measurement that stops there has a sample of them.
        looks: Numbers of items, ascending, at which a sequential test may stop; the last is all of them.
        segments: The batches from one look to the next.
        size: Number of items.
        tokens: Predicted tokens of all items.
    """

    def __init__(self, metric: Metric, items: Sequence[Encoded], *, whole: bool) -> None:
        self.metric = metric
        self.size = len(items)
        self.looks = tuple(
            sorted({min(self.size, max(LEAST_ITEMS, round(share * self.size))) for share in LOOKS})
        )
        segments: list[tuple[Batch, ...]] = []
        number = itertools.count()
        for begin, end in itertools.pairwise((0, *self.looks)):
            segment = list(items[begin:end])
            if not whole:  # equally long rows waste no padding
                segment.sort(key=lambda item: (item.longest, item.position))
            segments.append(tuple(_batch(next(number), group, whole=whole) for group in _groups(segment)))
        self.segments = tuple(segments)
        self.batches = tuple(batch for segment in segments for batch in segment)
        self.tokens = sum(batch.tokens for batch in self.batches)

    def losses(self, batch: Batch, forward: Forward) -> torch.Tensor:
        """Return the loss of each item, float64 [items], lower is better; not a number where a logit is not.

        Perplexity: nats per token of a chunk. Accuracy: 0 where the right answer is more probable than every other (a
        tie is wrong), or, where there is but one, where each of its tokens is the most probable; else 1.
        Log-likelihood: -log p of the right answer, in nats. Preference: -(log p(chosen) - log p(rejected)).
        """
        rows_KV = self._logits(batch, forward)
        return torch.stack([self._loss(item, rows_KV) for item in batch.items]).cpu()

    def surrogate(self, batch: Batch, forward: Forward) -> torch.Tensor:
        """Return what stands for the loss of each item where a gradient is needed, float32 [items].

        Perplexity and log-likelihood: the loss itself. Accuracy: the cross-entropy over the answers, or -log p of the
        only one. Preference: -log sigmoid(margin), as in DPO (arXiv 2305.18290) without a reference model.
        """
        rows_KV = self._logits(batch, forward)
        return torch.stack([self._surrogate(item, rows_KV) for item in batch.items])

    def _logits(self, batch: Batch, forward: Forward) -> tuple[torch.Tensor, ...]:
        """Return the logits [K, V] of every row. Taken apart at once: a slice of all would have a gradient of all."""
        mask = None if bool(batch.mask_BT.all()) else batch.mask_BT
        return forward(batch.ids_BT, mask, batch.positions_K).unbind(0)

    def _loss(self, item: Item, rows_KV: Sequence[torch.Tensor]) -> torch.Tensor:
        if self.metric == "accuracy" and len(item.spans) == 1:
            return _missed(item.spans[0], rows_KV)
        nats = torch.stack([_nats(span, rows_KV).double().sum() for span in item.spans])
        if self.metric == "perplexity":
            return nats[0] / len(item.spans[0].targets_S)
        if self.metric == "log_likelihood":
            return nats[item.gold]
        if self.metric == "preference":
            return nats[0] - nats[1]
        others = torch.cat([nats[: item.gold], nats[item.gold + 1 :]])
        wrong = (nats[item.gold] >= others.min()).double()
        return torch.where(nats.isfinite().all(), wrong, torch.nan)

    def _surrogate(self, item: Item, rows_KV: Sequence[torch.Tensor]) -> torch.Tensor:
        nats = torch.stack([_nats(span, rows_KV).sum() for span in item.spans])
        if self.metric == "perplexity":
            return nats[0] / len(item.spans[0].targets_S)
        if self.metric == "preference":
            return -functional.logsigmoid(nats[1] - nats[0])
        if self.metric == "accuracy" and len(nats) > 1:
            return nats[item.gold] + torch.logsumexp(-nats, 0)
        return nats[item.gold]


#: Tasks of a tokenizer, as long as there is that tokenizer: units of one model ask for the same few again and again.
_TASKS: WeakKeyDictionary[Any, WorkerCache] = WeakKeyDictionary()
_KEPT_TASKS = 8


def load_task(source: ObjectiveSource, part: Part, tokenizer: Any, *, longest: int | None = None) -> Task:
    """Tokenise a part of an objective's data, or return what was made of it before for this tokenizer.

    Args:
        source: With sizes.
        part: Which.
        tokenizer: A transformers tokenizer.
        longest: The model's context in tokens; of a longer record the beginning is left out.

    Raises:
        InvalidSpec: For data that no longer hold what they held, chunks longer than the context, or a record that is
            nothing to the tokenizer.
    """

    def make() -> Task:
        if source.metric == "perplexity":
            return Task(source.metric, encode_chunks(source, part, tokenizer, longest), whole=True)
        return Task(source.metric, encode_records(source, part, tokenizer, longest), whole=False)

    known = _TASKS.setdefault(tokenizer, WorkerCache(_KEPT_TASKS))
    task: Task = known.get(f"{part}:{longest}:{source.model_dump_json()}", make)
    return task


def context_length(network: Any) -> int | None:
    """Return how many tokens a transformers model can see at once, or None when it does not say."""
    config = (
        network.config.get_text_config() if hasattr(network.config, "get_text_config") else network.config
    )
    found = getattr(config, "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def plain_forward(network: Any) -> Forward:
    """Return the model's own forward, on its device, in the form that a :class:`Task` asks for."""
    selective = takes_positions(network)

    def forward(
        ids_BT: torch.Tensor, mask_BT: torch.Tensor | None, positions_K: torch.Tensor | None
    ) -> torch.Tensor:
        more: dict[str, Any] = {}
        if mask_BT is not None:
            more["attention_mask"] = mask_BT.to(network.device, torch.int64)
        if selective and positions_K is not None:
            more["logits_to_keep"] = positions_K.to(network.device)
        logits: torch.Tensor = network(input_ids=ids_BT.to(network.device), use_cache=False, **more).logits
        return logits if selective or positions_K is None else logits[:, positions_K.to(logits.device)]

    return forward


def takes_positions(network: Any) -> bool:
    """Say whether a model computes the logits of chosen positions alone."""
    return "logits_to_keep" in inspect.signature(network.forward).parameters


def _groups(items: Sequence[Encoded]) -> Iterator[list[Encoded]]:
    """Split items into groups of at most 1024 tokens with their padding, or of one item where that is longer."""
    group: list[Encoded] = []
    rows = longest = 0
    for item in items:
        if group and (rows + len(item.rows)) * max(longest, item.longest) > TOKENS_PER_BATCH:
            yield group
            group, rows, longest = [], 0, 0
        group.append(item)
        rows += len(item.rows)
        longest = max(longest, item.longest)
    if group:
        yield group


def _batch(number: int, items: Sequence[Encoded], *, whole: bool) -> Batch:
    rows = [row for item in items for row in item.rows]
    ids_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row)] = torch.tensor(row)
        mask_BT[b, : len(row)] = True
    needed = sorted(
        {p for item in items for s in item.spans for p in range(s.first, s.first + len(s.targets))}
    )
    # Of a whole text only the last position is not needed: not worth a copy of all others.
    place = {p: p if whole else k for k, p in enumerate(needed)}
    made: list[Item] = []
    first_row = 0
    for item in items:
        spans = tuple(
            Span(first_row + s.row, place[s.first], torch.tensor(s.targets, dtype=torch.int64))
            for s in item.spans
        )
        made.append(Item(item.position, spans, item.gold))
        first_row += len(item.rows)
    return Batch(number, ids_BT, mask_BT, None if whole else torch.tensor(needed), tuple(made))


def _nats(span: Span, rows_KV: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return -log p of each token of a span, float32 [S].

    On a CPU a few rows at a time, which stay in its cache: four times as fast as all at once where measured, and the
    same bits.
    """
    logits_SV = rows_KV[span.row][span.first : span.first + len(span.targets_S)]
    targets_S = span.targets_S.to(logits_SV.device)
    rows = max(1, _VALUES_AT_ONCE // logits_SV.shape[1]) if logits_SV.is_cpu else len(targets_S)
    parts = [
        functional.cross_entropy(logits_RV.float(), targets_R, reduction="none")
        for logits_RV, targets_R in zip(
            torch.split(logits_SV, rows), torch.split(targets_S, rows), strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _missed(span: Span, rows_KV: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return 0 where each token of a span is more probable than every other token, else 1; float64, no dimension."""
    logits_SV = rows_KV[span.row][span.first : span.first + len(span.targets_S)].float()
    targets_S1 = span.targets_S.to(logits_SV.device)[:, None]
    own_S1 = logits_SV.gather(1, targets_S1)
    rivals_S = logits_SV.scatter(1, targets_S1, -torch.inf).amax(1)
    wrong = (own_S1[:, 0] <= rivals_S).any().double()
    return torch.where(logits_SV.isnan().any() | own_S1.isinf().any(), torch.nan, wrong)
