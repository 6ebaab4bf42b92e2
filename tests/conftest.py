"""Fixtures that every kind of test shares: data when it is there, small real models, a running service."""

from __future__ import annotations

import os
import random
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from aidocks.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
TinyLlama = Callable[..., Path]

# One thread a process: the tests share a small machine with the workers that they start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def _applications_are_closed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Close the stores of applications that a test made and never brought to their end; thousands of tests do."""
    known = sys.modules.get("serve.context")
    if known is None:
        yield
        return
    opened: list[Any] = []
    prepare = known.Context.__post_init__

    def noted(context: Any) -> None:
        prepare(context)
        opened.append(context)

    monkeypatch.setattr(known.Context, "__post_init__", noted)
    yield
    for context in opened:
        context.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The directory of real small models and data sets; tests that need it skip without it."""
    path = Path(os.environ.get("AIDOCKS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "models").is_dir():
        pytest.skip(f"no shared data at {path} (set AIDOCKS_SHARED_DATA)")
    return path


@pytest.fixture(scope="session")
def stories260k(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 260 thousand parameters: the trained one where it is at hand, else one of random weights."""
    shared = Path(os.environ.get("AIDOCKS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    trained = shared / "models" / "stories260k"
    return trained if trained.is_dir() else make_tiny_llama(tmp_path_factory.mktemp("stories") / "model")


@pytest.fixture(scope="session")
def tiny_llama() -> TinyLlama:
    """Make a random small Llama: ``tiny_llama(directory, seed=0, max_shard_size="5GB", **config_overrides)``."""
    return make_tiny_llama


def make_tiny_llama(directory: Path, seed: int = 0, max_shard_size: str = "5GB", **overrides: Any) -> Path:
    """Save a Llama with random weights and a byte-level tokenizer of 512 tokens in ``directory``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    }
    dtype = overrides.pop("dtype", torch.float32)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**(settings | overrides))).to(dtype)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    _tiny_tokenizer().save_pretrained(directory)
    return directory


def _tiny_tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


@pytest.fixture
def terminal_width(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make what the command line prints in this process so wide; its consoles know their width from their making on."""
    from aidocks.cli import output

    def widen(columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        output.out.cache_clear()
        output.err.cache_clear()

    return widen


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data directory of the test's own, also for subprocesses that inherit the environment."""
    directory = tmp_path / "home"
    directory.mkdir()
    for name in [
        name for name in os.environ if name.startswith("AIDOCKS_") and name != "AIDOCKS_SHARED_DATA"
    ]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AIDOCKS_HOME", str(directory))
    return directory


@pytest.fixture
def settings(home: Path) -> Settings:
    return Settings(home=home)


@dataclass(frozen=True)
class Service:
    """A running embedded service, for the whole test session.

    Attributes:
        env: Environment in which ``python -m aidocks`` and the examples talk to this service.
    """

    url: str
    settings: Settings
    env: dict[str, str]


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start the real service on a free port; its registry holds the small model ``tiny-base``.

    On one node as `aidocks up` makes it, or on as many as ``AIDOCKS_TEST_NODES`` says.
    """
    from aidocks.models.registry import Registry
    from cluster.bringup import start_service, stop_service

    home = tmp_path_factory.mktemp("service")
    settings = Settings(home=home, port=free_port())
    model = make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")
    Registry(settings.models_dir).import_checkpoint("tiny-base", model)
    if count := int(os.environ.get("AIDOCKS_TEST_NODES", "0")):
        from tests.support.nodes import nodes

        with nodes(settings.model_copy(update={"workers": count}), count) as made:
            yield Service(made.settings.service_url, made.settings, service_environment(made.settings))
        return
    try:
        start_service(settings)
        yield Service(settings.service_url, settings, service_environment(settings))
    finally:
        stop_service(settings)


def service_environment(settings: Settings) -> dict[str, str]:
    """Return the environment of a user's shell in which ``AIDOCKS_HOME`` and the URL point at the service."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("AIDOCKS_", "RAY_"))}
    return inherited | {
        "AIDOCKS_HOME": str(settings.home),
        "AIDOCKS_PORT": str(settings.port),
        "AIDOCKS_URL": settings.service_url,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "")]),
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    """Return a port that nothing has, and that the system gives to nobody who does not ask for it by number.

    Ray's processes take ports of the system's choice all the time, between this call and the service's start too.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
