"""What is told of the training of what finds texts: sentences, the sections of the model card, the report's files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from aidocks.checkpoints.space import format_bytes
from aidocks.evaluate.comparison import shown as shown_reference
from aidocks.models.manifest import Section, Table
from aidocks.plan import UnitContext, WritingUnit, WrittenFiles
from aidocks.retrieval.hyper import CONTRASTING
from aidocks.specs.train_llm_result import Verdict
from aidocks.specs.train_retrieval_result import (
    Domain,
    FoundExample,
    Metric,
    RankingData,
    RetrieverTrainResult,
)
from aidocks.training.report import CURVES, hyper_section, write_report
from aidocks.training.retriever import IN_BATCH_LOSSES
from aidocks.training.run import History

FIGURES = "report/figures.png"
EXAMPLES_FILE = "examples.json"
#: Losses that are logarithms of probabilities.
_IN_NATS = ("mnrl", "cached_mnrl", "distill_kl", "bce", "listnet", "listmle", "plistmle", "ranknet")
_METRICS: dict[Metric, str] = {
    "ndcg@10": "nDCG@10",
    "mrr@10": "MRR@10",
    "map@100": "MAP@100",
    "recall@1": "recall@1",
    "recall@10": "recall@10",
    "recall@100": "recall@100",
    "spearman": "Spearman's ρ",
}
#: Characters of a text of an example that the card shows.
_SHOWN = 160

_PartT = TypeVar("_PartT", RankingData, Domain, FoundExample)


class WriteRetrievalReport(WritingUnit):
    """The report beside the weights: result, curves, figures, examples, and the files of TensorBoard."""

    directory: Path = Field(description="Directory in which the result is staged.")
    result: RetrieverTrainResult
    history: History
    tensorboard: Path = Field(description="Directory of the TensorBoard files.")

    @property
    def label(self) -> str:
        return "report"

    @property
    def computes(self) -> bool:
        return False

    def run(self, context: UnitContext) -> WrittenFiles:
        from aidocks.retrieval.figures import draw_figures
        from aidocks.training.figures import draw_curves

        result = self.result
        examples = [one.model_dump(mode="json") for one in result.examples]
        told = {EXAMPLES_FILE: {"examples": examples}} if examples else {}
        pictures = {
            CURVES: draw_curves(
                result.loss, self.history.points, "loss, nats" if result.loss in _IN_NATS else "loss"
            ),
            FIGURES: draw_figures(result.domains),
        }
        files = write_report(self.directory, result, self.history, told, pictures, self.tensorboard)
        return WrittenFiles(files=tuple(files))


def called(metric: Metric) -> str:
    """Return what people call a figure."""
    return _METRICS[metric]


def verdict_of(domains: Sequence[Domain]) -> Verdict | None:
    """Return what the training was worth on the data sets that it learnt from; None where none was measured.

    The first figure of each counts: one that is worse makes it worse, and else one that is better makes it better.
    """
    found = {one.figures[0].verdict for one in domains if one.trained and one.figures}
    if not found:
        return None
    order: tuple[Verdict, ...] = ("worse", "improved", "not distinguishable")
    return next(verdict for verdict in order if verdict in found)


def domain_sentence(domain: Domain) -> str | None:
    """Return in one sentence what the training was worth on one data set; None without figures."""
    if not domain.figures:
        return None
    figure = domain.figures[0]
    what = "pairs" if domain.rows == "scored" else "queries"
    name = shown_reference(domain.dataset)
    where = f"On held-out {what} of {name}" if domain.trained else f"On {name}, of which it has seen nothing,"
    change = (
        f"{_METRICS[figure.metric]} {figure.before:.4f} before, {figure.after:.4f} after "
        f"({figure.delta:+.4f}, 95 % interval {figure.low:+.4f} to {figure.high:+.4f})"
    )
    if figure.verdict == "improved":
        return f"{where} it is better than the base: {change}."
    if figure.verdict == "worse":
        return f"{where} it is WORSE than the base: {change}."
    return f"{where} it cannot be told from the base: {change}."


def worth_notes(domains: Sequence[Domain], *, has_trained: bool) -> tuple[str, ...]:
    """Return what must be said aloud: that nothing was improved, or was made worse, or is not known.

    Args:
        domains: What was measured.
        has_trained: Whether queries of the data that it learnt from are held out.
    """
    notes = []
    verdict = verdict_of(domains)
    if verdict is None and domains and not has_trained:
        notes.append(
            "No queries of the data that it learnt from are held out: the tables are of other data alone."
        )
    if verdict in ("worse", "not distinguishable"):
        notes.append("The training did NOT improve the model, as far as the held-out queries tell.")
    for one in domains:
        told = domain_sentence(one)
        if told is not None and one.figures[0].verdict != "improved" and (one.trained or _is_worse(one)):
            notes.append(told)
    return tuple(notes)


def _is_worse(domain: Domain) -> bool:
    return domain.figures[0].verdict == "worse"


def shown(result: RetrieverTrainResult) -> RetrieverTrainResult:
    """Return a result without the directories of this machine: reports are made to be published."""
    return result.model_copy(
        update={
            "base_model": shown_reference(result.base_model),
            "data": _shown(result.data),
            "domains": _shown(result.domains),
            "examples": _shown(result.examples),
        }
    )


def _shown(parts: Iterable[_PartT]) -> tuple[_PartT, ...]:
    return tuple(one.model_copy(update={"dataset": shown_reference(one.dataset)}) for one in parts)


def card_sections(result: RetrieverTrainResult) -> tuple[Section, ...]:
    """Return what the model card tells of a training."""
    sections = [
        _training_section(result),
        *(_data_section(one) for one in result.data),
        *(_domain_section(one) for one in result.domains if one.figures),
        _examples_section(result.examples),
        hyper_section(result.hyperparameters, lambda name: has_effect(name, result)),
    ]
    return tuple(section for section in sections if section is not None)


def _training_section(result: RetrieverTrainResult) -> Section:
    seen = f", {result.tokens:,} tokens" if result.tokens else ""
    how = "all weights" if result.adapter == "full" else result.adapter
    kind = "embedding model" if result.kind == "embedding" else "reranker"
    text = [
        f"A fine-tuned {kind}: {result.loss} with {how}, {result.steps:,} steps, {result.epochs:.2f} epochs{seen}.",
        f"{result.trainable:,} parameters were trained (the base has {result.parameters:,}), by sentence-transformers "
        f"on {result.workers} x {result.device}, in {result.precision}.",
        _use(result),
    ]
    if result.mined is not None:
        text.append(f"{result.mined:,} hard negatives were found before the training.")
    if result.reload_error is not None:
        what = "value of a vector" if result.kind == "embedding" else "score"
        text.append(
            f"Loaded again from its files, a {what} differs by at most {result.reload_error:.1e} from the model at the "
            "end of the training."
        )
    if result.peak_bytes:
        text.append(f"A worker needed up to {format_bytes(max(result.peak_bytes))}.")
    if result.licence:
        text.append(f"Licence of the base, as its card says: {result.licence}.")
    return Section(title="Training", text=tuple(text), notes=result.notes)


def _use(result: RetrieverTrainResult) -> str:
    prompts = result.prompts
    before = [f"{prompts.query!r} before a query"] if prompts.query else []
    before += [f"{prompts.passage!r} before a passage"] if prompts.passage else []
    told = f"; put {' and '.join(before)}" if before else ""
    reads = f"It reads {result.max_length:,} tokens"
    if result.kind == "reranker":
        return f"{reads} of query and passage together{told}."
    pooled = f" ({result.pooling} pooling)" if result.pooling else ""
    return f"Its vectors have {result.dimensions or 0:,} values{pooled}. {reads} of a text{told}."


def _data_section(data: RankingData) -> Section:
    notes = [f"{skipped.count:,} rows were left out: {skipped.reason}." for skipped in data.skipped]
    if data.duplicates:
        notes.append(f"{data.duplicates:,} rows occur more than once.")
    if data.leaked:
        notes.append(f"{data.leaked:,} rows were not trained on, because their query is measured on.")
    if data.shared_passages:
        notes.append(
            f"{data.shared_passages:,} held-out queries have a right passage that is also trained on."
        )
    what = "pairs" if data.rows == "scored" else "queries"
    columns = ", ".join(f"{role} from {column}" for role, column in data.fields.items())
    text = [
        f"{data.train:,} {what} to train on and {data.held_out:,} held out, of {shown_reference(data.dataset)} "
        f"({data.format}: {columns}).",
    ]
    if data.rows == "ranking":
        text.append(
            f"{data.positives:,} right passages and {data.negatives:,} wrong ones of the queries that are trained on; "
            f"{data.passages:,} passages in which held-out queries look."
        )
    if data.sha256:
        text.append(f"SHA-256 of the rows {data.sha256[:16]}…")
    return Section(title=f"Data: {shown_reference(data.dataset)}", text=tuple(text), notes=tuple(notes))


def _domain_section(domain: Domain) -> Section:
    """Return the table of one data set before and after."""
    alone = any(figure.retriever is not None for figure in domain.figures)
    rows = tuple(
        (
            _METRICS[figure.metric],
            *([_plain(figure.retriever)] if alone else []),
            _with_interval(figure.before, figure.before_low, figure.before_high),
            _with_interval(figure.after, figure.after_low, figure.after_high),
            f"{figure.delta:+.4f}",
            f"{figure.low:+.4f} to {figure.high:+.4f}",
            figure.verdict,
        )
        for figure in domain.figures
    )
    header = (
        "figure",
        *(["retriever alone"] if alone else []),
        "before",
        "after",
        "change",
        "95 %",
        "verdict",
    )
    if domain.rows == "scored":
        measured = f"{domain.queries:,} held-out pairs"
    else:
        measured = f"{domain.queries:,} held-out queries, {domain.passages:,} passages"
    return Section(
        title=f"Before and after: {shown_reference(domain.dataset)}",
        text=(
            domain_sentence(domain) or "",
            f"{measured}. In brackets 95 % intervals by bootstrap over them; those of the change are paired.",
        ),
        table=Table(header=header, rows=rows),
    )


def _with_interval(value: float, low: float, high: float) -> str:
    return f"{value:.4f} [{low:.4f}, {high:.4f}]"


def _plain(value: float | None) -> str:
    return "none" if value is None else f"{value:.4f}"


def _examples_section(examples: Sequence[FoundExample]) -> Section | None:
    if not examples:
        return None
    rows = tuple(
        (
            _cut(one.query),
            _cut(one.right),
            _rank(one.rank_before),
            _rank(one.rank_after),
            _cut(one.first_after),
        )
        for one in examples
    )
    return Section(
        title="Examples",
        text=("Held-out queries: where each model puts a right passage, and what the result finds first.",),
        table=Table(header=("query", "right passage", "before", "after", "found first"), rows=rows),
    )


def _rank(rank: int | None) -> str:
    return "not found" if rank is None else str(rank)


def _cut(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]} …"


def has_effect(name: str, result: RetrieverTrainResult) -> bool:
    """Tell whether a hyper-parameter does anything in a training of this kind."""
    low_rank, in_batch = result.adapter != "full", result.loss in IN_BATCH_LOSSES
    embedding = result.kind == "embedding"
    only = {
        "negatives": any(one.rows == "ranking" for one in result.data),
        "temperature": embedding and result.loss in CONTRASTING,
        "margin": result.loss == "triplet",
        "chunk": result.loss == "cached_mnrl",
        "gather_negatives": embedding and in_batch and result.workers > 1,
        "matryoshka": embedding,
        "num_train_epochs": result.hyperparameters.get("max_steps") is None,
        "rslora": low_rank,
        "target_modules": low_rank,
        "modules_to_save": low_rank,
        "virtual_tokens": False,
        "layers": False,
    }
    return only.get(name, low_rank if name.startswith("lora_") else True)
