"""Measuring what finds texts: on whole corpora, on candidates, on scored pairs; and the tables that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aidocks.plan import PlanContext
from aidocks.retrieval.eval_set import EvalSet
from aidocks.retrieval.loading import load_cross_encoder
from aidocks.retrieval.measures import Measured, Measures, comparable, measures_of
from aidocks.retrieval.measuring import find_candidates, measure
from aidocks.retrieval.tables import domains, examples
from aidocks.training.measuring import read_rows
from aidocks.training.retriever import Prompts, Retriever
from tests.support.driving import drive, plan_context, write_rows
from tests.support.tiny_retrievers import make_embedder, make_encoder, make_reranker, questions


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    directory = make_embedder(tmp_path_factory.mktemp("models") / "embedder")
    return Retriever(
        kind="embedding", name="tiny", model=directory, max_length=64, prompts=Prompts(query="who ")
    )


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Retriever:
    directory = make_reranker(tmp_path_factory.mktemp("models") / "reranker")
    return Retriever(kind="reranker", name="tiny-reranker", model=directory, max_length=64)


@pytest.fixture
def context(tmp_path: Path) -> PlanContext:
    return plan_context(tmp_path)


def ranking_set(directory: Path, *, wrong: bool = True, count: int = 20) -> EvalSet:
    rows = questions(count)
    corpus = list(dict.fromkeys(text for row in rows for text in (*row["pos"], *row["neg"])))
    place = {text: number for number, text in enumerate(corpus)}
    queries = [
        {
            "query": row["query"],
            "relevant": {str(place[text]): 1 for text in row["pos"]},
            "candidates": [place[text] for text in (*row["pos"], *(row["neg"] if wrong else ()))],
        }
        for row in rows
    ]
    return EvalSet(
        name="questions",
        rows="ranking",
        trained=True,
        queries=write_rows(directory / "queries.jsonl", queries),
        corpus=write_rows(directory / "corpus.jsonl", [{"text": text} for text in corpus]),
    )


def scored_set(directory: Path) -> EvalSet:
    rows = questions(12)
    pairs = [
        {
            "first": row["query"],
            "second": (row["pos"] if number % 3 else row["neg"])[0],
            "score": number % 3 / 2,
        }
        for number, row in enumerate(rows)
    ]
    return EvalSet(
        name="pairs", rows="scored", trained=False, queries=write_rows(directory / "pairs.jsonl", pairs)
    )


def test_figures_are_those_of_sentence_transformers(
    embedder: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    one = ranking_set(tmp_path, count=40)
    (measured,) = drive(measure([one], embedder, "before", context), context.workspace)
    assert one.corpus is not None
    queries = read_rows(one.queries.path)
    evaluator = InformationRetrievalEvaluator(
        {str(number): row["query"] for number, row in enumerate(queries)},
        {str(number): row["text"] for number, row in enumerate(read_rows(one.corpus.path))},
        {str(number): set(row["relevant"]) for number, row in enumerate(queries)},
        query_prompt="who ",
        write_csv=False,
    )
    model = SentenceTransformer(str(embedder.model), device="cpu")
    expected = evaluator(model)
    names = {
        "ndcg@10": "cosine_ndcg@10",
        "mrr@10": "cosine_mrr@10",
        "map@100": "cosine_map@100",
        "recall@1": "cosine_recall@1",
        "recall@10": "cosine_recall@10",
    }
    for metric, name in names.items():
        values = measured.measures.figures[metric]
        assert sum(values) / len(values) == pytest.approx(expected[name], abs=1e-6), metric
    assert measured.passages == one.corpus.count
    assert measured.measures.numbers == tuple(range(40))


def test_vectors_of_the_same_are_made_once(embedder: Retriever, context: PlanContext, tmp_path: Path) -> None:
    one = ranking_set(tmp_path)
    first = drive(measure([one], embedder, "before", context), context.workspace)
    files = {path: path.stat().st_mtime_ns for path in (context.workspace / "vectors").iterdir()}
    assert drive(measure([one], embedder, "after", context), context.workspace) == first
    drive(find_candidates([one], embedder, context, count=5), context.workspace)
    assert {path: path.stat().st_mtime_ns for path in (context.workspace / "vectors").iterdir()} == files
    other = embedder.model_copy(update={"prompts": Prompts(query="what ")})
    drive(measure([one], other, "after", context), context.workspace)
    assert len(list((context.workspace / "vectors").iterdir())) > len(files)


def test_a_model_that_says_the_same_of_everything_is_not_perfect(
    reranker: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    flat = make_reranker(tmp_path / "flat")
    weights = load_file(flat / "model.safetensors")
    save_file(
        {name: 0 * tensor for name, tensor in weights.items()}, flat / "model.safetensors", {"format": "pt"}
    )
    one = ranking_set(tmp_path, count=40)
    silent = reranker.model_copy(update={"model": flat})
    (measured,) = drive(measure([one], silent, "before", context), context.workspace)
    values = measured.measures.figures["mrr@10"]
    # One of three passages is right: by chance (1 + 1/2 + 1/3) / 3, where the order of the rows would make it 1.
    assert sum(values) / len(values) == pytest.approx(0.61, abs=0.15)
    assert measured.passages == 3


def test_a_query_does_not_find_itself(embedder: Retriever, context: PlanContext, tmp_path: Path) -> None:
    texts = ["the king is in the east", "the king lives in the east", "a market in the north"]
    rows = [{"query": texts[0], "relevant": {"1": 1}, "candidates": [1], "itself": 0}]
    one = EvalSet(
        name="same",
        rows="ranking",
        trained=True,
        queries=write_rows(tmp_path / "q.jsonl", rows),
        corpus=write_rows(tmp_path / "c.jsonl", [{"text": text} for text in texts]),
    )
    plain = embedder.model_copy(update={"prompts": Prompts()})
    for who in (plain, "bm25"):
        found = drive(find_candidates([one], who, context, count=2), context.workspace)
        assert read_rows(found.rows[0].path)[0]["candidates"][0] == 1
        assert found.alone[0].measures.ranks == (1,)


def test_what_the_retriever_does_not_find_counts_as_not_found(
    reranker: Retriever, embedder: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    one = ranking_set(tmp_path)
    found = drive(find_candidates([one], embedder, context, count=4), context.workspace)
    (measured,) = drive(measure([one], reranker, "before", context, candidates=found), context.workspace)
    alone = found.alone[0]
    assert measured.passages == 4
    # No order of four passages finds what is not among them.
    assert measured.measures.figures["recall@10"] == alone.measures.figures["recall@10"]
    missed = [rank is None for rank in measured.measures.ranks]
    assert missed == [rank is None for rank in alone.measures.ranks]
    assert any(missed), "the random model finds not everything"
    (table,) = domains([one], [measured], [measured], found.alone)
    figure = table.figures[0]
    assert figure.metric == "ndcg@10"
    assert figure.retriever == pytest.approx(sum(alone.measures.figures["ndcg@10"]) / 20)
    assert (figure.before, figure.delta, figure.verdict) == (figure.after, 0, "not distinguishable")


def test_rows_without_wrong_passages_are_ordered_among_those_of_bm25(
    reranker: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    sets = [ranking_set(tmp_path / "own"), ranking_set(tmp_path / "bare", wrong=False), scored_set(tmp_path)]
    found = drive(find_candidates(sets, None, context, count=6), context.workspace)
    assert [rows is None for rows in found.rows] == [True, False, True]
    assert found.rows[1].count == 20
    measured = drive(measure(sets, reranker, "after", context, candidates=found), context.workspace)
    assert [one.passages for one in measured] == [3, 6, 0]
    asked = drive(find_candidates(sets, "bm25", context, count=6), context.workspace)
    assert [rows is None for rows in asked.rows] == [False, False, True]


def test_queries_whose_own_passages_are_all_right_say_nothing(
    reranker: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    one = ranking_set(tmp_path)
    rows = [
        {"query": "who?", "relevant": {"0": 2, "1": 1}, "candidates": [0, 1]},
        {"query": "what?", "relevant": {"0": 1}, "candidates": [0, 2]},
    ]
    one = one.model_copy(update={"queries": write_rows(tmp_path / "two.jsonl", rows)})
    (measured,) = drive(measure([one], reranker, "before", context), context.workspace)
    assert measured.measures.numbers == (1,)


@pytest.mark.parametrize("kind", ["embedding", "reranker"])
def test_pairs_are_measured_by_ranks(
    kind: str, embedder: Retriever, reranker: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    from scipy.stats import spearmanr

    one = scored_set(tmp_path)
    model = embedder if kind == "embedding" else reranker
    measured = drive(measure([one], model, "before", context), context.workspace)
    ((figure,),) = (table.figures for table in domains([one], measured, measured))
    got = measured[0].measures
    assert figure.after == pytest.approx(float(spearmanr(got.scores, got.wanted).statistic))
    assert (figure.metric, figure.delta, figure.verdict) == ("spearman", 0, "not distinguishable")
    assert figure.after_low < figure.after


def test_texts_that_are_alike_are_read_alike(
    embedder: Retriever, context: PlanContext, tmp_path: Path
) -> None:
    asked = embedder.model_copy(update={"prompts": Prompts(query="who ", passage="passage: ")})
    rows = [{"first": text, "second": text, "score": 1.0} for text in ("a red fox", "a blue hen")]
    one = EvalSet(name="s", rows="scored", trained=True, queries=write_rows(tmp_path / "s.jsonl", rows))
    (measured,) = drive(measure([one], asked, "before", context), context.workspace)
    assert measured.measures.scores == pytest.approx([1, 1])


def test_a_new_head_is_measured_as_it_will_be_trained(context: PlanContext, tmp_path: Path) -> None:
    directory = make_encoder(tmp_path / "encoder")
    one = scored_set(tmp_path)
    found = []
    for seed in (0, 1):
        model = Retriever(kind="reranker", name="new", model=directory, max_length=64, seed=seed)
        (measured,) = drive(measure([one], model, "before", context), context.workspace)
        begun = load_cross_encoder(model, "cpu", torch.float32)
        pairs = [(row["first"], row["second"]) for row in read_rows(one.queries.path)]
        scores = begun.predict(pairs, activation_fn=torch.nn.Identity())
        assert measured.measures.scores == pytest.approx(scores.tolist(), abs=1e-5)
        found.append(measured.measures.scores)
    assert found[0] != found[1]


def test_scores_that_are_no_numbers_come_last() -> None:
    scores = comparable([0.5, float("nan"), -7.0, float("inf")])
    assert scores[0] == 0.5
    assert max(scores[1], scores[3]) < -7.0
    assert Measures.model_validate_json(Measures(scores=scores).model_dump_json()).scores == scores


def of_ranks(one: EvalSet, ranks: Sequence[int | None]) -> Measured:
    """Make up an order of 20 passages for each query, its right one (always line 0) at a rank."""
    orders: list[list[int]] = []
    for rank in ranks:
        others = list(range(1, 21))
        orders.append(others if rank is None else [*others[: rank - 1], 0, *others[rank - 1 :]])
    measures = measures_of(range(len(ranks)), orders, [{"0": 1.0}] * len(ranks))
    return Measured(dataset=one.name, rows="ranking", passages=21, measures=measures)


def made_up(tmp_path: Path, count: int) -> EvalSet:
    rows: list[dict[str, Any]] = [
        {"query": f"query {number}", "relevant": {"0": 1}, "candidates": [0]} for number in range(count)
    ]
    corpus = [{"text": f"passage {number}"} for number in range(21)]
    return EvalSet(
        name="made up",
        rows="ranking",
        trained=True,
        queries=write_rows(tmp_path / "q.jsonl", rows),
        corpus=write_rows(tmp_path / "c.jsonl", corpus),
    )


def test_tables_say_what_changed_and_how_sure_that_is(tmp_path: Path) -> None:
    one = made_up(tmp_path, 40)
    low, high = of_ranks(one, [5, 6, 7, None] * 10), of_ranks(one, [1, 2, 1, 3] * 10)
    (up,), (down,), (same,) = (domains([one], [a], [b]) for a, b in ((low, high), (high, low), (low, low)))
    for table, verdict in ((up, "improved"), (down, "worse"), (same, "not distinguishable")):
        assert {figure.verdict for figure in table.figures if figure.metric != "recall@10"} == {verdict}
        figure = table.figures[0]
        assert figure.metric == "ndcg@10"
        assert figure.delta == pytest.approx(figure.after - figure.before)
        assert figure.low <= figure.delta <= figure.high
    assert (up.queries, up.passages) == (40, 21)
    # Of 21 passages, all are among the first 100.
    assert "recall@100" not in {figure.metric for figure in up.figures}
    mrr = next(figure for figure in up.figures if figure.metric == "mrr@10")
    assert mrr.before == pytest.approx((1 / 5 + 1 / 6 + 1 / 7) / 4)
    assert mrr.after == pytest.approx((1 + 1 / 2 + 1 + 1 / 3) / 4)


def test_examples_show_gains_and_losses(tmp_path: Path) -> None:
    one = made_up(tmp_path, 5)
    before, after = of_ranks(one, [1, 3, None, 2, 4]), of_ranks(one, [1, 1, 1, None, 4])
    shown = examples([one], [before], [after], 4)
    assert [(found.query, found.rank_before, found.rank_after) for found in shown] == [
        ("query 2", None, 1),
        ("query 1", 3, 1),
        ("query 0", 1, 1),
        ("query 3", 2, None),
    ]
    assert shown[0].right == shown[0].first_after == "passage 0"
    assert shown[0].first_before == "passage 1"
    assert examples([], [], [], 3) == ()


def test_nothing_measured_is_no_table(tmp_path: Path) -> None:
    one = made_up(tmp_path, 2)
    empty = Measured(dataset=one.name, rows="ranking", passages=0, measures=Measures())
    assert domains([one], [empty], [empty]) == ()
