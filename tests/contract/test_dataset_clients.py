"""Data sets and resumed jobs through the Python clients and the command line, over a real connection."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import OperationalError

from aidocks.client.async_http import AsyncClient
from aidocks.client.http import Client
from aidocks.datasets.store import DatasetStore
from aidocks.errors import Conflict, IllegalTransition, InvalidSpec, NameTaken, NotFound, ServiceUnreachable
from aidocks.jobs.model import Status
from aidocks.jobs.store import JobStore
from aidocks.settings import Settings
from tests.support.training_jobs import ROWS, Executor


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my sums.jsonl"
    path.write_bytes(ROWS)
    return path


@pytest.fixture
def aidocks(
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    terminal_width: Callable[[int], None],
) -> Callable[..., tuple[int, str, str]]:
    """Run a command line in this process: exit code, output, errors."""
    from aidocks.cli.main import main

    monkeypatch.setenv("AIDOCKS_URL", url)
    terminal_width(200)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aidocks", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return run


def test_client(url: str, file: Path, store: JobStore) -> None:
    told: list[tuple[int, int]] = []
    with Client(url) as client:
        made = client.upload_dataset(file, progress=lambda sent, size: told.append((sent, size)))
        assert (made.name, made.filename, made.rows) == ("my-sums", "my sums.jsonl", 40)
        assert told[-1] == (len(ROWS), len(ROWS))
        other = client.upload_dataset(file, "other")
        assert client.datasets() == [other, made]
        assert client.dataset(made.id) == client.dataset("my-sums") == made
        with pytest.raises(NameTaken):
            client.upload_dataset(file, "other")
        with pytest.raises(InvalidSpec):
            client.upload_dataset(Path(__file__))
        job = store.submit("train-llm", {"dataset": "other"}, output_name=None)[0]
        with pytest.raises(Conflict, match=job.id):
            client.delete_dataset("other")
        client.delete_dataset(made.id)
        with pytest.raises(NotFound):
            client.dataset("my-sums")
    with Client("http://127.0.0.1:9", retry_s=0) as client, pytest.raises(ServiceUnreachable):
        client.upload_dataset(file)


def test_a_large_file_goes_in_parts(
    url: str, tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aidocks.datasets.parts import PartedUploads

    content = ROWS * 1500  # three parts
    path = tmp_path / "big.jsonl"
    path.write_bytes(content)
    told: list[int] = []
    with Client(url) as client:
        made = client.upload_dataset(path, progress=lambda sent, size: told.append(sent))
        assert (settings.datasets_dir / "big" / "data.jsonl").read_bytes() == content
        assert (made.bytes, made.rows) == (len(content), 60_000)
        assert told == [1_000_000, 2_000_000, len(content)]

        def cut(sent: int, size: int) -> None:
            path.write_bytes(content[:10])

        with pytest.raises(Conflict, match="shorter"):
            client.upload_dataset(path, "other", cut)
        path.write_bytes(b"\0" * 10)
        with pytest.raises(InvalidSpec):
            client.upload_dataset(path, "other")
        path.write_bytes(b"")
        with pytest.raises(InvalidSpec, match="empty"):
            client.upload_dataset(path, "other")
        assert list(DatasetStore.of(settings).staging.iterdir()) == []

        # An answer that is lost on its way back.
        path.write_bytes(content)
        write, lost = PartedUploads.write, iter([True, False])

        def losing(self: PartedUploads, upload_id: str, offset: int, part: bytes) -> Any:
            begun = write(self, upload_id, offset, part)
            if next(lost, False):
                raise OperationalError("lost", None, Exception())
            return begun

        monkeypatch.setattr(PartedUploads, "write", losing)
        assert client.upload_dataset(path, "again").sha256 == made.sha256


def test_asynchronous_client(url: str, file: Path) -> None:
    async def work() -> None:
        async with AsyncClient(url) as client:
            made = await client.upload_dataset(file, "sums")
            assert await client.datasets() == [made]
            assert await client.dataset("sums") == made
            await client.delete_dataset("sums")
            assert await client.datasets() == []

    asyncio.run(work())


def test_command_line(aidocks: Any, file: Path) -> None:
    code, out, _ = aidocks("datasets", "upload", str(file), "--name", "sums")
    assert (code, out.split()[0]) == (0, "sums")
    code, out, _ = aidocks("datasets", "list")
    assert code == 0
    assert "my sums.jsonl" in out
    code, out, _ = aidocks("datasets", "show", "sums", "--json")
    assert json.loads(out)["rows"] == 40
    assert "sha256" in aidocks("datasets", "show", "sums")[1]
    code, _, error = aidocks("datasets", "upload", str(file), "--name", "sums")
    assert code == 5
    assert "aidocks datasets delete sums" in error
    assert aidocks("datasets", "upload", str(file.with_name("none.jsonl")))[0] == 4
    assert aidocks("datasets", "delete", "sums")[:2] == (0, "sums deleted\n")
    assert "No data set is stored" in aidocks("datasets", "list")[2]


def test_command_line_without_a_service(aidocks: Any, file: Path, settings: Settings) -> None:
    code, out, _ = aidocks("datasets", "upload", str(file), "--local", "--json")
    assert (code, json.loads(out)["name"]) == (0, "my-sums")
    assert (settings.datasets_dir / "my-sums" / "data.jsonl").read_bytes() == ROWS
    assert json.loads(aidocks("datasets", "list", "--local", "--json")[1])[0]["name"] == "my-sums"
    assert aidocks("datasets", "show", "my-sums", "--local")[0] == 0
    store = JobStore(settings.store_url)
    job = store.submit("train-llm", {"dataset": "my-sums"}, output_name=None)[0]
    code, _, error = aidocks("datasets", "delete", "my-sums", "--local")
    assert code == 5
    assert job.id in error
    store.request_cancel(job.id)
    store.close()
    assert aidocks("datasets", "delete", "my-sums", "--local")[0] == 0
    assert aidocks("datasets", "delete", "my-sums", "--local")[0] == 4


def test_resuming(url: str, aidocks: Any, model: str, settings: Settings, store: JobStore) -> None:
    executor = Executor(store, settings)
    with Client(url) as client:
        rows = [json.loads(line) for line in ROWS.splitlines()]
        handle = client.submit("train-llm", base_model=model, dataset=rows)
        with pytest.raises(IllegalTransition):
            handle.resume()
        for last in (client.resume, lambda job: client.job(job).resume()):
            executor.start(handle.id)
            executor.checkpoint(handle.id, 20)
            executor.end(handle.id, Status.CANCELLED)
            resumed = last(handle.id)
            assert resumed.job.spec["resume_from_checkpoint"] == handle.id
            handle = resumed
    executor.start(handle.id)
    executor.end(handle.id, Status.CANCELLED)
    code, out, _ = aidocks("jobs", "resume", handle.id, "--detach")
    assert code == 0
    assert store.get(out.strip()).output_name == handle.job.output_name
    code, _, error = aidocks("jobs", "resume", handle.id)
    assert code == 5, error
