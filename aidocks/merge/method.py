"""What a merge method is, and the ones that there are."""

from __future__ import annotations

import importlib
import keyword
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points
from math import inf, isfinite
from typing import TYPE_CHECKING, Any, Literal

from aidocks.errors import InvalidSpec

if TYPE_CHECKING:
    from aidocks.merge.inputs import Inputs, Merged

#: What a request may give as the value of a parameter.
Value = float | int | bool | str
#: Whose parameter it is: one for the tensor, one for every model but the base, one for every input.
Scope = Literal["tensor", "model", "input"]
#: Whether a method has a base: it must, it may, it treats it like any other model.
BasePolicy = Literal["required", "optional", "none"]

_TRUE = ("true", "yes", "on", "y", "t", "1")
_FALSE = ("false", "no", "off", "n", "f", "0")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        name: As a request writes it.
        kind: Its type.
        default: None where there is none, and it has to be given.
        scope: Whose it is.
        at_least: Smallest value of a number.
        at_most: Largest value of a number.
        description: For people.
    """

    name: str
    kind: type[float] | type[int] | type[bool]
    default: Value | None = None
    scope: Scope = "tensor"
    at_least: float | None = None
    at_most: float | None = None
    description: str = ""

    @property
    def argument(self) -> str:
        """The name of the function's argument: with an underscore where Python uses the word (``lambda_``)."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name

    def checked(self, given: Any, field: str) -> Value:
        """Return a value in the parameter's type: numbers as texts, and words for truth values, are understood.

        Args:
            given: What was given.
            field: Where, for the error.

        Raises:
            InvalidSpec: It is of another type, not finite, or out of range; says what would be right.
        """
        value = self._truth(given) if self.kind is bool else self._number(given)
        low = -inf if self.at_least is None else self.at_least
        high = inf if self.at_most is None else self.at_most
        if value is None or not low <= value <= high:
            raise InvalidSpec(
                f"{self.name!r} must be {self.allowed}.",
                field=field,
                value=given,
                hint=self.description or None,
            )
        return value

    def _truth(self, given: Any) -> bool | None:
        text = str(given).strip().lower().removesuffix(".0")
        return True if text in _TRUE else False if text in _FALSE else None

    def _number(self, given: Any) -> float | int | None:
        # To Python a truth value is an integer, and to people it is not. YAML reads 1e-5, without a point, as a text.
        if isinstance(given, bool) or not isinstance(given, int | float | str):
            return None
        try:
            number = float(given)
        except (ValueError, OverflowError):
            return None
        if not isfinite(number):
            return None
        if self.kind is int:
            return int(number) if number.is_integer() else None
        return number

    @property
    def allowed(self) -> str:
        """What its values are, for people: ``a number from 0 to 1``."""
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[self.kind]
        if self.at_least is not None and self.at_most is not None:
            return f"{kind} from {self.at_least:g} to {self.at_most:g}"
        if self.at_least is not None:
            return f"{kind} of at least {self.at_least:g}"
        return f"{kind} of at most {self.at_most:g}" if self.at_most is not None else kind


@dataclass(frozen=True)
class Method:
    """A merge method.

    Attributes:
        name: As a request writes it.
        function: Called with the inputs of a tensor and, by name, the parameters: those of scope ``tensor`` as they
            are, the others as a tuple in the order of the models or inputs. Returns the merged tensor.
        parameters: In the order in which people read them.
        base: Whether it has a base.
        models: Smallest and largest number of models, the base not counted (with ``base="none"``: of inputs).
            None for no limit.
        is_random: Whether it draws random numbers.
        ignored: Names of parameters that others know, or that it once had, and that have no effect here.
        check: Called with the parameters as the function is; raises InvalidSpec for values that do not go together.
        summary: First line of its docstring.
    """

    name: str
    function: Callable[..., Merged]
    parameters: tuple[Parameter, ...] = ()
    base: BasePolicy = "none"
    models: tuple[int, int | None] = (1, None)
    is_random: bool = False
    ignored: tuple[str, ...] = ()
    check: Callable[..., None] | None = None
    summary: str = ""

    def require_possible(self, values: Mapping[str, Any]) -> None:
        """Raise InvalidSpec for values, each of them allowed, that do not go together."""
        if self.check is not None:
            self.check(**self._arguments(values))

    def apply(self, inputs: Inputs, values: Mapping[str, Any]) -> Merged:
        """Return the merged tensor in blocks; ``values`` holds every parameter by its name."""
        return self.function(inputs, **self._arguments(values))

    def _arguments(self, values: Mapping[str, Any]) -> dict[str, Any]:
        return {parameter.argument: values[parameter.name] for parameter in self.parameters}


_methods: dict[str, Method] = {}


def merge_method(
    name: str,
    *parameters: Parameter,
    base: BasePolicy = "none",
    models: tuple[int, int | None] = (1, None),
    is_random: bool = False,
    ignored: tuple[str, ...] = (),
    check: Callable[..., None] | None = None,
) -> Callable[[Callable[..., Merged]], Callable[..., Merged]]:
    """Make a function a merge method that requests can name; see :class:`Method`."""

    def register(function: Callable[..., Merged]) -> Callable[..., Merged]:
        summary = (function.__doc__ or "").strip().partition("\n")[0]
        _methods[name] = Method(name, function, parameters, base, models, is_random, ignored, check, summary)
        return function

    return register


def find_method(name: str, *, field: str | None = "merge_method") -> Method:
    """Return the method of a name.

    Raises:
        InvalidSpec: There is none; lists those that there are, and the closest.
    """
    methods = known_methods()
    if name not in methods:
        close = get_close_matches(name, methods, n=1)
        raise InvalidSpec(
            f"There is no merge method {name!r}.",
            field=field,
            value=name,
            hint=(f"Did you mean {close[0]!r}? " if close else "") + f"Methods: {', '.join(methods)}.",
        )
    return methods[name]


@cache
def known_methods() -> Mapping[str, Method]:
    """Return all methods by name: ours, and those of packages that declare an entry point `aidocks.merge_methods`."""
    package = importlib.import_module("aidocks.merge.methods")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for point in entry_points(group="aidocks.merge_methods"):
        point.load()
    return dict(sorted(_methods.items()))
