"""``/datasets``: the data sets of this installation, uploaded, listed, sent back, deleted."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse
from pydantic import BaseModel

from aidocks.datasets.store import StoredDataset, Upload
from aidocks.datasets.upload import SUFFIXES
from aidocks.datasets.usage import require_unused
from aidocks.models.names import clean_name
from serve.context import Here, problems
from serve.uploads import Received, media_type, receive_body, receive_form

router = APIRouter(prefix="/datasets", tags=["datasets"])

DatasetName = Annotated[
    str, Path(description="Name of a data set, or its id.", examples=["math-lessons"], max_length=128)
]


class DatasetList(BaseModel):
    """The data sets, newest first."""

    datasets: list[StoredDataset]


_UNKNOWN = problems((404, "There is no such data set."))
_FILE = {"type": "string", "format": "binary"}
_BODY = {
    "required": True,
    "content": {
        "application/octet-stream": {"schema": _FILE},
        "multipart/form-data": {
            "schema": {"type": "object", "properties": {"file": _FILE}, "required": ["file"]}
        },
    },
}
#: Anybody may have made the file: a browser must store it, not show it.
_HEADERS = {"Content-Security-Policy": "sandbox; default-src 'none'"}


@router.get("")
def list_datasets(here: Here) -> DatasetList:
    """List the data sets that were uploaded."""
    return DatasetList(datasets=here.datasets.all())


@router.post(
    "",
    status_code=201,
    response_description="The data set.",
    responses=problems(
        (409, "The name is taken."),
        (413, "The file is larger than the service takes."),
        (415, "Nothing says what the file is written in."),
        (422, "The file, or its name, is not valid."),
        (507, "All data sets together would be larger than the service keeps."),
    ),
    openapi_extra={"requestBody": _BODY},
)
async def upload_dataset(
    here: Here,
    request: Request,
    name: Annotated[
        str | None,
        Query(description="Name for the data set. Default: that of the file, without its ending."),
    ] = None,
    filename: Annotated[
        str | None, Query(description=f"Name of the file; its ending is one of {', '.join(SUFFIXES)}.")
    ] = None,
) -> StoredDataset:
    """Store a file of examples: the body itself, or the field `file` of a form. It appears whole or not at all.

    Files of hundreds of megabytes are better sent in parts: `POST /uploads`.
    """
    received = Received()

    def begin(given: str, announced: int | None) -> Upload:
        given = filename or given
        return here.datasets.begin(given, name or name_of(given), announced)

    try:
        if media_type(request) == "multipart/form-data":
            await receive_form(request, received, begin)
            received.require_known()
        else:
            await receive_body(request, received, begin, filename)
        return await received.publish("fine-tune")
    finally:
        received.discard()


@router.get("/{name}", responses=_UNKNOWN)
def get_dataset(here: Here, name: DatasetName) -> StoredDataset:
    """Return what is known of a data set."""
    return here.datasets.get(name)


@router.get(
    "/{name}/content",
    response_class=FileResponse,
    responses={200: {"description": "The file.", "content": {"application/octet-stream": {}}}, **_UNKNOWN},
)
def get_dataset_content(here: Here, name: DatasetName) -> Response:
    """Return the file as it was uploaded."""
    return dataset_file(here.datasets.fetch(name))


@router.delete(
    "/{name}",
    status_code=204,
    responses=problems((404, "There is no such data set."), (409, "A job under way needs the data set.")),
)
def delete_dataset(here: Here, name: DatasetName) -> Response:
    """Delete a data set."""
    dataset = here.datasets.get(name)
    require_unused(dataset, here.store)
    here.datasets.delete(dataset.name)
    return Response(status_code=204)


def name_of(filename: str) -> str:
    """Return the name that a data set gets of its file's."""
    return clean_name(PurePosixPath(filename).stem, "data")


def dataset_file(dataset: StoredDataset) -> FileResponse:
    """Return the file of a data set as an answer."""
    return FileResponse(
        dataset.path, media_type="application/octet-stream", filename=dataset.filename, headers=_HEADERS
    )
