"""The smallest Serve application that the bring-up can deploy."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

api = FastAPI()


@serve.deployment(num_replicas=1, ray_actor_options={"num_cpus": 0})
@serve.ingress(api)
class Trivial:
    @api.get("/health")
    def health(self) -> dict[str, str]:
        return {"status": "ok"}


def build_app(_settings: Any) -> Any:
    return Trivial.bind()
