"""The unit that prepares the data of a training: reads, converts, measures in tokens, splits, and writes JSONL."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import OutputFile
from aidocks.errors import InvalidSpec
from aidocks.plan import Unit, UnitContext
from aidocks.specs.train_data import DataFormat, DataSummary, LengthSummary, held_out_count
from aidocks.training.data.convert import group_of
from aidocks.training.data.examples import Examples, Numbered
from aidocks.training.data.formats import describe_layout
from aidocks.training.data.measure import Measured
from aidocks.training.data.rows import DataSource, describe_skipped
from aidocks.training.data.rows_file import RowsFile, rows_file
from aidocks.training.data.split import choose_held_out
from aidocks.training.run import LossOn, Method, Rows

TRAIN_FILE, HELD_OUT_FILE = "train.jsonl", "held_out.jsonl"


class Prepared(BaseModel):
    """The data of a training.

    Attributes:
        sentence: What was found and made of it, for people.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: Rows
    held_out: Rows | None
    summary: DataSummary
    sentence: str
    files: tuple[OutputFile, ...]


class PrepareData(Unit[Prepared]):
    """Prepares the data of a training. See the top of this module."""

    result_type: ClassVar[type[BaseModel]] = Prepared

    dataset: DataSource
    eval_dataset: DataSource | None = None
    method: Method
    format: DataFormat = "auto"
    fields: dict[str, str] = Field(
        default_factory=dict, description="Role, or name by which a reward calls it -> column."
    )
    loss_on: LossOn = "completion"
    spoken: bool = Field(
        False, description="Whether the chat template writes plain prompts and answers, too."
    )
    eval_split: float | int | None = Field(None, description="As in the request.")
    seed: int = 0
    max_length: int = Field(ge=1, description="Tokens of an example; of an online method, of its prompt.")
    tokenizer: Path = Field(
        description="Directory of the tokenizer that is trained with, chat template included."
    )
    directory: Path = Field(description="Where the files are written.")

    @property
    def label(self) -> str:
        return self.dataset.name

    def outputs(self, result: Prepared) -> Sequence[OutputFile]:
        return result.files

    def run(self, context: UnitContext) -> Prepared:
        return _Preparation(self).run()


class _Preparation:
    """One run of the unit."""

    def __init__(self, unit: PrepareData) -> None:
        from transformers import AutoTokenizer

        self._unit = unit
        self._tokenizer: Any = AutoTokenizer.from_pretrained(unit.tokenizer, local_files_only=True)
        template = self._tokenizer.chat_template
        self._template: str | None = template.get("default") if isinstance(template, dict) else template
        self._examples = self._open(unit.dataset, "dataset")
        self._measured = self._measure()

    def run(self) -> Prepared:
        unit = self._unit
        other: Examples | None = None
        with (
            rows_file(unit.directory / TRAIN_FILE) as train,
            rows_file(unit.directory / HELD_OUT_FILE) as held_out,
        ):
            if unit.eval_dataset is None:
                chosen = self._divide(train, held_out)
            else:
                other = self._open(unit.eval_dataset, "eval_dataset")
                chosen = self._separate(other, train, held_out)
            self._require_rows(train, held_out)
            rows, file = train.publish()
            files, measured_on = [file], None
            if held_out.count:
                measured_on, file = held_out.publish()
                files.append(file)
        return self._result(rows, measured_on, files, chosen, other)

    def _open(self, source: DataSource, field: str) -> Examples:
        unit = self._unit
        return Examples(
            source,
            unit.method,
            fields=unit.fields,
            format=unit.format,
            loss_on=unit.loss_on,
            template=self._template,
            spoken=unit.spoken,
            field=field,
        )

    def _measure(self) -> Measured:
        unit = self._unit
        return Measured(self._tokenizer, unit.method, unit.loss_on, unit.max_length)

    def _divide(self, train: RowsFile, held_out: RowsFile) -> array[int]:
        """Write both files from one data set; return for each of its usable rows whether it is held out."""
        groups = array("Q")
        with rows_file(self._unit.directory / "all.jsonl") as everything:
            for row in self._usable(self._examples, self._measured):
                groups.append(group_of(row.example))
                everything.write(row.line)
            self._measured.require_something_left()
            wanted = held_out_count(len(groups), self._unit.eval_split)
            held = choose_held_out(groups, wanted, self._unit.seed)
            chosen = array("B", (group in held for group in groups))
            for number, line in enumerate(everything.lines()):
                (held_out if chosen[number] else train).write(line)
        return chosen

    def _separate(self, other: Examples, train: RowsFile, held_out: RowsFile) -> array[int]:
        """Write both files from two data sets; rows whose prompt is measured on are not trained on."""
        if other.conversational != self._examples.conversational:
            raise InvalidSpec(
                "One of the data sets has conversations, the other one texts.",
                field="eval_dataset",
                value=self._unit.eval_dataset.name if self._unit.eval_dataset else None,
                hint="Give both in one form.",
            )
        asked: set[int] = set()
        shape: tuple[str, ...] | None = None
        measured = self._measure()
        for row in self._usable(other, measured):
            asked.add(group_of(row.example))
            shape = shape or tuple(sorted(row.example))
            held_out.write(row.line)
        measured.require_something_left()
        chosen = array("B")
        for row in self._usable(self._examples, self._measured):
            leaked = group_of(row.example) in asked
            if leaked:
                self._examples.faults.leave_out(row.number, "its prompt is in eval_dataset, too")
            else:
                _require_shape(shape, tuple(sorted(row.example)))
                train.write(row.line)
            chosen.append(leaked)
        self._measured.require_something_left()
        return chosen

    def _usable(self, examples: Examples, measured: Measured) -> Iterator[Numbered]:
        """Yield the rows that the tokenizer can write and of which something is left after cutting."""
        for row in examples.read():
            if measured.keep(row, examples.faults):
                yield row

    def _require_rows(self, train: RowsFile, held_out: RowsFile) -> None:
        if train.count == 0:
            raise InvalidSpec(
                f"No row of {self._unit.dataset.name} is left to train on ({held_out.count} are held out).",
                field="dataset",
                value=self._unit.dataset.name,
                hint=describe_skipped(self._examples.skipped, self._examples.place)
                or "All rows have the same prompt, or there is only one.",
            )

    def _result(
        self,
        train: Rows,
        held_out: Rows | None,
        files: Sequence[OutputFile],
        chosen: array[int],
        other: Examples | None,
    ) -> Prepared:
        unit, layout = self._unit, self._examples.layout
        totals = self._measured.totals(chosen)
        of_other = [
            one.model_copy(update={"reason": f"in eval_dataset, {one.reason}"})
            for one in (other.skipped if other else ())
        ]
        skipped = (*self._examples.skipped, *of_other)
        summary = DataSummary(
            dataset=unit.dataset.name,
            format=layout.format,
            detected=layout.detected,
            fields={**layout.fields, **layout.kept},
            unused=layout.unused,
            rows=self._examples.rows,
            train=train.count,
            held_out=held_out.count if held_out else 0,
            eval_dataset=unit.eval_dataset.name if unit.eval_dataset else None,
            skipped=skipped,
            duplicates=self._measured.duplicates,
            tokens=totals.tokens,
            loss_tokens=totals.loss_tokens,
            truncated=totals.truncated,
            lengths=LengthSummary(median=totals.median, p95=totals.p95, longest=totals.longest),
            sha256=train.sha256,
            revision=unit.dataset.revision,
        )
        return Prepared(
            train=train,
            held_out=held_out,
            summary=summary,
            sentence=self._sentence(summary),
            files=tuple(files),
        )

    def _sentence(self, summary: DataSummary) -> str:
        """Say what was found: the job's first event."""
        parts = [describe_layout(self._examples.layout, summary.rows)]
        parts.append(f" ({summary.train} to train on, {summary.held_out} held out)")
        if self._examples.conversational:
            parts.append(", written as messages by the chat template")
        elif self._examples.layout.format == "alpaca":
            parts.append(", written in Alpaca's published layout, for the tokenizer has no chat template")
        else:
            parts.append(", as plain text")
            if self._template is not None and self._examples.layout.format != "text":
                parts.append(" without the chat template (chat_template: auto has it written by that)")
        about = "about " if self._measured.is_sample else ""
        parts.append(f"; {about}{summary.tokens:,} tokens, {summary.lengths.median} in the median row")
        if summary.truncated:
            parts.append(f"; {about}{summary.truncated} rows are cut at {self._unit.max_length} tokens")
        parts.append(".")
        if summary.skipped:
            parts.append(f" Left out: {describe_skipped(summary.skipped, self._examples.place)}")
        return "".join(parts)


def _require_shape(one: tuple[str, ...] | None, other: tuple[str, ...]) -> None:
    if one is not None and one != other:
        raise InvalidSpec(
            f"The rows of eval_dataset become {', '.join(one)}, those of dataset {', '.join(other)}.",
            field="eval_dataset",
            hint="Give both in one form.",
        )
