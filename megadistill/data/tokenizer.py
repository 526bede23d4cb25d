"""The tokenizer: loading it, what it must have, and what of it belongs into the recipe."""

from __future__ import annotations

import hashlib
import json
import pickle
from typing import Any

from megadistill.config import Config
from megadistill.data.encode import EncoderSpec
from megadistill.errors import ConfigError

# What decides which ids a text becomes. Truncation and padding are settings of the moment and are
# switched off; the post-processor adds bos and eos, which are named apart in the recipe; the
# decoder goes the other way.
_TEXT_TO_ID = ("model", "normalizer", "pre_tokenizer", "added_tokens")


def load_tokenizer(config: Config) -> Any:
    """The transformers tokenizer of `data.tokenizer`, or of the teacher.

    ConfigError: there is none, it is a slow one, it has no end token, or a chat is asked for and it
    has no chat template.
    """
    own, teacher = config.data.tokenizer, config.teacher
    key, name = ("teacher.model", teacher.model) if own is None else ("data.tokenizer", own)
    tokenizer = open_tokenizer(
        name,
        key=key,
        revision=teacher.revision if own is None else None,
        trust_remote_code=teacher.trust_remote_code,
    )
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"{key}: {name}: the tokenizer has no end token, which ends every document: set "
            "eos_token in its tokenizer_config.json"
        )
    if config.data.messages_field is not None and not tokenizer.chat_template:
        raise ConfigError(
            f"{key}: {name}: data.messages_field is set and the tokenizer has no chat template: "
            "set data.tokenizer to the folder of one that has (a chat_template.jinja)"
        )
    return tokenizer


def open_tokenizer(
    name: str, *, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The fast tokenizer of a folder or a hub id. ConfigError naming `key`, which asked for it."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{key}: {name}: no tokenizer can be loaded: {lines[0]}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{key}: {name}: expected a fast tokenizer (a tokenizer.json), found "
            f"{type(tokenizer).__name__}: convert it with `tokenizer.save_pretrained` of its Fast "
            "class, and give that folder as the tokenizer (data.tokenizer)"
        )
    return tokenizer


def encoder_spec(tokenizer: Any, *, chat: bool) -> EncoderSpec:
    """What a tokenising process needs of it."""
    return EncoderSpec(
        backend=tokenizer.backend_tokenizer.to_str(),
        eos=tokenizer.eos_token_id,
        bos=begin_token(tokenizer),
        chat=pickle.dumps(tokenizer) if chat else None,
    )


def count_ids(tokenizer: Any) -> int:
    """One more than its largest id: ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def begin_token(tokenizer: Any) -> int | None:
    """The id that the tokenizer puts before a text, where it does."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def tokenizer_identity(tokenizer: Any, *, chat: bool, below: int | None = None) -> dict[str, Any]:
    """Its part of the recipe: by content, so that a copy in another folder is the same.

    below: without the tokens that were added from this id on. So of a model whose vocabulary was
    extended the content is that of the model it comes from.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if below is not None:
        added = backend.get("added_tokens") or []
        backend["added_tokens"] = [token for token in added if token["id"] < below]
    identity = {
        "content": _digest(_settled({part: backend.get(part) for part in _TEXT_TO_ID})),
        "vocab_size": count_ids(tokenizer),
        "bos": begin_token(tokenizer),
        "eos": tokenizer.eos_token_id,
    }
    if chat:
        identity["chat_template"] = _digest(tokenizer.get_chat_template())
    return identity


def _settled(value: Any) -> Any:
    """`value` without what versions of the tokenizers library write differently.

    Settings at null or false may be left out; a merge is a pair, or two words with a space between.
    """
    if isinstance(value, dict):
        kept = {k: _settled(v) for k, v in value.items() if v is not None and v is not False}
        merges = kept.get("merges")
        if isinstance(merges, list):
            kept["merges"] = [m if isinstance(m, str) else " ".join(m) for m in merges]
        return kept
    if isinstance(value, list):
        return [_settled(v) for v in value]
    return value


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
