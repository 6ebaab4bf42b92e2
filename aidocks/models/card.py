"""Model cards: README.md with the front matter that hubs and libraries read, made from the manifest alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE
from aidocks.checkpoints.space import format_bytes
from aidocks.models.manifest import Manifest, Parent, Section, Table

CARD_FILE = "README.md"
_MAX_CARD_BYTES = 4 << 20
#: Parts of results that are no measurements; sections of their own tell them.
_NO_METRICS = frozenset({"data", "estimate", "hyperparameters", "prompts", "versions"})
#: What hubs call models that find texts: our kind -> their task, and the class of sentence-transformers.
_FINDING = {
    "embedding": ("sentence-similarity", "SentenceTransformer"),
    "reranker": ("text-ranking", "CrossEncoder"),
}


def card(manifest: Manifest) -> str:
    """Return the model card of a manifest."""
    parts = [
        f"---\n{_dump(_front_matter(manifest))}---",
        f"# {manifest.name}",
        _summary(manifest),
        _pictures(manifest),
        *(_section(section) for section in manifest.sections),
        _metrics(manifest.metrics),
        _parents(manifest),
        f"## How it was made\n\n`{manifest.operation}` with AIDocks {manifest.code_version}:\n\n"
        + _fenced("yaml", _dump(_public(manifest.spec, manifest.parents))),
        _usage(manifest),
    ]
    return "\n\n".join(part.rstrip() for part in parts if part) + "\n"


def read_license(directory: Path) -> str | None:
    """Return the licence that a model's card declares in its front matter, if there is one."""
    front_matter = read_front_matter(directory)
    declared = front_matter.get("license")
    return declared if isinstance(declared, str) and len(declared) <= 64 else None


def read_front_matter(directory: Path) -> dict[str, Any]:
    """Return the YAML at the top of a model's card; empty when there is none that can be read."""
    try:
        with (directory / CARD_FILE).open("rb") as stream:
            text = stream.read(_MAX_CARD_BYTES).decode("utf-8", "replace")
        match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
        found = yaml.safe_load(match[1]) if match else None
    except (OSError, yaml.YAMLError, RecursionError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _front_matter(manifest: Manifest) -> dict[str, Any]:
    library = "peft" if _is_adapter(manifest) else "transformers"
    front: dict[str, Any] = {"library_name": library, "tags": ["aidocks", manifest.operation]}
    if manifest.parents and manifest.operation != "import":
        bases = (_public_name(parent).partition("@")[0] for parent in manifest.parents)
        front["base_model"] = list(dict.fromkeys(bases))
    licences = {parent.license for parent in manifest.parents if parent.license}
    if licences:
        # Parents under different licences: their terms all apply, and no single identifier says so.
        front["license"] = licences.pop() if len(licences) == 1 else "other"
    finding = _finding(manifest)
    if finding is not None:
        front["library_name"], front["pipeline_tag"] = "sentence-transformers", finding[0]
    elif _is_causal(manifest):
        front["pipeline_tag"] = "text-generation"
    return front


def _summary(manifest: Manifest) -> str:
    rows = [
        ("Architecture", manifest.architecture),
        ("Parameters", f"{manifest.parameters:,}" if manifest.parameters else None),
        ("Type", manifest.dtype),
        ("Size", format_bytes(manifest.bytes) if manifest.bytes else None),
        ("Made", manifest.created_at.strftime("%Y-%m-%d %H:%M %Z").strip()),
    ]
    return "\n".join(f"- {title}: {_escape(str(value))}" for title, value in rows if value)


def _pictures(manifest: Manifest) -> str:
    pictures = [f.path for f in manifest.files if re.fullmatch(r"report/[\w.-]+\.png", f.path)]
    return "\n\n".join(
        f"![{Path(p).stem.replace('_', ' ').replace('-', ' ')}]({p})" for p in sorted(pictures)
    )


def _section(section: Section) -> str:
    parts = [
        f"## {_escape(section.title)}",
        *(_escape(paragraph) for paragraph in section.text),
        _table(section.table) if section.table else "",
        "\n".join(f"- {_escape(note)}" for note in section.notes),
    ]
    return "\n\n".join(part for part in parts if part)


def _table(table: Table) -> str:
    strong = set(table.strong)
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    marks = ("---:|" if column and all(map(_is_figure, column)) else "---|" for column in columns)
    lines = [_line(table.header), "|" + "".join(marks)]
    for row, cells in enumerate(table.rows):
        shown = [_escape(cell) for cell in cells]
        marked = [f"**{c}**" if (row, column) in strong and c else c for column, c in enumerate(shown)]
        lines.append("| " + " | ".join(marked) + " |")
    return "\n".join(lines)


def _is_figure(cell: str) -> bool:
    return cell in ("", "none", "not finite") or re.fullmatch(r"[-+−±–…\d.,:%/e\s]+", cell) is not None


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(_escape(cell) for cell in cells) + " |"


def _metrics(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {_escape(name)} | {_escape(_number(value))} |" for name, value in _scalars(metrics)]
    return "\n".join(["## Measured", "", "| metric | value |", "|---|---|", *rows]) if rows else ""


def _scalars(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from () if name in _NO_METRICS else _scalars(value, f"{name}.")
        elif isinstance(value, bool | str):
            # What was chosen stands beside what was measured with it; alone it is the request's.
            if prefix:
                yield name, value
        elif isinstance(value, int | float):
            yield name, value


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _parents(manifest: Manifest) -> str:
    rows = [
        f"| `{_code(parent.field)}` | {_escape(_public_name(parent))} "
        f"| {_escape(parent.license or '')} | `{parent.content_hash[:16]}` |"
        for parent in manifest.parents
    ]
    head = ["## Made of", "", "| as | model | licence | content (SHA-256) |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def _usage(manifest: Manifest) -> str:
    if _finding(manifest) is not None:
        return _finding_usage(manifest)
    if _is_adapter(manifest):
        return _adapter_usage(manifest)
    kind = f"AutoModel{_head(manifest)}"
    # Models whose matrices are stored as factors load once the module is there that knows them.
    factored = (manifest.architecture or "").startswith("Factored")
    code = "import aidocks.laser.factored\n" if factored else ""
    code += (
        f"from transformers import AutoTokenizer, {kind}\n\n"
        f'path = "{manifest.name}"  # this directory, or the model\'s id on a hub\n'
        f"tokenizer = AutoTokenizer.from_pretrained(path)\n"
        f'model = {kind}.from_pretrained(path, dtype="auto")\n'
    )
    if _is_causal(manifest):
        code += (
            'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
            "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))\n"
        )
    return f"## How to load it\n\n{_fenced('python', code)}"


def _finding(manifest: Manifest) -> tuple[str, str] | None:
    """Return task and class of a model that finds texts; None of others."""
    return _FINDING.get(str(manifest.metrics.get("kind")))


def _finding_usage(manifest: Manifest) -> str:
    """Say how a model that finds texts is loaded; an adapter by AIDocks, which keeps the head that belongs to it."""
    embeds = manifest.metrics.get("kind") == "embedding"
    if _is_adapter(manifest):
        what = (
            'embed(model, ["Where is it?"])'
            if embeds
            else 'rerank(model, "Where is it?", ["There.", "Never."])'
        )
        code = f'from aidocks import Client\n\nmodel = "{manifest.name}"\n'
        code += f"with Client() as client:\n    print(client.{what})\n"
        return f"## How to use it\n\n{_fenced('python', code)}"
    kind = "SentenceTransformer" if embeds else "CrossEncoder"
    code = (
        f"from sentence_transformers import {kind}\n\n"
        f'model = {kind}("{manifest.name}")  # this directory, or the model\'s id on a hub\n'
    )
    if embeds:
        code += 'print(model.similarity(model.encode_query(["Where is it?"]), model.encode_document(["There."])))\n'
    else:
        code += 'print(model.rank("Where is it?", ["There.", "Never."]))\n'
    return f"## How to load it\n\n{_fenced('python', code)}"


def _adapter_usage(manifest: Manifest) -> str:
    base = next((_public_name(p) for p in manifest.parents if p.field == "base_model"), "its base model")
    is_reward_model = manifest.spec.get("method") == "reward"
    kind = "AutoModelForSequenceClassification" if is_reward_model else "AutoModelForCausalLM"
    labels = ", num_labels=1" if is_reward_model else ""
    code = (
        "from peft import PeftModel\n"
        f"from transformers import {kind}\n\n"
        f'base = {kind}.from_pretrained("{_code(base)}", dtype="auto"{labels})\n'
        f'model = PeftModel.from_pretrained(base, "{manifest.name}")  # this directory, or its id on a hub\n'
    )
    if not (manifest.architecture or "").startswith(("prompt", "prefix")):
        code += "whole = model.merge_and_unload()\n"
    return f"## How to load it\n\n{_fenced('python', code)}"


def _is_adapter(manifest: Manifest) -> bool:
    return any(file.path == ADAPTER_CONFIG_FILE for file in manifest.files)


def _head(manifest: Manifest) -> str:
    """Return what follows ``AutoModel`` in the name of the class that loads a model with its head."""
    if (manifest.architecture or "").endswith("ForSequenceClassification"):
        return "ForSequenceClassification"
    return "ForCausalLM" if _is_causal(manifest) else ""


def _is_causal(manifest: Manifest) -> bool:
    return (manifest.architecture or "").endswith("ForCausalLM")


def _public_name(parent: Parent) -> str:
    return parent.path_name if parent.reference.startswith(("/", ".", "~")) else parent.reference


def _public(value: Any, parents: tuple[Parent, ...]) -> Any:
    """Replace references that are paths by the directory's name: cards are made to be published."""
    names = {parent.reference: _public_name(parent) for parent in parents}
    if isinstance(value, Mapping):
        return {key: _public(item, parents) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_public(item, parents) for item in value]
    if isinstance(value, str):
        return names.get(value, Path(value).name if value.startswith(("/", "~")) else value)
    return value


def _dump(value: Any) -> str:
    text: str = yaml.safe_dump(json.loads(json.dumps(value)), sort_keys=False, allow_unicode=True, width=110)
    return text


def _fenced(language: str, text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _escape(text: str) -> str:
    """Keep a value from becoming markup in a table or a list."""
    flat = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", flat)


def _code(text: str) -> str:
    return text.replace("`", "'").replace("|", "/")
