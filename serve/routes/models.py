"""``/models``: the registry, its manifests and its files."""

from __future__ import annotations

import os
from typing import Annotated

from fastapi import APIRouter, Request, Response
from fastapi import Path as PathParameter
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field
from starlette.types import Message, Receive, Scope, Send

from aidocks.errors import ModelInUse, RangeNotSatisfiable
from aidocks.models.registry import MANIFEST_FILE, Manifest, ModelInfo
from serve.context import Here, Name, problems
from serve.problems import problem_answer

router = APIRouter(prefix="/models", tags=["models"])


class ModelList(BaseModel):
    """The models of the registry."""

    models: list[ModelInfo]


class ModelFile(BaseModel):
    """One file of a model."""

    path: str = Field(description="Relative to the model's directory.", examples=["model.safetensors"])
    bytes: int
    sha256: str | None = Field(None, description="None for the manifest, which cannot hold its own.")


class FileList(BaseModel):
    """The files of one model."""

    files: list[ModelFile]


_UNKNOWN = problems((404, "There is no such model or file."))
#: Anybody may have made a model: a browser must show its files without running anything in them.
_FILE_HEADERS = {"Content-Security-Policy": "sandbox; default-src 'none'; img-src 'self' data:"}


@router.get("")
def list_models(here: Here) -> ModelList:
    """List the models that this installation made or imported."""
    return ModelList(models=here.registry.list())


@router.get("/{name}", responses=_UNKNOWN)
def get_model(here: Here, name: Name) -> Manifest:
    """Return a model's manifest: how it was made, from what, with which result."""
    return here.registry.manifest(name)


@router.delete(
    "/{name}",
    status_code=204,
    responses=problems((404, "There is no such model."), (409, "A job under way needs the model.")),
)
def delete_model(here: Here, name: Name) -> Response:
    """Delete a model and its files."""
    here.registry.path(name)  # also of a model that is damaged
    users = here.store.model_in_use(name)
    if users:
        raise ModelInUse(
            f"The model {name!r} is in use by {', '.join(users)}.",
            field="name",
            value=name,
            hint="Wait for these jobs, or cancel them.",
        )
    here.registry.delete(name)
    return Response(status_code=204)


@router.get("/{name}/files", responses=_UNKNOWN)
def list_files(here: Here, name: Name) -> FileList:
    """List a model's files."""
    listed = here.registry.manifest(name).files
    manifest = ModelFile(path=MANIFEST_FILE, bytes=here.registry.file(name, MANIFEST_FILE).stat().st_size)
    return FileList(files=[*(ModelFile(**file.model_dump()) for file in listed), manifest])


@router.head("/{name}/files/{path:path}", include_in_schema=False)
@router.get(
    "/{name}/files/{path:path}",
    response_class=FileResponse,
    responses={
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The part of the file that `Range` asked for."},
        304: {"description": "The file is still what `If-None-Match` names."},
        **problems(
            (403, "The path leads out of the model's directory."),
            (404, "There is no such model or file."),
            (416, "`Range` lies outside the file."),
        ),
    },
)
def get_file(
    here: Here,
    request: Request,
    name: Name,
    path: Annotated[str, PathParameter(description="As listed by `/models/{name}/files`.")],
) -> Response:
    """Return one file of a model, or a part of it."""
    file = here.registry.file(name, path)
    stat = file.stat()
    headers = _FILE_HEADERS | {
        "ETag": f'"{stat.st_size:x}-{stat.st_mtime_ns:x}"',
        "Cache-Control": "no-cache",
    }
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    if headers["ETag"] in known or "*" in known:
        return Response(status_code=304, headers=headers)
    return _PartialFile(file, headers=headers, stat_result=stat)


class _PartialFile(FileResponse):
    """A file answer whose refusals of a range are problem details, as all others are."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start" and message["status"] in (400, 416):
                raise _RangeRefused
            await send(message)

        try:
            await super().__call__(scope, receive, watched)
        except _RangeRefused:
            size = os.stat(self.path).st_size
            refusal = RangeNotSatisfiable(
                f"The range is not within the file, which has {size} bytes.",
                hint="Ask for 'bytes=first-last'.",
            )
            answer = problem_answer(scope, refusal, {"Content-Range": f"bytes */{size}"})
            await answer(scope, receive, send)


class _RangeRefused(Exception):
    """The file answer was about to refuse the range."""
