"""The manifests for Kubernetes: valid kinds, valid pods within Ray's kinds, names that fit each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.cluster_files import KUBERAY, RAY_KINDS, groups, load, load_all, ray_cluster

kubernetes_validate = pytest.importorskip("kubernetes_validate")
VERSION = "1.32"
OTHERS = ("pvc.yaml", "redis.yaml", "networkpolicy.yaml", "secrets.example.yaml")


def validate(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("name", OTHERS)
def test_kinds_are_valid(name: str) -> None:
    for document in load_all(KUBERAY / name):
        validate(document)


@pytest.mark.parametrize("path", RAY_KINDS, ids=lambda path: path.name)
def test_pods_within_rays_kinds_are_valid(path: Path) -> None:
    for group in groups(path):
        template = group["template"]
        metadata = template["metadata"] | {"name": "pod"}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]})


@pytest.mark.parametrize("path", RAY_KINDS, ids=lambda path: path.name)
def test_pods_run_with_as_little_as_possible(path: Path) -> None:
    for group in groups(path):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] == 10001, "the user of the image"
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            limits = container["resources"]["limits"]
            assert limits["memory"] == container["resources"]["requests"]["memory"]
            assert "cpu" in limits, "Ray counts by the limits"


@pytest.mark.parametrize("path", RAY_KINDS, ids=lambda path: path.name)
def test_pods_share_what_they_must(path: Path) -> None:
    first, *rest = (group["template"]["spec"] for group in groups(path))
    for pod in rest:
        assert pod["containers"][0]["env"] == first["containers"][0]["env"]
        assert pod["containers"][0]["volumeMounts"] == first["containers"][0]["volumeMounts"]
        assert pod["volumes"] == first["volumes"]
    (claim,) = [
        volume["persistentVolumeClaim"] for volume in first["volumes"] if "persistentVolumeClaim" in volume
    ]
    assert claim["claimName"] == load(KUBERAY / "pvc.yaml")["metadata"]["name"]
    home = {variable["name"]: variable.get("value") for variable in first["containers"][0]["env"]}[
        "AIDOCKS_HOME"
    ]
    assert home in {mount["mountPath"] for mount in first["containers"][0]["volumeMounts"]}


def test_both_ways_make_the_same_cluster() -> None:
    alone, watched = (ray_cluster(path) for path in RAY_KINDS)
    container = alone["headGroupSpec"]["template"]["spec"]["containers"][0]
    deploying = container.pop("lifecycle")["postStart"]["exec"]["command"][-1]
    assert "aidocks up --ray-address auto" in deploying
    assert alone == watched


def test_secrets_that_are_asked_for_exist() -> None:
    secrets = {
        document["metadata"]["name"]: set(document["stringData"])
        for document in load_all(KUBERAY / "secrets.example.yaml")
    }
    for path in sorted(KUBERAY.glob("*.yaml")):
        for document in load_all(path):
            for reference in find(document, "secretKeyRef"):
                assert reference.get("optional") or reference["key"] in secrets[reference["name"]]
    for path in RAY_KINDS:
        assert "auth_token" in secrets[ray_cluster(path)["authOptions"]["secretName"]]
    # What a person has not changed must not work by accident.
    values = [
        value
        for document in load_all(KUBERAY / "secrets.example.yaml")
        for value in document["stringData"].values()
    ]
    assert all("CHANGE" in value for value in values)


def test_the_head_finds_redis() -> None:
    service, stateful = load_all(KUBERAY / "redis.yaml")
    (port,) = service["spec"]["ports"]
    for path in RAY_KINDS:
        address = ray_cluster(path)["gcsFaultToleranceOptions"]["redisAddress"]
        assert address == f"{service['metadata']['name']}:{port['port']}"
    labels = stateful["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"].items() <= labels.items()
    ours, redis = load_all(KUBERAY / "networkpolicy.yaml")
    assert redis["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    for path in RAY_KINDS:
        for group in groups(path):
            selected = ours["spec"]["podSelector"]["matchLabels"]
            assert selected.items() <= group["template"]["metadata"]["labels"].items()


def test_serve_is_told_what_the_service_is() -> None:
    from importlib import import_module

    config = yaml.safe_load(load(KUBERAY / "rayservice.yaml")["spec"]["serveConfigV2"])
    assert config["http_options"] == {"host": "0.0.0.0", "port": 8723}
    (application,) = config["applications"]
    from cluster.deploy import APP_NAME

    assert application["name"] == APP_NAME
    module, _, name = application["import_path"].partition(":")
    assert name in dir(import_module(module)) or hasattr(import_module(module), "__getattr__")


def test_the_version_of_ray_is_ours() -> None:
    constraints = (KUBERAY.parents[1] / "constraints.txt").read_text()
    (version,) = re.findall(r"^ray(?:\[.*\])?==(\S+)$", constraints, re.MULTILINE)
    for path in RAY_KINDS:
        assert ray_cluster(path)["rayVersion"] == version


def test_kustomize_takes_what_is_there() -> None:
    resources = load(KUBERAY / "kustomization.yaml")["resources"]
    assert all((KUBERAY / name).is_file() for name in resources)
    assert "raycluster.yaml" not in resources, "one of the two"
    if shutil.which("kubectl"):
        done = subprocess.run(["kubectl", "kustomize", KUBERAY], capture_output=True, text=True, check=False)
        if "unknown command" not in done.stderr:
            assert done.returncode == 0, done.stderr


def find(node: object, key: str) -> list[Any]:
    if isinstance(node, dict):
        here = [node[key]] if key in node else []
        return here + [found for value in node.values() for found in find(value, key)]
    return [found for value in node for found in find(value, key)] if isinstance(node, list) else []
