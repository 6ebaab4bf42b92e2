"""The texts of a request: what each expert's domain is, how much of it there is to learn from and to measure on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aidocks.errors import InvalidSpec
from aidocks.evaluate.texts import (
    COMMON,
    Domain,
    TextSource,
    count_chunks,
    require_chunks,
    require_context,
    resolve_text,
)
from aidocks.moe.examples import Examples
from aidocks.specs.moe import LEARNED_MODES, ExpertSpec, MoESpec

#: A domain with fewer chunks than this on its held-out half is not measured: an error of one chunk says nothing.
_FEWEST_CHUNKS = 2
#: Chunks of training text that are counted, at most, for every step.
_CHUNKS_PER_STEP = 2


@dataclass(frozen=True)
class Texts:
    """The texts of a request, resolved.

    Attributes:
        examples: What the router learns from, for every expert; empty where the gate mode does not learn.
        domains: What is measured on; every expert's text that is long enough, and the common one last.
        notes: What to tell people about texts that are too short.
    """

    examples: tuple[Examples, ...]
    domains: tuple[Domain, ...]
    notes: tuple[str, ...]


def resolve_texts(spec: MoESpec, base: Path | None, context: int | None, roots: Sequence[Path]) -> Texts:
    """Find all texts of a request.

    Args:
        spec: The request.
        base: Checkpoint directory of the base, whose tokenizer counts; None while it is not at hand: then only the
            files are checked.
        context: Longest input of the base, in tokens.
        roots: Directories below which a request may name a file.

    Raises:
        InvalidSpec: Naming the field, for a missing or empty file, a text that is too short to learn from, too few
            chunks of the common text, or chunks longer than the context.
        PathNotAllowed: For a file outside the roots.
    """
    sources = [_source(expert, f"experts[{i}]", roots) for i, expert in enumerate(spec.experts)]
    common = resolve_text(spec.text, roots)
    if base is None:
        return Texts((), (), ())
    if context is not None:
        require_context(spec.base_model, context, spec.seqlen)
    if spec.evaluate:
        require_chunks(base, common, "held_out", spec.chunks, spec.seqlen, spec.seed)
    counts = _counter(base, spec)
    domains, notes = _domains(spec, sources, counts)
    examples: tuple[Examples, ...] = ()
    if spec.gate_mode in LEARNED_MODES:
        examples = tuple(
            _examples(expert, source, f"experts[{i}]", counts)
            for i, (expert, source) in enumerate(zip(spec.experts, sources, strict=True))
        )
    common_domain = Domain(name=COMMON, text=common, chunks=spec.chunks)
    return Texts(examples, (*domains, common_domain), notes)


#: Text -> whole chunks on its search half, and on its held-out half.
_Counter = Callable[[TextSource], tuple[int, int]]


def _counter(base: Path, spec: MoESpec) -> _Counter:
    steps = spec.gate_steps * _CHUNKS_PER_STEP if spec.gate_mode == "trained" else 0
    enough = max(2 * -(-spec.fit_tokens // spec.seqlen), spec.chunks, steps)
    known: dict[TextSource, tuple[int, int]] = {}

    def count(text: TextSource) -> tuple[int, int]:
        if text not in known:
            halves = count_chunks(base, text, spec.seqlen, at_most=enough)
            # A tokenizer that only transformers can read: what is asked for is taken to be there.
            known[text] = (enough, spec.chunks) if halves is None else (halves.search, halves.held_out)
        return known[text]

    return count


def _source(expert: ExpertSpec, field: str, roots: Sequence[Path]) -> TextSource | None:
    """Return an expert's file and texts as one source; None where it has neither."""
    file = None if expert.dataset is None else resolve_text(expert.dataset, roots, field=f"{field}.dataset")
    if not expert.positive_texts:
        return file
    if file is None:
        # Of one name for all experts, so that equal texts are one text.
        return TextSource(name="texts of the request", records=expert.positive_texts)
    return file.model_copy(update={"records": expert.positive_texts})


def _domains(
    spec: MoESpec, sources: Sequence[TextSource | None], counts: _Counter
) -> tuple[tuple[Domain, ...], tuple[str, ...]]:
    domains: dict[TextSource, Domain] = {}
    notes = []
    for number, source in enumerate(sources):
        # Experts that share a text share a domain, which has the first one's name.
        if source is None or source in domains or not spec.evaluate:
            continue
        chunks = min(spec.chunks, counts(source)[1])
        if chunks < _FEWEST_CHUNKS:
            notes.append(
                f"The texts of experts[{number}] hold fewer than {_FEWEST_CHUNKS} chunks of {spec.seqlen} tokens to "
                "measure on; its domain is not measured."
            )
        else:
            domains[source] = Domain(name=f"experts[{number}]", text=source, chunks=chunks)
    return tuple(domains.values()), tuple(notes)


def _examples(expert: ExpertSpec, source: TextSource | None, field: str, counts: _Counter) -> Examples:
    chunks = 0 if source is None else counts(source)[0]
    # Texts shorter than a chunk are prompts by another name.
    prompts = expert.positive_prompts if chunks else (*expert.positive_prompts, *expert.positive_texts)
    if not chunks and not prompts:
        raise InvalidSpec(
            f"The example texts of {field} hold less than one chunk to learn from.",
            field=f"{field}.dataset",
            value=expert.dataset,
            hint="Give more text, or shorter chunks (`seqlen`).",
        )
    return Examples(prompts=prompts, text=source if chunks else None, chunks=chunks)
