"""What answers ``/embed`` and ``/rerank`` where torch is: several models at hand, and calls of many texts.

Nothing here knows of HTTP or Ray: a service puts calls together of what many requests ask (``serve.retrieval``), and
the command line makes one of its own (``--local``). torch is imported with the first model, not before.
"""

from __future__ import annotations

import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aidocks.errors import ServiceUnreachable, UnknownModel
from aidocks.plan import UnitContext, WorkerCache
from aidocks.retrieval.libraries import require_libraries
from aidocks.training.retriever import Retriever

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from aidocks.retrieval.embedder import Embedder
    from aidocks.retrieval.reranker import Reranker

#: A query and a passage.
Pair = tuple[str, str]
#: Files that hold weights, whose bytes are counted as what a loaded model takes.
_WEIGHTS = ("*.safetensors", "*/*.safetensors")


@dataclass(frozen=True)
class Recipe:
    """What has to be the same for texts to be computed together.

    Attributes:
        role: Of the texts, as an embedding model's prompts and adapters for tasks know it; None for neither.
        prompt: Put before each text in place of the model's.
    """

    retriever: Retriever
    role: Literal["query", "passage"] | None = None
    prompt: str | None = None


@dataclass(frozen=True)
class Call:
    """Texts (of an embedding model) or pairs (of a reranker) that are computed at once."""

    recipe: Recipe
    items: Sequence[str] | Sequence[Pair]


@dataclass(frozen=True)
class Reply:
    """What has been computed.

    Attributes:
        values: float32; of N texts [N, D], of N pairs their scores as the model makes them [N].
        tokens: That the model has read, of each.
        seconds: That it took, without the loading of the model.
    """

    values: NDArray[np.float32]
    tokens: Sequence[int]
    seconds: float


class ModelsAtHand:
    """Loaded models, the ones used last, within a bound of memory.

    Args:
        memory_bytes: Of weights. The model in use stays, however large.
        device: As torch calls it; None: the best one there is.
        threads: That torch may use; None: as many as there are cores.
    """

    def __init__(self, memory_bytes: int, device: str | None = None, threads: int | None = None) -> None:
        self._memory_bytes = memory_bytes
        self._device = device
        self._threads = threads
        self._loaded: OrderedDict[Retriever, tuple[UnitContext, int]] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the models that are loaded, the one used last at the end."""
        return tuple(retriever.name for retriever in self._loaded)

    def compute(self, call: Call) -> Reply:
        """Compute a call. One at a time: a model uses all threads that there are.

        Raises:
            MissingExtra: A library is not installed.
            UnknownModel: It was deleted since it was found.
            ServiceUnreachable: The GPU has no room for it.
            AIDocksError: The model cannot be loaded.
        """
        from aidocks.executor import let_threads_sleep

        require_libraries()
        let_threads_sleep()
        import torch

        try:
            return self._compute(call)
        except torch.OutOfMemoryError:
            pass
        # Not above: there the error still holds what was computed.
        self._let_go(0)
        self._tidy()
        try:
            return self._compute(call)
        except torch.OutOfMemoryError as error:
            self._loaded.clear()
            raise ServiceUnreachable(
                f"The GPU has no room for {call.recipe.retriever.name}.",
                hint="Others may be using it. Where it is too small, compute on the processor "
                "(AIDOCKS_SERVING_GPUS=0).",
            ) from error

    def _compute(self, call: Call) -> Reply:
        model = self._model(call.recipe.retriever)
        begin = time.perf_counter()
        if call.recipe.retriever.kind == "embedding":
            values, tokens = _vectors(model, call)
        else:
            values, tokens = _scores(model, call)
        return Reply(values, tokens, time.perf_counter() - begin)

    def _model(self, retriever: Retriever) -> Any:
        from aidocks.retrieval.embedder import open_embedder
        from aidocks.retrieval.reranker import open_reranker

        opening: Callable[[Retriever, UnitContext], Any] = (
            open_embedder if retriever.kind == "embedding" else open_reranker
        )
        context, _ = self._loaded.pop(retriever, (None, 0))
        if context is None:
            self._make_room(weight_bytes(retriever))
            context = self._context()
        try:
            # Asked every time: what was loaded of files that were replaced meanwhile is loaded anew.
            model = opening(retriever, context)
        except FileNotFoundError as error:
            raise UnknownModel(
                f"The model {retriever.name!r} is no longer there.", field="model", value=retriever.name
            ) from error
        # Stored in half of the bytes, it may be computed in whole ones.
        size = sum(parameter.nbytes for parameter in model.model.parameters())
        self._make_room(size)
        self._loaded[retriever] = context, size
        return model

    def _make_room(self, size: int) -> None:
        """Let go of the models that were not used for longest, until a further one fits or is alone."""
        self._let_go(self._memory_bytes - size)

    def _let_go(self, most: int) -> None:
        """Let go of the models that were not used for longest, until the others take so many bytes at most."""
        before = len(self._loaded)
        while self._loaded and sum(held for _, held in self._loaded.values()) > most:
            self._loaded.popitem(last=False)
        if len(self._loaded) < before:
            self._tidy()

    def _tidy(self) -> None:
        """Give back what is not used: parts of a model know each other, and torch keeps a GPU's memory for later."""
        gc.collect()
        if self._device != "cpu":
            import torch

            torch.cuda.empty_cache()

    def _context(self) -> UnitContext:
        """Return what one model is opened with; a cache of its own lets it go when its turn comes."""
        import os

        import torch

        from aidocks.executor import best_device

        device = self._device or best_device()
        threads = self._threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(threads)
        return UnitContext(Path(), device=device, threads=threads, cache=WorkerCache())


def weight_bytes(retriever: Retriever) -> int:
    """Return the bytes of a model's weights as they are stored, with its adapter's."""
    directories = [retriever.model, *([retriever.adapter] if retriever.adapter else [])]
    return sum(path.stat().st_size for place in directories for kind in _WEIGHTS for path in place.glob(kind))


def _vectors(model: Embedder, call: Call) -> tuple[NDArray[np.float32], Sequence[int]]:
    texts = [item for item in call.items if isinstance(item, str)]
    role, prompt = call.recipe.role, call.recipe.prompt
    return model.embed(texts, role, prompt=prompt), model.count_tokens(texts, role, prompt=prompt)


def _scores(model: Reranker, call: Call) -> tuple[NDArray[np.float32], Sequence[int]]:
    pairs = [item for item in call.items if not isinstance(item, str)]
    return model.scores(pairs), model.count_tokens(pairs)
