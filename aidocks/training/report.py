"""What is told of a training: the sections of the model card, and the files of the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from aidocks.checkpoints.files import OutputFile, copy_file, write_bytes, write_text
from aidocks.checkpoints.space import format_bytes
from aidocks.evaluate.comparison import shown as shown_reference
from aidocks.evaluate.comparison import significant
from aidocks.models.manifest import Section, Table
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.base import OperationResult
from aidocks.specs.train_data import DataSummary
from aidocks.specs.train_llm_result import Comparison, HeldOut, HeldOutMetric, LLMTrainResult
from aidocks.training.run import (
    LOW_RANK,
    ONLINE_METHODS,
    AdapterSettings,
    History,
    Hyperparameters,
    Method,
)
from aidocks.training.samples import samples_section

CURVES = "report/curves.png"
_TENSORBOARD = "report/tensorboard"
#: Names of a list that a table shows.
_SHOWN_NAMES = 12
#: Settings of an adapter -> fields of the request.
_ADAPTER_NAMES = {"rank": "lora_rank", "alpha": "lora_alpha", "dropout": "lora_dropout"}
_METRICS: dict[HeldOutMetric, str] = {
    "perplexity": "perplexity",
    "preference_accuracy": "pairs the right way round",
    "margin": "margin, nats",
    "reward": "reward",
}


class WriteTrainingReport(WritingUnit):
    """The report beside the weights: result, curves, samples, and the files of TensorBoard."""

    directory: Path = Field(description="Directory in which the result is staged.")
    result: LLMTrainResult
    history: History
    method: Method
    tensorboard: Path = Field(description="Directory of the TensorBoard files.")

    @property
    def label(self) -> str:
        return "report"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.training.figures import draw_curves

        samples = [one.model_dump(mode="json") for one in self.result.samples]
        told = {"samples.json": {"samples": samples}} if samples else {}
        pictures = {CURVES: draw_curves(self.method, self.history.points)}
        files = write_report(self.directory, self.result, self.history, told, pictures, self.tensorboard)
        return WrittenFiles(files=tuple(files))


def write_report(
    directory: Path,
    result: OperationResult,
    history: History,
    beside: Mapping[str, Any],
    pictures: Mapping[str, bytes | None],
    tensorboard: Path,
) -> Iterator[OutputFile]:
    """Write the files of a training's report beside its weights.

    Args:
        directory: In which the result is staged.
        result: As people may see it.
        history: Its curves.
        beside: Further files of JSON below `report`: name -> content.
        pictures: Name relative to ``directory`` -> PNG; None where there is nothing to draw.
        tensorboard: Directory of the TensorBoard files.
    """
    points = [point.model_dump(mode="json", exclude_defaults=True) for point in history.points]
    own = {"report.json": result.model_dump(mode="json"), "history.json": {"points": points}}
    for name, content in (own | dict(beside)).items():
        yield write_text(directory / "report" / name, _json(content))
    for name, picture in pictures.items():
        if picture is not None:
            yield write_bytes(directory / name, picture)
    for path in sorted(tensorboard.rglob("*")) if tensorboard.is_dir() else ():
        if path.is_file():
            yield copy_file(path, directory / _TENSORBOARD / path.relative_to(tensorboard))


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def card_sections(result: LLMTrainResult) -> tuple[Section, ...]:
    """Return what the model card tells of a training."""
    sections = [
        _training_section(result),
        _data_section(result.data) if result.data else None,
        held_out_section(result),
        samples_section(result.samples),
        hyper_section(result.hyperparameters, lambda name: _has_effect(name, result)),
    ]
    return tuple(section for section in sections if section is not None)


def _training_section(result: LLMTrainResult) -> Section:
    seen = f", {result.tokens:,} tokens" if result.tokens else ""
    how = "all weights" if result.adapter == "full" else result.adapter
    text = [
        f"{result.method} with {how}: {result.steps:,} steps, {result.epochs:.2f} epochs{seen}.",
        f"{result.trainable or 0:,} parameters were trained (the base has {result.parameters or 0:,}), by "
        f"{result.backend} ({result.backend_reason}) on {result.workers} x {result.device}, in {result.precision}.",
    ]
    if result.merge_error is not None:
        what = "logits" if result.merge_agreement is not None else "scores"
        text.append(
            f"Base and adapter were added in float32. Their {what} and those of base with adapter differ by at most "
            f"{result.merge_error:.1e} before the sum is rounded"
            + (
                f"; after it {result.merge_agreement:.1%} of the most likely tokens are the same "
                f"(KL {result.merge_kl or 0:.1e} nats)."
                if result.merge_agreement is not None
                else "."
            )
        )
    if result.peak_bytes:
        text.append(f"A worker needed up to {format_bytes(max(result.peak_bytes))}.")
    return Section(title="Training", text=tuple(text), notes=result.notes)


def _data_section(data: DataSummary) -> Section:
    notes = [f"{skipped.count:,} rows were left out: {skipped.reason}." for skipped in data.skipped]
    if data.duplicates:
        notes.append(f"{data.duplicates:,} rows occur more than once.")
    if data.truncated:
        notes.append(f"{data.truncated:,} rows were longer than `max_length`, and were cut.")
    loss = f", {data.loss_tokens:,} of them with a loss" if data.loss_tokens is not None else ""
    columns = ", ".join(f"{role} from {column}" for role, column in data.fields.items())
    return Section(
        title="Data",
        text=(
            f"{data.train:,} rows to train on and {data.held_out:,} held out, of {shown_reference(data.dataset)} "
            f"({data.format}: {columns}).",
            f"An epoch is {data.tokens:,} tokens{loss}; SHA-256 of the rows {data.sha256[:16]}…",
        ),
        notes=tuple(notes),
    )


def shown(result: LLMTrainResult) -> LLMTrainResult:
    """Return a result without the directories of this machine: reports are made to be published."""
    data = result.data
    if data is not None:
        other = data.eval_dataset
        data = data.model_copy(
            update={
                "dataset": shown_reference(data.dataset),
                "eval_dataset": shown_reference(other) if other else None,
            }
        )
    return result.model_copy(update={"base_model": shown_reference(result.base_model), "data": data})


def held_out_section(result: LLMTrainResult) -> Section | None:
    """Return the table of figures before and after; None where nothing was measured."""
    if not result.held_out:
        return None
    rows = tuple(
        (
            _METRICS[found.before.metric],
            plus_minus(found.before),
            plus_minus(found.after),
            _signed(found.delta, found.standard_error),
            "" if found.z is None else f"{found.z:+.1f}",
            found.verdict,
        )
        for found in result.held_out
    )
    return Section(
        title="Before and after",
        text=(
            verdict_sentence(result.held_out),
            f"{result.held_out[0].before.items} held-out rows; ± is the standard error over rows, the change is that "
            "of the mean per row (of perplexity: nats per token), row by row.",
        ),
        table=Table(header=("figure", "before", "after", "change", "z", "verdict"), rows=rows),
    )


def verdict_sentence(found: Sequence[Comparison]) -> str:
    """Return in one sentence what the training was worth, for the figure that the method is about."""
    first = found[0]
    name = _METRICS[first.before.metric]
    change = f"{name} {plus_minus(first.before)} before, {plus_minus(first.after)} after"
    if first.verdict == "improved":
        return f"On rows that it was not trained on it is better than the base: {change}."
    if first.verdict == "worse":
        return f"On rows that it was not trained on it is WORSE than the base: {change}."
    return f"On rows that it was not trained on it cannot be told from the base: {change}."


def plus_minus(figure: HeldOut) -> str:
    """Return `5.120 ± 0.21`."""
    if figure.value is None:
        return "not finite"
    sign = "-" if figure.value < 0 else ""
    error = "" if figure.standard_error is None else f" ± {significant(figure.standard_error, 2)}"
    return f"{sign}{significant(abs(figure.value), 4)}{error}"


def _signed(delta: float | None, error: float | None) -> str:
    if delta is None:
        return "not finite"
    return f"{delta:+.3g}" + ("" if error is None else f" ± {error:.1g}")


def all_hyperparameters(hyper: Hyperparameters, adapter: AdapterSettings) -> dict[str, Any]:
    """Return everything that was chosen for a training, under the names that a request calls it by."""
    settings = adapter.model_dump(mode="json", exclude={"kind"})
    named = {_ADAPTER_NAMES.get(name, name): value for name, value in settings.items()}
    return named | hyper.model_dump(mode="json")


def _has_effect(name: str, result: LLMTrainResult) -> bool:
    """Tell whether a hyper-parameter does anything in a training of this kind."""
    low_rank, online = result.adapter in LOW_RANK, result.method in ONLINE_METHODS
    only = {
        "packing": result.method in ("sft", "pretrain"),
        "label_smoothing": result.method == "dpo",
        "desirable_weight": result.method == "kto",
        "undesirable_weight": result.method == "kto",
        "max_prompt_length": online,
        "max_completion_length": online,
        "num_generations": online,
        "temperature": online,
        "num_train_epochs": result.hyperparameters.get("max_steps") is None,
        "per_device_eval_batch_size": not online,
        "eval_steps": not online,
        "modules_to_save": low_rank,
        "rslora": low_rank,
        "target_modules": low_rank,
        "virtual_tokens": result.adapter in ("prompt_tuning", "prefix_tuning"),
    }
    return only.get(name, low_rank if name.startswith("lora_") else True)


def hyper_section(given: Mapping[str, Any], has_effect: Callable[[str], bool]) -> Section | None:
    """Return the table of the hyper-parameters that do something; None of a result without any."""
    rows = tuple(
        (name, _value(value))
        for name, value in given.items()
        if value not in (None, [], ()) and has_effect(name)
    )
    return (
        Section(title="Hyper-parameters", table=Table(header=("name", "value"), rows=rows)) if rows else None
    )


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value[:_SHOWN_NAMES])) + (" …" if len(value) > _SHOWN_NAMES else "")
    return f"{value:g}" if isinstance(value, float) else str(value)
