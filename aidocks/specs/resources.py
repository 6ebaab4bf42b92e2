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


class ComputingSpec(Spec):
    """Base of the specs whose request may say what each worker of its job gets."""

    resources: Resources | None = Field(
        None,
        description="What each worker of the job gets. Default: one core, or one GPU where the cluster has them, and "
        "the memory that the work is known to need. With `--local`, one process has all of the machine.",
        examples=[{"memory_gb": 16}],
    )
