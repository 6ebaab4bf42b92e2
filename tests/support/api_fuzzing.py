"""Asks an application what its OpenAPI document allows, and what it forbids, and holds the answers against it.

Of the routes below ``/v1``, which the document leaves out, it asks as well; there no answer may be a failure of ours.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from pydantic import BaseModel
from schemathesis import Case, GenerationMode
from schemathesis.checks import CHECKS
from schemathesis.core.failures import FailureGroup
from schemathesis.python import asgi

from aidocks.datasets.store import DatasetStore
from aidocks.errors import AIDocksError, TooBusy
from aidocks.models.registry import Registry
from aidocks.operations import OPERATIONS
from aidocks.settings import Settings
from aidocks.specs.retrieve import RerankRequest
from serve.app import create_api
from serve.routes.openai import embeddings, files, jobs, models, rerank
from serve.routes.openai.asked import TuningRequest
from tests.support import sound_files as sound

#: What a schema cannot say is refused all the same: a model that does not exist, a name that is taken, a path that is
#: not allowed. And whether what was deleted stays away is asked by tests of their own.
_LEFT_OUT = ("positive_data_acceptance", "use_after_free", "ensure_resource_availability")
_STREAM_EVENTS = 5
_FILE = {"type": "string", "format": "binary"}
_THEIR_BODIES: dict[str, type[BaseModel]] = {
    "/v1/embeddings": embeddings.EmbeddingsRequest,
    "/v1/rerank": RerankRequest,
    "/v1/fine_tuning/jobs": TuningRequest,
}


@dataclass
class Asked:
    """What came of many requests.

    Attributes:
        cases: How many there were.
        statuses: How often each status was answered.
        faults: What contradicts the document, each once, with the request that shows it.
        operations: Paths and methods that were asked.
    """

    cases: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: dict[str, str] = field(default_factory=dict)
    operations: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class _Busy:
    """Has no time for vectors: a client is told to come again, which is what it would be told under load, too."""

    async def compute(self, call: Any) -> Any:
        raise TooBusy("More waits than is computed.", hint="Try again.")


@contextmanager
def furnished(home: Path) -> Iterator[FastAPI]:
    """Yield an application with a model, an adapter, a data set and a job; nobody executes jobs."""
    given = Settings(home=home, allowed_hosts=("*",), allowed_roots=(home,), max_queued_jobs=100_000)
    registry = Registry(given.models_dir)
    registry.import_checkpoint("tiny", sound.write_model(home / "model"))
    registry.import_checkpoint("adapter", sound.write_adapter(home / "adapter"))
    rows = home / "lessons.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sound.ROWS[1] * 8))
    DatasetStore.of(given).add(rows, "lessons")
    api = create_api(given, compute=_Busy())
    try:
        yield api
    finally:
        # Otherwise what watches and writes in the background goes on when its directory is gone.
        asgi.shutdown_lifespans()
        api.state.context.store.close()


def ask(api: FastAPI, cases: int, *, number: int = 0) -> Asked:
    """Ask every operation of an application about equally often: half of it valid, half of it not.

    Args:
        api: The application.
        cases: How many requests, all together.
        number: Seeds them.
    """
    schema = schemathesis.openapi.from_dict(whole_document(api))
    schema.app = api
    schema.config.generation.update(modes=[GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
    asked, begun = Asked(), time.perf_counter()
    operations = [found.ok() for found in schema.get_all_operations()]
    each = max(1, round(cases / len(operations) / 2))
    with asgi.get_client(api, max_stream_events=_STREAM_EVENTS) as client:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                _ask_one(api, operation, mode, client, each, number, asked)
    asked.seconds = time.perf_counter() - begun
    return asked


def whole_document(api: FastAPI) -> dict[str, Any]:
    """Return an application's document, and with it the routes below ``/v1``, whose document is OpenAI's."""
    document: dict[str, Any] = json.loads(json.dumps(api.openapi()))
    theirs = FastAPI()
    for part in (embeddings, rerank, files, jobs, models):
        theirs.include_router(part.router, prefix="/v1")
    paths = theirs.openapi()["paths"]
    for path, model in _THEIR_BODIES.items():
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        document["components"]["schemas"] |= schema.pop("$defs", {})
        paths[path]["post"]["requestBody"] = {"content": {"application/json": {"schema": schema}}}
    form = {"type": "object", "properties": {"purpose": {"type": "string"}, "file": _FILE}}
    paths["/v1/files"]["post"]["requestBody"] = {"content": {"multipart/form-data": {"schema": form}}}
    for item in paths.values():
        for operation in item.values():
            operation["responses"] = {"default": {"description": "As OpenAI's document says."}}
    document["paths"] |= paths
    return document


def _ask_one(
    api: FastAPI, operation: Any, mode: GenerationMode, client: Any, each: int, number: int, asked: Asked
) -> None:
    chance = random.Random(f"{number}{operation.label}{mode}")
    left_out = CHECKS.get_all_names() if operation.path.startswith("/v1/") else _LEFT_OUT
    rejection = CHECKS.get_one("negative_data_rejection")
    refused = [CHECKS.get_one(name) for name in left_out if name != "not_a_server_error"]

    @hypothesis_settings(
        max_examples=each,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @seed(number)
    @given(operation.as_strategy(mode))
    def one(case: Case) -> None:
        made_up = (copy(case.path_parameters), copy(case.body))
        _fill_in(api, case, mode, chance)
        response = case.call(session=client)
        asked.cases += 1
        asked.operations[operation.label] += 1
        asked.statuses[response.status_code] += 1
        # What exists may have come to where the flaw was; and what is too large is refused unread.
        undone = made_up != (case.path_parameters, case.body) or response.status_code == 413
        try:
            case.validate_response(response, excluded_checks=[*refused, *([rejection] if undone else [])])
        except FailureGroup as group:
            for failure in group.exceptions:
                what = f"{operation.label}: {response.status_code}: {failure.title}: {str(failure.message)[:300]}"
                asked.faults.setdefault(what, case.as_curl_command()[:1500])

    try:
        one()
    except Exception as error:
        if type(error).__name__ not in ("Unsatisfiable", "SkipTest"):
            asked.faults.setdefault(f"{operation.label}: {type(error).__name__}: {error!s:.300}", "")


def _fill_in(api: FastAPI, case: Case, mode: GenerationMode, chance: random.Random) -> None:
    """Put what exists in the place of what was made up, now and then: behind a 404 nothing is tested."""
    context = api.state.context
    if chance.random() < 0.5:
        parameters = case.path_parameters or {}
        for name in parameters:
            found = _existing(context, name, case.operation.path, chance)
            if found is not None:
                parameters[name] = found
    asked = next((one.name for one in OPERATIONS if one.endpoint == case.operation.path), None)
    if (
        asked is not None
        and case.method == "POST"
        and mode is GenerationMode.POSITIVE
        and chance.random() < 0.3
    ):
        text = json.dumps(sound.REQUESTS[asked]).replace("MODEL", "tiny").replace("ROWS", "lessons")
        case.body = json.loads(text.replace('"made"', f'"made-{chance.getrandbits(40)}"'))
    elif isinstance(case.body, dict) and chance.random() < 0.6:
        for name, value in case.body.items():
            if (
                isinstance(value, str)
                and ("model" in name or name == "model")
                and "name" not in name.removeprefix("base_model")
            ):
                case.body[name] = chance.choice(("tiny", "tiny+adapter", "adapter", value))
            elif name in ("dataset", "training_file", "validation_file", "eval_dataset"):
                case.body[name] = "lessons"


def _existing(context: Any, name: str, path: str, chance: random.Random) -> str | None:
    if "job" in name or "fine_tuning" in path:
        if not (jobs := context.store.list(limit=5)) or chance.random() < 0.1:
            spec = {"base_model_name": "tiny", "laser_model_name": f"made-{chance.getrandbits(40)}"}
            jobs = [context.store.submit("laser", spec, output_name=None)[0]]
        return str(chance.choice(jobs).id)
    if "dataset" in path or "file" in name:
        if not (kept := context.datasets.all()):
            return None
        return str(chance.choice((kept[0].id, kept[0].name)))
    if "upload" in name:
        try:
            return str(context.uploads.begin("rows.jsonl", None, 10).id)
        except AIDocksError:
            return None
    return (
        chance.choice(("tiny", "adapter", "config.json")) if name in ("name", "model", "model_id") else None
    )
