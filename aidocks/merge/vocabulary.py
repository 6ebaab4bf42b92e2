"""Models of unequal vocabularies: which tokens the result has, and which rows of the models its rows are.

Where a model has a token, its row moves to the token's new number. Where it has not, the row is the base's, else that
of the only model that knows the token, else the mean of those that do; a request can say otherwise of single tokens.
Rows beyond the last token are the mean of all others, which gives them about the probability of nothing in particular
(J. Hewitt, Initializing new word embeddings for pretrained language models, 2021).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from aidocks.checkpoints.writer import ShardPlan, ShardWriter, TensorPlan
from aidocks.merge.token_rows import (
    AUTOMATIC,
    ZERO,
    TokenRow,
    VocabularyModel,
    VocabularyRequest,
    build,
    check_tokens,
    count_rows,
    has_changes,
    row_arrays,
)
from aidocks.models.tokenizer_files import SPECIAL_TOKENS, Tokenizer, TokenizerFiles
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.merge_config import MergeConfig, ModelToken, TokenPolicy, ZeroToken

MAPPING_FILE = "vocabulary.safetensors"
#: What the embedding of tokens is called in the names of tensors.
EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "embed_in.weight",
    "tok_embeddings.weight",
)


class Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class Speaker(Protocol):
    """A model, as far as its vocabulary is concerned; see :class:`aidocks.merge.members.Member`."""

    @property
    def field(self) -> str: ...
    @property
    def reference(self) -> str: ...
    @property
    def tensors(self) -> Mapping[str, Shaped]: ...
    @property
    def config(self) -> Mapping[str, Any]: ...
    @property
    def tokenizer(self) -> Path: ...
    @property
    def vocab_size(self) -> int | None: ...


@dataclass(frozen=True)
class VocabularyPlan:
    """The vocabulary of a result.

    Attributes:
        request: What it was made of.
        result: The result's tokenizer, for merges that use the result.
        files: Which files it consists of.
        special_ids: Fields of config.json and generation_config.json that are other numbers now.
        changes: Whether any row of any model is not where it was; otherwise no mapping is needed.
        notes: For people.
    """

    request: VocabularyRequest
    result: Tokenizer
    files: TokenizerFiles
    special_ids: Mapping[str, Any]
    changes: bool
    notes: tuple[str, ...]

    @property
    def tokenizer(self) -> Path:
        """Directory that most of the tokenizer's files come from."""
        return self.files.source

    @cached_property
    def size(self) -> int:
        """Rows of the result's embedding (``vocab_size``)."""
        step = self.request.pad_to_multiple_of
        return -(-count_rows(self.result) // step) * step

    def unit(self, directory: Path) -> WriteVocabulary:
        """Return the unit that writes which rows are which, as one file in ``directory``."""
        return WriteVocabulary(request=self.request, directory=directory, size=self.size)


class WriteVocabulary(WritingUnit):
    """Writes which rows of the models the rows of the result are."""

    request: VocabularyRequest
    directory: Path = Field(description="Where the file is written.")
    size: int = Field(description="Rows of the result's embedding.")

    @property
    def label(self) -> str:
        return "vocabulary"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        import numpy as np

        built = build(self.request, {})
        facts = np.array(
            [self.size, AUTOMATIC if self.request.base is None else self.request.base], dtype="<i4"
        )
        arrays = {"facts": facts, **row_arrays(self.request, built)}
        plans = tuple(TensorPlan(name=name, dtype="I32", shape=array.shape) for name, array in arrays.items())
        with ShardWriter(self.directory, ShardPlan(file_name=MAPPING_FILE, tensors=plans)) as writer:
            for name, array in arrays.items():
                writer.copy_ranges(name, [array.astype("<i4").tobytes()])
        return WrittenFiles(files=(writer.output,))


def plan_vocabulary(
    merge: MergeConfig,
    members: Mapping[str, Speaker],
    *,
    path: str = "",
    known: Mapping[Path, Tokenizer] | None = None,
) -> VocabularyPlan | None:
    """Return the vocabulary that a merge asks for; None where it asks for none.

    Args:
        merge: A merge of the request.
        members: Its models by reference, in the order of the merge's sources.
        path: Of the merge in the request (empty, or ``stages[0].``).
        known: Tokenizers of results that are not written yet, by the directory where they will be.

    Raises:
        InvalidSpec: The policy names a model or token that is not there.
        IncompatibleModels, CorruptCheckpoint: A tokenizer cannot be read, or compared.
    """
    policy = merge.vocabulary
    if policy is None:
        return None
    field = f"{path}tokenizer"
    merged = set(_merged(merge))
    request = VocabularyRequest(
        models=tuple(
            VocabularyModel(
                field=member.field,
                reference=reference,
                directory=member.tokenizer,
                rows=_rows(member),
                is_merged=reference in merged,
            )
            for reference, member in members.items()
        ),
        base=None if merge.base_model is None else list(members).index(merge.base_model),
        source=_source(policy.source, members),
        tokens=tuple(
            _token_row(token, given, list(members), field) for token, given in policy.tokens.items()
        ),
        pad_to_multiple_of=policy.pad_to_multiple_of or 1,
    )
    built = build(request, known or {})
    check_tokens(request, built, field)
    return VocabularyPlan(
        request=request,
        result=built.result,
        files=built.files,
        special_ids=_special_ids(list(members.values())[request.first], built.files.source, members.values()),
        changes=has_changes(request, built),
        notes=built.notes,
    )


def _merged(merge: MergeConfig) -> Iterator[str]:
    """Yield the references of the models whose tensors are merged, the base's too."""
    if merge.base_model is not None:
        yield merge.base_model
    _, module = merge.module
    yield from (model.model for model in module.models or ())
    for part in module.slices or ():
        yield from (source.model for source in part.sources)
        if part.base_model is not None:
            yield part.base_model


def _rows(member: Speaker) -> int | None:
    """Return the rows of a model's embedding: of the tensor, else as its configuration says."""
    stored = (tensor.shape[0] for name, tensor in member.tensors.items() if name.endswith(EMBEDDINGS))
    return next(stored, member.vocab_size)


def _source(source: str, members: Mapping[str, Speaker]) -> Literal["union", "base"] | Path:
    if source == "union":
        return "union"
    return "base" if source == "base" else members[source].tokenizer


def _token_row(token: str, given: TokenPolicy, models: Sequence[str], path: str) -> TokenRow:
    source = given.source
    if source is None:
        return TokenRow(token=token, force=given.force)
    if isinstance(source, ZeroToken):
        return TokenRow(token=token, force=given.force, source=ZERO)
    reference = source.model if isinstance(source, ModelToken) else source
    place = models.index(reference)
    if isinstance(source, ModelToken):
        return TokenRow(
            token=token,
            force=given.force,
            source=place,
            of_token=source.token,
            of_row=source.token_id,
        )
    return TokenRow(token=token, force=given.force, source=place)


def _special_ids(base: Speaker, source: Path, members: Iterable[Speaker]) -> dict[str, Any]:
    """Return the numbers of the special tokens where the tokens are another model's than the configuration.

    The model says them, not its directory: the result of an earlier merge may not be written yet.
    """
    if source == base.tokenizer:
        return {}
    config = next((member.config for member in members if member.tokenizer == source), {})
    return {
        key: config[key]
        for key in SPECIAL_TOKENS
        if config.get(key) is not None and config[key] != base.config.get(key)
    }
