"""The HTTP application: :func:`create_api` without Ray, :func:`build_app` as a Ray Serve application.

``serve run serve.app:app`` serves the installation that the environment describes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any

from fastapi import Depends, FastAPI

from aidocks._version import __version__
from aidocks.access.local import make_admin_key, warn_of_open_door
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from aidocks.remote import beside_the_store
from aidocks.settings import Settings
from serve.context import Context, problem_response
from serve.document import describe
from serve.door import Door
from serve.gate import MAX_BODY_BYTES, MAX_FILE_BYTES, Gate
from serve.ownership import require_own_job
from serve.pages import add_pages
from serve.problems import handle_problems
from serve.retrieval.deployment import ComputeLink, NoCompute, ServeCompute, retrieval_application
from serve.retrieval.waiting import MOST_WAITING_REQUESTS
from serve.routes import datasets, health, jobs, keys, models, openai, retrieve, uploads
from serve.routes.operations import operations_router
from serve.sse import MAX_STREAMS
from serve.supervision import NoSupervisor, SupervisorLink

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("serve.app")

DESCRIPTION = """\
Optimise, combine and publish open-weight language models.

`POST` to an operation answers `202` with a **job**; `GET /jobs/{id}/events` follows it; what it makes is a
**model** of the registry. Every error is problem details (RFC 9457) with a stable `code`.
"""


def create_api(
    settings: Settings,
    supervisor: SupervisorLink | None = None,
    *,
    compute: ComputeLink | None = None,
    returns_request_id: bool = True,
) -> FastAPI:
    """Return the application for one installation. It needs neither Ray nor torch.

    Args:
        settings: Of the installation.
        supervisor: Woken after each submission. Default: nobody; jobs wait in the store.
        compute: Computes vectors and scores. Default: nobody; who asks for them is told so.
        returns_request_id: Put ``x-request-id`` into the answers; not where the server does so itself.
    """
    context = Context(
        settings,
        JobStore(settings.store_url),
        Registry(settings.models_dir),
        supervisor or NoSupervisor(),
        compute or NoCompute(),
    )
    api = FastAPI(
        title="AIDocks",
        version=__version__,
        summary="A compute service for open-weight language models.",
        description=DESCRIPTION,
        docs_url=None,
        redoc_url=None,
        lifespan=_lifespan(context),
        generate_unique_id_function=lambda route: route.name,
        responses={"default": problem_response("Any other error.")},
    )
    api.state.context = context
    # Routes in the order of how often they are asked for.
    for router in (
        health.router,
        retrieve.router,
        jobs.router,
        operations_router(),
        models.router,
        datasets.router,
        uploads.router,
        openai.router,
        keys.router,
    ):
        api.include_router(router, dependencies=[Depends(require_own_job)])
    add_pages(api)
    handle_problems(api)
    _guard(api, context, returns_request_id)
    document: dict[str, Any] = {}

    def openapi() -> dict[str, Any]:
        return document or document.update(describe(api)) or document

    api.openapi = openapi  # type: ignore[method-assign]
    return api


def _guard(api: FastAPI, context: Context, returns_request_id: bool) -> None:
    """Put the gate before the application, with what bodies may have on each path."""
    settings = context.settings
    # A form is a little larger than the file in it.
    upload = min(settings.max_upload_bytes, MAX_FILE_BYTES) + MAX_BODY_BYTES
    api.add_middleware(
        Gate,
        door=Door(settings, context.keys),
        trail=context.trail,
        allowed_hosts=_host_names(settings),
        returns_request_id=returns_request_id,
        max_upload_bytes={"/datasets": upload, "/v1/files": upload} | retrieve.MAX_BYTES,
    )


def _lifespan(context: Context) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Return what happens before the first request and after the last."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(_prepare_door, context)
        tasks = [asyncio.create_task(work) for work in (context.readiness.watch(), context.trail.keep())]
        await asyncio.to_thread(context.datasets.sweep)
        yield
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        context.close()

    return lifespan


def _prepare_door(context: Context) -> None:
    """Make the administrator's key where keys are asked for; say where everybody is let in."""
    if not context.settings.open_to_all:
        make_admin_key(context.settings, context.keys)
    elif warning := warn_of_open_door(context.settings):
        log.warning("%s", warning)


def build_app(settings: Settings) -> Application:
    """Return the Ray Serve application for one installation.

    The API is built in the replica, from the settings as plain data: nothing of it has to be picklable.
    """
    from ray import serve

    # The key is the caller's own.
    values = settings.model_dump(mode="json", exclude={"api_key"})

    def build() -> FastAPI:
        from aidocks.log import log_to_file
        from serve.supervision import RaySupervisor
        from serve.traffic import measure_requests

        here = Settings(**values)
        log_to_file(here, "http.log")
        measure_requests()
        return create_api(here, RaySupervisor(here), compute=ServeCompute(), returns_request_id=False)

    deployment = serve.deployment(
        name="http",
        num_replicas=settings.http_replicas,
        ray_actor_options={"num_cpus": 0, "resources": beside_the_store(settings)},
        # Those that wait for a model, event streams, and room for all others beside them.
        max_ongoing_requests=MOST_WAITING_REQUESTS + MAX_STREAMS + 80,
        health_check_period_s=2,
        health_check_timeout_s=10,
        # Streams never end by themselves; their readers connect again.
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
        # The gate writes one, with more in it.
        logging_config={"enable_access_log": False},
    )
    application: Application = deployment(serve.ingress(build)()).bind(retrieval_application(settings))
    return application


def _host_names(settings: Settings) -> set[str]:
    # Whoever watches over the service asks on this machine; an address that it listens on is its own.
    own = {"127.0.0.1", "localhost", "::1", settings.host} - {"0.0.0.0", "::"}  # noqa: S104 - not bound
    return {*settings.allowed_hosts, *(f"[{host}]" if ":" in host else host for host in own)}


def __getattr__(name: str) -> Any:
    if name == "app":
        return build_app(Settings())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
