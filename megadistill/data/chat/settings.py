"""Whether a corpus holds chats, and the template for them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megadistill.blocks import open_store
from megadistill.blocks.layout import kind_of
from megadistill.config import Config, DataConfig
from megadistill.data.chat.encoder import EARLIER, ChatSpec
from megadistill.data.sources.source import holds_turns, with_tools
from megadistill.data.tokenizer import chat_spec


def find_chat(config: Config, tokenizer: Any) -> tuple[Config, ChatSpec | None]:
    """(the configuration with the column of tools, the chat template); None without chats.

    `config` names its other columns. A token store whose recipe has no `assistant_mask` was begun
    before there was a choice, and continues as it began. Raises ConfigError, DataError.
    """
    data = config.data
    if data.messages_field is not None and _begun_earlier(data):
        return config, replace(chat_spec(config, tokenizer), mask=EARLIER)
    if data.messages_field is None and (data.completion_field is None or not holds_turns(data)):
        return config, None
    config = config.model_copy(update={"data": with_tools(data)})
    return config, chat_spec(config, tokenizer)


def _begun_earlier(data: DataConfig) -> bool:
    if kind_of(Path(data.dir)) != "tokens":
        return False
    store = open_store(data.dir)
    if not store.present():  # one without blocks begins anew
        return False
    tokenizer = store.recipe.get("tokenizer", {})
    return "chat_template" in tokenizer and "assistant_mask" not in tokenizer
