"""The container images and what compose makes of them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.cluster_files import COMPOSE, DOCKER, ROOT, load

DOCKERFILES = sorted(DOCKER.glob("Dockerfile*"))


def instructions(path: Path) -> list[tuple[str, str]]:
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_are_built_as_they_should(path: Path) -> None:
    steps = instructions(path)
    users = [what for word, what in steps if word == "USER"]
    assert users[-1] == "10001:10001", "by number, so that Kubernetes can see that it is not root"
    for image in (what.split()[0] for word, what in steps if word == "FROM"):
        assert ":" in image
        assert not image.endswith(":latest")
    for word, what in steps:
        if word == "RUN" and "apt-get install" in what:
            assert "--no-install-recommends" in what
            assert "rm -rf /var/lib/apt/lists" in what
        if word == "RUN" and "pip install" in what:
            assert "--no-cache-dir" in what
        if word in ("CMD", "ENTRYPOINT"):
            assert what.startswith("["), "without a shell, which would keep signals to itself"
        assert word != "ADD"
        assert not (word in ("ENV", "ARG") and re.search("PASSWORD|SECRET|_TOKEN=|API_KEY", what))
    assert [word for word, _ in steps].count("HEALTHCHECK") == 1


def test_both_images_end_alike() -> None:
    def tail(path: Path) -> list[tuple[str, str]]:
        steps = instructions(path)
        begin = next(n for n, (word, what) in enumerate(steps) if word == "RUN" and "useradd" in what)
        return steps[begin:]

    assert tail(DOCKERFILES[0]) == tail(DOCKERFILES[1])


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that the image is built from, where it would be installed."""
    directory = tmp_path_factory.mktemp("image")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = directory.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site-packages")
    return directory / "site-packages"


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_path_of_the_image_finds_the_service(path: Path, installed: Path) -> None:
    (python_path,) = re.findall(r"PYTHONPATH=\S+/site-packages/(\S+)", path.read_text())
    program = (
        "import importlib.util as i, aidocks; from aidocks._root import service_root as root; "
        "print(aidocks.__file__); print(root()); "
        "print(*(i.find_spec(name).origin for name in ('serve.app', 'cluster.supervisor', 'train.loop')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        # The wheel before the checkout, which this environment has installed.
        env=os.environ | {"PYTHONPATH": f"{installed / python_path}{os.pathsep}{installed}"},
        cwd=installed.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    places = [Path(line) for line in done.stdout.splitlines()]
    assert places[1] == installed / python_path
    assert all(place.is_relative_to(installed) for place in places), places


def test_the_context_has_what_the_wheel_needs() -> None:
    """What is sent to the builder: sources and no data, tests or secrets."""
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    packaging = (ROOT / "pyproject.toml").read_text()
    (include,) = re.findall(r"targets\.sdist\]\ninclude = \[(.*?)\]", packaging)
    assert {name.strip('" /') for name in include.split(",")} | {"pyproject.toml", "constraints.txt"} == sent


def test_compose_is_valid_as_far_as_can_be_seen() -> None:
    document = load(COMPOSE)
    services, volumes = document["services"], document["volumes"]
    for name, service in services.items():
        assert service["restart"] in ("unless-stopped", "always"), name
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        for volume in service["volumes"]:
            assert volume.split(":")[0] in volumes
        for needed, how in service.get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert set(services[needed].get("profiles", [])) <= set(service.get("profiles", []))
        if service["image"].startswith("aidocks"):
            assert service["init"] is True
            assert service["read_only"] is True
            assert service["user"] == "10001:10001"
            assert service["shm_size"]
            assert (COMPOSE.parent / service["build"]["context"]).resolve() == ROOT
            assert (ROOT / service["build"]["dockerfile"]).is_file()
    assert "profiles" not in services["aidocks"], "what comes up without being asked for"
    listening = services["aidocks"]["environment"]
    assert (listening["AIDOCKS_HOST"], listening["AIDOCKS_ACCESS"]) == ("0.0.0.0", "keys")


def test_compose_takes_it() -> None:
    try:
        there = (
            subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0
        )
    except FileNotFoundError:
        there = False
    if not there:
        pytest.skip("there is no docker compose here")
    for profile in ([], ["--profile", "ha"]):
        command = ["docker", "compose", "-f", str(COMPOSE), *profile, "config", "--quiet"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
