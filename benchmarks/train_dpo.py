"""DPO of SmolLM2-135M on pairs of a polite and a rude answer: the share of right pairs among those it never saw.

python -m benchmarks.train_dpo [FIELD=VALUE ...]
        another setting, measured on a part that is not the reported one

Right is a pair whose chosen answer has the higher log-probability. Needs ``AIDOCKS_BENCH_DATA``. All other settings
are the service's defaults.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.comparison import Comparison
from benchmarks.peers import data_dir
from benchmarks.small_model import smol_base
from benchmarks.train_locally import beside_base, chosen_by_hand, parts, shown, together, train

#: Pairs that are measured, and others on which the settings below were chosen.
REPORTED, CHOSEN_ON = 160, 60
FIELDS: dict[str, Any] = {"method": "dpo", "learning_rate": 3e-4, "max_steps": 100}
#: Gain in the share of right pairs.
MUST_REACH = 0.15


def run() -> list[Comparison]:
    reported, *others = _parts()
    done = train(_request(others, reported))
    accuracy, margin = done.result.held_out
    title = "DPO of SmolLM2, share of held-out pairs that are right"
    margins = f"{shown(margin)['before']} -> {shown(margin)['after']}"
    must_reach = f"a change of {MUST_REACH}"
    return [beside_base(title, accuracy, done, must_reach, **{"margin, nats": margins})]


def _parts() -> list[Path]:
    return parts(data_dir("pref_polite_rasbt.jsonl"), "prompt", (REPORTED, CHOSEN_ON))


def _request(rows: list[Path], held_out: Path) -> dict[str, Any]:
    return {
        "base_model": str(smol_base()),
        "dataset": str(together(rows)),
        "eval_dataset": str(held_out),
        **FIELDS,
    }


if __name__ == "__main__":
    _, chosen_on, rest = _parts()
    chosen_by_hand(_request([rest], chosen_on))
