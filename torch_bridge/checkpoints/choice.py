"""`Choice` of the set of weights in a checkpoint file, and of the way its names become the model's."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor

from jaxensemble.errors import InputError
from jaxensemble.network.sources import Selection
from torch_bridge.checkpoints.advice import CHOICE_ADVICE, describe_content, quote_value, several_error
from torch_bridge.checkpoints.expected import Expected
from torch_bridge.checkpoints.readings import Reading, distinct_readings, has_model_shapes, possible_renamings
from torch_bridge.checkpoints.sets import (
    WeightSet,
    children_by_key,
    find_places,
    group_by_pattern,
    keys_beside,
    name_beginnings,
    weight_sets,
)
from torch_bridge.state_dicts.matching import longest_beginning, rename_beginning

_LISTED = 10
"""Most ways to read a file that an error lists: a layer may fit in a thousand places."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """Choice of the set of weights in a checkpoint file, and of the way its names become the model's.

    Without any argument there must be exactly one way to read a file. One dict in it has a tensor of the right shape
    for every name of the model, without a prefix or with `module.`, `_orig_mod.`, `model.`, `net.` and `ema_model.`,
    alone or one after another. No other tensors in the file could be the model's weights, by their shapes. (States of
    optimizers are not searched, and numpy arrays are not read.) With such a prefix, the dict may also have names
    without it, for example of a loss or a counter. Without a prefix, all names must be the model's.
    `Selection.left_out` lists everything that is left out.

    - `key`: the key of the set of weights in the file, with dots between the keys of nested dicts: `"ema.state_dict"`.
      The empty key is the file itself, not a dict within it.
    - `prefix`: the prefix that is removed from every name: `"net."`. A name without it is an error, unless the name is
      ignored. The empty prefix removes nothing.
    - `rename`: names, or beginnings of names up to a dot, with their replacements after the prefix is removed:
      `{"fc": "head"}` makes `head.weight` of `fc.weight`. The longest beginning that fits counts. Every name has the
      empty beginning: `{"": "net"}` puts `net.` before all names.
    - `ignore`: patterns (of `fnmatch`) of names in the file that are left out: `["head.*"]`.

    >>> import torch
    >>> weight, bias = torch.ones(2, 3), torch.ones(2)
    >>> loaded = {
    ...     "model": {"weight": weight, "bias": bias},
    ...     "ema": {"updates": 3, "weights": {"net.fc.weight": weight, "net.fc.bias": bias, "steps": torch.ones(1)}},
    ... }
    >>> choice = Choice("ema.weights", prefix="net.", rename={"fc": ""}, ignore=("step*",))
    >>> tensors, taken = choice.take(loaded, Expected.of(torch.nn.Linear(3, 2)))
    >>> list(tensors)
    ['weight', 'bias']
    >>> print(taken)
    taken from `ema.weights`; prefix `net.` removed; `fc` removed; left out: `model`, `ema.updates`, `step*`
    """

    key: str | None = None
    prefix: str | None = None
    rename: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignore: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Checks the types of all fields.

        **Raises:** `InputError` for fields of other types.
        """
        for name in ("key", "prefix"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"`{name}` must be a str or None; got {getattr(self, name)!r:.100}")
        if not isinstance(self.rename, Mapping) or not _are_texts([*self.rename, *self.rename.values()]):
            raise InputError(
                f"`rename` must be a dict of new names by old ones, {{'fc': 'head'}}; got {self.rename!r:.100}"
            )
        if isinstance(self.ignore, str) or not isinstance(self.ignore, Sequence) or not _are_texts(self.ignore):
            raise InputError(f"`ignore` must be a list of patterns of names, ['head.*']; got {self.ignore!r:.100}")
        without_dots = {old.removesuffix("."): new.removesuffix(".") for old, new in self.rename.items()}
        object.__setattr__(self, "rename", without_dots)

    def take(self, loaded: Any, expected: Expected | None) -> tuple[dict[str, Tensor], Selection]:
        """Returns the chosen tensors by the model's names, and the selection that gave them.

        If no set of weights fits the model, the tensors are of the nearest set. Without `expected`, nothing is known of
        the model, and there must be one set of weights.

        **Raises:** `InputError` unless there is exactly one way to read the file, with the arguments that choose one.
        """
        sets = self._find_sets(loaded)
        named = [weights for weights in sets if weights.named]
        if expected is None or not expected.tensors:
            if len(named) > 1:
                raise several_error([f"key={quote_value(weights.key)}" for weights in named])
            reading = self._read(named[0], self.prefix or "")
        else:
            readings = self._readings(named, expected)
            fitting = distinct_readings((reading for reading in readings if reading.fits(expected)), expected)
            only = fitting[0] if len(fitting) == 1 else None
            elsewhere = self._places_elsewhere(only, sets, expected) if only else []
            within = self._places_within(only, expected) if only else []
            if len(fitting) > 1 or elsewhere or within:
                raise several_error(self._list_ways(fitting, elsewhere, within, expected), more=len(fitting) - _LISTED)
            if fitting and self.prefix is None and not fitting[0].has_known_prefix:
                raise self._offer_error(fitting[0], expected)
            reading = fitting[0] if fitting else self._nearest(named, readings, expected)
        self._check_names(reading)
        return reading.tensors, self._describe_taken(loaded, reading, expected)

    def _find_sets(self, loaded: Any) -> list[WeightSet]:
        """Returns the sets of weights under the key.

        **Raises:** `InputError` if there are none.
        """
        found = find_places(loaded, self.key or "")
        sets = [weights for path, node in found for weights in weight_sets(node, path)]
        if self.key is not None:
            sets = [weights for weights in sets if weights.key == self.key] or (sets if self.key else [])
        if any(weights.named for weights in sets) and len(found) == 1:
            return sets
        known = [f"key={quote_value(weights.key)}" for weights in weight_sets(loaded) if weights.named]
        if len(found) > 1:
            raise InputError(f"has two places for key={quote_value(self.key or '')}: its keys have dots in them")
        if known:
            what = "no weights there" if found else "no such key"
            raise InputError(
                f"was to be read with key={quote_value(self.key or '')}, and has {what}; it has {', '.join(known)}"
            )
        held = children_by_key(loaded) if isinstance(loaded, Mapping) else {}
        contents = ",".join(f"\n  {name!r}: {describe_content(child)}" for name, child in held.items())
        raise InputError(
            f"must hold a state dict; got {describe_content(loaded)}{contents and ', which are' + contents}.\n"
            "Where its code is at hand, save the weights alone: torch.save(model.state_dict(), path)"
        )

    def _readings(self, sets: Iterable[WeightSet], expected: Expected) -> list[Reading]:
        """Returns the ways to read the sets: with the prefix, or with each prefix that gives a name of the model."""
        if self.prefix is not None:
            return [self._read(weights, self.prefix) for weights in sets]
        found = []
        for weights in sets:
            under: dict[str, dict[str, str]] = {"": {}}
            under |= {lead: {} for lead, new, _ in self._split_names(weights) if new in expected.tensors}
            for lead, new, name in self._split_names(weights):
                if lead in under:
                    under[lead][new] = name
            found += [Reading(weights, lead, names) for lead, names in under.items()]
        return found

    def _split_names(self, weights: WeightSet) -> Iterator[tuple[str, str, str]]:
        """Yields every beginning of every name, the new name of the rest, and the name."""
        for name in self._kept_names(weights):
            for lead in name_beginnings(name):
                yield lead, rename_beginning(name[len(lead) :], self.rename), name

    def _read(self, weights: WeightSet, prefix: str) -> Reading:
        carrying = (name for name in self._kept_names(weights) if name.startswith(prefix))
        return Reading(weights, prefix, {rename_beginning(name[len(prefix) :], self.rename): name for name in carrying})

    def _kept_names(self, weights: WeightSet) -> list[str]:
        return [name for name in weights.tensors if not any(fnmatchcase(name, pattern) for pattern in self.ignore)]

    def _places_elsewhere(self, reading: Reading, sets: Iterable[WeightSet], expected: Expected) -> list[str]:
        """Returns other places with tensors that could be the model's weights: in one dict, or in all below a key."""
        below: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
        for weights in sets:
            for depth in range(len(weights.path) + 1) if weights is not reading.weights else ():
                below[weights.path[:depth]] += [weights.tensors[name] for name in self._kept_names(weights)]
        found = [path for path, tensors in below.items() if has_model_shapes(tensors, expected)]
        around = {path[:depth] for path in found for depth in range(len(path))}
        return [_place_key(path, reading) for path in found if path not in around]

    def _places_within(self, reading: Reading, expected: Expected) -> list[str]:
        """Returns groups of names without the prefix, in the same dict, whose tensors could be the model's weights."""
        without = self._names_without_prefix(reading) if self.prefix is None else []
        groups = group_by_pattern(without, reading.names.values())
        groups = {**groups, f"names without `{reading.prefix}`": without} if len(groups) > 1 else groups
        tensors = reading.weights.tensors
        found = [
            group for group, names in groups.items() if has_model_shapes((tensors[name] for name in names), expected)
        ]
        return found[:-1] or found  # all names together only where no single group has the shapes

    def _names_without_prefix(self, reading: Reading) -> list[str]:
        """Returns the names in a set of weights that do not begin with the prefix."""
        return [name for name in self._kept_names(reading.weights) if not name.startswith(reading.prefix)]

    def _list_ways(
        self, fitting: Sequence[Reading], elsewhere: Sequence[str], within: Sequence[str], expected: Expected
    ) -> list[str]:
        """Returns the arguments for each way to read the file, one by one."""
        count = Counter(reading.weights.key for reading in fitting)
        return [
            self._arguments(
                reading,
                expected,
                key=len(count) > 1 or bool(elsewhere),
                prefix=bool(within) or count[reading.weights.key] > 1 or not reading.has_known_prefix,
            )
            for reading in fitting[:_LISTED]
        ] + [f"{other} (by shapes: its names are not the model's)" for other in (*elsewhere, *within)]

    def _arguments(self, reading: Reading, expected: Expected, *, key: bool, prefix: bool) -> str:
        """Returns the arguments with which a file is read in this way only."""
        used = set(reading.used_names(expected).values())
        unused = group_by_pattern([name for name in self._kept_names(reading.weights) if name not in used], used)
        given = [f"key={quote_value(reading.weights.key)}"] if key or self.key is not None else []
        if prefix:
            given += [f"prefix={quote_value(reading.prefix)}"]
            given += [f"ignore={quote_value([*self.ignore, *unused])}"] if unused else []
        return ", ".join(given)

    def _offer_error(self, reading: Reading, expected: Expected) -> InputError:
        many, whole = reading.count_matches(expected), len(expected.tensors)
        where = f"begin with `{reading.prefix}` there" if reading.prefix else "have no prefix there"
        return InputError(
            f"has {'all' if many == whole else many} of the {whole} names of the model, "
            f"and they {where}. If these are the weights that are meant, read them with "
            f"{self._arguments(reading, expected, key=False, prefix=True)}.\n{CHOICE_ADVICE}"
        )

    def _nearest(self, named: Sequence[WeightSet], readings: Sequence[Reading], expected: Expected) -> Reading:
        """Returns the reading with the most names of the model, when none fits.

        **Raises:** `InputError` if other arguments give more names of the model, or if several sets give as many.
        """
        mine = [reading for reading in readings if self.prefix is not None or reading.has_known_prefix]
        count = lambda reading: reading.count_matches(expected)  # noqa: E731
        best = max(mine, key=count)
        any_best = max(dataclasses.replace(self, prefix=None)._readings(named, expected), key=count)
        if count(any_best) > count(best) and 2 * count(any_best) >= len(expected.tensors):
            raise self._offer_error(any_best, expected)
        for rename in possible_renamings(best.names, expected):
            if rename and expected.suffices(rename_beginning(name, rename) for name in best.names):
                raise InputError(
                    "has names that are the model's, except for parts before or within them. If these are the weights "
                    f"that are meant, read them with rename={quote_value({**self.rename, **rename})}.\n{CHOICE_ADVICE}"
                )
        if len({reading.weights.key for reading in mine if count(reading) == count(best)}) > 1:
            rows = [f"key={quote_value(weights.key)} ({len(weights.tensors)} tensors)" for weights in named]
            raise several_error(rows, "and none has all names and shapes of the model")
        return best

    def _check_names(self, reading: Reading) -> None:
        """Checks that all names have the prefix, and that no two become the same name.

        **Raises:** `InputError` if names do not.
        """
        without = self._names_without_prefix(reading) if self.prefix is not None else []
        if without:
            patterns = group_by_pattern(without, reading.names.values())
            raise InputError(
                f"has names that do not begin with `{reading.prefix}`: {', '.join(patterns)}. To leave them out, add "
                f"ignore={quote_value([*self.ignore, *patterns])}.\n{CHOICE_ADVICE}"
            )
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._kept_names(reading.weights):
            if name.startswith(reading.prefix):
                found[rename_beginning(name[len(reading.prefix) :], self.rename)].append(name)
        twice = [f"{' and '.join(names)} both become {new}" for new, names in found.items() if len(names) > 1]
        if twice:
            raise InputError(
                f"has names that `rename` makes one: {'; '.join(twice)}. Change `rename`, or ignore all but one"
            )

    def unused(self, taken: Sequence[Selection]) -> list[str]:
        """Returns the entries of `rename` and `ignore` that matched no name in any of the files."""
        renamed_names = {old for each in taken for old in each.renamed}
        left_out = {name for each in taken for name in each.left_out}
        return [f"rename={quote_value({old: new})}" for old, new in self.rename.items() if old not in renamed_names] + [
            f"ignore={quote_value([pattern])}" for pattern in self.ignore if pattern not in left_out
        ]

    def _describe_taken(self, loaded: Any, reading: Reading, expected: Expected | None) -> Selection:
        names = list(reading.weights.tensors)
        rest = [name[len(reading.prefix) :] for name in reading.names.values()]
        used = {old for name in rest if (old := longest_beginning(name, self.rename)) is not None}
        ignored = [pattern for pattern in self.ignore if any(fnmatchcase(name, pattern) for name in names)]
        without = group_by_pattern(self._names_without_prefix(reading), reading.names.values())
        left_out = (*keys_beside(loaded, reading.weights.path), *ignored, *without)
        lacking = expected.missing_names(reading.names) if expected else ()
        return Selection(
            reading.weights.key,
            reading.prefix,
            {old: new for old, new in self.rename.items() if old in used},
            left_out,
            tuple(key for key in lacking if expected and key in expected.counters),
        )


def _place_key(path: tuple[str, ...], reading: Reading) -> str:
    key = f"key={quote_value('.'.join(path))}"
    around = path == reading.weights.path[: len(path)]
    return f"all else in {key if path else 'the file'}" if around else key


def _are_texts(values: Collection[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
