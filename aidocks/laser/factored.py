"""Models whose reduced matrices are stored as two factors: importing this module lets transformers load them.

    import aidocks.laser.factored
    model = AutoModelForCausalLM.from_pretrained(path)

The model is an instance of the original class (of a subclass made here) in which a linear layer that is stored as
factors is two layers, one after the other; no dense matrix is ever built. All of transformers applies: generation,
``save_pretrained``, training. The form on disk is described in :mod:`aidocks.laser.factors`.

No code comes from the checkpoint, and a weight that is missing is an error, never a random number.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers import PreTrainedConfig as Config
from transformers.pytorch_utils import Conv1D

from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.laser.factors import MODEL_TYPE, factored_config, matrix_name, read_factored

_PREFIX = "Factored"
#: What transformers adds to the content of a config.json, for itself.
_BESIDE = ("name_or_path", "_commit_hash")


class FactoredLinear(nn.Module):
    """y = A (B x) + bias, in place of a linear layer y = W x + bias with W = A B.

    Attributes:
        factor_a: Holds A [out_features, rank].
        factor_b: Holds B [rank, in_features].
        bias: That of the layer replaced, under its own name.
    """

    bias: nn.Parameter | None

    def __init__(self, replaced: nn.Linear, rank: int) -> None:
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        like: dict[str, Any] = {"device": replaced.weight.device, "dtype": replaced.weight.dtype}
        self.factor_a = nn.Linear(rank, self.out_features, bias=False, **like)
        self.factor_b = nn.Linear(self.in_features, rank, bias=False, **like)
        self.register_parameter("bias", replaced.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.factor_a(self.factor_b(x))
        return y if self.bias is None else y + self.bias


class FactoredConv1D(nn.Module):
    """y = (x A) B + bias, in place of GPT-2's linear layer y = x W + bias with W = A B stored [inputs, outputs]."""

    bias: nn.Parameter

    def __init__(self, replaced: Any, rank: int) -> None:
        super().__init__()
        inputs, outputs = replaced.weight.shape
        self.factor_a = _Product(inputs, rank, replaced.weight)
        self.factor_b = _Product(rank, outputs, replaced.weight)
        self.register_parameter("bias", replaced.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.factor_b(self.factor_a(x))
        return y + self.bias


class _Product(nn.Module):
    """y = x W with W [inputs, outputs]."""

    def __init__(self, inputs: int, outputs: int, like: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs, device=like.device, dtype=like.dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


#: By exact type: a subclass may do something else with its weight.
_REPLACEMENTS: dict[type[nn.Module], Callable[[Any, int], nn.Module]] = {
    nn.Linear: FactoredLinear,
    Conv1D: FactoredConv1D,
}


def load_factored(path: str | Path, **kwargs: Any) -> Any:
    """Load a causal language model, with factors or without, from a directory in safetensors format.

    The same as ``AutoModelForCausalLM.from_pretrained(path, **kwargs)`` once this module is imported.

    Args:
        path: Checkpoint directory, or the id of a model on a hub.
        **kwargs: As transformers takes them. The type is that of the checkpoint unless ``dtype`` says otherwise.

    Raises:
        CorruptCheckpoint: When a weight is missing, or config.json is damaged.
        IncompatibleModels: When transformers has no such model, or keeps a matrix in another form.
    """
    kept: dict[str, Any] = {"dtype": "auto", "use_safetensors": True, "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(path, **(kept | kwargs))


def linear_weights(config: Mapping[str, Any], names: Collection[str]) -> set[str]:
    """Return which of these matrices transformers keeps as a linear layer of their own, and so can be factored.

    Routers, fused experts and embeddings are not among them. The model is built without its weights.

    Args:
        config: What config.json says; of a checkpoint with factors, these are not factored again.
        names: Full names of tensors of the checkpoint.

    Raises:
        IncompatibleModels: When transformers has no such causal language model.
    """
    settings = copy.deepcopy(dict(config))
    made = CONFIG_MAPPING[MODEL_TYPE if settings.get("model_type") == MODEL_TYPE else _known_type(settings)]
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(made.from_dict(settings))
    return {n for n in names if matrix_name(n) == n and type(_find(network, n)) in _REPLACEMENTS}


class _FactoredConfig:
    """The part of a configuration that knows the ranks, and writes the form that is described in ``factors``."""

    factor_ranks: dict[str, int]

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        settings, rest = super().get_config_dict(*args, **kwargs)  # type: ignore[misc]
        return _unwrapped(settings), rest

    def to_json_string(self, use_diff: bool = True) -> str:
        settings = json.loads(super().to_json_string(use_diff=use_diff))  # type: ignore[misc]
        ranks = settings.pop("factor_ranks", {})
        return json.dumps(factored_config(settings, ranks), indent=2) + "\n"


class _FactoredModel:
    """The part of a model that puts two factors where config.json names a matrix."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for name, rank in config.factor_ranks.items():
            _replace(self, name, rank)

    def initialize_weights(self) -> None:
        """Initialise what no checkpoint holds, such as buffers; every weight has its values by now.

        Some models reach for the weights of their layers here. Layers of factors have one that is empty, and only
        for so long: whoever computes with it fails.
        """
        layers = [module for module in self.modules() if isinstance(module, FactoredLinear | FactoredConv1D)]  # type: ignore[attr-defined]
        for layer in layers:
            layer.__dict__["weight"] = torch.empty(0)
        try:
            super().initialize_weights()  # type: ignore[misc]
        finally:
            for layer in layers:
                del layer.__dict__["weight"]

    @classmethod
    def is_custom_code(cls) -> bool:
        # Decides whether the conversions of the original's tensors apply; the network is the original's.
        return False

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        network, loading = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(loading["missing_keys"])
        if missing:
            raise CorruptCheckpoint(
                f"The checkpoint lacks {len(missing)} of its model's weights, the first of them {missing[0]}.",
                value=missing[0],
            )
        return (network, loading) if output_loading_info else network


class FactoredConfig(Config):  # type: ignore[misc]
    """What the model type in config.json stands for; reading it gives the configuration of the model inside."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        settings = _unwrapped(config_dict)
        return _config_class(CONFIG_MAPPING[_known_type(settings)]).from_dict(settings, **kwargs)


def _unwrapped(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the configuration of the model inside, with the ranks of its factors."""
    if settings.get("model_type") != MODEL_TYPE:
        return settings
    stored = read_factored(settings)
    beside: dict[str, Any] = {key: settings[key] for key in _BESIDE if key in settings}
    return stored.dense_config | beside | {"factor_ranks": dict(stored.factor_ranks)}


def _known_type(settings: Mapping[str, Any]) -> str:
    model_type = settings.get("model_type")
    if model_type not in CONFIG_MAPPING or CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise IncompatibleModels(
            f"transformers {transformers.__version__} has no causal language model of type {model_type!r}.",
            value=model_type,
            hint="Take a newer version of transformers.",
        )
    return str(model_type)


@lru_cache(maxsize=64)
def _config_class(base: Any) -> Any:
    """Return the configuration class of ``base`` with factors, known to ``AutoModelForCausalLM`` with its model."""
    body: dict[str, Any] = {"__module__": __name__, "__annotations__": {"factor_ranks": dict[str, int]}}
    body["factor_ranks"] = field(default_factory=dict)
    made = type(f"{_PREFIX}{base.__name__}", (_FactoredConfig, base), body)
    network = MODEL_FOR_CAUSAL_LM_MAPPING[base]
    # Its name stays the original's, by which transformers chooses conversions and losses; pickles need the other.
    names = {"__module__": __name__, "__qualname__": f"{_PREFIX}{network.__name__}", "config_class": made}
    AutoModelForCausalLM.register(made, type(network.__name__, (_FactoredModel, network), names))
    return made


def _find(network: Any, name: str) -> nn.Module | None:
    """Return the module that holds a checkpoint's tensor ``X.weight``: X, or X in the base model."""
    module = name.removesuffix(".weight")
    for spelling in (module, f"{network.base_model_prefix}.{module}"):
        try:
            found: nn.Module = network.get_submodule(spelling)
        except AttributeError:
            continue
        return found
    return None


def _replace(network: Any, name: str, rank: int) -> None:
    found = _find(network, name)
    make = _REPLACEMENTS.get(type(found)) if found is not None else None
    if found is None or make is None:
        raise IncompatibleModels(
            f"transformers {transformers.__version__} does not keep the matrix {name} as a linear layer.",
            value=name,
            hint="Turn the checkpoint dense: aidocks.laser.factors.to_dense.",
        )
    made = make(found, rank)
    for parent in network.modules():
        for key, child in parent.named_children():
            if child is found:
                setattr(parent, key, made)


def __getattr__(name: str) -> Any:
    """Return the class of a model with factors by its name, so that pickles of models and configurations work."""
    base = getattr(transformers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    config = (
        base if isinstance(base, type) and issubclass(base, Config) else getattr(base, "config_class", None)
    )
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        made = _config_class(config)
        return made if base is config else MODEL_FOR_CAUSAL_LM_MAPPING[made]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, FactoredConfig, exist_ok=True)
