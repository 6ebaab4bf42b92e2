"""LoRA of all-MiniLM-L6-v2 on one domain, within ten minutes of two cores: nDCG@10 there, and on the other.

python -m benchmarks.train_embedding squad|cranfield [FIELD=VALUE ...]
        another setting, measured on a division of the data that is not the reported one

``dataset=["cranfield"]`` names data sets of ``benchmarks.retrieval_data``. Needs ``AIDOCKS_BENCH_DATA`` and
``AIDOCKS_BENCH_EMBEDDER``. All other settings are the service's defaults.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import embedding_model
from benchmarks.retrieval_data import CHOSEN_ON, CRANFIELD, REPORTED, SQUAD, Division, divide, is_trained
from benchmarks.retrieval_figures import beside_base, chosen_by_hand
from benchmarks.train_locally import given_by_hand, train_retriever

#: Of the domain that is trained; titles of Cranfield are pairs that nobody had to judge.
FIELDS: dict[str, dict[str, Any]] = {
    SQUAD: {
        "dataset": ["squad", "squad_pairs"],
        "mine_negatives": {"per_query": 3},
        "num_train_epochs": 1,
        "max_length": 192,
        "learning_rate": 2e-4,
    },
    CRANFIELD: {
        "dataset": ["cranfield", "cranfield_titles", "squad"],
        "num_train_epochs": 1,
        "max_length": 192,
        "learning_rate": 2e-4,
    },
}
#: What the domain that is not trained on may lose.
MOST_LOST = 0.01
LONGEST_S = 600.0


def run() -> list[Comparison]:
    division = divide(REPORTED)
    return [comparison for trained in FIELDS for comparison in _trained_on(division, trained)]


def _trained_on(division: Division, trained: str) -> list[Comparison]:
    fields = FIELDS[trained]
    done = train_retriever("train-emb", division.request(embedding_model(), fields, (SQUAD, CRANFIELD)))
    names = fields["dataset"]
    title = f"LoRA of MiniLM-L6 on {trained}"
    results = []
    for domain in done.result.domains:
        name = division.domain_of(domain.dataset)
        own = is_trained(name, names)
        must_reach = "a change whose interval is above 0" if own else f"a change of {-MOST_LOST} at least"
        facts = {"trained on": " + ".join(names), "this domain is trained": "yes" if own else "no"}
        results.append(
            beside_base(f"{title}, held-out nDCG@10 on {name}", domain, "ndcg@10", done, must_reach, facts)
        )
    cores = len(os.sched_getaffinity(0))
    facts_of_time = {"target s": LONGEST_S, "cores": cores}
    return [
        *results,
        Comparison(f"{title}, from the request to the registry", (done.seconds,), facts=facts_of_time),
    ]


if __name__ == "__main__":
    chosen = {"squad": SQUAD, "cranfield": CRANFIELD}[sys.argv.pop(1)]
    recipe = {**FIELDS[chosen], **given_by_hand()}
    chosen_by_hand("train-emb", divide(CHOSEN_ON).request(embedding_model(), recipe, (SQUAD, CRANFIELD)))
