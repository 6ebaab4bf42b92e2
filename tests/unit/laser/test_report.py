from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from aidocks.checkpoints.files import hash_file
from aidocks.checkpoints.reader import Checkpoint
from aidocks.laser.ledger import LedgerLine
from aidocks.laser.matrices import find_matrices
from aidocks.laser.report import WriteReport, choose_pictured, scores_of, sections
from aidocks.laser.scan import ScanMatrix
from aidocks.models.card import card
from aidocks.models.manifest import Manifest
from aidocks.plan import UnitContext, WrittenFiles
from aidocks.specs.laser_result import AcceptedReduction, LaserResult, PartScore

TinyLlama = Callable[..., Path]
NAME = "model.layers.1.self_attn.v_proj.weight"


def score(part: str, **fields: Any) -> PartScore:
    known: dict[str, Any] = {
        "metric": "perplexity",
        "data": "prose",
        "part": part,
        "before": 39.89,
        "before_standard_error": 1.2,
        "after": 39.72,
        "after_standard_error": 1.2,
        "delta": -0.0041,
        "delta_standard_error": 0.0013,
        "z": -3.15,
        "items": 64,
        "tokens": 8128,
    }
    return PartScore(**(known | fields))


def line(address: str = NAME, **fields: Any) -> LedgerLine:
    known: dict[str, Any] = {
        "address": address,
        "layer": 1,
        "kind": "v_proj",
        "rank": 12,
        "full_rank": 32,
        "truncation": "weight",
        "rule": "laserrmt",
        "items": 64,
        "delta": -0.0041,
        "standard_error": 0.0013,
        "z": -3.15,
        "guards": {"accuracy on capitals": 0.4},
        "decision": "accepted",
        "accepted": True,
    }
    return LedgerLine(**(known | fields))


def result(**fields: Any) -> LaserResult:
    accepted = AcceptedReduction(
        name=NAME, layer=1, kind="v_proj", rank=12, full_rank=32, truncation="activation_aware", shrink=True,
        rule="laserrmt, fraction 0.4", energy=0.914, delta=-0.0041, standard_error=0.0013, z=-3.15,
    )  # fmt: skip
    known: dict[str, Any] = {
        "model": "small",
        "accepted": (accepted,),
        "search": score("search"),
        "held_out": score("held_out", z=-2.4),
        "report": score("report", z=-1.9),
        "guards": (score("report", metric="accuracy", data="capitals", before=0.58, after=0.575, z=0.4),),
        "candidates_tried": 30,
        "candidates_screened": 210,
        "matrices_scanned": 28,
        "parameters": 900,
        "parameters_before": 1000,
    }
    return LaserResult(**(known | fields))


def test_the_report_holds_every_candidate_and_draws_the_accepted_matrix(
    tiny_llama: TinyLlama, tmp_path: Path
) -> None:
    source = tiny_llama(tmp_path / "base", num_hidden_layers=2)
    matrices = find_matrices(Checkpoint(source).entries)
    scans = {
        matrix.address: ScanMatrix(
            checkpoint=source,
            matrix=matrix,
            file_sha256=hash_file(source / "model.safetensors"),
            cache_dir=tmp_path / "cache",
        )
        for matrix in matrices
    }
    context = UnitContext(tmp_path)
    spectra = tuple(scan.run(context) for scan in scans.values())
    lines = (
        line(predicted_change=-0.003, predicted_standard_error=0.001, predicted_with_fisher=-0.002),
        line("model.layers.0.mlp.up_proj.weight", kind="up_proj", accepted=False, decision="not measured",
             items=0, delta=None, standard_error=None, z=None),
    )  # fmt: skip
    shown = choose_pictured(spectra, lines)
    assert shown[0].address == NAME
    assert shown[1].kind == "up_proj"
    assert len({matrix.kind for matrix in shown}) == len(shown) == 6
    unit = WriteReport(
        directory=tmp_path / "model",
        metric="perplexity",
        z_threshold=3.0,
        lines=lines,
        spectra=spectra,
        pictured=tuple(scans[matrix.address] for matrix in shown),
        scores=scores_of(result()),
    )
    carried = WriteReport.model_validate_json(unit.model_dump_json())
    assert carried.unit_id == unit.unit_id
    written = carried.run(context)
    assert isinstance(written, WrittenFiles)
    folder = tmp_path / "model" / "report"
    assert {file.path for file in written.files} == set(folder.iterdir())
    assert {path.stem for path in folder.glob("*.png")} == {
        "spectra",
        "candidates",
        "predictions",
        "before_after",
    }
    ledger = json.loads((folder / "ledger.json").read_text())
    assert ledger["unit"] == "nats per token"
    assert [candidate["decision"] for candidate in ledger["candidates"]] == ["accepted", "not measured"]
    assert ledger["candidates"][0]["guards"] == {"accuracy on capitals": 0.4}
    assert ledger["candidates"][1]["delta"] is None
    assert [s["part"] for s in ledger["scores"]] == ["search", "held_out", "report", "report"]
    assert len(json.loads((folder / "spectra.json").read_text())) == len(spectra)


def test_a_report_of_nothing(tmp_path: Path) -> None:
    unit = WriteReport(directory=tmp_path, metric="accuracy", z_threshold=3.0, lines=(), spectra=())
    names = {file.path.name for file in unit.run(UnitContext(tmp_path)).files}
    assert names == {"ledger.json", "spectra.json", "candidates.png"}


def test_what_the_card_tells_of_a_success() -> None:
    changed, comparison = sections(result(), [line()])
    assert changed.table is not None
    assert changed.table.rows == (
        (
            NAME,
            "12 of 32",
            "activation, shrunk",
            "laserrmt, fraction 0.4",
            "91.4%",
            "−0.0041 ± 0.0013",
            "−3.15",
        ),
    )
    told = " ".join(changed.text)
    assert "group" not in told
    assert "28 matrices scanned, 210 reductions screened by a gradient, 30 reductions measured" in told
    assert "perplexity on prose" in told
    assert comparison.table is not None
    parts = [(row[0], row[1], row[5]) for row in comparison.table.rows]
    assert parts == [
        ("perplexity on prose", "search", "−3.15"),
        ("perplexity on prose", "held out", "−2.40"),
        ("perplexity on prose", "report", "−1.90"),
        ("accuracy on capitals", "report", "0.40"),
    ]
    assert comparison.table.rows[3][2] == "58.0% ± 120.0%"
    assert comparison.table.strong == ((0, 5), (1, 5))


def test_the_card_tells_what_was_accepted_together() -> None:
    alone = result().accepted[0]
    member = alone.model_copy(update={"group": 1, "delta": -0.009, "standard_error": 0.0039})
    changed = sections(result(accepted=(alone, member)), [line()])[0]
    assert changed.table is not None
    assert [row[5] for row in changed.table.rows] == ["−0.0041 ± 0.0013", "−0.0090 ± 0.0039 (group)"]
    assert "(group) were accepted together" in " ".join(changed.text)


def test_what_the_card_tells_when_nothing_helped() -> None:
    unchanged = {"after": 39.89, "delta": 0.0, "delta_standard_error": 0.0, "z": None}
    nothing = result(accepted=(), search=score("search", **unchanged), held_out=None, report=None, guards=())
    weaker = line(
        "model.layers.0.self_attn.v_proj.weight", z=-1.2, accepted=False, decision="not significant"
    )
    lost = line(
        "model.layers.2.self_attn.v_proj.weight", z=None, delta=None, standard_error=None, accepted=False
    )
    changed, comparison = sections(nothing, [weaker, lost])
    assert changed.table is None
    assert changed.text[0].startswith("Nothing: no reduction")
    assert "layers.0" in changed.text[0]
    assert "byte for byte" in changed.text[0]
    assert comparison.table is not None
    assert comparison.table.rows[0][4:6] == ("", "")
    (undone,) = sections(
        nothing.model_copy(
            update={
                "taken_back": (NAME,),
                "taken_back_because": "z = 4.1 on held-out items.",
                "search": None,
            }
        ),
        [],
    )
    assert "taken back" in undone.text[0]
    assert "z = 4.1 on held-out items" in undone.text[0]


@pytest.mark.parametrize(("output", "parameters", "told"), [
    ("factored", 900, True), ("factored", 1000, False), ("dense", 1000, False),
])  # fmt: skip
def test_the_card_says_how_to_load_factors(output: Any, parameters: int, told: bool) -> None:
    made = sections(result(output=output, parameters=parameters), [])
    found = [section for section in made if section.title == "Stored as factors"]
    assert bool(found) == told
    if told:
        assert "10.0% fewer" in found[0].text[0]
        assert "import aidocks.laser.factored" in found[0].text[0]


def test_the_sections_make_a_card() -> None:
    manifest = Manifest(
        name="small", created_at=datetime(2026, 1, 1, tzinfo=UTC), operation="laser", job_id="job-1", spec={},
        code_version="1", sections=sections(result(output="factored"), [line()]),
    )  # fmt: skip
    text = card(manifest)
    assert "## What was changed" in text
    assert "| perplexity on prose | held out |" in text
    assert "## Stored as factors" in text


def test_the_result_is_plain_json() -> None:
    back = LaserResult.model_validate_json(result().model_dump_json())
    assert back == result()


def test_scores_are_told_data_set_by_data_set() -> None:
    guards = [
        score(part, metric=metric) for part in ("report", "held_out") for metric in ("preference", "accuracy")
    ]
    told = [(s.metric, s.part) for s in scores_of(result(guards=guards))]
    assert told[:3] == [("perplexity", part) for part in ("search", "held_out", "report")]
    assert told[3:] == [(m, part) for m in ("preference", "accuracy") for part in ("held_out", "report")]
