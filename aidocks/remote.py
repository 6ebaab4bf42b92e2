"""The Ray door: ``remote.laser.remote(spec)`` from any driver that is connected to the service's cluster.

One remote function for each registered operation, under its name with underscores::

    import ray
    from aidocks import remote

    remote.connect()
    result = ray.get(remote.laser.remote({"model": "smollm2", ...}))

The function submits a job, waits for its end and returns the operation's typed result; it raises JobFailed or
JobCancelled. It takes no CPU of the cluster, and Ray may run it again after a crash without submitting twice.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from aidocks._version import __version__
from aidocks.errors import AIDocksError, JobCancelled, JobFailed, NotFound, ServiceUnreachable
from aidocks.operations import OPERATIONS, find_operation

if TYPE_CHECKING:
    from aidocks.settings import Settings
    from aidocks.specs.base import OperationResult, Spec

SUPERVISOR = "aidocks-supervisor"
NAMESPACE = "aidocks"
POLL_S = 0.5
#: A sliver of a resource that the cluster's head has and no other node.
ON_THE_HEAD = {"node:__internal_head__": 0.001}


class SupervisorActor:
    """The class whose actor handles users may hold; its implementation is imported where the actor runs.

    Ray imports an actor's class by module name in the *caller*. Were it ``cluster.supervisor``, a user's own
    ``cluster.py`` would be executed in its place.

    Args:
        settings: Of the installation, as plain data.
        implementation: Import string of the class that does the work.
    """

    def __init__(
        self, settings: dict[str, Any], implementation: str = "cluster.supervisor:Supervisor"
    ) -> None:
        from aidocks.settings import Settings

        self._origin = origin(Settings(**settings))
        module, _, name = implementation.partition(":")
        self._implementation = getattr(import_module(module), name)(Settings(**settings))

    def origin(self) -> dict[str, Any]:
        """Return version and settings, by which a deployment tells whether this is what it would make."""
        return self._origin

    def wake(self) -> None:
        """Look for new jobs now rather than at the next poll."""
        self._implementation.wake()

    def ping(self) -> dict[str, Any]:
        """Return process id, token, jobs and workers."""
        return dict(self._implementation.ping())

    def submit(
        self,
        operation: str,
        spec: dict[str, Any],
        idempotency_key: str | None = None,
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> dict[str, Any]:
        """Submit a job and return it as JSON."""
        return dict(self._implementation.submit(operation, spec, idempotency_key, priority, timeout_s))

    def job(self, job_id: str) -> dict[str, Any]:
        """Return a job as JSON."""
        return dict(self._implementation.job(job_id))

    def cancel(self, job_id: str) -> dict[str, Any]:
        """Ask for a job to be cancelled and return it as JSON."""
        return dict(self._implementation.cancel(job_id))


def connect(settings: Settings | None = None, *, address: str | None = None) -> None:
    """Connect this process, as a Ray driver, to the service's cluster.

    Which one it is: ``address``; without it the cluster of the service that ``aidocks up`` has started or deployed from
    this data directory; without that ``RAY_ADDRESS``, as everywhere in Ray. A cluster asks for its token
    (``RAY_AUTH_MODE=token`` and ``RAY_AUTH_TOKEN_PATH``); to ours that comes along.

    Call it before anything else imports ray: Ray reads its environment when it is imported.

    Args:
        settings: Of the installation.
        address: ``ray://host:10001`` from outside of a cluster, ``auto`` or ``host:6379`` on one of its nodes.

    Raises:
        ServiceUnreachable: There is no cluster, or it does not answer, or not to this token.
    """
    if address is None:
        address = _address_at_hand(settings)
    import ray

    try:
        ray.init(address, namespace=NAMESPACE, log_to_driver=False, ignore_reinit_error=True)
    except (ConnectionError, ray.exceptions.AuthenticationError) as error:
        raise ServiceUnreachable(
            f"The cluster does not answer at {address}: {str(error).strip().splitlines()[0]}",
            hint="Is it up, and is this its token (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN_PATH)?",
        ) from error


def _address_at_hand(settings: Settings | None) -> str:
    """Return the address of this installation's own cluster, of which the environment is taken over, or Ray's."""
    from aidocks.settings import Settings

    settings = settings or Settings()
    try:
        environment: dict[str, str] = json.loads(settings.state_file.read_text())["environment"]
    except (OSError, ValueError, KeyError):
        if address := os.environ.get("RAY_ADDRESS"):
            return address
        raise ServiceUnreachable(
            f"No service of {settings.home} is running on this machine.",
            hint="Start it (aidocks up), or name its cluster: RAY_ADDRESS=ray://host:10001.",
        ) from None
    late = [name for name in environment if "ADDRESS" not in name and name not in os.environ]
    if late and "ray" in sys.modules:
        raise ServiceUnreachable(
            f"Ray was imported before {', '.join(late)} could be set.",
            hint='Call remote.connect() before "import ray", or set them before: eval "$(aidocks env)".',
        )
    os.environ.update(environment)
    return environment["RAY_ADDRESS"]


def supervisor() -> Any:
    """Return the handle of the service's supervisor (a :class:`SupervisorActor`).

    Raises:
        ServiceUnreachable: This process is not connected to a cluster on which the service runs.
    """
    import ray

    try:
        return ray.get_actor(SUPERVISOR, namespace=NAMESPACE)
    except (ValueError, ray.exceptions.RaySystemError) as error:
        raise ServiceUnreachable(
            "The cluster has no AIDocks supervisor.",
            hint="Connect to the service's cluster (`aidocks status` shows how), or start it: aidocks up.",
        ) from error


def beside_the_store(settings: Settings) -> dict[str, float]:
    """Return the resources that keep an actor where the job store can be opened: SQLite's file on the head alone."""
    return dict(ON_THE_HEAD) if settings.store_url.startswith("sqlite") else {}


def origin(settings: Settings) -> dict[str, Any]:
    """Return what makes one supervisor another than the next: the version, and the settings as plain data."""
    return {"version": __version__, "settings": settings.model_dump(mode="json", exclude={"api_key"})}


def ensure_supervisor(settings: Settings) -> Any:
    """Return the handle of the cluster's supervisor, which is made when there is none.

    Args:
        settings: Of the installation that a new one would supervise.
    """
    import ray

    options = {
        "name": SUPERVISOR,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "get_if_exists": True,
        "max_restarts": -1,
        "max_task_retries": -1,
        "max_concurrency": 16,
        "num_cpus": 0,
        "resources": beside_the_store(settings),
    }
    actor = ray.remote(SupervisorActor).options(**options)
    return actor.remote(settings.model_dump(mode="json", exclude={"api_key"}))


def run_operation(
    operation: str,
    spec: Mapping[str, Any],
    idempotency_key: str | None,
    *,
    priority: int = 0,
    timeout_s: float | None = None,
) -> OperationResult:
    """Submit a job through the supervisor, wait for its end, and return the typed result.

    Args:
        operation: Registered name, also with underscores.
        spec: The request.
        idempotency_key: The same key and spec within 24 hours are the same job.
        priority: -10 to 10; jobs of a higher one get the workers first.
        timeout_s: Seconds after its start at which the job is ended as failed. Default: it takes its time.

    Raises:
        JobFailed: With the failure's problem details.
        JobCancelled: The job was cancelled.
        AIDocksError: The request was refused.
    """
    registration = find_operation(operation)
    actor = supervisor()
    job = _call(actor.submit, registration.name, dict(spec), idempotency_key, priority, timeout_s)
    try:
        while job["status"] in ("queued", "running"):
            time.sleep(POLL_S)
            job = _call(actor.job, job["id"])
    except KeyboardInterrupt:  # what ray.cancel raises here
        _call(actor.cancel, job["id"])
        raise
    if job["status"] == "cancelled":
        raise JobCancelled(f"The job {job['id']} was cancelled.")
    if job["status"] == "failed":
        detail = (job["error"] or {}).get("detail", "unknown reason")
        raise JobFailed(f"The job {job['id']} failed: {detail}", hint=(job["error"] or {}).get("hint"))
    return registration.load().read_result(job["result"])


def _call(method: Any, *arguments: Any) -> dict[str, Any]:
    import ray

    try:
        return dict(ray.get(method.remote(*arguments)))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, AIDocksError):
            raise error.cause from None
        raise


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        registration = find_operation(name)
    except NotFound:
        known = ", ".join(registration.method for registration in OPERATIONS)
        raise AttributeError(f"aidocks.remote has no operation {name!r}; it has {known}") from None
    return _remote_function(registration.name)


def __dir__() -> list[str]:
    return sorted([*globals(), *(registration.method for registration in OPERATIONS)])


@cache
def _remote_function(operation: str) -> Any:
    import ray

    def run(
        spec: Spec | Mapping[str, Any], *, priority: int = 0, timeout_s: float | None = None
    ) -> OperationResult:
        # A task keeps its id when Ray runs it again.
        key = f"ray-{ray.get_runtime_context().get_task_id()}"
        body = spec if isinstance(spec, Mapping) else spec.model_dump(mode="json")
        return run_operation(operation, body, key, priority=priority, timeout_s=timeout_s)

    run.__name__ = run.__qualname__ = find_operation(operation).method
    run.__doc__ = find_operation(operation).summary
    return ray.remote(num_cpus=0, max_retries=-1)(run)
