"""Merging models: published formulas, streamed through blocks of tensors, one output file after another.

>>> from aidocks.merge import merge_tensors
>>> merged = merge_tensors("slerp", [base, other], 0, {"t": 0.5})

Importing this package imports no torch; the function above is imported when it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aidocks.merge.in_memory import merge_tensors

__all__ = ["merge_tensors"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'aidocks.merge' has no attribute {name!r}")
    from aidocks.merge import in_memory

    return getattr(in_memory, name)
