"""Which library trains: TRL with PEFT, or the same trainers with unsloth's kernels. Decided where it is trained.

unsloth changes trl, transformers and peft when it is imported and must come first, so nothing here imports them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from aidocks.errors import InvalidSpec
from aidocks.merge.members import text_config
from aidocks.training.methods import UNSLOTH_ADAPTERS, UNSLOTH_METHODS
from aidocks.training.run import AdapterKind, Backend, LLMTraining, Method

if TYPE_CHECKING:
    from train.distributed import Place

#: Versions of unsloth from which on it admits the transformers and trl that are installed here, and trains on a CPU.
FROM_VERSION = (2026, 10, 7)
FROM_VERSION_ON_CPU = (2026, 10, 9)
#: Types of models, as their configurations call them, for which it has kernels of its own.
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "granite")
_METHODS_ON_CPU: tuple[Method, ...] = ("sft", "pretrain")
_ADAPTERS_ON_CPU: tuple[AdapterKind, ...] = ("lora", "full")


@dataclass(frozen=True)
class Facts:
    """What the choice depends on beside the training.

    Attributes:
        gpu: Whether this process has a CUDA GPU.
        world_size: Processes of the training.
        architecture: Type of the model, as its configuration calls it.
        unsloth: Installed version of unsloth; None where there is none.
    """

    gpu: bool
    world_size: int
    architecture: str
    unsloth: str | None


def choose(training: LLMTraining, place: Place) -> tuple[Backend, str]:
    """Choose what trains. To be called before anything imports trl, transformers or peft.

    Returns:
        The backend, and why, in a sentence for people.

    Raises:
        InvalidSpec: unsloth is asked for, and cannot train this; says why.
    """
    config = json.loads((training.base / "config.json").read_text(encoding="utf-8"))
    architecture = str(text_config(config).get("model_type") or config.get("model_type", "unknown"))
    # What goes on with fewer processes for a while is trained by the same library all the time.
    members = training.workers or place.world_size
    return decide(training, Facts(place.gpu, members, architecture, _version_of("unsloth")))


def decide(training: LLMTraining, facts: Facts) -> tuple[Backend, str]:
    """Return what :func:`choose` does, for given facts."""
    if training.backend == "trl":
        return "trl", "TRL trains, as the request asks."
    obstacle = next(_obstacles(training, facts), None)
    if training.backend == "unsloth":
        if obstacle is not None:
            raise InvalidSpec(
                f"unsloth cannot train this: {obstacle}.",
                field="backend",
                value="unsloth",
                hint="With `backend: auto` TRL trains it.",
            )
        return "unsloth", f"unsloth {facts.unsloth} trains, as the request asks."
    if not facts.gpu:
        return "trl", "TRL trains: there is no CUDA GPU, and unsloth is made for those."
    if obstacle is not None:
        return "trl", f"TRL trains and not unsloth: {obstacle}."
    return "unsloth", f"unsloth {facts.unsloth} trains: one GPU, and it has kernels for {facts.architecture}."


def _obstacles(training: LLMTraining, facts: Facts) -> Iterator[str]:
    """Yield what keeps unsloth from this training."""
    methods, adapters, least = UNSLOTH_METHODS, UNSLOTH_ADAPTERS, FROM_VERSION
    if not facts.gpu:
        methods, adapters, least = _METHODS_ON_CPU, _ADAPTERS_ON_CPU, FROM_VERSION_ON_CPU
    where = "" if facts.gpu else " without a CUDA GPU"
    wanted = ".".join(map(str, least))
    if facts.unsloth is None:
        yield "it is not installed" + ("" if facts.gpu else ", and there is no CUDA GPU")
    elif _numbers(facts.unsloth) < least:
        yield f"version {facts.unsloth} is installed, and {wanted} or later is needed{where}"
    if facts.world_size != 1:
        yield f"{facts.world_size} processes train, and it is used with one"
    if training.deepspeed is not None:
        yield "it does not work with DeepSpeed"
    if training.method not in methods:
        yield f"it is not used for the method {training.method}{where}"
    if training.adapter.kind not in adapters:
        yield f"it is not used for the adapter {training.adapter.kind}{where}"
    if facts.architecture not in ARCHITECTURES:
        yield f"it has no kernels for {facts.architecture} models"


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """Return the leading numbers of a version: ``2026.10.7.post1`` is (2026, 10, 7)."""
    numbers = []
    for part in text.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)
