"""`GET /health` through the service (Ray Serve behind HAProxy) beside the same route on plain uvicorn."""

from __future__ import annotations

import http.client
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from aidocks.settings import Settings
from benchmarks.comparison import Comparison

REQUESTS = 2000
PLAIN = "import uvicorn, fastapi; a = fastapi.FastAPI(); a.get('/health')(lambda: {'status': 'ok'}); "


def run() -> list[Comparison]:
    from cluster.bringup import start_service, stop_service

    with tempfile.TemporaryDirectory(prefix="aidocks-bench-") as home:
        settings = Settings(home=Path(home), port=18723)
        start_service(settings)
        plain = subprocess.Popen(
            [sys.executable, "-c", PLAIN + "uvicorn.run(a, port=18724, log_level='warning')"]
        )
        try:
            _await(18724)
            latencies = [(_median_ms(18723), _median_ms(18724)) for _ in range(5)]
        finally:
            plain.terminate()
            stop_service(settings)
    ours, other = zip(*latencies, strict=True)
    return [
        Comparison("GET /health p50", ours, other, "plain uvicorn", "ms",
                   {"requests": REQUESTS, "connection": "kept alive", "target ms": 2}),
    ]  # fmt: skip


def _median_ms(port: int) -> float:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    seconds = []
    for _ in range(REQUESTS):
        begin = time.perf_counter()
        connection.request("GET", "/health")
        answer = connection.getresponse()
        answer.read()
        assert answer.status == 200
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds) * 1e3


def _await(port: int, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            http.client.HTTPConnection("127.0.0.1", port, timeout=1).request("GET", "/health")
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        else:
            return
