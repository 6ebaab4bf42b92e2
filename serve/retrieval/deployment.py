"""The processes that compute vectors and scores: a Ray Serve deployment, and the way to it.

There is none until somebody asks, and none when nobody has asked for a while: memory and GPU belong to the jobs then.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Protocol

from aidocks.errors import AIDocksError, ServiceUnreachable
from aidocks.retrieval.serving import Call, ModelsAtHand, Reply
from aidocks.settings import Settings

if TYPE_CHECKING:
    from ray.serve import Application

NAME = "retrieval"
#: A call that takes longer is given up: the process hangs, or has too little memory and swaps.
CALL_TIMEOUT_S = 600.0

log = logging.getLogger("serve.retrieval")


class ComputeLink(Protocol):
    """Whoever computes calls."""

    async def compute(self, call: Call) -> Reply:
        """Compute a call.

        Raises:
            AIDocksError: What kept it from being computed.
        """


class NoCompute:
    """Stands in where nobody computes: the application without Ray."""

    async def compute(self, call: Call) -> Reply:
        raise ServiceUnreachable(
            "This service has no processes for models that find texts.", hint="Start it with `aidocks up`."
        )


class ServeCompute:
    """The deployment of the application that this process is a replica of."""

    def __init__(self) -> None:
        self._handle: Any = None

    async def compute(self, call: Call) -> Reply:
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        try:
            reply = await asyncio.wait_for(self._resolve().compute.remote(call), CALL_TIMEOUT_S)
        except RayTaskError as error:
            if isinstance(error.cause, AIDocksError):
                raise error.cause from None
            raise
        except TimeoutError:
            raise ServiceUnreachable(
                f"{call.recipe.retriever.name} did not answer within {CALL_TIMEOUT_S:.0f} s.",
                hint="Is the machine short of memory or busy with a training, or has it no GPU that is free "
                "(AIDOCKS_SERVING_GPUS)?",
            ) from None
        except (RayError, RayServeException) as error:
            log.exception("the process that computes has died")
            raise ServiceUnreachable(
                f"The process that computed with {call.recipe.retriever.name} has died.",
                hint="Another one takes its place. If it dies again, the model needs more memory than there is.",
            ) from error
        assert isinstance(reply, Reply)
        return reply

    def _resolve(self) -> Any:
        if self._handle is None:
            from ray import serve

            self._handle = serve.get_deployment_handle(NAME, serve.get_replica_context().app_name)
        return self._handle


class RetrievalReplica:
    """What runs in a process of the deployment: one call at a time, in a thread beside the event loop.

    Args:
        values: The settings, as plain data.
    """

    def __init__(self, values: dict[str, Any]) -> None:
        settings = Settings(**values)
        # Ray has set what the process may see; without a GPU of its own that is the processor.
        device = None if settings.serving_gpus else "cpu"
        self._models = ModelsAtHand(settings.serving_memory_bytes, device)
        # One thread, always the same: torch's settings of threads belong to it.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="retrieval")
        self._since: float | None = None

    async def compute(self, call: Call) -> Reply:
        """Compute a call; as :meth:`~aidocks.retrieval.serving.ModelsAtHand.compute`."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._run, call)

    def check_health(self) -> None:
        """Have Ray Serve replace this process when it computes something of which nobody waits for the end.

        Raises:
            RuntimeError: A call takes longer than anybody waits.
        """
        since = self._since
        if since is not None and time.monotonic() - since > CALL_TIMEOUT_S:
            raise RuntimeError(f"a call has taken more than {CALL_TIMEOUT_S:.0f} s")

    def _run(self, call: Call) -> Reply:
        self._since = time.monotonic()
        try:
            return self._models.compute(call)
        finally:
            self._since = None


def retrieval_application(settings: Settings) -> Application:
    """Return the deployment for one installation, to be bound to the HTTP one."""
    from ray import serve

    options = {"num_cpus": 0, "num_gpus": settings.serving_gpus}
    scaling = {
        "min_replicas": 0,
        "max_replicas": settings.serving_replicas,
        "target_ongoing_requests": 1,
        "upscale_delay_s": 5,
        "downscale_delay_s": settings.serving_idle_s,
        "downscale_to_zero_delay_s": settings.serving_idle_s,
    }
    deployment = serve.deployment(
        name=NAME,
        ray_actor_options=options,
        autoscaling_config=scaling,
        # One is computed, one is ready beside it.
        max_ongoing_requests=2,
        health_check_period_s=10,
        # A forward pass on many threads keeps the loop waiting for its turn; a large model is loaded meanwhile, too.
        health_check_timeout_s=120,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.5,
    )(RetrievalReplica)
    application: Application = deployment.bind(settings.model_dump(mode="json"))
    return application
