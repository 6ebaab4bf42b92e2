"""Downloads with the real hub library, from a hub that is played by a small HTTP server on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SECRET = "hf_secretsecretsecret"

ASK = """
import json, sys
from pathlib import Path
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import AIDocksError
from aidocks.models.hub import FetchModel
from aidocks.models.resolve import ModelResolver
from aidocks.plan import UnitContext
reference, home = sys.argv[1], Path(sys.argv[2])
resolver = ModelResolver(home / "models", ())
said = {"before": resolver.needs_download(reference)}
try:
    fetched = FetchModel(reference=reference).run(UnitContext(workspace=home))
    found = resolver.resolve(reference)
    assert found.path == fetched.path, (found, fetched)
    files = [str(path.relative_to(found.path)) for path in found.path.rglob("*") if path.is_file()]
    said |= {"revision": found.revision, "files": sorted(files),
             "hash": Checkpoint(found.path).content_hash(home), "after": resolver.needs_download(reference)}
except AIDocksError as error:
    said |= {"error": type(error).__name__, "message": str(error)}
print(json.dumps(said))
"""


class Hub(ThreadingHTTPServer):
    """Serves one directory as ``org/name``; refuses what ``refusals`` says by repository."""

    daemon_threads = True
    directory: Path
    refusals: dict[str, tuple[int, str]]
    asked: list[str]


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0].removeprefix("/")
        self.server.asked.append(path)
        repo = next((name for name in self.server.refusals if name in path), None)
        if repo:
            status, code = self.server.refusals[repo]
            return self.answer(b"{}", status, {"X-Error-Code": code, "X-Error-Message": code})
        if path.startswith("api/models/org/name/tree/"):
            return self.answer(json.dumps([self.describe(file) for file in self.files()]).encode())
        if path.startswith("api/models/org/name"):
            siblings = [{"rfilename": self.relative(file)} for file in self.files()]
            return self.answer(json.dumps({"id": "org/name", "sha": COMMIT, "siblings": siblings}).encode())
        file = self.server.directory / "/".join(path.split("/")[4:])
        if path.startswith("org/name/resolve/") and file.is_file():
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.describe(file)["oid"]}"'}
            return self.answer(file.read_bytes(), 200, headers)
        return self.answer(b"{}", 404, {"X-Error-Code": "RepoNotFound"})

    def files(self) -> list[Path]:
        return sorted(path for path in self.server.directory.rglob("*") if path.is_file())

    def relative(self, file: Path) -> str:
        return file.relative_to(self.server.directory).as_posix()

    def describe(self, file: Path) -> dict[str, Any]:
        content = file.read_bytes()
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": self.relative(file), "size": len(content), "oid": oid}

    def answer(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answers)
    server.directory, server.refusals, server.asked = tiny_llama(tmp_path / "remote"), {}, []
    for name in ("pytorch_model.bin", "modeling_x.py", "model.gguf", "consolidated.safetensors"):
        (server.directory / name).write_text("not wanted")
    (server.directory / "README.md").write_text("---\nlicense: mit\n---\n")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def ask(hub: Hub, home: Path, reference: str, **environment: str) -> dict[str, Any]:
    home.mkdir(exist_ok=True)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AIDOCKS_"))
    }
    settings = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(home / "hf"),
        "HF_HUB_DISABLE_XET": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-c", ASK, reference, home], capture_output=True, text=True, timeout=120,
        check=False, env=inherited | settings | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert SECRET not in done.stdout + done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def test_a_model_is_downloaded_once_and_found_afterwards(hub: Hub, tmp_path: Path) -> None:
    first = ask(hub, tmp_path / "home", "org/name@main")
    assert (first["before"], first["after"], first["revision"]) == (True, False, COMMIT)
    assert set(first["files"]) == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not [path for path in hub.asked if path.endswith((".bin", ".py", ".gguf"))]
    hub.asked.clear()
    again = ask(hub, tmp_path / "home", "org/name", HF_HUB_OFFLINE="1")
    assert (again["before"], again["hash"]) == (False, first["hash"])
    assert not hub.asked


def test_modules_and_adapters_for_tasks_come_along(hub: Hub, tmp_path: Path) -> None:
    wanted = {
        "modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/model.safetensors",
        "retrieval_query/adapter_config.json", "retrieval_query/adapter_model.safetensors",
    }  # fmt: skip
    for name in (*wanted, "onnx/config.json", "onnx/model.safetensors", "2_Dense/pytorch_model.bin"):
        (hub.directory / name).parent.mkdir(exist_ok=True)
        (hub.directory / name).write_text("{}")
    config = json.loads((hub.directory / "config.json").read_text())
    (hub.directory / "config.json").write_text(json.dumps(config | {"model_type": "jina_embeddings_v3"}))

    first = ask(hub, tmp_path / "home", "org/name")

    assert wanted <= set(first["files"])
    assert not [name for name in first["files"] if name.startswith("onnx") or name.endswith(".bin")]
    assert not first["after"]


def test_what_an_interrupted_download_lacks_is_fetched(hub: Hub, tmp_path: Path) -> None:
    first = ask(hub, tmp_path / "home", "org/name")
    (snapshot,) = (tmp_path / "home" / "hf").glob("hub/models--org--name/snapshots/*")
    (snapshot / "tokenizer.json").unlink()
    again = ask(hub, tmp_path / "home", "org/name")
    assert (again["before"], again["after"], again["files"]) == (True, False, first["files"])


@pytest.mark.parametrize(
    ("status", "code", "error", "says"),
    [
        (403, "GatedRepo", "HubRefused", "is gated"),
        (401, "RepoNotFound", "HubRefused", "does not exist, or it is private"),
        (404, "RevisionNotFound", "UnknownModel", "no such revision"),
        (403, "", "HubRefused", "(403)"),
        (500, "", "HubUnavailable", "answered 500"),
    ],
)
def test_refusals(hub: Hub, tmp_path: Path, status: int, code: str, error: str, says: str) -> None:
    hub.refusals["org/name"] = (status, code)
    said = ask(hub, tmp_path / "home", "org/name", HF_TOKEN=SECRET)
    assert said["error"] == error
    assert says in said["message"]


def test_no_network(hub: Hub, tmp_path: Path) -> None:
    said = ask(hub, tmp_path / "home", "org/name", HF_ENDPOINT="http://127.0.0.1:9")
    assert said["error"] == "HubUnavailable"
    assert "cannot be reached" in said["message"]
