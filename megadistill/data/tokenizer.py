"""The tokenizer: loading it, what it must have, and what of it belongs into the recipe."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megadistill.config import Config
from megadistill.data.chat.encoder import EARLIER, ChatSpec
from megadistill.data.chat.template import RANDOM, has_marks, template_names
from megadistill.data.encode import EncoderSpec
from megadistill.errors import ConfigError
from megadistill.models.model_files import require_tokenizer, tokenizer_source

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
    if config.data.messages_field is not None:
        chat_spec(config, tokenizer)
    return tokenizer


def open_tokenizer(
    name: str | None, *, key: str, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """The fast tokenizer of a folder or a hub id. ConfigError naming `key`, which asked for it."""
    if name is None:
        raise ConfigError(f"{key}: missing: set it, or data.tokenizer, a folder or a hub id")
    from transformers import AutoTokenizer

    name, revision = tokenizer_source(name, revision, key=key)
    require_tokenizer(name, revision, key=key)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        models = ", ".join(sorted(path.name for path in Path(name).glob("*.model")))
        if models and not Path(name, "tokenizer.json").exists():
            # transformers names the library that it tried last, which may be the wrong one.
            raise ConfigError(
                f"{key}: {name}: found {models} and no tokenizer.json, expected a fast tokenizer: "
                "convert it once (pip install sentencepiece protobuf tiktoken; AutoTokenizer."
                "from_pretrained(...).save_pretrained(FOLDER)), and set data.tokenizer to that "
                "folder"
            ) from error
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"{key}: {name}: no tokenizer can be loaded: {lines[0]}") from error
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{key}: {name}: expected a fast tokenizer (a tokenizer.json), found "
            f"{type(tokenizer).__name__}: convert it with `tokenizer.save_pretrained` of its Fast "
            "class, and give that folder as the tokenizer (data.tokenizer)"
        )
    return tokenizer


def encoder_spec(
    tokenizer: Any, *, chat: ChatSpec | None = None, columns: dict[str, str] | None = None
) -> EncoderSpec:
    """Returns the EncoderSpec of a tokenizer, and of the chat template for a corpus of chats.

    columns: the corpus' columns by their `data` key.
    """
    return EncoderSpec(
        backend=tokenizer.backend_tokenizer.to_str(),
        eos=tokenizer.eos_token_id,
        bos=begin_token(tokenizer),
        chat=chat,
        columns=columns or {},
    )


def chat_spec(config: Config, tokenizer: Any) -> ChatSpec:
    """The chat template with its options.

    ConfigError: there is none, it cannot be read, it draws random numbers, or it lacks the marks
    that `data.assistant_mask: template` asks for.
    """
    data = config.data
    if data.chat_template is not None:
        where = f"data.chat_template: {data.chat_template}"
        templates = {"default": _read_template(data.chat_template)}
    else:
        own = data.tokenizer is not None
        name = data.tokenizer if own else config.teacher.model
        where = f"{'data.tokenizer' if own else 'teacher.model'}: {name}"
        templates = _own_templates(tokenizer, where)
    # A list of additional tokens, which transformers 4 has in the map, is no name in templates.
    tokens = {k: v for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    spec = ChatSpec(
        templates, tokens | data.chat_template_kwargs, data.chat_date, data.assistant_mask
    )
    for source in templates.values():
        try:
            names = template_names(source)
        except ValueError as error:
            raise ConfigError(f"{where}: the chat template cannot be read: {error}") from error
        if names & RANDOM:
            raise ConfigError(
                f"{where}: the chat template draws random numbers ({', '.join(names & RANDOM)}), "
                "so its text would be another one in each run: set data.chat_template to a file "
                "without them"
            )
        if spec.mask == "template" and not has_marks(source):
            raise ConfigError(
                f"data.assistant_mask: template: {where}: the chat template has no "
                "{% generation %} marks: set data.assistant_mask=generated, or data.chat_template "
                "to a file that has them"
            )
    return spec


def chat_identity(spec: ChatSpec) -> dict[str, Any]:
    """The chat template's part of the recipe, next to the tokenizer's: what decides the text."""
    if spec.mask == EARLIER:
        return {"chat_template": _digest(spec.templates["default"])}
    names: set[str] = set().union(*map(template_names, spec.templates.values()))
    identity: dict[str, Any] = {
        "chat_template": _digest(spec.templates["default"]),
        "assistant_mask": spec.mask,
    }
    if "tool_use" in spec.templates:
        identity["tool_use_template"] = _digest(spec.templates["tool_use"])
    used = {name: value for name, value in sorted(spec.variables.items()) if name in names}
    if used:
        identity["chat_variables"] = used
    if "strftime_now" in names:
        identity["chat_date"] = spec.date
    return identity


def _own_templates(tokenizer: Any, where: str) -> dict[str, str]:
    templates = tokenizer.chat_template
    if isinstance(templates, str) and templates:
        return {"default": templates}
    if not isinstance(templates, dict) or "default" not in templates:
        raise ConfigError(
            f"{where}: the corpus holds chats, and the tokenizer has no chat template: set "
            "data.chat_template to a file (.jinja), or data.tokenizer to the folder of a "
            "tokenizer that has one (a chat_template.jinja)"
        )
    return {k: v for k, v in templates.items() if k in ("default", "tool_use")}


def _read_template(path: str) -> str:
    try:
        source = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"data.chat_template: {path}: cannot be read: {reason}: expected a file with a jinja "
            "template"
        ) from error
    if not source.strip():
        raise ConfigError(f"data.chat_template: {path}: is empty: expected a jinja template")
    return source


def count_ids(tokenizer: Any) -> int:
    """Returns the tokenizer's largest id plus 1: ids may have gaps."""
    return 1 + max(tokenizer.get_vocab().values(), default=-1)


def begin_token(tokenizer: Any) -> int | None:
    """The id that the tokenizer puts before a text, where it does."""
    ids = tokenizer("a").input_ids
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


def tokenizer_identity(tokenizer: Any, *, below: int | None = None) -> dict[str, Any]:
    """Returns the tokenizer's part of the recipe: by content, the same for a copy elsewhere.

    below: without the tokens that were added from this id on. So of a model whose vocabulary was
    extended the content is that of the model it comes from.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if below is not None:
        added = backend.get("added_tokens") or []
        backend["added_tokens"] = [token for token in added if token["id"] < below]
    return {
        "content": _digest(_settled({part: backend.get(part) for part in _TEXT_TO_ID})),
        "vocab_size": count_ids(tokenizer),
        "bos": begin_token(tokenizer),
        "eos": tokenizer.eos_token_id,
    }


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
