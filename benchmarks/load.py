"""Many clients of one service at a time: ``python -m benchmarks.load --clients 500``.

A real service runs small merges while the clients ask for jobs, lists of jobs and pages of events, submit jobs with
idempotency keys, and follow some as streams. Each client has one connection and asks once in a while (``--think``
seconds); a latency is counted from the moment at which the client *wanted* to ask, so that a service that is late for
one request is late for those that wait behind it, too. With ``--think 0`` every client asks again as soon as it is
answered: that measures throughput, and its latencies are those of a queue of as many requests as there are clients.

Afterwards the store is held against what was answered: no acknowledged job may be missing or there twice.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import resource
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.pool import AsyncResult
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

#: What a client asks for, and how often of 1000 times.
MIX = {"GET /jobs/{id}": 580, "GET /jobs?limit=20": 200, "GET /jobs/{id}/events": 200, "POST /merge": 20}
_READS = tuple(name for name in MIX if name.startswith("GET"))
_TIMEOUT_S = 30.0
_MODELS = ("tiny-a", "tiny-b")


@dataclass(frozen=True)
class Plan:
    """What one process of clients does."""

    url: str
    clients: int
    streams: int
    seconds: float
    think_s: float
    number: int
    known: tuple[str, ...]


@dataclass
class Told:
    """What one process of clients has seen.

    Attributes:
        latencies: Seconds of every answer, by what was asked.
        acknowledged: Idempotency key -> id of the job.
        unanswered: Keys of submissions to which there was no answer.
        events: That came in streams.
        processor_s: Seconds of the processor that the clients themselves took.
    """

    latencies: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in MIX})
    errors: Counter[str] = field(default_factory=Counter)
    acknowledged: dict[str, str] = field(default_factory=dict)
    unanswered: list[str] = field(default_factory=list)
    events: int = 0
    processor_s: float = 0.0


class _Connection:
    """One connection that is kept, and no more of HTTP/1.1 than the service's answers need."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, method: str, path: str, body: bytes = b"", headers: str = "") -> tuple[int, bytes]:
        reader, writer = await self._open()
        head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}"
        if body:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body)
        status, fields = await self.head(reader)
        if "chunked" in fields.get("transfer-encoding", ""):
            content = b""
            while size := int(await reader.readline(), 16):
                content += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            content = await reader.readexactly(int(fields.get("content-length", 0)))
        if fields.get("connection", "") == "close":
            self.close()
        return status, content

    async def follow(self, path: str, tell: Any) -> None:
        """Read an event stream to its end."""
        reader, writer = await self._open()
        writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nAccept: text/event-stream\r\n\r\n".encode())
        status, fields = await self.head(reader)
        if status != 200:
            await reader.readexactly(int(fields.get("content-length", 0)))
            tell(f"stream: {status}", 0)
            return
        while (line := await reader.readline()) and line != b"0\r\n":
            tell(None, line.startswith(b"data:"))
        self.close()

    async def head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        fields = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
        return int(lines[0].split(" ", 2)[1]), fields

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._host, self._port)
        return self._streams


class _Clients:
    """The clients of one process."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._told = Told()
        self._chance = random.Random(plan.number)
        self._jobs = list(plan.known)
        self._submitted = 0

    async def run(self) -> Told:
        plan = self._plan
        loop = asyncio.get_running_loop()
        self._end = loop.time() + plan.seconds
        tasks = [asyncio.create_task(self._client(number)) for number in range(plan.clients)]
        followers = [asyncio.create_task(self._follower()) for _ in range(plan.streams)]
        await asyncio.gather(*tasks)
        for task in followers:
            task.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        self._told.processor_s = time.process_time()
        return self._told

    async def _client(self, number: int) -> None:
        loop, think = asyncio.get_running_loop(), self._plan.think_s
        connection = _Connection(self._plan.url)
        wanted = loop.time() + think * number / max(1, self._plan.clients)
        while wanted < self._end:
            await asyncio.sleep(max(0.0, wanted - loop.time()))
            if loop.time() >= self._end:
                break
            await self._once(connection, wanted if think else loop.time())
            wanted = wanted + think if think else loop.time()
        connection.close()

    async def _once(self, connection: _Connection, wanted: float) -> None:
        (name,) = self._chance.choices(list(MIX), list(MIX.values()))
        method, path, body, headers, key = self._request(name)
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                status, content = await connection.ask(method, path, body, headers)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError) as error:
            connection.close()
            self._told.errors[f"{name}: {type(error).__name__}"] += 1
            if key:
                self._told.unanswered.append(key)
            return
        self._told.latencies[name].append(asyncio.get_running_loop().time() - wanted)
        if status >= 400:
            with suppress(ValueError):
                self._told.errors[f"{name}: {status} {json.loads(content).get('code')}"] += 1
        elif key:
            job = json.loads(content)["id"]
            self._told.acknowledged[key] = job
            self._jobs.append(job)

    def _request(self, name: str) -> tuple[str, str, bytes, str, str]:
        method, path = name.split(" ")
        if method == "GET":
            # Mostly the newest: what somebody has just submitted.
            job = self._jobs[-1 - int(self._chance.expovariate(0.1)) % len(self._jobs)]
            return method, path.replace("{id}", job), b"", "", ""
        self._submitted += 1
        key = f"load-{self._plan.number}-{self._submitted}"
        models = [{"model": model, "parameters": {"weight": self._chance.random()}} for model in _MODELS]
        request = {"merge_method": "linear", "name": key, "models": models, "evaluate": False}
        return method, path, json.dumps(request).encode(), f"Idempotency-Key: {key}\r\n", key

    async def _follower(self) -> None:
        def tell(error: str | None, events: int) -> None:
            self._told.errors.update([error] if error else [])
            self._told.events += events

        while True:
            connection = _Connection(self._plan.url)
            try:
                await connection.follow(f"/jobs/{self._jobs[-1]}/events", tell)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                self._told.errors[f"stream: {type(error).__name__}"] += 1
            finally:
                connection.close()
            await asyncio.sleep(0.2)


def _apart(plan: Plan) -> Told:
    resource.setrlimit(resource.RLIMIT_NOFILE, (4096, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return asyncio.run(_Clients(plan).run())


def _percentiles(seconds: list[float]) -> str:
    ordered = sorted(seconds) or [float("nan")]
    return " | ".join(
        f"{ordered[min(len(ordered) - 1, int(len(ordered) * part))] * 1e3:.0f}"
        for part in (0.5, 0.95, 0.99, 1)
    )


def _processors(pid: int) -> dict[str, float]:
    """Return seconds of the processor by what a process of the service is."""
    import psutil

    found: Counter[str] = Counter()
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with suppress(psutil.Error):
            times, name = process.cpu_times(), process.name()
            known = ("haproxy", "ServeReplica", "ProxyActor", "Supervisor", "Worker", "gcs_server", "raylet")
            words = f"{name} {' '.join(process.cmdline()[:2])}"
            found[next((word for word in known if word in words), "other")] += times.user + times.system
    return dict(found)


def _lost(database: Path, told: list[Told]) -> dict[str, int]:
    """Hold the store against what was answered."""
    with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
        rows = connection.execute("SELECT id, output_name, idempotency_key FROM jobs").fetchall()
    ids = Counter(row[0] for row in rows)
    by_key = {row[2]: row[0] for row in rows}
    acknowledged = {key: job for one in told for key, job in one.acknowledged.items()}
    unanswered = [key for one in told for key in one.unanswered]
    return {
        "acknowledged": len(acknowledged),
        "of these in the store exactly once": sum(
            ids[job] == 1 and by_key.get(key) == job for key, job in acknowledged.items()
        ),
        "unanswered": len(unanswered),
        "of these in the store": sum(key in by_key for key in unanswered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--streams", type=int, default=20, help="of the clients' streams of events")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument(
        "--think", type=float, default=1.0, help="seconds between two requests of a client; 0: none"
    )
    parser.add_argument("--processes", type=int, default=2, help="of clients")
    parser.add_argument("--workers", type=int, default=1, help="of the service")
    asked = parser.parse_args()
    os.environ["AIDOCKS_MAX_QUEUED_JOBS"] = "100000"
    from benchmarks.train_service import service

    with tempfile.TemporaryDirectory() as scratch, service(asked.workers) as settings:
        print("\n".join(_measure(asked, settings, Path(scratch))))
    sys.stdout.flush()


def _measure(asked: argparse.Namespace, settings: Any, scratch: Path) -> list[str]:
    from aidocks.client.http import Client
    from aidocks.models.registry import Registry
    from cluster.bringup import service_status
    from tests.support.sound_files import write_model

    for model in _MODELS:
        Registry(settings.models_dir).import_checkpoint(model, write_model(scratch / model))
    with Client(settings.service_url) as client:
        weights = [{"model": model, "parameters": {"weight": 0.5}} for model in _MODELS]
        first = client.merge(merge_method="linear", models=weights, name="first", evaluate=False)
        first.wait()
    share, rest = divmod(asked.clients, asked.processes)
    plans = [
        Plan(settings.service_url, share + (number < rest), asked.streams // asked.processes, asked.seconds,
             asked.think, number, (first.id,))
        for number in range(asked.processes)
    ]  # fmt: skip
    pid = service_status(settings).pid
    assert pid is not None
    with multiprocessing.get_context("spawn").Pool(asked.processes) as pool:
        before, load, begun = _processors(pid), os.getloadavg()[0], time.perf_counter()
        answer: AsyncResult[list[Told]] = pool.map_async(_apart, plans)
        told = answer.get()
        seconds, after = time.perf_counter() - begun, _processors(pid)
    took = {name: (after[name] - before.get(name, 0.0)) / seconds for name in after}
    return _report(asked, told, seconds, took, load) + [
        f"| {name} | {count} |" for name, count in _lost(settings.home / "aidocks.db", told).items()
    ]


def _report(
    asked: argparse.Namespace, told: list[Told], seconds: float, took: dict[str, float], load: float
) -> list[str]:
    merged = {name: [value for one in told for value in one.latencies[name]] for name in MIX}
    errors: Counter[str] = sum((one.errors for one in told), Counter())
    answers = sum(map(len, merged.values()))
    how = f"a request every {asked.think:g} s each" if asked.think else "each asks again when it is answered"
    lines = [
        f"{asked.clients} clients ({how}), {asked.streams} streams, {seconds:.0f} s, {os.cpu_count()} cores, "
        f"load before {load:.1f}: {answers / seconds:.0f} answers a second",
        "",
        "| asked | answers | p50 ms | p95 ms | p99 ms | max ms |",
        "|---|---:|---:|---:|---:|---:|",
        *(f"| {name} | {len(values)} | {_percentiles(values)} |" for name, values in merged.items()),
        f"| all reads | {sum(len(merged[name]) for name in _READS)} | "
        f"{_percentiles([value for name in _READS for value in merged[name]])} |",
        "",
        f"errors: {dict(errors) or 'none'}; events in streams: {sum(one.events for one in told)}",
        f"cores taken by the clients: {sum(one.processor_s for one in told) / seconds:.2f}; by the service: "
        + ", ".join(f"{name} {share:.2f}" for name, share in sorted(took.items(), key=lambda one: -one[1])),
        "",
        "| submissions | |",
        "|---|---:|",
    ]
    return lines


if __name__ == "__main__":
    main()
