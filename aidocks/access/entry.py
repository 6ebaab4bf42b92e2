"""One line of the audit log."""

from __future__ import annotations

from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field


class AuditEntry(BaseModel):
    """One request that was to change something, or that was refused for want of a key. No body, no secret."""

    model_config = ConfigDict(frozen=True)

    number: int = Field(0, description="Counts up; later entries have greater ones.")
    time: datetime
    owner: str = Field(
        description="Id of the key; `local` where none is asked for, `-` where none was right."
    )
    action: str = Field(description="Method and path.", examples=["POST /jobs/{job_id}/cancel"])
    object: str | None = Field(None, description="To what it was done, or what came of it.")
    status: int | None = Field(None, description="Of the answer.")
    address: str | None = Field(None, description="Where the request came from.")
    request_id: str | None = Field(None, description="As in the service's log.")
