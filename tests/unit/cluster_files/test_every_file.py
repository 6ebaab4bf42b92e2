"""What all files that bring the service up have in common: settings that exist, one port, one image, a token."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidocks.settings import DEFAULT_PORT, Settings
from cluster.head import HEALTH_CHECKS
from tests.support.cluster_files import (
    ALL,
    COMPOSE,
    EXAMPLE_ENV,
    KUBERAY,
    RAY_KINDS,
    RAY_UP,
    ROOT,
    containers,
    groups,
    load,
    load_all,
    ray_cluster,
)

NAMES = {f"AIDOCKS_{name.upper()}" for name in Settings.model_fields}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_settings_exist(path: Path) -> None:
    assert set(re.findall(r"\bAIDOCKS_[A-Z_]+", path.read_text())) <= NAMES


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_values_of_settings_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in literals(path):
        monkeypatch.setenv(name, value)
        Settings()
        if name == "AIDOCKS_PORT":
            assert value == str(DEFAULT_PORT)


def literals(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the settings whose value is in the file."""
    if path == EXAMPLE_ENV:
        yield from re.findall(r"^#?(AIDOCKS_\w+)=(.+)$", path.read_text(), re.MULTILINE)
    elif path.name.startswith("Dockerfile"):
        yield from re.findall(r"\b(AIDOCKS_\w+)=(\S+)", path.read_text())
    else:
        for _, environment in containers(path):
            for name, value in environment.items():
                text = value.get("value") if isinstance(value, dict) else value
                if name in NAMES and text:
                    yield name, text


def test_health_checks_agree() -> None:
    """A node that is lost is noticed after the same time everywhere."""
    wanted = HEALTH_CHECKS | {"RAY_gcs_rpc_server_reconnect_timeout_s": "600"}
    example = dict(re.findall(r"^(RAY_\w+)=(\w+)$", EXAMPLE_ENV.read_text(), re.MULTILINE))
    assert wanted.items() <= example.items()
    for path in RAY_KINDS:
        for _, environment in containers(path):
            assert {name: environment[name]["value"] for name in wanted} == wanted
    for name in ("head", "worker"):
        assert wanted.items() <= load(COMPOSE)["services"][name]["environment"].items()


def test_one_image() -> None:
    images = {image for path in (*RAY_KINDS, COMPOSE) for image, _ in containers(path)}
    images.add(load(RAY_UP[0])["docker"]["image"])
    assert {image for image in images if image.startswith("aidocks")} == {"aidocks:latest"}
    others = images - {"aidocks:latest"}
    assert all(re.search(r":\d+\.?\d*", image) for image in others), "what is not ours has a version"


def test_the_service_has_one_port() -> None:
    for path in (COMPOSE, *RAY_KINDS, KUBERAY / "networkpolicy.yaml"):
        assert str(DEFAULT_PORT) in path.read_text()
    for dockerfile in (ROOT / "cluster" / "docker").glob("Dockerfile*"):
        assert f"EXPOSE {DEFAULT_PORT}\n" in dockerfile.read_text()
        assert f"127.0.0.1:{DEFAULT_PORT}/health" in dockerfile.read_text()


def test_a_token_is_asked_for_everywhere() -> None:
    for path in RAY_UP:
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            starting = [line for line in load(path)[commands] if "ray start" in line]
            assert starting
            assert all("aidocks.env" in line for line in starting)
        assert load(path)["file_mounts"]["~/.ray/auth_token"]
    assert "\nRAY_AUTH_MODE=token\n" in EXAMPLE_ENV.read_text()
    for path in RAY_KINDS:
        assert ray_cluster(path)["authOptions"] == {"mode": "token", "secretName": "aidocks-ray-token"}
    services = load(COMPOSE)["services"]
    for name in ("head", "worker"):
        assert services[name]["environment"]["RAY_AUTH_MODE"] == "token"
    for dockerfile in (ROOT / "cluster" / "docker").glob("Dockerfile*"):
        assert "RAY_AUTH_MODE=token" in dockerfile.read_text()


def test_the_dashboard_is_never_public() -> None:
    for path in RAY_UP:
        (head,) = [line for line in load(path)["head_start_ray_commands"] if "ray start" in line]
        assert "--dashboard-host=127.0.0.1" in head
    services = load(COMPOSE)["services"]
    assert "--dashboard-host=127.0.0.1" in services["head"]["command"][-1]
    published = {port for service in services.values() for port in service.get("ports", [])}
    assert published == {"${BIND:-127.0.0.1}:8723:8723"}
    # In Kubernetes the operator must reach it: nobody else may, and no service brings it out.
    for path in RAY_KINDS:
        assert groups(path)[0]["serviceType"] == "ClusterIP"
    ours, _ = load_all(KUBERAY / "networkpolicy.yaml")
    to_all = [rule for rule in ours["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in to_all for port in rule["ports"]] == [DEFAULT_PORT]


def test_the_head_takes_no_work() -> None:
    assert load(RAY_UP[0])["available_node_types"]["head"]["resources"] == {"CPU": 0}
    for path in RAY_KINDS:
        assert groups(path)[0]["rayStartParams"]["num-cpus"] == "0"
    starts = [
        load(RAY_UP[1])["head_start_ray_commands"][1],
        load(COMPOSE)["services"]["head"]["command"][-1],
    ]
    assert all("--num-cpus=0" in start for start in starts)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_commands_are_shell(path: Path) -> None:
    for script in shell_scripts(path):
        done = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{script}\n{done.stderr}"


def shell_scripts(path: Path) -> Iterator[str]:
    """Yield every script that a file holds, as the shell will see it."""
    if path in RAY_UP:
        for name, commands in load(path).items():
            if name.endswith("commands"):
                yield from commands
    elif path.name.startswith("Dockerfile"):
        joined = path.read_text().replace("\\\n", " ")
        yield from re.findall(r"^RUN (.*)$", joined, re.MULTILINE)
    elif path == EXAMPLE_ENV:
        yield path.read_text()
    else:
        for document in load_all(path):
            yield from (text.replace("$$", "$") for text in after_dash_c(document))


def after_dash_c(node: object) -> Iterator[str]:
    if isinstance(node, dict):
        for value in node.values():
            yield from after_dash_c(value)
    elif isinstance(node, list):
        for before, value in zip([None, *node], node, strict=False):
            if before in ("-c", "CMD-SHELL") and isinstance(value, str):
                yield value
            else:
                yield from after_dash_c(value)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_our_commands_exist(path: Path) -> None:
    """Every ``aidocks …`` that a file runs is a command with such options."""
    from typer.main import get_command

    from aidocks.cli.app import app

    group = get_command(app)
    for script in shell_scripts(path):
        for verb, rest in re.findall(r"\baidocks (up|down|status|keys|doctor)\b([^;&|'\n]*)", script):
            known = {option for parameter in group.commands[verb].params for option in parameter.opts}
            assert set(re.findall(r"--[a-z-]+", rest)) <= known
