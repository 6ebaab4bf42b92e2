"""Going on from a checkpoint that an earlier job has left: which one, and whether it is of the same training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.files import OutputFile, write_text
from aidocks.errors import InvalidSpec
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.storage.checkpoints import bring_checkpoints
from aidocks.training.checkpoints import complete_checkpoints, step_of
from aidocks.training.run import AdapterSettings

_FIELD = "resume_from_checkpoint"
#: What the checkpoints beside it are of.
IDENTITY_FILE = "training-identity.json"


class Identity(BaseModel):
    """What two trainings must agree on for one to go on from the other's checkpoint."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: str = Field(description="Hash of the base's content.")
    method: str = Field(description="What is done to the base: a method, or the loss of what finds texts.")
    dataset: str = Field(description="Hash of the rows that are trained on.")
    adapter: AdapterSettings
    optim: str
    deepspeed: str = Field(description="Stage and members where state is divided among them; else `off`.")


class NoteIdentity(WritingUnit):
    """Writes beside a job's checkpoints what they are of, before there are any."""

    identity: Identity
    directory: Path = Field(description="Of the job's checkpoints.")

    @property
    def label(self) -> str:
        return "what the checkpoints are of"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        return WrittenFiles(files=(self._write(),))

    def _write(self) -> OutputFile:
        return write_text(self.directory / IDENTITY_FILE, self.identity.model_dump_json(indent=1))


class Resumed(BaseModel):
    """A checkpoint to go on from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    job_id: str
    step: int
    path: Path
    identity: Identity


def find_checkpoint(checkpoints_dir: Path, job_id: str) -> Resumed:
    """Return the newest complete checkpoint of a job.

    Args:
        checkpoints_dir: One sub-directory per job.
        job_id: As the request names it: letters, digits and dashes alone.

    Raises:
        InvalidSpec: The job has left none.
    """
    directory = checkpoints_dir / job_id
    bring_checkpoints(directory)
    found = complete_checkpoints(directory) if not directory.is_symlink() else []
    if not found:
        raise InvalidSpec(
            f"The job {job_id!r} has left no checkpoint.",
            field=_FIELD,
            value=job_id,
            hint="Checkpoints are kept of jobs that failed or were cancelled after the first `save_steps`; leave this "
            "out to begin anew.",
        )
    newest = found[-1]
    try:
        identity = Identity.model_validate_json((directory / IDENTITY_FILE).read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidSpec(
            f"What the checkpoints of {job_id!r} are of cannot be read.",
            field=_FIELD,
            value=job_id,
            hint="Leave it out to begin anew.",
        ) from error
    return Resumed(job_id=job_id, step=step_of(newest), path=newest, identity=identity)


def require_same(resumed: Resumed, own: Identity, called: Mapping[str, str] | None = None) -> None:
    """Refuse a checkpoint of another training.

    Args:
        resumed: The checkpoint.
        own: What it has to be of.
        called: What the request calls fields of :class:`Identity`, where that is not their name.

    Raises:
        InvalidSpec: Naming the field in which they differ.
    """
    for name in Identity.model_fields:
        before, now = getattr(resumed.identity, name), getattr(own, name)
        if before == now:
            continue
        field = (called or {}).get(name, name)
        was = f" ({_shown(before, now)})" if name != "dataset" else ""
        words = {"base_model": "another model", "dataset": "other rows"}.get(name, f"another `{field}`")
        raise InvalidSpec(
            f"The checkpoint of {resumed.job_id!r} is of {words}{was}: it cannot be gone on from.",
            field=field,
            value=_plain(now) if name not in ("base_model", "dataset") else None,
            hint=f"Send the request of {resumed.job_id}, with another length or rate if you like; or leave out "
            f"`{_FIELD}`.",
        )


def require_steps_left(resumed: Resumed, max_steps: int | None) -> None:
    """Refuse a checkpoint that is of more steps than are asked for. One of the last step only has to be finished.

    Raises:
        InvalidSpec: It is.
    """
    if max_steps is not None and resumed.step > max_steps:
        raise InvalidSpec(
            f"The checkpoint of {resumed.job_id!r} is of step {resumed.step} already.",
            field="max_steps",
            value=max_steps,
            hint="Ask for more steps: those of the earlier job count.",
        )


def _shown(before: Any, now: Any) -> str:
    if isinstance(before, AdapterSettings) and isinstance(now, AdapterSettings):
        differing = [
            name for name in AdapterSettings.model_fields if getattr(before, name) != getattr(now, name)
        ]
        return ", ".join(f"{name} {getattr(before, name)}, now {getattr(now, name)}" for name in differing)
    if isinstance(before, str) and len(before) == 64:
        return f"SHA-256 {before[:12]}…, now {str(now)[:12]}…"
    return f"{before}, now {now}"


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, BaseModel) else value
