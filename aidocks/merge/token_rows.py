"""Which tokens the result of a merge has, and which rows of the models they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.models.tokenizer_files import AddedToken, Tokenizer, TokenizerFiles, read_tokenizer

if TYPE_CHECKING:
    import numpy as np

    Numbers = np.ndarray[Any, np.dtype[np.int32]]

#: In ``source``: nothing said of the token, and a row of zeros.
AUTOMATIC, ZERO = -1, -2


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class VocabularyModel(_Frozen):
    """A model whose rows are mapped."""

    field: str
    reference: str
    directory: Path = Field(description="Of its tokenizer.")
    rows: int | None = Field(description="Of its embedding; None where that is not known.")
    is_merged: bool = Field(True, description="Otherwise it is named for its tokens alone.")


class TokenRow(_Frozen):
    """What a request says of a token."""

    token: str
    force: bool = False
    source: int = Field(AUTOMATIC, description="Position of the model whose row it has; see the constants.")
    of_token: str | None = Field(None, description="Which of its tokens, where it is not the same one.")
    of_row: int | None = Field(None, description="Which of its rows, instead.")


class VocabularyRequest(_Frozen):
    """All that the vocabulary of a result depends on."""

    models: tuple[VocabularyModel, ...] = Field(description="In the order of the merge's sources.")
    base: int | None = Field(description="Which of them is the base.")
    source: Literal["union", "base"] | Path = Field(description="Whose tokens: a directory, or what it says.")
    tokens: tuple[TokenRow, ...] = ()
    pad_to_multiple_of: int = 1

    @property
    def first(self) -> int:
        """The base's position, or that of the model that stands in its place."""
        return self.base or 0


@dataclass(frozen=True)
class Built:
    """The tokenizers of a merge.

    Attributes:
        result: The result's.
        models: That of every model, without tokens that have no row.
        files: Which files the result's consists of.
        notes: For people.
    """

    result: Tokenizer
    models: tuple[Tokenizer, ...]
    files: TokenizerFiles
    notes: tuple[str, ...]


def build(request: VocabularyRequest, known: Mapping[Path, Tokenizer]) -> Built:
    """Return the tokenizers of a merge; ``known`` are those of results that are not written yet.

    Raises:
        IncompatibleModels, InvalidSpec: There is none where one is needed.
        CorruptCheckpoint: One cannot be read.
    """
    base_model = request.models[request.first]
    base = read_tokenizer(base_model.directory, known)
    if base is None:
        raise IncompatibleModels(
            f"{base_model.reference!r} has no tokenizer, but the result's is to be made of it.",
            field=base_model.field,
            value=base_model.reference,
            hint="Copy tokenizer.json beside its weights, or leave `tokenizer` out.",
        )
    models, notes = [], []
    for model in request.models:
        found = base if model.directory == base.directory else read_tokenizer(model.directory, known)
        if found is None:
            notes.append(
                f"{model.reference!r} has no tokenizer; its tokens are taken to be those of {base_model.reference!r}."
            )
        models.append((found or base).below(model.rows))
    merged = [found for model, found in zip(request.models, models, strict=True) if model.is_merged]
    stripped = base.below(base_model.rows)
    if isinstance(request.source, Path):
        start = read_tokenizer(request.source, known)
        if start is None:
            raise InvalidSpec(f"{request.source.name} has no tokenizer.", value=request.source.name)
    else:
        start = stripped
    union = [stripped, *merged] if request.source == "union" else []
    added = _added(start, union, [row.token for row in request.tokens])
    files = TokenizerFiles(
        source=start.directory,
        rows=base_model.rows if start is not base and start is stripped else None,
        added=added,
    )
    tokens = {**start.tokens, **{token.content: token.id for token in added}}
    listed = {token.id: token for token in (*start.added, *added)}
    result = Tokenizer(start.directory, tokens, tuple(listed[number] for number in sorted(listed)))
    return Built(result, tuple(models), files, tuple(notes))


def _added(start: Tokenizer, union: Iterable[Tokenizer], asked: Iterable[str]) -> tuple[AddedToken, ...]:
    """Return what is added to a tokenizer: plain tokens of the others, those that they list, those asked for.

    Model after model, each in the order of its numbers, so that the result depends on nothing else.
    """
    plain: dict[str, AddedToken] = {}
    listed: dict[str, AddedToken] = {}
    for tokenizer in union:
        special = {token.content for token in tokenizer.added}
        for token in tokenizer.added:
            listed.setdefault(token.content, token)
        for content in sorted(tokenizer.tokens.keys() - special, key=tokenizer.tokens.__getitem__):
            plain.setdefault(content, AddedToken(id=0, content=content))
    wanted = [
        token for token in plain.values() if token.content not in listed and token.content not in start.tokens
    ]
    own = {token.content for token in start.added}
    wanted += [token for token in listed.values() if token.content not in own]
    present = start.tokens.keys() | {token.content for token in wanted}
    wanted += [
        AddedToken(id=0, content=content) for content in dict.fromkeys(asked) if content not in present
    ]
    free = count_rows(start)
    numbered = []
    for token in wanted:
        number = start.tokens.get(token.content, free)
        free = max(free, number + 1)
        numbered.append(token.model_copy(update={"id": number}))
    return tuple(numbered)


def count_rows(tokenizer: Tokenizer) -> int:
    """Return the number of rows that a tokenizer's tokens need."""
    return max(tokenizer.tokens.values(), default=-1) + 1


def check_tokens(request: VocabularyRequest, built: Built, path: str) -> None:
    """Refuse rows that a request takes from where they are not."""
    for row in request.tokens:
        if row.source < 0:
            continue
        model, tokens = request.models[row.source], built.models[row.source].tokens
        wanted = row.of_token if row.of_token is not None else row.token
        if row.of_row is not None:
            if model.rows is not None and row.of_row >= model.rows:
                raise InvalidSpec(
                    f"{model.reference!r} has no row {row.of_row}; its embedding has {model.rows}.",
                    field=f"{path}.tokens.{row.token}.source.token_id",
                    value=row.of_row,
                )
        elif wanted not in tokens:
            raise InvalidSpec(
                f"{model.reference!r} has no token {wanted!r}.",
                field=f"{path}.tokens.{row.token}.source",
                value=wanted,
                hint="Name a model that has it, `{kind: model_token, model, token}` for another token's row, or "
                "`{kind: zero}`.",
            )


def has_changes(request: VocabularyRequest, built: Built) -> bool:
    """Tell whether any row of any model is not where it was."""
    count = count_rows(built.result)
    if count % request.pad_to_multiple_of or any(row.force for row in request.tokens):
        return True
    if len(built.result.tokens) != count:
        return True
    return any(
        model.rows != count or dict(tokenizer.tokens) != dict(built.result.tokens)
        for model, tokenizer in zip(request.models, built.models, strict=True)
    )


def row_arrays(request: VocabularyRequest, built: Built) -> dict[str, Numbers]:
    """Return what the file holds, for N rows with tokens and M models.

    ``rows`` [M, N]: the model's row of the token, -1 without one. ``is_token`` [N]: 0 for a number without a token.
    ``source``, ``source_row``, ``force`` [N]: what the request says, see :class:`TokenRow`.
    """
    import numpy as np

    count = count_rows(built.result)
    numbers = np.fromiter(built.result.tokens.values(), dtype=np.int32, count=len(built.result.tokens))
    is_token = np.zeros(count, dtype=np.int32)
    is_token[numbers] = 1
    rows = np.full((len(request.models), count), -1, dtype=np.int32)
    for place, tokenizer in enumerate(built.models):
        own = tokenizer.tokens
        rows[place, numbers] = [own.get(token, -1) for token in built.result.tokens]
    source, source_row, force = (np.full(count, value, dtype=np.int32) for value in (AUTOMATIC, 0, 0))
    for row in request.tokens:
        number = built.result.tokens[row.token]
        force[number], source[number] = row.force, row.source
        if row.source >= 0:
            wanted = row.of_token if row.of_token is not None else row.token
            tokens = built.models[row.source].tokens
            source_row[number] = row.of_row if row.of_row is not None else tokens[wanted]
    return {"rows": rows, "is_token": is_token, "source": source, "source_row": source_row, "force": force}
