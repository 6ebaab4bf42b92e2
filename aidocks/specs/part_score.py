"""Two states of a model beside one another, on one part of one objective's data."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from aidocks.specs.objective import Metric

#: Parts of the data that a result is measured on: what chose it, what had to confirm it, what had no part in it.
ScoredPart = Literal["search", "held_out", "report"]


class PartScore(BaseModel):
    """Two states of a model on the same items of one part of one data set; None stands for what is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    metric: Metric
    data: str = Field(description="The data, as people call them.")
    part: ScoredPart
    before: float | None = Field(
        description="Of what the result has to beat, in the metric's own unit: perplexity; accuracy from 0 to 1; mean "
        "log-likelihood or mean margin in nats."
    )
    before_standard_error: float | None
    after: float | None = Field(description="Of the result.")
    after_standard_error: float | None
    delta: float | None = Field(
        description="Mean change of the loss per item; negative is better. Nats per token for a perplexity, the share "
        "of wrong answers for an accuracy, nats for the others."
    )
    delta_standard_error: float | None = Field(description="Paired standard error of the change.")
    z: float | None = Field(description="delta / its standard error; None when nothing changed.")
    items: int = Field(description="Chunks, questions or pairs.")
    tokens: int = Field(description="Tokens that were predicted.")

    @property
    def label(self) -> str:
        """Such as `perplexity on prose`."""
        return f"{self.metric.replace('_', '-')} on {self.data}"

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower value is the better one; a lower loss always is."""
        return self.metric == "perplexity"
