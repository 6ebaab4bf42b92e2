"""Trainings as `aidocks train-… --local` does them, in this process, and what they took."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from aidocks.specs.train_llm_result import Comparison as Held
from aidocks.specs.train_llm_result import LLMTrainResult
from aidocks.specs.train_retrieval_result import RetrieverTrainResult
from benchmarks.comparison import Comparison
from benchmarks.peers import scratch_dir

ResultT = TypeVar("ResultT", LLMTrainResult, RetrieverTrainResult)


@dataclass(frozen=True)
class Run(Generic[ResultT]):
    """A training that has ended: its result, and wall and processor seconds from the request to the registry."""

    result: ResultT
    seconds: float
    cpu_seconds: float

    @property
    def facts(self) -> dict[str, str | float | int]:
        """What a reader needs to judge its figures."""
        result = self.result
        known: dict[str, Any] = {
            "learning rate": result.hyperparameters["learning_rate"],
            "steps": result.steps,
            "epochs": round(result.epochs, 2),
            "precision": result.precision,
            "tokens": result.tokens,
            "tokens/s": round(result.tokens_per_s) if result.tokens_per_s else None,
            "training s": round(result.training_seconds) if result.training_seconds else None,
            "all s": round(self.seconds),
            "all CPU s": round(self.cpu_seconds),
        }
        return {name: value for name, value in known.items() if value is not None}


def train(fields: dict[str, Any], told: Callable[[str], None] = lambda _: None) -> Run[LLMTrainResult]:
    """Run one training of a language model to its end in a data directory that vanishes afterwards.

    Args:
        fields: Of the request.
        told: Called with what the job says.

    Raises:
        RuntimeError: The job failed; with what it says.
    """
    return _train("train-llm", LLMTrainResult, fields, told)


def train_retriever(
    operation: str, fields: dict[str, Any], told: Callable[[str], None] = lambda _: None
) -> Run[RetrieverTrainResult]:
    """Do the same with ``train-emb`` or ``train-rerank``."""
    return _train(operation, RetrieverTrainResult, fields, told)


def _train(
    operation: str, result_type: type[ResultT], fields: dict[str, Any], told: Callable[[str], None]
) -> Run[ResultT]:
    from aidocks.jobs.runner import run_locally
    from aidocks.operations import find_operation
    from aidocks.settings import Settings

    home = Path(tempfile.mkdtemp(prefix="train-", dir=scratch_dir()))
    settings = Settings(home=home, allowed_roots=(Path("/"),))
    spec = find_operation(operation).spec_type().model_validate({"name": "trained", **fields})
    begin, used = time.perf_counter(), _cpu_seconds()
    try:
        job = run_locally(operation, spec, settings, lambda event: _say(event, told))
        seconds, cpu_seconds = time.perf_counter() - begin, _cpu_seconds() - used
        if job.result is None:
            raise RuntimeError(f"{job.status}: {job.error}")
        return Run(result_type.model_validate(job.result), seconds, cpu_seconds)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def beside_base(
    title: str, held: Held, done: Run[LLMTrainResult], must_reach: str, **facts: str
) -> Comparison:
    """Return what was measured on held-out rows after a training, beside the base."""
    assert held.before.value is not None
    assert held.after.value is not None
    return Comparison(
        title,
        (held.after.value,),
        (held.before.value,),
        "base",
        unit="",
        facts={**shown(held), **facts, **done.facts, "must reach": must_reach},
    )


def parts(source: Path, key: str, counts: Sequence[int]) -> list[Path]:
    """Divide the rows of a JSONL file into parts of so many rows, and one of all others, the last; return their files.

    Which part a row is in follows from the hash of one of its fields, so equal texts are in one part.

    Args:
        source: The file.
        key: The field.
        counts: Rows of every part but the last.
    """
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    groups: dict[str, list[str]] = {}
    for line in lines:
        digest = hashlib.sha256(json.loads(line)[key].encode()).hexdigest()
        groups.setdefault(digest, []).append(line)
    ordered = iter([groups[digest] for digest in sorted(groups)])
    found = []
    for number, count in enumerate([*counts, len(lines)]):
        part: list[str] = []
        while len(part) < count and (group := next(ordered, None)) is not None:
            part += group
        target = scratch_dir() / f"{source.stem}-{number}-of-{'-'.join(map(str, counts))}.jsonl"
        target.write_text("".join(part), encoding="utf-8")
        found.append(target)
    return found


def shown(held: Held) -> dict[str, str | float | int]:
    """Return one figure before and after a training, as facts."""
    before, after = held.before, held.after
    return {
        "before": _with_error(before.value, before.standard_error),
        "after": _with_error(after.value, after.standard_error),
        "rows": before.items,
        "change": _with_error(held.delta, held.standard_error),
        "z": round(held.z, 1) if held.z is not None else "-",
    }


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "not finite"
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")


def _cpu_seconds() -> float:
    """Return the processor seconds of this process and of those that it started and that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _say(event: Any, told: Callable[[str], None]) -> None:
    if event.type == "message":
        told(str(event.data.get("text", "")))
    elif event.type == "metrics":
        told(json.dumps({name: value for name, value in event.data.items() if name != "further"}))


def together(files: Sequence[Path]) -> Path:
    """Return a file with the rows of several, in their order."""
    if len(files) == 1:
        return files[0]
    target = files[0].with_name("+".join(path.stem for path in files) + ".jsonl")
    target.write_text("".join(path.read_text(encoding="utf-8") for path in files), encoding="utf-8")
    return target


def chosen_by_hand(request: dict[str, Any]) -> None:
    """Train with the fields that the command line gives, ``FIELD=VALUE`` each; print what came of it."""
    given = given_by_hand()
    done = train({**request, **given}, lambda text: print(text, file=sys.stderr, flush=True))
    for held in done.result.held_out:
        print(json.dumps({**given, "metric": held.before.metric, **shown(held)}, ensure_ascii=False))
    print(json.dumps(done.facts), flush=True)


def given_by_hand() -> dict[str, Any]:
    """Return the fields that the command line gives, ``FIELD=VALUE`` each; values are JSON, or else text."""
    return {name: _value(value) for name, value in (pair.split("=", 1) for pair in sys.argv[1:])}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
