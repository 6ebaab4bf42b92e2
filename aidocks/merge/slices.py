"""The slices of a merge: which layers of which models become which layers of the result, however a request says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from aidocks.errors import InvalidSpec
from aidocks.merge.layers import Layout, find_layout
from aidocks.merge.members import Member
from aidocks.merge.method import Method
from aidocks.merge.parameters import Settings, read_settings
from aidocks.specs.merge_config import MergeConfig, ModelInput, OutputSlice, SliceSource


@dataclass(frozen=True)
class Input:
    """One model of a slice.

    Attributes:
        field: Place in the request: ``models[1]``.
        member: The model.
        layout: Its tensors by their place.
        first: Its first layer in the slice.
        settings: Its own parameters.
    """

    field: str
    member: Member
    layout: Layout
    first: int
    settings: Settings


@dataclass(frozen=True)
class Slice:
    """Layers of the result that are made alike.

    Attributes:
        field: Place in the request: ``slices[2]``, or that of all models.
        inputs: What is merged.
        length: Number of layers; None for all layers that there are, of every list of layers.
        base: Which of the inputs is the method's base.
        settings: Parameters of all inputs, what counts most first.
    """

    field: str
    inputs: tuple[Input, ...]
    length: int | None
    base: int | None
    settings: tuple[Settings, ...]

    @cached_property
    def models(self) -> tuple[Input, ...]:
        """The inputs but the base."""
        return tuple(found for number, found in enumerate(self.inputs) if number != self.base)


class Arranger:
    """Arranges the slices of a merge.

    Args:
        merge: A merge of the request.
        members: Its models.
        method: Its method.
        path: Of the merge in the request: ``stages[0].`` or empty.

    Attributes:
        notes: What one should know of what the request says.
    """

    def __init__(self, merge: MergeConfig, members: Mapping[str, Member], method: Method, path: str) -> None:
        self.notes: list[str] = []
        self._merge, self._members, self._method, self._path = merge, members, method, path
        self._layouts: dict[str, Layout] = {}
        self._module_path, self._module = merge.module
        top = [self._settings(merge.parameters, f"{path}parameters")]
        if self._module_path:
            top.insert(0, self._settings(self._module.parameters, f"{path}{self._module_path}parameters"))
        self._shared = tuple(top)

    def arrange(self) -> tuple[Slice, ...]:
        """Return the slices in the order of the result's layers.

        Raises:
            InvalidSpec: For parameters, layers, a base or a number of models that cannot be.
        """
        if self._module.models:
            return (self._whole(self._module.models),)
        within = self._path + self._module_path
        return tuple(
            self._slice(f"{within}slices[{number}]", part)
            for number, part in enumerate(self._module.slices or ())
        )

    def _whole(self, models: Sequence[ModelInput]) -> Slice:
        within = self._path + self._module_path
        inputs = [
            self._input(f"{within}models[{n}]", model, 0, self._members[model.model])
            for n, model in enumerate(models)
        ]
        base = self._merge.base_model
        if base is not None and base not in (model.model for model in models):
            # As mergekit does: a base is merged, whether or not it is listed.
            field = f"{self._path}base_model"
            member = self._members[base]
            settings = Settings(f"{within}models[{len(models)}].parameters", {})
            inputs.append(Input(field, member, self._layout(member), 0, settings))
        _require_equal_length(inputs)
        return self._checked(Slice(f"{within}models", tuple(inputs), None, None, self._shared), base)

    def _slice(self, field: str, given: OutputSlice) -> Slice:
        if given.residual_weight is not None:
            self.notes.append(f"{field}.residual_weight has no effect.")
        inputs = []
        for number, source in enumerate(given.sources):
            place = f"{field}.sources[{number}]"
            member = self._members[source.model]
            _require_layers(f"{place}.layer_range", source, member, self._layout(member))
            inputs.append(self._input(place, source, source.layer_range[0], member))
        lengths = [source.layer_range[1] - source.layer_range[0] for source in given.sources]
        for number, length in enumerate(lengths):
            if length != lengths[0]:
                raise InvalidSpec(
                    f"The sources of a slice must have the same number of layers: {length} of "
                    f"{given.sources[number].model!r}, but {lengths[0]} of {given.sources[0].model!r}.",
                    field=f"{field}.sources[{number}].layer_range",
                    value=list(given.sources[number].layer_range),
                    hint="Take as many layers of each, or make slices of their own.",
                )
        settings = (self._settings(given.parameters, f"{field}.parameters"), *self._shared)
        base = given.base_model or self._merge.base_model
        return self._checked(Slice(field, tuple(inputs), lengths[0], None, settings), base)

    def _input(self, field: str, given: ModelInput | SliceSource, first: int, member: Member) -> Input:
        settings = self._settings(given.parameters, f"{field}.parameters", of_model=True)
        return Input(field, member, self._layout(member), first, settings)

    def _settings(self, given: Mapping[str, object], field: str, *, of_model: bool = False) -> Settings:
        settings, notes = read_settings(self._method, given, field, of_model=of_model)  # type: ignore[arg-type]
        self.notes += notes
        return settings

    def _layout(self, member: Member) -> Layout:
        if member.reference not in self._layouts:
            self._layouts[member.reference] = find_layout(member)
        return self._layouts[member.reference]

    def _checked(self, found: Slice, base: str | None) -> Slice:
        """Return the slice with its base, if it has the models that the method needs."""
        method = self._method
        _require_once(found)
        number = None if method.base == "none" else self._find_base(found, base)
        complete = Slice(found.field, found.inputs, found.length, number, found.settings)
        least, most = method.models
        count = len(complete.models)
        if count < least or (most is not None and count > most):
            needed = f"{least}" if most == least else f"{least} to {most}" if most else f"at least {least}"
            models = "model" if (most or least) == 1 else "models"
            beside = "" if number is None else " beside its base"
            raise InvalidSpec(
                f"The method {method.name!r} merges {needed} {models}{beside}, not {count}.",
                field=found.field if found.length is None else f"{found.field}.sources",
                value=[given.member.reference for given in found.inputs],
                hint=self._hint_of_number(found, base),
            )
        return complete

    def _hint_of_number(self, found: Slice, base: str | None) -> str:
        if found.length is None and any(given.field.endswith("base_model") for given in found.inputs):
            return f"`base_model` ({base!r}) is one of the models, too: leave it out, or list it instead of another."
        other = "linear" if self._method.name != "linear" else "passthrough"
        return f"Name as many models, or use another method, such as {other!r}."

    def _find_base(self, found: Slice, base: str | None) -> int | None:
        method = self._method
        references = [given.member.reference for given in found.inputs]
        if base is None:
            if method.base == "optional":
                return None
            raise InvalidSpec(
                f"The method {method.name!r} needs a base.",
                field=f"{self._path}base_model",
                hint=f"Name the model that the others are compared with, such as {references[0]!r}.",
            )
        places = [number for number, reference in enumerate(references) if reference == base]
        if len(places) != 1:
            how = "is none" if not places else "is more than one"
            raise InvalidSpec(
                f"The base {base!r} {how} of the sources of {found.field}.",
                field=f"{found.field}.sources",
                value=references,
                hint="List the base among the sources of every slice, once, with the layers to compare with.",
            )
        return places[0]


def _require_once(found: Slice) -> None:
    seen: dict[tuple[str, int], str] = {}
    for given in found.inputs:
        key = (given.member.reference, given.first)
        if key in seen:
            raise InvalidSpec(
                f"{given.member.reference!r} is merged twice.",
                field=f"{given.field}.model",
                value=given.member.reference,
                hint=f"It is {seen[key]}.model, too: give that one the sum of both weights.",
            )
        seen[key] = given.field


def _require_layers(field: str, source: SliceSource, member: Member, layout: Layout) -> None:
    if layout.main is None:
        prefixes = ", ".join(f"{found.prefix}* ({len(found)})" for found in layout.lists) or "none"
        raise member.refuse(
            f"The model {member.reference!r} cannot be sliced: which of its lists of layers ({prefixes}) is meant is "
            f"not clear; its configuration has {layout.num_layers} layers.",
            "Merge whole models (`models`).",
        )
    count = len(layout.main)
    if source.layer_range[1] > count:
        raise InvalidSpec(
            f"The model {member.reference!r} has {count} layers.",
            field=field,
            value=list(source.layer_range),
            hint=f"At most [0, {count}]: its layers are 0 to {count - 1}.",
        )


def _require_equal_length(inputs: Sequence[Input]) -> None:
    first = inputs[0]
    for other in inputs[1:]:
        if other.layout.num_layers != first.layout.num_layers:
            raise other.member.refuse(
                f"The model {other.member.reference!r} has {other.layout.num_layers} layers, but "
                f"{first.member.reference!r} has {first.layout.num_layers}.",
                "Say which layers to merge with which, by `slices` with `layer_range`.",
            )
