"""Hard negatives: what is looked at, what is left out, and in which order it is taken; and a teacher's scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aidocks.datasets.store import DatasetStore
from aidocks.errors import InvalidSpec, NameTaken
from aidocks.plan import PlanContext, UnitContext
from aidocks.retrieval.data.check import check_retrieval_data
from aidocks.retrieval.embedding import Vectors, write_array
from aidocks.retrieval.gathering import GatherPassages
from aidocks.retrieval.hard_negatives import KeyPassages, LookForNegatives, MinedPart, Searches
from aidocks.retrieval.mining import Mined, mine
from aidocks.retrieval.store_negatives import StoreNegatives
from aidocks.retrieval.teaching import teach
from aidocks.specs.train_retrieval import NegativesFields
from aidocks.training.data.rows import source_of_files, source_of_rows
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows
from tests.support.driving import drive, plan_context, write_rows
from tests.support.tiny_retrievers import make_embedder, make_reranker, questions

#: Cosines of the query (1, 0) with ten passages; the first is right.
COSINES = (0.8, 0.9, 0.79, 0.765, 0.755, 0.7, 0.5, 0.3, 0.0, -0.4)


def on_circle(cosine: float) -> list[float]:
    return [cosine, float(np.sqrt(1 - cosine**2))]


class Bench:
    """One query among ten passages whose similarities are known.

    Args:
        directory: Where files are written.
        positives: Texts of the right ones.
        negatives: Texts that the row calls wrong.
    """

    def __init__(
        self, directory: Path, row: dict[str, Any] | None = None, texts: list[str] | None = None
    ) -> None:
        self.directory = directory
        texts = texts or [f"passage {number}" for number in range(10)]
        row = row or {"query": "a query", "positives": ["passage 0"], "negatives": [], "set": 0}
        self.train = write_rows(directory / "train.jsonl", [row])
        corpus = write_rows(directory / "corpus.jsonl", [{"text": text} for text in texts])
        keys = KeyPassages(corpus=corpus, of="it", path=directory / "keys.npy").run(UnitContext(directory))
        self.searches = Searches(
            corpus=corpus,
            keys=keys.file,
            query_vectors=(self._vectors("query", [[1.0, 0.0]]),),
            passage_vectors=(self._vectors("passages", [on_circle(one) for one in COSINES]),),
        )

    def _vectors(self, name: str, rows: list[list[float]]) -> Vectors:
        array = np.asarray(rows, dtype=np.float32)
        file = write_array(self.directory / f"{name}.npy", array)
        return Vectors(file=file, count=len(array), dimensions=2)

    def look(self, seed: int = 0, **settings: Any) -> tuple[MinedPart, list[int]]:
        unit = LookForNegatives(
            train=self.train,
            begin=0,
            end=1,
            searches=(self.searches,),
            settings=NegativesFields(**settings),
            judge=None,
            seed=seed,
            name="it",
            directory=self.directory / "parts",
        )
        part = unit.run(UnitContext(self.directory))
        row = json.loads(part.rows.file.path.read_text())
        return part, [int(text.split()[-1]) for text in row["negatives"]]


def test_the_most_alike_are_taken_first(tmp_path: Path) -> None:
    part, lines = Bench(tmp_path).look(per_query=4, margin=None)
    assert lines == [1, 2, 3, 4]
    assert (part.negatives, part.without, part.too_alike) == (4, 0, 0)
    # One passage is more alike than the right one.
    assert np.load(part.ranks.path).tolist() == [2]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # At most 0.95 * 0.8 = 0.76.
        ({"margin": 0.05}, [4, 5, 6, 7, 8]),
        ({"margin": 0.0}, [2, 3, 4, 5, 6]),
        ({"margin": 0.5}, [7, 8, 9]),
        ({"margin": None, "max_score": 0.6}, [6, 7, 8, 9]),
        ({"margin": None, "skip": 2}, [3, 4, 5, 6, 7]),
        ({"margin": None, "depth": 3}, [1, 2, 3]),
        ({"margin": None, "depth": 3, "skip": 2}, [3]),
        ({"margin": 0.05, "depth": 3}, []),
    ],
)
def test_what_is_left_out(tmp_path: Path, settings: dict[str, Any], expected: list[int]) -> None:
    part, lines = Bench(tmp_path).look(per_query=5, **settings)
    assert lines == expected
    assert part.without == (not expected)


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    assert Bench(tmp_path).look(per_query=5, margin=0.05)[0].too_alike == 3


def test_a_positive_that_is_unlike_its_query_still_bounds(tmp_path: Path) -> None:
    row = {"query": "a query", "positives": ["passage 9"], "negatives": []}
    _, lines = Bench(tmp_path, row).look(per_query=9, margin=0.5)
    # The right one has -0.4: a share of that is not above it, so all others are more alike.
    assert lines == []


def test_no_answer_by_another_spelling_and_nothing_that_is_known(tmp_path: Path) -> None:
    texts = [f"passage {number}" for number in range(10)]
    texts[1], texts[2], texts[4] = "PASSAGE  0", "A  query", "Passage ４"
    row = {"query": "a query", "positives": ["passage 0", "passage 3"], "negatives": ["passage 4"]}
    bench = Bench(tmp_path, row, texts)
    unit_part, _ = bench.look(per_query=3, margin=None)
    found = json.loads(unit_part.rows.file.path.read_text())
    assert found["negatives"] == ["passage 4", "passage 5", "passage 6", "passage 7"]
    assert {name: found[name] for name in ("query", "positives")} == {
        n: row[n] for n in ("query", "positives")
    }


def test_rows_with_scores_are_left_as_they_are(tmp_path: Path) -> None:
    row = {"query": "a query", "positives": ["passage 0"], "negatives": ["passage 1"], "scores": [3.0, 1.0]}
    part, lines = Bench(tmp_path, row).look(per_query=3)
    assert (part.kept, part.negatives, lines) == (1, 0, [1])


def test_chance_is_the_seeds(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    drawn = [bench.look(seed, per_query=3, margin=None, sampling="random")[1] for seed in (0, 0, 1, 2, 3)]
    assert drawn[0] == drawn[1]
    assert len({tuple(one) for one in drawn}) > 1
    assert all(len(set(one)) == 3 and 0 not in one for one in drawn)


# --- the whole


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    directory = make_embedder(tmp_path_factory.mktemp("models") / "embedder")
    return Retriever(kind="embedding", name="tiny", model=directory, max_length=64)


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    directory = make_reranker(tmp_path_factory.mktemp("models") / "reranker")
    return Retriever(kind="reranker", name="tiny-reranker", model=directory, max_length=64)


@pytest.fixture
def context(tmp_path: Path) -> PlanContext:
    return plan_context(tmp_path)


def training_rows(directory: Path, count: int = 80) -> tuple[Rows, tuple[Rows, Rows]]:
    """Write rows of two data sets, and the passages of each."""
    rows, corpora = [], []
    for number, given in enumerate((questions(count)[: count // 2], questions(count)[count // 2 :])):
        rows += [
            {"query": row["query"], "positives": row["pos"], "negatives": [], "set": number} for row in given
        ]
        texts = dict.fromkeys(text for row in given for text in (*row["pos"], *row["neg"]))
        corpora.append(write_rows(directory / f"corpus-{number}.jsonl", [{"text": text} for text in texts]))
    return write_rows(directory / "train.jsonl", rows), (corpora[0], corpora[1])


def rows_in(rows: Rows) -> list[dict[str, Any]]:
    return [json.loads(line) for line in rows.path.read_text().splitlines()]


@pytest.mark.parametrize("who", ["both", "bm25", "judged"])
def test_every_query_gets_passages_of_its_own_data(
    who: str, embedder: Retriever, reranker: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    train, corpora = training_rows(tmp_path)
    settings = NegativesFields(per_query=3, depth=10, margin=0.0 if who == "judged" else 0.001)
    model, judge = None if who == "bm25" else embedder, reranker if who == "judged" else None

    def run(name: str) -> Mined:
        plan = mine(train, corpora, settings, model, judge, context, tmp_path / name, 0)
        found: Mined = drive(plan, context.workspace)
        return found

    mined = run("once")
    assert mined.rows.sha256 == run("again").rows.sha256
    assert (mined.queries, mined.rows.count) == (80, 80)
    rows = rows_in(mined.rows)
    passages = [{row["text"] for row in rows_in(corpus)} for corpus in corpora]
    assert sum(len(row["negatives"]) for row in rows) == mined.negatives > 60
    for row, given in zip(rows, rows_in(train), strict=True):
        assert (row["query"], row["positives"]) == (given["query"], given["positives"])
        assert not set(row["negatives"]) & set(row["positives"])
        assert len(set(row["negatives"])) == len(row["negatives"]) <= 3
        assert set(row["negatives"]) <= passages[row["set"]]
    assert (mined.rank_of_positive is None) == (who == "bm25")
    assert any("judges" in note for note in mined.notes) == (who == "bm25")


def test_a_teacher_scores_all_passages(reranker: Retriever, context: PlanContext, tmp_path: Path) -> None:
    from sentence_transformers import CrossEncoder

    given = [
        {"query": row["query"], "positives": row["pos"], "negatives": row["neg"]} for row in questions(20)
    ]
    train = write_rows(tmp_path / "train.jsonl", given)
    taught = drive(teach(train, reranker, context, tmp_path / "taught"), context.workspace)
    rows = rows_in(taught)
    assert taught.count == 20
    model = CrossEncoder(str(reranker.model), device="cpu", max_length=64)
    import torch

    for row in rows[::7]:
        pairs = [(row["query"], text) for text in (*row["positives"], *row["negatives"])]
        expected = model.predict(pairs, activation_fn=torch.nn.Identity())
        assert row["scores"] == pytest.approx(expected.tolist(), abs=1e-5)


# --- the data set that comes of it


def test_further_passages_are_added_once(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"text": "one"}, {"text": "two"}])
    further = source_of_rows(
        [
            {"text": "ONE"},
            {"text": "three", "title": "Head"},
            {"text": " "},
            {"text": "two"},
            {"text": "four"},
            {"text": "half \ud800"},
        ]
    )
    unit = GatherPassages(own=own, further=further, path=tmp_path / "all.jsonl")
    made = unit.run(UnitContext(tmp_path))
    assert [row["text"] for row in rows_in(made.rows)] == ["one", "two", "Head three", "four"]
    assert unit.outputs(made)[0].path == tmp_path / "all.jsonl"
    assert [(one.reason, one.lines) for one in made.skipped] == [
        ("text is empty", (3,)),
        ("text has half of a character", (6,)),
    ]


def test_a_file_without_texts_is_no_corpus(tmp_path: Path) -> None:
    own = write_rows(tmp_path / "own.jsonl", [{"text": "one"}])
    unit = GatherPassages(own=own, further=source_of_rows([{"name": "x"}]), path=tmp_path / "all.jsonl")
    with pytest.raises(InvalidSpec, match="no column of texts") as refused:
        unit.run(UnitContext(tmp_path))
    assert refused.value.field == "corpus"


def test_a_data_set_that_was_stored_already_is_not_stored_again(tmp_path: Path) -> None:
    rows = write_rows(
        tmp_path / "rows.jsonl",
        [{"query": "q", "positives": ["a"], "negatives": ["b", "c"], "set": 0, "scores": [1.0, 0.5, 0.25]}],
    )
    unit = StoreNegatives(rows=rows, name="found", otherwise="found-2", datasets=tmp_path / "datasets")
    context = UnitContext(tmp_path / "work")
    first = unit.run(context)
    assert unit.run(context) == first
    stored = DatasetStore(tmp_path / "datasets").get("found")
    assert json.loads(stored.path.read_text()) == {
        "query": "q",
        "pos": ["a"],
        "neg": ["b", "c"],
        "pos_scores": [1.0],
        "neg_scores": [0.5, 0.25],
    }
    other = write_rows(tmp_path / "other.jsonl", [{"query": "q", "positives": ["a"], "negatives": []}])
    second = unit.model_copy(update={"rows": other})
    assert second.run(context).name == "found-2", "hours of work are not lost for a name"
    assert second.run(context) == second.run(context)
    with pytest.raises(NameTaken):
        unit.model_copy(update={"rows": graded(tmp_path)}).run(context)


def graded(tmp_path: Path) -> Rows:
    row = {"query": "q", "positives": ["a", "b"], "negatives": ["c"], "grades": [2, 1], "set": 0}
    return write_rows(tmp_path / "graded.jsonl", [row])


def test_grades_are_kept(tmp_path: Path) -> None:
    datasets = tmp_path / "datasets"
    unit = StoreNegatives(rows=graded(tmp_path), name="g", otherwise="h", datasets=datasets)
    unit.run(UnitContext(tmp_path / "work"))
    stored = DatasetStore(datasets).get("g")
    row = {"query": "q", "documents": ["a", "b", "c"], "labels": [2, 1, 0]}
    assert json.loads(stored.path.read_text()) == row
    found = check_retrieval_data(source_of_files("g", [stored.path]), "embedding")
    assert (found.format, found.positives, found.negatives) == ("labelled_documents", 2, 1)
