"""A method of targets: one object that says what a method is, and does what only it can do.

Everything that depends on the method asks the object: the configuration for its parameters and the
largest block, the teacher to select, the codec to encode and decode, the loss for the divergences
that it serves, the plan for its size. A new method is a file in targets/methods/ and a line in
targets/registered.py, or an entry point of another distribution:

    [project.entry-points.megadistill]
    "method.my_method" = "my_package:MY_METHOD"

where MY_METHOD is an instance of a `SparseMethod`. Its parameters are set in the configuration as
`targets.options: {name: value}`.

    Method         name, parameters, which losses it serves
    SparseMethod   the above, and: byte on disk, entries, select, codec, retruncation

Importing this costs no torch. `select` gets torch tensors, and imports torch itself.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from megadistill.errors import ConfigError
from megadistill.targets.registered import METHODS, own_sparse_names
from megadistill.targets.sparse import SparseTargets
from megadistill.targets.streams.symbols import SymbolReader, SymbolWriter

if TYPE_CHECKING:
    from megadistill.targets.distributions import Positions

FIRST_OUTSIDE_BYTE, LAST_BYTE = 128, 255
Values = Mapping[str, Any]  # a method's parameters, by name
Fields = dict[str, Any]  # of SparseTargets


class Method:
    """A method of targets.

    name           in `targets.method` and in recipes
    parameters     names of its parameters. For megadistill's own they are keys of `targets`
    sampled        whether weights are unbiased estimates of single probabilities. Such targets
                   serve only what is linear in the teacher's distribution, at their temperature
    cached         whether a cache can keep its targets
    whole_head     whether each rank needs the output projection of the whole vocabulary
    own_tokenizer  whether the teacher may have other tokens than the student
    """

    name: str
    parameters: tuple[str, ...] = ()
    sampled: bool = False
    cached: bool = False
    whole_head: bool = False
    own_tokenizer: bool = False

    @property
    def divergences(self) -> tuple[str, ...] | None:
        """Names of the divergences that the targets serve; None for all."""
        return ("forward_kl",) if self.sampled else None

    @property
    def serves_other_temperatures(self) -> bool:
        """Whether the loss may have another temperature than the targets."""
        return not self.sampled

    @property
    def serves_residual(self) -> bool:
        """Whether mass is left out that `loss.ground_truth_residual` can put on the true token."""
        return False

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys of `targets` that hold its parameters."""
        return self.parameters

    def read(self, targets: Any) -> dict[str, Any]:
        """Returns the parameters that the configuration's section `targets` sets.

        Raises ValueError for `targets.options` that the method does not have.
        """
        return self.chosen({name: getattr(targets, name) for name in self.keys}, targets.options)

    def chosen(self, named: Values, options: Values) -> dict[str, Any]:
        """Returns the method's parameters. named: all keys of `targets` by name.

        Raises ValueError for options that the method does not have.
        """
        if options:
            takes = " and ".join(f"targets.{name}" for name in self.parameters) or "no parameters"
            raise ValueError(
                f"{self.name} has no options, found {', '.join(options)}; it takes {takes}: leave "
                "them out"
            )
        return {name: named[name] for name in self.parameters}

    def recorded(self, recipe: Values) -> dict[str, Any]:
        """Returns the part of a recipe that holds the parameters."""
        return {name: recipe[name] for name in self.keys if name in recipe}

    def record(self, values: Values) -> dict[str, Any]:
        """Returns the recipe's fields for these parameters."""
        return dict(values)


class SparseMethod(Method):
    """A method that lists (token id, weight) for each position, and its encoding on disk.

    byte                 its number in encoded targets: 0 to 127 are megadistill's own, 128 to 255
                         are for other distributions
    defaults             values of `targets.options` that need not be set; another method's only
    has_heads            whether `SparseTargets.heads` is set
    adds_truth           whether `SparseTargets.truth_added` may be set
    reports_listed_mass  whether statistics have the mass of the listed ids (of the heads, if any)
    bytes_an_entry       estimate: encoded id and weight, at 128,000 ids
    bytes_per_position   estimate: what else is encoded for a position, with entropy and nll
    retruncated_by       the parameters by which targets are made smaller without the teacher
    grows_to             of these, the ones that grow, with the largest value; others shrink
    """

    byte: int
    defaults: Values = MappingProxyType({})
    cached = True
    has_heads: bool = False
    adds_truth: bool = False
    reports_listed_mass: bool = True
    bytes_an_entry: float = 4.0
    bytes_per_position: float = 4.0
    retruncated_by: tuple[str, ...] = ()
    grows_to: Mapping[str, float] = MappingProxyType({})

    @property
    def outside(self) -> bool:
        """Whether another distribution registers the method."""
        return self.byte >= FIRST_OUTSIDE_BYTE

    @property
    def needs_keys(self) -> bool:
        """Whether selecting draws, so that each position needs a key."""
        return self.sampled

    @property
    def serves_residual(self) -> bool:
        return not self.sampled

    @property
    def keys(self) -> tuple[str, ...]:
        return ("options",) if self.outside else self.parameters

    def chosen(self, named: Values, options: Values) -> dict[str, Any]:
        if not self.outside:
            return super().chosen(named, options)
        for name in options:
            if name not in self.parameters:
                near = difflib.get_close_matches(str(name), self.parameters, n=1)
                hint = f"did you mean {near[0]}?" if near else f"expected {self._takes()}"
                raise ValueError(f"{self.name} has no option {name!r}, {hint}")
        values = {**self.defaults, **options}
        missing = [name for name in self.parameters if name not in values]
        if missing:
            raise ValueError(f"{self.name} needs {', '.join(missing)}: set {missing[0]}")
        self.check({name: values[name] for name in self.parameters})
        return {name: values[name] for name in self.parameters}

    def _takes(self) -> str:
        return f"one of {', '.join(self.parameters)}" if self.parameters else "none"

    def check(self, values: Values) -> None:
        """Raises ValueError for values of `targets.options` that the method cannot use."""

    def recorded(self, recipe: Values) -> dict[str, Any]:
        return dict(recipe.get("options", {})) if self.outside else super().recorded(recipe)

    def record(self, values: Values) -> dict[str, Any]:
        return {"options": dict(values)} if self.outside else super().record(values)

    def expected_entries(self, values: Values) -> float:
        """Returns an estimate of the entries of a position."""
        raise NotImplementedError

    def largest_entries(self, values: Values) -> int:
        """Returns the most entries that a position can have."""
        raise NotImplementedError

    def largest_bytes(self, values: Values, *, vocab_size: int | None = None) -> int:
        """Returns the most bytes that a position's targets can take. vocab_size: None if unknown.

        For an entry a float32 and an id; for the position entropy, nll, counts and tail.
        """
        entries = self.largest_entries(values)
        id_bytes = 4
        if vocab_size is not None:
            entries = min(entries, vocab_size)
            id_bytes = max(2, -(-(vocab_size - 1).bit_length() // 8))
        return 16 + entries * (id_bytes + 4)

    def select(
        self, positions: Positions, values: Values, *, seed: int, **common: Any
    ) -> SparseTargets:
        """Returns the targets of positions, as torch tensors, equal on all ranks of the group.

        common: further fields of the SparseTargets (temperature, entropy, nll).
        """
        raise NotImplementedError

    def put(self, writer: SymbolWriter, t: SparseTargets, ranks_E: np.ndarray) -> int:
        """Append the streams of numpy targets. Returns a uint32 for `take`.

        ranks_E: the ids as ranks by frequency.
        """
        raise NotImplementedError

    def take(self, reader: SymbolReader, n: int, parameter: int, truth: bool, file: str) -> Fields:
        """Decodes the streams of n positions to fields of SparseTargets, numpy or torch.

        `ranks` stands in place of ids, `counts` in place of offsets. truth: whether truth_added is
        among them. Raises CorruptBlockError for what `put` does not write.
        """
        raise NotImplementedError

    def retruncate(
        self,
        t: SparseTargets,
        values: Values,
        *,
        keys_N: np.ndarray,
        labels_N: np.ndarray | None,
        seed: int,
        times: int,
    ) -> SparseTargets:
        """Returns numpy targets made smaller by `values`, see cache.retruncate."""
        raise NotImplementedError


@functools.cache
def find_method(name: str, key: str = "") -> Method:
    """Returns the registered method. key: the configuration key that names it, for messages.

    Raises ConfigError for a name that is not registered, or is registered wrongly.
    """
    found: Method = METHODS.get(name, key=key)
    if METHODS.distribution(name) is not None:
        _check_outside(name, found, f"{key}: " if key else "")
    return found


def sparse_method(name: str) -> SparseMethod:
    """Returns the registered method of sparse targets. Raises ConfigError as `find_method`."""
    found = find_method(name)
    assert isinstance(found, SparseMethod), name
    return found


def method_with_byte(byte: int) -> SparseMethod | None:
    """Returns the method whose number on disk is `byte`; None where none is registered."""
    if byte >= FIRST_OUTSIDE_BYTE:
        found = [name for name, each in _outside() if each.byte == byte]
        return sparse_method(found[0]) if found else None
    return next((m for m in map(sparse_method, own_sparse_names()) if m.byte == byte), None)


def _outside() -> Iterator[tuple[str, SparseMethod]]:
    """Methods of other distributions, less those that cannot be imported."""
    for name in METHODS.names():
        if METHODS.distribution(name) is not None:
            try:
                yield name, METHODS.get(name)
            except ConfigError:
                continue


def _check_outside(name: str, found: Any, where: str) -> None:
    origin = METHODS.distribution(name)
    assert origin is not None
    title = f"{where}the method {name} of {origin.name} {origin.version}"
    if getattr(found, "name", None) != name:
        raise ConfigError(
            f"{title} is named {getattr(found, 'name', None)!r} by its object, expected {name!r}: "
            "register it by its own name"
        )
    byte = getattr(found, "byte", None)
    if type(byte) is not int or not FIRST_OUTSIDE_BYTE <= byte <= LAST_BYTE:
        raise ConfigError(
            f"{title} has the byte {byte!r}, expected {FIRST_OUTSIDE_BYTE} to {LAST_BYTE}: those "
            "below are megadistill's own"
        )
    for other, each in _outside():
        if other != name and each.byte == byte:
            theirs = METHODS.distribution(other)
            assert theirs is not None
            raise ConfigError(
                f"{title} has the byte {byte}, which is also that of {other} of {theirs.name} "
                f"{theirs.version}: uninstall one of them"
            )
