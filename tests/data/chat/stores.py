"""Configurations, corpora and token stores of chats, for tests."""

import json

import numpy as np

from megadistill.config import Config
from tests.data.chats import TEMPLATES
from tests.data.test_chat_masks import encoder, learned

SPECIAL = TEMPLATES["header and end of turn"][1]


def texts(hf, template, chat, tools=None, **options):
    """Stretches of a chat that are learned."""
    return learned(hf, *encoder(hf, template, **options).encode(chat, tools))


def config(folder, **data):
    return Config(
        data={"seq_len": 32, "block_size": 4, "dir": str(folder / "tokens"), "workers": 1, **data},
        teacher={"model": str(folder / "model")},
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def decoded(store, hf):
    return hf.decode(np.concatenate([sample["tokens"] for sample in store]))
