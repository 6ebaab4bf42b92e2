"""What every spec shares. A spec is one request: HTTP body, YAML/JSON file, and ``ray.remote`` argument alike."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from aidocks.errors import InvalidSpec

# Registry names become directory names: one path segment, no leading dot, nothing a shell or a URL would read.
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,95}$"

ModelName = Annotated[
    str,
    Field(
        pattern=NAME_PATTERN,
        description="Name in the registry: letters, digits, '.', '_' and '-', at most 96 characters.",
        examples=["smollm2-laser"],
    ),
]

ModelRef = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        description="A registry name, a hub model `org/name[@revision]`, or a path below an allowed root.",
        examples=["smollm2-135m-instruct", "HuggingFaceTB/SmolLM2-135M-Instruct@main"],
    ),
]


class Spec(BaseModel):
    """Base of all specs: frozen, and an unknown field is an error rather than silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)


class PublishableSpec(Spec):
    """Base of the specs whose result is a model that can also go to the model hub."""

    publish: bool = Field(
        False,
        description="Also upload the result to the model hub, as `trainer/<its name>`.",
        examples=[False],
    )
    trainer: str | None = Field(
        None,
        pattern=NAME_PATTERN,
        description="User or organisation on the model hub that receives the result. Needed by `publish`.",
        examples=["my-organisation"],
    )
    private: bool = Field(
        True, description="Whether a repository that `publish` creates can only be seen by `trainer`."
    )

    @model_validator(mode="after")
    def _know_where_to(self) -> PublishableSpec:
        if self.publish and self.trainer is None:
            raise InvalidSpec(
                "`publish` needs `trainer`.",
                field="trainer",
                hint="Name the user or organisation on the hub.",
            )
        return self


class OperationResult(BaseModel):
    """Base of what operations return: small, typed, JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str | None = Field(None, description="Registry name of the model that was made.")
    path: str | None = Field(None, description="Directory of that model on the service's file system.")
    seconds: float | None = Field(None, description="Wall time from start to publication, in seconds.")


class ModelResult(OperationResult):
    """Base of the results of operations that make a model."""

    pictures: tuple[str, ...] = Field((), description="Pictures, relative to the model's directory.")
    hub_url: str | None = Field(None, description="Where the result was uploaded, if it was.")
