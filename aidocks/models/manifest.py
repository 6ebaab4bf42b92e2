"""What the registry knows of a model: the manifest beside its weights, and the row that listings show."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from aidocks.specs.base import ModelName

MANIFEST_FILE = "aidocks.json"
#: What the manifest of an imported model names as its operation.
IMPORT = "import"


def _inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError(f"{path!r} is not a path inside the model's directory")
    return path


class Parent(BaseModel):
    """A model that another one was made of."""

    model_config = ConfigDict(frozen=True)

    field: str = Field(description="Field of the spec that named it, such as `experts[1].source_model`.")
    reference: str = Field(description="The reference as it was given.")
    content_hash: str = Field(description="SHA-256 over its configuration and weights.")
    path_name: str = Field(description="Name of the directory that it was read from.")
    license: str | None = Field(None, description="Licence that its model card declares.")


class ManifestFile(BaseModel):
    """One file of a model."""

    model_config = ConfigDict(frozen=True)

    path: Annotated[str, AfterValidator(_inside)] = Field(description="Relative to the model's directory.")
    bytes: int
    sha256: str


class Table(BaseModel):
    """A table of plain text; whoever shows it takes care of what markup would read."""

    model_config = ConfigDict(frozen=True)

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    strong: tuple[tuple[int, int], ...] = Field((), description="(row, column) of the cells that stand out.")

    @model_validator(mode="after")
    def _has_columns(self) -> Table:
        if any(len(row) != len(self.header) for row in self.rows):
            raise ValueError("every row of a table has as many cells as its header")
        return self


class Section(BaseModel):
    """Something that an operation tells on the model card: plain text, a table, notes, in this order."""

    model_config = ConfigDict(frozen=True)

    title: str
    text: tuple[str, ...] = Field((), description="Paragraphs.")
    table: Table | None = None
    notes: tuple[str, ...] = Field((), description="Items of a list.")


class Manifest(BaseModel):
    """Where a model comes from and what it consists of."""

    model_config = ConfigDict(frozen=True)

    schema_version: int = 1
    name: ModelName
    created_at: datetime
    operation: str = Field(description="What made it: an operation's name, or `import`.")
    job_id: str
    spec: dict[str, Any] = Field(description="The request that made it.")
    parents: tuple[Parent, ...] = ()
    code_version: str = Field(description="Version of AIDocks that made it.")
    files: tuple[ManifestFile, ...] = Field((), description="Every file but this manifest.")
    metrics: dict[str, Any] = Field(default_factory=dict)
    sections: tuple[Section, ...] = Field((), description="What the operation tells on the model card.")
    parameters: int = 0
    dtype: str | None = None
    architecture: str | None = None
    bytes: int = Field(0, description="Size of all files.")


class ModelInfo(BaseModel):
    """One row of the listing."""

    model_config = ConfigDict(frozen=True)

    name: str
    path: Path = Field(description="Directory on the service's file system.")
    bytes: int = Field(description="Size of all files.")
    created_at: datetime
    operation: str = Field(description="What made it: an operation's name, or `import`.")
    architecture: str | None = None
    dtype: str | None = None
    parameters: int = 0
