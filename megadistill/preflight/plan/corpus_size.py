"""How many sequences a corpus gives: counted where a store knows, else estimated, else unknown."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from megadistill.blocks import BlockReader, open_store
from megadistill.blocks.remote.object_store import shown
from megadistill.config import CacheConfig, Config, DataConfig
from megadistill.data.continuation import covers
from megadistill.data.counts import count_tokens
from megadistill.data.learned import learned_tokens
from megadistill.data.sources import text_files
from megadistill.data.sources.source import count_documents, distribution, resolved
from megadistill.errors import MegadistillError
from megadistill.preflight.plan import assumptions
from megadistill.storage.disk import is_url, readable_bytes

_UNPACKED = {".parquet": 2.5, ".gz": 3.5, ".bz2": 4.5, ".xz": 4.5, ".zst": 3.5}


def sequences(config: Config, *, vocab_size: int | None) -> tuple[int | None, str]:
    """(number of sequences, how it is known)."""
    data = config.data
    online = config.teacher.mode == "online"
    corpus = data.source or data.files or data.name
    if not online and (not config.cache.is_folder or not corpus):
        return _of_sources(config.cache)
    with contextlib.suppress(MegadistillError):  # a damaged store is for its reader to report
        known = _counted(data, open_store(data.dir))
        if known is not None:
            return known
    with contextlib.suppress(MegadistillError):
        planned = None if online else open_store(config.cache.folder).num_sequences
        if planned is not None and not os.path.isdir(data.dir):
            return planned, f"known: {config.cache.folder} is planned"
    if config.stream_is_unbounded:
        whole = -(-config.sequences_needed // data.block_size) * data.block_size
        return whole, "as many as train.steps need"
    tokens, how = _tokens(data, vocab_size)
    return (None if tokens is None else max(1, round(tokens / data.seq_len))), how


def has_loss_mask(data: DataConfig) -> bool:
    """Whether the token store has a loss mask: as it says, else by the columns of local files."""
    with contextlib.suppress(MegadistillError):  # no store yet, or a damaged one
        return "loss_mask" in open_store(data.dir).columns
    if data.files is not None or (data.name is not None and os.path.isdir(data.name)):
        with contextlib.suppress(MegadistillError):  # the reader of the corpus reports it
            data = resolved(data)
    return data.messages_field is not None or data.completion_field is not None


def target_share(config: Config) -> float:
    """Positions with targets over all positions, padding included: what the loss mask keeps."""
    if config.targets.positions not in (None, "loss_mask"):
        return 1.0
    with contextlib.suppress(MegadistillError):  # not there yet, or for its reader to report
        store = open_store(config.data.dir)
        learned, positions = learned_tokens(store), len(store) * config.data.seq_len
        if learned is not None and positions:
            return min(1.0, learned / positions)
    return 1.0


def tokens(data: DataConfig, sequences: int) -> int:
    """Tokens of so many sequences, without padding where the token store says how much it has."""
    with contextlib.suppress(MegadistillError):  # no store yet, or a damaged one
        store = open_store(data.dir)
        if len(store) and store.recipe.get("seq_len") == data.seq_len:
            return round(sequences * count_tokens(store) / len(store))
    return sequences * data.seq_len


def _of_sources(cache: CacheConfig) -> tuple[int | None, str]:
    """(sequences of an epoch, how known) of caches to train from alone."""
    total = 0.0
    for source in cache.sources:
        if is_url(source.dir):
            return None, f"unknown before {shown(source.dir)} is asked, when training starts"
        try:
            planned = open_store(source.dir).num_sequences
        except MegadistillError:
            planned = None
        if planned is None:
            return None, f"unknown: {source.dir} is not there, or not planned"
        total += planned * source.weight
    return round(total), "known: an epoch of the caches, by their weights"


def _counted(data: DataConfig, store: BlockReader) -> tuple[int, str] | None:
    """(sequences, how known) of a token store: its plan; what it will grow to; None."""
    blocks = store.committed()
    last = store.marker(blocks[-1]) if blocks else {}
    end = last.get("end")
    if store.num_sequences is not None and (end is None or covers(store, data)):
        return store.num_sequences, f"known: {data.dir} is planned"
    documents, read = count_documents(data), last.get("cursor", {}).get("document")
    read = last.get("documents_read", read)
    if end is not None:
        read = end["documents_read"]
    if documents is None or not read or read > documents:
        return None
    held = blocks[-1] * store.block_size + last["sequences"]
    return round(held * documents / read), (
        f"estimated from the {held:,} that {read:,} of {documents:,} documents gave, in {data.dir}"
    )


def _tokens(data: DataConfig, vocab_size: int | None) -> tuple[float | None, str]:
    a_token = assumptions.bytes_a_token_of_text(vocab_size)
    a_document = assumptions.TOKENS_A_DOCUMENT
    by_number = None if data.max_samples is None else float(data.max_samples * a_document)
    try:
        if data.source is not None:
            found = count_documents(data)
            if distribution(data) is not None:
                return _of_documents(found)
            tokens = (found or 0) * assumptions.BYTES_A_SOURCE_FILE / a_token
            return tokens, f"estimated from {found or 0:,} files"
        if data.files is not None:
            paths = text_files.find(data.files)
            size = sum(_text_bytes(path) for path in paths)
            tokens = size / a_token
            if by_number is not None and by_number < tokens:
                return by_number, f"estimated from at most {data.max_samples:,} documents"
            return tokens, f"estimated from {readable_bytes(size)} of text in {len(paths)} file(s)"
    except MegadistillError as error:
        return None, f"unknown: {error}"
    return _of_documents(data.max_samples)


def _of_documents(count: int | None) -> tuple[float | None, str]:
    if count is None:
        return None, "unknown: the number of documents is not known before they are read"
    a_document = assumptions.TOKENS_A_DOCUMENT
    how = f"estimated from at most {count:,} documents, {a_document} tokens each"
    return float(count * a_document), how


def _text_bytes(path: str) -> float:
    size = float(Path(path).stat().st_size)
    for suffix in Path(path).suffixes:
        size *= _UNPACKED.get(suffix.lower(), 1)
    return size
