"""What of a request of ``/train/emb`` or ``/train/rerank`` does not go together: loss and rows, settings and model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.retrieval.architecture import Architecture
from aidocks.retrieval.hyper import CONTRASTING, LIST_LOSSES, Loss, RetrieverSpec, choose_loss
from aidocks.retrieval.trainable import require_stage
from aidocks.specs.train_emb import EmbeddingTrainSpec
from aidocks.specs.train_retrieval_result import RankingData
from aidocks.training.retriever import DISTILLING_LOSSES, IN_BATCH_LOSSES, RetrieverKind, RowKind

#: Losses of rankings, and of scored pairs.
_OF_RANKINGS: dict[str, tuple[Loss, ...]] = {
    "embedding": ("mnrl", "cached_mnrl", "triplet", "margin_mse", "distill_kl"),
    "reranker": ("bce", *LIST_LOSSES, "mnrl", "margin_mse", "mse"),
}
_OF_SCORED: dict[str, tuple[Loss, ...]] = {
    "embedding": ("cosent", "angle", "cosine"),
    "reranker": ("bce", "mse"),
}
#: Losses that have nothing to tell the right passage from without wrong ones that were chosen, or judged.
_CONTRASTED: tuple[Loss, ...] = ("triplet", "margin_mse", "distill_kl")


class RowsSeen(NamedTuple):
    """What loss and settings have to go together with.

    Attributes:
        rows: What they are.
        negatives: Whether they name wrong passages.
        scored: Whether a better model's scores are there, of all passages.
    """

    rows: RowKind
    negatives: bool
    scored: bool


def seen_in(data: Sequence[RankingData]) -> RowsSeen:
    """Return what the data sets that are trained on are together."""
    return RowsSeen(
        rows=data[0].rows,
        negatives=any(one.negatives for one in data),
        scored=all("positive_scores" in one.fields for one in data),
    )


def kind_of(spec: RetrieverSpec) -> RetrieverKind:
    """Return what a request trains: `embedding` or `reranker`."""
    return "embedding" if isinstance(spec, EmbeddingTrainSpec) else "reranker"


def require_loss(spec: RetrieverSpec, seen: RowsSeen) -> None:
    """Refuse a loss that cannot learn from such rows.

    Raises:
        InvalidSpec: Naming what is missing, and the losses that can.
    """
    loss = choose_loss(spec, seen.rows)
    fitting = (_OF_SCORED if seen.rows == "scored" else _OF_RANKINGS)[kind_of(spec)]
    if loss not in fitting:
        rows = (
            "pairs with scores"
            if seen.rows == "scored"
            else "queries with passages that answer them or do not"
        )
        raise InvalidSpec(
            f"The loss {loss!r} does not learn from such rows: they are {rows}.",
            field="loss",
            value=loss,
            hint=f"Losses that do: {', '.join(fitting)}; or leave `loss` out.",
        )
    if seen.rows == "scored":
        _require_scored(spec)
        return
    if loss in DISTILLING_LOSSES and spec.distill_from is None and not seen.scored:
        raise InvalidSpec(
            f"The loss {loss!r} learns a better model's scores, and the rows have none.",
            field="loss",
            value=loss,
            hint="Name a reranker in `distill_from`, or give `pos_scores` and `neg_scores` with the rows.",
        )
    # What is found for rows that have scores would have none, so it is not looked for.
    finds = spec.mine_negatives is not None and not seen.scored
    if loss in _CONTRASTED and not seen.negatives and not finds:
        raise InvalidSpec(
            f"The loss {loss!r} tells right passages from wrong ones, and the rows name no wrong ones.",
            field="mine_negatives",
            hint="Have them looked for with `mine_negatives: true`, or use `loss: mnrl`, which takes the passages of "
            "other queries.",
        )


def _require_scored(spec: RetrieverSpec) -> None:
    """Refuse what scored pairs have no use for: they have no queries that would look for anything."""
    for field in ("mine_negatives", "distill_from"):
        given = getattr(spec, field)
        if given is not None:
            raise InvalidSpec(
                f"The rows are pairs with scores: `{field}` is for queries with passages.",
                field=field,
                value=given if isinstance(given, str) else None,
                hint="Leave it out, or give rows of queries and passages.",
            )


def require_engine(spec: RetrieverSpec) -> None:
    """Refuse what DeepSpeed cannot train, where the request asks for it.

    Raises:
        InvalidSpec: As :func:`~aidocks.retrieval.trainable.require_stage`.
    """
    asked = spec.deepspeed
    # What is chosen for a request that names no loss, every stage can train but the last.
    loss: Loss = "mnrl" if spec.loss == "auto" else spec.loss
    require_stage(asked.fixed_stage or 0, loss, deepspeed=asked.fixed_stage is not None or asked.offload)


def require_model(spec: RetrieverSpec, found: Architecture) -> None:
    """Refuse settings that the base has no place for.

    Raises:
        InvalidSpec: Naming the field, and what there is.
    """
    if spec.target_modules:
        unknown = [name for name in spec.target_modules if name not in found.linear]
        if unknown and spec.adapter != "full":
            raise InvalidSpec(
                f"The layers of the model have no module {unknown[0]!r}.",
                field="target_modules",
                value=unknown[0],
                hint=f"Their linear modules are {', '.join(found.linear)}.",
            )
    if isinstance(spec, EmbeddingTrainSpec) and spec.matryoshka and spec.matryoshka[0] > found.dimensions:
        raise InvalidSpec(
            f"The vectors of the model have {found.dimensions} values; none can be cut to {spec.matryoshka[0]}.",
            field="matryoshka",
            value=spec.matryoshka[0],
            hint=f"Give lengths below {found.dimensions}.",
        )


def notes_before(spec: RetrieverSpec) -> tuple[str, ...]:
    """Return what one should know of a request, whatever its rows are: settings without effect."""
    found = []
    if spec.adapter == "full":
        for field in ("lora_rank", "lora_alpha", "lora_dropout", "rslora", "target_modules"):
            if getattr(spec, field) != type(spec).model_fields[field].default:
                found.append(f"`{field}` has no effect with the adapter 'full'.")
        if not spec.merge_adapter:
            found.append("`merge_adapter` has no effect: 'full' makes a whole model.")
    if spec.max_steps is not None and spec.num_train_epochs != 1:
        found.append("`max_steps` decides when it ends; `num_train_epochs` has no effect.")
    if spec.eval_steps is not None and not spec.evaluate:
        found.append("`eval_steps` has no effect where `evaluate` is false.")
    if spec.optim.endswith("8bit") and spec.deepspeed.stage not in ("auto", "off"):
        found.append(f"DeepSpeed divides the state of {spec.optim!r} only as far as bitsandbytes lets it.")
    return tuple(found)


def notes_of_loss(spec: RetrieverSpec, seen: RowsSeen) -> tuple[str, ...]:
    """Return the settings that have no effect with the loss, and with what the rows have."""
    loss = choose_loss(spec, seen.rows)
    in_batch = loss in IN_BATCH_LOSSES
    without: dict[str, bool] = {}
    if isinstance(spec, EmbeddingTrainSpec):
        without = {
            "temperature": loss not in CONTRASTING,
            "margin": loss != "triplet",
            "gather_negatives": not in_batch,
            "chunk_size": loss != "cached_mnrl",
            "negatives": seen.rows == "scored",
        }
    found = [
        f"`{field}` has no effect with the loss {loss!r}."
        for field, is_without in without.items()
        if is_without and getattr(spec, field) != type(spec).model_fields[field].default
    ]
    has_negatives = seen.negatives or spec.mine_negatives is not None
    if seen.rows == "ranking" and not has_negatives:
        if loss in (*LIST_LOSSES, "bce"):
            found.append(
                "The rows name no wrong passages, so random ones of the data stand in for them; `mine_negatives` finds "
                "harder ones."
            )
        elif spec.negatives != type(spec).model_fields["negatives"].default:
            found.append(
                "`negatives` has no effect: the rows name no wrong passages, and none are looked for."
            )
    if in_batch and (spec.gradient_accumulation_steps or 1) > 1:
        found.append(
            f"With the loss {loss!r} the passages of one forward pass alone are negatives: a larger batch helps more "
            "than `gradient_accumulation_steps`."
        )
    return tuple(found)
