from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from aidocks.laser.layer_lists import (
    list_layers,
    module_kind,
    pattern,
    pictures_by_kind,
    score_of,
    spectrum_table,
    unfrozen_yaml,
)
from aidocks.laser.matrices import Matrix
from aidocks.specs.laser_scan import ScannedMatrix


def row(address: str, noise_ratio: float | None, snr: float | None = 1.0, **fields: Any) -> ScannedMatrix:
    layer = next((int(part) for part in address.split(".") if part.isdecimal()), None)
    values: dict[str, Any] = {
        "layer": layer, "kind": "k", "shape": (4, 4), "sigma": 1.0, "edge": 4.0, "outliers": 0, "rules": (),
        "bulk_distance": 0.1, "frobenius": 1.0, "spectral_norm": 1.0,
    }  # fmt: skip
    return ScannedMatrix(address=address, noise_ratio=noise_ratio, snr=snr, **(values | fields))


ROWS = (
    *(row(f"model.layers.{i}.self_attn.q_proj.weight", ratio) for i, ratio in enumerate((1, 4, 2, 3))),
    *(row(f"model.layers.{i}.mlp.up_proj.weight", ratio) for i, ratio in enumerate((9, 0.5, None, 7))),
    row("model.embed_tokens.weight", 50, tied=("lm_head.weight",)),
)


def test_the_top_share_of_each_kind_the_best_first() -> None:
    listed = list_layers(ROWS, 0.5, "noise_ratio", True)
    assert listed.addresses == (
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.3.self_attn.q_proj.weight",
    )
    assert listed.also == ("model.embed_tokens.weight", "lm_head.weight")
    assert list_layers(ROWS, 0.49, "noise_ratio", False).also == ()
    assert len(list_layers(ROWS, 0.49, "noise_ratio", False).addresses) == 2
    assert list_layers(ROWS, 0.2, "noise_ratio", False).addresses == ()
    assert len(list_layers(ROWS, 1.0, "original", False).addresses) == 8


def test_the_original_score_is_the_ratio_over_the_norm() -> None:
    assert score_of(row("a", 1, 6.0, spectral_norm=3.0), "original") == 2.0
    assert score_of(row("a", 1, None), "original") == float("inf")
    assert score_of(row("a", 1, 0.0, spectral_norm=0.0), "original") == 0.0
    loud = (row("l.0.q.weight", 5, 1.0, spectral_norm=10.0), row("l.1.q.weight", 1, 1.0, spectral_norm=1.0))
    assert list_layers(loud, 0.5, "original", False).addresses == ("l.1.q.weight",)
    assert list_layers(loud, 0.5, "noise_ratio", False).addresses == ("l.0.q.weight",)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("model.layers.3.self_attn.q_proj.weight", "self_attn.q_proj"),
        ("h.0.mlp.c_proj.weight", "mlp.c_proj"),
        ("model.layers.3.block_sparse_moe.experts.11.w1.weight", "block_sparse_moe.experts.*.w1"),
        ("model.layers.3.mlp.experts.gate_up_proj[7]", "mlp.experts.gate_up_proj"),
    ],
)
def test_kinds_are_paths_within_a_layer(address: str, kind: str) -> None:
    assert module_kind(address) == kind


def test_axolotl_reads_the_file() -> None:
    text = unfrozen_yaml(list_layers(ROWS, 0.5, "noise_ratio", True))
    patterns = yaml.safe_load(text)["unfrozen_parameters"]
    assert patterns[0] == "^model.embed_tokens.weight$"
    assert "# self_attn.q_proj\n" in text
    # Its own way with a pattern: every dot is literal, and it must match from the start.
    names = [r.address for r in ROWS]
    compiled = [re.compile(p.replace(".", r"\.")) for p in patterns]
    unfrozen = {name for name in names if any(p.match(name) for p in compiled)}
    listed = list_layers(ROWS, 0.5, "noise_ratio", True)
    assert unfrozen == {*listed.addresses, "model.embed_tokens.weight"}


def test_experts_of_one_tensor_are_rows_of_its_first_axis() -> None:
    assert pattern("l.0.experts.up[12]") == "^l.0.experts.up$[12:13]"
    assert yaml.safe_load(f"- {pattern('l.0.experts.up[12]')}") == ["^l.0.experts.up$[12:13]"]


def test_nothing_to_unfreeze_is_a_valid_file_too() -> None:
    assert yaml.safe_load(unfrozen_yaml(list_layers((), 0.5, "original", True))) == {
        "unfrozen_parameters": []
    }


def test_the_table_has_the_form_of_spectrums_files() -> None:
    experts = (row("l.0.experts.up[0]", 1.0), row("l.0.experts.up[1]", 3.0))
    table = spectrum_table((*ROWS, *experts))
    assert table["model.layers.1.self_attn.q_proj"] == {"snr": 4.0, "type": "self_attn.q_proj"}
    assert table["l.0.experts.up"] == {"snr": 2.0, "type": "experts.up"}
    assert "model.embed_tokens" not in table
    json.dumps(table, allow_nan=False)
    ups = {name: entry["snr"] for name, entry in table.items() if name.endswith("up_proj")}
    assert max(ups, key=lambda name: ups[name]) == "model.layers.2.mlp.up_proj"


def matrix(name: str, layer: int | None, expert: int | None = None) -> Matrix:
    return Matrix(name=name, layer=layer, kind="k", shape=(4, 4), dtype="BF16", expert=expert)


def test_every_kind_has_a_picture_of_its_layers() -> None:
    found = pictures_by_kind(
        [
            matrix("model.embed_tokens.weight", None),
            matrix("model.layers.1.mlp.up_proj.weight", 1),
            matrix("model.layers.0.mlp.up_proj.weight", 0),
            matrix("a/b.layers.0.x/../y.weight", 0),
            *(matrix(f"model.layers.0.moe.experts.{number}.w1.weight", 0) for number in range(2)),
            *(matrix("model.layers.0.mlp.experts.up", 0, number) for number in range(300)),
        ]
    )
    assert {name: len(members) for name, members in found.items()} == {
        "spectra-mlp.experts.up.png": 128,
        "spectra-mlp.up_proj.png": 2,
        "spectra-moe.experts.N.w1.png": 2,
        "spectra-no-layer.png": 1,
        "spectra-x_.._y.png": 1,
    }
    assert [m.layer for m in found["spectra-mlp.up_proj.png"]] == [0, 1]
    drawn = [m.expert for m in found["spectra-mlp.experts.up.png"]]
    assert (drawn[0], drawn[-1], len(set(drawn))) == (0, 299, 128)
