"""The longest sequence that a model was made for, by its config.json.

Rope scaling extends `max_position_embeddings` in some models (YaRN in Qwen2.5: 32,768 positions and
a factor of 4) and is counted in it in others (Llama 3.1, DeepSeek-V3, Phi-3). What tells them apart
is the length before scaling: the longest sequence is `original_max_position_embeddings` times the
factor, or `max_position_embeddings` where that is more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from megadistill.errors import ConfigError

_LENGTHS = ("max_position_embeddings", "n_positions", "max_sequence_length")
_ORIGINAL = "original_max_position_embeddings"
_SCALED = ("linear", "dynamic", "yarn", "llama3", "longrope", "su")  # su: longrope's first name


def longest_sequence(settings: Mapping[str, Any]) -> int | None:
    """Returns the number of positions, or None where config.json does not say.

    settings: of the text model, as config.json has them (`rope_scaling`) or as transformers 5
    writes them (`rope_parameters`, which can be given for each kind of layer).
    """
    found = next((n for name in _LENGTHS if (n := _number(settings.get(name)))), None)
    if found is None:
        return None
    longest = found
    for rope in _ropes(settings):
        factor = _number(rope.get("factor"))
        if factor is not None and rope.get("rope_type", rope.get("type")) in _SCALED:
            original = rope.get(_ORIGINAL) or settings.get(_ORIGINAL)
            longest = max(longest, factor * (_number(original) or found))
    return int(longest)


def check_seq_len(seq_len: int, longest: int | None, *, model: str, way_out: str) -> None:
    """ConfigError where sequences are longer than the model was made for.

    longest  from `longest_sequence`
    model    for the message: its key, and its name where there is one
    """
    if longest is not None and seq_len > longest:
        raise ConfigError(
            f"data.seq_len: {seq_len} is beyond the {longest} positions of {model}: {way_out}"
        )


def _ropes(settings: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for name in ("rope_scaling", "rope_parameters"):
        value = settings.get(name)
        if isinstance(value, Mapping):
            yield value
            yield from (part for part in value.values() if isinstance(part, Mapping))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
