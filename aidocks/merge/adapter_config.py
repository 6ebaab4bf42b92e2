"""What adapter_config.json says, as far as it matters to the weights; whatever else it says is refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, NoReturn

from aidocks.errors import CorruptCheckpoint, IncompatibleModels
from aidocks.specs.patterns import compile_pattern

#: Settings that say how the adapter was trained or is found, not what its weights do.
_WITHOUT_EFFECT = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "ensure_weight_tying",
        "fan_in_fan_out",
        "init_lora_weights",
        "lora_alpha",
        "modules_to_save",
        "peft_type",
        "r",
        "rank_pattern",
        "use_dora",
        "use_rslora",
    }
)
#: Ways to begin that leave the model's own weights as they are.
_PLAIN_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")
_PREFIX = "base_model.model."
_FACTOR = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?:\.weight)?"
)
_WHOLE = re.compile(
    r"(?P<module>.+?)(?:\.modules_to_save(?:\.default)?|\.base_layer)?\.(?P<part>weight|bias)"
)
_LITERAL = re.compile(r"[\w.-]+")
_LARGEST_RANK = 1 << 20


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of a LoRA adapter that its weights depend on."""

    name: str
    field: str | None
    base_model: str | None
    rank: int
    alpha: float
    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    ties_head: bool
    saves_head: bool

    def rank_of(self, module: str) -> int:
        return int(self._pattern(self.ranks, module, self.rank))

    def alpha_of(self, module: str) -> float:
        return float(self._pattern(self.alphas, module, self.alpha))

    def refuse(self, part: str) -> NoReturn:
        """Raise IncompatibleModels for a part of the adapter that is not understood."""
        raise IncompatibleModels(
            f"The adapter {self.name!r} cannot be used: AIDocks does not know what to do with {part[:300]}.",
            field=self.field,
            value=self.name,
            hint="Merge it into its model with the program that made it, and name the result instead.",
        )

    def _pattern(self, patterns: Mapping[str, float], module: str, otherwise: float) -> float:
        """Return the value of the first pattern that is a module's name or its end, as PEFT reads them."""
        for pattern, value in patterns.items():
            if _LITERAL.fullmatch(pattern):
                if module == pattern or module.endswith(f".{pattern}"):
                    return value
            elif compile_pattern(pattern, self.field).matches_end(module):
                return value
        return otherwise


def read_settings(settings: Mapping[str, Any], name: str, field: str | None) -> AdapterConfig:
    """Return what the content of adapter_config.json says.

    Args:
        settings: The content.
        name: Of the adapter, for errors.
        field: Path of the request's field that names it.

    Raises:
        IncompatibleModels: It is no LoRA adapter, or one with something that is not understood, named.
        CorruptCheckpoint: A setting has a value that it cannot have.
    """
    base_model = settings.get("base_model_name_or_path")
    try:
        config = AdapterConfig(
            name=name,
            field=field,
            base_model=base_model if isinstance(base_model, str) else None,
            rank=_rank(settings.get("r", 8)),
            alpha=_alpha(settings.get("lora_alpha", 8)),
            ranks={str(k): _rank(v) for k, v in (settings.get("rank_pattern") or {}).items()},
            alphas={str(k): _alpha(v) for k, v in (settings.get("alpha_pattern") or {}).items()},
            use_rslora=bool(settings.get("use_rslora")),
            use_dora=bool(settings.get("use_dora")),
            fan_in_fan_out=bool(settings.get("fan_in_fan_out")),
            ties_head=bool(settings.get("ensure_weight_tying")),
            saves_head=any(
                str(module).endswith("lm_head") for module in settings.get("modules_to_save") or ()
            ),
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise CorruptCheckpoint(
            f"The adapter_config.json of {name!r} has a rank or alpha that is not a number.",
            field=field,
            value=name,
        ) from error
    if settings.get("peft_type") != "LORA":
        config.refuse(f"its peft_type {settings.get('peft_type')!r}, which is not LORA")
    if settings.get("init_lora_weights") not in _PLAIN_BEGINNINGS:
        config.refuse(f"init_lora_weights {settings['init_lora_weights']!r}, which changes the model itself")
    for key, value in settings.items():
        if value and key not in _WITHOUT_EFFECT and key not in _READ:
            config.refuse(f"the setting {key!r}")
    return config


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_RANK:
        raise ValueError(f"{value!r} is not a rank")
    return value


def _alpha(value: Any) -> float:
    if not isfinite(float(value)):
        raise ValueError(f"{value!r} is not finite")
    return float(value)


def parse_key(key: str) -> tuple[str, str] | None:
    """Divide a tensor's name in an adapter: module, and what it is (``lora_A``, ``weight``, ...); None if unknown."""
    if not key.startswith(_PREFIX):
        return None
    rest = key.removeprefix(_PREFIX)
    match = _FACTOR.fullmatch(rest)
    if match is None and "lora_" not in rest and "token_adapter" not in rest:
        match = _WHOLE.fullmatch(rest)
    return (match["module"], match["part"]) if match else None
