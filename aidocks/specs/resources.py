"""What a request may ask for each worker of its job."""

from __future__ import annotations

from pydantic import Field, field_validator

from aidocks.specs.base import Spec


class Resources(Spec):
    """What each worker gets."""

    cpus: float | None = Field(
        None, gt=0, le=1024, description="Cores. Default: all of the machine's, shared."
    )
    gpus: float | None = Field(
        None, ge=0, le=8, description="GPUs. Default: one where the cluster has them.", examples=[1]
    )
    memory_gb: float | None = Field(None, gt=0, le=65536, description="Memory that is reserved, in GB.")

    @field_validator("gpus")
    @classmethod
    def _whole(cls, gpus: float | None) -> float | None:
        if gpus is not None and gpus > 1:
            raise ValueError("a worker drives one GPU; ask for more `workers` to use more GPUs")
        return gpus
