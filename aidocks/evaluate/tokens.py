"""From an objective's data to token ids: chunks of a text, and questions or preferences as prompt and answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.evaluate.objectives import ObjectiveSource, Part, chunks_of_part, deal, pieces_of
from aidocks.evaluate.questions import Message, Preference, Question, Record, Said, read_set
from aidocks.evaluate.texts import require_context
from aidocks.specs.objective import Metric

#: Tokens of a record at most, whatever the model's context is: attention and logits grow with them.
_LONGEST_RECORD = 2048


class EncodedSpan(NamedTuple):
    """Tokens that are scored: the row that predicts them, the position of the first prediction, and their ids."""

    row: int
    first: int
    targets: tuple[int, ...]


class Encoded(NamedTuple):
    """One item: its place in the data, the rows that are read, what is scored in them, and which span is right."""

    position: int
    rows: tuple[tuple[int, ...], ...]
    spans: tuple[EncodedSpan, ...]
    gold: int = 0

    @property
    def longest(self) -> int:
        return max(map(len, self.rows))


class Continuation(NamedTuple):
    """Token ids of a prompt with its answer, and how many of them are the prompt's."""

    ids: tuple[int, ...]
    prompt: int


def encode_chunks(
    source: ObjectiveSource, part: Part, tokenizer: Any, longest: int | None = None
) -> list[Encoded]:
    """Return the chunks of a part of a text in hashed order, tokenised without special tokens.

    Raises:
        InvalidSpec: When the text has changed or does not hold so many, or a chunk is longer than ``longest``.
    """
    length = source.seq_length
    if longest is not None:
        require_context(str(getattr(tokenizer, "name_or_path", "the model")), longest, length)
    pieces = [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in pieces_of(source)
    ]
    chunks = [ids[k * length : (k + 1) * length] for ids in pieces for k in range(len(ids) // length)]
    chosen = chunks_of_part(source, part, [len(ids) // length for ids in pieces])
    return [
        Encoded(position, (tuple(chunks[position]),), (EncodedSpan(0, 0, tuple(chunks[position][1:])),))
        for position in chosen
    ]


def encode_records(
    source: ObjectiveSource, part: Part, tokenizer: Any, longest: int | None = None
) -> list[Encoded]:
    """Return the records of a part of a set in hashed order.

    Raises:
        InvalidSpec: When the set does not hold what it held, or one of them is nothing to the tokenizer.
    """
    records = read_set(source.text).records
    chosen = deal([record.asked for record in records], source.seed)[part]
    if len(chosen) != source.sizes[part]:
        raise InvalidSpec(
            f"{source.text.name!r} has changed: its part {part!r} holds {len(chosen)} records, not the "
            f"{source.sizes[part]} that were counted.",
            value=source.text.name,
        )
    limit = min(_LONGEST_RECORD, longest or _LONGEST_RECORD)
    return [encode(position, records[position], source.metric, tokenizer, limit) for position in chosen]


def encode(position: int, record: Record, metric: Metric, tokenizer: Any, limit: int) -> Encoded:
    """Return a record as the rows that are read and the spans that are scored.

    Args:
        position: Of the record in its set.
        record: A question or a preference.
        metric: Of a log-likelihood only the right answer is needed.
        tokenizer: A transformers tokenizer.
        limit: Tokens of a row at most; the beginning of a longer one is left out.

    Raises:
        InvalidSpec: When the record is nothing to the tokenizer.
    """
    gold = 0
    if isinstance(record, Preference):
        continuations = [preference_tokens(record, answer, tokenizer) for answer in record[1:]]
    elif metric == "log_likelihood":
        continuations = [answer_tokens(record.prompt, record.answers[record.gold], tokenizer)]
    else:
        continuations, gold = _answers(record, tokenizer), record.gold
    read: list[tuple[int, ...]] = []
    scored: list[tuple[int, tuple[int, ...]]] = []
    for ids, prompt in continuations:
        if len(ids) < 2:
            raise InvalidSpec(
                f"Record {position + 1} is fewer than two tokens to the model's tokenizer.",
                value=record.asked[:80],
            )
        cut = max(0, len(ids) - 1 - limit)
        # One token at least is scored, and one at least comes before it.
        first = max(min(max(prompt, 1), len(ids) - 1), cut + 1)
        read.append(ids[cut:-1])
        scored.append((first - cut - 1, ids[first:]))
    rows = _longest_rows(read)
    spans = tuple(
        EncodedSpan(next(r for r, row in enumerate(rows) if row[: len(ids)] == ids), at, targets)
        for ids, (at, targets) in zip(read, scored, strict=True)
    )
    return Encoded(position, rows, spans, gold)


def _longest_rows(read: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """Leave out what another row begins with: a causal model computes the same there."""
    rows: list[tuple[int, ...]] = []
    for ids in sorted(set(read), key=lambda ids: (-len(ids), ids)):
        if not any(row[: len(ids)] == ids for row in rows):
            rows.append(ids)
    return tuple(rows)


def _answers(record: Question, tokenizer: Any) -> list[Continuation]:
    return [answer_tokens(record.prompt, answer, tokenizer) for answer in record.answers]


def answer_tokens(prompt: str, answer: str, tokenizer: Any) -> Continuation:
    """Tokenise a prompt and an answer after one space, as lm-evaluation-harness does.

    The whole is tokenised at once, as a model sees it in training; the answer's tokens are those after what it has in
    common with the prompt alone. White space at the prompt's end belongs to the answer, and there is no second space.
    """
    bare = prompt.rstrip()
    between = prompt[len(bare) :] or " "
    return _continuation(bare, f"{bare}{between}{answer.strip()}", tokenizer, beginning(tokenizer))


def preference_tokens(record: Preference, answer: Said, tokenizer: Any) -> Continuation:
    """Tokenise an answer to a preference's prompt: messages by the chat template, if there is one, else as plain text.

    Raises:
        InvalidSpec: When the chat template refuses the messages.
    """
    if isinstance(record.prompt, str):
        return answer_tokens(record.prompt, _plain(answer), tokenizer)
    replies = (Message("assistant", answer),) if isinstance(answer, str) else answer
    if not getattr(tokenizer, "chat_template", None):
        prompt = f"{_plain(record.prompt)}\n\n"
        return answer_tokens(prompt, _plain(replies), tokenizer)
    asked = _rendered(record.prompt, tokenizer, ask=True)
    return _continuation(asked, _rendered((*record.prompt, *replies), tokenizer, ask=False), tokenizer, ())


def beginning(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids that a tokenizer puts before every text: none, or that of the beginning of a sequence."""
    first = getattr(tokenizer, "bos_token_id", None)
    given = tokenizer("a")["input_ids"]
    return (first,) if first is not None and given and given[0] == first else ()


def _continuation(prompt: str, whole: str, tokenizer: Any, begin: tuple[int, ...]) -> Continuation:
    ids = (*begin, *tokenizer(whole, add_special_tokens=False, verbose=False)["input_ids"])
    known = (*begin, *tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"])
    return Continuation(ids, _common(ids, known))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    shared = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        shared += 1
    return shared


def _plain(said: Said) -> str:
    return said if isinstance(said, str) else "\n\n".join(message.content for message in said)


def _rendered(messages: Sequence[Message], tokenizer: Any, *, ask: bool) -> str:
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            [message._asdict() for message in messages], tokenize=False, add_generation_prompt=ask
        )
    except TemplateError as error:
        raise InvalidSpec(
            f"The model's chat template refuses a conversation: {error}",
            value=messages[0].content[:80],
        ) from error
    return text
