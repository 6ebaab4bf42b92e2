"""From a model reference to a model that finds texts, with every choice made that its use needs; no torch.

Here stands the guard: a model that would need code of its own is refused, unless an admin allows that model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from aidocks.checkpoints.layout import ADAPTER_CONFIG_FILE, CONFIG_FILE, is_adapter, read_json_object
from aidocks.errors import (
    AIDocksError,
    CorruptCheckpoint,
    IncompatibleModels,
    InvalidSpec,
    UnsafeCheckpoint,
)
from aidocks.models.resolve import ModelResolver, ResolvedModel, is_path
from aidocks.retrieval.architecture import Architecture, architecture_of, told_beside
from aidocks.training.retriever import Pooling, Prompts, Retriever, RetrieverKind

#: Tokens that are read where nobody says more; longer texts cost more than they tell.
DEFAULT_LENGTH = 512


@dataclass(frozen=True)
class Choices:
    """What a request says of the use of a model, as :class:`Retriever` has it; None: as the model has it.

    Attributes:
        max_length: No more tokens are read than the model was made for, whatever is asked.
    """

    query_prompt: str | None = None
    passage_prompt: str | None = None
    pooling: Pooling | None = None
    normalize: bool | None = None
    task: str | None = None
    max_length: int | None = None


#: Everything as the model has it.
AS_IT_IS = Choices()


def open_retriever(
    reference: str,
    kind: RetrieverKind,
    resolver: ModelResolver,
    choices: Choices = AS_IT_IS,
    *,
    field: str,
    remote_code: Collection[str] = (),
    converted: Mapping[str, Path] | None = None,
) -> Retriever:
    """Return the model that a reference means, as one that is of a kind or can be made so.

    Args:
        reference: A registry name (of a model or of an adapter), a path below an allowed root, or a hub model that is
            on this machine.
        kind: What it is to be.
        resolver: Of the plan.
        choices: What the request says of its use.
        field: Spec field to blame.
        remote_code: Models that an admin allows to bring code: registry names, and ``org/name@commit``.
        converted: Reference -> directory of what was converted for this job.

    Raises:
        IncompatibleModels: It is of the other kind, or cannot be of this one.
        UnsafeCheckpoint: It needs code of its own; names the copy that does not, where there is one.
        InvalidSpec: A choice does not fit it.
        AIDocksError: As the resolver.
    """
    resolved = _resolve(reference, resolver, converted or {}, field)
    base, adapter = resolved, None
    try:
        if is_adapter(resolved.path):
            adapter = resolved.path
            base = _base_of(resolved, resolver, field)
        found = architecture_of(base.path)
    except AIDocksError as error:
        if error.field is None:
            error.field, error.value = field, reference
        raise
    _require_allowed(reference, base, found, field, remote_code)
    told = found if adapter is None else told_beside(adapter, found)
    _require_kind(reference, kind, told, field, base.path)
    return Retriever(
        kind=kind,
        name=reference,
        model=base.path,
        adapter=adapter,
        task=_task(choices.task, found, reference),
        pooling=_pooling(choices.pooling, kind, told, reference),
        normalize=_normalize(choices.normalize, kind, told),
        prompts=_prompts(choices, told.prompts),
        max_length=_max_length(choices.max_length, told),
        remote_code=found.needs_code is not None,
    )


def _require_allowed(
    reference: str, model: ResolvedModel, found: Architecture, field: str, remote_code: Collection[str]
) -> None:
    """Refuse a model that needs code of its own, unless it brings that along and an admin allows it."""
    if found.needs_code is None:
        return
    brings = _brings_code(model.path)
    if not (brings and _is_allowed(model, remote_code)):
        raise needs_code(reference, found, field, brings=brings)


def needs_code(
    reference: str, found: Architecture, field: str | None = None, *, brings: bool = False
) -> UnsafeCheckpoint:
    """Return the error for a model that needs Python code of its own.

    Args:
        reference: The model as the request names it.
        found: What is known of it.
        field: Spec field to blame.
        brings: Whether its code is in its directory.
    """
    allow = (
        "an admin can allow its code by naming it in AIDOCKS_REMOTE_CODE_MODELS (org/name@commit, or its name "
        "in the registry)"
    )
    if found.native:
        hint = f"Take {found.native}, which has the same weights and no code of its own."
    elif brings:
        hint = f"Take a model that transformers supports itself; or {allow}."
    else:
        hint = f"Take a model that transformers supports itself; or put its Python files beside the weights; {allow}."
    return UnsafeCheckpoint(
        f"The model {reference!r} cannot be run without Python code that it brings along: {found.needs_code}.",
        field=field,
        value=reference,
        hint=hint,
    )


def _resolve(
    reference: str, resolver: ModelResolver, converted: Mapping[str, Path], field: str | None
) -> ResolvedModel:
    if reference in converted:
        return ResolvedModel(reference=reference, kind="path", path=converted[reference])
    return resolver.resolve(reference, field=field)


def _base_of(adapter: ResolvedModel, resolver: ModelResolver, field: str | None) -> ResolvedModel:
    """Return the model that an adapter was trained on."""
    named = _trained_on(adapter, resolver)
    name = adapter.path.name
    if named is None:
        raise IncompatibleModels(
            f"The adapter {name!r} does not say which model it was trained on.",
            field=field,
            value=name,
            hint=f"Write it in {ADAPTER_CONFIG_FILE} (base_model_name_or_path).",
        )
    try:
        return resolver.resolve(named, field=field)
    except AIDocksError as error:
        # Of a path neither its directories nor the allowed roots: whoever asks here need not know them.
        shown, why = (Path(named).name, "") if is_path(named) else (named, f": {error.message.rstrip('.')}")
        raise IncompatibleModels(
            f"The adapter {name!r} was trained on {shown!r}, which is not to be had here{why}.",
            field=field,
            value=name,
            hint="Import that model under the same name, or merge the adapter where the model is.",
        ) from error


def _trained_on(adapter: ResolvedModel, resolver: ModelResolver) -> str | None:
    """Return the reference of an adapter's base.

    The manifest of an adapter that was trained here has it as it was given. Its configuration is made to be published
    and names no directories: there a base that was given by a path has a bare name, which may be another model's here.
    """
    if adapter.kind == "registry":
        parents = resolver.registry.manifest(adapter.path.name).parents
        known = next((parent.reference for parent in parents if parent.field == "base_model"), None)
        if known is not None:
            return known
    named = read_json_object(adapter.path / ADAPTER_CONFIG_FILE).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def _is_allowed(model: ResolvedModel, remote_code: Collection[str]) -> bool:
    """Tell whether an admin allows a model to bring code: by registry name, or by hub name and revision."""
    if model.kind == "registry":
        return model.path.name in remote_code
    if model.kind != "hub" or model.revision is None:
        return False
    name = model.reference.partition("@")[0]
    # A revision of the hub is a commit; a branch, or a name alone, would be whatever its owner makes of it.
    return f"{name}@{model.revision}" in remote_code


def _brings_code(directory: Path) -> bool:
    """Tell whether all code that a model's configuration names is in its own directory, and not in another model's."""
    config = read_json_object(directory / CONFIG_FILE) if (directory / CONFIG_FILE).is_file() else {}
    mapped = config.get("auto_map")
    named = mapped.values() if isinstance(mapped, Mapping) else ()
    classes = [one for several in named for one in ([several] if isinstance(several, str) else several or ())]
    files = {f"{one.partition('.')[0]}.py" for one in classes if isinstance(one, str)}
    return bool(files) and all((directory / file).is_file() for file in files)


def _require_kind(
    reference: str, kind: RetrieverKind, found: Architecture, field: str, directory: Path
) -> None:
    said = "an embedding model" if found.kind == "embedding" else "a reranker"
    if not found.can_be(kind):
        wanted = "an embedding model" if kind == "embedding" else "a reranker"
        raise IncompatibleModels(
            f"{reference!r} is {said}, and not {wanted}.",
            field=field,
            value=reference,
            hint="Make a vector of a text with /embed, and train one with /train/emb."
            if found.kind == "embedding"
            else "Give passages an order with /rerank, and train one with /train/rerank.",
        )
    if kind == "reranker" and found.labels not in (None, 1):
        raise IncompatibleModels(
            f"{reference!r} gives {found.labels} scores to a text; a reranker gives one.",
            field=field,
            value=reference,
            hint="Take a sequence classifier with one label, a plain encoder, or a decoder that says yes or no.",
        )
    if kind == "reranker" and found.family == "decoder" and found.labels is None:
        _require_yes_and_no(reference, directory, field)


def _require_yes_and_no(reference: str, directory: Path, field: str) -> None:
    """Refuse a decoder that cannot say yes or no in one token each.

    Its score is the logit of the one less that of the other, as sentence-transformers has it; a tokenizer that lacks
    both gives the same number to both, and every score would be 0.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise CorruptCheckpoint(
            f"{path.name} of {reference!r} is no tokenizer.", field=field, value=reference
        ) from error
    lacking = next((word for word in ("yes", "no") if tokenizer.token_to_id(word) is None), None)
    if lacking is not None:
        raise IncompatibleModels(
            f"{reference!r} is a decoder without a token for {lacking!r}; as a reranker it would say yes or no.",
            field=field,
            value=reference,
            hint="Take a sequence classifier with one label, a plain encoder, or a decoder that has the words.",
        )


def _task(asked: str | None, found: Architecture, reference: str) -> str | None:
    if asked is None:
        return None
    if not found.tasks:
        raise InvalidSpec(
            f"{reference!r} has no adapters for tasks.", field="task", value=asked, hint="Leave `task` out."
        )
    for name in found.tasks:
        if asked.replace("-", "_").replace(".", "_") == name.replace("-", "_").replace(".", "_"):
            return name
    raise InvalidSpec(
        f"{reference!r} has no adapter for the task {asked!r}.",
        field="task",
        value=asked,
        hint=f"It has: {', '.join(found.tasks)}.",
    )


def _prompts(asked: Choices, own: Prompts) -> Prompts:
    return Prompts(
        query=own.query if asked.query_prompt is None else asked.query_prompt,
        passage=own.passage if asked.passage_prompt is None else asked.passage_prompt,
    )


def _pooling(
    asked: Pooling | None, kind: RetrieverKind, told: Architecture, reference: str
) -> Pooling | None:
    """Return how a model pools that does not say; None for one that says."""
    if kind == "reranker":
        return None
    if told.pooling is not None:
        if asked is not None and asked != told.pooling:
            raise InvalidSpec(
                f"{reference!r} pools its own way ({told.pooling}), not by {asked!r}.",
                field="pooling",
                value=asked,
                hint="Leave `pooling` out.",
            )
        return None
    return asked or ("lasttoken" if told.family == "decoder" else "mean")


def _normalize(asked: bool | None, kind: RetrieverKind, told: Architecture) -> bool | None:
    if kind == "reranker":
        return None
    return True if asked is None and told.normalize is None else asked


def _max_length(asked: int | None, told: Architecture) -> int:
    """Return how many tokens are read: at most what the model was made for, whatever its positions could hold."""
    if asked is not None:
        return max(8, min(asked, told.max_length))
    # What nobody has made a choice for reads short texts cheaply.
    return max(8, told.max_length if told.kind is not None else min(told.max_length, DEFAULT_LENGTH))
