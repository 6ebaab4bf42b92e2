"""The program that stands before HAProxy: statistics keep to loopback, the service listens where it is told."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from aidocks.settings import Settings
from cluster import head


@pytest.fixture
def wrapper(tmp_path: Path) -> Iterator[Path]:
    settings = Settings(home=tmp_path, host="0.0.0.0", port=8723)
    directory = head.make_temp_dir(settings)
    head.make_proxy_wrapper(settings)
    yield directory / "haproxy"
    shutil.rmtree(directory)


def test_only_the_service_listens_everywhere(wrapper: Path, tmp_path: Path) -> None:
    if not wrapper.exists():
        pytest.skip("there is no HAProxy here")
    configuration = tmp_path / "haproxy.cfg"
    configuration.write_text("    bind :9101\n    bind *:8723\n  bind *:8404\n")
    subprocess.run([wrapper, "-c", "-f", configuration], capture_output=True, check=False)
    assert configuration.read_text() == "    bind 127.0.0.1:9101\n    bind *:8723\n  bind 127.0.0.1:8404\n"
