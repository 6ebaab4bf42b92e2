"""The workers of a training: what of its device each of them gets."""

from __future__ import annotations

from aidocks.specs.train_fields import TrainSpec
from aidocks.training.device import TrainingDevice
from aidocks.training.fitting import available_bytes
from aidocks.training.kinds import AnyTraining
from aidocks.training.unit import TrainModel


class Workers:
    """What a request asks of the workers, and where it leaves that open, what the device has.

    Args:
        spec: The request.
        device: That they train on.

    Attributes:
        cpus: Cores of each.
        gpus: GPUs of each.
        reserved: Bytes of memory that are reserved for each; None where the request says nothing.
    """

    def __init__(self, spec: TrainSpec, device: TrainingDevice) -> None:
        self._spec, self._device = spec, device
        asked = spec.resources
        cpus, gpus, memory_gb = (asked.cpus, asked.gpus, asked.memory_gb) if asked else (None, None, None)
        self.cpus = float(max(1, device.machine_cores // spec.workers)) if cpus is None else cpus
        self.gpus = float(device.cuda) if gpus is None else gpus
        self.reserved = None if memory_gb is None else int(memory_gb * 1e9)

    @property
    def available(self) -> int:
        """Bytes that each of them may plan with."""
        return available_bytes(self._device, self._spec.workers, self.reserved, self._spec.spread_over_nodes)

    def unit(self, training: AnyTraining, fewer: tuple[int, ...] = ()) -> TrainModel:
        """Return the unit by which they train.

        Args:
            training: What they train.
            fewer: Numbers of workers that can go on from the same checkpoints.
        """
        return TrainModel(
            training=training,
            members=self._spec.workers,
            fewer=fewer,
            cpus_per_member=self.cpus,
            gpus_per_member=self.gpus,
            memory_per_member=self.reserved,
            spread=self._spec.spread_over_nodes,
        )
