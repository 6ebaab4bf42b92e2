"""The language of merges: what mergekit's files say, with strict rules. :mod:`aidocks.specs.merge` adds the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from aidocks.errors import InvalidSpec
from aidocks.specs.base import ModelName, Spec
from aidocks.specs.merge_settings import MergeRef, Parameters, none_is_empty

DType = Literal["float32", "float16", "bfloat16", "float64"]


class ModelInput(Spec):
    """A model of which all layers are merged."""

    model: MergeRef
    parameters: Parameters = Field(default_factory=dict)


class SliceSource(Spec):
    """Some layers of a model."""

    model: MergeRef
    layer_range: tuple[int, ...] = Field(
        json_schema_extra={"minItems": 2, "maxItems": 2},
        description="The first of its layers that is taken, counted from 0, and the first that is not any more.",
        examples=[[0, 16]],
    )
    parameters: Parameters = Field(default_factory=dict)

    @field_validator("layer_range")
    @classmethod
    def _some_layers(cls, layers: tuple[int, ...]) -> tuple[int, ...]:
        if len(layers) != 2:
            raise ValueError("must be two numbers: [0, 16] are the layers 0 to 15")
        first, end = layers
        if first < 0:
            raise ValueError(f"there is no layer {first}; they are counted from 0")
        if first >= end:
            raise ValueError(f"must be at least one layer: [{first}, {first + 1}] is layer {first} alone")
        return layers


class OutputSlice(Spec):
    """Layers of the result: the same number of layers of one model or more, merged."""

    sources: tuple[SliceSource, ...] = Field(
        # Its length is checked below: pydantic would report a wrong one whenever an element is wrong.
        json_schema_extra={"minItems": 1},
        description="Models and layers that are merged.",
        examples=[[{"model": "smollm2-135m-instruct", "layer_range": [0, 16]}]],
    )
    base_model: MergeRef | None = Field(
        None, description="Base of this slice. Default: the base of the merge.", examples=["smollm2-135m"]
    )
    parameters: Parameters = Field(default_factory=dict)
    residual_weight: float | None = Field(
        None, description="Accepted since mergekit's files may have it; it has no effect, there or here."
    )

    @field_validator("sources")
    @classmethod
    def _at_least_one(cls, sources: tuple[SliceSource, ...]) -> tuple[SliceSource, ...]:
        if not sources:
            raise ValueError("must be at least one source, of `model` and `layer_range`")
        return sources


class OutputModule(Spec):
    """What a part of the result is made of; a language model has one part."""

    models: tuple[ModelInput, ...] | None = Field(
        None, description="Models of which all layers are merged.", examples=[[{"model": "smollm2-135m"}]]
    )
    slices: tuple[OutputSlice, ...] | None = Field(
        None, description="The result's layers, slice after slice.", examples=[[]]
    )
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_of_two(self) -> OutputModule:
        if bool(self.models) == bool(self.slices):
            raise InvalidSpec(
                f"Give {'either ' if self.models else ''}`models` or `slices`{', not both' if self.models else ''}.",
                field="models",
            )
        return self


class ZeroToken(Spec):
    """Nothing: a row of zeros."""

    kind: Literal["zero"] = Field(description="`zero`: a row of zeros.", examples=["zero"])


class ModelToken(Spec):
    """The row of some token of a model."""

    kind: Literal["model_token"] = Field(
        description="`model_token`: the row of a token of a model.", examples=["model_token"]
    )
    model: MergeRef
    token: str | None = Field(None, description="The token.", examples=["<|im_start|>"])
    token_id: int | None = Field(None, ge=0, description="Its number, instead.", examples=[2])

    @model_validator(mode="after")
    def _one_of_two(self) -> ModelToken:
        if (self.token is None) == (self.token_id is None):
            raise InvalidSpec("Give either `token` or `token_id`.", field="token", value=self.token)
        return self


def _kind_of_token_source(given: Any) -> str | None:
    if isinstance(given, ZeroToken | ModelToken):
        return given.kind
    if isinstance(given, Mapping) and "kind" in given:
        return given["kind"] if given["kind"] in ("zero", "model_token") else None
    return "model" if isinstance(given, str | Mapping) else None


TokenSource = Annotated[
    Annotated[ZeroToken, Tag("zero")]
    | Annotated[ModelToken, Tag("model_token")]
    | Annotated[MergeRef, Tag("model")],
    Discriminator(
        _kind_of_token_source,
        custom_error_type="token_source",
        custom_error_message="must be a model, `{kind: zero}`, or `{kind: model_token, model, token}`",
    ),
]


class TokenPolicy(Spec):
    """Where the row of a token comes from."""

    source: TokenSource | None = Field(
        None,
        description="A model; `{kind: model_token, model, token}` (or `token_id`), the row of some token of a model; "
        "or `{kind: zero}`. Default: the base's row, else that of the only model that has the token, else the mean.",
        examples=["smollm2-135m-instruct", {"kind": "zero"}],
    )
    force: bool = Field(
        False, description="Also for models that have a row of their own for the token.", examples=[True]
    )


class TokenizerPolicy(Spec):
    """The result's vocabulary, and where the rows of its embedding come from."""

    source: MergeRef = Field(
        "union",
        description="`union` (the tokens of all models), `base` (those of the base), or a model.",
        examples=["union"],
    )
    tokens: Annotated[dict[str, TokenPolicy], BeforeValidator(none_is_empty)] = Field(
        {},
        description="Policies of single tokens. One that no model has is added to the vocabulary.",
        examples=[{"<|im_start|>": {"source": {"kind": "zero"}}}],
    )
    pad_to_multiple_of: int | None = Field(
        None,
        ge=1,
        le=1 << 20,
        description="Round the number of rows up; those beyond the last token are the mean of all.",
        examples=[64],
    )


def _plain_dtype(given: Any) -> Any:
    return given.removeprefix("torch.") if isinstance(given, str) else given


_DType = Annotated[DType, BeforeValidator(_plain_dtype)]


class MergeConfig(Spec):
    """One merge: the keys of mergekit's files."""

    merge_method: str = Field(
        min_length=1,
        max_length=96,
        description="How tensors are merged: `linear`, `slerp`, `nuslerp`, `multislerp`, `karcher`, "
        "`task_arithmetic`, `ties`, `dare_linear`, `dare_ties`, `della`, `della_linear`, `breadcrumbs`, "
        "`breadcrumbs_ties`, `sce`, `ram`, `ramplus_tl`, `model_stock`, `nearswap`, `arcee_fusion`, `passthrough`, "
        "or one of a plugin's.",
        examples=["slerp"],
    )
    models: tuple[ModelInput, ...] | None = Field(
        None,
        description="Models of which all layers are merged. One of `models`, `slices` and `modules` is needed.",
        examples=[[{"model": "smollm2-135m", "parameters": {"weight": 0.5}}]],
    )
    slices: tuple[OutputSlice, ...] | None = Field(
        None,
        description="The result's layers, slice after slice, each of `sources` with their `layer_range`.",
        examples=[[{"sources": [{"model": "smollm2-135m", "layer_range": [0, 16]}]}]],
    )
    modules: dict[str, OutputModule] | None = Field(
        None,
        description="`models` or `slices` of the part of a model that the name stands for. A language model has one "
        "part; any name does.",
        examples=[{"default": {"models": [{"model": "smollm2-135m"}]}}],
    )
    base_model: MergeRef | None = Field(
        None,
        description="The base, for methods that have one: what the models are compared with. It gives the result's "
        "configuration and tokenizer, too. Default for both: the first model.",
        examples=["smollm2-135m"],
    )
    dtype: _DType | None = Field(
        None,
        description="Type of the result's weights, unless `out_dtype` says another. Default: as the base's (or the "
        "first model's) are stored. What is computed in is `compute_dtype`.",
        examples=["bfloat16"],
    )
    out_dtype: _DType | None = Field(
        None, description="Type of the result's weights. Default: `dtype`.", examples=["bfloat16"]
    )
    tokenizer_source: MergeRef | None = Field(
        None,
        description="Vocabulary of the result: `union` (the tokens of all models), `base` (those of the base), or a "
        "model. Default: the base's, and all models must have as many rows.",
        examples=["union"],
    )
    tokenizer: TokenizerPolicy | None = Field(
        None,
        description="The same with policies of single tokens: `source`, `tokens`, `pad_to_multiple_of`.",
        examples=[{"source": "union", "pad_to_multiple_of": 64}],
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        max_length=100_000,
        description="Chat template of the result: `auto` (that of most models), `alpaca`, `chatml`, `llama3`, "
        "`mistral`, or a Jinja template. Default: that of the tokenizer.",
        examples=["chatml"],
    )
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_layout(self) -> MergeConfig:
        given = [name for name in ("models", "slices", "modules") if getattr(self, name)]
        if len(given) != 1:
            raise InvalidSpec(
                f"A merge has one of `models`, `slices` and `modules`; this one has {' and '.join(given) or 'none'}.",
                field=given[1] if given else "models",
                hint="List the `models` to merge, or the `slices` that the result consists of.",
            )
        if self.modules and len(self.modules) > 1:
            raise InvalidSpec(
                f"A language model has one module; these are {len(self.modules)}.",
                field="modules",
                value=list(self.modules),
                hint="Give one module, of whatever name, or `models` or `slices` without it.",
            )
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise InvalidSpec(
                "Give either `tokenizer_source` or `tokenizer`, which has a `source` of its own.",
                field="tokenizer_source",
                value=self.tokenizer_source,
            )
        return self

    @property
    def module(self) -> tuple[str, OutputModule]:
        """What the result consists of, and the path of that in the request (empty, or ``modules.<name>.``)."""
        if self.modules:
            ((name, module),) = self.modules.items()
            return f"modules.{name}.", module
        return "", OutputModule(models=self.models, slices=self.slices)

    @property
    def vocabulary(self) -> TokenizerPolicy | None:
        """What is asked for the vocabulary, however it was written; None to leave it as it is."""
        if self.tokenizer_source is not None:
            return TokenizerPolicy(source=self.tokenizer_source)
        return self.tokenizer

    def references(self) -> Iterator[tuple[str, str]]:
        """Yield field and reference of every place that names a model; the base first."""
        if self.base_model is not None:
            yield "base_model", self.base_model
        path, module = self.module
        for number, model in enumerate(module.models or ()):
            yield f"{path}models[{number}].model", model.model
        for number, part in enumerate(module.slices or ()):
            if part.base_model is not None:
                yield f"{path}slices[{number}].base_model", part.base_model
            for place, source in enumerate(part.sources):
                yield f"{path}slices[{number}].sources[{place}].model", source.model
        yield from self._vocabulary_references()

    def _vocabulary_references(self) -> Iterator[tuple[str, str]]:
        policy = self.vocabulary
        if policy is None:
            return
        if policy.source not in ("union", "base"):
            yield "tokenizer_source" if self.tokenizer is None else "tokenizer.source", policy.source
        for token, given in policy.tokens.items():
            field = f"tokenizer.tokens.{token}.source"
            if isinstance(given.source, str):
                yield field, given.source
            elif isinstance(given.source, ModelToken):
                yield f"{field}.model", given.source.model


class MergeStage(MergeConfig):
    """An earlier merge, whose result later ones may use."""

    name: ModelName = Field(
        description="What later stages call its result; it is not kept in the registry.",
        examples=["both-coders"],
    )
