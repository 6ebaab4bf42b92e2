"""The tensors of a merge's result: of which tensors of the models each is made, and with what values."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from aidocks.errors import IncompatibleModels
from aidocks.merge.ends import Head, is_vocabulary
from aidocks.merge.layers import interpolation, ordered_union
from aidocks.merge.members import Member
from aidocks.merge.method import Method, Value
from aidocks.merge.parameters import WeightSums, find_value, missing_value
from aidocks.merge.recipe import Operand, TensorMerge
from aidocks.merge.slices import Input, Slice

#: Types that methods compute with; tensors of any other are copied.
FLOATS = ("F16", "BF16", "F32", "F64")
_POLICY_HINT = (
    "Say what the result's vocabulary is: `tokenizer: {source: union}` (the tokens of all models) or "
    "`tokenizer: {source: base}`."
)


class TensorPlanner:
    """Plans tensors.

    Args:
        method: The merge's.
        places: Reference of a model -> its position among the sources.
        template: The model whose types the result has, where the request says none.
        dtype: Type of the result, in safetensors' spelling; None for that of the template.
        rows: Of the result's vocabulary; None where it stays what it is.

    Attributes:
        vocabulary: Names of the tensors whose rows are the vocabulary.
    """

    def __init__(
        self,
        method: Method,
        places: Mapping[str, int],
        template: Member,
        dtype: str | None,
        rows: int | None,
    ) -> None:
        self.vocabulary: set[str] = set()
        self._method, self._places, self._template = method, places, template
        self._dtype, self._rows = dtype, rows
        self._sums = WeightSums(method)

    def plan(self, slices: Sequence[Slice], head: Head) -> Iterator[TensorMerge]:
        """Yield the tensors of the result in the order of its files.

        Raises:
            InvalidSpec: For a parameter without a value, or weights that cannot be divided by.
            IncompatibleModels: For tensors that one of the models lacks, or that differ in shape.
        """
        yield from self._outside(slices[0], lambda given: given.layout.before, head)
        if slices[0].length is None:
            yield from self._all_lists(slices[0])
        else:
            yield from self._other_lists(slices[0])
            yield from self._slices(slices)
        yield from self._outside(slices[-1], lambda given: given.layout.after, head)
        yield from self._head(slices[-1], head)

    def notes(self) -> list[str]:
        """Return what one should know of the values."""
        return self._sums.notes()

    def _outside(
        self, part: Slice, names: Callable[[Input], Sequence[str]], head: Head
    ) -> Iterator[TensorMerge]:
        listed = [[name for name in names(given) if name not in head.stored] for given in part.inputs]
        for name in _shared(part, listed, lambda _, name: name):
            is_rows = any(is_vocabulary(given.member, name) for given in part.inputs)
            yield self._tensor(name, part, [name] * len(part.inputs), 0.0, is_vocabulary=is_rows)

    def _head(self, part: Slice, head: Head) -> Iterator[TensorMerge]:
        if head.name is None:
            return
        names = [head.tensors[given.member.reference] for given in part.inputs]
        for given, name in zip(part.inputs, names, strict=True):
            if name not in given.member.named:
                raise given.member.refuse(
                    f"The model {given.member.reference!r} has no tensor {name}, which other models have, and its "
                    "head is not its embedding (tie_word_embeddings)."
                )
        yield self._tensor(head.name, part, names, 0.0, is_vocabulary=True)

    def _all_lists(self, part: Slice) -> Iterator[TensorMerge]:
        for prefix in ordered_union(
            [[found.prefix for found in given.layout.lists] for given in part.inputs]
        ):
            lists = [
                next((found.layers for found in given.layout.lists if found.prefix == prefix), ())
                for given in part.inputs
            ]
            length = max(map(len, lists))
            for layer in range(length):
                rests = [layers[layer] if layer < len(layers) else () for layers in lists]
                names = [f"{prefix}{layer}."] * len(part.inputs)
                yield from self._layer(part, rests, names, names[0], interpolation(layer, length))

    def _other_lists(self, part: Slice) -> Iterator[TensorMerge]:
        """Yield what is in lists that are no language model's layers: the first slice's models give it."""
        listed = [
            [
                found.name(layer, rest)
                for found in given.layout.lists
                if found is not given.layout.main
                for layer, rests in enumerate(found.layers)
                for rest in rests
            ]
            for given in part.inputs
        ]
        for name in _shared(part, listed, lambda _, name: name):
            yield self._tensor(name, part, [name] * len(part.inputs), 0.0)

    def _slices(self, slices: Sequence[Slice]) -> Iterator[TensorMerge]:
        main = slices[0].inputs[0].layout.main
        assert main is not None, "what cannot be sliced was refused"
        number = 0
        for part in slices:
            length = part.length or 0
            for layer in range(length):
                rests, names = [], []
                for given in part.inputs:
                    found = given.layout.main
                    assert found is not None, "what cannot be sliced was refused"
                    rests.append(found.layers[given.first + layer])
                    names.append(f"{found.prefix}{given.first + layer}.")
                yield from self._layer(
                    part, rests, names, f"{main.prefix}{number}.", interpolation(layer, length)
                )
                number += 1

    def _layer(
        self,
        part: Slice,
        rests: Sequence[Sequence[str]],
        names: Sequence[str],
        name: str,
        t: float,
    ) -> Iterator[TensorMerge]:
        for rest in _shared(part, rests, lambda number, rest: names[number] + rest):
            yield self._tensor(name + rest, part, [begin + rest for begin in names], t)

    def _tensor(
        self, name: str, part: Slice, tensors: Sequence[str], t: float, *, is_vocabulary: bool = False
    ) -> TensorMerge:
        stored = [given.member.named[tensor] for given, tensor in zip(part.inputs, tensors, strict=True)]
        operands = tuple(
            Operand(source=self._places[given.member.reference], tensor=given.member.own_name(tensor))
            for given, tensor in zip(part.inputs, tensors, strict=True)
        )
        if is_vocabulary:
            self.vocabulary.add(name)
        shape = self._shape(name, part, tensors, is_vocabulary)
        leader = self._leader(part)
        if any(found.dtype not in FLOATS for found in stored):
            self._require_one_type(name, part, [found.dtype for found in stored])
            order = (operands[leader], *operands[:leader], *operands[leader + 1 :])
            return TensorMerge(name=name, dtype=stored[leader].dtype, shape=shape, operands=order)
        return TensorMerge(
            name=name,
            dtype=self._dtype or stored[leader].dtype,
            shape=shape,
            operands=operands,
            base=part.base,
            method=self._method.name,
            values=self._values(name, part, tensors, t),
        )

    def _leader(self, part: Slice) -> int:
        """Return the input that says what the request does not: the base, or else the first."""
        references = [given.member.reference for given in part.inputs]
        return references.index(self._template.reference) if self._template.reference in references else 0

    def _values(
        self, name: str, part: Slice, tensors: Sequence[str], t: float
    ) -> dict[str, Value | tuple[Value, ...]]:
        values: dict[str, Value | tuple[Value, ...]] = {}
        for parameter in self._method.parameters:
            if parameter.scope == "tensor":
                value = find_value(parameter, part.settings, name, t)
                if value is None:
                    raise missing_value(self._method, parameter, part.settings, name)
                values[parameter.name] = value
                continue
            each = []
            for number, (given, tensor) in enumerate(zip(part.inputs, tensors, strict=True)):
                if parameter.scope == "model" and number == part.base:
                    continue
                levels = (given.settings, *part.settings)
                value = find_value(parameter, levels, tensor, t)
                if value is None:
                    raise missing_value(self._method, parameter, levels, tensor, given.member.reference)
                each.append(value)
            values[parameter.name] = tuple(each)
        self._method.require_possible(values)
        self._sums.add(name, values, f"{part.models[0].settings.field}.weight")
        return values

    def _shape(self, name: str, part: Slice, tensors: Sequence[str], is_vocabulary: bool) -> tuple[int, ...]:
        """Return the shape of a tensor of the result.

        Raises:
            IncompatibleModels: The models' differ.
        """
        leader = self._leader(part)
        first = part.inputs[leader].member
        shape = first.named[tensors[leader]].shape
        renewed = is_vocabulary and self._rows is not None
        for given, tensor in zip(part.inputs, tensors, strict=True):
            other = given.member.named[tensor].shape
            if other == shape or (renewed and other[1:] == shape[1:]):
                continue
            is_rows = is_vocabulary and other[1:] == shape[1:]
            raise IncompatibleModels(
                f"{tensor} is {list(other)} in {given.member.reference!r}, but {list(shape)} in {first.reference!r}"
                f"{': their vocabularies differ in size' if is_rows else ''}.",
                field=given.member.field,
                value=given.member.reference,
                hint=_POLICY_HINT if is_rows else "Models that are merged have the same shape.",
            )
        return (self._rows, *shape[1:]) if renewed and self._rows is not None else shape

    def _require_one_type(self, name: str, part: Slice, types: Sequence[str]) -> None:
        for given, dtype in zip(part.inputs, types, strict=True):
            if dtype != types[0]:
                raise given.member.refuse(
                    f"{name} is {dtype} in {given.member.reference!r}, but {types[0]} in "
                    f"{part.inputs[0].member.reference!r}; what is not of floating point is copied, and has to be the "
                    "same."
                )


def _shared(part: Slice, listed: Sequence[Sequence[str]], full: Callable[[int, str], str]) -> Iterator[str]:
    """Yield the names that all inputs of a slice have.

    Args:
        part: The slice.
        listed: Names of every input, without what differs between inputs.
        full: Position of an input and such a name -> its tensor.

    Raises:
        IncompatibleModels: Some inputs lack one.
    """
    sets = [set(names) for names in listed]
    for name in ordered_union(listed):
        lacking = next((number for number, names in enumerate(sets) if name not in names), None)
        if lacking is None:
            yield name
            continue
        having = next(number for number, names in enumerate(sets) if name in names)
        without, other = part.inputs[lacking].member, part.inputs[having].member
        blamed = without if lacking else other
        raise blamed.refuse(
            f"The model {without.reference!r} has no tensor {full(lacking, name)}; {other.reference!r} has "
            f"{full(having, name)}.",
            "Models that are merged have the same tensors.",
        )
