"""What must be true of a request and its base model before any work begins; reads headers and configurations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aidocks.checkpoints.files import UNFINISHED
from aidocks.checkpoints.layout import CAUSAL_ENDINGS
from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.objectives import ObjectiveSource, resolve_objective, size_objective
from aidocks.evaluate.texts import require_context
from aidocks.laser.calibration import moments_bytes
from aidocks.laser.factors import dense_config
from aidocks.laser.matrices import Matrix, find_matrices, select_matrices
from aidocks.specs.laser import LaserSpec

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_FLOAT32_BYTES = 4
_DEFAULT_GUARD_LENGTH = 128
#: Shares of the calibration data, each with its own sums of second moments; fixed, so that the sums do not depend on
#: the number of workers.
COVARIANCE_SHARDS = 2


def resolve_objectives(spec: LaserSpec, allowed_roots: Sequence[Path]) -> tuple[ObjectiveSource, ...]:
    """Return what decides and then the guards, with data that exist.

    Raises:
        InvalidSpec: For data that do not exist or do not suit the metric, naming the field.
        PathNotAllowed: For a file outside the allowed roots.
    """
    decisive = resolve_objective(
        spec.decisive,
        allowed_roots,
        seq_length=spec.seqlen,
        seed=spec.seed,
        chunks=spec.chunks,
        field=_field(spec),
    )
    # The shipped text is short: in chunks of the objective's length there might be too few of them.
    length = min(spec.seqlen, _DEFAULT_GUARD_LENGTH) if spec.guards is None else spec.seqlen
    guards = [
        resolve_objective(
            guard, allowed_roots, seq_length=length, seed=spec.seed, field=_guard_field(spec, number)
        )
        for number, guard in enumerate(spec.guarding)
    ]
    return (decisive, *guards)


def size_objectives(
    spec: LaserSpec, objectives: Sequence[ObjectiveSource], model: Path
) -> tuple[ObjectiveSource, ...]:
    """Return the objectives with the sizes of their parts, counted with the model's tokenizer.

    Raises:
        InvalidSpec: For data that are too few.
    """
    decisive, *guards = objectives
    sized = [size_objective(decisive, model, chunks=spec.chunks, field=_field(spec))]
    for number, guard in enumerate(guards):
        known = size_objective(guard, model, field=_guard_field(spec, number))
        if spec.chunks is not None and guard.metric == "perplexity":
            known = known.model_copy(
                update={"sizes": {part: min(size, spec.chunks) for part, size in known.sizes.items()}}
            )
        sized.append(known)
    return tuple(sized)


def _field(spec: LaserSpec) -> str:
    return "objective" if spec.objective else "text"


def _guard_field(spec: LaserSpec, number: int) -> str:
    return "text" if spec.guards is None else f"guards[{number}]"


def check_base(checkpoint: Checkpoint, spec: LaserSpec) -> tuple[Matrix, ...]:
    """Return the matrices that the request covers.

    Raises:
        IncompatibleModels: For a model that is not a causal language model, is quantised, or has no
            tokenizer.
        InvalidSpec: For layers or kinds that it does not have, or chunks longer than its context.
    """
    field, name = "base_model_name", spec.base_model_name
    config = dense_config(checkpoint.config)
    architectures = config.get("architectures") or ["none"]
    if not any(str(architecture).endswith(CAUSAL_ENDINGS) for architecture in architectures):
        raise IncompatibleModels(
            f"The model {name!r} is not a causal language model, but: {', '.join(map(str, architectures))}.",
            field=field,
            value=name,
            hint="Losses of text decide here: give a model whose architecture ends with ForCausalLM.",
        )
    if config.get("quantization_config"):
        raise IncompatibleModels(
            f"The model {name!r} is quantised.",
            field=field,
            value=name,
            hint="Give the model it was made from.",
        )
    if not any((checkpoint.path / file).is_file() for file in _TOKENIZER_FILES):
        raise IncompatibleModels(
            f"The model {name!r} has no tokenizer files.",
            field=field,
            value=name,
            hint=f"Put those of the model that it was made from into its directory: {', '.join(_TOKENIZER_FILES)}, "
            "whichever it has.",
        )
    lengths = (config.get(key) for key in ("max_position_embeddings", "n_positions"))
    context = next((length for length in lengths if length is not None), None)
    if isinstance(context, int):
        require_context(name, context, spec.seqlen)
    return select_matrices(find_matrices(checkpoint.entries), spec.layers, spec.kinds, name)


def workspace_bytes(matrices: Sequence[Matrix], spec: LaserSpec) -> int:
    """Return what the search writes on its way, at most: directions of outputs, second moments of inputs."""
    truncations = {truncation for rule in spec.rules for truncation in spec.truncations_of(rule)}
    bases = sum(matrix.shape[0] * matrix.full_rank for matrix in matrices) * len(truncations)
    moments = COVARIANCE_SHARDS * moments_bytes(matrices) if "activation_aware" in truncations else 0
    return bases * _FLOAT32_BYTES + moments


def bytes_kept(workspace: Path) -> int:
    """Return what earlier attempts of a job have finished, and remove what they left unfinished."""
    for leftover in [path for path in workspace.rglob(f"*{UNFINISHED}*") if path.is_file()]:
        leftover.unlink(missing_ok=True)
    return sum(path.stat().st_size for path in workspace.rglob("*") if path.is_file())
