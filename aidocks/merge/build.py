"""The stages of a merge request: one merge after another, the last of which is measured and reported."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aidocks.checkpoints.dtypes import torch_name
from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.layout import CAUSAL_ENDINGS
from aidocks.checkpoints.space import require_space
from aidocks.checkpoints.writer import ShardPlan, TensorPlan, parse_size
from aidocks.errors import IncompatibleModels, InvalidSpec
from aidocks.evaluate.comparison import model_perplexities
from aidocks.evaluate.domains import DomainResults, MeasureDomains
from aidocks.evaluate.texts import Domain, require_chunks, require_context, resolve_text
from aidocks.merge.members import Member, open_members, text_config
from aidocks.merge.random import stage_seed
from aidocks.merge.report import WriteMergeReport, card_sections, parts_of
from aidocks.merge.shard import MergeShard, expected_memory
from aidocks.merge.target import Target, plan_target
from aidocks.merge.vocabulary import VocabularyPlan, plan_vocabulary
from aidocks.models.beside_weights import WriteBesideWeights
from aidocks.models.manifest import Parent
from aidocks.models.parents import describe_members, parent_units
from aidocks.models.publication import Staged
from aidocks.models.tokenizer_files import Tokenizer, TokenizerFiles, choose_chat_template, read_tokenizer
from aidocks.models.unchanged import require_unchanged
from aidocks.plan import Plan, PlanContext, Stage, WrittenFiles
from aidocks.specs.merge import MergeSpec
from aidocks.specs.merge_config import MergeConfig
from aidocks.specs.merge_result import MergeResult, MergeStep
from aidocks.specs.merge_settings import split_reference
from aidocks.specs.merge_yaml import to_public_yaml
from aidocks.specs.perplexities import ModelPerplexity

#: Room beside the weights: tokenizer, pictures.
_BESIDE_WEIGHTS_BYTES = 64 << 20
_OTHER_TOKENS = (
    "Perplexities are of each model's own tokens, which are not the same ones: compare them with care."
)


@dataclass(frozen=True)
class Step:
    """One merge of the request, planned.

    Attributes:
        name: As later merges call it; empty for the last.
        members: Its models by reference; the base, if any, first.
        directory: Where its result is written.
    """

    name: str
    merge: MergeConfig
    members: Mapping[str, Member]
    vocabulary: VocabularyPlan | None
    target: Target
    files: tuple[ShardPlan, ...]
    directory: Path

    @property
    def tokenizer(self) -> TokenizerFiles:
        """The files of the result's tokenizer."""
        return self.vocabulary.files if self.vocabulary else TokenizerFiles(source=self.target.tokenizer)

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know of the result."""
        return (*self.target.notes, *(self.vocabulary.notes if self.vocabulary else ()))

    @property
    def merged(self) -> tuple[Member, ...]:
        """Its models without those that are named for their tokens alone."""
        used = {operand.source for tensor in self.target.tensors for operand in tensor.operands}
        return tuple(member for number, member in enumerate(self.members.values()) if number in used)

    @property
    def moves_tokens(self) -> bool:
        """Whether rows of the vocabulary move, so that the models do not agree on what a token's number is."""
        return self.vocabulary is not None and self.vocabulary.changes

    def shards(self, spec: MergeSpec, mapping: OutputFile | None) -> tuple[MergeShard, ...]:
        """Return the units that write the weight files.

        Args:
            spec: The request.
            mapping: Which rows of the models the rows of the vocabulary are, where they move.
        """
        moved = self.target.vocabulary_tensors if mapping else frozenset()
        recipes = {
            tensor.name: tensor.model_copy(update={"vocabulary": mapping}) if tensor.name in moved else tensor
            for tensor in self.target.tensors
        }
        return tuple(
            MergeShard(
                directory=self.directory,
                shard=file,
                sources=self.target.sources,
                tensors=tuple(recipes[tensor.name] for tensor in file.tensors),
                compute_dtype=spec.compute_dtype,
                seed=stage_seed(spec.seed, self.name),
            )
            for file in self.files
        )

    def describe(self, result_name: str) -> MergeStep:
        """Return the plan in figures."""
        stored = {
            (operand.source, operand.tensor) for tensor in self.target.tensors for operand in tensor.operands
        }
        members = list(self.members.values())
        by_source = {member.source: member for member in members}
        read = [
            TensorPlan(name=name, dtype=tensor.dtype, shape=tensor.shape)
            for source, name in stored
            for tensor in (by_source[self.target.sources[source]].tensors[name],)
        ]
        return MergeStep(
            name=self.name or result_name,
            method=self.merge.merge_method,
            models=tuple(self.members),
            layers=self.target.num_layers,
            tensors=len(self.target.tensors),
            files=len(self.files),
            read_bytes=sum(tensor.nbytes for tensor in read),
            written_bytes=sum(file.nbytes for file in self.files),
            memory_bytes=expected_memory(max(len(tensor.operands) for tensor in self.target.tensors)),
        )


class MergeBuild:
    """The merges of a request. Opening it checks everything that headers and configurations can tell.

    Raises:
        AIDocksError: Whatever is wrong with the request or its models, naming the field.
    """

    def __init__(
        self, spec: MergeSpec, context: PlanContext, converted: Mapping[str, Path] | None = None
    ) -> None:
        self.spec = spec
        self.context = context
        self._converted = converted or {}
        self.steps = self._plan_steps()
        self.domains = self._resolve_domains()
        self.written: list[OutputFile] = []
        self.parents: tuple[Parent, ...] = ()
        #: Which rows of the last merge's models the rows of its vocabulary are, where they move; once it is written.
        self.mapping: OutputFile | None = None

    @property
    def last(self) -> Step:
        """The merge whose result is kept."""
        return self.steps[-1]

    def require_space(self, further: int = 0) -> None:
        """Raise InsufficientDisk when what the job has still to write, and ``further`` bytes, would not fit."""
        files = ((step.directory / file.file_name, file) for step in self.steps for file in step.files)
        needed = sum(file.nbytes for path, file in files if not path.is_file())
        require_space(self.context.workspace, needed + _BESIDE_WEIGHTS_BYTES + further)

    def result(self, name: str, *, dry_run: bool = False) -> MergeResult:
        """Return what is known before anything is measured."""
        last = self.last
        return MergeResult(
            model=None if dry_run else name,
            merge_method=last.merge.merge_method,
            architecture=last.target.class_name,
            dtype=torch_name(last.target.dtype),
            parameters=last.target.parameters,
            bytes=sum(file.nbytes for file in last.files),
            steps=tuple(step.describe(name) for step in self.steps),
            parts=parts_of(last.target.tensors),
            notes=tuple(dict.fromkeys(note for step in self.steps for note in step.notes)),
            dry_run=dry_run,
        )

    def run(self, name: str) -> Plan[MergeResult]:
        """Yield the stages; return the result, called ``name``, of what is then staged, not published yet."""
        result = self.result(name)
        for note in result.notes:
            self.context.say(note)
        yield from require_unchanged(directory for _, _, directory in self._named_parents())
        for step in self.steps:
            yield from self._write(step)
        if self.domains:
            perplexities = yield from self._evaluate(name)
            notes = (*result.notes, _OTHER_TOKENS) if self.last.moves_tokens else result.notes
            result = result.model_copy(update={"perplexities": perplexities, "notes": notes})
        config = to_public_yaml(self.spec)
        unit = WriteMergeReport(directory=self.last.directory, config=config, result=result)
        report: list[WrittenFiles] = yield Stage("report", (unit,))
        self._keep(report)
        pictures = [file.path for file in self.written if file.path.suffix == ".png"]
        names = tuple(path.relative_to(self.last.directory).as_posix() for path in pictures)
        return result.model_copy(update={"pictures": names})

    def finished(self, result: MergeResult) -> Staged:
        """Describe what is staged once :meth:`run` has returned ``result``."""
        return Staged(
            directory=self.last.directory,
            files=self.written,
            parents=self.parents,
            parameters=result.parameters,
            dtype=result.dtype,
            architecture=result.architecture,
            sections=card_sections(result),
        )

    def _plan_steps(self) -> list[Step]:
        steps: list[Step] = []
        made: dict[str, Member] = {}
        tokenizers: dict[Path, Tokenizer] = {}
        asks_for_tokens = any(merge.vocabulary for _, _, merge in self.spec.merges())
        for path, name, merge in self.spec.merges():
            members = open_members(
                merge, self.context.resolver, path=path, made=made, converted=self._converted
            )
            vocabulary = plan_vocabulary(merge, members, path=path, known=tokenizers)
            target = plan_target(merge, members, vocabulary, path=path)
            directory = self.context.workspace / (f"stages/{name}" if name else "model")
            files = target.plan_files(parse_size(self.spec.max_shard_size))
            steps.append(Step(name or "", merge, members, vocabulary, target, files, directory))
            _check_chat_template(merge, path)
            if name:
                made[name] = target.as_member(name, directory)
            if name and asks_for_tokens:
                known = vocabulary.result if vocabulary else read_tokenizer(target.tokenizer, tokenizers)
                tokenizers |= {directory: known} if known else {}
        return steps

    def _write(self, step: Step) -> Generator[Stage, list[Any], None]:
        is_last = step is self.last
        named = self._named_parents() if is_last else []
        hashes = parent_units(named, self.context.cache_dir)
        beside = WriteBesideWeights(
            base=next(iter(step.members.values())).directory,
            tokenizer=step.tokenizer,
            directory=step.directory,
            config=step.target.config,
            shards=step.files,
            chat_template=choose_chat_template(
                step.merge.chat_template, [member.tokenizer for member in step.members.values()]
            ),
        )
        mapping = yield from self._map_vocabulary(step)
        writers = (*step.shards(self.spec, mapping), beside)
        results: list[Any] = yield Stage("merge" if is_last else f"merge {step.name}", (*writers, *hashes))
        if is_last:
            self.mapping = mapping
            self._keep(results[: len(writers)])
            self.parents = describe_members(named, hashes, results[len(writers) :])

    def _map_vocabulary(self, step: Step) -> Generator[Stage, list[Any], OutputFile | None]:
        if step.vocabulary is None or not step.moves_tokens:
            return None
        unit = step.vocabulary.unit(self.context.workspace / "vocabularies" / (step.name or "result"))
        written: list[WrittenFiles] = yield Stage("vocabulary", (unit,))
        return written[0].files[0]

    def _named_parents(self) -> list[tuple[str, str, Path]]:
        """Return field, reference and directory of every model and adapter of the request."""
        made = {step.directory for step in self.steps}
        named: dict[Path, tuple[str, str, Path]] = {}
        for member in (member for step in self.steps for member in step.members.values()):
            model, adapter = split_reference(member.reference)
            if member.directory not in made:
                named.setdefault(member.directory, (member.field, model, member.directory))
            if adapter is not None and member.source.adapter is not None:
                place = member.source.adapter
                named.setdefault(place, (f"{member.field}.lora", adapter, place))
        return list(named.values())

    def _resolve_domains(self) -> tuple[Domain, ...]:
        spec, roots = self.spec, self.context.resolver.allowed_roots
        texts = [resolve_text(text, roots, field=f"text[{i}]") for i, text in enumerate(spec.text)]
        if not spec.evaluate:
            return ()
        # A model that is here already: the result's own tokenizer may not be written yet.
        first = next(iter(self.steps[0].members.values()))
        tokenizer = first.tokenizer
        _require_measurable(self.last.target.class_name, first)
        longest = self.last.target.config.get("max_position_embeddings")
        if isinstance(longest, int):
            require_context(next(iter(self.last.members)), longest, spec.seqlen)
        for text in texts:
            require_chunks(tokenizer, text, "held_out", spec.chunks, spec.seqlen, spec.seed)
        return tuple(Domain(name=text.name, text=text, chunks=spec.chunks) for text in texts)

    def _evaluate(self, name: str) -> Generator[Stage, list[Any], tuple[ModelPerplexity, ...]]:
        subjects: dict[tuple[Path, ...], tuple[str, str]] = {}
        last = self.last
        merged = last.merged
        rivals = [member for member in merged if member.reference != last.merge.base_model]
        for member in merged:
            if member.source.adapter is None:
                place = member.field.removesuffix(".model") if member in rivals else "base"
                subjects.setdefault((member.directory,), (place, member.reference))
        if len(rivals) > 1 and not last.moves_tokens and _have_an_average(rivals):
            averaged = tuple(member.directory for member in rivals)
            subjects[averaged] = ("average", "plain average of the models")
        subjects[(last.directory,)] = ("merge", name)
        units = tuple(
            MeasureDomains(
                models=models,
                domains=self.domains,
                seq_length=self.spec.seqlen,
                seed=self.spec.seed,
                # The same tokens for all, so that losses of a token compare; where they moved, each reads its own.
                tokenizer=None if last.moves_tokens else last.target.tokenizer,
                subject=subject,
            )
            for models, (subject, _) in subjects.items()
        )
        results: list[DomainResults] = yield Stage("evaluate", units)
        return model_perplexities(tuple(subjects.values()), results, self.domains)

    def _keep(self, results: Sequence[WrittenFiles]) -> None:
        self.written += [file for result in results for file in result.files]


def _check_chat_template(merge: MergeConfig, path: str) -> None:
    """Refuse a chat template that is none, before anything is written; those of the models are read later."""
    try:
        choose_chat_template(merge.chat_template, ())
    except InvalidSpec as error:
        error.field = f"{path}chat_template"
        raise


def _require_measurable(class_name: str, first: Member) -> None:
    if not class_name.endswith(CAUSAL_ENDINGS):
        raise IncompatibleModels(
            f"The model {first.reference!r} is not a causal language model, but: {class_name or 'none'}.",
            field="evaluate",
            value=True,
            hint="Leave `evaluate` out: perplexity is measured of models whose architecture ends with ForCausalLM.",
        )


def _have_an_average(models: Sequence[Member]) -> bool:
    """Tell whether models can be averaged as they are stored: without adapters, of one form, tied alike."""
    forms = [
        (
            bool(text_config(member.config).get("tie_word_embeddings")),
            {name: tuple(tensor.shape) for name, tensor in member.tensors.items()},
        )
        for member in models
    ]
    return all(member.source.adapter is None for member in models) and all(form == forms[0] for form in forms)
