"""``python -m cluster.deploy APPLICATION``: connect to the head, create the supervisor, deploy HTTP.

A process of its own, in the service's environment: Ray reads that environment when it is imported. It imports
Ray and Serve while the head is still starting, and reports each phase as one line of JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from importlib import import_module

from aidocks.remote import NAMESPACE, ensure_supervisor
from aidocks.settings import Settings

APP_NAME = "api"
CONNECT_S = 60.0
_BEGIN = time.monotonic()


def deploy(application: str) -> None:
    """Bring the service up on the cluster at ``RAY_ADDRESS``.

    Args:
        application: Import string of a function of the settings that returns the Serve application.
    """
    settings = Settings()
    import ray
    from ray import serve
    from ray.serve.config import HTTPOptions

    module, _, name = application.partition(":")
    build = getattr(import_module(module), name)
    _report("imported")
    _wait_for_head(os.environ["RAY_ADDRESS"])
    ray.init(namespace=NAMESPACE, log_to_driver=False, configure_logging=False)
    _report("connected")
    supervisor = ensure_supervisor(settings)
    serve.start(proxy_location="EveryNode", http_options=HTTPOptions(host=settings.host, port=settings.port))
    _report("serve started")
    serve.run(build(settings), name=APP_NAME, route_prefix="/")
    _report("application deployed")
    ray.get(supervisor.ping.remote(), timeout=CONNECT_S)
    _report("supervisor up")


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


def _report(phase: str) -> None:
    line = {"phase": phase, "seconds": round(time.monotonic() - _BEGIN, 2)}
    print(json.dumps(line), flush=True)  # noqa: T201 - this process's only output


if __name__ == "__main__":
    deploy(sys.argv[1])
