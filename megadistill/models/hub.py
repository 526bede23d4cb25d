"""The hub: whether it can be reached, asked once and briefly. Imports no torch.

The hub's client repeats each request for 24 s where there is no connection, and a tokenizer takes
two of them. A mistyped folder looks like a hub id, so its user would wait a minute for the answer.
"""

from __future__ import annotations

from pathlib import Path

from megadistill.errors import ConfigError, first_line

WAIT_S = 5.0
ATTEMPTS = 2


def in_cache(name: str, file: str, *, revision: str | None) -> Path | None:
    """Returns a file of the model `name` in the hub's cache on this host, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, file, revision=revision)
    except ValueError:  # no hub id
        return None
    return Path(found) if isinstance(found, str) else None


def require_hub(name: str, *, key: str) -> None:
    """ConfigError for the model `name` if the hub cannot be reached. key: where it is named."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for attempt in range(1, ATTEMPTS + 1):
        try:
            get_session().head(constants.ENDPOINT, timeout=WAIT_S)  # any answer will do
            return
        except Exception as error:  # noqa: BLE001 - requests' or httpx's, by version
            if attempt == ATTEMPTS:
                raise ConfigError(
                    f"{key}: {name} is no folder here, and cannot be had from the hub, which "
                    f"cannot be reached ({type(error).__name__}: {first_line(error)[:200]}): check "
                    "the name and the connection, or download the model and give its folder"
                ) from None
