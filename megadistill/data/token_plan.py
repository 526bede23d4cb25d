"""The settings of a token store before it is made: its recipe, its columns, how text is encoded.

What can be refused of them is refused here, before a document is tokenised and without writing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megadistill.blocks import open_store
from megadistill.blocks.layout import kind_of
from megadistill.config import Config, DataConfig
from megadistill.data.chat.encoder import ChatSpec
from megadistill.data.chat.settings import find_chat
from megadistill.data.encode import EncoderSpec
from megadistill.data.names import token_names
from megadistill.data.recipe_keys import keys_of
from megadistill.data.sources.corpus_columns import configured
from megadistill.data.sources.source import resolved, source_identity
from megadistill.data.tokenizer import (
    chat_identity,
    encoder_spec,
    load_tokenizer,
    tokenizer_identity,
)
from megadistill.errors import ConfigError, RecipeError


@dataclass(frozen=True)
class TokenPlan:
    """A token store's settings, known before it is made."""

    data: DataConfig  # with the columns that are read
    spec: EncoderSpec
    settings: dict[str, Any]  # the arguments of BlockWriter.create

    @property
    def name(self) -> str:
        return self.data.dir

    @property
    def recipe(self) -> dict[str, Any]:
        return self.settings["header"]["recipe"]

    @property
    def names(self) -> dict[str, str]:
        return self.settings["header"]["names"]

    @property
    def tokenizer(self) -> dict[str, Any]:
        return self.recipe["tokenizer"]

    @property
    def seq_len(self) -> int:
        return self.data.seq_len

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @property
    def columns(self) -> dict[str, str]:
        return self.settings["columns"]

    @property
    def block_size(self) -> int:
        return self.settings["block_size"]

    @property
    def is_begun(self) -> bool:
        """Whether anything is at `data.dir`."""
        path = Path(self.data.dir)
        return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def plan_tokens(config: Config) -> TokenPlan:
    """The token store that `config.data` asks for. Reads the corpus' columns and the tokenizer.

    DataError for a corpus that is missing, ConfigError for its columns, tokenizer or chat template,
    RecipeError for another packing than that of the store at `data.dir`. Writes nothing.
    """
    config = config.model_copy(update={"data": resolved(config.data)})
    if config.targets.positions == "loss_mask" and config.data.text_field is not None:
        raise ConfigError(
            f"targets.positions: loss_mask needs text that is part prompt, part completion, found "
            f"the column {config.data.text_field!r} alone: set targets.positions=all"
        )
    tokenizer = load_tokenizer(config)
    config, chat = find_chat(config, tokenizer)
    data = config.data
    spec = encoder_spec(tokenizer, chat=chat, columns=configured(data))
    settings = store_settings(config, tokenizer, chat, packing=_packing(data, spec))
    return TokenPlan(data, spec, settings)


def store_settings(
    config: Config, tokenizer: Any, chat: ChatSpec | None, *, packing: str | None
) -> dict[str, Any]:
    """The arguments of BlockWriter.create: the recipe and the columns.

    packing: "best_fit", "in_order", or None: in order, and no continuation begins with a BOS. So
    all stores without the field in their recipe were packed.
    """
    data = config.data
    columns = {"tokens": f"ndarray:uint32:{data.seq_len}", "documents": "ndarray:uint32"}
    if chat is not None or data.completion_field is not None:
        columns["loss_mask"] = f"ndarray:uint8:{data.seq_len}"
    if packing == "best_fit":
        columns["padding"] = "uint64"
    recipe = {
        "source": source_identity(data),
        "tokenizer": tokenizer_identity(tokenizer) | ({} if chat is None else chat_identity(chat)),
        "seq_len": data.seq_len,
        "pack": data.pack,
        **({} if packing is None else {"packing": packing}),
    }
    return {
        "kind": "tokens",
        "header": {"recipe": recipe, "names": token_names(config)},
        "columns": columns,
        "block_size": data.block_size,
        "keys": keys_of(config, kind="tokens"),
    }


def _packing(data: DataConfig, spec: EncoderSpec) -> str | None:
    """The recipe's packing: that of the store which is there, unless another one is asked for."""
    if data.pack == "concat":
        return None
    store = open_store(data.dir) if kind_of(Path(data.dir)) == "tokens" else None
    if store is not None and store.present():  # one without blocks begins anew
        found = store.recipe.get("packing")
        if data.packing is None or data.packing == (found or "in_order"):
            return found
        raise RecipeError(
            f"{data.dir}: was packed by data.packing {found or 'in_order'}, found "
            f"{data.packing}: leave data.packing out, or set data.dir to another folder"
        )
    if data.packing == "in_order":
        # Without a BOS nothing differs from the stores that have no such field.
        return None if spec.bos is None else "in_order"
    return "best_fit"
