"""What the requests of ``/train/emb`` and ``/train/rerank`` share: data, adapter, prompts, hard negatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AliasChoices, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.aliases import one_name_each
from aidocks.specs.base import ModelName, ModelRef, Spec
from aidocks.specs.train_data import SPLIT_PATTERN, DatasetRef, InlineRows, held_out_count
from aidocks.specs.train_fields import TrainSpec
from aidocks.specs.train_rewriting import with_one_length
from aidocks.training.retriever import Prompts
from aidocks.training.run import AdapterSettings

#: Forms of rows that are known. `auto` looks at the first rows (and at directories, for BEIR).
RetrievalFormat = Literal[
    "auto", "pair", "triplet", "scored_pair", "query_lists", "labelled_documents", "beir"
]
#: What a column can be to a training: the keys of a field map.
RetrievalRole = Literal[
    "query",
    "positive",
    "negative",
    "passage",
    "first",
    "second",
    "score",
    "documents",
    "labels",
    "positive_scores",
    "negative_scores",
]
#: Data sets that one request may name.
MOST_DATASETS = 16


def _once(references: tuple[str, ...]) -> tuple[str, ...]:
    twice = [one for one in references if references.count(one) > 1]
    if twice:
        raise ValueError(f"{twice[0]!r} is named twice")
    return references


DatasetRefs = Annotated[
    tuple[DatasetRef, ...], Field(min_length=1, max_length=MOST_DATASETS), AfterValidator(_once)
]
DataRef = DatasetRef | DatasetRefs | InlineRows
ColumnName = Annotated[str, Field(min_length=1, max_length=200)]
Prompt = Annotated[str, Field(max_length=2000)]


class NegativesFields(Spec):
    """How hard negatives are found: passages that look like answers to a query, and are none."""

    per_query: int = Field(5, ge=1, le=100, description="Hard negatives of a query.", examples=[5])
    model: ModelRef | None = Field(
        None,
        description="Embedding model that looks for them. In a training, default: the base that is trained, if that is "
        "an embedding model. Without one, BM25 alone looks.",
        examples=["all-minilm-l6-v2"],
    )
    bm25: bool = Field(True, description="BM25 looks for them, too: passages with the words of the query.")
    depth: int = Field(
        50, ge=1, le=1000, description="Passages of each ranking that are looked at, from the top."
    )
    skip: int = Field(
        0, ge=0, le=1000, description="Passages at the top that are left out: most likely unmarked answers."
    )
    margin: float | None = Field(
        0.05,
        ge=0,
        lt=1,
        description="Left out is what `model` (or `judge`) finds at least (1 - margin) as alike to the query as the "
        "best positive; null leaves nothing out.",
    )
    max_score: float | None = Field(
        None, ge=-1, le=1, description="Left out is what `model` finds more alike than this (cosine)."
    )
    judge: ModelRef | None = Field(
        None, description="Reranker that `margin` is judged by, in place of `model`: slower, and better."
    )
    sampling: Literal["top", "random"] = Field(
        "top", description="Of what is left: the highest ranks, or any, by `seed`."
    )

    @model_validator(mode="after")
    def _somebody_looks(self) -> NegativesFields:
        if self.skip >= self.depth:
            raise InvalidSpec(
                f"Of {self.depth} passages the first {self.skip} are left out, so none is left.",
                field="skip",
                value=self.skip,
                hint="Make it smaller than `depth`.",
            )
        return self


class RetrievalTrainSpec(TrainSpec):
    """Base of the requests that train what finds texts."""

    base_model: ModelRef = Field(
        validation_alias=AliasChoices(
            "base_model", "model", "model_name", "base_model_name", "base_model_path", "model_name_or_path"
        ),
        description="Model to train: a registry name, a hub model `org/name[@revision]`, or a path below an allowed "
        "root, in safetensors format.",
        examples=["all-minilm-l6-v2"],
    )
    name: ModelName | None = Field(
        None,
        description="Registry name of the result. Default: the base's, the kind, and the end of the job's id.",
        examples=["minilm-squad"],
    )
    # --- the data
    dataset: DataRef = Field(
        validation_alias=AliasChoices(
            "dataset", "datasets", "training_data", "train_data", "training_file", "train_dataset"
        ),
        description="What to train on, one data set or several: of the registry, an uploaded file (`file-…`), of the "
        "hub (`org/name[:config][@revision]`), the path of a file or of a BEIR folder below an allowed root; or the "
        "rows themselves.",
        examples=["support-questions", ["support-questions", "wiki-questions"]],
    )
    dataset_split: str = Field(
        "train", pattern=SPLIT_PATTERN, max_length=100, description="Split of hub data sets and BEIR folders."
    )
    eval_dataset: DataRef | None = Field(
        None,
        validation_alias=AliasChoices(
            "eval_dataset", "eval_datasets", "eval_data", "validation_file", "validation_data"
        ),
        description="Further data sets to measure on, never trained on: each has a table of its own. They may be pairs "
        "with scores where `dataset` has passages, and the other way round. Rows of `dataset` are then held out only "
        "where `eval_split` says so.",
    )
    eval_dataset_split: str | None = Field(
        None,
        pattern=SPLIT_PATTERN,
        max_length=100,
        description="Split of hub data sets and BEIR folders that `eval_dataset` names. Default: `dataset_split`.",
    )
    eval_split: float | int | None = Field(
        None,
        ge=0,
        le=100_000,
        validation_alias=AliasChoices("eval_split", "val_set_size", "val_size"),
        description="Queries that are held out of each of `dataset`, to measure on: a share below 1, or a number; 0 "
        "for none. Default: a tenth, at least 8 and at most 500; with `eval_dataset`, none.",
        examples=[0.2, 150],
    )
    fields: dict[ColumnName, ColumnName] = Field(
        default_factory=dict,
        max_length=64,
        validation_alias=AliasChoices("fields", "field_map"),
        description="Which column is what, where it is not found by itself: role -> column.",
        examples=[{"query": "question", "positive": "context"}],
    )
    format: RetrievalFormat = Field("auto", description="Form of the rows; `auto` looks at them.")
    # --- what is trained
    adapter: Literal["lora", "dora", "full"] = Field(
        "lora",
        validation_alias=AliasChoices("adapter", "finetuning_type", "peft_type"),
        description="`lora`, `dora`, or `full`: all weights.",
    )
    merge_adapter: bool = Field(
        True,
        description="Whether the result is a whole model, base and adapter in one; else the adapter alone.",
    )
    # --- how it is trained
    max_length: int | None = Field(  # type: ignore[assignment]  # of the others it is a number
        None,
        ge=8,
        le=131_072,
        validation_alias=AliasChoices(
            "max_length", "max_seq_length", "max_total_length", "sequence_len", "cutoff_len", "max_seq_len"
        ),
        description="Tokens of a text (of a reranker: of query and passage together); what is longer is cut. At most "
        "what the model reads. Default: as the model says; of a plain one, at most 512.",
    )
    query_prompt: Prompt | None = Field(
        None,
        validation_alias=AliasChoices("query_prompt", "query_instruction", "query_instruction_for_retrieval"),
        description="What is put before a query, such as `query: `. Default: as the model says.",
        examples=["query: "],
    )
    passage_prompt: Prompt | None = Field(
        None,
        validation_alias=AliasChoices("passage_prompt", "passage_instruction", "document_prompt"),
        description="What is put before a passage. Default: as the model says.",
        examples=["passage: "],
    )
    per_device_train_batch_size: int | None = Field(
        None,
        ge=1,
        le=4096,
        validation_alias=AliasChoices("per_device_train_batch_size", "micro_batch_size", "batch_size"),
        description="Examples of one worker's forward pass: right passages with their queries, or pairs; of a reranker "
        "that learns from lists, queries. Default: 32 (`cached_mnrl` 256, lists 8), or less where that does not fit.",
    )
    gradient_accumulation_steps: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="Forward passes for one step. Passages of another pass are no negatives. Default: 1, or so that a "
        "step sees 16 examples where a loss has no use for the others of its batch.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Highest learning rate. Default: 2e-5 for all weights, 2e-4 for factors; of models with less than "
        "10 million parameters 3e-4, and 1e-3.",
        examples=[2e-4],
    )
    gradient_checkpointing: bool | None = Field(
        None,
        validation_alias=AliasChoices(
            "gradient_checkpointing", "use_gradient_checkpointing", "activation_checkpointing"
        ),
        description="Compute activations twice rather than keep them. Default: where they do not fit otherwise.",
    )
    mine_negatives: NegativesFields | None = Field(
        None,
        validation_alias=AliasChoices("mine_negatives", "hard_negatives"),
        description="Look for hard negatives before the training (`true`: with the defaults), in the passages of the "
        "data; they are added to those that the data have.",
        examples=[{"per_query": 5}],
    )
    distill_from: ModelRef | None = Field(
        None,
        validation_alias=AliasChoices("distill_from", "teacher"),
        description="Reranker whose scores are learnt (losses `margin_mse`, `distill_kl`, `mse`).",
    )

    @model_validator(mode="before")
    @classmethod
    def _in_our_words(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        body = one_name_each(cls, with_one_length(given))
        mined = next((n for n in ("mine_negatives", "hard_negatives") if n in body), None)
        if mined is not None and isinstance(body[mined], bool | int):
            count = body[mined]
            body[mined] = ({} if count is True else {"per_query": count}) if count else None
        return body

    def datasets(self) -> dict[str, str | tuple[dict[str, Any], ...]]:
        """Return field -> reference, or rows, of every data set that is trained on (`dataset`, `dataset[1]`)."""
        return _named("dataset", self.dataset)

    def eval_datasets(self) -> dict[str, str | tuple[dict[str, Any], ...]]:
        """Return the same of those that are only measured on."""
        return {} if self.eval_dataset is None else _named("eval_dataset", self.eval_dataset)

    def inputs(self) -> dict[str, str]:
        """Return field -> reference of every model that the request names."""
        named = {"base_model": self.base_model, "distill_from": self.distill_from}
        if self.mine_negatives is not None:
            named["mine_negatives.model"] = self.mine_negatives.model
            named["mine_negatives.judge"] = self.mine_negatives.judge
        return {field: model for field, model in named.items() if model is not None}

    def held_out_queries(self, queries: int) -> int:
        """Return how many queries of one of `dataset` are held out."""
        if self.eval_split is None and self.eval_dataset is not None:
            return 0
        return held_out_count(queries, self.eval_split)

    def adapter_settings(self) -> AdapterSettings:
        """Return what is trained."""
        return AdapterSettings(
            kind=self.adapter,
            rank=self.lora_rank,
            alpha=self.lora_alpha or 2 * self.lora_rank,
            dropout=self.lora_dropout,
            rslora=self.rslora,
            target_modules=self.target_modules or (),
        )

    def prompts(self, own: Prompts) -> Prompts:
        """Return what is put before texts, where the model itself says ``own``."""
        return Prompts(
            query=own.query if self.query_prompt is None else self.query_prompt,
            passage=own.passage if self.passage_prompt is None else self.passage_prompt,
        )

    @property
    def makes_adapter(self) -> bool:
        """Whether the result is an adapter, and no whole model."""
        return self.adapter != "full" and not self.merge_adapter


def _named(field: str, given: DataRef) -> dict[str, str | tuple[dict[str, Any], ...]]:
    if isinstance(given, str):
        return {field: given}
    references = [one for one in given if isinstance(one, str)]
    if not references:
        return {field: tuple(one for one in given if not isinstance(one, str))}
    if len(references) == 1:
        return {field: references[0]}
    return {f"{field}[{number}]": one for number, one in enumerate(references)}
