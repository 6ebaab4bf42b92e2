"""What is told of a merge: its plan in short, the sections of the model card, and the files of the report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from aidocks.checkpoints.files import write_bytes, write_text
from aidocks.evaluate.comparison import perplexity_section, ranges
from aidocks.merge.recipe import TensorMerge
from aidocks.models.manifest import Section, Table
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.merge_result import MergePart, MergeResult
from aidocks.specs.merge_yaml import shown_reference
from aidocks.specs.perplexities import ModelPerplexity

_NUMBERED = re.compile(r"\.(\d+)\.")
#: Rows of the card's table of parts, at most.
_MOST_PARTS = 24


def parts_of(tensors: Sequence[TensorMerge]) -> tuple[MergePart, ...]:
    """Return how tensors are made: kinds that are made alike as one part, in the order of the first of each."""
    kinds: dict[tuple[str, str], list[tuple[int | None, TensorMerge]]] = {}
    for tensor in tensors:
        layer, kind = _divide(tensor.name)
        kinds.setdefault((kind, tensor.method or "copy"), []).append((layer, tensor))
    alike: dict[tuple[str, str, int, str], list[str]] = {}
    for (kind, method), members in kinds.items():
        layers = ranges(layer for layer, _ in members if layer is not None)
        inputs = max(len(tensor.operands) for _, tensor in members)
        made = (layers, method, inputs, _values([tensor for _, tensor in members]))
        alike.setdefault(made, []).append(kind)
    return tuple(
        MergePart(tensors=_joined(names), layers=layers, method=method, inputs=inputs, values=values)
        for (layers, method, inputs, values), names in alike.items()
    )


def _joined(names: Sequence[str]) -> str:
    """Return names of one module together: `mlp.{down_proj, up_proj}`."""
    modules: dict[str, list[str]] = {}
    for name in names:
        module, _, rest = name.removesuffix(".weight").rpartition(".")
        modules.setdefault(module, []).append(rest)
    return ", ".join(
        f"{module}.{{{', '.join(rest)}}}"
        if len(rest) > 1 and module
        else ", ".join(f"{module}.{r}".lstrip(".") for r in rest)
        for module, rest in modules.items()
    )


def _divide(name: str) -> tuple[int | None, str]:
    """Return the number of a tensor's layer, and its name within the layer."""
    match = _NUMBERED.search(f".{name}")
    if match is None:
        return None, name
    return int(match[1]), f".{name}"[match.end() :]


def _values(tensors: Sequence[TensorMerge]) -> str:
    first, last = tensors[0].values, tensors[-1].values
    told = []
    for name, value in first.items():
        begin, end = _text(value), _text(last.get(name))
        changes = any(_text(tensor.values.get(name)) != begin for tensor in tensors)
        told.append(f"{name} {begin} … {end}" if changes else f"{name} {begin}")
    return ", ".join(told)


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list | tuple):
        texts = [_text(item) for item in value]
        return texts[0] if len(set(texts)) == 1 else f"({', '.join(texts)})"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def card_sections(result: MergeResult) -> tuple[Section, ...]:
    """Return what the model card tells: what was done with which tensors, what is worth knowing, perplexities."""
    parts = result.parts[:_MOST_PARTS]
    text = [
        f"{step.name}: {step.method} of {', '.join(map(shown_reference, step.models))}."
        for step in result.steps
    ]
    if len(result.parts) > len(parts):
        text.append(f"{len(result.parts) - len(parts)} more kinds of tensors are in report/report.json.")
    sections = [
        Section(
            title="Merge",
            text=(*text, "The configuration is in mergekit_config.yml."),
            table=Table(
                header=("tensors", "layers", "method", "values"),
                rows=tuple((part.tensors, part.layers, part.method, part.values) for part in parts),
            ),
            notes=_shown_notes(result),
        )
    ]
    if result.perplexities:
        domains = result.perplexities[0].domains
        titles = [model_title(model) for model in result.perplexities]
        sections.append(perplexity_section(result.perplexities, titles, [part.domain for part in domains]))
    return tuple(sections)


def model_title(model: ModelPerplexity) -> str:
    """Return what people call a model that was measured."""
    titles = {"average": "plain average of the models", "merge": "this model"}
    prefix = "base: " if model.model == "base" else ""
    return titles.get(model.model, prefix + shown_reference(model.reference))


def _shown_notes(result: MergeResult) -> tuple[str, ...]:
    """Return the notes with models named as in the rest of the report; the longest first, as one may begin another."""
    references = sorted({model for step in result.steps for model in step.models}, key=len, reverse=True)
    notes = list(result.notes)
    for reference in references:
        notes = [note.replace(repr(reference), repr(shown_reference(reference))) for note in notes]
    return tuple(notes)


class WriteMergeReport(WritingUnit):
    """``mergekit_config.yml``, ``report/report.json``, and ``report/perplexity.png`` where it was measured."""

    directory: Path = Field(description="Directory in which the result is staged.")
    config: str = Field(description="The request's configuration as YAML.")
    result: MergeResult

    @property
    def label(self) -> str:
        return "report"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        folder = self.directory / "report"
        folder.mkdir(parents=True, exist_ok=True)
        files = [write_text(self.directory / "mergekit_config.yml", self.config)]
        models = self.result.perplexities
        if models:
            from aidocks.evaluate.figures import draw_perplexities

            titles = ["result" if model.model == "merge" else model_title(model) for model in models]
            texts = [part.domain for part in models[0].domains]
            files.append(write_bytes(folder / "perplexity.png", draw_perplexities(models, titles, texts)))
        told = self.result.model_dump(mode="json", include={"steps", "parts", "notes", "perplexities"})
        for step in told["steps"]:
            step["models"] = [shown_reference(reference) for reference in step["models"]]
        for model in told["perplexities"]:
            model["reference"] = shown_reference(model["reference"])
        told["notes"] = _shown_notes(self.result)
        files.append(write_text(folder / "report.json", json.dumps(told, indent=1) + "\n"))
        return WrittenFiles(files=tuple(files))
