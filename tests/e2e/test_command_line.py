"""Ctrl-C, at a real service and without one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]

#: Long enough to be interrupted.
SLOW = ("--chunks", "200", "--selection", "exhaustive")


def interrupted(environment: dict[str, str], name: str, *options: str) -> tuple[int, str]:
    """Run a job, press Ctrl-C when its first stage is under way; return exit code and standard error."""
    request = ("--base-model-name", "tiny-base", "--laser-model-name", name)
    process = subprocess.Popen(
        [sys.executable, "-m", "aidocks", "laser", *request, *SLOW, *options],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore Ctrl-C, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    said = ""
    for line in process.stderr:
        said += line
        if line.startswith("scan"):
            break
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    return process.wait(timeout=60), said


def test_at_a_service_the_job_goes_on(service: Any) -> None:
    from aidocks.client.http import Client

    code, said = interrupted(service.env, "interrupted")
    assert code == 130, said
    with Client(service.url) as client:
        handle = next(handle for handle in client.jobs() if handle.job.output_name == "interrupted")
        assert f"aidocks jobs watch {handle.id}" in said
        assert f"aidocks jobs cancel {handle.id}" in said
        assert not handle.job.cancel_requested
        handle.cancel()
        assert [event.type for event in handle.events()][-1] == "cancelled"


def test_without_a_service_the_job_is_cancelled(service: Any, tmp_path: Path) -> None:
    model = service.settings.models_dir / "tiny-base"
    environment = service.env | {
        "AIDOCKS_HOME": str(tmp_path),
        "AIDOCKS_ALLOWED_ROOTS": os.fspath(model.parent),
    }
    imported = [sys.executable, "-m", "aidocks", "models", "import", str(model), "tiny-base"]
    subprocess.run(imported, env=environment, check=True, capture_output=True)
    code, said = interrupted(environment, "interrupted", "--local")
    assert code == 130, said
    assert "cancelled" in said
    assert list((tmp_path / "workspaces").iterdir()) == []
    assert not (tmp_path / "models" / "interrupted").exists()
