"""A reranker made of a BERT of 4.4 million parameters: SQuAD's candidates in order, and what BM25 finds in Cranfield.

python -m benchmarks.train_reranker squad|cranfield [FIELD=VALUE ...]
        another setting, measured on a division of the data that is not the reported one

The encoder has no head before, so its first scores are random. ``dataset=["squad"]`` names data sets of
``benchmarks.retrieval_data``. Needs ``AIDOCKS_BENCH_DATA``. All other settings are the service's defaults.
"""

from __future__ import annotations

import sys
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir
from benchmarks.retrieval_data import CHOSEN_ON, CRANFIELD, REPORTED, SQUAD, Division, divide
from benchmarks.retrieval_figures import beside_base, chosen_by_hand
from benchmarks.train_locally import given_by_hand, train_retriever

MODEL = "models/bert-tiny-splade-mlm"
#: Of the domain that is measured: on each query's own candidates, or on those that a retriever finds.
FIELDS: dict[str, dict[str, Any]] = {
    SQUAD: {
        "dataset": ["squad", "squad_pairs"],
        "adapter": "full",
        "mine_negatives": {"per_query": 7, "margin": None},
        "num_train_epochs": 3,
        "max_length": 192,
        "learning_rate": 3e-4,
    },
    CRANFIELD: {
        "dataset": ["squad", "cranfield", "cranfield_titles"],
        "adapter": "full",
        "mine_negatives": {"per_query": 7, "margin": None},
        "num_train_epochs": 4,
        "max_length": 192,
        "learning_rate": 3e-4,
        "retriever": "bm25",
        "candidates": 20,
    },
}
#: MRR@10 of SQuAD's held-out queries; untrained it is 0.39.
MUST_REACH = 0.83


def run() -> list[Comparison]:
    division = divide(REPORTED)
    return [_own_candidates(division), _found_by_bm25(division)]


def _own_candidates(division: Division) -> Comparison:
    done = train_retriever("train-rerank", _request(division, SQUAD, FIELDS[SQUAD]))
    (domain,) = done.result.domains
    title = "reranker of bert-tiny, held-out MRR@10 on SQuAD's candidates"
    return beside_base(title, domain, "mrr@10", done, f"{MUST_REACH}", _facts(SQUAD))


def _found_by_bm25(division: Division) -> Comparison:
    done = train_retriever("train-rerank", _request(division, CRANFIELD, FIELDS[CRANFIELD]))
    (domain,) = done.result.domains
    title = "BM25 and reranker of bert-tiny, held-out nDCG@10 on Cranfield"
    return beside_base(title, domain, "ndcg@10", done, "a ratio above 1", _facts(CRANFIELD), retriever=True)


def _facts(domain: str) -> dict[str, str | float | int]:
    return {"trained on": " + ".join(FIELDS[domain]["dataset"])}


def _request(division: Division, domain: str, fields: dict[str, Any]) -> dict[str, Any]:
    return division.request(data_dir(MODEL), fields, (domain,))


if __name__ == "__main__":
    chosen = {"squad": SQUAD, "cranfield": CRANFIELD}[sys.argv.pop(1)]
    recipe = {**FIELDS[chosen], **given_by_hand()}
    chosen_by_hand("train-rerank", _request(divide(CHOSEN_ON), chosen, recipe))
