"""What is said of an MoE: shares, dead experts, warnings, tables; and the report's files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidocks.evaluate.comparison import model_perplexities, shown, significant
from aidocks.evaluate.domains import DomainResults
from aidocks.evaluate.perplexity import PerplexityResult
from aidocks.evaluate.texts import Domain, TextSource
from aidocks.moe.check import DomainRouting, Routing
from aidocks.moe.report import (
    DrawReport,
    TrainingPoint,
    card_sections,
    expert_shares,
    find_warnings,
)
from aidocks.plan import UnitContext
from aidocks.specs.moe_result import GateTraining, MoEResult
from aidocks.specs.perplexities import DomainPerplexity, ModelPerplexity

REFERENCES = ("/secret/place/python", "org/math@main", "story")


def routing(*weights: tuple[float, ...], layers: int = 4) -> Routing:
    """Routing that is the same in every layer, with these mixtures of the texts of experts 0, 1, ..."""
    experts = len(weights[0])
    mean = tuple(sum(row[i] for row in weights) / len(weights) for i in range(experts))
    return Routing(
        load=(mean,) * layers,
        weight=(mean,) * layers,
        aux_loss=(2.0,) * layers,
        domains=tuple(
            DomainRouting(domain=f"experts[{number}]", tokens=64, load=row, weight=row)
            for number, row in enumerate(weights)
        ),
        files=(),
    )


def measured(**rows: list[float | None]) -> tuple[ModelPerplexity, ...]:
    """Perplexities by model, on the texts of experts 0, 1, ..."""
    return tuple(
        ModelPerplexity(
            model=model.replace("expert", "experts[") + "]" if model[-1].isdigit() else model,
            reference=REFERENCES[0],
            domains=tuple(
                DomainPerplexity(
                    domain=f"experts[{number}]",
                    perplexity=value,
                    standard_error=None if value is None else value / 20,
                    tokens=99,
                )
                for number, value in enumerate(values)
            ),
        )
        for model, values in rows.items()
    )


def test_shares_are_summed_up_expert_by_expert() -> None:
    found = routing((0.9, 0.1, 0.0), (0.2, 0.7, 0.1))
    first = ((0.2, 0.5, 0.3), *found.weight[1:])
    idle = ((0.5, 0.5, 0.0), *found.load[1:])
    shares = expert_shares(found.model_copy(update={"weight": first, "load": idle}), REFERENCES)
    assert [share.source_model for share in shares] == list(REFERENCES)
    assert sum(share.load for share in shares) == pytest.approx(1)
    assert sum(share.weight for share in shares) == pytest.approx(1)
    assert shares[0].domains == {"experts[0]": 0.9, "experts[1]": 0.2}
    assert [share.preferred_layers for share in shares] == [(1, 2, 3), (0,), ()]
    assert [share.idle_layers for share in shares] == [0, 0, 1]
    assert not any(share.dead for share in shares)


@given(
    experts=st.integers(2, 64),
    part=st.floats(0.0, 0.3),
    texts=st.integers(1, 4),
    data=st.data(),
)
def test_dead_is_what_no_text_gives_a_tenth_of_an_even_share(
    experts: int, part: float, texts: int, data: st.DataObject
) -> None:
    loser = data.draw(st.integers(0, experts - 1))
    share = part / experts
    row = tuple(share if i == loser else (1 - share) / (experts - 1) for i in range(experts))
    names = [f"expert-{i}" for i in range(experts)]
    dead = [found.dead for found in expert_shares(routing(*[row] * texts), names)]
    assert dead == [i == loser and share < 0.1 / experts for i in range(experts)]
    # One text that it serves is enough to live.
    other = tuple(0.5 if i == loser else 0.5 / (experts - 1) for i in range(experts))
    assert not any(found.dead for found in expert_shares(routing(*[row] * texts, other), names))


def test_warnings_name_the_expert_the_text_and_both_numbers() -> None:
    shares = expert_shares(routing((0.99, 0.0, 0.01), (0.98, 0.02, 0.0)), REFERENCES)
    perplexities = measured(
        base=[20.0, 9.0, 5.0], average=[12.0, 8.0, None], moe=[13.5, 8.5, 4.0], expert0=[1.0, 1.0, 1.0]
    )
    warnings = find_warnings(shares, perplexities, (1.2, 9.5, None))
    assert [warning for warning in warnings if "dead" in warning] == [
        warning
        for warning in warnings
        if warning.startswith(("experts[1] (org/math@main)", "experts[2] (story)"))
    ]
    losses = [warning for warning in warnings if "perplexity" in warning]
    assert len(losses) == 2
    assert "On expert 0's text" in losses[0]
    assert "13.50 ± 0.68" in losses[0]
    assert "plain average of its experts with 12.00 ± 0.60" in losses[0]
    assert "On expert 1's text" in losses[1]
    assert "2 of 3 layers are nearly parallel (condition number up to infinite" in warnings[-1]
    assert "secret" not in "".join(warnings)


def test_nothing_is_said_of_what_is_well() -> None:
    shares = expert_shares(routing((0.9, 0.05, 0.05), (0.1, 0.8, 0.1), (0.1, 0.1, 0.8)), REFERENCES)
    perplexities = measured(base=[20.0, 9.0], average=[12.0, 8.0], moe=[11.0, 7.0])
    assert find_warnings(shares, perplexities, (1.2, 4.9)) == ()
    assert find_warnings(shares, (), ()) == ()


def test_a_loss_that_is_not_finite_and_a_base_that_is_better() -> None:
    perplexities = measured(base=[20.0, 6.0], moe=[None, 7.0])
    assert find_warnings((), perplexities) == (
        "On expert 0's text the MoE's loss is not finite.",
        "On expert 1's text the MoE has a perplexity of 7.000 ± 0.35, worse than the base with 6.000 ± 0.30.",
    )


def test_results_are_brought_into_the_form_of_the_answer() -> None:
    def result(nll: float | None) -> PerplexityResult:
        return PerplexityResult(nll=(nll, 20.0), tokens=(10, 10), positions=(0, 1), dtype="float32")

    prose = TextSource(name="prose")
    domains = [Domain(name="experts[0]", text=prose, chunks=2), Domain(name="text", text=prose, chunks=2)]
    results = [DomainResults(results=(result(10.0), result(None))) for _ in range(2)]
    base, moe = model_perplexities([("base", "org/base"), ("moe", "mine")], results, domains)
    assert (base.model, base.reference, moe.reference) == ("base", "org/base", "mine")
    assert [part.domain for part in moe.domains] == ["experts[0]", "text"]
    assert moe.domains[0].perplexity == pytest.approx(2.718281828**1.5)
    assert moe.domains[0].tokens == 20
    assert moe.domains[1].perplexity is None


def full_result(**more: Any) -> MoEResult:
    shares = expert_shares(routing((0.8, 0.2, 0.0), (0.1, 0.9, 0.0)), REFERENCES)
    perplexities = measured(base=[20.0, 9.0], expert0=[10.0, 8.0], average=[12.0, 7.5], moe=[10.5, 7.0])
    values = {
        "model": "mine",
        "architecture": "mixtral",
        "experts": shares,
        "experts_per_token": 2,
        "gate_mode": "fitted",
        "perplexities": perplexities,
        "parameters": 1,
        "active_parameters": 1,
        "bytes": 1,
        "warnings": find_warnings(shares, perplexities),
    }
    return MoEResult(**(values | more))


def test_the_card_shows_tables_and_warnings() -> None:
    warnings, perplexity, shares = card_sections(full_result())
    assert warnings.title == "Know before use"
    assert "dead" in warnings.notes[0]
    assert perplexity.table is not None
    assert perplexity.table.header == ("model", "expert 0's text", "expert 1's text")
    assert [row[0] for row in perplexity.table.rows] == [
        "base: python",
        "expert 0: python",
        "plain average of the experts",
        "this model",
    ]
    assert perplexity.table.rows[3][1:] == ("10.50 ± 0.53", "7.000 ± 0.35")
    assert perplexity.table.strong == ((1, 1), (3, 2))
    assert shares.table is not None
    assert shares.table.rows[1][:3] == ("1: org/math@main", "55.0%", "55.0%")
    assert shares.table.rows[2][0] == "2: story (dead)"
    assert shares.table.rows[1][-2:] == ("0-3", "0")
    assert {len(row) for row in shares.table.rows} == {len(shares.table.header)}
    assert not card_sections(full_result(experts=(), perplexities=(), warnings=()))


def test_tables_of_many_texts_are_cut_and_say_so() -> None:
    models = measured(base=[float(n) for n in range(5, 35)], moe=[4.0] * 30)
    perplexity = card_sections(full_result(experts=(), perplexities=models, warnings=()))[0]
    assert perplexity.table is not None
    assert {len(row) for row in (perplexity.table.header, *perplexity.table.rows)} == {13}
    assert any("18 more texts" in paragraph for paragraph in perplexity.text)


def test_the_training_of_gates_is_told() -> None:
    training = GateTraining(
        steps=200, tokens=204800, loss_before=2.31, loss_after=2.2, aux_loss_before=2.4, aux_loss_after=2.1
    )
    text = " ".join(card_sections(full_result(training=training))[1].text)
    for part in ("200 steps", "204,800 tokens", "2.3100", "2.2000", "2.400"):
        assert part in text


def test_the_reports_files(tmp_path: Path) -> None:
    result = full_result()
    curve = tuple(
        TrainingPoint(step=s, losses={"experts[0]": 2.0, "text": 3.0}, aux_loss=2.1) for s in (0, 10)
    )
    unit = DrawReport(
        directory=tmp_path,
        experts=result.experts,
        perplexities=result.perplexities,
        warnings=result.warnings,
        curve=curve,
    )
    assert DrawReport.model_validate_json(unit.model_dump_json()).unit_id == unit.unit_id
    written = unit.run(UnitContext(tmp_path))
    assert {file.path.name for file in unit.outputs(written)} == {
        "perplexity.png",
        "training.png",
        "report.json",
    }
    text = (tmp_path / "report" / "report.json").read_text()
    assert "secret" not in text
    document = json.loads(text)
    assert document["perplexities"][-1]["domains"][0]["perplexity"] == 10.5
    assert document["experts"][1]["domains"] == {"experts[0]": 0.2, "experts[1]": 0.9}
    assert document["warnings"] == list(result.warnings)
    assert [point["step"] for point in document["curve"]] == [0, 10]
    again = unit.run(UnitContext(tmp_path))
    assert again == written


def test_without_training_there_is_no_curve(tmp_path: Path) -> None:
    unit = DrawReport(directory=tmp_path, experts=full_result().experts, perplexities=())
    files = unit.run(UnitContext(tmp_path)).files
    assert [file.path.name for file in files] == ["report.json"]


@given(value=st.floats(0, 1e300), digits=st.integers(1, 6))
def test_numbers_keep_the_digits_that_count(value: float, digits: int) -> None:
    text = significant(value, digits)
    back = float(text.replace(",", ""))
    assert back == pytest.approx(value, rel=0.5001 * 10 ** (1 - digits), abs=1e-300)
    assert "e" not in text or value >= 1e9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10.0, "10.00"),
        (0.312, "0.3120"),
        (743.04, "743.0"),
        (29720.4, "29,720"),
        (0.0, "0.000"),
        (9.99999, "10.000"),
    ],
)
def test_numbers_as_people_write_them(value: float, text: str) -> None:
    assert significant(value, 4) == text


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("/a/b/model", "model"),
        ("./model/", "model"),
        ("~/x", "x"),
        ("org/name@main", "org/name@main"),
        ("m", "m"),
    ],
)
def test_no_directory_of_this_machine_is_shown(reference: str, name: str) -> None:
    assert shown(reference) == name


def test_reporting_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, aidocks.moe.report; print(*{'torch', 'matplotlib', 'numpy'} & set(sys.modules))"
    root = Path(sys.modules["aidocks"].__file__ or "").parents[1]
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=root)
    assert not re.findall(r"\w+", done.stdout)
