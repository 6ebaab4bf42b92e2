"""What decides whether a model got better: a metric and the data that it is measured on."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

Metric = Literal["perplexity", "accuracy", "log_likelihood", "preference"]
METRICS: tuple[Metric, ...] = ("perplexity", "accuracy", "log_likelihood", "preference")

#: Data that are shipped, by metric.
SHIPPED = {"perplexity": "prose", "accuracy": "capitals", "log_likelihood": "capitals"}


class Objective(BaseModel):
    """A metric on data; in short `metric:data`, such as `accuracy:facts.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    #: How people write it in one word, on a command line for instance.
    written_short: ClassVar[str] = "metric:data"

    metric: Metric = Field(
        description="`perplexity` of a text; `accuracy` or `log_likelihood` of the right answers of a set of "
        "questions; `preference`: log-probability of the chosen answer above that of the rejected one."
    )
    data: str = Field(
        min_length=1,
        max_length=4096,
        description="A shipped text (`prose`) or set of questions (`capitals`), or the path of a .txt or .jsonl "
        "file below an allowed root.",
    )

    def __str__(self) -> str:
        return f"{self.metric}:{self.data}"

    @model_validator(mode="before")
    @classmethod
    def _from_short(cls, given: Any) -> Any:
        """Read `metric:data`, or a metric alone where there are shipped data for it."""
        if not isinstance(given, str):
            return given
        metric, _, data = given.partition(":")
        if metric not in METRICS:
            raise ValueError(
                f"{given!r} does not begin with a metric; known: {', '.join(METRICS)}, as in 'perplexity:prose'"
            )
        if not data and metric not in SHIPPED:
            raise ValueError(f"{metric!r} needs data: write '{metric}:<path of a .jsonl file>'")
        return {"metric": metric, "data": data or SHIPPED[metric]}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        written = handler(schema)
        return {"anyOf": [written, {"type": "string", "description": f"In short: {cls.written_short}"}]}
