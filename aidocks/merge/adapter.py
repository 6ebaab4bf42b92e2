"""LoRA adapters: directories as PEFT writes them, and the tensors that a model has with one.

W + s B A with s = alpha / r, or alpha / sqrt(r) where the adapter is rank-stabilised (arXiv 2106.09685, section 4.1;
arXiv 2312.03732). DoRA also gives each row a length of its own (arXiv 2402.09353, section 4.1). Nothing is
approximated: an adapter with a part that is not understood is refused by the name of that part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

from aidocks.checkpoints.header import TensorEntry, read_header
from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE as CONFIG_FILE
from aidocks.checkpoints.layout import ADAPTER_FILE as WEIGHTS_FILE
from aidocks.checkpoints.layout import read_json_object
from aidocks.errors import CorruptCheckpoint, IncompatibleModels, UnknownModel, UnsafeCheckpoint
from aidocks.merge.adapter_config import AdapterConfig, parse_key, read_settings
from aidocks.merge.recipe import StoredTensor
from aidocks.merge.rows import Rows, StoredRows, as_matrix
from aidocks.merge.vocabulary import EMBEDDINGS

if TYPE_CHECKING:
    import torch

PartT = TypeVar("PartT")

_PICKLED_FILE = "adapter_model.bin"
_FLOATS = ("F16", "BF16", "F32", "F64")
#: The one tensor that an adapter may bring along: the head of a model that has used its embedding so far.
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class Factors:
    """What is added to one matrix.

    Attributes:
        a: Stored factor [r, inputs] (of an embedding: [r, tokens]).
        b: Stored factor [outputs, r].
        scale: s of W + s B A.
        is_transposed: W is stored as inputs x outputs, as are embeddings and GPT-2's matrices.
        magnitude: Of DoRA: the length of each row of the sum [outputs].
    """

    a: TensorEntry
    b: TensorEntry
    scale: float
    is_transposed: bool = False
    magnitude: TensorEntry | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the matrix that they fit, as stored."""
        outputs, inputs = self.b.shape[0], self.a.shape[1]
        return (inputs, outputs) if self.is_transposed else (outputs, inputs)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        directory: Where it is.
        base_model: The model that it was made for, as it says itself.
        factors: What is added, by the name of the tensor.
        replaced: Tensors that it has instead of the model's (PEFT's `modules_to_save`, and biases).
        ties_head: Whether its head is its embedding where the model's is.
        field: Path of the request's field that names it, for errors.
    """

    directory: Path
    base_model: str | None
    factors: Mapping[str, Factors]
    replaced: Mapping[str, TensorEntry]
    ties_head: bool = False
    field: str | None = None

    @property
    def brings_head(self) -> bool:
        """Whether the model's head is not its embedding any more, if it was."""
        return HEAD in self.factors or (HEAD in self.replaced and not self.ties_head)

    def entries(
        self, entries: Mapping[str, StoredTensor], *, field: str | None = None, reference: str | None = None
    ) -> dict[str, StoredTensor]:
        """Return the tensors of a model with this adapter, by name: names, types and shapes are those of the sum.

        Args:
            entries: The model's own.
            field: Path of the request's field that names the adapter, for errors.
            reference: The adapter as the request names it.

        Raises:
            IncompatibleModels: A tensor of the adapter has no place in the model, or does not fit there.
        """
        found: dict[str, StoredTensor] = dict(entries)
        for name, entry in self.replaced.items():
            place = self._find(name, entries)
            stored = entries.get(place)
            if stored is None and name == HEAD and self.ties_head:
                continue
            if stored is None and name != HEAD:
                self.refuse(f"the model has no tensor {name!r}", field, reference)
            if stored is not None and stored.shape[1:] != entry.shape[1:]:
                wanted, there = list(entry.shape), list(stored.shape)
                self.refuse(f"its {name} is {wanted}, but the model's is {there}", field, reference)
            found[place] = entry
        for name, factors in self.factors.items():
            stored = found.get(self._find(name, entries))
            if stored is None:
                self.refuse(f"the model has no tensor {name!r}", field, reference)
            if stored.shape != factors.shape:
                wanted, there = list(factors.shape), list(stored.shape)
                self.refuse(f"it fits {name} of shape {wanted}, but that is {there}", field, reference)
        return found

    def apply(self, tensor: str, rows: Rows | None, *, dtype: str = "float32") -> Rows:
        """Return a tensor of the model with this adapter.

        The factors are read at once, and stay in memory: r (rows + columns) values.

        Args:
            tensor: Its name in the model.
            rows: The model's own; None where it has none of that name.
            dtype: To add in: ``float32`` or ``float64``.

        Raises:
            CorruptCheckpoint: For a value of the adapter that is not finite, naming the adapter; that of a tensor
                which it has instead of the model's when it is read.
        """
        replaced, factors = _of(self.replaced, tensor), _of(self.factors, tensor)
        if replaced is not None:
            rows = AdapterRows(self._label(replaced), StoredRows(self._label(replaced), replaced), self.field)
        assert rows is not None, f"{tensor} is neither the model's nor the adapter's"
        if factors is None:
            return rows
        a, b = self._load(factors.a, dtype), self._load(factors.b, dtype)
        magnitude = None if factors.magnitude is None else self._load(factors.magnitude, dtype).reshape(-1)
        left, right = (a.mT, b.mT) if factors.is_transposed else (b, a)
        return AdaptedRows(rows.label, rows, left.contiguous() * factors.scale, right.contiguous(), magnitude)

    def changes(self, tensor: str) -> bool:
        """Tell whether a tensor of the model is another one with this adapter."""
        return _of(self.replaced, tensor) is not None or _of(self.factors, tensor) is not None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that it consists of."""
        return self.directory / CONFIG_FILE, self.directory / WEIGHTS_FILE

    def _load(self, entry: TensorEntry, dtype: str) -> torch.Tensor:
        """Return all of one of the adapter's tensors: a matrix, or a vector as one row."""
        import torch

        label = self._label(entry)
        height, _ = as_matrix(entry.shape)
        rows = AdapterRows(label, StoredRows(label, entry), self.field)
        values = rows.read(0, height).to(getattr(torch, dtype), copy=True)
        return values.reshape(entry.shape)

    def _label(self, entry: TensorEntry) -> str:
        return f"{entry.name} of the adapter {self.directory.name}"

    def _find(self, name: str, entries: Mapping[str, StoredTensor]) -> str:
        """Return a tensor's name in a checkpoint, which may leave out the first part (`transformer.`)."""
        shorter = name.partition(".")[2]
        return name if name in entries or shorter not in entries else shorter

    def refuse(self, flaw: str, field: str | None, reference: str | None) -> NoReturn:
        """Raise IncompatibleModels for an adapter that does not fit the model.

        Args:
            flaw: Why.
            field: Path of the request's field that names the adapter.
            reference: The adapter as the request names it.
        """
        made_for = f" It was made for {self.base_model!r}." if self.base_model else ""
        raise IncompatibleModels(
            f"The adapter {reference or self.directory.name!r} does not fit: {flaw}.{made_for}",
            field=field,
            value=reference,
            hint="Name the model that the adapter was trained on before the '+'.",
        )


def _of(mapping: Mapping[str, PartT], tensor: str) -> PartT | None:
    found = mapping.get(tensor)
    if found is not None:
        return found
    # Checkpoints of some models leave out the first part of the names that their modules have.
    return next((value for name, value in mapping.items() if name.partition(".")[2] == tensor), None)


@dataclass(frozen=True)
class AdapterRows:
    """A tensor that an adapter holds, checked as it is read.

    Attributes:
        field: Path of the request's field that names the adapter, for errors.
    """

    label: str
    rows: Rows
    field: str | None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Return rows as they are stored.

        Raises:
            CorruptCheckpoint: For a value that is not finite.
        """
        values = self.rows.read(begin, end)
        if not bool(values.isfinite().all()):
            raise CorruptCheckpoint(
                f"{self.label} contains values that are not finite (NaN or infinite).",
                field=self.field,
                value=self.label,
                hint="Leave that adapter out, or take another copy of it.",
            )
        return values


@dataclass(frozen=True)
class AdaptedRows:
    """A matrix with an adapter, computed as it is read.

    Attributes:
        left: s B, or s Aᵀ where the matrix is stored transposed: [rows, r].
        right: A, or Bᵀ: [r, columns].
        magnitude: Of DoRA [rows].
    """

    label: str
    rows: Rows
    left: torch.Tensor
    right: torch.Tensor
    magnitude: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.rows.shape

    def read(self, begin: int, end: int) -> torch.Tensor:
        """Return rows of the sum: [end - begin, columns] in the type of the factors."""
        stored = self.rows.read(begin, end)
        total = stored.to(self.left.dtype, copy=True).addmm_(self.left[begin:end], self.right)
        if self.magnitude is None:
            return total
        # A row of zeros has no direction to give a length to.
        lengths = total.norm(dim=1).clamp_min(1e-30)
        return total.mul_((self.magnitude[begin:end] / lengths)[:, None])


def read_adapter(directory: Path, *, field: str | None = None) -> Adapter:
    """Return the LoRA adapter of a directory; reads its configuration and the header of its weights.

    Args:
        directory: With adapter_config.json and adapter_model.safetensors.
        field: Path of the request's field that names it, for errors.

    Raises:
        UnknownModel: There is none.
        UnsafeCheckpoint: Its weights are there only as a pickle.
        CorruptCheckpoint: A file cannot be read.
        IncompatibleModels: It has a part that is not understood, named.
    """
    if not (directory / CONFIG_FILE).is_file():
        raise UnknownModel(
            f"{directory.name} holds no {CONFIG_FILE}.",
            field=field,
            value=directory.name,
            hint="After '+' comes a LoRA adapter, a directory as PEFT writes it.",
        )
    weights = directory / WEIGHTS_FILE
    if not weights.is_file():
        _refuse_missing_weights(directory, field)
    try:
        content = read_json_object(directory / CONFIG_FILE)
        stored, _ = read_header(weights)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(
            f"The adapter {directory.name!r} cannot be read: {error.message}",
            field=field,
            value=directory.name,
            hint=error.hint,
        ) from error
    config = read_settings(content, directory.name, field)
    parts: dict[str, dict[str, TensorEntry]] = {}
    whole: dict[str, dict[str, TensorEntry]] = {}
    for key, entry in stored.items():
        parsed = parse_key(key)
        if parsed is None:
            config.refuse(f"the tensor {key!r}")
        if entry.dtype not in _FLOATS:
            config.refuse(f"the tensor {key!r}, whose type is {entry.dtype}")
        module, part = parsed
        other = (parts if part.startswith("lora_") else whole).setdefault(module, {}).setdefault(part, entry)
        if other is not entry:
            config.refuse(f"the tensors {other.name!r} and {key!r}, which have one place")
    factors = {f"{module}.weight": _factors(config, module, found) for module, found in parts.items()}
    replaced = {f"{module}.{part}": entry for module, found in whole.items() for part, entry in found.items()}
    return Adapter(directory, config.base_model, factors, replaced, _ties_head(config, replaced), field)


def _ties_head(config: AdapterConfig, replaced: Mapping[str, TensorEntry]) -> bool:
    """Tell whether the head of an adapter is its embedding, stored twice, where the model's is.

    PEFT stores both, too, where the vocabulary was enlarged and none of them is in `modules_to_save`.
    """
    stores_both = any(name.endswith(EMBEDDINGS) for name in replaced)
    return config.ties_head or (stores_both and not config.saves_head)


def _factors(config: AdapterConfig, module: str, parts: dict[str, TensorEntry]) -> Factors:
    parts = dict(parts)
    is_embedding = "lora_embedding_A" in parts or "lora_embedding_B" in parts
    kind = "lora_embedding" if is_embedding else "lora"
    a, b = parts.pop(f"{kind}_A", None), parts.pop(f"{kind}_B", None)
    magnitude = parts.pop("lora_magnitude_vector", None)
    if a is None or b is None or parts:
        config.refuse(f"the factors of {module}, which are not the two that belong together")
    rank = config.rank_of(module)
    if len(a.shape) != 2 or len(b.shape) != 2:
        config.refuse(f"the factors of {module}, which is not a matrix (shapes {a.shape} and {b.shape})")
    if a.shape[0] != rank or b.shape[1] != rank:
        config.refuse(f"the factors of {module}: their rank is not {rank}, as {CONFIG_FILE} says")
    is_transposed = is_embedding or config.fan_in_fan_out
    if (magnitude is not None) != config.use_dora or (magnitude is not None and is_transposed):
        config.refuse(f"the magnitudes of {module} (use_dora is {config.use_dora})")
    alpha = config.alpha_of(module)
    scale = alpha / (sqrt(rank) if config.use_rslora else rank)
    return Factors(a, b, scale, is_transposed, magnitude)


def _refuse_missing_weights(directory: Path, field: str | None) -> NoReturn:
    if (directory / _PICKLED_FILE).is_file():
        raise UnsafeCheckpoint(
            f"The adapter {directory.name} has weights only as {_PICKLED_FILE}, a format that can run code when "
            "loaded.",
            field=field,
            value=directory.name,
            hint="Load it with PEFT on a machine that may run that code, and save it with safe_serialization=True.",
        )
    raise UnknownModel(
        f"The adapter {directory.name} has no {WEIGHTS_FILE}.", field=field, value=directory.name
    )
