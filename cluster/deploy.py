"""``python -m cluster.deploy APPLICATION``: connect to the head, create the supervisor, deploy HTTP.

A process of its own, in the service's environment: Ray reads that environment when it is imported. Onto the embedded
head it imports Ray and Serve while the head is still starting. Onto a cluster that is there (``--existing``) it first
looks whether the cluster lets anybody in, and whether the same is there already. It reports each phase as one
line of JSON, and a refusal in the same way.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from aidocks._root import service_root
from aidocks.errors import AIDocksError, NotPermitted, ServiceUnreachable
from aidocks.remote import NAMESPACE, ON_THE_HEAD, SUPERVISOR, ensure_supervisor, origin
from aidocks.settings import Settings

APP_NAME = "api"
CONNECT_S = 60.0
_BEGIN = time.monotonic()
#: Where phases go. What libraries print goes into the log with everything else.
_reports = 1


def deploy(application: str) -> None:
    """Bring the service up on the embedded head at ``RAY_ADDRESS``.

    Args:
        application: Import string of a function of the settings that returns the Serve application.
    """
    settings = Settings()
    import ray

    build = _builder(application)
    _wait_for_head(os.environ["RAY_ADDRESS"])
    ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    _report("connected")
    _bring_up(settings, build)


def deploy_onto(application: str, *, allow_no_token: bool) -> None:
    """Bring the service up, or up to date, on a cluster that others have started.

    Args:
        application: As above.
        allow_no_token: Also on a cluster that runs the code of whoever reaches its ports.

    Raises:
        ServiceUnreachable: No cluster answers there.
        NotPermitted: It asks for a token that this process has not, or asks nobody for one.
    """
    settings = Settings()
    build = _builder(application)
    with connected(settings):
        import ray

        if not (allow_no_token or _asks_for_a_token()):
            raise NotPermitted(
                "This Ray cluster runs the code of whoever reaches its ports.",
                hint="Start it with RAY_AUTH_MODE=token and a token (docs/cluster.md), or, in a network that nobody "
                "else can reach, say --allow-no-token.",
            )
        context = ray.get_runtime_context()
        dashboard = ray._private.worker.global_worker.node.address_info.get("webui_url") or ""
        _report("connected", ray_address=context.gcs_address, dashboard=f"http://{dashboard}")
        if _is_current(settings) and _is_running():
            _report("up to date already")
        else:
            _bring_up(settings, build)


def remove() -> None:
    """Take our application and the supervisor down; what else runs on the cluster is not touched.

    Raises:
        ServiceUnreachable: No cluster answers there.
    """
    with connected(Settings()):
        import ray
        from ray import serve

        _report("connected")
        serve.delete(APP_NAME)
        _report("application removed")
        try:
            ray.kill(ray.get_actor(SUPERVISOR, namespace=NAMESPACE), no_restart=True)
        except ValueError:
            return
        _report("supervisor removed")


@contextmanager
def connected(settings: Settings) -> Iterator[None]:
    """Be a driver of the cluster at ``RAY_ADDRESS`` (or ``auto``) for a while."""
    import ray

    # The nodes have the same installation, though perhaps nothing that says so in their environment. Ray shows this to
    # whoever may look at its dashboard; who needs the store gets its URL otherwise.
    variables = {
        name: value for name, value in settings.environment().items() if name != "AIDOCKS_DATABASE_URL"
    }
    variables["PYTHONPATH"] = f"{service_root()}:${{PYTHONPATH}}"
    address = os.environ["RAY_ADDRESS"]
    try:
        if address != "auto":  # Ray would ask for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(
            address=address,
            namespace=NAMESPACE,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": variables},
        )
    except (OSError, ValueError) as error:
        raise ServiceUnreachable(
            f"No Ray cluster answers at {address}.",
            hint="Run this on the cluster's head, where `ray status` answers, or name its address.",
        ) from error
    except ray.exceptions.AuthenticationError as error:
        raise NotPermitted(
            "The Ray cluster asks for its token.",
            hint="Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the token's file.",
        ) from error
    yield
    ray.shutdown()


def _builder(application: str) -> Callable[[Settings], Any]:
    module, _, name = application.partition(":")
    build: Callable[[Settings], Any] = getattr(import_module(module), name)
    _report("imported")
    return build


def _bring_up(settings: Settings, build: Callable[[Settings], Any]) -> None:
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    supervisor = ensure_supervisor(settings)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=settings.host, port=settings.port))
    _report("serve started")
    serve.run(build(settings), name=APP_NAME, route_prefix="/")
    _report("application deployed")
    ray.get(supervisor.ping.remote(), timeout=CONNECT_S)
    _report("supervisor up")


def _asks_for_a_token() -> bool:
    """Ask the head, whose processes were started as the cluster's were."""
    import ray

    def asks() -> bool:
        from ray._raylet import AuthenticationMode, get_authentication_mode

        return bool(get_authentication_mode() != AuthenticationMode.DISABLED)

    asking = ray.remote(num_cpus=0, resources=ON_THE_HEAD)(asks)
    return bool(ray.get(asking.remote(), timeout=CONNECT_S))


def _is_current(settings: Settings) -> bool:
    """Say whether the cluster has a supervisor of this version and these settings; end one that is of others.

    Its jobs go on with the next one.
    """
    import ray

    try:
        supervisor = ray.get_actor(SUPERVISOR, namespace=NAMESPACE)
    except ValueError:
        return False
    try:
        current = ray.get(supervisor.origin.remote(), timeout=CONNECT_S)
    except (ray.exceptions.RayError, AttributeError):  # it is gone, or of a version that could not say so
        current = None
    if current == origin(settings):
        return True
    ray.kill(supervisor, no_restart=True)
    deadline = time.monotonic() + CONNECT_S
    while _is_there(SUPERVISOR) and time.monotonic() < deadline:
        time.sleep(0.05)
    _report("outdated supervisor removed")
    return False


def _is_running() -> bool:
    """Say whether the application is there and well."""
    from ray import serve

    application = serve.status().applications.get(APP_NAME)
    return application is not None and application.status == "RUNNING"


def _is_there(name: str) -> bool:
    import ray

    try:
        ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return False
    return True


def _wait_for_head(address: str) -> None:
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + CONNECT_S
    while True:
        try:
            socket.create_connection((host, int(port)), timeout=1).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _report(phase: str, **facts: str) -> None:
    line = {"phase": phase, "seconds": round(time.monotonic() - _BEGIN, 2)} | facts
    os.write(_reports, json.dumps(line).encode() + b"\n")


def main() -> int:
    """Read the command line and do what it says; the exit code is 3 when that was refused."""
    parser = argparse.ArgumentParser(prog="cluster.deploy")
    parser.add_argument("application", help="import string of the function that makes the Serve application")
    parser.add_argument("--existing", action="store_true", help="onto a cluster that others have started")
    parser.add_argument("--allow-no-token", action="store_true")
    parser.add_argument("--remove", action="store_true", help="take the service down instead")
    parser.add_argument("--temp-dir", help="by which the processes of an embedded service are known")
    given = parser.parse_args()
    global _reports
    _reports = os.dup(1)
    os.dup2(2, 1)
    try:
        if given.remove:
            remove()
        elif given.existing:
            deploy_onto(given.application, allow_no_token=given.allow_no_token)
        else:
            deploy(given.application)
    except AIDocksError as error:
        _report("refused", message=error.message, hint=error.hint or "")
        return 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
