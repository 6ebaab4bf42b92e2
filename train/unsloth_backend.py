"""The model as unsloth makes it: with kernels of its own, below the same trainers.

Only where :func:`train.backend.choose` says so is this imported, before trl, transformers and peft: unsloth changes
them in place.
"""

from __future__ import annotations

import os
from typing import Any

# It would tell its makers about this machine, by a download from the hub.
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
# Before everything that it changes.
import unsloth  # isort: skip
import torch

from aidocks.training.run import LOW_RANK, LLMTraining
from train.adapters import adapter_arguments, quantization
from train.distributed import Place


def load_model(training: LLMTraining, place: Place, precision: str) -> Any:
    """Return the base with its adapter, ready for a trainer of TRL.

    Args:
        training: What is trained: a causal language model, by an adapter that has low rank or as a whole.
        place: Where.
        precision: Of the frozen weights, ``bfloat16`` or ``float32``.

    Raises:
        InvalidSpec: The adapter cannot be trained here, or names modules that the model does not have.
    """
    hyper = training.hyper
    quantised = quantization(training, place) is not None
    low_rank = training.adapter.kind in LOW_RANK
    # Its own form of checkpointing moves activations to main memory while they are not needed.
    checkpointing = "unsloth" if hyper.gradient_checkpointing and place.gpu else hyper.gradient_checkpointing
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        model_name=str(training.base),
        max_seq_length=max(hyper.max_length, (hyper.max_prompt_length or 0) + hyper.max_completion_length),
        dtype=getattr(torch, precision),
        load_in_4bit=quantised,
        full_finetuning=not low_rank,
        use_gradient_checkpointing=checkpointing,
        use_exact_model_name=True,
        fix_tokenizer=False,
        trust_remote_code=False,
        random_state=hyper.seed,
        local_files_only=True,
    )
    if not low_rank:
        return model
    return unsloth.FastLanguageModel.get_peft_model(
        model,
        **adapter_arguments(training, model),
        bias="none",
        use_gradient_checkpointing=checkpointing,
        random_state=hyper.seed,
        max_seq_length=hyper.max_length,
    )
