"""Router rows in files: small, float32, under the names that they have in the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.checkpoints.files import OutputFile, write_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = Mapping[str, NDArray[np.float32]]


def write_gates(path: Path, rows: Rows) -> OutputFile:
    """Write router rows, each [experts, hidden] or [1, hidden], as one safetensors file."""
    import numpy as np
    from safetensors.numpy import save

    return write_bytes(
        path, save({name: np.ascontiguousarray(row, np.float32) for name, row in rows.items()})
    )


def read_gates(files: Sequence[OutputFile]) -> dict[str, NDArray[np.float32]]:
    """Return name -> rows: the mean of what several files hold, which are of one form."""
    import numpy as np
    from safetensors.numpy import load_file

    first: dict[str, NDArray[np.float32]]
    first, *others = (load_file(file.path) for file in files)
    if not others:
        return first
    return {
        name: np.mean([rows, *(other[name] for other in others)], axis=0, dtype=np.float32)
        for name, rows in first.items()
    }
