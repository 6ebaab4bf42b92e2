"""What an extraction looks at, and what the adapter can hold of it. Headers and configurations, no weights."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from aidocks.checkpoints.dtypes import DTYPE_BITS, stored_name
from aidocks.checkpoints.header import TensorEntry
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.laser.matrices import Matrix, find_matrices
from aidocks.merge.extraction.units import ExtractMatrix, MatrixFactors
from aidocks.merge.names import spell_alike, without_computed
from aidocks.merge.vocabulary import EMBEDDINGS
from aidocks.specs.extract_lora import ExtractLoraSpec
from aidocks.specs.patterns import compile_pattern

_FACTOR_TYPES = ("F32", "F16", "BF16")
#: Families whose linear layers store inputs x outputs.
_TRANSPOSED = frozenset({"gpt2", "imagegpt", "openai-gpt"})
#: In memory, experts are one tensor and routers no linear layers: LoRA of PEFT has no factors for them.
_NOT_LINEAR = re.compile(r"experts?\b|router|(^|\.)gate\.weight$|shared_expert_gate")
_HEAD = "lm_head.weight"
#: What PEFT calls an adapter without factors; it takes an empty list for a mistake.
_NO_TARGETS = "dummy-target-modules"


@dataclass(frozen=True)
class Extraction:
    """Two models that fit together, and what of them is looked at.

    Attributes:
        spec: The request.
        base, model: The models.
        tensors: The model's by the names that both models have, but for those that its configuration gives.
        matrices: Those that get factors.
        whole: Other floating-point tensors, which can be stored whole.
        resized: Of these, those that have another number of rows, and those that only the model has.
    """

    spec: ExtractLoraSpec
    base: Checkpoint
    model: Checkpoint
    tensors: Mapping[str, TensorEntry]
    matrices: tuple[Matrix, ...]
    whole: tuple[str, ...]
    resized: tuple[str, ...]

    @cached_property
    def dtype(self) -> str:
        """Type of the adapter's weights, in safetensors' spelling: as asked for, or that of most of the model."""
        if self.spec.dtype is not None:
            return stored_name(self.spec.dtype)
        sizes: Counter[str] = Counter()
        for entry in self.tensors.values():
            sizes[entry.dtype] += entry.nbytes
        found = sizes.most_common(1)[0][0]
        return found if found in _FACTOR_TYPES else "F32"

    @property
    def scale(self) -> float:
        """What PEFT multiplies the product of the factors by."""
        return (self.spec.alpha or self.spec.rank) / self.spec.rank

    @property
    def nbytes(self) -> int:
        """Bytes of the adapter, and of what is written on the way to it, at most."""
        values = sum(min(self.spec.rank, m.full_rank) * sum(m.shape) for m in self.matrices)
        saved = sum(self.tensors[name].numel for name in self.whole)
        return (2 * values + 2 * saved) * DTYPE_BITS[self.dtype] // 8

    def units(self, directory: Path) -> tuple[ExtractMatrix, ...]:
        """Return the units that compute the factors, written to ``directory``."""
        return tuple(
            ExtractMatrix(
                base=self.base.path,
                model=self.model.path,
                tensor=matrix.name,
                shape=matrix.shape,
                is_transposed=self.is_transposed,
                rank=self.spec.rank,
                energy=self.spec.energy,
                method=self.spec.method,
                seed=self.spec.seed if self.spec.method == "randomized" else 0,
                scale=self.scale,
                dtype=self.dtype,
                directory=directory,
            )
            for matrix in self.matrices
        )

    @property
    def is_transposed(self) -> bool:
        return self.base.config.get("model_type") in _TRANSPOSED

    @property
    def shares_head(self) -> bool:
        """Whether the head is the embedding."""
        return _HEAD not in self.tensors

    @property
    def _embedding(self) -> str:
        return next((name for name in self.tensors if name.endswith(EMBEDDINGS)), "")

    def choose_saved(
        self, different: Collection[str], found: Sequence[MatrixFactors]
    ) -> tuple[dict[str, str], tuple[str, ...], tuple[str, ...]]:
        """Return what is stored whole (name in the adapter -> tensor), the modules that it makes up, and what is lost.

        Args:
            different: Of ``whole``, those that are not the same in both models.
            found: The factors of all matrices.
        """
        wanted = [name for name in self.whole if name in different or name in self.resized]
        targets = _ranks(found)
        saved: dict[str, str] = {}
        modules: list[str] = []
        lost: list[str] = []
        for name in wanted:
            module, _, part = name.rpartition(".")
            if part == "bias" and f"{module}.weight" not in self.whole:
                # A bias of a linear layer, which PEFT finds inside the layer's wrapper where there is one.
                inner = ".base_layer" if module in targets else ""
                saved[f"base_model.model.{module}{inner}.bias"] = name
            elif part in ("weight", "bias"):
                modules.append(module)
                # All of a module, or PEFT misses the rest.
                both = [n for n in (f"{module}.weight", f"{module}.bias") if n in self.tensors]
                saved |= {f"base_model.model.{one}": one for one in both}
            else:
                lost.append(name)
        embedding = self._embedding
        if embedding in saved.values() and self.shares_head:
            saved[f"base_model.model.{_HEAD}"] = embedding
        return saved, tuple(dict.fromkeys(modules)), tuple(lost)

    def config(self, found: Sequence[MatrixFactors], modules: Sequence[str], biases: bool) -> dict[str, Any]:
        """Return adapter_config.json.

        Args:
            found: The factors of all matrices.
            modules: That are stored whole.
            biases: Whether biases of linear layers are stored.
        """
        ranks = _ranks(found)
        rank = max(ranks.values(), default=self.spec.rank)
        others = {module: r for module, r in ranks.items() if r != rank}
        reference = self.spec.base_model
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            # A path means nothing elsewhere.
            "base_model_name_or_path": Path(reference).name
            if reference.startswith(("/", ".", "~"))
            else reference,
            "r": rank,
            "lora_alpha": _number(self.scale * rank),
            "rank_pattern": others,
            "alpha_pattern": {module: _number(self.scale * r) for module, r in others.items()},
            "target_modules": self._targets(ranks) or _NO_TARGETS,
            "modules_to_save": list(modules) or None,
            "ensure_weight_tying": self.shares_head and self._embedding.removesuffix(".weight") in modules,
            "bias": "all" if biases else "none",
            "lora_dropout": 0.0,
            "fan_in_fan_out": self.is_transposed,
            "init_lora_weights": True,
            "inference_mode": True,
            "use_dora": False,
            "use_rslora": False,
        }

    def _targets(self, ranks: Mapping[str, int]) -> list[str]:
        """Return the modules that have factors: by their last names where all of that name have, else in full."""
        named: dict[str, list[str]] = {}
        for matrix in find_matrices(self.tensors, all_weights=True):
            module = matrix.name.removesuffix(".weight")
            named.setdefault(module.rpartition(".")[2], []).append(module)
        short = {last for last, all_of in named.items() if all(module in ranks for module in all_of)}
        lasts = {module.rpartition(".")[2] for module in ranks}
        return sorted(lasts & short) + [m for m in ranks if m.rpartition(".")[2] not in short]


def plan_extraction(spec: ExtractLoraSpec, base: Checkpoint, model: Checkpoint) -> Extraction:
    """Check that two models fit together, and choose what is looked at.

    Raises:
        IncompatibleModels: For another architecture, a tensor of another shape, or one that only one of them has.
        InvalidSpec: Nothing is left to look at.
    """
    kinds = base.config.get("model_type"), model.config.get("model_type")
    if kinds[0] != kinds[1]:
        raise _refuse(spec, f"its model_type is {kinds[1]!r}, the base's {kinds[0]!r}")
    base_tensors, tensors = _named_alike(base, model)
    chosen = {name for name in {*tensors, *base_tensors} if _is_chosen(name, spec)}
    wide = {m.name for m in find_matrices(tensors, all_weights=True) if m.layer is None}
    _require_same_shapes(spec, base_tensors, tensors, wide)
    matrices = tuple(
        m
        for m in find_matrices(base_tensors)
        if m.name in chosen and m.expert is None and not _NOT_LINEAR.search(m.name)
    )
    named = {matrix.name for matrix in matrices}
    whole = tuple(
        name
        for name, entry in tensors.items()
        if name in chosen
        and name not in named
        and entry.dtype in ("F64", "F32", "F16", "BF16")
        and (spec.embeddings == "save" or name not in wide)
    )
    if not matrices and not whole:
        raise InvalidSpec(
            f"{spec.base_model!r} has no tensor that `include` and `exclude` leave.",
            field="include" if spec.include else "exclude",
            value=list(spec.include or spec.exclude),
            hint="Expressions are searched for in full names, such as model.layers.0.mlp.up_proj.weight.",
        )
    resized = tuple(
        name for name in whole if name not in base_tensors or base_tensors[name].shape != tensors[name].shape
    )
    return Extraction(spec, base, model, tensors, matrices, whole, resized)


def _named_alike(*models: Checkpoint) -> list[dict[str, TensorEntry]]:
    """Return the tensors of models by the names that all of them have."""
    stored = [without_computed(model.entries) for model in models]
    own_names = [{own: name for name, own in spelled.items()} for spelled in spell_alike(stored)]
    return [
        {names.get(own, own): entry for own, entry in tensors.items()}
        for tensors, names in zip(stored, own_names, strict=True)
    ]


def _is_chosen(name: str, spec: ExtractLoraSpec) -> bool:
    wanted = not spec.include or any(compile_pattern(p).search(name) for p in spec.include)
    return wanted and not any(compile_pattern(p).search(name) for p in spec.exclude)


def _require_same_shapes(
    spec: ExtractLoraSpec,
    base: Mapping[str, TensorEntry],
    model: Mapping[str, TensorEntry],
    wide: Collection[str],
) -> None:
    for name, entry in base.items():
        found = model.get(name)
        if found is None:
            if name == _HEAD:
                continue  # the model uses its embedding
            raise _refuse(spec, f"it has no tensor {name}")
        if found.shape != entry.shape and (name not in wide or found.shape[1:] != entry.shape[1:]):
            raise _refuse(spec, f"{name} is {list(found.shape)}, in the base {list(entry.shape)}")
    extra = next((name for name in model if name not in base and name not in wide), None)
    if extra is not None:
        raise _refuse(spec, f"it has a tensor {extra}, which the base has not")


def _refuse(spec: ExtractLoraSpec, flaw: str) -> IncompatibleModels:
    return IncompatibleModels(
        f"There is no adapter from {spec.base_model!r} to {spec.model!r}: {flaw}.",
        field="model",
        value=spec.model,
        hint="Name a model that was fine-tuned from the base.",
    )


def _ranks(found: Sequence[MatrixFactors]) -> dict[str, int]:
    """Return the modules that have factors, with their ranks."""
    return {f.row.tensor.removesuffix(".weight"): f.row.rank for f in found if f.row.rank}


def _number(value: float) -> float | int:
    """Return a whole number as one: PEFT's settings are whole where they can be."""
    return int(value) if value == int(value) else value
