"""Reading checkpoints lazily: headers at once, a tensor when it is asked for, through a memory map."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from aidocks.checkpoints import layout
from aidocks.checkpoints.dtypes import DTYPE_BITS, to_torch
from aidocks.checkpoints.hashes import FileHashes, combine_hashes
from aidocks.checkpoints.header import TensorEntry
from aidocks.errors import CorruptCheckpoint, NotFound, UnknownModel

if TYPE_CHECKING:
    import torch


class Checkpoint:
    """A directory in Hugging Face layout. Opening it reads and checks headers; torch waits for a tensor.

    Args:
        path: The directory, with config.json and either model.safetensors or shards with their index.

    Attributes:
        path: The directory, absolute.
        entries: Every tensor by name, file after file in the order of their data.
        config: What config.json says.

    Raises:
        UnknownModel: There is no such directory, or no weights in it.
        UnsafeCheckpoint: Weights only in pickle formats, or a model that needs code of its own.
        CorruptCheckpoint: Naming the file, the tensor and what is wrong.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        if not self.path.is_dir():
            raise UnknownModel(f"There is no model directory {path}.", value=str(path))
        self.entries: Mapping[str, TensorEntry] = MappingProxyType(layout.read_entries(self.path))
        self.config: dict[str, Any] = layout.read_config(self.path)
        self._maps: dict[Path, mmap.mmap] = {}
        self._lock = threading.Lock()

    @cached_property
    def total_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    @cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The safetensors files, sorted by name."""
        return tuple(sorted({entry.file for entry in self.entries.values()}))

    def metadata_files(self) -> list[Path]:
        """Return what belongs beside new weights of this model: tokenizer, template, licence and the like.

        Not config.json, not weights or their index, not README.md; subdirectories stay behind.
        """
        return layout.metadata_files(self.path)

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor as it is stored, on the CPU. Safe to call from several threads.

        It shares memory with the file's private map: clone it before changing it in place.

        Raises:
            NotFound: When there is no tensor of that name.
            IncompatibleModels: When torch cannot hold its type.
        """
        import torch

        entry = self.entries.get(name)
        if entry is None:
            raise NotFound(f"{self.path.name} has no tensor {name!r}.", value=name)
        dtype = to_torch(entry.dtype)
        if entry.numel == 0:
            return torch.empty(entry.shape, dtype=dtype)
        whole = self._map(entry)
        width = DTYPE_BITS[entry.dtype] // 8
        if entry.begin % width == 0:
            flat = torch.frombuffer(whole, dtype=dtype, count=entry.numel, offset=entry.begin)
        else:
            # The format does not promise alignment; torch's kernels expect it.
            flat = torch.frombuffer(whole, dtype=torch.uint8, count=entry.nbytes, offset=entry.begin)
            flat = flat.clone().view(dtype)
        return flat.reshape(entry.shape)

    def content_hash(self, cache_dir: Path | None = None) -> str:
        """Return the SHA-256 that stands for configuration and weights, all bytes of them.

        Equal for equal content wherever it lies. Reading 100 GB takes minutes, so every file's hash is kept,
        with the size and the time of change that it was computed for.

        Args:
            cache_dir: Where hashes are kept. Default: the cache directory of this installation.
        """
        if cache_dir is None:
            from aidocks.settings import Settings

            cache_dir = Settings().cache_dir
        hashes = FileHashes(cache_dir)
        return combine_hashes(hashes.compute([self.path / layout.CONFIG_FILE, *self.weight_files]))

    def _map(self, entry: TensorEntry) -> mmap.mmap:
        with self._lock:
            found = self._maps.get(entry.file)
            if found is None:
                with entry.file.open("rb") as stream:
                    # Private and writable: torch asks for a writable buffer, the file never changes.
                    found = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
                self._maps[entry.file] = found
        if len(found) < entry.end:
            raise CorruptCheckpoint(
                f"{entry.file.name} has become shorter since it was opened; {entry.name} is cut off.",
                hint="Something changed the file while it was being read; restore it and try again.",
            )
        return found
