"""Results as people read them."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from aidocks.cli.render import result_view, value_text


def _shown(result: dict[str, Any]) -> list[str]:
    console = Console(file=StringIO(), width=120)
    for part in result_view(result):
        console.print(part)
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_what_is_measured_on_several_texts_has_a_column_for_each() -> None:
    rows = [
        {"model": "base", "domains": [
            {"domain": "text", "perplexity": 12.345, "standard_error": 0.67, "tokens": 100},
            {"domain": "experts[0]", "perplexity": 700.0, "standard_error": 50.0, "tokens": 100},
        ]},
        {"model": "moe", "domains": [{"domain": "text", "perplexity": 11.0, "standard_error": 0.5, "tokens": 100}]},
    ]  # fmt: skip
    lines = _shown({"model": "m", "perplexities": rows})
    assert lines[1].split() == ["model", "text", "experts[0]"]
    assert lines[2].split() == ["base", "12.35", "±", "0.67", "700", "±", "50"]
    assert lines[3].split() == ["moe", "11.00", "±", "0.50"]


def test_numbers_by_name_are_columns() -> None:
    rows = [{"source_model": "a", "domains": {"text": 0.25, "experts[0]": 1}, "dead": False}]
    lines = _shown({"experts": rows})
    assert lines[1].split() == ["source", "model", "text", "experts[0]", "dead"]
    assert lines[2].split() == ["a", "0.25", "1", "no"]


def test_figures_before_and_after_are_rows_with_their_intervals() -> None:
    figure = {"metric": "mrr@10", "before": 0.25, "after": 0.5, "delta": 0.25, "low": -0.125, "high": 0.625}
    figure |= {
        "before_low": None,
        "before_high": None,
        "after_low": 0.25,
        "after_high": 0.75,
        "verdict": "improved",
    }
    sets = [{"dataset": "a", "queries": 8, "figures": [figure, figure | {"metric": "map@100"}]}]
    lines = _shown({"domains": sets, "prompts": {"query": "", "passage": ""}})
    assert lines[0].strip() == "domains: 1"
    assert lines[1].split() == ["dataset", "queries", "metric", "before", "after", "delta", "verdict"]
    assert [" ".join(line.split()) for line in lines[2:4]] == [
        f"a 8 {metric} 0.25 0.5000 [0.2500, 0.7500] 0.2500 [-0.1250, 0.6250] improved"
        for metric in ("mrr@10", "map@100")
    ]
    assert not any("prompts" in line for line in lines)


def test_of_long_texts_and_lists_the_beginning_or_the_number_is_shown() -> None:
    text = "".join(f"line {number}\n" for number in range(40))
    lines = _shown({"unfrozen_yaml": text, "names": [f"n{i}" for i in range(40)], "few": ["a", "b"]})
    assert [line.strip() for line in lines[:7]] == [
        "unfrozen yaml  line 0", *(f"line {i}" for i in range(1, 6)), "and 34 more lines (--json shows all)",
    ]  # fmt: skip
    assert [line.split(maxsplit=1)[1].strip() for line in lines[7:]] == ["40 (--json shows them)", "a, b"]


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens_per_s", 60300.4, "60,300"),
        ("tokens_per_s", 0.512, "0.512"),
        ("units_per_s", 12, "12"),
        ("ran_s", 75.0, "1m15s"),
    ],
)
def test_a_rate_is_no_duration(name: str, value: float, text: str) -> None:
    assert value_text(name, value) == text
