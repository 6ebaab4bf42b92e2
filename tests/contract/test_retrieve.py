"""/embed and /rerank, and what OpenAI's, Jina's and Cohere's clients call them, on real small models without Ray."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from fastapi import FastAPI
from typer.testing import CliRunner

from aidocks.cli.app import app
from aidocks.cli.output import manner
from aidocks.client.async_http import AsyncClient
from aidocks.client.http import Client
from aidocks.errors import IncompatibleModels, InvalidSpec, ServiceUnreachable, TooBusy, UnknownModel
from aidocks.models.registry import Registry
from aidocks.retrieval.serving import Call, ModelsAtHand, Reply
from aidocks.settings import Settings
from serve.app import create_api
from serve.retrieval import waiting
from tests.support.tiny_retrievers import make_embedder, make_encoder, make_reranker

TEXTS = ["the river", "who is the king of the country?", "a bridge, a road and a house", "fire"]


class InThread:
    """Computes in a thread of this process."""

    def __init__(self) -> None:
        self.models = ModelsAtHand(1 << 30, "cpu", 1)
        self.calls: list[Call] = []
        self._thread = ThreadPoolExecutor(1)

    async def compute(self, call: Call) -> Reply:
        self.calls.append(call)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.models.compute, call)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("retrievers")
    return {
        "embedder": make_embedder(root / "embedder"),
        "prompted": make_embedder(root / "prompted", prompts={"query": "who: ", "passage": "house: "}),
        "reranker": make_reranker(root / "reranker"),
        "encoder": make_encoder(root / "encoder"),
    }


@pytest.fixture(scope="session")
def computing() -> InThread:
    return InThread()


@pytest.fixture
def api(settings: Settings, computing: InThread, made: dict[str, Path]) -> FastAPI:
    registry = Registry(settings.models_dir)
    for name, path in made.items():
        registry.import_checkpoint(name, path)
    return create_api(settings, compute=computing)


@pytest.fixture
def ai(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        yield client


@pytest.fixture
def vectors(made: dict[str, Path]) -> Any:
    """What sentence-transformers itself makes of the texts."""
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(made["embedder"]), device="cpu", local_files_only=True).encode(TEXTS)


def test_vectors_are_those_of_sentence_transformers(client: Any, vectors: Any) -> None:
    answer = client.post("/embed", json={"model": "embedder", "input": TEXTS})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    assert set(body) == {"model", "dimensions", "embeddings", "usage"}
    assert (body["model"], body["dimensions"]) == ("embedder", 32)
    np.testing.assert_allclose(body["embeddings"], vectors, atol=1e-5)
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 4 * 3
    one = client.post("/embed", json={"model": "embedder", "input": TEXTS[1]}).json()
    np.testing.assert_allclose(one["embeddings"], vectors[1:2], atol=1e-5)


def test_both_forms_hold_the_same_values(client: Any) -> None:
    request = {"model": "embedder", "input": TEXTS}
    numbers = client.post("/embed", json=request).json()["embeddings"]
    coded = client.post("/embed", json=request | {"encoding_format": "base64"}).json()["embeddings"]
    read = [np.frombuffer(base64.b64decode(text), "<f4") for text in coded]
    assert np.array_equal(np.array(numbers, np.float32), np.array(read))


def test_dimensions_cut_and_normalise(client: Any, vectors: Any, problem: Callable[..., Any]) -> None:
    request = {"model": "embedder", "input": TEXTS}
    body = client.post("/embed", json=request | {"dimensions": 8}).json()
    expected = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    assert body["dimensions"] == 8
    np.testing.assert_allclose(body["embeddings"], expected, atol=1e-5)
    refused = problem(client.post("/embed", json=request | {"dimensions": 33}), 422, "invalid_spec")
    assert refused["errors"][0]["field"] == "dimensions"
    assert "32" in refused["hint"]


def test_roles_put_the_models_prompts_before_texts(client: Any) -> None:
    def ask(text: str, **fields: Any) -> Any:
        return client.post("/embed", json={"model": "prompted", "input": text} | fields).json()["embeddings"][
            0
        ]

    plain, query = ask("the king"), ask("the king", role="query")
    np.testing.assert_allclose(query, ask("who: the king"), atol=1e-5)
    np.testing.assert_allclose(ask("the king", role="passage"), ask("house: the king"), atol=1e-5)
    np.testing.assert_allclose(ask("the king", prompt="fire: "), ask("fire: the king"), atol=1e-5)
    assert np.abs(np.subtract(plain, query)).max() > 1e-3


def test_requests_of_the_same_moment_are_computed_together(
    url: str, computing: InThread, vectors: Any
) -> None:
    async def many() -> list[Any]:
        async with AsyncClient(url) as client:
            return await asyncio.gather(*(client.embed("embedder", TEXTS[n % 4]) for n in range(64)))

    before = len(computing.calls)
    answers = asyncio.run(many())
    for n, answer in enumerate(answers):
        np.testing.assert_allclose(answer.embeddings, vectors[n % 4 : n % 4 + 1], atol=1e-5)
    assert len(computing.calls) - before < 64


def test_passages_come_in_order(client: Any, made: dict[str, Path]) -> None:
    from sentence_transformers import CrossEncoder

    request = {"model": "reranker", "query": "where is the king?", "documents": [*TEXTS, TEXTS[0]]}
    body = client.post("/rerank", json=request | {"raw_scores": True, "return_documents": True}).json()
    model = CrossEncoder(str(made["reranker"]), device="cpu", local_files_only=True)
    import torch

    expected = model.predict(
        [(request["query"], text) for text in request["documents"]], activation_fn=torch.nn.Identity()
    )
    order = [one["index"] for one in body["results"]]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order.index(0) < order.index(4), "of equal ones, the earlier"
    scores = [one["relevance_score"] for one in body["results"]]
    np.testing.assert_allclose(scores, expected[order], atol=1e-4)
    assert scores == sorted(scores, reverse=True)
    assert [one["document"]["text"] for one in body["results"]] == [request["documents"][n] for n in order]
    best = client.post("/rerank", json=request | {"top_n": 2}).json()["results"]
    assert [one["index"] for one in best] == order[:2]
    assert [set(one) for one in best] == [{"index", "relevance_score"}] * 2
    np.testing.assert_allclose(
        [one["relevance_score"] for one in best], [1 / (1 + np.exp(-s)) for s in scores[:2]], atol=1e-5
    )


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "words"),
    [
        ("/embed", {"model": "none", "input": "x"}, 404, "unknown_model", "none"),
        ("/embed", {"model": "reranker", "input": "x"}, 422, "incompatible_models", "/rerank"),
        ("/rerank", {"model": "embedder", "query": "x", "documents": ["y"]}, 422, "incompatible_models", "/embed"),
        ("/rerank", {"model": "encoder", "query": "x", "documents": ["y"]}, 422, "incompatible_models", "head"),
        ("/embed", {"model": "/etc", "input": "x"}, 403, "path_not_allowed", "allowed root"),
        ("/embed", {"model": "embedder", "input": []}, 422, "invalid_spec", "input"),
        ("/embed", {"model": "embedder", "input": ["x", ""]}, 422, "invalid_spec", "input"),
        ("/embed", {"model": "embedder"}, 422, "invalid_spec", "input"),
        ("/embed", {"model": "embedder", "input": "x", "rolle": "query"}, 422, "invalid_spec", "rolle"),
        ("/embed", {"model": "embedder", "input": ["x"] * 2049}, 422, "invalid_spec", "2048"),
        ("/rerank", {"model": "reranker", "query": "x", "documents": []}, 422, "invalid_spec", "documents"),
        ("/rerank", {"model": "reranker", "query": "x", "documents": ["y"], "top_n": 0}, 422, "invalid_spec", "top_n"),
        ("/embed", {"model": "embedder", "input": "x", "dimensions": 0}, 422, "invalid_spec", "dimensions"),
    ],
)  # fmt: skip
def test_what_is_refused(
    client: Any, problem: Callable[..., Any], path: str, body: Any, status: int, code: str, words: str
) -> None:
    assert words in json.dumps(problem(client.post(path, json=body), status, code))


def test_only_json_is_read(client: Any, problem: Callable[..., Any]) -> None:
    problem(client.post("/embed", content=b"model=x"), 415, "unsupported_media_type")


def test_large_requests_are_taken(client: Any) -> None:
    answer = client.post("/embed", json={"model": "embedder", "input": ["the river " * 1000] * 200})
    assert answer.status_code == 200
    assert len(answer.json()["embeddings"]) == 200


def test_a_model_that_was_replaced_is_another_one(client: Any, settings: Settings, tmp_path: Path) -> None:
    request = {"model": "embedder", "input": "the river"}
    before = client.post("/embed", json=request).json()["embeddings"]
    registry = Registry(settings.models_dir)
    registry.delete("embedder")
    assert client.post("/embed", json=request).status_code == 404
    registry.import_checkpoint("embedder", make_embedder(tmp_path / "other", seed=5))
    after = client.post("/embed", json=request).json()["embeddings"]
    assert np.abs(np.subtract(before, after)).max() > 1e-3


def test_one_whose_text_makes_no_numbers_is_no_failure_of_others(
    client: Any, problem: Callable[..., Any], computing: InThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = computing.models.compute

    def broken(call: Call) -> Reply:
        reply = compute(call)
        reply.values[[item == "fire" for item in call.items]] = np.nan
        return reply

    monkeypatch.setattr(computing.models, "compute", broken)
    request = {"model": "embedder", "input": TEXTS}
    problem(client.post("/embed", json=request), 422, "corrupt_checkpoint")
    assert client.post("/embed", json=request | {"input": TEXTS[:3]}).status_code == 200


def test_a_library_that_is_missing_is_said(
    client: Any, problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from aidocks.retrieval import libraries

    monkeypatch.setattr(libraries, "find_spec", lambda name: None if "sentence" in name else name)
    refused = problem(client.post("/embed", json={"model": "embedder", "input": "x"}), 501, "missing_extra")
    assert "aidocks[local]" in refused["hint"]


def test_a_model_that_is_deleted_meanwhile(made: dict[str, Path], settings: Settings, tmp_path: Path) -> None:
    from aidocks.models.resolve import ModelResolver
    from aidocks.retrieval.answers import open_trained
    from aidocks.retrieval.serving import Recipe

    directory = make_embedder(tmp_path / "brief")
    found = open_trained(str(directory), "embedding", ModelResolver(settings.models_dir, (tmp_path,)))
    models = ModelsAtHand(1 << 30, "cpu", 1)
    models.compute(Call(Recipe(found), ["the river"]))
    directory.rename(tmp_path / "gone")
    with pytest.raises(UnknownModel, match="no longer there"):
        models.compute(Call(Recipe(found), ["the river"]))
    assert models.names == ()


def test_models_that_fit_no_more_are_let_go(made: dict[str, Path], settings: Settings) -> None:
    from aidocks.models.resolve import ModelResolver
    from aidocks.retrieval.answers import open_trained
    from aidocks.retrieval.serving import Recipe, weight_bytes

    resolver = ModelResolver(settings.models_dir, (made["embedder"].parent,))
    kinds = (("embedder", "embedding"), ("prompted", "embedding"), ("reranker", "reranker"))
    found = {name: open_trained(str(made[name]), kind, resolver) for name, kind in kinds}  # type: ignore[arg-type]
    models = ModelsAtHand(weight_bytes(found["embedder"]) * 2, "cpu", 1)
    for name in ("embedder", "prompted", "embedder"):
        models.compute(Call(Recipe(found[name]), ["the river"]))
    assert models.names == (str(made["prompted"]), str(made["embedder"]))
    models.compute(Call(Recipe(found["reranker"]), [("the king", "the river")]))
    assert str(made["prompted"]) not in models.names
    assert models.names[-1] == str(made["reranker"])


def test_an_adapter_answers_with_its_base(
    client: Any, settings: Settings, made: dict[str, Path], tmp_path: Path, vectors: Any
) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(made["embedder"]), device="cpu", local_files_only=True)
    config = LoraConfig(r=4, target_modules=["query", "value"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = get_peft_model(model[0].model, config)
    adapted.peft_config["default"].base_model_name_or_path = "embedder"
    adapted.save_pretrained(tmp_path / "adapter")
    model[0].model = adapted.merge_and_unload()
    Registry(settings.models_dir).import_checkpoint("adapter", tmp_path / "adapter")
    answer = client.post("/embed", json={"model": "adapter", "input": TEXTS})
    assert answer.status_code == 200, answer.text
    found = answer.json()["embeddings"]
    np.testing.assert_allclose(found, model.encode(TEXTS), atol=1e-5)
    assert np.abs(np.subtract(found, vectors)).max() > 1e-3


def test_too_much_is_refused_with_a_time(
    client: Any, problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, api: FastAPI
) -> None:
    async def busy(*_: Any) -> Any:
        raise TooBusy("256 requests are waiting.")

    monkeypatch.setattr(api.state.context.waiting, "answer", busy)
    answer = client.post("/embed", json={"model": "embedder", "input": "x"})
    problem(answer, 429, "too_busy")
    assert answer.headers["retry-after"] == "1"
    assert waiting.MOST_WAITING_REQUESTS >= 64


def test_without_anybody_who_computes(settings: Settings, made: dict[str, Path]) -> None:
    from tests.contract.conftest import ApiClient

    Registry(settings.models_dir).import_checkpoint("embedder", made["embedder"])
    answer = ApiClient(create_api(settings)).post("/embed", json={"model": "embedder", "input": "x"})
    assert (answer.status_code, answer.json()["code"]) == (503, "service_unreachable")
    assert answer.headers["retry-after"] == "1"


def test_the_clients(url: str, vectors: Any) -> None:
    with Client(url, retry_s=0) as client:
        answer = client.embed("embedder", TEXTS)
        np.testing.assert_allclose(answer.embeddings, vectors, atol=1e-5)
        assert answer.dimensions == 32
        assert len(client.embed("embedder", "one", dimensions=4).embeddings[0]) == 4
        ranked = client.rerank("reranker", "the king", TEXTS, top_n=3, return_documents=True)
        assert [one.document.text for one in ranked.results if one.document] == [
            TEXTS[one.index] for one in ranked.results
        ]
        with pytest.raises(UnknownModel):
            client.embed("nothing", "x")
        with pytest.raises(IncompatibleModels):
            client.rerank("embedder", "x", ["y"])

    async def asked() -> Any:
        async with AsyncClient(url, retry_s=0) as client:
            return await client.rerank("reranker", "the king", TEXTS, top_n=3, return_documents=True)

    assert asyncio.run(asked()) == ranked


def test_openais_client(ai: openai.OpenAI, vectors: Any) -> None:
    made = ai.embeddings.create(model="embedder", input=TEXTS)
    assert (made.object, made.model) == ("list", "embedder")
    assert [one.index for one in made.data] == [0, 1, 2, 3]
    np.testing.assert_allclose([one.embedding for one in made.data], vectors, atol=1e-5)
    assert made.usage.prompt_tokens == made.usage.total_tokens > 0
    numbers = ai.embeddings.create(model="embedder", input=TEXTS[0], encoding_format="float", dimensions=8)
    assert len(numbers.data[0].embedding) == 8
    query = ai.embeddings.create(model="prompted", input="x", extra_body={"input_type": "search_query"})
    plain = ai.embeddings.create(model="prompted", input="who: x")
    np.testing.assert_allclose(query.data[0].embedding, plain.data[0].embedding, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"model": "none", "input": "x"}, "model"),
        ({"model": "embedder", "input": [1, 2, 3]}, "input"),
        ({"model": "embedder", "input": [[1], [2]]}, "input"),
        ({"model": "embedder", "input": []}, "input"),
        ({"model": "embedder", "input": "x", "dimensions": 33}, "dimensions"),
        ({"model": "embedder", "input": "x", "extra_body": {"input_type": "picture"}}, "input_type"),
    ],
)
def test_what_is_refused_to_openais_client(ai: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as raised:
        ai.embeddings.create(**fields)
    assert raised.value.param == param


def test_what_jinas_and_coheres_clients_ask(client: Any) -> None:
    request = {
        "model": "reranker", "query": "the king", "documents": [TEXTS[0], {"text": TEXTS[1]}], "top_n": 1,
        "return_documents": True,
    }  # fmt: skip
    body = client.post("/v1/rerank", json=request).json()
    (one,) = body["results"]
    assert 0 <= one["relevance_score"] <= 1
    assert one["document"]["text"] == TEXTS[one["index"]]
    assert body["usage"]["total_tokens"] == body["meta"]["tokens"]["input_tokens"] > 0
    assert body["id"]
    refused = client.post("/v1/rerank", json=request | {"model": "embedder"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "model"


@pytest.fixture
def command() -> Iterator[Callable[..., Any]]:
    """Run a command in this process, where torch is imported already."""

    def run(*words: str, given: str = "") -> Any:
        manner.json = False
        return CliRunner().invoke(app, words, input=given)

    yield run
    manner.json = False


def test_the_command_line(
    command: Callable[..., Any], url: str, vectors: Any, tmp_path: Path, settings: Settings
) -> None:
    listed = command("embed", "embedder", "--url", url, given="\n".join(TEXTS))
    lines = [json.loads(line) for line in listed.stdout.splitlines()]
    np.testing.assert_allclose(lines, vectors, atol=1e-5)
    file = tmp_path / "texts.txt"
    file.write_text("\n".join(TEXTS))
    here = command("embed", "embedder", "--local", "--file", str(file), "--json")
    document = json.loads(here.stdout)
    np.testing.assert_allclose(document["embeddings"], vectors, atol=1e-5)
    assert document["usage"]["total_tokens"] > 0
    ranked = command("rerank", "reranker", "the king", *TEXTS, "--top-n", "2", "--url", url)
    assert len(ranked.stdout.splitlines()) == 2
    same = command("rerank", "reranker", "the king", *TEXTS, "--top-n", "2", "--local")
    assert same.stdout.split() == ranked.stdout.split()
    assert isinstance(command("embed", "nothing", "x", "--url", url).exception, UnknownModel)
    assert isinstance(command("embed", "embedder", "--url", url).exception, InvalidSpec)
    assert command("embed", "embedder", "x", "--local", "--url", url).exit_code == 2


def test_nobody_is_kept_waiting_by_a_service_that_is_not_there() -> None:
    with Client("http://127.0.0.1:9", retry_s=0) as client, pytest.raises(ServiceUnreachable):
        client.embed("embedder", "x")
