"""SQuAD and Cranfield, divided into what retrieval is trained on and what it is measured on.

SQuAD's held-out queries share no right passage with those that are trained on; further pairs of SQuAD are left out
where their passage or their question is held out. Cranfield is a BEIR folder whose judgements are divided by query. Its
titles and texts make further pairs: that they belong together is known without any judgement.

Settings are chosen on other queries than those that are reported: on a part of SQuAD that is never trained on either,
and with the two halves of Cranfield's queries exchanged. Needs ``AIDOCKS_BENCH_DATA``.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import data_dir, scratch_dir

#: Divisions: whose figures are reported, and on which settings are chosen.
REPORTED, CHOSEN_ON = "reported", "chosen-on"
SQUAD, CRANFIELD = "SQuAD", "Cranfield"
#: Queries of SQuAD that are only measured on, in each division.
_OF_SQUAD = {REPORTED: 200, CHOSEN_ON: 60}
_SEED = 0
Row = dict[str, Any]


@dataclass(frozen=True)
class Division:
    """Files of one division.

    Attributes:
        train: Name -> rows to train on: ``squad``, ``squad_pairs``, ``cranfield``, ``cranfield_titles``.
        held_out: Domain -> rows to measure on.
    """

    train: Mapping[str, Path]
    held_out: Mapping[str, Path]

    def request(self, base: Path, fields: Mapping[str, Any], domains: Iterable[str]) -> dict[str, Any]:
        """Return the fields of a training.

        Args:
            base: Directory of the model.
            fields: Of the recipe; its data sets are names of ``train``, or paths.
            domains: What is measured.
        """
        names = [fields["dataset"]] if isinstance(fields["dataset"], str) else fields["dataset"]
        return {
            "base_model": str(base),
            "eval_dataset": [str(self.held_out[domain]) for domain in domains],
            "eval_dataset_split": "test",
            **fields,
            "dataset": [str(self.train.get(name, name)) for name in names],
        }

    def domain_of(self, dataset: str) -> str:
        """Return the domain that a data set of a result is."""
        return next(domain for domain, path in self.held_out.items() if str(path) == dataset)


def is_trained(domain: str, names: Iterable[str]) -> bool:
    """Return whether any of the data sets that a recipe names is of the domain."""
    return any(name.startswith(domain.lower()) for name in names)


def divide(division: str) -> Division:
    """Write the files of a division, `REPORTED` or `CHOSEN_ON`.

    Raises:
        NotAtHand: The data are not on this machine.
    """
    target = scratch_dir() / f"retrieval-{division}"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    parts = _squad()
    never_trained = [row for name in _OF_SQUAD for row in parts[name]]
    files = {
        "squad": _write(target / "squad.jsonl", parts["train"]),
        "squad_pairs": _write(target / "squad-pairs.jsonl", _further_pairs(never_trained)),
        "cranfield": _cranfield(target / "cranfield", division),
        "cranfield_titles": _write(target / "cranfield-titles.jsonl", _titles()),
    }
    measured = {
        SQUAD: _write(target / "squad-held-out.jsonl", parts[division]),
        CRANFIELD: files["cranfield"],
    }
    return Division(files, measured)


def _squad() -> dict[str, list[Row]]:
    """Return what is trained on, and what each division measures."""
    rows = list(_rows(data_dir("rerank_squad.jsonl")))
    groups = sorted(groups_of([row["positive"] for row in rows]), key=lambda group: rows[group[0]]["query"])
    random.Random(_SEED).shuffle(groups)
    parts: dict[str, list[Row]] = {REPORTED: [], CHOSEN_ON: [], "train": []}
    for group in reversed(groups):
        fitting = (name for name, most in _OF_SQUAD.items() if len(parts[name]) + len(group) <= most)
        parts[next(fitting, "train")] += (rows[number] for number in group)
    return parts


def groups_of(passages: Sequence[Sequence[str]]) -> list[list[int]]:
    """Return the numbers of rows that share a passage, directly or by way of others, in groups."""
    parents = list(range(len(passages)))

    def first(number: int) -> int:
        while parents[number] != number:
            parents[number] = parents[parents[number]]
            number = parents[number]
        return number

    seen: dict[str, int] = {}
    for number, texts in enumerate(passages):
        for text in texts:
            parents[first(number)] = first(seen.setdefault(_same(text), number))
    groups: dict[int, list[int]] = {}
    for number in range(len(passages)):
        groups.setdefault(first(number), []).append(number)
    return list(groups.values())


def _further_pairs(held_out: Sequence[Row]) -> Iterator[Row]:
    passages = {_same(text) for row in held_out for text in row["positive"]}
    queries = {_same(row["query"]) for row in held_out}
    for name in ("squad2_answerable.jsonl", "xquad_en.jsonl"):
        for row in _rows(data_dir(name)):
            if _same(row["context"]) not in passages and _same(row["question"]) not in queries:
                yield {"query": row["question"], "positive": row["context"]}


def _titles() -> Iterator[Row]:
    for row in _rows(data_dir("cranfield") / "corpus.jsonl"):
        title = row["title"].strip()
        text = row["text"].strip().removeprefix(title).strip()
        if title and text:
            yield {"query": title, "positive": text}


def _cranfield(target: Path, division: str) -> Path:
    source = data_dir("cranfield")
    (target / "qrels").mkdir(parents=True)
    for name in ("corpus.jsonl", "queries.jsonl"):
        shutil.copyfile(source / name, target / name)
    head, *judgements = (source / "qrels" / "test.tsv").read_text(encoding="utf-8").splitlines()
    queries = sorted({line.split("\t")[0] for line in judgements}, key=int)
    random.Random(_SEED).shuffle(queries)
    half = (len(queries) + 1) // 2
    held_out = set(queries[:half] if division == CHOSEN_ON else queries[half:])
    for split in ("train", "test"):
        part = [line for line in judgements if (line.split("\t")[0] in held_out) == (split == "test")]
        (target / "qrels" / f"{split}.tsv").write_text("\n".join([head, *part]) + "\n", encoding="utf-8")
    return target


def _same(text: str) -> str:
    """Return a text as it is compared: white space and case do not count."""
    return " ".join(text.split()).casefold()


def _rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _write(path: Path, rows: Iterable[Row]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")
    return path
