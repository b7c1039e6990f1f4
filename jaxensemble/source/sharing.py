"""One class for many modules: which of their constants become arguments, and what those are called."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxensemble.network import Arg
from jaxensemble.source.frames import freeze
from jaxensemble.source.names import is_identifier, plain, unused
from jaxensemble.source.units import Argument, Definition, Place, Unit

_WIDTHS = ("in_features", "out_features", "num_features", "features")

_ABSENT = object()
"""What stands in a column where a module lacks the child that the place is in."""


class Sharing:
    """Sets the constants and arguments of a class from those of the modules it stands for.

    `hints` are what the holes of the body could be called. `values` are then the arguments' values, module by module.
    """

    def __init__(self, made: Definition, units: Sequence[Unit], hints: Sequence[str]):
        self.made = made
        self.units = units
        self.hints = hints
        self.columns: dict[str, list[Any]] = {}
        self.families: dict[str, str] = {}
        places = list(dict.fromkeys(place for unit in units for place in unit.constants))
        self._share_optional_children()
        for place in sorted(places, key=self._is_partial):
            self._share(place, places)
        flags = list(made.optional.values())
        made.arguments.sort(key=lambda argument: (not argument.required, argument in flags))

    @property
    def values(self) -> list[Mapping[str, Arg]]:
        return [{name: column[k] for name, column in self.columns.items()} for k in range(len(self.units))]

    def _share_optional_children(self) -> None:
        for child in self.made.make.keys:
            if any(child in unit.absent for unit in self.units):
                flag = Argument(unused(plain(child, "flag"), self.columns), required=False, default=False)
                self.columns[flag.name] = [child not in unit.absent for unit in self.units]
                self.made.arguments.append(flag)
                self.made.optional[child] = flag

    def _is_partial(self, place: Place) -> bool:
        return place[0] in self.made.optional

    def _share(self, place: Place, places: Sequence[Place]) -> None:
        column: list[Any] = [
            _ABSENT if place[0] in unit.absent else unit.constants.get(place, unit.defaults.get(place))
            for unit in self.units
        ]
        given = [value for value in column if value is not _ABSENT]
        same = len(set(map(freeze, given))) == 1
        argument = self._matching(place, column, same)
        if argument is None and same:
            self.made.constants[place] = given[0]
            return
        if argument is None:
            argument = self._new_argument(place, column, places)
        missing = [unit for unit in self.units if place[0] not in unit.absent and place not in unit.constants]
        if missing:
            argument.required, argument.default = False, missing[0].defaults[place]
        self.made.bound[place] = argument

    def _matching(self, place: Place, column: list[Any], same: bool) -> Argument | None:
        """An argument for the same sort of thing with these values. What never varies needs none."""
        if same and not self._is_partial(place):
            return None
        for argument in self.made.arguments:
            if argument in self.made.optional.values():
                continue
            held = self.columns[argument.name]
            if self.families[argument.name] != self._family(place):
                continue
            if all(value is _ABSENT or freeze(value) == freeze(own) for value, own in zip(column, held, strict=True)):
                return argument
        return None

    def _new_argument(self, place: Place, column: list[Any], places: Sequence[Place]) -> Argument:
        taken = {*self.columns, *self.made.make.keys}
        argument = Argument(self._name(place, column, places, taken), required=_ABSENT not in column)
        self.columns[argument.name] = [None if value is _ABSENT else value for value in column]
        self.families[argument.name] = self._family(place)
        self.made.arguments.append(argument)
        return argument

    def _family(self, place: Place) -> str:
        """What sort of thing a place holds: numbers of features are one sort, and so are the options of one name."""
        option = self.hints[int(place[1])] if place[0] == "" else place[-1]
        return "features" if option in _WIDTHS else option

    def _name(self, place: Place, column: list[Any], places: Sequence[Place], taken: set[str]) -> str:
        *owner, last = place
        short = plain(self.hints[int(last)] if owner == [""] else last, "size")
        if short == "in_features" and (*owner, "out_features") in places:
            out = [unit.constants.get((*owner, "out_features")) for unit in self.units]
            short = "features" if list(map(freeze, out)) == list(map(freeze, column)) else short
        if short not in taken and is_identifier(short):
            return short
        return unused(plain("_".join([*owner, short]), short), taken)
