"""What a router learns from: an expert's example texts as sequences of tokens, some of them set aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.evaluate.texts import TextSource

if TYPE_CHECKING:
    import torch

    from aidocks.evaluate.causal_lm import CausalLM

Part = Literal["fit", "validate", "train"]

#: One sequence of so many is set aside.
_VALIDATED = 4
#: Of the sequences set aside, at most so many are measured on: the loss of each candidate costs a pass over them.
_MOST_VALIDATED = 16


class Examples(BaseModel):
    """The texts of one expert."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...] = Field((), description="Short texts, each a sequence of its own.")
    text: TextSource | None = Field(None, description="A long text; its search half is taken.")
    chunks: int = Field(0, description="Whole chunks that may be taken of that half.")


def take_sequences(
    examples: Examples, part: Part, model: CausalLM, seq_length: int, fit_tokens: int, seed: int
) -> list[torch.Tensor]:
    """Return token ids [T] of an expert's sequences, T at most ``seq_length``.

    The parts ``fit`` and ``train`` are disjoint from ``validate`` whenever there are four sequences or more; of
    fewer, all of them serve for everything. ``train`` holds all that ``fit`` holds, and the rest of the text.

    Args:
        examples: Texts of the expert.
        part: Which sequences.
        model: Gives tokenizer and context.
        seq_length: Length of a chunk of a long text, in tokens.
        fit_tokens: Tokens of the long text that ``fit`` takes, at most.
        seed: Chooses the chunks.
    """
    import torch

    from aidocks.moe.gates import tokenize

    # One long prompt among short ones would be padded against; of it the end counts, as for gates from prompts.
    longest = min(seq_length, model.network.config.max_position_embeddings)
    prompts, _ = tokenize(examples.prompts, model.tokenizer, longest)
    short = [torch.tensor(ids) for ids in prompts.values() if len(ids) > 1]
    chosen = _choose(short, part)
    if examples.text is None or not examples.chunks:
        return chosen
    few = min(examples.chunks, max(1, -(-fit_tokens // seq_length) * _VALIDATED // (_VALIDATED - 1)))
    positions, tokens_CT = model.chunks(examples.text, "search", seq_length, few, seed)
    long = _choose(list(tokens_CT), part)
    if part == "train" and examples.chunks > few:
        known = set(positions)
        more, more_CT = model.chunks(examples.text, "search", seq_length, examples.chunks, seed)
        long += [chunk for position, chunk in zip(more, more_CT, strict=True) if position not in known]
    return chosen + long


def _choose(sequences: list[torch.Tensor], part: Part) -> list[torch.Tensor]:
    if len(sequences) < _VALIDATED:
        return sequences
    if part == "validate":
        return sequences[_VALIDATED - 1 :: _VALIDATED][:_MOST_VALIDATED]
    return [sequence for number, sequence in enumerate(sequences, 1) if number % _VALIDATED]


def pad(sequences: Sequence[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and mask, each [B, T] with T the longest length; padding stands at the end, masked 0."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids_BT = pad_sequence(list(sequences), batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    mask_BT = (torch.arange(ids_BT.shape[1]) < lengths[:, None]).long()
    return ids_BT.to(device), mask_BT.to(device)
