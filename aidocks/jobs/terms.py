"""The terms of a job: who submitted it, how urgent it is, and how long it may take."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.specs.faults import invalid_spec

#: The owner of what is submitted where no API key is asked for.
LOCAL = "local"
LOWEST, HIGHEST = -10, 10
#: A year.
LONGEST_S = 31_536_000


class Terms(BaseModel):
    """What a submission says beside its spec. None of it changes what the job makes."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    owner: str = Field(LOCAL, max_length=64, description="Id of the API key that submitted the job.")
    priority: int = Field(
        0,
        ge=LOWEST,
        le=HIGHEST,
        description="Jobs of a higher priority get the workers first; among equals, whoever has the fewest.",
    )
    timeout_s: float | None = Field(
        None, gt=0, le=LONGEST_S, description="Seconds after its start at which the job is ended as failed."
    )


#: Of a submission that says nothing of them.
USUAL = Terms()


def build_terms(**given: Any) -> Terms:
    """Return the terms that a caller gave.

    Raises:
        InvalidSpec: One of them is not what it may be.
    """
    try:
        return Terms(**given)
    except ValidationError as error:
        raise invalid_spec(error.errors(include_url=False)) from None
