"""Retrieval on your own texts, the closed loop: mine hard negatives, train an embedding model and a reranker, index a
folder of documents, and ask questions that neither has seen - with the models as they were, and as they are now.

python examples/retrieval.py MODEL RERANKER --data questions.jsonl --documents ./docs [--name NAME]

MODEL is an embedding model, RERANKER a reranker or a plain encoder of which one is made. A line of the data is a
question with its passage: {"query": ..., "positive": ...}. The documents are .txt and .md files in which these passages
stand, long paragraphs in parts; without them, the passages themselves are what is searched. A fifth of the questions is
kept for the table, and sent to no training. Needs numpy (`aidocks[local]`).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from aidocks import Client
from aidocks.errors import IncompatibleModels

WORDS = 120  # of a passage, at most
CANDIDATES = 20  # passages that are retrieved for a question, and reranked
AT_ONCE = 256  # texts of a request

Find = Callable[[str], list[int]]  # question -> numbers of passages, the best first


@dataclass(frozen=True)
class Question:
    text: str
    answer: str


def main(options: argparse.Namespace) -> None:
    training, asked = divide(read_questions(options.data))
    passages = read_passages(options.documents) if options.documents else distinct(training, asked)
    right: dict[str, set[int]] = {}
    for question in asked:
        if found := right_of(question, passages):
            right.setdefault(question.text, set()).update(found)
    print(f"{len(training)} questions to train on, {len(right)} to ask, {len(passages)} passages to search")
    if not training or not right:
        raise SystemExit(
            "There is nothing to train on, or the passages of the data are not in the documents."
        )

    with Client() as client:
        embedder, reranker = train(client, options, training, passages)
        before = Search(client, options.model, passages)
        after = Search(client, embedder, passages)
        both = then(client, reranker, after)
        rows = {
            options.model: before.find,
            f"{options.model} + {options.reranker}": then(client, options.reranker, before),
            embedder: after.find,
            f"{embedder} + {reranker}": both,
        }
        width = max(map(len, rows))
        print(f"\n{'':{width}}  MRR@10  first is right")
        for name, find in rows.items():
            print(f"{name:{width}}  {figures(find, right)}")
        question = next(iter(right))
        print(f"\n{question}\n  {passages[both(question)[0]]}")


def train(
    client: Client, options: argparse.Namespace, training: list[Question], passages: list[str]
) -> tuple[str, str]:
    """Return the names of the embedding model and of the reranker, both trained."""
    name, steps = options.name, {"max_steps": options.max_steps} if options.max_steps else {}
    upload(client, f"{name}-questions", [{"query": q.text, "positive": q.answer} for q in training])
    upload(client, f"{name}-passages", [{"text": text} for text in passages])
    mined = client.mine_negatives(
        dataset=f"{name}-questions",
        corpus=f"{name}-passages",
        model=options.model,
        per_query=5,
        name=f"{name}-negatives",
    ).wait(progress=True)
    print(f"{mined.negatives} hard negatives for {mined.queries} questions")
    # Both hold a part of the questions out, and say what they were worth before and after.
    found = client.train_emb(
        base_model=options.model, dataset=mined.dataset, name=f"{name}-embedder", **steps
    ).wait(progress=True)
    judged = client.train_rerank(
        base_model=options.reranker,
        dataset=mined.dataset,
        retriever=found.model,
        candidates=CANDIDATES,
        name=f"{name}-reranker",
        **steps,
    ).wait(progress=True)
    print(f"embedding model: {found.verdict}; reranker: {judged.verdict}")
    return found.model, judged.model


class Search:
    """An index of passages: a vector each, made by one model."""

    def __init__(self, client: Client, model: str, passages: list[str]) -> None:
        self.client, self.model, self.passages = client, model, passages
        self.vectors = self.embed(passages, "passage")

    def embed(self, texts: list[str], role: Any) -> np.ndarray:
        answers = [
            self.client.embed(self.model, texts[begin : begin + AT_ONCE], role=role)
            for begin in range(0, len(texts), AT_ONCE)
        ]
        vectors = np.array([vector for answer in answers for vector in answer.embeddings])
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def find(self, question: str) -> list[int]:
        """Return the numbers of the passages that are most alike to a question, the best first."""
        alike = self.vectors @ self.embed([question], "query")[0]
        return [int(number) for number in np.argsort(-alike, kind="stable")[:CANDIDATES]]


def then(client: Client, reranker: str, search: Search) -> Find:
    """Return a search whose passages a reranker puts in order."""

    def find(question: str) -> list[int]:
        found = search.find(question)
        ordered = client.rerank(reranker, question, [search.passages[number] for number in found])
        return [found[one.index] for one in ordered.results]

    return find


def figures(find: Find, right: dict[str, set[int]]) -> str:
    """Return what a search is worth: mean of 1 / rank of the first right passage, share of first ones that are."""
    try:
        found = {question: find(question) for question in right}
    except IncompatibleModels:  # a plain encoder gives no scores before it is trained
        return "     -  it gives no scores yet"
    ranks = [
        next((rank for rank, number in enumerate(found[question], 1) if number in numbers), None)
        for question, numbers in right.items()
    ]
    reciprocal = np.mean([1 / rank if rank and rank <= 10 else 0 for rank in ranks])
    return f"{reciprocal:6.3f}  {np.mean([rank == 1 for rank in ranks]):14.0%}"


def read_questions(path: Path) -> list[Question]:
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [
        Question(row["query"], answer)
        for row in rows
        for answer in (row["positive"] if isinstance(row["positive"], list) else [row["positive"]])
    ]


def divide(questions: list[Question]) -> tuple[list[Question], list[Question]]:
    """Return the questions to train on and those to ask: a fifth of them, chosen by their words."""
    groups: tuple[list[Question], list[Question]] = [], []
    for question in questions:
        groups[zlib.crc32(question.text.encode()) % 5 == 0].append(question)
    return groups


def distinct(*groups: list[Question]) -> list[str]:
    return list(dict.fromkeys(question.answer for group in groups for question in group))


def read_passages(folder: Path) -> list[str]:
    """Return the texts of a folder in passages: paragraphs, long ones in parts."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".txt", ".md"))
    return list(dict.fromkeys(part for path in files for part in parts_of(path.read_text(encoding="utf-8"))))


def parts_of(text: str) -> Iterator[str]:
    for paragraph in text.split("\n\n"):
        words = paragraph.split()
        if paragraph.startswith("#") or len(words) < 3:
            continue  # a heading answers nothing
        for begin in range(0, len(words), WORDS):
            yield " ".join(words[begin : begin + WORDS])


def right_of(question: Question, passages: list[str]) -> set[int]:
    """Return the numbers of the passages that are in the answer, or that it is in."""
    answer = " ".join(question.answer.split())
    texts = (" ".join(text.split()) for text in passages)
    return {number for number, text in enumerate(texts) if text in answer or answer in text}


def upload(client: Client, name: str, rows: list[dict[str, str]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        client.upload_dataset(file, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="embedding model, such as all-minilm-l6-v2")
    parser.add_argument("reranker", help="what the reranker is made of, such as BAAI/bge-reranker-base")
    parser.add_argument("--data", type=Path, required=True, help="questions with their passages, JSONL")
    parser.add_argument("--documents", type=Path, help="folder of .txt and .md files")
    parser.add_argument("--name", default="retrieval", help="what the names of all that is made begin with")
    parser.add_argument("--max-steps", type=int, help="of both trainings, for a quick look")
    main(parser.parse_args())
