"""PyTorch's own weight files (`.bin`): read without running anything that they say.

They are pickles, programs for a small machine, which could do whatever they like. torch's loader for weights alone
knows the few instructions that tensors need and refuses all others, and it maps the tensors' bytes instead of reading
them. Only files in the zip form of PyTorch 1.6 and later can be read so; older ones are refused. Nothing else in this
package calls it: a checkpoint is read here because somebody asked for its conversion, never because it was found.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aidocks.checkpoints.layout import CONFIG_FILE, read_json_object
from aidocks.checkpoints.writer import INDEX_FILE, SINGLE_FILE
from aidocks.errors import CorruptCheckpoint, UnknownModel, UnsafeCheckpoint

if TYPE_CHECKING:
    import torch

PICKLE_FILE = "pytorch_model.bin"
PICKLE_INDEX_FILE = "pytorch_model.bin.index.json"
_NAME = re.compile(r"[^/\\\0.][^/\\\0]{0,230}\.bin")
_ZIP = b"PK\x03\x04"


def is_pickled(directory: Path) -> bool:
    """Tell whether a model has weights only as PyTorch files, and is complete otherwise."""
    if not (directory / CONFIG_FILE).is_file() or any(
        (directory / n).is_file() for n in (SINGLE_FILE, INDEX_FILE)
    ):
        return False
    return (directory / PICKLE_FILE).is_file() or (directory / PICKLE_INDEX_FILE).is_file()


def pickle_files(directory: Path) -> dict[Path, frozenset[str] | None]:
    """Return the PyTorch files of a model, each with the tensors that the index places there (None: all it has).

    Raises:
        UnknownModel: There are none.
        CorruptCheckpoint: The index is broken, or names a file that is not there.
    """
    if (directory / PICKLE_FILE).is_file():
        return {directory / PICKLE_FILE: None}
    if not (directory / PICKLE_INDEX_FILE).is_file():
        raise UnknownModel(f"{directory.name} has neither {PICKLE_FILE} nor {PICKLE_INDEX_FILE}.")
    weight_map = read_json_object(directory / PICKLE_INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _broken(directory, "it has no weight_map")
    placed: dict[str, set[str]] = {}
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise _broken(directory, f"{str(name)[:120]!r} is not the name of a weight file beside it")
        placed.setdefault(name, set()).add(tensor)
    missing = next((name for name in placed if not (directory / name).is_file()), None)
    if missing is not None:
        raise _broken(directory, f"the weight file {missing} that it names is missing")
    return {directory / name: frozenset(placed[name]) for name in sorted(placed)}


def read_pickle(path: Path) -> Mapping[str, torch.Tensor]:
    """Return the tensors of a PyTorch file by name: mapped, on the CPU, as they are stored.

    Raises:
        UnsafeCheckpoint: It holds anything but tensors, or is of a form that cannot be read without running it.
        CorruptCheckpoint: It is damaged, or says of a tensor that it has more values than the file holds.
    """
    import pickle

    import torch

    with path.open("rb") as stream:
        if stream.read(len(_ZIP)) != _ZIP:
            raise UnsafeCheckpoint(
                f"{path.name} of {path.parent.name} is a PyTorch file of the form before version 1.6.",
                value=path.name,
                hint="Load it on a machine that may run what it says, and save it with a current torch.save, or as "
                "safetensors.",
            )
    try:
        # torch.jit archives are zip files as well; with weights alone they are refused like any other program.
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpoint(
            f"{path.name} of {path.parent.name} holds more than tensors, and was not loaded: it could run code.",
            value=path.name,
            hint="Take a copy of the model in safetensors format, or one whose file holds the weights alone.",
        ) from error
    except Exception as error:  # whatever a program that nobody meant makes the loader do
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise CorruptCheckpoint(
            f"{path.name} of {path.parent.name} cannot be read: {reason}.",
            value=path.name,
            hint="Download or copy the file again.",
        ) from error
    return _require_tensors(path, found)


def _require_tensors(path: Path, found: object) -> Mapping[str, torch.Tensor]:
    import torch

    if not isinstance(found, Mapping):
        raise _not_weights(path, f"a {type(found).__name__}")
    if not found:
        raise _not_weights(path, "nothing")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise _not_weights(path, f"{str(name)[:120]!r}, a {type(value).__name__}")
        if not name.isprintable() or name in ("", "__metadata__"):
            raise _not_weights(path, f"a tensor called {name[:120]!a}")
        if (
            value.is_nested
            or value.layout != torch.strided
            or value.is_quantized
            or value.device.type != "cpu"
        ):
            raise _not_weights(path, f"{name[:120]!r}, which is no plain tensor")
        held = value.untyped_storage().nbytes()
        if value.nbytes > held:
            # A value that is repeated takes no room there, and would in a safetensors file.
            raise CorruptCheckpoint(
                f"{path.name} of {path.parent.name} says that {name[:120]!r} has {value.nbytes} bytes, and holds "
                f"{held} of them.",
                value=path.name,
                hint="Save it again with the tensor's values written out (`tensor.contiguous()`).",
            )
    return found


def distinct_tensors(
    files: Mapping[Path, Mapping[str, torch.Tensor]], *, tied: bool
) -> Iterator[tuple[Path, str, torch.Tensor]]:
    """Yield file, name and value of every tensor that is to be stored.

    Args:
        files: Tensors by file.
        tied: Whether the model uses its embedding as its head: of tensors that are the same memory one is stored then,
            the embedding. Otherwise each is.
    """
    seen: set[tuple[object, ...]] = set()
    for path, tensors in files.items():
        # Heads last, so that what they share is the embedding's.
        for name in sorted(tensors, key=lambda name: "head" in name):
            tensor = tensors[name].detach()
            storage = tensor.untyped_storage().data_ptr()
            place = (storage, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if tied and tensor.numel() and place in seen:
                continue
            seen.add(place)
            yield path, name, tensor


def _not_weights(path: Path, what: str) -> UnsafeCheckpoint:
    return UnsafeCheckpoint(
        f"{path.name} of {path.parent.name} is no file of weights: it holds {what}.",
        value=path.name,
        hint="A weight file maps names to tensors; a training checkpoint holds more.",
    )


def _broken(directory: Path, flaw: str) -> CorruptCheckpoint:
    return CorruptCheckpoint(
        f"The weights of {directory.name} are incomplete or contradict {PICKLE_INDEX_FILE}: {flaw}.",
        hint="Download or copy the whole checkpoint again.",
    )
