"""Model cards: front matter for libraries, provenance for people, and nothing that a value can break."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given
from hypothesis import strategies as st

from aidocks.models.card import card, read_front_matter, read_license
from aidocks.models.manifest import Manifest, ManifestFile, Parent, Section, Table


def manifest(**more: Any) -> Manifest:
    values: dict[str, Any] = {
        "name": "smol-laser",
        "created_at": datetime(2026, 1, 2, tzinfo=UTC),
        "operation": "laser",
        "job_id": "job-1",
        "spec": {"base_model_name": "org/base@main", "laser_model_name": "smol-laser", "layers": None},
        "parents": (parent(),),
        "code_version": "0.1.0",
        "files": (
            ManifestFile(path="report/ranks.png", bytes=1, sha256="0"),
            ManifestFile(path="report/ledger.json", bytes=1, sha256="0"),
        ),
        "metrics": {"search": {"before": 12.34567891, "after": 11.0}, "withdrawn": False, "accepted": [1, 2]},
        "parameters": 134515008,
        "dtype": "BF16",
        "architecture": "LlamaForCausalLM",
        "bytes": 269_000_000,
    }
    return Manifest(**(values | more))


def parent(reference: str = "org/base@main", **more: Any) -> Parent:
    values = {
        "field": "base_model_name",
        "content_hash": "ab" * 32,
        "path_name": "base",
        "license": "apache-2.0",
    }
    return Parent(reference=reference, **(values | more))


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_front_matter_is_what_the_hub_expects() -> None:
    text = card(manifest())
    assert front_matter(text) == {
        "library_name": "transformers",
        "tags": ["aidocks", "laser"],
        "base_model": ["org/base"],
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
    }
    data = ModelCard(text).data
    assert data.base_model == ["org/base"]
    assert data.license == "apache-2.0"


def test_body_tells_what_how_from_what_and_how_good() -> None:
    text = card(manifest())
    for line in [
        "# smol-laser",
        "- Architecture: LlamaForCausalLM",
        "- Parameters: 134,515,008",
        "- Size: 269.0 MB",
        "![ranks](report/ranks.png)",
        "| search.before | 12.3457 |",
        "| `base_model_name` | org/base@main | apache-2.0 | `abababababababab` |",
        "base_model_name: org/base@main",
        "AutoModelForCausalLM.from_pretrained(path",
    ]:
        assert line in text, line
    assert "ledger.json" not in text


def test_the_way_to_load_it_is_sound_python() -> None:
    for architecture in ("LlamaForCausalLM", "BertModel", None):
        text = card(manifest(architecture=architecture))
        compile(text.split("```python\n")[1].split("```")[0], "card", "exec")


@pytest.mark.parametrize(
    ("kind", "task", "name"),
    [
        ("embedding", "sentence-similarity", "SentenceTransformer"),
        ("reranker", "text-ranking", "CrossEncoder"),
    ],
)
def test_models_that_find_texts_are_told_as_such(kind: str, task: str, name: str) -> None:
    for architecture in ("BertForSequenceClassification", "Qwen3ForCausalLM"):
        text = card(manifest(architecture=architecture, metrics={"kind": kind, "prompts": {"query": "q"}}))
        front = yaml.safe_load(text.split("---")[1])
        assert (front["library_name"], front["pipeline_tag"]) == ("sentence-transformers", task)
        code = text.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert f"import {name}" in code
        assert "prompts.query" not in text


def test_parents_under_different_licences() -> None:
    parents = (parent(), parent("org/other", license="llama3"))
    assert front_matter(card(manifest(parents=parents)))["license"] == "other"
    unknown = (parent(license=None),)
    assert "license" not in front_matter(card(manifest(parents=unknown)))


def test_paths_of_this_machine_are_not_published() -> None:
    path = "/data/secret-project/base"
    spec = {
        "base_model_name": path,
        "experts": [{"source_model": path}],
        "text": "/data/secret-project/a.txt",
    }
    text = card(manifest(spec=spec, parents=(parent(path),)))
    assert "secret-project" not in text
    assert "base_model_name: base" in text


@given(
    values=st.dictionaries(st.text(max_size=20), st.text(max_size=60), max_size=4),
    reference=st.text(min_size=1, max_size=40),
)
def test_no_value_breaks_out_of_its_place(values: dict[str, str], reference: str) -> None:
    text = card(
        manifest(spec=values, metrics={"search": values}, parents=(parent(reference, license=reference),))
    )
    assert front_matter(text)["tags"] == ["aidocks", "laser"]
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == [
        *(["## Measured"] if values else []),
        "## Made of",
        "## How it was made",
        "## How to load it",
    ]


@pytest.mark.parametrize("fence", ["```", "~~~", "`````"])
def test_fences_in_values_do_not_close_the_block(fence: str) -> None:
    text = card(manifest(spec={"prompt": f"a\n{fence}\n# owned\n"}))
    block = text.split("## How it was made")[1].split("## How to load it")[0].strip().splitlines()
    assert set(block[-1]) == {"`"}
    assert len(block[-1]) > len(fence) or fence == "~~~"


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n", "mit"),
        ("---\nlicense: mit\n---", "mit"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("# no front matter", None),
        ("---\n{unclosed: [\n---\n", None),
        ("---\n- a list\n---\n", None),
        ("---\nlicense: [mit, other]\n---\n", None),
        ("---\nlicense: " + "x" * 100 + "\n---\n", None),
        ("---\nlicense: !!python/object/apply:os.system ['true']\n---\n", None),
        ("", None),
        (None, None),
    ],
)
def test_licences_are_read_from_front_matter(tmp_path: Path, text: str | None, licence: str | None) -> None:
    if text is not None:
        (tmp_path / "README.md").write_bytes(text.encode())
    assert read_license(tmp_path) == licence
    assert isinstance(read_front_matter(tmp_path), dict)


def test_sections_of_the_operation_are_shown() -> None:
    table = Table(
        header=("model", "prose"), rows=(("base", "9.1 ± 0.2"), ("mine", "8.0 ± 0.2")), strong=((1, 1),)
    )
    section = Section(title="Perplexity", text=("Lower is better.",), table=table, notes=("a_b is dead",))
    made = manifest(sections=(section,))
    assert Manifest.model_validate_json(made.model_dump_json()) == made
    text = card(made)
    block = "\n".join(
        [
            "## Perplexity",
            "",
            "Lower is better.",
            "",
            "| model | prose |",
            "|---|---:|",
            "| base | 9.1 ± 0.2 |",
            "| mine | **8.0 ± 0.2** |",
            "",
            "- a\\_b is dead",
        ]
    )
    assert block in text
    assert text.index("](report/ranks.png)") < text.index("## Perplexity") < text.index("## Measured")


def test_lists_are_no_metrics() -> None:
    assert "accepted" not in card(manifest())


@given(values=st.lists(st.text(max_size=30), min_size=5, max_size=5))
def test_no_value_breaks_out_of_a_section(values: list[str]) -> None:
    title, paragraph, head, cell, note = values
    table = Table(header=(head, "x"), rows=((cell, "y"),), strong=((0, 0),))
    section = Section(title=title, text=(paragraph,), table=table, notes=(note,))
    lines = card(manifest(sections=(section,), metrics={})).splitlines()
    headings = [line for line in lines if line.startswith("#")]
    assert [heading.split()[0] for heading in headings] == ["#", *["##"] * 4]
    assert not [line for line in lines if line.startswith("~~~")]
    rows = [line for line in lines if line.startswith("|")]
    # Header, rule and row have two cells each, and so on through the table of parents, which has four.
    assert [len(re.findall(r"(?<!\\)\|", row)) for row in rows] == [3, 3, 3, 5, 5, 5]
