"""Which of DeepSpeed's stages train a model that finds texts."""

from __future__ import annotations

from aidocks.errors import InvalidSpec
from aidocks.training.retriever import EmbeddingLoss, RerankerLoss


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
