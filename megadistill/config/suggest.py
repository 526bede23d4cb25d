"""Did you mean: a guess at the key that an unknown one was meant to be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from megadistill.config.other_trainers import ABSENT, KEYS


def closest(word: str, candidates: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The candidate that looks most like `word`, or None."""
    found = difflib.get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(
    key: str, siblings: Iterable[str], *, prefix: str, all_keys: Iterable[str] = ()
) -> str:
    """`, did you mean a.b?`, or what there is to choose from.

    key        the unknown key, without the path to it
    siblings   the keys that may stand there; `prefix` is the path to them, "" at the top
    all_keys   full paths of every key, for a key that stands in the wrong section
    """
    siblings, all_keys = list(siblings), list(all_keys)
    if all_keys and key in ABSENT:
        return f": {ABSENT[key]}"
    elsewhere = key_elsewhere(key, all_keys, cutoff=1.0)
    near = closest(key, siblings, cutoff=0.7)
    if elsewhere is None and near is None:
        near = closest(key, siblings, cutoff=0.5)
        elsewhere = key_elsewhere(key, all_keys) if near is None else None
    if elsewhere is not None and (near is None or key in KEYS):
        return f", did you mean {elsewhere}?"
    if near is not None:
        return f", did you mean {prefix}.{near}?" if prefix else f", did you mean {near}?"
    return f", expected one of {', '.join(sorted(siblings))}"


def key_elsewhere(name: str, all_keys: Iterable[str], *, cutoff: float = 0.75) -> str | None:
    """Returns the full path of the key that `name` means: another trainer's name, or a last part.

    cutoff  the likeness, up to 1, that a last part must have
    """
    leaves = {path.rpartition(".")[2]: path for path in reversed(list(all_keys))}
    if not leaves:
        return None
    if name in KEYS:
        return KEYS[name]
    near = closest(name, leaves, cutoff=cutoff)
    return leaves[near] if near is not None else None
