"""What of models that find texts can be trained, and how: asked before any work, and once more by every worker."""

from __future__ import annotations

from aidocks.errors import InvalidSpec
from aidocks.retrieval.architecture import RETRIEVAL_SIDES, RETRIEVAL_TASK
from aidocks.training.retriever import EmbeddingLoss, RerankerLoss, Retriever


def require_one_adapter(retriever: Retriever, *, makes_adapter: bool) -> None:
    """Refuse a base whose own adapters leave the new one no clear place.

    What a base has of adapters is added to its weights before the new one is trained. Of two, one for queries and one
    for passages, that cannot be; and an adapter alone would not say that it belongs to the sum.

    Args:
        retriever: The base, as it is opened.
        makes_adapter: Whether the result is an adapter, and no whole model.

    Raises:
        InvalidSpec: Its task is two adapters, or the result would be an adapter on an adapter.
    """
    if retriever.task == RETRIEVAL_TASK:
        raise InvalidSpec(
            f"For {RETRIEVAL_TASK!r} the model has an adapter for queries and one for passages, but one is trained.",
            field="task",
            value=RETRIEVAL_TASK,
            hint=f"Name one of them: {' or '.join(RETRIEVAL_SIDES)}.",
        )
    if makes_adapter and (retriever.adapter is not None or retriever.task is not None):
        what = "is an adapter already" if retriever.adapter is not None else f"has one for {retriever.task!r}"
        raise InvalidSpec(
            f"{retriever.name!r} {what}, so an adapter alone would not say what it belongs to.",
            field="merge_adapter",
            value=False,
            hint="Ask for a whole model (`merge_adapter: true`).",
        )


def require_stage(
    stage: int, loss: EmbeddingLoss | RerankerLoss, *, deepspeed: bool = True, field: str = "deepspeed"
) -> None:
    """Refuse what cannot be trained with DeepSpeed.

    Args:
        stage: Of ZeRO, 0 to 3.
        loss: Of the training.
        deepspeed: Whether the training uses DeepSpeed at all.
        field: Of the request, to be named.

    Raises:
        InvalidSpec: Stage 3, or a loss that goes backward several times in a step.
    """
    if not deepspeed:
        return
    if stage >= 3:
        raise InvalidSpec(
            "Stage 3 of DeepSpeed does not train embedding models and rerankers: it divides the weights among the "
            "processes, and a step of these sends several batches through them, of which each process has others.",
            field=field,
            value=stage,
            hint="Use stage 2, which divides gradients and optimiser states; or train an adapter (lora), whose "
            "gradients and states are small.",
        )
    if loss == "cached_mnrl":
        raise InvalidSpec(
            "The loss 'cached_mnrl' goes backward in parts, which DeepSpeed takes for several steps.",
            field=field,
            value=stage,
            hint="Leave `deepspeed` out, or use the loss 'mnrl'.",
        )
