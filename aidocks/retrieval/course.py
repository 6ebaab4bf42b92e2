"""The course of a training of what finds texts, stage by stage: look for negatives, measure, train, verify, measure."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from aidocks.checkpoints.files import OutputFile
from aidocks.checkpoints.header import read_header
from aidocks.checkpoints.layout import ADAPTER_FILE, CONFIG_FILE, read_entries, read_json_object
from aidocks.models.publication import Staged
from aidocks.plan import Plan, Stage
from aidocks.retrieval.build import RetrievalBuild
from aidocks.retrieval.eval_set import EvalSet
from aidocks.retrieval.measures import Measured
from aidocks.retrieval.measuring import Candidates, find_candidates, measure
from aidocks.retrieval.mining import Mined, mine
from aidocks.retrieval.mining import sentence as mined_sentence
from aidocks.retrieval.report import (
    FIGURES,
    WriteRetrievalReport,
    card_sections,
    domain_sentence,
    has_effect,
    shown,
    verdict_of,
    worth_notes,
)
from aidocks.retrieval.tables import domains, examples
from aidocks.retrieval.teaching import teach
from aidocks.retrieval.verifying import Verified, VerifyFiles
from aidocks.specs.train_rerank import RerankerTrainSpec
from aidocks.specs.train_retrieval_result import Domain, RetrieverTrainResult
from aidocks.training.fitting import sentence
from aidocks.training.report import CURVES, all_hyperparameters
from aidocks.training.request import dtype_of
from aidocks.training.resuming import NoteIdentity
from aidocks.training.retriever import Retriever
from aidocks.training.run import Rows
from aidocks.training.unit import TrainedFiles

#: Held-out queries of each data set that people are shown.
_EXAMPLES = 6


class _Before(NamedTuple):
    """What was measured of the base."""

    candidates: Candidates | None
    measured: tuple[Measured, ...]


class RetrievalCourse:
    """The stages of a training after everything is decided.

    Args:
        build: The training.
    """

    def __init__(self, build: RetrievalBuild) -> None:
        self._build = build
        self._request = build.request
        self._spec = build.request.spec
        self._context = build.request.context
        self._files: list[OutputFile] = []

    @property
    def directory(self) -> Path:
        """Where the result is staged."""
        return self._build.output

    def tell(self) -> None:
        """Say what was found in the data, what it will need, and what else one should know."""
        for told in (*self._build.found.data.sentences, sentence(self._build.estimate), *self._notes()):
            self._context.say(told)

    def planned(self) -> RetrieverTrainResult:
        """Return what is known before anything is trained."""
        spec, build, request = self._spec, self._build, self._request
        embeds = request.kind == "embedding"
        result = RetrieverTrainResult(
            base_model=spec.base_model,
            kind=request.kind,
            loss=build.loss,
            adapter=spec.adapter,
            merged=not spec.makes_adapter,
            prompts=request.base.prompts,
            pooling=(request.base.pooling or request.architecture.pooling) if embeds else None,
            dimensions=request.architecture.dimensions if embeds else None,
            max_length=build.hyper.max_length,
            licence=request.architecture.licence,
            device=build.found.device.name,
            workers=spec.workers,
            deepspeed_stage=build.fit.setup.stage,
            precision=build.precision,
            data=build.found.data.data,
            steps=build.steps,
            epochs=build.epochs,
            trainable=build.estimate.trainable,
            parameters=build.estimate.parameters,
            hyperparameters=all_hyperparameters(build.hyper, request.adapter),
            estimate=build.estimate,
            notes=self._notes(),
            dry_run=True,
        )
        chosen = {name: value for name, value in result.hyperparameters.items() if has_effect(name, result)}
        return result.model_copy(update={"hyperparameters": chosen})

    def run(self, name: str) -> Plan[RetrieverTrainResult]:
        """Yield the stages; return the result, called ``name``, of what is then staged."""
        note = NoteIdentity(identity=self._build.identity, directory=self._context.checkpoints_dir)
        yield Stage("begin", (note,))
        train, held_out, mined = yield from self._rows()
        before = yield from self._measure_before()
        unit = self._build.unit(train, held_out)
        (trained,) = yield Stage("train", (unit,))
        assert isinstance(trained, TrainedFiles)
        self._files += trained.files
        model = self._build.result(name)
        verification = VerifyFiles(retriever=model, probe=unit.training.story.parent)
        (verified,) = yield Stage("verify", (verification,))
        result = self._trained(name, trained, verified, mined)
        if before is not None:
            after = yield from measure(
                self._sets, model, "after", self._context, candidates=before.candidates
            )
            result = self._judged(result, before, after)
        report = WriteRetrievalReport(
            directory=self.directory,
            result=shown(result),
            history=trained.history,
            tensorboard=unit.training.tensorboard,
        )
        (written,) = yield Stage("report", (report,))
        self._files += written.files
        names = [file.path.relative_to(self.directory).as_posix() for file in written.files]
        return result.model_copy(
            update={
                "pictures": tuple(one for one in (FIGURES, CURVES) if one in names),
                "files": tuple(one for one in names if one.endswith(".json")),
            }
        )

    def finished(self, result: RetrieverTrainResult) -> Staged:
        """Describe what is staged once :meth:`run` has returned ``result``."""
        inner = self._request.base.model / self._request.architecture.transformer
        called = (read_json_object(inner / CONFIG_FILE).get("architectures") or ["a model"])[0]
        if self._spec.makes_adapter:
            entries, _ = read_header(self.directory / ADAPTER_FILE)
            called = f"{'DoRA' if self._spec.adapter == 'dora' else 'LoRA'} of {called}"
        else:  # read as files: a model with code of its own is no checkpoint to others
            entries = read_entries(self.directory)
            called = (read_json_object(self.directory / CONFIG_FILE).get("architectures") or [called])[0]
        return Staged(
            directory=self.directory,
            files=self._files,
            parents=self._build.found.parents,
            parameters=sum(entry.numel for entry in entries.values()),
            dtype=dtype_of(entries),
            architecture=called,
            sections=card_sections(result),
        )

    @property
    def _sets(self) -> tuple[EvalSet, ...]:
        return self._build.found.data.sets

    def _rows(self) -> Generator[Stage, list[Any], tuple[Rows, Rows | None, Mined | None]]:
        """Yield the stages that find what the rows lack; return them, those held out, and what was found."""
        spec, request, data = self._spec, self._request, self._build.found.data
        workspace = self._context.workspace
        train, held_out, mined = data.train, data.held_out, None
        if spec.mine_negatives is not None:
            mined = yield from mine(
                train,
                data.corpora,
                spec.mine_negatives,
                request.miner,
                request.judge,
                self._context,
                workspace / "negatives",
                spec.seed,
            )
            train = mined.rows
            self._context.say(mined_sentence(mined))
            for told in mined.notes:
                self._context.say(told)
        if request.teacher is not None:
            train = yield from teach(train, request.teacher, self._context, workspace / "taught")
            if held_out is not None and spec.evaluate:
                held_out = yield from teach(
                    held_out, request.teacher, self._context, workspace / "taught-held-out"
                )
        return train, held_out, mined

    def _measure_before(self) -> Generator[Stage, list[Any], _Before | None]:
        """Yield the stages that measure the base; return None where nothing is measured."""
        if not self._spec.evaluate or not self._sets or not self._build.can_measure:
            return None
        candidates: Candidates | None = None
        if isinstance(self._spec, RerankerTrainSpec):
            candidates = yield from find_candidates(
                self._sets, self._request.finder, self._context, count=self._spec.candidates
            )
        base: Retriever = self._request.base
        measured = yield from measure(self._sets, base, "before", self._context, candidates=candidates)
        return _Before(candidates, measured)

    def _notes(self) -> tuple[str, ...]:
        build, notes = self._build, list(self._build.notes)
        if not self._sets:
            notes.append("Nothing is held out, so nothing is known of its worth on other queries.")
        elif not self._spec.evaluate:
            notes.append("It is not measured (`evaluate` is false), so nothing is known of its worth.")
        elif not build.can_measure:
            notes.append(
                "One worker alone cannot hold the model, so it is not measured, and nothing is known of its worth."
            )
        return tuple(notes)

    def _trained(
        self, name: str, files: TrainedFiles, verified: Verified, mined: Mined | None
    ) -> RetrieverTrainResult:
        trained, resumed, planned = files.trained, self._request.resumed, self.planned()
        return planned.model_copy(
            update={
                "notes": (*planned.notes, *(mined.notes if mined else ()), *trained.notes),
                "model": name,
                "dry_run": False,
                "device": trained.device,
                "workers": trained.world_size,
                "precision": trained.precision,
                "mined": mined.negatives if mined else None,
                "steps": trained.steps,
                "epochs": trained.epochs,
                "tokens": trained.tokens,
                "tokens_per_s": trained.tokens_per_s,
                "training_seconds": trained.seconds,
                "loss_value": trained.loss,
                "trainable": trained.trainable,
                "peak_bytes": trained.peak_bytes,
                "optimizer_bytes": trained.optimizer_bytes,
                "reload_error": verified.error,
                "attempts": trained.attempts,
                "resumed_from": f"{resumed.job_id}, step {resumed.step}" if resumed else None,
                "versions": trained.versions,
            }
        )

    def _judged(
        self, result: RetrieverTrainResult, before: _Before, after: tuple[Measured, ...]
    ) -> RetrieverTrainResult:
        """Return the result with what was measured, and say what it is worth."""
        alone = before.candidates.alone if before.candidates is not None else None
        found: tuple[Domain, ...] = domains(self._sets, before.measured, after, alone)
        for one in found:
            told = domain_sentence(one)
            if told is not None:
                self._context.say(told)
        notes = worth_notes(found, has_trained=any(one.trained for one in self._sets))
        if verdict_of(found) in ("worse", "not distinguishable"):
            self._context.say(notes[0])
        return result.model_copy(
            update={
                "domains": found,
                "verdict": verdict_of(found),
                "examples": examples(self._sets, before.measured, after, _EXAMPLES),
                "notes": (*result.notes, *notes),
            }
        )
