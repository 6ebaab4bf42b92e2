"""The forms of rows of queries and passages that are in common use, and the names of their columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from aidocks.specs.train_retrieval import RetrievalFormat, RetrievalRole

#: Names of a column, those that say most first: of two groups that are both there the first counts, of two names of one
#: group neither.
Names = tuple[tuple[str, ...], ...]

_FIRST = ("sentence1", "sentence_1", "sentence_a", "text1", "text_1", "text_a")
_SECOND = ("sentence2", "sentence_2", "sentence_b", "text2", "text_2", "text_b")
_QUERY: Names = (("query", "anchor"), ("question",), _FIRST, ("title",))
_POSITIVE: Names = (
    ("positive", "positives", "pos", "positive_passages"),
    ("passage", "context", "document", "doc", "paragraph", "chunk"),
    ("answer", "response"),
    _SECOND,
    ("text", "body", "content", "abstract"),
)
_NEGATIVE: Names = (("negative", "negatives", "neg", "negative_passages", "hard_negative", "hard_negatives"),)

#: Columns of further negatives.
NUMBERED_NEGATIVE = re.compile(r"(hard_)?neg(ative)?_?\d+", re.ASCII)
#: Columns that say how a query is to be asked. The request says that, with `query_prompt`.
PROMPT_COLUMNS = ("prompt", "instruction", "query_instruction", "passage_prompt")


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Attributes:
        title: As people call it.
        needs: Role -> names of its column, of the roles that must be there.
        may: The same, of the roles that can be.
        called: Role of a field map -> role of this form that it stands for.
        lists: Roles whose column holds lists.
    """

    title: str
    needs: Mapping[RetrievalRole, Names]
    may: Mapping[RetrievalRole, Names] = field(default_factory=dict)
    called: Mapping[RetrievalRole, RetrievalRole] = field(default_factory=dict)
    lists: tuple[RetrievalRole, ...] = ()

    @property
    def roles(self) -> dict[RetrievalRole, Names]:
        """All its roles."""
        return {**self.needs, **self.may}


_PAIR_CALLED: dict[RetrievalRole, RetrievalRole] = {
    "passage": "positive",
    "first": "query",
    "second": "positive",
}

#: The forms of rows of a file; of several that fit, the first.
FORMS: dict[RetrievalFormat, Form] = {
    "labelled_documents": Form(
        "queries with labelled documents",
        {
            "query": _QUERY,
            "documents": (("documents", "docs", "passages", "candidates", "texts"),),
            "labels": (("labels", "label", "relevance", "relevances"),),
        },
        called={"first": "query", "passage": "documents", "score": "labels"},
        lists=("documents", "labels"),
    ),
    "query_lists": Form(
        "queries with lists of passages",
        {"query": _QUERY, "positive": _POSITIVE},
        {
            "negative": _NEGATIVE,
            "positive_scores": (("positive_scores", "pos_scores"),),
            "negative_scores": (("negative_scores", "neg_scores"),),
        },
        called=_PAIR_CALLED,
    ),
    "triplet": Form(
        "triplets", {"query": _QUERY, "positive": _POSITIVE, "negative": _NEGATIVE}, called=_PAIR_CALLED
    ),
    "scored_pair": Form(
        "scored pairs",
        {
            "first": (("first",), _FIRST, ("query", "anchor"), ("question",)),
            "second": (
                ("second",),
                _SECOND,
                ("passage", "context", "document", "doc", "paragraph", "chunk"),
                ("answer", "response"),
                ("text",),
            ),
            "score": (("score", "similarity", "similarity_score", "relevance"), ("label", "labels")),
        },
        called={"query": "first", "passage": "second", "positive": "second", "labels": "score"},
    ),
    "pair": Form("pairs", {"query": _QUERY, "positive": _POSITIVE}, called=_PAIR_CALLED),
}

EXPLAINED = (
    "Rows are pairs (query, positive), triplets (and negative), queries with lists (query, pos, neg), scored pairs "
    "(sentence1, sentence2, score), or queries with labelled documents (query, documents, labels); or a BEIR folder."
)
