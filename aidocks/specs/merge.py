"""The request of ``/merge``: a merge in the language of mergekit's files, and what is to be done with the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, PublishableSpec
from aidocks.specs.merge_config import MergeConfig, MergeStage
from aidocks.specs.merge_settings import split_reference
from aidocks.specs.resources import ComputingSpec

ComputeDType = Literal["float32", "float64"]

_MOST_STAGES = 64

EXAMPLE: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "smollm2-135m-instruct",
    "models": [{"model": "smollm2-135m-instruct"}, {"model": "smollm2-135m-instruct-laser"}],
    "parameters": {
        "t": [
            {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
            {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
            {"value": 0.5},
        ]
    },
    "dtype": "bfloat16",
    "name": "smollm2-slerp",
}


def _as_list(given: Any) -> Any:
    return (given,) if isinstance(given, str) else given


def _none_is_empty(given: Any) -> Any:
    return () if given is None else given


class MergeSpec(MergeConfig, PublishableSpec, ComputingSpec):
    """Merge models of one architecture into one, tensor by tensor.

    A mergekit file works as it is, also one of several documents.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})

    name: ModelName | None = Field(
        None,
        description="Registry name of the result, of letters, digits, '.', '_' and '-'. Default: the first model's, "
        "the method, and the end of the job's id.",
        examples=["smollm2-slerp"],
    )
    stages: Annotated[tuple[MergeStage, ...], BeforeValidator(_none_is_empty)] = Field(
        (),
        max_length=_MOST_STAGES,
        description="Merges that come first, each with a `name` by which later ones, and this one, call its result. "
        "The documents of a many-document YAML file are the same.",
        examples=[
            [
                {
                    "name": "both-coders",
                    "merge_method": "linear",
                    "models": [{"model": "coder-a"}, {"model": "coder-b"}],
                    "parameters": {"weight": 0.5},
                }
            ]
        ],
    )
    compute_dtype: ComputeDType = Field(
        "float32",
        description="Type that is computed in; inputs are not rounded before it, the result is rounded once.",
        examples=["float32"],
    )
    seed: int = Field(
        0,
        ge=0,
        le=2**31 - 1,
        description="Of methods that draw random numbers, and of the choice of evaluation chunks.",
    )
    max_shard_size: str = Field(
        "5GB", description="Largest weight file of the result, such as 500MB or 5GB.", examples=["5GB"]
    )
    dry_run: bool = Field(
        False,
        description="Plan only: check everything, and return what would be read, written and kept in memory.",
        examples=[True],
    )
    evaluate: bool = Field(
        False,
        description="Measure the perplexity of every model and of the result.",
        examples=[True],
    )
    text: Annotated[
        tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...], BeforeValidator(_as_list)
    ] = Field(
        ("prose",),
        min_length=1,
        max_length=64,
        description="Texts to measure on, one or a list: `prose` (shipped, public domain), or paths of .txt or .jsonl "
        "files (with a `text` field) below an allowed root.",
        examples=[["prose"]],
    )
    chunks: int = Field(32, ge=2, le=100_000, description="Evaluation chunks of every text.", examples=[32])
    seqlen: int = Field(
        128, ge=8, le=32_768, description="Length of an evaluation chunk, in tokens.", examples=[128]
    )

    @classmethod
    def from_documents(
        cls, documents: Sequence[Mapping[str, Any]], fields: Mapping[str, Any] | None = None
    ) -> MergeSpec:
        """Return the request that a many-document file is: named documents are stages of the one without a name.

        Where all have names, the one that no other uses is the result.

        Args:
            documents: In any order.
            fields: Further fields of the result's document, which count more.

        Raises:
            InvalidSpec: For more than one result, a name that is given twice, or merges that need each other.
            pydantic.ValidationError: A document is wrong in itself.
        """
        return cls.model_validate(_join(documents, fields or {}))

    @model_validator(mode="after")
    def _stages_in_order(self) -> MergeSpec:
        names = [stage.name for stage in self.stages]
        for number, name in enumerate(names):
            if name in names[:number]:
                raise InvalidSpec(
                    f"Two stages are called {name!r}.", field=f"stages[{number}].name", value=name
                )
        used: set[str] = set()
        for number, stage in enumerate((*self.stages, self)):
            for field, reference in stage.references():
                model = split_reference(reference)[0]
                if model in names[number:]:
                    raise InvalidSpec(
                        f"The stage {model!r} is not made yet where it is used.",
                        field=f"stages[{number}].{field}",
                        value=reference,
                        hint="A stage can use those before it.",
                    )
                used.add(model)
        for number, name in enumerate(names):
            if name not in used:
                raise InvalidSpec(
                    f"Nothing uses the stage {name!r}, and its result would not be kept.",
                    field=f"stages[{number}].name",
                    value=name,
                    hint="Name it as a model of a later stage, or leave it out.",
                )
        return self

    def as_yaml(self) -> str:
        """Return the merge as a file that makes the same model again: no defaults, and nothing about publication."""
        from aidocks.specs.merge_yaml import to_yaml

        return to_yaml(self)

    def merges(self) -> Iterator[tuple[str, str | None, MergeConfig]]:
        """Yield all merges in order: path in the request (``stages[0].`` or empty), name of a stage, and the merge."""
        for number, stage in enumerate(self.stages):
            yield f"stages[{number}].", stage.name, stage
        yield "", None, self

    def inputs(self) -> dict[str, str]:
        """Return field -> reference of every model and adapter that the request names; stages are no models."""
        names = {stage.name for stage in self.stages}
        found: dict[str, str] = {}
        for path, _, merge in self.merges():
            for field, reference in merge.references():
                model, adapter = split_reference(reference)
                if model not in names:
                    found[path + field] = model
                if adapter is not None:
                    found[f"{path}{field}.lora"] = adapter
        return found


def _join(documents: Sequence[Mapping[str, Any]], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return one request of several documents."""
    if len(documents) > _MOST_STAGES + 1:
        raise InvalidSpec(
            f"These are {len(documents)} documents; at most {_MOST_STAGES + 1} can be merged at once."
        )
    for number, document in enumerate(documents):
        if not isinstance(document, Mapping):
            raise InvalidSpec(
                f"Document {number + 1} is not a mapping of fields to values.",
                hint="Write 'field: value' lines.",
            )
        if document.get("stages"):
            raise InvalidSpec(
                "In a file of several documents, the documents are the stages.",
                field="stages",
                hint="Make one document of them, or a document of every stage.",
            )
    results = [number for number, document in enumerate(documents) if document.get("name") is None]
    if len(results) > 1:
        raise InvalidSpec(
            f"Documents {results[0] + 1} and {results[1] + 1} have no name; the one without a name is the result.",
            field="name",
            hint="Name all but one, as the others call them.",
        )
    ordered = _sort(documents)
    result = results[0] if results else ordered[-1]
    stages = [dict(documents[number]) for number in ordered if number != result]
    return {**documents[result], "stages": stages, **fields}


def _sort(documents: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the numbers of the documents so that each comes behind those that it uses."""
    places: dict[Any, int] = {}
    for number, document in enumerate(documents):
        name = document.get("name")
        if name is not None and places.setdefault(str(name), number) != number:
            raise InvalidSpec(
                f"Documents {places[str(name)] + 1} and {number + 1} are both called {name!r}.",
                field="name",
                value=name,
            )
    ordered: dict[int, None] = {}

    def place(number: int, users: tuple[int, ...]) -> None:
        if number in users:
            ring = [str(documents[user].get("name")) for user in (*users[users.index(number) :], number)]
            raise InvalidSpec(
                f"These merges need each other: {' -> '.join(ring)}.",
                field="name",
                value=ring[0],
                hint="A merge can use the results of merges that do not use its own.",
            )
        for name in _names_in(documents[number]):
            if name in places and number not in ordered:
                place(places[name], (*users, number))
        ordered[number] = None

    for number in range(len(documents)):
        place(number, ())
    return list(ordered)


def _names_in(document: Any, depth: int = 12) -> Iterator[str]:
    """Yield the models that a document names, before anything in it is checked; they are never deep in it."""
    if depth == 0:
        return
    if isinstance(document, Mapping):
        for key, inner in document.items():
            if isinstance(inner, str) and key in (
                "model",
                "base_model",
                "path",
                "source",
                "tokenizer_source",
            ):
                yield split_reference(inner)[0]
            elif key != "parameters":
                yield from _names_in(inner, depth - 1)
    elif isinstance(document, list | tuple):
        for item in document:
            yield from _names_in(item, depth - 1)
