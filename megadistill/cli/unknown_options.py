"""Messages for options that a command does not have, such as `--lr 1e-4`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megadistill.config.messages import all_keys
from megadistill.config.other_trainers import ABSENT, KEYS
from megadistill.config.suggest import closest, key_elsewhere


def unknown_options(
    argv: Sequence[str], unknown: Sequence[str], *, known: Sequence[str], takes_overrides: bool
) -> Iterator[str]:
    """Yields a line for each option in `unknown`, with what to write in its place.

    known            the options that the command has
    takes_overrides  whether the command takes `a.b=value`
    """
    for option in [word for word in unknown if word.startswith("-")] or unknown:
        name, equals, value = option.partition("=")
        text = value if equals else _value(argv, option)
        yield f"unrecognized arguments: {name}{_hint(name, text, known, takes_overrides)}"


def _hint(name: str, value: str, known: Sequence[str], takes_overrides: bool) -> str:
    bare = name.lstrip("-").replace("-", "_")
    keys = all_keys() if takes_overrides and name != bare else []
    if keys and bare in ABSENT:
        return f": {ABSENT[bare]}"
    if bare in KEYS and keys:
        return f": the key is {KEYS[bare]}: set it as {KEYS[bare]}=VALUE"
    near = closest(name, known, cutoff=0.7)
    key = bare if bare.startswith("deepspeed.") and keys else closest(bare, keys, cutoff=0.75)
    key = key or key_elsewhere(bare, keys, cutoff=1.0 if near else 0.75)
    if key is not None:
        return f": a key takes no dashes: set it as {key}={value}"
    if near is not None:
        return f", did you mean {near}?"
    return ": --help lists the options"


def _value(argv: Sequence[str], option: str) -> str:
    """The word behind an option, or true where an option without a value is followed by none."""
    behind = argv[list(argv).index(option) + 1 :]
    return (
        behind[0] if behind and not behind[0].startswith("--") and "=" not in behind[0] else "true"
    )
