"""Refusals name the field of the request that is to be mended, whatever part of the service refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from aidocks.models.registry import Registry
from aidocks.settings import Settings
from serve.app import create_api


@pytest.fixture
def here(home: Path, tmp_path: Path, tiny_llama: Callable[..., Path]) -> Settings:
    settings = Settings(home=home, allowed_roots=(tmp_path / "allowed",))
    model = tiny_llama(tmp_path / "model")
    Registry(settings.models_dir).import_checkpoint("tiny", model)
    pickled = tmp_path / "allowed" / "pickled"
    pickled.mkdir(parents=True)
    (pickled / "config.json").write_text((model / "config.json").read_text())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return settings


async def refusal(settings: Settings, path: str, body: dict[str, Any]) -> tuple[int, str, list[str]]:
    transport = httpx.ASGITransport(app=create_api(settings))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        problem = (await client.post(path, json=body)).json()
    return problem["status"], problem["code"], [error["field"] for error in problem["errors"]]


def ask(settings: Settings, path: str, body: dict[str, Any]) -> tuple[int, str, list[str]]:
    import asyncio

    return asyncio.run(refusal(settings, path, body))


def test_of_laser(here: Settings, tmp_path: Path) -> None:
    pickled = str(tmp_path / "allowed" / "pickled")

    def body(**fields: Any) -> dict[str, Any]:
        return {"base_model_name": "tiny", "laser_model_name": "new", **fields}

    assert ask(here, "/laser", body(base_model_name="tinny")) == (404, "unknown_model", ["base_model_name"])
    assert ask(here, "/laser", body(base_model_name="/etc")) == (403, "path_not_allowed", ["base_model_name"])
    assert ask(here, "/laser", body(base_model_name=pickled)) == (
        422,
        "unsafe_checkpoint",
        ["base_model_name"],
    )
    assert ask(here, "/laser", body(laser_model_name="tiny")) == (409, "name_taken", ["laser_model_name"])
    assert ask(here, "/laser", body(laser_model_name="../x")) == (422, "invalid_spec", ["laser_model_name"])
    assert ask(here, "/laser", body(kind="q_proj")) == (422, "invalid_spec", ["kind"])


def test_of_byo_moe(here: Settings, tmp_path: Path) -> None:
    expert = {"source_model": "tiny", "positive_prompts": ["a"]}

    def body(*experts: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"base_model": "tiny", "experts": [expert, *experts], **fields}

    second = "experts[1].source_model"
    unknown = {"source_model": "tinny", "positive_prompts": ["b"]}
    pickled = {"source_model": str(tmp_path / "allowed" / "pickled"), "positive_prompts": ["b"]}
    assert ask(here, "/byo-moe", body(unknown)) == (404, "unknown_model", [second])
    assert ask(here, "/byo-moe", body(pickled)) == (422, "unsafe_checkpoint", [second])
    assert ask(here, "/byo-moe", body()) == (422, "invalid_spec", ["experts"])
    fine = {"source_model": "tiny", "positive_prompts": ["b"]}
    assert ask(here, "/byo-moe", body(fine, name="tiny")) == (409, "name_taken", ["name"])


def test_a_name_that_a_job_under_way_will_use_is_taken(here: Settings) -> None:
    async def twice() -> httpx.Response:
        transport = httpx.ASGITransport(app=create_api(here))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            body = {"base_model_name": "tiny", "laser_model_name": "new"}
            assert (await client.post("/laser", json=body)).status_code == 202
            return await client.post("/laser", json=body)

    import asyncio

    answer = asyncio.run(twice())
    assert answer.status_code == 409
    assert answer.json()["errors"][0]["field"] == "laser_model_name"
