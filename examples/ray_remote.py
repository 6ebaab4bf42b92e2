"""An operation as a Ray task, from a driver that is connected to the service's cluster.

python examples/ray_remote.py MODEL [NAME]
"""

from __future__ import annotations

import sys

from aidocks import remote


def main(model: str, name: str) -> None:
    remote.connect()  # before anything imports ray: it reads its environment then
    import ray

    # Small numbers, so that the example takes seconds; leave the last three out for real work.
    spec = {"base_model_name": model, "laser_model_name": name, "candidates": 2, "chunks": 8, "seqlen": 32}
    task = remote.laser.remote(spec)  # a job of the service; the task waits for it
    result = ray.get(task)
    print(result.model, result.path, f"{result.seconds:.1f} s")


if __name__ == "__main__":
    model = sys.argv[1]
    main(model, sys.argv[2] if len(sys.argv) > 2 else f"{model}-ray")
