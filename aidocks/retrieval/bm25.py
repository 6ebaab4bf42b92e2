"""BM25: passages that have the words of a query, the rare ones above all (Robertson et al., TREC-3, 1994).

Lucene's variant as ``bm25s`` has it (Xing Han Lù, BM25S, arXiv 2407.03618), k1 = 1.2 and b = 0.75 as Lucene's own
defaults. Words are runs of letters and digits, in lower case: in languages that do not part words by spaces, BM25 finds
little.
"""

from __future__ import annotations

import os
import re
import shutil
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile, hash_file, sync_directory, sync_file, unfinished
from aidocks.errors import MissingExtra
from aidocks.plan import Unit, UnitContext
from aidocks.retrieval.parts import texts_of
from aidocks.training.run import Rows

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_K1, _B = 1.2, 0.75
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    """Return the words of a text as BM25 compares them."""
    return _WORD.findall(text.lower())


class WordIndex:
    """What BM25 knows of some passages.

    Args:
        index: Of ``bm25s``.
    """

    def __init__(self, index: Any) -> None:
        self._index = index

    @classmethod
    def of(cls, passages: Iterable[str]) -> WordIndex:
        """Index passages. Their words are held as numbers of 4 bytes each, the texts are not.

        Raises:
            MissingExtra: ``bm25s`` is not installed.
        """
        bm25s = _library()
        vocabulary: dict[str, int] = {}
        numbered = [
            array("i", (vocabulary.setdefault(word, len(vocabulary)) for word in words_of(passage)))
            for passage in passages
        ]
        if not vocabulary:
            # Without any word there is nothing to index. No query has this one.
            vocabulary, numbered = {"": 0}, [array("i", (0,)) for _ in numbered]
        index = bm25s.BM25(k1=_K1, b=_B, method="lucene")
        index.index(bm25s.tokenization.Tokenized(ids=numbered, vocab=vocabulary), show_progress=False)
        return cls(index)

    @classmethod
    def load(cls, directory: Path) -> WordIndex:
        """Map an index into memory."""
        return cls(_library().BM25.load(directory, mmap=True, show_progress=False))

    def save(self, directory: Path) -> None:
        """Write the index: arrays in NumPy's format, and JSON."""
        self._index.save(directory, show_progress=False)

    def scores(self, query: str) -> npt.NDArray[np.float32]:
        """Return how well each passage has the query's words, float32 [N]; 0 for one that has none of them."""
        import numpy as np

        known = self._index.vocab_dict
        found = [known[word] for word in words_of(query) if word in known]
        if not found:
            return np.zeros(int(self._index.scores["num_docs"]), dtype=np.float32)
        scores: npt.NDArray[np.float32] = self._index.get_scores_from_ids(found)
        return scores

    def find(self, query: str, count: int) -> list[int]:
        """Return the passages that have words of the query, the best first, at most ``count`` of them."""
        from aidocks.retrieval.metrics import in_order

        scores = self.scores(query)
        return [line for line in in_order(scores, count) if scores[line] > 0]


class Indexed(BaseModel):
    """An index that was written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    directory: Path
    files: tuple[OutputFile, ...]


class IndexWords(Unit[Indexed]):
    """The index of a corpus."""

    result_type: ClassVar[type[BaseModel]] = Indexed

    corpus: Rows = Field(description="Rows of `text`.")
    of: str = Field(description="The data set, as people know it.")
    directory: Path = Field(description="Of the index alone.")

    @property
    def label(self) -> str:
        return f"words of {self.corpus.count} passages of {self.of}"

    @property
    def weight(self) -> float:
        # Beside vectors it is little work: a text takes some hundred times as long there.
        return self.corpus.count / 100

    def run(self, context: UnitContext) -> Indexed:
        index = WordIndex.of(texts_of(self.corpus))
        aside = unfinished(self.directory)
        aside.parent.mkdir(parents=True, exist_ok=True)
        try:
            index.save(aside)
            for path in aside.iterdir():
                sync_file(path)
            shutil.rmtree(self.directory, ignore_errors=True)
            os.replace(aside, self.directory)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        sync_directory(self.directory.parent)
        files = tuple(
            OutputFile(path=path, bytes=path.stat().st_size, sha256=hash_file(path))
            for path in sorted(self.directory.iterdir())
        )
        return Indexed(directory=self.directory, files=files)

    def outputs(self, result: Indexed) -> Sequence[OutputFile]:
        return result.files


def open_index(directory: Path, context: UnitContext) -> WordIndex:
    """Return an index that a unit wrote, from this worker's memory where it is the same."""
    index: WordIndex = context.keep("bm25", directory, lambda: WordIndex.load(directory))
    return index


def _library() -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise MissingExtra(
            "BM25 needs bm25s, which is not installed.", hint="pip install 'aidocks[local]'"
        ) from error
    return bm25s
