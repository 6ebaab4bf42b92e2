"""`aidocks doctor`: each state that is not right is found, and told with what to do."""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import create_engine, text

from aidocks.cli.doctor import machine
from aidocks.cli.doctor.data import file_system_of
from aidocks.jobs.store import JobStore
from aidocks.models.registry import Registry
from aidocks.settings import Settings
from tests.conftest import free_port

Found = Callable[..., dict[str, tuple[str, str]]]
MOUNTS = """\
22 1 254:0 / / rw,relatime - ext4 /dev/root rw
40 22 0:33 / /srv/shared rw shared:1 - nfs4 server:/export rw
41 40 0:34 / /srv/shared/fast\\040disk rw - xfs /dev/sdb rw
"""


@pytest.fixture
def found(aidocks: Any, home: Path, monkeypatch: pytest.MonkeyPatch) -> Found:
    """Run it without a service: of each subject the last state and text; ``code`` is checked, too."""
    monkeypatch.setenv("AIDOCKS_PORT", str(free_port()))

    def run() -> dict[str, tuple[str, str]]:
        done = aidocks("doctor", "--json")
        findings = json.loads(done.out)
        assert done.code == int(any(finding["state"] == "bad" for finding in findings))
        return {finding["subject"]: (finding["state"], finding["text"]) for finding in findings}

    return run


def test_an_installation_without_fault(found: Found) -> None:
    findings = found()
    assert not {subject for subject, (state, _) in findings.items() if state == "bad"}
    assert findings["job store"] == ("good", "none yet")
    assert "aidocks up" in findings["service"][1]
    assert not (Settings().home / "aidocks.db").exists(), "it only looks"


@pytest.mark.parametrize("name", ["ray-token", "admin-key"])
def test_secrets_that_others_can_read(found: Found, home: Path, name: str) -> None:
    path = home / name
    path.write_text("open sesame")
    path.chmod(0o644)
    state, told = found()[name]
    assert (state, "sesame" in told) == ("bad", False)
    assert f"chmod 600 {path}" in told
    path.chmod(0o600)
    assert name not in found()


def test_a_store_of_a_newer_version_and_one_that_is_none(found: Found, settings: Settings) -> None:
    JobStore(settings.store_url).close()
    assert found()["job store"][0] == "good"
    engine = create_engine(settings.store_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE meta SET value = 99 WHERE key = 'schema_version'"))
    engine.dispose()
    state, told = found()["job store"]
    assert (state, "version 99" in told) == ("bad", True)
    (settings.home / "aidocks.db").write_bytes(b"not a database, whatever its name is" * 100)
    assert found()["job store"][0] == "bad"


def test_a_store_that_is_away_is_named_without_its_password(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("psycopg")
    url = f"postgresql://me:hunter2@127.0.0.1:{free_port()}/jobs"
    monkeypatch.setenv("AIDOCKS_DATABASE_URL", url)
    state, told = found()["job store"]
    assert state == "bad"
    assert "does not answer" in told
    assert "hunter2" not in told


def test_jobs_that_nobody_runs_and_what_ended_ones_have_left(found: Found, settings: Settings) -> None:
    with closing(JobStore(settings.store_url)) as store:
        job, _ = store.submit("laser", {}, output_name=None)
    for name in (job.id, "job-00000000000-c0ffee00"):
        (settings.workspaces_dir / name).mkdir(parents=True)
    findings = found()
    assert findings["jobs"] == ("note", "1 unfinished, and no service runs; `aidocks up` goes on with them")
    assert "job-00000000000-c0ffee00" in findings["workspaces"][1]
    assert job.id not in findings["workspaces"][1]


def test_a_clock_that_was_set_back(found: Found, settings: Settings) -> None:
    with closing(JobStore(settings.store_url)) as store:
        job, _ = store.submit("laser", {}, output_name=None)
    engine = create_engine(settings.store_url)
    with engine.begin() as connection:
        later = {"at": time.time() + 3600, "id": job.id}
        connection.execute(text("UPDATE jobs SET created_at = :at WHERE id = :id"), later)
    engine.dispose()
    assert found()["clock"][0] == "bad"


def test_models_that_are_not_whole(found: Found, settings: Settings, tmp_path: Path) -> None:
    registry = Registry(settings.models_dir)
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text(
        json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    save_file({"model.norm.weight": np.ones(8, np.float32)}, source / "model.safetensors")
    for name in ("whole", "short", "gone", "unreadable"):
        registry.import_checkpoint(name, source)
    assert found()["models"] == ("good", "4, with all their files")
    weights = "model.safetensors"
    os.truncate(settings.models_dir / "short" / weights, 10)
    (settings.models_dir / "gone" / weights).unlink()
    (settings.models_dir / "unreadable" / "aidocks.json").write_text("{")
    findings = found()
    assert "has 10 bytes, not" in findings["model short"][1]
    assert f"{weights} is missing" in findings["model gone"][1]
    assert "aidocks models delete unreadable" in findings["model unreadable"][1]
    assert "model whole" not in findings


def test_a_port_that_another_program_has(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setenv("AIDOCKS_PORT", str(other.getsockname()[1]))
        state, told = found()["service"]
    assert (state, "AIDOCKS_PORT" in told) == ("bad", True)


def test_a_service_that_was_killed(found: Found, home: Path) -> None:
    (home / "service.json").write_text("{}")
    findings = found()
    assert findings["service"][0] == "note"


def test_a_service_for_everybody(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDOCKS_HOST", "0.0.0.0")
    assert "access" not in found()
    monkeypatch.setenv("AIDOCKS_ACCESS", "open")
    state, told = found()["access"]
    assert (state, "AIDOCKS_ACCESS=keys" in told) == ("note", True)


def test_errors_of_the_last_day(found: Found, home: Path) -> None:
    logs = home / "logs"
    logs.mkdir()
    now = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
    lines = [
        {"time": "2020-01-01T00:00:00+00:00", "level": "error", "message": "long ago"},
        {"time": now, "level": "info", "message": "well"},
        {"time": now, "level": "error", "message": "no room at postgresql://me:hunter2@db/jobs"},
    ]
    (logs / "supervisor.log").write_text("".join(json.dumps(line) + "\n" for line in lines) + "half a li")
    state, told = found()["supervisor.log"]
    assert state == "note"
    assert told.startswith("1 error in a day, the last: no room at")
    assert "hunter2" not in told


def test_the_hub_without_its_token(found: Found, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.delenv("HF_TOKEN_PATH", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "nothing is downloaded" in found()["hub"][1]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert "HF_TOKEN" in found()["hub"][1]
    (tmp_path / "token").write_text("hf_" + "x" * 34)
    (tmp_path / "token").chmod(0o644)
    state, told = found()["hub"]
    assert (state, "hf_x" in told) == ("bad", False)
    (tmp_path / "token").chmod(0o600)
    assert found()["hub"] == ("good", "with a token")


def test_packages_of_another_version(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["typer>=99", "rich>=1", 'numpy<1; extra == "local"', "not-installed>=1", "aidocks[local]"]
    monkeypatch.setattr("aidocks.cli.doctor.software.requires", lambda _: lines)
    findings = found()
    assert "pip install 'typer>=99'" in findings["typer"][1]
    assert findings["numpy"][0] == "bad"
    assert not {"rich", "not-installed", "aidocks[local]"} & set(findings)


@pytest.mark.parametrize(("files", "state"), [(512, "bad"), (2048, "note")])
def test_few_open_files(found: Found, files: int, state: str) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        assert found()["open files"][0] == state
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_disk_without_room(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        total, used, free = 10**9, 10**9, 1000

    monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: Full)
    findings = found()
    assert findings["disk"][0] == "bad"
    assert "/tmp" in "".join(findings)


def test_a_directory_that_cannot_be_written(found: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIDOCKS_HOME", "/proc/aidocks")
    assert "AIDOCKS_HOME" in found()["data"][1]


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "ext4"),
        ("/srv/shared-other", "ext4"),
        ("/srv/shared/home", "nfs4"),
        ("/srv/shared/fast disk", "xfs"),
    ],
)
def test_the_file_system_of_a_path(path: str, kind: str) -> None:
    assert file_system_of(Path(path), MOUNTS) == kind


def test_a_check_that_breaks_is_told_and_the_others_go_on(
    found: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Iterator[Any]:
        raise RuntimeError("with hf_" + "x" * 34)

    monkeypatch.setattr("aidocks.cli.doctor.data.DATA_CHECKS", (broken,))
    findings = found()
    assert findings["broken"] == ("note", "could not be looked at: RuntimeError: with [hidden]")
    assert "service" in findings


def test_a_key_that_the_service_does_not_take(
    aidocks: Any, scripted: Any, answer: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AIDOCKS_URL", scripted.url)
    problem = {"code": "unauthenticated", "detail": "This key is not valid.", "status": 401}
    scripted.script = lambda request: (
        answer({"status": "ok", "supervisor": "superseded"})
        if request.path == "/health"
        else answer(problem, 401)
    )
    done = aidocks("doctor", "--json")
    findings = {finding["subject"]: finding for finding in json.loads(done.out)}
    assert done.code == 1
    assert "This key is not valid." in findings["API key"]["text"]
    assert findings["supervisor"]["state"] == "bad"
