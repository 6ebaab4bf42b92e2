"""Element types of safetensors files, and what torch calls them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidocks.errors import IncompatibleModels

if TYPE_CHECKING:
    import torch

#: Every element type of the format, with its size in bits.
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

_TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2": "float8_e5m2",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "U16": "uint16",
    "I16": "int16",
    "F16": "float16",
    "BF16": "bfloat16",
    "U32": "uint32",
    "I32": "int32",
    "F32": "float32",
    "U64": "uint64",
    "I64": "int64",
    "F64": "float64",
    "C64": "complex64",
}
_SAFETENSORS_NAMES = {torch_name: name for name, torch_name in _TORCH_NAMES.items()}


def torch_name(dtype: str) -> str:
    """Return what torch and configurations call a safetensors type: ``bfloat16`` for ``BF16``; others as they are."""
    return _TORCH_NAMES.get(dtype, dtype)


def stored_name(dtype: str) -> str:
    """Return the safetensors name of a type as torch and configurations call it: ``BF16`` for ``bfloat16``."""
    return _SAFETENSORS_NAMES[dtype]


def to_torch(dtype: str) -> torch.dtype:
    """Return torch's type for a safetensors type name such as ``BF16``.

    Raises:
        IncompatibleModels: When torch has no such type (sub-byte types can be copied, not computed with).
    """
    import torch

    found = getattr(torch, _TORCH_NAMES.get(dtype, ""), None)
    if not isinstance(found, torch.dtype):
        raise IncompatibleModels(
            f"Tensors of type {dtype!r} cannot be computed with.",
            value=dtype,
            hint=f"Types that can: {', '.join(_TORCH_NAMES)}.",
        )
    return found


def from_torch(dtype: torch.dtype) -> str:
    """Return the safetensors name of a torch type, such as ``BF16`` for ``torch.bfloat16``."""
    name = str(dtype).removeprefix("torch.")
    if name not in _SAFETENSORS_NAMES:
        raise IncompatibleModels(
            f"Tensors of type {name!r} cannot be stored in safetensors files.", value=name
        )
    return _SAFETENSORS_NAMES[name]
