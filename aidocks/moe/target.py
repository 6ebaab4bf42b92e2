"""The plan of the result: its form, its tensors, and how each of them is made of the sources'."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from aidocks.checkpoints.dtypes import stored_name
from aidocks.checkpoints.writer import ShardPlan, TensorPlan, plan_shards
from aidocks.errors import InvalidSpec
from aidocks.models.chat_templates import Template, resolve_template
from aidocks.moe.compatibility import Checked, check_members
from aidocks.moe.dense import DenseConfig, Member, stored_dtype
from aidocks.moe.forms import Form, Sizes
from aidocks.moe.mixtral import MIXTRAL
from aidocks.moe.parts import EMBEDDING, HEAD, Part, attention_parts, check_parts, mlp_parts, outer_parts
from aidocks.moe.qwen_moe import QWEN2_MOE, QWEN3_MOE
from aidocks.moe.recipes import Piece, Recipe
from aidocks.moe.vocabulary import (
    Extension,
    Vocabulary,
    choose_tokenizer,
    find_extension,
    further_tokens,
)
from aidocks.specs.moe import Architecture, DType, MoESpec, SharedExpertSpec

#: The forms that a family's models can take, the default first.
_FORMS: dict[str, dict[Architecture, Form]] = {
    "llama": {"mixtral": MIXTRAL, "qwen_moe": QWEN2_MOE},
    "mistral": {"mixtral": MIXTRAL, "qwen_moe": QWEN2_MOE},
    "phi3": {"mixtral": MIXTRAL},
    "qwen2": {"qwen_moe": QWEN2_MOE},
    "qwen3": {"qwen_moe": QWEN3_MOE},
}
# Why a family cannot take the other form.
_WHY_NOT = {
    "phi3": "a Qwen MoE is not made of Phi-3 models",
    "qwen2": "a Mixtral has no place for the tensor model.layers.0.self_attn.q_proj.bias",
    "qwen3": "a Mixtral has no place for the tensor model.layers.0.self_attn.q_norm.weight",
}
#: Width of a shared expert that is there only because the form has one: the least that every quantisation divides.
_IDLE_WIDTH = 256


@dataclass(frozen=True)
class Target:
    """The form of the result, and how it is made.

    Attributes:
        form: Names of tensors.
        dense: The base's configuration.
        dtype: Type of the weights.
        num_experts: Routed experts.
        num_shared_experts: Shared experts of the request; their sum is the form's one.
        sources: Checkpoint directories that recipes refer to; the first is the base.
        tensors: All weights but the routers, in file order.
        routers: Router of every layer [experts, hidden]; then, where the form has them, the shared experts'
            gates [1, hidden].
        recipes: Tensor name -> how it is made, for all of ``tensors``.
        config: Content of config.json.
        tokenizer: Checkpoint directory that gives the tokenizer's files.
        chat_template: The result's, where the request has one.
        seed: Of the noise.
        notes: What one should know of the result.
    """

    form: Form
    dense: DenseConfig
    dtype: DType
    num_experts: int
    num_shared_experts: int
    sources: tuple[Path, ...]
    tensors: tuple[TensorPlan, ...]
    routers: tuple[TensorPlan, ...]
    recipes: Mapping[str, Recipe]
    config: dict[str, Any]
    tokenizer: Path
    chat_template: str | None
    seed: int
    notes: tuple[str, ...]

    @property
    def architecture(self) -> str:
        return self.form.architecture

    @property
    def class_name(self) -> str:
        return self.form.class_name

    @property
    def num_layers(self) -> int:
        return self.dense.num_hidden_layers

    @property
    def hidden_size(self) -> int:
        return self.dense.hidden_size

    @property
    def parameters(self) -> int:
        """Parameters of the result."""
        return sum(prod(tensor.shape) for tensor in (*self.tensors, *self.routers))

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert over all layers."""
        return 3 * self.dense.hidden_size * self.dense.intermediate_size * self.dense.num_hidden_layers

    def router_name(self, layer: int) -> str:
        return self.form.router_name(layer)

    def shared_gate_name(self, layer: int) -> str | None:
        return self.form.shared_gate_name(layer)

    def plan_files(self, max_shard_bytes: int) -> tuple[ShardPlan, ...]:
        """Divide the tensors over files; the last file holds the routers, and nothing else is in it.

        So gates can be computed while weights are copied, and replaced without touching the weights.
        """
        weights = plan_shards(self.tensors, max_shard_bytes)
        groups = [*(shard.tensors for shard in weights), self.routers]
        return tuple(
            ShardPlan(file_name=f"model-{number:05d}-of-{len(groups):05d}.safetensors", tensors=tensors)
            for number, tensors in enumerate(groups, 1)
        )


def plan_target(
    spec: MoESpec, base: Member, experts: Sequence[Member], shared: Sequence[Member] = ()
) -> Target:
    """Check that base and experts fit together and into the form, and plan the result.

    Args:
        spec: The request.
        base: The member that gives everything but MLPs.
        experts: One for each of ``spec.experts``.
        shared: One for each of ``spec.shared_experts``.

    Raises:
        IncompatibleModels: Naming the model's field, the first tensor or setting that does not fit, and both values.
        InvalidSpec: For an architecture, shared experts, a tokenizer or a chat template that cannot be.
    """
    template = resolve_template(spec.chat_template) if spec.chat_template is not None else None
    checked = check_members(base, (*experts, *shared))
    form = _choose_form(spec, base, checked.dense)
    vocabularies = [checked.vocabularies[m.checkpoint.path] for m in (base, *experts, *shared)]
    chosen = choose_tokenizer(spec.tokenizer_source, vocabularies[0], vocabularies[1:])
    extension = find_extension(vocabularies[0], chosen)
    if extension:
        _check_extension(extension, checked)
    sources = tuple(dict.fromkeys(m.checkpoint.path for m in (base, *experts, *shared)))
    places = {path: number for number, path in enumerate(sources)}
    planner = _Planner(
        form,
        checked,
        extension,
        [(places[m.checkpoint.path], e) for m, e in zip(experts, spec.experts, strict=True)],
        [(places[m.checkpoint.path], e) for m, e in zip(shared, spec.shared_experts, strict=True)],
        places,
    )
    dtype = spec.dtype or stored_dtype(base.checkpoint)
    stored = stored_name(dtype)
    made = {name: (shape, recipe) for name, shape, recipe in planner.weights()}
    sizes = Sizes(len(experts), spec.num_experts_per_token, planner.shared_width)
    return Target(
        form=form,
        dense=checked.dense,
        dtype=dtype,
        num_experts=len(experts),
        num_shared_experts=len(shared),
        sources=sources,
        tensors=tuple(TensorPlan(name=name, dtype=stored, shape=shape) for name, (shape, _) in made.items()),
        routers=tuple(TensorPlan(name=name, dtype=stored, shape=shape) for name, shape in planner.routers()),
        recipes={name: recipe for name, (_, recipe) in made.items()},
        config={
            **form.config(base.checkpoint.config, checked.dense, sizes, dtype),
            **checked.configs[chosen.member.checkpoint.path].special_ids,
            "router_aux_loss_coef": spec.router_aux_loss_coef,
            "vocab_size": planner.vocab_size,
        },
        tokenizer=chosen.member.checkpoint.path,
        chat_template=template.text if template else None,
        seed=spec.seed,
        notes=tuple(_notes(form, checked.dense, sizes, vocabularies, chosen, template)),
    )


def _choose_form(spec: MoESpec, base: Member, dense: DenseConfig) -> Form:
    forms = _FORMS[dense.model_type]
    architecture = next(iter(forms)) if spec.architecture is None else spec.architecture
    form = forms.get(architecture)
    if form is None:
        raise InvalidSpec(
            f"A {dense.model_type!r} model cannot become a {architecture!r}: {_WHY_NOT[dense.model_type]}.",
            field="architecture",
            value=architecture,
            hint=f"Use {' or '.join(map(repr, forms))}, or leave it out.",
        )
    if spec.shared_experts and not form.has_shared:
        others = [name for name, other in forms.items() if other.has_shared]
        raise InvalidSpec(
            f"A {form.architecture} model has no place for shared experts.",
            field="shared_experts",
            value=[expert.source_model for expert in spec.shared_experts],
            hint=f"Use the architecture {others[0]!r}." if others else "Make them routed experts.",
        )
    _check_place(base, dense, form)
    return form


def _check_place(base: Member, dense: DenseConfig, form: Form) -> None:
    tensor = next((f"self_attn.{kind}.bias" for kind in dense.biases if kind not in form.biases), None)
    setting = "attention_bias"
    if dense.mlp_bias:
        tensor, setting = "mlp.gate_proj.bias", "mlp_bias"
    if tensor:
        raise base.refuse(
            f"The model {base.reference!r} has biases ({setting} is true): a {form.architecture} model has no "
            f"place for the tensor model.layers.0.{tensor}."
        )
    if len(set(dense.windowed)) > 1 and not form.mixed_windows:
        raise base.refuse(
            f"Only some layers of {base.reference!r} have a sliding window (layer_types, max_window_layers): in a "
            f"{form.architecture} model all have it or none."
        )


def _check_extension(extension: Extension, checked: Checked) -> None:
    member = extension.member
    config = checked.configs[member.checkpoint.path]
    if checked.dense.tie_word_embeddings and not config.tie_word_embeddings:
        raise member.refuse(
            f"The further tokens of {member.reference!r} have rows in its tensor {HEAD}, but the base has no such "
            "tensor: its head is its embedding (tie_word_embeddings).",
            "Use the tokenizer_source 'base'.",
        )
    check_parts(member, (part for part in outer_parts(config) if part.name in (EMBEDDING, HEAD)))


@dataclass(frozen=True)
class _Planner:
    """Names, shapes and recipes of the result's tensors; experts are pairs of a source and what is said of it."""

    form: Form
    checked: Checked
    extension: Extension | None
    experts: Sequence[tuple[int, SharedExpertSpec]]
    shared: Sequence[tuple[int, SharedExpertSpec]]
    places: Mapping[Path, int]

    @property
    def vocab_size(self) -> int:
        return self.extension.rows if self.extension else self.checked.dense.vocab_size

    @property
    def shared_width(self) -> int:
        # The form has a shared expert whether or not the request has: a small one that is zero adds exactly
        # nothing, so that copies of one model still are that model.
        width = self.checked.dense.intermediate_size
        return width * len(self.shared) if self.shared else min(width, _IDLE_WIDTH)

    def weights(self) -> Iterator[tuple[str, tuple[int, ...], Recipe]]:
        """Yield name, shape and recipe of every tensor but the routers, in the order in which a model uses them."""
        dense = self.checked.dense
        outer = {part.name: part for part in outer_parts(dense)}
        yield self._by_token(outer.pop(EMBEDDING))
        head = outer.pop(HEAD, None)
        for layer in range(dense.num_hidden_layers):
            yield from (_from_base(part) for part in attention_parts(dense, layer))
            if self.form.has_shared:
                yield from self._shared_expert(layer)
            parts = mlp_parts(dense, layer)
            for number, (place, expert) in enumerate(self.experts):
                for kind, dense_kind in self.form.kinds.items():
                    name, part = self.form.expert_name(layer, number, kind), parts[dense_kind]
                    yield name, part.shape, Recipe(pieces=(_piece(place, expert, dense_kind, part),))
        yield from (_from_base(part) for part in outer.values())
        if head:
            yield self._by_token(head)

    def routers(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield name and shape of the routers, then of the shared experts' gates."""
        layers, hidden = range(self.checked.dense.num_hidden_layers), self.checked.dense.hidden_size
        for layer in layers:
            yield self.form.router_name(layer), (len(self.experts), hidden)
        for layer in layers:
            name = self.form.shared_gate_name(layer)
            if name:
                yield name, (1, hidden)

    def _shared_expert(self, layer: int) -> Iterator[tuple[str, tuple[int, ...], Recipe]]:
        """Yield the one shared expert: all of the request's side by side, which is their sum."""
        parts, hidden = mlp_parts(self.checked.dense, layer), self.checked.dense.hidden_size
        for kind, dense_kind in self.form.kinds.items():
            is_down = dense_kind == "down_proj"
            shape = (hidden, self.shared_width) if is_down else (self.shared_width, hidden)
            pieces = tuple(
                _piece(place, expert, dense_kind, parts[dense_kind]) for place, expert in self.shared
            )
            yield self.form.shared_name(layer, kind), shape, Recipe(pieces=pieces, axis=int(is_down))

    def _by_token(self, part: Part) -> tuple[str, tuple[int, ...], Recipe]:
        """Return a tensor with a row for every token: the base's rows, then those of the model that extends it."""
        if self.extension is None:
            return _from_base(part)
        path = self.extension.member.checkpoint.path
        tied = self.checked.configs[path].tie_word_embeddings
        pieces = (
            Piece(source=0, tensor=part.tensor, rows=(0, self.extension.first)),
            Piece(
                source=self.places[path],
                tensor=EMBEDDING if tied else part.tensor,
                rows=(self.extension.first, self.extension.rows),
            ),
        )
        return part.name, (self.extension.rows, *part.shape[1:]), Recipe(pieces=pieces)


def _from_base(part: Part) -> tuple[str, tuple[int, ...], Recipe]:
    return part.name, part.shape, Recipe(pieces=(Piece(source=0, tensor=part.tensor, rows=part.rows),))


def _piece(place: int, expert: SharedExpertSpec, dense_kind: str, part: Part) -> Piece:
    return Piece(
        source=place,
        tensor=part.tensor,
        rows=part.rows,
        # An expert is linear in this matrix alone, so this scales what it contributes.
        scale=expert.residual_scale if dense_kind == "down_proj" else 1.0,
        noise=expert.noise_scale,
    )


def _notes(
    form: Form,
    dense: DenseConfig,
    sizes: Sizes,
    vocabularies: Sequence[Vocabulary],
    chosen: Vocabulary,
    template: Template | None,
) -> Iterator[str]:
    said: set[Path] = set()
    for vocabulary in vocabularies:
        member = vocabulary.member
        dropped = further_tokens(vocabulary, chosen)
        if dropped and member.checkpoint.path not in said:
            said.add(member.checkpoint.path)
            yield (
                f"{member.reference!r} knows {len(dropped)} tokens that the result's tokenizer does not (the first "
                f"is {dropped[0]!r}); they are dropped. See tokenizer_source."
            )
    marks = template.marks if template and chosen.tokens else ()
    missing = [mark for mark in marks if mark not in (chosen.tokens or ())]
    if missing:
        yield f"The tokenizer has no token {missing[0]!r}, so the chat template's marks are several tokens each."
    if dense.rope_parameters["rope_type"] == "longrope":
        original = dense.rope_parameters.get("original_max_position_embeddings")
        yield (
            f"The rotation (longrope) changes beyond {original} tokens. A Phi-3 model computes its cache anew when a "
            "text grows beyond that while it is generated; transformers' Mixtral does not."
        )
    if form is QWEN2_MOE and sizes.experts_per_token < sizes.num_experts:
        yield (
            "llama.cpp does not normalise the weights of the chosen experts of a Qwen2-MoE, whatever its "
            "configuration says (norm_topk_prob); transformers does."
        )
    if form is QWEN2_MOE and dense.tie_word_embeddings:
        yield "llama.cpp does not load a Qwen2-MoE whose head is its embedding (tie_word_embeddings)."
