"""What must be true of a base model before any work begins; reads headers and configurations."""

from __future__ import annotations

from aidocks.checkpoints.reader import Checkpoint
from aidocks.errors import IncompatibleModels
from aidocks.evaluate.texts import require_context
from aidocks.laser.matrices import Matrix, find_matrices, select_matrices
from aidocks.specs.laser import LaserSpec

_CAUSAL = ("ForCausalLM", "LMHeadModel")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def check_base(checkpoint: Checkpoint, spec: LaserSpec) -> tuple[Matrix, ...]:
    """Return the matrices that the request covers.

    Raises:
        IncompatibleModels: For a model that is not a causal language model, is quantised, or has no
            tokenizer.
        InvalidSpec: For layers or kinds that it does not have, or chunks longer than its context.
    """
    field, name = "base_model_name", spec.base_model_name
    architectures = checkpoint.config.get("architectures") or ["none"]
    if not any(str(architecture).endswith(_CAUSAL) for architecture in architectures):
        raise IncompatibleModels(
            f"The model {name!r} is not a causal language model, but: {', '.join(architectures)}.",
            field=field,
            value=name,
            hint="Perplexity decides here: give a model whose architecture ends with ForCausalLM.",
        )
    if checkpoint.config.get("quantization_config"):
        raise IncompatibleModels(
            f"The model {name!r} is quantised.",
            field=field,
            value=name,
            hint="Give the model it was made from.",
        )
    if not any((checkpoint.path / file).is_file() for file in _TOKENIZER_FILES):
        raise IncompatibleModels(f"The model {name!r} has no tokenizer files.", field=field, value=name)
    context = next(
        (
            checkpoint.config[key]
            for key in ("max_position_embeddings", "n_positions")
            if key in checkpoint.config
        ),
        None,
    )
    if isinstance(context, int):
        require_context(name, context, spec.seqlen)
    return select_matrices(find_matrices(checkpoint.entries), spec.layers, spec.kinds, name)
