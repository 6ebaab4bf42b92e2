"""Where this installation keeps its data and how it is reached: one frozen object, read from ``AIDOCKS_*``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

DEFAULT_PORT = 8723
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


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
    access: Literal["auto", "open", "keys"] = Field(
        "auto",
        description="`keys`: every request needs an API key. `open`: none does, for a service behind something that "
        "checks. `auto`: open on a loopback address, keys on any other.",
    )
    api_key: SecretStr | None = Field(
        None, description="API key that clients and the command line send. Never handed to the service."
    )
    requests_per_minute: int = Field(
        600,
        ge=0,
        description="Requests a minute of each API key that has no limit of its own; 0: any number.",
    )
    max_queued_jobs: int = Field(1000, ge=1, description="Jobs that may wait, whoever submitted them.")
    max_jobs_per_key: int = Field(
        100, ge=1, description="Unfinished jobs of each API key that has no limit of its own."
    )
    jobs_at_once: int = Field(4, ge=1, description="Jobs that run at the same time and share the workers.")
    storage_url: str | None = Field(
        None,
        description="Where registry, data sets and workspaces are shared by nodes that share no file system: a URL "
        "that fsspec knows, such as `s3://bucket/prefix`. Default: the data directory, which all nodes see.",
    )
    worker_silence_s: float = Field(
        30.0, ge=5, description="Seconds after which a worker that gives no sign of life is replaced."
    )
    workers: int | None = Field(
        None, ge=1, description="Workers of the embedded cluster. Default: one per GPU, or one per core."
    )
    http_replicas: int = Field(
        1,
        ge=1,
        description="Processes that answer HTTP. With two, nobody waits when one of them dies; limits of requests are "
        "counted by each for itself.",
    )
    scale_out: int = Field(
        0,
        ge=0,
        description="Workers beyond what there is room for that waiting units may ask for, so that the cluster's "
        "autoscaler brings nodes. 0: where no autoscaler runs.",
    )
    checkpoint_retention_days: float = Field(
        7.0,
        ge=0,
        description="Days for which the checkpoints of a failed or cancelled training are kept, to resume from.",
    )
    job_retention_days: float | None = Field(
        None,
        ge=0,
        description="Days for which jobs that have ended are kept, with their events. Default: for ever.",
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

    def environment(self) -> dict[str, str]:
        """Return the ``AIDOCKS_*`` variables from which another process of the installation reads the same settings.

        Without the API key, which belongs to whoever calls the service.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields if name != "api_key"}
        return {
            f"AIDOCKS_{name.upper()}": _as_text(value)
            for name, value in values.items()
            if value is not None and value != () and value != frozenset()
        }

    @property
    def open_to_all(self) -> bool:
        """Whether requests need no API key."""
        return self.access == "open" or (self.access == "auto" and self.host in LOOPBACK)

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


def _as_text(value: Any) -> str:
    if isinstance(value, (tuple, frozenset)):
        parts = list(value) if isinstance(value, tuple) else sorted(value)
        return (os.pathsep if isinstance(parts[0], Path) else ",").join(map(str, parts))
    return str(value)
