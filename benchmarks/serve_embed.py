"""64 concurrent requests of one text each to `/embed`, beside sentence-transformers with the same texts in one batch.

Queries (about 14 tokens) and passages (about 160) of SQuAD, one model, all cores for both; in turns. What is asked is
over HTTP, on connections that are open, and the program that asks takes its part of the same cores. The peer is in a
process of its own that has loaded the model and is warm, as the service is. "In turn" is the same 64 clients, each of
which sends the next text when it has the answer to the one before.

``AIDOCKS_BENCH_EMBEDDER`` names the model's directory; the texts are ``rerank_squad.jsonl`` of the benchmarks' data.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir, embedding_model
from benchmarks.train_service import service

CLIENTS = 64
RUNS = 7
#: Texts that each client sends one after another, in the part that measures a service under steady load.
ROUNDS = 4
TARGET_THROUGHPUT, TARGET_P99 = 0.8, 3.0

_PEER = """
import json, sys, time
import torch
from sentence_transformers import SentenceTransformer
torch.set_num_threads(int(sys.argv[2]))
model = SentenceTransformer(sys.argv[1], device="cpu", local_files_only=True)
for line in sys.stdin:
    texts = json.loads(line)
    begin = time.perf_counter()
    model.encode(texts, batch_size=len(texts), show_progress_bar=False)
    print(time.perf_counter() - begin, flush=True)
"""


def run() -> list[Comparison]:
    model = embedding_model()
    kinds = texts_of(data_dir("rerank_squad.jsonl"))
    cores = len(os.sched_getaffinity(0))
    results: list[Comparison] = []
    with service(workers=1) as settings, peer(model, cores) as encode:
        for name, texts in kinds.items():
            address = settings.service_url
            asyncio.run(ask(address, str(model), texts, 2))
            encode(texts)
            measured = [(asyncio.run(ask(address, str(model), texts, 1)), encode(texts)) for _ in range(RUNS)]
            steady = [
                (asyncio.run(ask(address, str(model), texts, ROUNDS)), encode(texts)) for _ in range(RUNS)
            ]
            results += compare(name, measured, steady, cores)
    return results


def compare(
    name: str,
    measured: Sequence[tuple[tuple[float, list[float]], float]],
    steady: Sequence[tuple[tuple[float, list[float]], float]],
    cores: int,
) -> list[Comparison]:
    """Return the comparisons of one kind of texts: time of all, time of one, and the load that goes on."""
    other = tuple(batch for _, batch in measured)
    said = "sentence-transformers, one batch"
    facts: dict[str, str | float | int] = {"cores": cores}
    return [
        Comparison(
            f"/embed, {CLIENTS} {name} at once",
            tuple(whole for (whole, _), _ in measured),
            other,
            said,
            facts=facts | {"target ratio": 1 / TARGET_THROUGHPUT},
        ),
        Comparison(
            f"/embed, {CLIENTS} {name} at once, p99 of a request",
            tuple(high(latencies) for (_, latencies), _ in measured),
            other,
            said,
            facts=facts | {"target ratio": TARGET_P99, "p50 ms": _p50(measured)},
        ),
        Comparison(
            f"/embed, {CLIENTS} clients, {ROUNDS} {name} each in turn, a text",
            tuple(whole / CLIENTS / ROUNDS * 1e3 for (whole, _), _ in steady),
            tuple(batch / CLIENTS * 1e3 for _, batch in steady),
            said,
            "ms",
            facts | {"target ratio": 1 / TARGET_THROUGHPUT},
        ),
    ]


def high(latencies: Sequence[float]) -> float:
    """Return the 99th percentile of seconds; of 64, the largest."""
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _p50(measured: Sequence[tuple[tuple[float, list[float]], float]]) -> float:
    return round(1e3 * statistics.median(second for (_, latencies), _ in measured for second in latencies), 1)


def texts_of(path: Path) -> dict[str, list[str]]:
    """Return queries and passages, as many different ones of each as there are clients."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    queries = dict.fromkeys(row["query"] for row in rows)
    passages = dict.fromkeys(text for row in rows for text in row["positive"])
    return {"queries": list(queries)[:CLIENTS], "passages": list(passages)[:CLIENTS]}


@contextmanager
def peer(model: Path, cores: int) -> Iterator[Callable[[Sequence[str]], float]]:
    """Yield a function that has a warm process encode texts in one batch, and returns its seconds."""
    program = subprocess.Popen(
        [sys.executable, "-c", _PEER, str(model), str(cores)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(cores)},
    )
    assert program.stdin is not None
    assert program.stdout is not None
    told, heard = program.stdin, program.stdout

    def encode(texts: Sequence[str]) -> float:
        told.write(json.dumps(list(texts)) + "\n")
        told.flush()
        return float(heard.readline())

    try:
        yield encode
    finally:
        program.kill()
        program.wait()


async def ask(address: str, model: str, texts: Sequence[str], rounds: int) -> tuple[float, list[float]]:
    """Let one client for each text ask for vectors, ``rounds`` texts each, one after another.

    Returns:
        Seconds of all of it, and of every request.
    """
    parts = urlsplit(address)
    connections = [await asyncio.open_connection(parts.hostname, parts.port) for _ in texts]
    requests = [_request(parts.netloc, model, text) for text in texts]
    latencies: list[float] = []

    async def client(number: int) -> None:
        reader, writer = connections[number]
        for turn in range(rounds):
            begin = time.perf_counter()
            writer.write(requests[(number + 7 * turn) % len(requests)])
            head = await reader.readuntil(b"\r\n\r\n")
            fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
            body = await reader.readexactly(int(fields[b"content-length"]))
            if b" 200 " not in head.split(b"\r\n", 1)[0]:
                raise RuntimeError(body.decode(errors="replace"))
            latencies.append(time.perf_counter() - begin)

    begin = time.perf_counter()
    await asyncio.gather(*(client(number) for number in range(len(texts))))
    whole = time.perf_counter() - begin
    for _, writer in connections:
        writer.close()
    return whole, latencies


def _request(host: str, model: str, text: str) -> bytes:
    body = json.dumps({"model": model, "input": text}).encode()
    head = (
        "POST /embed HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join([*head, "", ""]).encode() + body
