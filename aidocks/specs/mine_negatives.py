"""The request and the result of ``/train/negatives``: hard negatives for queries and passages."""

from __future__ import annotations

from typing import Any

from pydantic import AliasChoices, ConfigDict, Field

from aidocks.specs.aliases import with_aliases
from aidocks.specs.base import ModelName, OperationResult
from aidocks.specs.resources import ComputingSpec
from aidocks.specs.train_data import SPLIT_PATTERN, DatasetRef, InlineRows
from aidocks.specs.train_retrieval import ColumnName, NegativesFields, RetrievalFormat
from aidocks.specs.train_retrieval_result import RankingData

EXAMPLE: dict[str, Any] = {
    "dataset": "support-questions",
    "model": "all-minilm-l6-v2",
    "per_query": 5,
    "name": "support-negatives",
}


class MineNegativesSpec(NegativesFields, ComputingSpec):
    """Find hard negatives: for every query, passages that look like its answer, and are none.

    An embedding model and BM25 each rank all passages; what is too good to be wrong is left out. The result is a data
    set, in the form `query`, `pos`, `neg`; of passages with grades `query`, `documents`, `labels`.
    """

    model_config = ConfigDict(json_schema_extra=with_aliases([EXAMPLE]))

    dataset: DatasetRef | InlineRows = Field(
        validation_alias=AliasChoices("dataset", "training_data", "train_data"),
        description="Queries and their passages: a data set of the registry, an uploaded file, of the hub, the path of "
        "a file or of a BEIR folder, or the rows themselves.",
        examples=["support-questions"],
    )
    dataset_split: str = Field(
        "train", pattern=SPLIT_PATTERN, max_length=100, description="Split of a hub data set or BEIR folder."
    )
    corpus: DatasetRef | None = Field(
        None,
        description="Further passages to look in: a file with a column of texts. Default: those of `dataset` alone.",
    )
    fields: dict[ColumnName, ColumnName] = Field(
        default_factory=dict, max_length=64, description="Which column is what: role -> column."
    )
    format: RetrievalFormat = Field("auto", description="Form of the rows; `auto` looks at them.")
    query_prompt: str | None = Field(None, max_length=2000, description="What is put before a query.")
    passage_prompt: str | None = Field(None, max_length=2000, description="What is put before a passage.")
    max_length: int | None = Field(
        None,
        ge=8,
        le=131_072,
        description="Tokens of a text; what is longer is cut. Default: as the model says.",
    )
    name: ModelName | None = Field(
        None, description="Name of the new data set. Default: the data set's, and the end of the job's id."
    )
    seed: int = Field(0, ge=0, le=2**31 - 1, description="Of `sampling: random`.")

    def inputs(self) -> dict[str, str]:
        """Return field -> reference of every model that the request names."""
        named = {"model": self.model, "judge": self.judge}
        return {field: model for field, model in named.items() if model is not None}


class MineNegativesResult(OperationResult):
    """What a ``/train/negatives`` job returns."""

    dataset: str = Field(description="Name of the new data set, which a training can name.")
    file_id: str = Field(description="Its id (`file-…`).")
    data: RankingData | None = Field(None, description="What was found in the data set.")
    queries: int
    passages: int = Field(description="That were looked in.")
    negatives: int = Field(description="That were found, altogether.")
    without: int = Field(description="Queries for which none was left.")
    too_alike: int = Field(description="Passages that were left out as too good to be wrong.")
    rank_of_positive: float | None = Field(
        None, description="Median rank of the best positive in the model's ranking (1: the first)."
    )
    notes: tuple[str, ...] = ()
