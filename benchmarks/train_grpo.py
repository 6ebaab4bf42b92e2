"""GRPO of a model of 260 thousand parameters: the mean reward of its stories' ends, for beginnings that it never saw.

python -m benchmarks.train_grpo [FIELD=VALUE ...]
        another setting, measured on a part that is not the reported one

The reward is the share of some words that an answer contains. Needs ``AIDOCKS_BENCH_DATA``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir, scratch_dir
from benchmarks.train_locally import beside_base, chosen_by_hand, parts, together, train

#: Prompts that are measured, and others on which the settings below were chosen.
REPORTED, CHOSEN_ON = 100, 50
WORDS_OF_A_PROMPT = 12
FIELDS: dict[str, Any] = {
    "method": "grpo",
    "rewards": [{"kind": "contains", "words": ["happy", "friend", "play", "mom"]}],
    "learning_rate": 3e-3,
    "max_steps": 20,
    "per_device_train_batch_size": 64,
    "gradient_accumulation_steps": 1,
    "max_completion_length": 48,
}
#: Standard errors of the paired change.
MUST_REACH = 2


def run() -> list[Comparison]:
    reported, *others = _parts()
    done = train(_request(others, reported))
    (held,) = done.result.held_out
    return [beside_base("GRPO of stories260k, held-out reward", held, done, f"z of {MUST_REACH}")]


def _parts() -> list[Path]:
    """Return beginnings of paragraphs, a prompt each."""
    target = scratch_dir() / "beginnings.jsonl"
    texts = (
        json.loads(line)["text"] for line in data_dir("domain_story.jsonl").read_text("utf-8").splitlines()
    )
    paragraphs = (text.split() for whole in texts for text in whole.split("\n\n"))
    prompts = {
        " ".join(words[:WORDS_OF_A_PROMPT]) for words in paragraphs if len(words) > 2 * WORDS_OF_A_PROMPT
    }
    target.write_text(
        "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in sorted(prompts)), encoding="utf-8"
    )
    return parts(target, "prompt", (REPORTED, CHOSEN_ON))


def _request(rows: list[Path], held_out: Path) -> dict[str, Any]:
    base = data_dir("models/stories260k")
    return {"base_model": str(base), "dataset": str(together(rows)), "eval_dataset": str(held_out), **FIELDS}


if __name__ == "__main__":
    _, chosen_on, rest = _parts()
    chosen_by_hand(_request([rest], chosen_on))
