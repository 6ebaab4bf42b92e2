"""Texts as batches of tokens: of about equal length each, filled up, so that little is computed in vain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

#: Tokens of a batch, filled up: on a CPU what its caches bear, on a GPU what keeps it busy.
CPU_TOKENS, GPU_TOKENS = 1024, 65_536


class Read(NamedTuple):
    """Texts, or pairs of them, as tokens.

    Attributes:
        ids: Token ids of each.
        types: Of each token, to which of two texts it belongs; None where the model does not ask.
        prompt: Tokens of the prompt that each begins with, for models that leave those out of the mean.
    """

    ids: list[list[int]]
    types: list[list[int]] | None = None
    prompt: int | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each."""
        return [len(ids) for ids in self.ids]


def in_batches(lengths: Sequence[int], device: str, compute: Callable[[list[int]], None]) -> None:
    """Have texts computed together, the longest first: what needs the most memory is known at once.

    A batch that a GPU has no memory for is halved, and so are those after it: how much is free there depends on the
    model, and on who else uses it.

    Args:
        lengths: Tokens of each text.
        device: Of torch.
        compute: Is given the numbers of the texts of a batch.

    Raises:
        torch.OutOfMemoryError: There is no memory for a single text.
    """
    most = CPU_TOKENS if device == "cpu" else GPU_TOKENS
    order = sorted(range(len(lengths)), key=lambda number: (-lengths[number], number))
    begin = 0
    while begin < len(order):
        longest = max(1, lengths[order[begin]])
        chosen = order[begin : begin + max(1, most // longest)]
        try:
            compute(chosen)
        except torch.OutOfMemoryError:
            if len(chosen) == 1:
                raise
            most = longest * (len(chosen) // 2)
        else:
            begin += len(chosen)
            continue
        # Not above: there the error still holds what was computed.
        torch.cuda.empty_cache()


def features(read: Read, chosen: Sequence[int], tokenizer: Any, device: str) -> dict[str, Any]:
    """Return the inputs of a batch as sentence-transformers' modules take them: int64 [B, T] each.

    Args:
        read: All texts.
        chosen: Numbers of the batch's.
        tokenizer: Says with what, and on which side, short texts are filled up.
        device: Of torch.
    """
    lengths = [len(read.ids[number]) for number in chosen]
    longest = max(lengths)
    pad = tokenizer.pad_token_id or 0
    to_the_left = tokenizer.padding_side == "left"
    ids_BT = np.full((len(chosen), longest), pad, np.int64)
    mask_BT = np.zeros((len(chosen), longest), np.int64)
    types_BT = None if read.types is None else np.zeros((len(chosen), longest), np.int64)
    for row, (number, length) in enumerate(zip(chosen, lengths, strict=True)):
        place = slice(longest - length, longest) if to_the_left else slice(0, length)
        ids_BT[row, place] = read.ids[number]
        mask_BT[row, place] = 1
        if types_BT is not None and read.types is not None:
            types_BT[row, place] = read.types[number]
    arrays = {"input_ids": ids_BT, "attention_mask": mask_BT}
    if types_BT is not None:
        arrays["token_type_ids"] = types_BT
    found: dict[str, Any] = {
        name: torch.from_numpy(values).to(device, non_blocking=True) for name, values in arrays.items()
    }
    if read.prompt is not None:
        found["prompt_length"] = read.prompt
    return found


def read_messages(model: Any, inputs: Sequence[Any], prompt: str | None) -> Read:
    """Return texts that a chat template makes messages of, as sentence-transformers does, as tokens.

    Args:
        model: Of sentence-transformers.
        inputs: Texts, or pairs.
        prompt: Becomes the system's message.
    """
    found = [model.preprocess([one], prompt=prompt) for one in inputs]
    ids = [one["input_ids"][0][one["attention_mask"][0].bool()].tolist() for one in found]
    types = None
    if found and "token_type_ids" in found[0]:
        types = [one["token_type_ids"][0][one["attention_mask"][0].bool()].tolist() for one in found]
    return Read(ids, types)
