"""The key of this machine's own command line, and where it is sent."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from aidocks import AsyncClient, Client
from aidocks.access.keys import Scope
from aidocks.access.local import admin_key_file, key_for, make_admin_key, warn_of_open_door
from aidocks.access.store import KeyStore
from aidocks.jobs.database import Database
from aidocks.settings import Settings

URL = "http://127.0.0.1:8723"


@pytest.fixture
def own(settings: Settings) -> Any:
    database = Database(settings.store_url)
    yield KeyStore(database)
    database.close()


def serving(settings: Settings, pid: int | None = None, url: str = URL) -> None:
    settings.state_file.write_text(json.dumps({"url": url, "pid": os.getpid() if pid is None else pid}))


def test_it_is_made_once_and_for_this_user_alone(settings: Settings, own: KeyStore) -> None:
    path = make_admin_key(settings, own)
    text = path.read_text()
    assert own.check(text).scopes == (Scope.ADMIN,)
    path.chmod(0o644)
    assert make_admin_key(settings, own).read_text() == text
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(own.list()) == 1
    own.revoke(own.list()[0].id)
    assert make_admin_key(settings, own).read_text() != text
    path.write_bytes(b"\xff\xfe")
    assert own.check(make_admin_key(settings, own).read_text()).allows(Scope.ADMIN)


def test_several_that_start_at_once_make_one(settings: Settings, own: KeyStore) -> None:
    threads = [threading.Thread(target=make_admin_key, args=(settings, own)) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (made,) = own.list()
    assert own.check(admin_key_file(settings).read_text()).id == made.id


def test_it_is_sent_to_the_service_of_this_directory_alone(settings: Settings, own: KeyStore) -> None:
    text = make_admin_key(settings, own).read_text()
    assert key_for(URL, settings) is None
    serving(settings)
    assert key_for(URL, settings) == key_for(f"{URL}/", settings) == text
    for other in ("http://127.0.0.1:8724", "https://127.0.0.1:8723", f"{URL}.evil.example", "http://evil"):
        assert key_for(other, settings) is None
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    serving(settings, ended.pid)  # somebody else may have the port by now
    assert key_for(URL, settings) is None


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"url": 3}', "\xff"])
def test_a_state_file_that_cannot_be_read(settings: Settings, state: str) -> None:
    settings.state_file.write_text(state, encoding="latin-1")
    assert key_for(URL, settings) is None


def test_whom_clients_are(settings: Settings, own: KeyStore, monkeypatch: pytest.MonkeyPatch) -> None:
    text = make_admin_key(settings, own).read_text()

    def sent(**options: Any) -> str | None:
        with Client(**options) as client:
            found = client._http.headers.get("authorization")
        other: str | None = AsyncClient(**options)._http.headers.get("authorization")
        assert other == found
        return found

    assert sent(url=URL) is None
    serving(settings)
    assert sent() == sent(url=URL) == f"Bearer {text}"
    assert sent(url="http://elsewhere.example") is None
    monkeypatch.setenv("AIDOCKS_API_KEY", "from-the-environment")
    assert sent(url="http://elsewhere.example") == "Bearer from-the-environment"
    assert sent(url=URL, api_key="given") == "Bearer given"
    assert "from-the-environment" not in repr(Settings())
    assert "from-the-environment" not in str(Settings().environment())
    assert "from-the-environment" not in Settings().model_dump_json()


def test_who_is_warned(tmp_path: Path) -> None:
    def warning(**fields: Any) -> str | None:
        return warn_of_open_door(Settings(home=tmp_path, **fields))

    for host in ("127.0.0.1", "localhost", "::1"):
        assert warning(host=host) is None
        assert warning(host=host, access="open") is None
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        assert warning(host=host) is None  # keys are asked for
        assert warning(host=host, access="keys") is None
        assert "Anybody" in str(warning(host=host, access="open"))
