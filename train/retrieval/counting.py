"""Counts the tokens that a training reads, padding left out."""

from __future__ import annotations

from typing import Any

import torch


class Tokens:
    """Counts what goes through the first module of a model of sentence-transformers while it learns.

    What is only measured does not count, nor the first of the two times that `cached_mnrl` reads a text.

    Args:
        model: A SentenceTransformer or CrossEncoder.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        # On the model's device, where adding waits for nothing.
        self._count: Any = 0
        model[0].register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        features = args[0] if args else kwargs["features"]
        mask = features.get("attention_mask")
        self._count = self._count + (mask.sum() if mask is not None else features["input_ids"].numel())

    def of_all(self, accelerator: Any) -> int:
        """Return the tokens that all processes have read so far. Every process calls this at the same time."""
        own = torch.as_tensor(self._count, device=accelerator.device).reshape(1)
        return int(accelerator.gather(own).sum())
