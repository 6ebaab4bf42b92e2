"""The unit that trains: a gang of processes, here or on a cluster, that write one model or adapter."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, hash_file
from aidocks.plan import Gang, GangUnit, UnitContext
from aidocks.training.kinds import AnyTraining
from aidocks.training.run import History, Trained

#: Below the job's workspace: where the training's own files are (`aidocks.training.launch`).
WORKSPACE = "training"


class TrainedFiles(BaseModel):
    """A training that has ended."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trained: Trained
    history: History
    files: tuple[OutputFile, ...]


class TrainModel(GangUnit[TrainedFiles]):
    """Trains. In one process it starts its members itself; a cluster's pool starts them by Ray Train."""

    result_type: ClassVar[type[BaseModel]] = TrainedFiles
    entry: ClassVar[str] = "train.members:train_model"

    training: AnyTraining
    members: int = Field(1, ge=1)
    fewer: tuple[int, ...] = ()
    cpus_per_member: float = 1.0
    gpus_per_member: float = 0.0
    memory_per_member: int | None = None
    spread: bool = False

    @property
    def label(self) -> str:
        return f"{self.training.what} of {self.training.base_name}"

    @property
    def gang(self) -> Gang:
        return Gang(
            members=self.members,
            checkpoints=self.training.checkpoints,
            cpus=self.cpus_per_member,
            gpus=self.gpus_per_member,
            memory=self.memory_per_member,
            spread=self.spread,
            max_failures=self.training.max_failures,
            fewer=self.fewer,
        )

    @property
    def story(self) -> Path:
        return self.training.story

    def run(self, context: UnitContext) -> TrainedFiles:
        from aidocks.training.launch import launch

        workspace = context.workspace / WORKSPACE
        launch(
            self.training,
            workspace,
            members=self.members,
            threads=context.threads,
            stopping=context.stopping,
        )
        return self.collect(context.workspace)

    def collect(self, workspace: Path) -> TrainedFiles:
        """Return what the first member wrote of the training when it ended, with the hashes of its files.

        Args:
            workspace: The job's; the training's own is below it.

        Raises:
            AIDocksError: What stopped the training, if something did that another attempt would meet again.
        """
        from aidocks.training.launch import read_outcome

        trained = read_outcome(workspace / WORKSPACE)
        history = History.model_validate_json(self.training.history.read_bytes())
        files = tuple(
            OutputFile(path=path, bytes=path.stat().st_size, sha256=hash_file(path)) for path in trained.files
        )
        return TrainedFiles(trained=trained, history=history, files=files)

    def outputs(self, result: TrainedFiles) -> tuple[OutputFile, ...]:
        return result.files
