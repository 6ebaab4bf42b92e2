"""``/v1/files``: the data sets, as OpenAI's clients upload and list them; and the curves of trainings."""

from __future__ import annotations

import csv
import io
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from aidocks.datasets.usage import require_unused
from aidocks.errors import InvalidSpec, NotFound, UnknownJob
from aidocks.jobs.model import Status
from serve.context import Context, Here
from serve.routes.datasets import dataset_file
from serve.routes.openai.events import CURVES
from serve.routes.openai.ids import job_of_results, tuning_id
from serve.routes.openai.listing import After, behind, page
from serve.routes.openai.tunings import Tuning, tuning_of
from serve.routes.openai.views import file_object
from serve.uploads import Received, receive_form

router = APIRouter(prefix="/files")

FileId = Annotated[str, Path(description="Id of a file.", max_length=128)]


@router.post("", name="openai_create_file")
async def create_file(here: Here, request: Request) -> dict[str, Any]:
    """Store a file for fine-tuning."""
    received = Received()
    try:
        await receive_form(
            request, received, lambda filename, size: here.datasets.begin(filename, announced=size)
        )
        received.require_known("purpose")
        purpose = received.values.get("purpose")
        if purpose != "fine-tune":
            raise InvalidSpec(
                "Files are kept for fine-tuning only." if purpose else "The purpose of the file is missing.",
                field="purpose",
                value=purpose,
                hint='Send purpose="fine-tune".',
            )
        return file_object(await received.publish(purpose))
    finally:
        received.discard()


@router.get("", name="openai_list_files")
def list_files(
    here: Here,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> dict[str, Any]:
    """List the files that were uploaded."""
    stored = here.datasets.all()
    found = [file_object(dataset) for dataset in (stored if order == "desc" else reversed(stored))]
    matching = [item for item in behind(found, after) if purpose in (None, item["purpose"])]
    return page(matching[: limit + 1], limit)


@router.get("/{file_id}", name="openai_get_file")
def get_file(here: Here, file_id: FileId) -> dict[str, Any]:
    """Return what is known of a file."""
    tuning = _tuning(here, file_id)
    if tuning is None:
        return file_object(here.datasets.get(file_id))
    finished = tuning.last.finished_at
    assert finished is not None
    return {
        "object": "file",
        "id": file_id,
        "bytes": len(_results(here, tuning)),
        "created_at": int(finished.timestamp()),
        "filename": "step_metrics.csv",
        "purpose": "fine-tune-results",
        "status": "processed",
    }


@router.get("/{file_id}/content", name="openai_get_file_content")
def get_file_content(here: Here, file_id: FileId) -> Response:
    """Return a file, or the curves of a training."""
    tuning = _tuning(here, file_id)
    if tuning is None:
        return dataset_file(here.datasets.fetch(file_id))
    return Response(_results(here, tuning), media_type="text/csv")


@router.delete("/{file_id}", name="openai_delete_file")
def delete_file(here: Here, file_id: FileId) -> dict[str, Any]:
    """Delete a file that no job under way needs."""
    dataset = here.datasets.get(file_id)
    require_unused(dataset, here.store)
    here.datasets.delete(dataset.name)
    return {"object": "file", "id": dataset.id, "deleted": True}


def _tuning(here: Context, file_id: str) -> Tuning | None:
    """Return the training whose curves a file is, None when it is a file that was uploaded."""
    job_id = job_of_results(file_id)
    if job_id is None:
        return None
    try:
        tuning = tuning_of(here.store, tuning_id(job_id))
    except UnknownJob:
        tuning = None
    if tuning is None or tuning.last.status is not Status.SUCCEEDED:
        raise NotFound(f"There is no file {file_id!r}.", field="file_id", value=file_id)
    return tuning


def _results(here: Context, tuning: Tuning) -> bytes:
    """Return the curves of a training as a table with a line for each point."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ["step", *CURVES], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(tuning.points(here.store))
    return table.getvalue().encode()
