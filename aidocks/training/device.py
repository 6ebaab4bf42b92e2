"""What the workers train on: a unit asks one of them. Memory decides what fits, speed says how long it takes."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.errors import InvalidSpec
from aidocks.plan import Unit, UnitContext
from aidocks.training.run import Precision

if TYPE_CHECKING:
    import torch

#: Side of the matrices that are multiplied to find out how fast it is, and for how long.
_SIDE_CPU, _SIDE_GPU = 512, 4096
_MEASURED_S = 0.2


class TrainingDevice(BaseModel):
    """What a worker has.

    Attributes:
        name: Of the GPU, or ``CPU``.
        cuda: Whether it is a GPU.
        memory: Bytes of the GPU, or of the machine.
        cores: Cores that the measurement used (CPU).
        machine_cores: Cores of the machine.
        machine_memory: Bytes of the machine.
        precision: The type that it computes best in.
        flops: Operations a second of a matrix product in that type, as measured.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    cuda: bool
    memory: int
    cores: int = Field(ge=1)
    machine_cores: int = Field(ge=1)
    machine_memory: int
    precision: Precision
    flops: float


def require_optimizer(optim: str, device: TrainingDevice, gpus: float | None) -> None:
    """Refuse an optimiser that needs a GPU where there is none.

    Args:
        optim: As transformers calls it.
        device: That the workers have.
        gpus: Of a worker, as the request says; None where it says nothing.

    Raises:
        InvalidSpec: It is one of bitsandbytes, and the workers have no GPU, or shall not use one.
    """
    if device.cuda and gpus != 0:
        return
    if "8bit" in optim or optim.startswith(("paged", "lion")):
        raise InvalidSpec(
            f"The optimiser {optim!r} is bitsandbytes', which needs a CUDA GPU, and the workers have none.",
            field="optim",
            value=optim,
            hint="Use 'adamw_torch_fused'.",
        )


class MeasureDevice(Unit[TrainingDevice]):
    """What the worker that runs it has. All workers of a pool are alike."""

    result_type: ClassVar[type[BaseModel]] = TrainingDevice

    precision: Precision | None = Field(None, description="To measure in; None for what it does best.")

    @property
    def label(self) -> str:
        return "what the workers train on"

    def run(self, context: UnitContext) -> TrainingDevice:
        import torch

        from aidocks.evaluate.causal_lm import evaluation_dtype

        cuda = context.device.startswith("cuda")
        if cuda:
            properties = torch.cuda.get_device_properties(context.device)
            name, memory = properties.name, properties.total_memory
            best = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        else:
            name, memory = "CPU", machine_memory()
            best = evaluation_dtype(torch.bfloat16, "cpu")
        dtype = getattr(torch, self.precision) if self.precision else best
        return TrainingDevice(
            name=name,
            cuda=cuda,
            memory=memory,
            cores=torch.get_num_threads(),
            machine_cores=os.cpu_count() or 1,
            machine_memory=machine_memory(),
            precision="bfloat16" if dtype is torch.bfloat16 else "float32",
            flops=_measure(dtype, context.device, _SIDE_GPU if cuda else _SIDE_CPU),
        )


def machine_memory() -> int:
    """Return the bytes of memory that this process may use: the machine's, or its control group's where less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for place in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(place, encoding="ascii") as stream:
                total = min(total, int(stream.read()))
        except (OSError, ValueError):  # no such group, or one without a limit
            continue
    return total


def _measure(dtype: torch.dtype, device: str, side: int) -> float:
    """Return the operations a second of products of two matrices [side, side]."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    a, b = (torch.ones(side, side, dtype=dtype, device=device) for _ in range(2))
    for _ in range(2):  # kernels are loaded at the first call
        a @ b
    wait()
    begin, count = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < _MEASURED_S:
        for _ in range(4):
            a @ b
        wait()
        count += 4
    return 2.0 * side**3 * count / passed
