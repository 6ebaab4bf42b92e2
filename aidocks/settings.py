"""Where this installation keeps its data and how it is reached: one frozen object, read from ``AIDOCKS_*``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DEFAULT_PORT = 8723


class Settings(BaseSettings):
    """Settings of one installation. Every field can be set as ``AIDOCKS_<FIELD>`` in the environment."""

    model_config = SettingsConfigDict(env_prefix="AIDOCKS_", frozen=True, extra="ignore")

    home: Path = Field(
        default_factory=lambda: Path.home() / ".aidocks",
        description="Data directory: registry, job database, workspaces, logs, tokens.",
    )
    host: str = Field("127.0.0.1", description="Address on which the service listens.")
    port: int = Field(DEFAULT_PORT, ge=1, le=65535, description="Port on which the service listens.")
    database_url: str | None = Field(
        None, description="SQLAlchemy URL of the job store. Default: SQLite in the data directory."
    )
    allowed_roots: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description=f"Directories below which a request may name a path, separated by '{os.pathsep}'."
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        ("127.0.0.1", "localhost", "[::1]"),
        description="Host headers that the service answers to, separated by commas ('*' for any).",
    )
    workers: int | None = Field(
        None, ge=1, description="Workers of the embedded cluster. Default: one per GPU, or one per core."
    )
    checkpoint_retention_days: float = Field(
        7.0,
        ge=0,
        description="Days for which the checkpoints of a failed or cancelled training are kept, to resume from.",
    )
    max_upload_bytes: int = Field(2 << 30, ge=1, description="Largest file that is taken as a data set.")
    max_datasets_bytes: int = Field(50 << 30, ge=1, description="What all data sets may have together.")
    remote_code_models: Annotated[frozenset[str], NoDecode] = Field(
        frozenset(),
        description="Models that find texts and may run Python code of their own, separated by commas: "
        "`org/name@commit` of the hub, or registry names. Whoever may import a model under such a name may run code.",
    )
    serving_replicas: int = Field(
        1, ge=1, description="Processes that answer /embed and /rerank, at most; they end when nobody asks."
    )
    serving_gpus: float = Field(
        0.0, ge=0, description="GPUs of each of them, or a part of one; 0: they compute on the processor."
    )
    serving_memory_bytes: int = Field(
        4 << 30, ge=1, description="Weights that each of them keeps loaded; one model is kept however large."
    )
    serving_idle_s: float = Field(
        600.0, ge=1, description="Seconds without a request after which they end, and free their memory."
    )
    url: str | None = Field(None, description="Service that clients talk to. Default: http://host:port.")

    @field_validator("home", mode="after")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()

    @field_validator("allowed_roots", mode="before")
    @classmethod
    def _split_paths(cls, roots: object) -> object:
        if isinstance(roots, str):
            return tuple(Path(root).expanduser().absolute() for root in roots.split(os.pathsep) if root)
        return roots

    @field_validator("allowed_hosts", mode="before")
    @classmethod
    def _split_hosts(cls, hosts: object) -> object:
        return tuple(host.strip() for host in hosts.split(",")) if isinstance(hosts, str) else hosts

    @field_validator("remote_code_models", mode="before")
    @classmethod
    def _split_models(cls, models: object) -> object:
        if isinstance(models, str):
            return frozenset(name.strip() for name in models.split(",") if name.strip())
        return models

    @field_validator("serving_gpus", mode="after")
    @classmethod
    def _whole_if_several(cls, gpus: float) -> float:
        if gpus > 1 and gpus != int(gpus):
            raise ValueError("more than one GPU can only be taken whole: a part of one, or 1, 2, …")
        return gpus

    @property
    def service_url(self) -> str:
        return (self.url or f"http://{self.host}:{self.port}").rstrip("/")

    @property
    def store_url(self) -> str:
        return self.database_url or f"sqlite:///{self.home / 'aidocks.db'}"

    @property
    def models_dir(self) -> Path:
        """The registry's directory: one sub-directory per model."""
        return self.home / "models"

    @property
    def workspaces_dir(self) -> Path:
        """One sub-directory per job, on the same file system as the registry (publication is a rename)."""
        return self.home / "workspaces"

    @property
    def datasets_dir(self) -> Path:
        """The data sets that were uploaded: one sub-directory each."""
        return self.home / "datasets"

    @property
    def checkpoints_dir(self) -> Path:
        """One sub-directory per job that trains: what a job that was stopped can be resumed from."""
        return self.home / "checkpoints"

    @property
    def cache_dir(self) -> Path:
        """Content-addressed results that may be thrown away at any time."""
        return self.home / "cache"

    @property
    def state_file(self) -> Path:
        """What ``aidocks up`` knows of the running embedded service."""
        return self.home / "service.json"

    @property
    def token_file(self) -> Path:
        """Ray's authentication token (mode 0600)."""
        return self.home / "ray-token"

    @property
    def log_dir(self) -> Path:
        return self.home / "logs"
