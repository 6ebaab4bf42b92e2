"""Sets of questions and of preferences: one record a line of a .jsonl file, in the forms that are in common use.

A set is what an accuracy, a log-likelihood or a preference margin is measured on, as a text is what a perplexity is
measured on. Its form is told by the fields of its first record, and every other record must be of that form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from aidocks.errors import InvalidSpec
from aidocks.evaluate.texts import TextSource, allowed_file, content_of, hash_of

_SHIPPED = Path(__file__).parent / "texts"
NAMED_SETS = {"capitals": _SHIPPED / "capitals.jsonl"}
#: A set is read as a whole: some hundred thousand records.
_MAX_BYTES = 64 << 20


class Question(NamedTuple):
    """A prompt, the answers that are weighed against each other, and which of them is right.

    With a single answer there is nothing to choose from: the model must say it by itself.
    """

    prompt: str
    answers: tuple[str, ...]
    gold: int

    @property
    def asked(self) -> str:
        return self.prompt


class Message(NamedTuple):
    """What one side of a conversation said."""

    role: str
    content: str


#: Plain text, or the messages of a conversation.
Said = str | tuple[Message, ...]


class Preference(NamedTuple):
    """A prompt, and two answers of which the first is preferred."""

    prompt: Said
    chosen: Said
    rejected: Said

    @property
    def asked(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else "\n\n".join(m.content for m in self.prompt)


Record = Question | Preference


class RecordSet(NamedTuple):
    """The records of a file in their order; all questions, or all preferences."""

    records: tuple[Record, ...]

    @property
    def are_preferences(self) -> bool:
        return isinstance(self.records[0], Preference)


def resolve_set(reference: str, allowed_roots: Sequence[Path], *, field: str | None) -> TextSource:
    """Turn what a request says into a set that exists, is not empty and has a known form.

    Args:
        reference: A shipped set's name, or the path of a .jsonl file.
        allowed_roots: Directories below which a request may name a file.
        field: Spec field to blame.

    Raises:
        InvalidSpec: For an unknown name, another suffix, a missing or empty file, or a line of another form.
        PathNotAllowed: For a file outside the allowed roots.
    """
    if reference in NAMED_SETS:
        return TextSource(name=reference)
    if not reference.startswith(("/", "./", "../", "~")) and "/" not in reference and "." not in reference:
        raise InvalidSpec(
            f"There is no set of questions called {reference!r}.",
            field=field,
            value=reference,
            hint=f"Known: {', '.join(sorted(NAMED_SETS))}; or give the path of a .jsonl file.",
        )
    path = allowed_file(
        reference,
        allowed_roots,
        field,
        what="set",
        shipped="capitals",
        suffixes=(".jsonl",),
        most_bytes=_MAX_BYTES,
    )
    source = TextSource(name=path.name, path=path, sha256=hash_of(path))
    read_set(source, field=field)
    return source


def read_set(source: TextSource, *, field: str | None = None) -> RecordSet:
    """Return the records of a set.

    Raises:
        InvalidSpec: For a name that does not exist, a file that is empty, has changed or is not UTF-8, or a line (which
            is named) of another form than the first, or without a difference between its answers.
    """
    # Without a hash nothing tells whether a file is still what it was.
    read = _read_set if source.sha256 or not source.path else _read_set.__wrapped__
    try:
        return read(source)
    except InvalidSpec as error:
        raise InvalidSpec(error.message, field=field, value=error.value, hint=error.hint) from error


@lru_cache(maxsize=4)
def _read_set(source: TextSource) -> RecordSet:
    """Read a set as :func:`read_set` does, once where several ask for it one after another; errors name no field."""
    path = source.path or NAMED_SETS.get(source.name)
    if path is None:
        raise InvalidSpec(
            f"There is no set of questions called {source.name!r}.",
            value=source.name,
            hint=f"Known: {', '.join(sorted(NAMED_SETS))}.",
        )
    read: Callable[[Mapping[str, Any]], Record] | None = None
    records: list[Record] = []
    for number, line in enumerate(content_of(path, source, None).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            given = json.loads(line)
            if not isinstance(given, dict):
                raise ValueError("it is not a JSON object")
            read = read or _form_of(given)
            records.append(read(given))
        except (ValueError, KeyError, RecursionError) as error:
            reason = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
            raise InvalidSpec(
                f"Line {number} of {path.name} does not read as a record: {reason}.",
                value=source.name,
                hint=_FORMS,
            ) from error
    if not records:
        raise InvalidSpec(f"The set {source.name!r} is empty.", value=source.name, hint=_FORMS)
    return RecordSet(tuple(records))


_FORMS = (
    "Each line is a JSON object with the fields query (or question, or prompt), choices and gold; or question, "
    "best_answer and incorrect; or context and continuation; or prompt, target_true and target_new; or prompt and "
    "attribute; or, for preferences, prompt, chosen and rejected."
)


def _form_of(given: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Record]:
    """Return what reads records like this one."""
    for fields, read in (
        (("chosen", "rejected"), _preference),
        (("choices", "gold"), _choices),
        (("best_answer", "incorrect"), _best_answer),
        (("context", "continuation"), _continuation),
        (("target_true", "target_new"), _fact),
        (("attribute",), _attribute),
    ):
        if all(field in given for field in fields):
            return read
    raise ValueError(
        f"no known form has just the fields {', '.join(map(str, given)) or 'of an empty object'}"
    )


def _choices(given: Mapping[str, Any]) -> Question:
    answers, gold = given["choices"], given["gold"]
    if not isinstance(answers, list) or len(answers) < 2:
        raise ValueError("`choices` is not a list of two or more")
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(answers):
        raise ValueError(f"`gold` is not a number from 0 to {len(answers) - 1}")
    for field in ("query", "prompt"):
        if field in given:
            prompt = _text(given, field)
            break
    else:
        prompt = _asked(given)
    return _question(prompt, [_said(answer, "choices") for answer in answers], gold)


def _best_answer(given: Mapping[str, Any]) -> Question:
    wrong = given["incorrect"]
    if not isinstance(wrong, list) or not wrong:
        raise ValueError("`incorrect` is not a list of one or more")
    answers = [_text(given, "best_answer"), *(_said(answer, "incorrect") for answer in wrong)]
    return _question(_asked(given), answers, 0)


def _continuation(given: Mapping[str, Any]) -> Question:
    return Question(_text(given, "context"), (_text(given, "continuation"),), 0)


def _fact(given: Mapping[str, Any]) -> Question:
    return _question(_text(given, "prompt"), [_text(given, "target_true"), _text(given, "target_new")], 0)


def _question(prompt: str, answers: Sequence[str], gold: int) -> Question:
    """Return a question whose right answer can win. Equal wrong answers occur in common sets and do no harm."""
    if [answer.strip() for answer in answers].count(answers[gold].strip()) > 1:
        raise ValueError(f"the right answer {answers[gold]!r} is there twice")
    return Question(prompt, tuple(answers), gold)


def _attribute(given: Mapping[str, Any]) -> Question:
    return Question(_text(given, "prompt"), (_text(given, "attribute"),), 0)


def _preference(given: Mapping[str, Any]) -> Preference:
    prompt, chosen, rejected = (_conversation(given, field) for field in ("prompt", "chosen", "rejected"))
    if isinstance(prompt, str) and not isinstance(chosen, str) and not isinstance(rejected, str):
        # Whole conversations beside a bare prompt: what they begin with in common is the real one.
        shared = 0
        while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
            shared += 1
        prompt = chosen[:shared] or (Message("user", prompt),)
        chosen, rejected = chosen[shared:], rejected[shared:]
    if not chosen or not rejected:
        raise ValueError("`chosen` or `rejected` says nothing that the other one does not begin with")
    return Preference(prompt, chosen, rejected)


def _asked(given: Mapping[str, Any]) -> str:
    """Put a bare question as one; a ``query`` or ``prompt`` is already what the model shall read."""
    return f"Question: {_text(given, 'question')}\nAnswer:"


def _text(given: Mapping[str, Any], field: str) -> str:
    return _said(given[field], field)


def _said(text: Any, field: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"`{field}` is not a text, or empty")
    return text


def _conversation(given: Mapping[str, Any], field: str) -> Said:
    value = given[field]
    if not isinstance(value, list):
        return _text(given, field)
    if not value or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise ValueError(f"`{field}` is neither a text nor a list of messages with role and content")
    return tuple(Message(message["role"], _said(message.get("content"), field)) for message in value)
