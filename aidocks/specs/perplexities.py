"""What models that compete were measured to be worth: perplexities on the same chunks of the same texts."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class DomainPerplexity(BaseModel):
    """Perplexity of one model on the chunks of one text; all models see the same chunks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    domain: str = Field(
        description="The text: its name; for `/byo-moe` `experts[i]` for that expert's example texts, `text` for the "
        "common text."
    )
    perplexity: float | None = Field(description="None when the loss is not finite.")
    standard_error: float | None = Field(description="Standard error of the perplexity over chunks.")
    tokens: int = Field(description="Tokens that were predicted.")


class ModelPerplexity(BaseModel):
    """What one model was measured to be worth."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str = Field(
        description="`base`, the request's field (`experts[i]`, `models[i]`), `average` (of all their weights), or the "
        "result: `moe`, `merge`."
    )
    reference: str = Field(
        description="The model reference of the request; the result's registry name for the result."
    )
    domains: tuple[DomainPerplexity, ...]
