"""What is known of a stored data set, and how it lies on the disk."""

from __future__ import annotations

from contextlib import suppress
from datetime import datetime
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

DATASET_FILE = "dataset.json"


class StoredDataset(BaseModel):
    """A data set of this installation."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str = Field(description="`file-` and 24 hexadecimal digits; what OpenAI's clients call it.")
    name: str = Field(description="Name that requests call it by.", examples=["math-lessons"])
    filename: str = Field(description="Name of the file that was uploaded.", examples=["lessons.jsonl"])
    bytes: int
    sha256: str
    created_at: datetime
    purpose: str = Field("fine-tune", description="What it was uploaded for.")
    rows: int | None = Field(None, description="Lines that are not blank; only known of JSON Lines.")
    path: Path = Field(description="The file, on the service's file system.")


def entries(directory: Path) -> list[Path]:
    """Return what is in a directory, sorted; of one that does not exist, nothing."""
    return sorted(directory.iterdir()) if directory.is_dir() else []


def data_bytes(directory: Path) -> int:
    """Return the bytes of the data in a data set's directory."""
    size = 0
    for path in directory.glob("data.*"):
        with suppress(FileNotFoundError):
            size += path.lstat().st_size
    return size


def last_written(directory: Path) -> float:
    """Return when a directory, or what is in it, was last written."""
    latest = 0.0
    for path in (directory, *entries(directory)):
        with suppress(FileNotFoundError):
            latest = max(latest, path.lstat().st_mtime)
    return latest
