"""Where the files are that bring the service up on machines, and what is in them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
KUBERAY = ROOT / "cluster" / "kuberay"
DOCKER = ROOT / "cluster" / "docker"
RAY_UP = (ROOT / "ray-cluster.yaml", ROOT / "ray-cluster-local.yaml")
COMPOSE = DOCKER / "docker-compose.yml"
RAY_KINDS = (KUBERAY / "raycluster.yaml", KUBERAY / "rayservice.yaml")
EXAMPLE_ENV = ROOT / "cluster" / "aidocks.env.example"
ALL = (*RAY_UP, COMPOSE, EXAMPLE_ENV, *sorted(KUBERAY.glob("*.yaml")), *sorted(DOCKER.glob("Dockerfile*")))


def load(path: Path) -> Any:
    """Return the only document of a file."""
    (document,) = load_all(path)
    return document


def load_all(path: Path) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def ray_cluster(path: Path) -> dict[str, Any]:
    """Return the specification of the Ray cluster in one of KubeRay's kinds."""
    spec: dict[str, Any] = load(path)["spec"]
    return spec.get("rayClusterConfig", spec)


def groups(path: Path) -> list[dict[str, Any]]:
    """Return all groups of pods of a Ray cluster, the head's first."""
    spec = ray_cluster(path)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def containers(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the image and the environment, as far as it is in the file, of every container in it."""
    if path == COMPOSE:
        for service in load(path)["services"].values():
            yield service["image"], dict(service.get("environment", {}))
    elif path in RAY_KINDS:
        for group in groups(path):
            for container in group["template"]["spec"]["containers"]:
                yield container["image"], {variable["name"]: variable for variable in container["env"]}
