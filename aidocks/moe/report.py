"""What was measured of an MoE, in numbers and words: shares, tables, warnings, and the files of the report."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from aidocks.checkpoints.files import write_bytes, write_text
from aidocks.evaluate.comparison import (
    MOST_COLUMNS,
    perplexity_section,
    plus_minus,
    ranges,
    shown,
)
from aidocks.models.manifest import Section, Table
from aidocks.moe.check import Routing
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.specs.moe_result import (
    ExpertShare,
    GateTraining,
    MoEResult,
)
from aidocks.specs.perplexities import ModelPerplexity

#: Rows whose condition number is above this hardly tell experts apart.
WORST_CONDITION = 5.0
#: An expert is dead that supplies less than this part of an even share of the mixture on every text.
LEAST_PART = 0.1
#: Perplexities that differ by less than this part are called equal: copies of one model differ by rounding.
_EQUAL = 1e-3


class TrainingPoint(BaseModel):
    """One point of the training curve of the gates.

    Attributes:
        step: Steps that were done.
        losses: Domain -> loss in nats per token.
        aux_loss: Load-balancing loss, mean over layers; ``experts_per_token`` is even.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    step: int
    losses: dict[str, float]
    aux_loss: float

    @property
    def mean_loss(self) -> float:
        """Mean over domains."""
        return fmean(self.losses.values())


def own_expert(name: str) -> int | None:
    """Return i of ``experts[i]``, which names an expert and the domain of its example texts; else None."""
    match = re.fullmatch(r"experts\[(\d+)\]", name)
    return int(match[1]) if match else None


def text_title(domain: str) -> str:
    """Return what people call a domain: `expert 0's text`, `common text`."""
    number = own_expert(domain)
    if number is not None:
        return f"expert {number}'s text"
    return "common text" if domain == "text" else domain


def expert_shares(routing: Routing, references: Sequence[str]) -> tuple[ExpertShare, ...]:
    """Summarise the routing expert by expert.

    An expert is *dead* when on no text, its own included, it supplies a tenth of an even share of the mixture:
    relative to the even share because with many experts all shares are small; of the mixture rather than of the
    choices because with k choices a token some expert comes second everywhere, with a weight of nothing.

    Args:
        routing: What :class:`aidocks.moe.check.CheckMoE` found.
        references: Model references of the experts, in the order of the router's rows.
    """
    layers, experts = len(routing.load), len(references)
    preferred = [max(range(experts), key=lambda i: (row[i], -i)) for row in routing.weight]
    shares = []
    for number, reference in enumerate(references):
        domains = {part.domain: part.weight[number] for part in routing.domains}
        shares.append(
            ExpertShare(
                source_model=reference,
                load=sum(row[number] for row in routing.load) / layers,
                weight=sum(row[number] for row in routing.weight) / layers,
                domains=domains,
                preferred_layers=tuple(layer for layer, best in enumerate(preferred) if best == number),
                idle_layers=sum(row[number] == 0 for row in routing.load),
                dead=max(domains.values()) < LEAST_PART / experts,
            )
        )
    return tuple(shares)


def find_warnings(
    shares: Sequence[ExpertShare],
    perplexities: Sequence[ModelPerplexity],
    conditions: Sequence[float | None] = (),
) -> tuple[str, ...]:
    """Return what one should know before using the MoE.

    Args:
        shares: From :func:`expert_shares`.
        perplexities: From :func:`model_perplexities`; may be empty.
        conditions: Condition number of each layer's router rows; empty for gates whose rows are centred, as those
            of a classifier are: these are dependent by construction, and tell experts apart all the same.
    """
    found = [*_warn_of_losses(perplexities), *_warn_of_dead(shares)]
    parallel = warn_of_parallel_rows(conditions)
    return (*found, parallel) if parallel else tuple(found)


def warn_of_parallel_rows(conditions: Sequence[float | None]) -> str | None:
    """Return what to tell people when the router rows are nearly parallel in some layers."""
    bad = [number for number in conditions if number is None or number > WORST_CONDITION]
    if not bad:
        return None
    worst = "infinite" if None in bad else f"{max(number for number in bad if number is not None):.1f}"
    return (
        f"The router rows of {len(bad)} of {len(conditions)} layers are nearly parallel (condition number up to "
        f"{worst}; above {WORST_CONDITION:g} the router hardly tells experts apart). More and more different "
        "prompts, and negative ones, help; so do the gate modes 'fitted' and 'trained'."
    )


def _warn_of_dead(shares: Sequence[ExpertShare]) -> list[str]:
    return [
        f"experts[{number}] ({shown(share.source_model)}) is dead: on no text does it supply more than "
        f"{max(share.domains.values()):.2%} of the mixture, where an even share is {1 / len(shares):.1%}. It costs "
        "memory and does nothing; other example texts, other gates, or a build without it help."
        for number, share in enumerate(shares)
        if share.dead
    ]


def _warn_of_losses(perplexities: Sequence[ModelPerplexity]) -> list[str]:
    by_name = {model.model: model for model in perplexities}
    if "moe" not in by_name:
        return []
    rivals = {"average": "the plain average of its experts", "base": "the base"}
    found = []
    for number, ours in enumerate(by_name["moe"].domains):
        if ours.perplexity is None:
            found.append(f"On {text_title(ours.domain)} the MoE's loss is not finite.")
            continue
        for name, title in rivals.items():
            theirs = by_name[name].domains[number] if name in by_name else None
            if (
                theirs
                and theirs.perplexity is not None
                and ours.perplexity > theirs.perplexity * (1 + _EQUAL)
            ):
                found.append(
                    f"On {text_title(ours.domain)} the MoE has a perplexity of {plus_minus(ours)}, worse than "
                    f"{title} with {plus_minus(theirs)}."
                )
    return found


def card_sections(result: MoEResult) -> tuple[Section, ...]:
    """Return what the model card tells: warnings, perplexities, and which expert serves what."""
    sections = []
    if result.warnings:
        sections.append(Section(title="Know before use", notes=result.warnings))
    if result.perplexities:
        sections.append(_perplexity_section(result))
    if result.experts:
        sections.append(_routing_section(result.experts))
    return tuple(sections)


def _perplexity_section(result: MoEResult) -> Section:
    models = result.perplexities
    return perplexity_section(
        models,
        [_model_title(model) for model in models],
        [text_title(part.domain) for part in models[0].domains],
        [_training_text(result.training)] if result.training else (),
    )


def _training_text(training: GateTraining) -> str:
    return (
        f"The gates were trained for {training.steps} steps on {training.tokens:,} tokens: loss "
        f"{training.loss_before:.4f} before and {training.loss_after:.4f} after, in nats per token on the "
        f"validation part; load-balancing loss {training.aux_loss_before:.3f} and {training.aux_loss_after:.3f}."
    )


def _model_title(model: ModelPerplexity) -> str:
    number = own_expert(model.model)
    if number is not None:
        return f"expert {number}: {shown(model.reference)}"
    titles = {"base": f"base: {shown(model.reference)}", "average": "plain average of the experts"}
    return titles.get(model.model, "this model")


def _routing_section(experts: Sequence[ExpertShare]) -> Section:
    domains = list(experts[0].domains)[:MOST_COLUMNS]
    rows = [
        (
            f"{number}: {shown(share.source_model)}" + (" (dead)" if share.dead else ""),
            f"{share.load:.1%}",
            f"{share.weight:.1%}",
            *(f"{share.domains[domain]:.1%}" for domain in domains),
            ranges(share.preferred_layers) or "none",
            str(share.idle_layers),
        )
        for number, share in enumerate(experts)
    ]
    strong = [
        (own, 3 + column) for column, domain in enumerate(domains) if (own := own_expert(domain)) is not None
    ]
    return Section(
        title="Routing",
        text=(
            "Shares are means over layers, of the experts' texts in equal parts and of each text; bold is what an "
            "expert supplies on its own text. A layer prefers the expert that supplies most of its mixture; in idle "
            "layers an expert serves no token.",
        ),
        table=Table(
            header=(
                "expert",
                "choices",
                "mixture",
                *(text_title(domain) for domain in domains),
                "preferred by layers",
                "idle layers",
            ),
            rows=tuple(rows),
            strong=tuple(strong),
        ),
    )


class DrawReport(WritingUnit):
    """``report/perplexity.png``, ``report/training.png`` where gates were trained, and ``report/report.json``."""

    directory: Path = Field(description="Directory in which the result is staged.")
    experts: tuple[ExpertShare, ...]
    perplexities: tuple[ModelPerplexity, ...]
    warnings: tuple[str, ...] = ()
    training: GateTraining | None = None
    curve: tuple[TrainingPoint, ...] = ()

    @property
    def label(self) -> str:
        return "report of what was measured"

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.evaluate.figures import draw_perplexities
        from aidocks.moe.figures import draw_training

        folder = self.directory / "report"
        folder.mkdir(parents=True, exist_ok=True)
        names = [shown(share.source_model) for share in self.experts]
        pictures = {}
        if self.perplexities:
            pictures["perplexity.png"] = draw_perplexities(
                self.perplexities,
                [_row_title(model.model, names) for model in self.perplexities],
                [text_title(part.domain) for part in self.perplexities[0].domains],
            )
        if self.curve:
            pictures["training.png"] = draw_training(self.curve)
        written = [write_bytes(folder / name, content) for name, content in pictures.items()]
        document = _without_paths(self.model_dump(mode="json", exclude={"directory"}))
        written.append(write_text(folder / "report.json", json.dumps(document, indent=1) + "\n"))
        return WrittenFiles(files=tuple(written))


def _row_title(model: str, names: Sequence[str]) -> str:
    number = own_expert(model)
    if number is None:
        return {"moe": "MoE", "average": "plain average"}.get(model, model)
    return f"{number}  {names[number]}"


def _without_paths(document: dict[str, Any]) -> dict[str, Any]:
    for share in document["experts"]:
        share["source_model"] = shown(share["source_model"])
    for model in document["perplexities"]:
        model["reference"] = shown(model["reference"])
    return document
