"""One class for many modules: the constants that become arguments, and the names of the arguments."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxensemble.network.vocabulary import is_identifier
from jaxensemble.source.names import make_identifier, unused_name
from jaxensemble.source.plan.definitions import (
    IDENTITY,
    RESIDUAL,
    Argument,
    Condition,
    ConstantValue,
    Definition,
    Formula,
    Function,
    HalfKernel,
    Place,
    ScaledArgument,
    ShapeItems,
    Unit,
)
from jaxensemble.source.plan.segments import hole_numbers
from jaxensemble.source.read.frames import comparison_key
from jaxensemble.source.read.steps import ToName

_WIDTHS = ("in_features", "out_features", "num_features", "features")

_HOLES = {"reshape": "size", "zeros": "shape", "ones": "shape", "einsum": "subscripts"}
"""Names of numbers and options that have no name except the name of the function that takes them."""

_ACTIVATIONS = frozenset({*dir(jax.nn), "soft_shrink", "threshold"})
"""The names of functions that may be called activations if they differ."""

_FACTORS = range(2, 9)
"""Factors by which a number of features may differ from another one to be written as its multiple or part."""

_ABSENT = object()
"""The value in a column for a module that lacks the child in which the place is."""


class Sharing:
    """Sets the constants and arguments of a class from the constants of its modules.

    `hints` are possible names of the holes of the body. `values` are the arguments' values, module by module.
    """

    def __init__(self, made: Definition, units: Sequence[Unit], hints: Sequence[str]):
        self.made = made
        self.units = units
        self.hints = hints
        self.columns: dict[str, list[Any]] = {}
        self.families: dict[str, str] = {}
        self.flags: list[Argument] = []
        spans = sorted({span for unit in units for span in unit.skipped})
        self.span_of = {str(hole): span for span in spans for hole in hole_numbers((made.steps or ())[slice(*span)])}
        places = list(dict.fromkeys(place for unit in units for place in unit.constants))
        self._share_optional_children()
        self._share_segments(spans)
        for place in sorted(places, key=self._is_partial):
            self._share(place, places)
        self._derive_flags()
        made.arguments.sort(key=lambda argument: (not argument.required, argument in self.flags))

    @property
    def values(self) -> list[Mapping[str, ConstantValue]]:
        return [{name: column[k] for name, column in self.columns.items()} for k in range(len(self.units))]

    def _share_optional_children(self) -> None:
        for child in (*self.made.recipe.keys, RESIDUAL):
            if any(child in unit.absent for unit in self.units):
                wanted = self.made.residual if child == RESIDUAL else make_identifier(child, "flag")
                self.made.optional[child] = self._flag(wanted, [child not in unit.absent for unit in self.units])

    def _flag(self, wanted: str, column: list[Any]) -> Argument:
        flag = Argument(unused_name(wanted, self.columns), required=False, default=False)
        self.columns[flag.name] = column
        self.made.arguments.append(flag)
        self.flags.append(flag)
        return flag

    def _share_segments(self, spans: Sequence[tuple[int, int]]) -> None:
        """Sets the condition of steps: the presence of an optional child within them, or else a flag."""
        for span in spans:
            column = [span not in unit.skipped for unit in self.units]
            known = {name: flag for name, flag in self.made.optional.items() if name != RESIDUAL} | self.made.flags
            found = [name for name, flag in known.items() if self._is_flag_of(flag, column)]
            if found:
                self.made.segments[span] = found[0]
            else:
                taken = {*self.columns, *self.made.recipe.keys, self.made.residual}
                flag = self._flag(unused_name(self._segment_name(span), taken), column)
                self.made.segments[span] = flag.name
                self.made.flags[flag.name] = flag

    def _is_flag_of(self, flag: object, column: list[Any]) -> bool:
        return isinstance(flag, Argument) and self.columns[flag.name] == column

    def _segment_name(self, span: tuple[int, int]) -> str:
        """Returns a name for steps: the child or function that they call, a rearrangement only if there is no other."""
        targets = [step.target for step in (self.made.steps or ())[slice(*span)]]
        names = [t.name.rpartition(".")[2] if isinstance(t, ToName) else t.path[-1] for t in targets]
        names = [make_identifier(name, "") for name in names if name not in ("reshape", "[]")]
        return next(filter(None, names), "reshape")

    def _is_partial(self, place: Place) -> bool:
        return any(self._is_absent(place, unit) for unit in self.units)

    def _is_absent(self, place: Place, unit: Unit) -> bool:
        """Returns whether a module lacks the child, or skips the step, in which a place is."""
        return self.span_of.get(place[1]) in unit.skipped if place[0] == "" else place[0] in unit.absent

    def _column(self, place: Place) -> list[Any]:
        return [
            _ABSENT if self._is_absent(place, unit) else unit.constants.get(place, unit.defaults.get(place))
            for unit in self.units
        ]

    def _share(self, place: Place, places: Sequence[Place]) -> None:
        column = self._column(place)
        given = [value for value in column if value is not _ABSENT]
        same = len(set(map(comparison_key, given))) == 1
        missing = [u for u in self.units if not self._is_absent(place, u) and place not in u.constants]
        found = self._matching_argument(self._family(place), column, same and not self._is_partial(place))
        if found is None and same:
            self.made.constants[place] = given[0]
            return
        if found is None and place[-1] == "padding":
            found = self._half_kernel(place, column)
        if found is None and not missing:
            found = self._derive(place, column)
        if found is None:
            found = self._new_argument(place, column, places)
        if missing and isinstance(found, Argument):
            found.required, found.default = False, missing[0].defaults[place]
        elif isinstance(found, Argument) and IDENTITY in given:
            found.required, found.default = False, IDENTITY
        self.made.formulas[place] = found

    def _matching_argument(self, family: str, column: list[Any], needless: bool = False) -> Argument | None:
        """Returns an argument of the same family with these values; None if `needless`: the values never vary."""
        if needless:
            return None
        for argument in self.made.arguments:
            if argument in self.flags:
                continue
            held = self.columns[argument.name]
            if self.families[argument.name] != family:
                continue
            if all(
                value is _ABSENT or comparison_key(value) == comparison_key(own)
                for value, own in zip(column, held, strict=True)
            ):
                return argument
        return None

    def _derive(self, place: Place, column: list[Any]) -> Formula | None:
        """Returns a formula for the values of a place from numbers of features that are already arguments."""
        if place[0] == "":
            given = [value for value in column if value is not _ABSENT]
            is_length = self.hints[int(place[1])] == "reshape" and all(type(value) is int for value in given)
            return (self._matching_argument("features", column) or self._scaled_argument(column)) if is_length else None
        if place[-1] == "feature_group_count":
            own = (*place[:-1], "in_features")
            return self.made.formulas.get(own) if self._column(own) == column else None
        if place[-1] == "shape":
            return self._shape_items(column)
        return self._scaled_argument(column) if self._family(place) == "features" else None

    def _half_kernel(self, place: Place, column: list[Any]) -> HalfKernel | None:
        """Returns the padding of a convolution as half its kernel, if it always is. A kernel of one has the default."""
        own = (*place[:-1], "kernel_size")
        kernel = self.made.formulas.get(own)
        if not isinstance(kernel, Argument) or _ABSENT in column:
            return None
        sizes = [set(value) if isinstance(value, tuple) else {0} for value in self._column(own)]
        if any(len(size) > 1 for size in sizes):
            return None
        halves = [min(size) // 2 for size in sizes]
        pads = [0 if size == {1} and pad == "SAME" else pad for size, pad in zip(sizes, column, strict=True)]
        return HalfKernel(kernel) if pads == halves else None

    def _scaled_argument(self, column: list[Any]) -> ScaledArgument | None:
        """Returns the multiple or part of an argument that always equals these values."""
        for argument in self.made.arguments:
            if self.families.get(argument.name) != "features" or not argument.required:
                continue
            held = self.columns[argument.name]
            for factor in _FACTORS:
                for scaled in (ScaledArgument(argument, times=factor), ScaledArgument(argument, over=factor)):
                    pairs = zip(column, held, strict=True)
                    if all(value is _ABSENT or value == scaled.value_for(own) for value, own in pairs):
                        return scaled
        return None

    def _shape_items(self, column: list[Any]) -> ShapeItems | None:
        """Returns the lengths of a shape one by one, if each is a constant or follows from the arguments."""
        given = [value for value in column if value is not _ABSENT]
        items: list[Argument | ScaledArgument | int] = []
        for axis, length in enumerate(given[0]):
            lengths = [value if value is _ABSENT else value[axis] for value in column]
            if all(value[axis] == length for value in given):
                items.append(length)
                continue
            found = self._matching_argument("features", lengths) or self._scaled_argument(lengths)
            if found is None:
                return None
            items.append(found)
        return ShapeItems(tuple(items))

    def _new_argument(self, place: Place, column: list[Any], places: Sequence[Place]) -> Argument:
        taken = {*self.columns, *self.made.recipe.keys, self.made.residual}
        argument = Argument(self._name(place, column, places, taken), required=_ABSENT not in column)
        self.columns[argument.name] = [None if value is _ABSENT else value for value in column]
        self.families[argument.name] = self._family(place)
        self.made.arguments.append(argument)
        return argument

    def _family(self, place: Place) -> str:
        """Returns the family of a place: numbers of features are one family, and so are the options of one name."""
        option = self.hints[int(place[1])] if place[0] == "" else place[-1]
        return "features" if option in _WIDTHS else "activation" if option == "function" else option

    def _name(self, place: Place, column: list[Any], places: Sequence[Place], taken: set[str]) -> str:
        *owner, last = place
        short = make_identifier(
            _HOLES.get(self.hints[int(last)], self.hints[int(last)]) if owner == [""] else last, "size"
        )
        if short == "function" and all(isinstance(f, Function) and f.label in _ACTIVATIONS for f in column):
            short = "activation"
        if short == "in_features" and (*owner, "out_features") in places:
            out = [unit.constants.get((*owner, "out_features")) for unit in self.units]
            short = "features" if list(map(comparison_key, out)) == list(map(comparison_key, column)) else short
        if short not in taken and is_identifier(short):
            return short
        return unused_name(make_identifier("_".join([*owner, short]), short), taken)

    # Flags that follow from other arguments

    def _derive_flags(self) -> None:
        """Replaces flags by conditions on other arguments: `in_features != out_features` for a projection."""
        for flags in (self.made.optional, self.made.flags):
            for name, flag in [(name, flag) for name, flag in flags.items() if isinstance(flag, Argument)]:
                column = self.columns[flag.name]
                condition = self._condition(column) if flags is self.made.optional else self._presence(name, column)
                if condition is not None:
                    flags[name] = condition
                    self.made.arguments = [argument for argument in self.made.arguments if argument is not flag]
                    del self.columns[flag.name]

    def _presence(self, name: str, column: list[Any]) -> Condition | None:
        """Returns the condition under which steps are taken: that an argument of these steps is given."""
        spans = [span for span, flag_name in self.made.segments.items() if flag_name == name]
        own = [self.made.formulas.get(("", hole)) for hole, span in self.span_of.items() if span in spans]
        for (argument, default), given in reversed(self._presence_tests()):
            if argument in own and given == column:
                return Condition(((argument, default),), equal=False)
        return None

    def _condition(self, column: list[Any]) -> Condition | None:
        """Returns the condition that holds in exactly the modules whose flag is set: one comparison, or two."""
        tests = [*self._option_tests(), *self._size_tests()]
        single = [(test,) for test in reversed([*self._presence_tests(), *tests])]
        for group in [*single, *itertools.combinations(tests, 2)]:
            differs = [any(row) for row in zip(*(outcome for _, outcome in group), strict=True)]
            if differs == column or differs == [not value for value in column]:
                return Condition(tuple(pair for pair, _ in group), equal=differs != column)
        return None

    def _presence_tests(self) -> list[tuple[tuple[Argument, None], list[bool]]]:
        """Returns tests for the presence of options of parts that may be absent, the first option last."""
        options = [a for a in self.made.arguments if not a.required and a.default is None and a not in self.flags]
        return [((a, None), [value is not None for value in self.columns[a.name]]) for a in reversed(options)]

    def _option_tests(self) -> list[tuple[Any, list[bool]]]:
        """Returns tests for options that differ from their defaults."""
        options = [a for a in self.made.arguments if not a.required and a.default is not None and a not in self.flags]
        columns = [self.columns[option.name] for option in options]
        return [
            ((option, option.default), [comparison_key(value) != comparison_key(option.default) for value in column])
            for option, column in zip(options, columns, strict=True)
            if None not in column and option.default != IDENTITY
        ]

    def _size_tests(self) -> list[tuple[Any, list[bool]]]:
        """Returns tests for two numbers of features that differ."""
        sizes: list[tuple[Argument | ScaledArgument, list[Any]]] = [
            (argument, self.columns[argument.name])
            for argument in self.made.arguments
            if self.families.get(argument.name) == "features" and argument.required
        ]
        for own in self.made.formulas.values():
            if isinstance(own, ScaledArgument) and own.argument.required and all(own != known for known, _ in sizes):
                sizes.append((own, [own.value_for(value) for value in self.columns[own.argument.name]]))
        return [
            ((one, other), [a != b for a, b in zip(left, right, strict=True)])
            for (one, left), (other, right) in itertools.combinations(sizes, 2)
            if getattr(one, "argument", one) is not getattr(other, "argument", other)
        ]
