"""What a model that finds texts is measured on: queries, and the passages in which they look."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from aidocks.training.retriever import RowKind
from aidocks.training.run import Rows


class EvalSet(BaseModel):
    """The held-out part of one data set, as files of rows.

    ========= ==============================================================================================
    ranking   ``queries``: ``query``, ``relevant`` (line of the corpus from 0, as text -> grade, 1 and more),
              ``candidates`` (lines that the row itself names: right ones and wrong ones; maybe right ones alone), and
              maybe ``itself`` (line of a passage that is the query, word for word, and no right one: it is not looked
              for, as in BEIR's own measurements). ``corpus``: ``text``
    scored    ``queries``: ``first``, ``second``, ``score`` (0 to 1); no corpus
    ========= ==============================================================================================
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="Of the data set, as the request names it.")
    rows: RowKind
    trained: bool = Field(description="Whether other rows of the data set are trained on.")
    queries: Rows
    corpus: Rows | None = None
