"""Vectors of many texts, as files that are written in parts, and the exact search in them.

Vectors are written as the model makes them, float32 [n, D] in NumPy's own format, and read by mapping the file, so a
search holds one block of them at a time, however many there are.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from aidocks.checkpoints.files import OutputFile, StagedFile, hash_file, state_of, write_text
from aidocks.errors import CorruptCheckpoint
from aidocks.evaluate.memory import memory_to_load
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.parts import parts_of
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Floats = npt.NDArray[np.float32]
    Lines = npt.NDArray[np.int64]

Similarity = Literal["cosine", "dot"]
#: Directory of a job's workspace in which vectors are kept.
VECTORS = "vectors"
#: Texts of one unit: enough to make batches of equal lengths.
_LEAST_TEXTS, _MOST_TEXTS = 128, 8192
#: Vectors that are compared at once.
_BLOCK = 8192
_TOLD_FILE = "config_sentence_transformers.json"


class Vectors(BaseModel):
    """Vectors of some texts.

    Attributes:
        file: float32 [n, D], in NumPy's format.
        count: n.
        dimensions: D.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: OutputFile
    count: int
    dimensions: int


class EmbedTexts(Unit[Vectors]):
    """Vectors of some of the rows' texts."""

    result_type: ClassVar[type[BaseModel]] = Vectors

    retriever: Retriever
    rows: Rows
    begin: int = Field(ge=0)
    end: int = Field(description="Of the rows: from `begin` to before this one.")
    field: str = Field(description="Of a row, that holds the text: `text`, `query`, `first`, `second`.")
    role: Literal["query", "passage"] = Field(description="Which of the model's prompts is put before it.")
    of: str = Field(description="The data set, as people know it.")
    directory: Path = Field(
        description="Where files of vectors are written, and found again: measuring and mining ask for the same ones."
    )

    @property
    def label(self) -> str:
        what = "passages" if self.field == "text" else "queries" if self.field == "query" else "texts"
        return f"{self.retriever.name}: {what} {self.begin + 1} to {self.end} of {self.of}"

    @property
    def memory(self) -> int | None:
        return memory_to_load(self.retriever.model)

    @property
    def weight(self) -> float:
        # Passages are some times as long as queries.
        return float(self.end - self.begin) * (4.0 if self.role == "passage" else 1.0)

    def run(self, context: UnitContext) -> Vectors:
        from aidocks.retrieval.embedder import open_embedder

        path = self.directory / f"{self._content_key()}.npy"
        about = path.with_suffix(".json")
        kept = _read_kept(about)
        if kept is not None:
            return kept
        texts = [str(row[self.field]) for row in read_rows(self.rows.path, self.begin, self.end)]
        vectors = open_embedder(self.retriever, context).embed(texts, self.role)
        file = write_array(path, vectors.astype("float32"))
        made = Vectors(file=file, count=vectors.shape[0], dimensions=vectors.shape[1])
        write_text(about, made.model_dump_json())
        return made

    def outputs(self, result: Vectors) -> Sequence[OutputFile]:
        return (result.file,)

    def _content_key(self) -> str:
        """Return what the vectors depend on: the texts, what is put before them, and the model's files."""
        from aidocks.retrieval.embedder import key_of

        facts = (key_of(self.retriever), state_of(self.retriever.model), self.rows.sha256)
        which = (self.begin, self.end, self.field, self.role)
        return hashlib.sha256(repr((facts, which)).encode()).hexdigest()[:32]


def _read_kept(about: Path) -> Vectors | None:
    """Return the vectors that an earlier unit of the job made of the same; None where there are none."""
    try:
        kept = Vectors.model_validate_json(about.read_bytes())
        # The same bytes, and not only as many: results of another attempt may lie there, or a damaged file.
        return kept if hash_file(kept.file.path) == kept.file.sha256 else None
    except (OSError, ValidationError):
        return None


def embedding_units(
    retriever: Retriever,
    rows: Rows,
    field: str,
    role: Literal["query", "passage"],
    of: str,
    directory: Path,
) -> tuple[EmbedTexts, ...]:
    """Return the units that make vectors of all rows, in their order; see :class:`EmbedTexts`."""
    return tuple(
        EmbedTexts(
            retriever=retriever,
            rows=rows,
            begin=begin,
            end=end,
            field=field,
            role=role,
            of=of,
            directory=directory,
        )
        for begin, end in parts_of(rows.count, least=_LEAST_TEXTS, most=_MOST_TEXTS)
    )


def similarity_of(retriever: Retriever) -> Similarity:
    """Return how the vectors of a model are compared: as sentence-transformers' configuration says, else by cosine."""
    for directory in (retriever.adapter, retriever.model):
        try:
            told = json.loads((directory / _TOLD_FILE).read_bytes()) if directory else {}
        except (OSError, ValueError):
            continue
        if isinstance(told, dict) and told.get("similarity_fn_name") in ("dot", "dot_product"):
            return "dot"
    return "cosine"


def write_array(path: Path, array: npt.NDArray[Any]) -> OutputFile:
    """Write an array in NumPy's format; the file appears whole or not at all."""
    import numpy as np

    content = np.ascontiguousarray(array)
    header = BytesIO()
    np.lib.format.write_array_header_1_0(header, np.lib.format.header_data_from_array_1_0(content))
    staged = StagedFile(path, len(header.getvalue()) + content.nbytes)
    staged.create()
    try:
        staged.write(0, header.getvalue())
        # The memory of an empty array cannot be cast.
        if content.nbytes:
            staged.write(len(header.getvalue()), content.data.cast("B"))
        return staged.publish()
    finally:
        staged.discard()


def open_array(path: Path) -> npt.NDArray[Any]:
    """Map an array's file into memory; nothing in it is ever executed.

    Raises:
        CorruptCheckpoint: It is none, or only a part of one.
    """
    import numpy as np

    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise CorruptCheckpoint(f"{path.name} cannot be read: {error}.", value=path.name) from error
    return found


class VectorFiles:
    """Vectors in several files, as one matrix [N, D].

    Args:
        parts: In the order of their rows.
        similarity: With ``cosine`` vectors are brought to length 1 when they are read.
    """

    def __init__(self, parts: Sequence[Vectors], similarity: Similarity = "cosine") -> None:
        self._parts = tuple((part, open_array(part.file.path)) for part in parts)
        self._similarity = similarity
        self.count = sum(part.count for part in parts)

    def blocks(self, size: int = _BLOCK) -> Iterator[tuple[int, Floats]]:
        """Yield the number of the first row, and vectors [at most ``size``, D], in order."""
        begin = 0
        for part, stored in self._parts:
            for at in range(0, part.count, size):
                yield begin + at, self._ready(stored[at : at + size])
            begin += part.count

    def rows(self, begin: int, end: int) -> Floats:
        """Return the vectors of rows ``begin`` to before ``end`` [n, D]."""
        return self.take(range(begin, end))

    def take(self, lines: Sequence[int]) -> Floats:
        """Return the vectors of any rows, in their order [n, D]."""
        import numpy as np

        wanted = np.asarray(lines, dtype=np.int64)
        found = np.empty((len(wanted), self._parts[0][0].dimensions if self._parts else 0), dtype=np.float32)
        begin = 0
        for part, stored in self._parts:
            here = np.flatnonzero((wanted >= begin) & (wanted < begin + part.count))
            if len(here):
                found[here] = stored[wanted[here] - begin]
            begin += part.count
        return self._ready(found)

    def _ready(self, vectors: npt.NDArray[Any]) -> Floats:
        import numpy as np

        made: Floats = np.array(vectors, dtype=np.float32)
        if self._similarity == "cosine":
            lengths = np.linalg.norm(made, axis=1, keepdims=True)
            made /= np.where(lengths > 0, lengths, 1)
        return made


class Nearest(NamedTuple):
    """What a search has found, of each query.

    Attributes:
        lines: Rows, the most alike first; rows that are equally alike in their own order. At most as many as asked.
        scores: How alike they are.
        above: Rows that are more alike than the query's bar; 0 without bars.
    """

    lines: list[Lines]
    scores: list[Floats]
    above: Lines


def find_nearest(
    queries_QD: Floats, vectors: VectorFiles, count: int, device: str = "cpu", bars_Q: Floats | None = None
) -> Nearest:
    """Search exactly: every query is compared with every vector, block by block.

    Args:
        queries_QD: Vectors of the queries, float32, ready to be compared (see :class:`VectorFiles`).
        vectors: In which is looked.
        count: Rows that are found for each query, at most.
        device: Where the products are made.
        bars_Q: Of each query, the similarity that ``above`` counts from.
    """
    import numpy as np
    import torch

    from aidocks.retrieval.metrics import in_order

    queries = torch.from_numpy(queries_QD).to(device)
    lines: list[Lines] = [np.empty(0, dtype=np.int64) for _ in queries_QD]
    scores: list[Floats] = [np.empty(0, dtype=np.float32) for _ in queries_QD]
    above = np.zeros(len(queries_QD), dtype=np.int64)
    for begin, block in vectors.blocks():
        alike_QB = (queries @ torch.from_numpy(block).to(device).T).cpu().numpy()
        # What is no number is like nothing.
        np.copyto(alike_QB, -np.inf, where=np.isnan(alike_QB))
        if bars_Q is not None:
            above += (alike_QB > bars_Q[:, None]).sum(axis=1)
        for number, alike in enumerate(alike_QB):
            chosen = np.asarray(in_order(alike, count), dtype=np.int64)
            both = np.concatenate([scores[number], alike[chosen]])
            where = np.concatenate([lines[number], chosen + begin])
            # Earlier blocks come first, so a stable order keeps rows that are equally alike in theirs.
            order = np.argsort(-both, kind="stable")[:count]
            lines[number], scores[number] = where[order], both[order]
    return Nearest(lines, scores, above)
